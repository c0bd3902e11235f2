"""Pictures as callers have them, and the distance of each conversion from those of OpenCV, Pillow and PyAV.

Seen: a picture of PIL, a list and a torch tensor ended in an AttributeError; bytes of other libraries were taken to be
the same. `image_libraries.json` holds what the libraries make of 8 x 4 pixels, with their versions;
`benchmarks/image_libraries.py` says how it was made, and compares all colours.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from jquant import images
from jquant.types import InputError

FIGURES = json.loads((Path(__file__).parent / "image_libraries.json").read_text())
RGB = np.array(FIGURES["rgb"], np.uint8)
YUV = np.array(FIGURES["yuv"], np.uint8)  # in the range of studio video; its first pixel is white


def of(way: str) -> np.ndarray:
    return np.array(FIGURES[way], np.int32)


def distance(mine: Any, other: np.ndarray) -> int:
    return int(np.abs(np.asarray(mine).astype(np.int32) - other).max())


# ---------------------------------------------------------------------------------------------------------------------
# As callers have them

MAKERS: dict[str, Callable[[np.ndarray], Any]] = {
    "numpy": lambda x: x,
    "numpy, int64": lambda x: x.astype(np.int64),
    "jax": jnp.asarray,
    "torch": torch.from_numpy,
    "PIL": Image.fromarray,
    "lists": lambda x: x.tolist(),
    "a tuple of rows": lambda x: tuple(x),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(
    "function",
    [
        images.rgb_to_yuv444,
        images.rgb_to_centred_yuv444,
        images.rgb_to_nv12,
        images.rgb_to_nv12_to_yuv444,
        images.rgb_to_nv12_to_centred_yuv444,
    ],
)
def test_every_kind_of_picture_is_the_same(function: Callable[..., Any], make: Callable[[np.ndarray], Any]):
    expected = jax.tree.leaves(function(RGB))
    for mine, wanted in zip(jax.tree.leaves(function(make(RGB))), expected, strict=True):
        np.testing.assert_array_equal(mine, wanted)


@pytest.mark.parametrize("make", [v for k, v in MAKERS.items() if k != "PIL"], ids=[k for k in MAKERS if k != "PIL"])
@pytest.mark.parametrize(
    ("bgr", "rgb"),
    [
        (images.bgr_to_yuv444, images.rgb_to_yuv444),
        (images.bgr_to_centred_yuv444, images.rgb_to_centred_yuv444),
        (images.bgr_to_nv12, images.rgb_to_nv12),
        (images.bgr_to_nv12_to_yuv444, images.rgb_to_nv12_to_yuv444),
        (images.bgr_to_nv12_to_centred_yuv444, images.rgb_to_nv12_to_centred_yuv444),
    ],
)
def test_bgr_takes_the_same(bgr: Callable[..., Any], rgb: Callable[..., Any], make: Callable[[np.ndarray], Any]):
    swapped = make(np.ascontiguousarray(RGB[..., ::-1]))
    for mine, wanted in zip(jax.tree.leaves(bgr(swapped)), jax.tree.leaves(rgb(RGB)), strict=True):
        np.testing.assert_array_equal(mine, wanted)


@pytest.mark.parametrize("make", [torch.from_numpy, jnp.asarray, np.ndarray.tolist])
def test_real_pixels_and_centred_ones_are_the_same(make: Callable[[np.ndarray], Any]):
    real = RGB.astype(np.float32)
    for function in (images.rgb_to_real_yuv444, images.bgr_to_real_yuv444):
        np.testing.assert_array_equal(function(make(real)), function(real))
    centred = (YUV.astype(np.int16) - 128).astype(np.float32)
    for function in (images.centred_yuv444_to_rgb, images.centred_yuv444_to_bgr):
        np.testing.assert_array_equal(function(make(centred)), function(centred))


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (
            lambda: images.rgb_to_yuv444(Image.new("RGBA", (2, 2))),
            r"has the mode 'RGBA'; give picture\.convert",
        ),
        (lambda: images.rgb_to_yuv444(Image.fromarray(RGB).convert("YCbCr")), "has the mode 'YCbCr'"),
        (lambda: images.rgb_to_nv12(Image.fromarray(RGB).convert("L")), "has the mode 'L'"),
        (lambda: images.bgr_to_yuv444(Image.fromarray(RGB)), "a picture of PIL is RGB, and BGR is expected"),
        (lambda: images.bgr_to_nv12(Image.fromarray(RGB)), "a picture of PIL is RGB, and BGR is expected"),
        (lambda: images.centred_yuv444_to_rgb(Image.fromarray(RGB)), "and centred YUV is expected"),
        (lambda: images.nv12_to_centred_yuv444(Image.fromarray(RGB)), "and NV12 is expected"),
        (lambda: images.rgb_to_real_yuv444(Image.fromarray(RGB)), "pixels are uint8; convert them to float32"),
        (lambda: images.rgb_to_yuv444([[1, 2, 3], [4, 5]]), "a list that is no picture"),
        (lambda: images.rgb_to_yuv444("picture.png"), "pixels are a str"),
        (lambda: images.rgb_to_yuv444(None), "pixels are a NoneType"),
        (lambda: images.rgb_to_yuv444([[0.5, 0.5, 0.5]]), "pixels are float32; the exact conversions take integers"),
        (lambda: images.rgb_to_yuv444([[0, 0, 256]]), r"pixels lie in \[0, 256\]"),
        (lambda: images.rgb_to_yuv444(torch.zeros(3, dtype=torch.bfloat16)), "is a torch tensor of torch.bfloat16"),
        (lambda: images.rgb_to_yuv444(torch.zeros(3, device="meta")), "is a torch tensor on meta"),
    ],
)
def test_what_is_no_picture_is_refused(call: Callable[[], Any], expected: str):
    with pytest.raises(InputError, match=expected):
        call()


# ---------------------------------------------------------------------------------------------------------------------
# NV12 in one plane


def one_plane(shape: tuple[int, ...] = (6, 4)) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray, torch.from_numpy, np.ndarray.tolist])
def test_nv12_in_one_plane_is_that_of_two(make: Callable[[np.ndarray], Any]):
    plane = one_plane()
    if make is np.ndarray.tolist:
        with pytest.raises(InputError, match="NV12 is int64, not uint8"):
            images.nv12_to_centred_yuv444(make(plane))
        return
    y, uv = plane[:4].reshape(4, 4, 1), plane[4:].reshape(2, 2, 2)
    expected = np.concatenate([y, uv.repeat(2, 0).repeat(2, 1)], -1).astype(np.int16) - 128
    np.testing.assert_array_equal(images.nv12_to_centred_yuv444(make(plane)), expected)
    np.testing.assert_array_equal(images.nv12_to_centred_yuv444(y, uv), expected)


@pytest.mark.parametrize("batch", [(1,), (3,), (2, 2)])
def test_a_batch_of_planes_is_each_of_them(batch: tuple[int, ...]):
    planes = one_plane((*batch, 6, 8))
    mine = images.nv12_to_centred_yuv444(planes)
    each = [images.nv12_to_centred_yuv444(p) for p in planes.reshape(-1, 6, 8)]
    np.testing.assert_array_equal(mine, np.stack(each).reshape(*batch, 4, 8, 3))
    np.testing.assert_array_equal(jax.jit(images.nv12_to_centred_yuv444)(planes), mine)
    np.testing.assert_array_equal(jax.vmap(images.nv12_to_centred_yuv444)(planes), mine)


def test_planes_that_are_split_are_those_that_were_made():
    y, uv = images.rgb_to_nv12(RGB)
    plane = np.concatenate([np.asarray(y)[..., 0], np.asarray(uv).reshape(4, 4)])
    for mine, wanted in zip(images.split_nv12(plane), (y, uv), strict=True):
        np.testing.assert_array_equal(mine, wanted)


@pytest.mark.parametrize("shape", [(5, 4), (6, 3), (6,), (4, 4, 1), (4, 4)])
def test_a_plane_of_another_shape_is_refused(shape: tuple[int, ...]):
    with pytest.raises(InputError, match=r"NV12 in one plane is \[\.\.\., 3H/2, W\] of even H and W"):
        images.split_nv12(np.zeros(shape, np.uint8))


# ---------------------------------------------------------------------------------------------------------------------
# Other libraries


def test_the_figures_say_where_they_come_from():
    assert FIGURES["versions"] == {"opencv": "5.0.0", "pillow": "13.0.0", "pyav": "18.1.0", "swscale": "9.5.102"}
    assert (Path(__file__).parents[2] / FIGURES["source"]).is_file()


@pytest.mark.parametrize(
    ("way", "swing", "luma", "chroma"),
    [
        ("pillow YCbCr", "full", 1, 2),
        ("opencv YCrCb", "full", 1, 2),
        ("pyav yuvj444p", "full", 1, 2),
        ("pyav yuv444p", "studio", 1, 1),
    ],
)
def test_yuv_is_near_that_of_a_library(way: str, swing: Any, luma: int, chroma: int):
    mine, other = np.asarray(images.rgb_to_yuv444(RGB, swing=swing)), of(way)
    assert distance(mine[..., 0], other[..., 0]) <= luma
    assert distance(mine[..., 1:], other[..., 1:]) <= chroma
    assert distance(images.rgb_to_yuv444(RGB, swing="studio" if swing == "full" else "full"), other) > 10


def test_the_yuv_of_opencv_has_other_factors():
    mine, other = np.asarray(images.rgb_to_yuv444(RGB)), of("opencv YUV")
    assert distance(mine[..., 0], other[..., 0]) <= 1
    assert distance(mine, other) > 10
    # U = 0.492 (B - Y), V = 0.877 (R - Y), of the analogue standard, clamped to a byte
    r, _, b = np.moveaxis(RGB.astype(np.float64), -1, 0)
    y = RGB @ np.array([0.299, 0.587, 0.114])
    analogue = np.clip(np.stack([y, 0.492 * (b - y) + 128, 0.877 * (r - y) + 128], -1), 0, 255)
    assert np.abs(other - analogue).max() <= 1


def test_the_i420_of_opencv_has_the_chroma_of_the_top_left_pixel():
    plane = of("opencv I420")
    y, uv = plane[:8], np.stack([plane[8:10].reshape(4, 2), plane[10:].reshape(4, 2)], -1)
    studio = np.asarray(images.rgb_to_yuv444(RGB, swing="studio"))
    mine_y, mine_uv = images.rgb_to_nv12(RGB, swing="studio")
    assert distance(mine_y[..., 0], y) <= 1
    assert distance(studio[::2, ::2, 1:], uv) <= 1
    assert distance(mine_uv, uv) > 10


def test_the_chroma_of_pyav_is_filtered_over_four_rows():
    plane = of("pyav nv12")
    mine_y, mine_uv = images.rgb_to_nv12(RGB, swing="studio")
    assert distance(mine_y[..., 0], plane[:8]) <= 1
    other = plane[8:].reshape(4, 2, 2)
    assert distance(mine_uv, other) > 5
    studio = np.asarray(images.rgb_to_yuv444(RGB, swing="studio"))[..., 1:].astype(np.float64)
    rows = np.pad(studio.reshape(8, 2, 2, 2).mean(2), ((1, 1), (0, 0), (0, 0)), mode="edge")
    filtered = (rows[0:-3:2] + 3 * rows[1:-2:2] + 3 * rows[2:-1:2] + rows[3::2]) / 8
    assert np.abs(filtered - other).max() <= 2  # 1 of the factors, 1 of the roundings


@pytest.mark.parametrize(
    ("way", "swing"),
    [
        ("pillow YCbCr, decoded", "full"),
        ("opencv YCrCb, decoded", "full"),
        ("pyav yuvj444p, decoded", "full"),
        ("opencv NV12, decoded", "studio"),
        ("pyav yuv444p, decoded", "studio"),
    ],
)
def test_rgb_is_within_one_of_that_of_a_library(way: str, swing: Any):
    centred = (YUV.astype(np.int16) - 128).astype(np.int8)
    mine = images.centred_yuv444_to_rgb(centred, swing=swing, mean=0, std=1, q_scale=None)
    assert distance(np.clip(np.round(np.asarray(mine)), 0, 255), of(way)) <= 1


def test_swscale_decodes_white_of_nv12_to_253():
    assert of("pyav nv12, decoded")[0, 0].tolist() == [253, 253, 253]
    assert of("opencv NV12, decoded")[0, 0].tolist() == [255, 255, 255]
    white = images.centred_yuv444_to_rgb(np.array([107, 0, 0], np.int8), swing="studio", mean=0, std=1, q_scale=None)
    np.testing.assert_allclose(white, 255, atol=0.5)
