"""Questions about the resizes of section 7."""

from collections.abc import Iterator

import numpy as np

from jquant.board.probes.build import Net, Probe
from jquant.ops.resample import Interpolate

_STEP = ("resize.step_bits", "resize.step_rounding")
_WEIGHT = ("resize.weight_bits", "resize.weight_rounding", "resize.rounding")


def _contrasts(seed: int, *shape: int) -> np.ndarray:
    """int16 images whose neighbours are far apart, so that a weight shows in its last bits."""
    return np.random.default_rng(seed).integers(-32768, 32768, size=shape)


def nearest() -> Probe:
    """The more outputs, the finer a step has to be for the pixel of the float rule."""
    net = Net("resize_nearest", "Resizes to the nearest pixel with many outputs: how their coordinates are computed.")
    for width, out in ((7, 33), (37, 1009), (61, 509), (96, 1000)):
        net.input(f"x_{width}", np.arange(width).reshape(1, 1, 1, -1), "int8", 1.0)
        op = Interpolate(size=(1, out), mode="nearest")
        net.node(f"y_{width}", op, (f"x_{width}",), None, ("resize.nearest_index", *_STEP))
    return net.done()


def doubled() -> Probe:
    """The weights are 1/4 and 3/4, and the steps are exact."""
    net = Net("resize_doubled", "A bilinear resize to twice the size: the rounding of the weighted sum.")
    net.input("x", _contrasts(21, 1, 1, 9, 11), "int16", 1.0)
    net.node("y", Interpolate(size=(18, 22), mode="bilinear"), ("x",), None, _WEIGHT)
    return net.done()


def bilinear() -> Probe:
    net = Net("resize_bilinear", "Bilinear resizes by other factors: coordinates and weights.")
    for label, size, out, corners in (("a", (7, 9), (19, 23), False), ("b", (6, 5), (17, 31), True)):
        net.input(f"x_{label}", _contrasts(22, 1, 1, *size), "int16", 1.0)
        op = Interpolate(size=out, mode="bilinear", align_corners=corners)
        net.node(f"y_{label}", op, (f"x_{label}",), None, (*_STEP, *_WEIGHT))
    return net.done()


def resize_probes() -> Iterator[Probe]:
    yield nearest()
    yield doubled()
    yield bilinear()
