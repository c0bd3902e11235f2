"""Questions about sampling at computed coordinates, section 7."""

from collections.abc import Iterator

import numpy as np

from jquant.board.probes.build import Net, Probe
from jquant.board.probes.groups import EXACT_NARROW, FRACTION, MAP, wide
from jquant.ops.grid import AffineGrid
from jquant.ops.grid_sampling import GridSample, Mode
from jquant.ops.regions import RoiAlign

_POINT = ("grid.point_bits", "grid.point_fraction_rounding", "grid.point_rounding")


def _image(seed: int, width: int, dtype: str = "int16") -> np.ndarray:
    most = 2**7 if dtype == "int8" else 2**15
    return np.random.default_rng(seed).integers(-most, most, size=(1, 1, 1, width))


def _points(at: np.ndarray, side: int) -> np.ndarray:
    """Coordinates on a row as grids [N, side, side, 2], whose sides do not count where the row is as long."""
    at = at[: max(len(at) // side**2, 1) * side**2]
    return np.stack([at, np.zeros_like(at)], axis=-1).reshape(-1, side, side, 2)


def absolute() -> Iterator[Probe]:
    """Coordinates in pixels on a row: how many fraction bits they have depends on the longest side."""
    roundings: dict[Mode, str] = {"bilinear": "grid.rounding", "nearest": "grid.nearest_rounding"}
    for mode, asks in roundings.items():
        net = Net(f"grid_{mode}", f"Samples ({mode}) at coordinates in pixels, on rows of several lengths.")
        for width, bits in ((3, 8), (31, 8), (255, 6), (1023, 5), (8191, 2), (16383, 1)):
            reach = min(width << bits, 2**15 - 1)
            at = np.concatenate([np.arange(-8, 2 << min(bits, 5)), np.linspace(0, reach, 160).astype(int)])
            grid = _points(at, min(width, 12))
            net.input(f"x_{width}", np.tile(_image(31, width), (len(grid), 1, 1, 1)), "int16", 1.0)
            net.input(f"g_{width}", grid, "int16", 2.0**-bits)
            op = GridSample(mode=mode, padding="border", coordinates="absolute")
            net.node(f"y_{width}", op, (f"x_{width}", f"g_{width}"), None, (*FRACTION, *EXACT_NARROW, asks))
        yield net.done()


def normalized() -> Probe:
    """Coordinates from -1 to 1, which one multiplication brings to pixels."""
    net = Net("grid_normalized", "Samples at coordinates from -1 to 1, on rows of several lengths.")
    at = np.linspace(-32768, 32767, 256).astype(int)
    grid = np.stack([at, np.zeros_like(at)], axis=-1)[None, None]
    for width, corners in ((47, True), (300, False)):
        net.input(f"x_{width}", _image(32, width), "int16", 1.0)
        net.input(f"g_{width}", grid, "int16", 1.1 / 32768)
        op = GridSample(align_corners=corners, padding="border")
        net.node(f"y_{width}", op, (f"x_{width}", f"g_{width}"), None, (*FRACTION, *MAP, "grid.rounding"))
    return net.done()


def affine() -> Probe:
    net = Net("grid_affine", "The grid of an affine map.")
    theta = np.array([[[32767, 0, 0], [0, 32767, 0]], [[20000, -17000, 5000], [-12345, 30000, -777]]])
    net.input("theta", theta, "int16", 2.0**-14)
    asks = ("grid.affine_bits", "grid.affine_rounding", *EXACT_NARROW, *wide("int16"))
    for size, corners in (((7, 11), False), ((13, 6), True)):
        net.node(f"y_{size[0]}", AffineGrid(size=size, align_corners=corners), ("theta",), ("int16", 2.0**-14), asks)
    return net.done()


def regions() -> Probe:
    """Boxes of whole pixels, whose map to coordinates is exact."""
    net = Net("grid_regions", "Averages of regions of an image, whose corners are whole pixels.")
    net.input("x", np.random.default_rng(33).integers(-128, 128, size=(1, 1, 20, 24)), "int8", 1.0, batched=False)
    boxes = np.array([[0, 0, 7, 5], [3, 1, 14, 18], [1, 2, 20, 13]])
    net.input("boxes", boxes, "int16", 1.0, batched=False)
    asks = (*FRACTION, "grid.map_bits", *_POINT, *EXACT_NARROW, *wide("int8", average=True))
    net.node("y", RoiAlign(output_size=(2, 3)), ("x", "boxes"), None, asks)
    return net.done()


def grid_probes() -> Iterator[Probe]:
    yield from absolute()
    yield normalized()
    yield affine()
    yield regions()
