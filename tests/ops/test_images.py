"""Colour conversions against the standard, and picture operators in programs that are prepared with them."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant import images, ops
from jquant.program.integers import run_integers
from jquant.reference import images as reference

SWINGS = ("full", "studio")
# ITU-R BT.601: luma, then colour differences scaled so that U and V reach half of their range.
LUMA = np.array([0.299, 0.587, 0.114])
BT601 = np.stack([LUMA, (np.array([0, 0, 1]) - LUMA) / 1.772, (np.array([1, 0, 0]) - LUMA) / 1.402])
STANDARD = {
    "full": (BT601, np.array([0, 128, 128])),
    "studio": (BT601 * np.array([[219], [224], [224]]) / 255, np.array([16, 128, 128])),
}
INTEGER = {"full": reference.FULL, "studio": reference.STUDIO}


@pytest.fixture(scope="module")
def lattice() -> np.ndarray:
    """Every fifth value of each channel, [52^3, 3]."""
    grid = np.arange(0, 256, 5)
    return np.stack(np.meshgrid(grid, grid, grid, indexing="ij"), axis=-1).reshape(-1, 3).astype(np.uint8)


@pytest.fixture(scope="module")
def pictures() -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(3).integers(0, 256, (2, 6, 8, 3), dtype=np.uint8))


# ---------------------------------------------------------------------------------------------------------------------
# To YUV


@pytest.mark.parametrize("swing", SWINGS)
def test_conversion_is_the_reference(lattice: np.ndarray, swing: str) -> None:
    fast = images.rgb_to_centred_yuv444(jnp.asarray(lattice), swing=swing)
    assert fast.dtype == jnp.int8
    np.testing.assert_array_equal(fast, reference.centred_yuv444(lattice, swing))
    pixels = images.rgb_to_yuv444(jnp.asarray(lattice), swing=swing)
    assert pixels.dtype == jnp.uint8
    np.testing.assert_array_equal(pixels, reference.yuv444(lattice, swing))


@pytest.mark.parametrize("swing", SWINGS)
def test_conversion_is_bt601_within_its_bound(lattice: np.ndarray, swing: str) -> None:
    """|error| <= sum over R, G, B of |m / 256 - c| * 255, and 1/2 for the rounding: 0.8 to 1.4 pixels a channel."""
    matrix, offset = STANDARD[swing]
    bound = 255 * np.maximum(INTEGER[swing][0] / 256 - matrix, 0).sum(1)  # all colours push one way ...
    bound = np.maximum(bound, 255 * np.maximum(matrix - INTEGER[swing][0] / 256, 0).sum(1)) + 0.5  # ... or the other
    error = np.abs(np.asarray(images.rgb_to_yuv444(jnp.asarray(lattice), swing=swing)) - (lattice @ matrix.T + offset))
    assert (error.max(0) <= bound).all()
    assert bound.max() < 1.7


@pytest.mark.parametrize(
    ("swing", "low", "high"),
    [("full", (-128, -127, -127), (127, 127, 127)), ("studio", (-112, -112, -112), (107, 112, 112))],
)
def test_ranges(lattice: np.ndarray, swing: str, low: tuple, high: tuple) -> None:
    """The corners reach them, and nothing leaves int8; conformance has all 2^24 colours."""
    centred = np.asarray(images.rgb_to_centred_yuv444(jnp.asarray(lattice), swing=swing))
    assert tuple(centred.min(0)) == low
    assert tuple(centred.max(0)) == high


def test_hand_made_colours() -> None:
    colours = jnp.asarray([[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]], jnp.uint8)
    full = [[0, 128, 128], [255, 128, 128], [77, 85, 255], [149, 44, 22], [29, 255, 107]]
    np.testing.assert_array_equal(images.rgb_to_yuv444(colours), full)
    studio = [[16, 128, 128], [235, 128, 128], [82, 90, 240], [144, 54, 34], [41, 240, 110]]
    np.testing.assert_array_equal(images.rgb_to_yuv444(colours, swing="studio"), studio)


def test_orders_axes_and_types_agree(pictures: jnp.ndarray) -> None:
    wanted = images.rgb_to_centred_yuv444(pictures, swing="studio")
    bgr, first = jnp.flip(pictures, -1), jnp.moveaxis(pictures, -1, 1)
    np.testing.assert_array_equal(images.bgr_to_centred_yuv444(bgr, swing="studio"), wanted)
    axis_1 = images.rgb_to_centred_yuv444(first, swing="studio", axis=1)
    np.testing.assert_array_equal(jnp.moveaxis(axis_1, 1, -1), wanted)
    axis_1 = images.bgr_to_centred_yuv444(jnp.flip(first, 1), swing="studio", axis=1)
    np.testing.assert_array_equal(jnp.moveaxis(axis_1, 1, -1), wanted)
    np.testing.assert_array_equal(images.rgb_to_centred_yuv444(pictures.astype(jnp.int32), swing="studio"), wanted)
    np.testing.assert_array_equal(images.bgr_to_yuv444(bgr), images.rgb_to_yuv444(pictures))
    np.testing.assert_array_equal(images.rgb_to_yuv444(np.asarray(pictures)), images.rgb_to_yuv444(pictures))


@pytest.mark.parametrize("swing", SWINGS)
def test_the_real_conversion_is_exact_and_has_the_linear_gradient(lattice: np.ndarray, swing: str) -> None:
    rgb = jnp.asarray(lattice, jnp.float32)
    real = jax.jit(partial(images.rgb_to_real_yuv444, swing=swing))(rgb)
    np.testing.assert_array_equal(real * 128, reference.centred_yuv444(lattice, swing))
    smooth = images.rgb_to_real_yuv444(rgb, swing=swing, rounded=False)
    assert np.abs(real - smooth).max() <= 0.5 / 128 + 1e-6
    jacobian = jax.jacobian(partial(images.rgb_to_real_yuv444, swing=swing))(rgb[7])
    np.testing.assert_allclose(jacobian, INTEGER[swing][0] / 256 / 128, rtol=1e-6)
    bgr = images.bgr_to_real_yuv444(jnp.flip(rgb, -1), swing=swing)
    np.testing.assert_array_equal(bgr, real)


# ---------------------------------------------------------------------------------------------------------------------
# Back


@pytest.mark.parametrize("swing", SWINGS)
def test_back_to_rgb(lattice: np.ndarray, swing: str) -> None:
    centred = images.rgb_to_centred_yuv444(jnp.asarray(lattice), swing=swing)
    options = {"swing": swing, "mean": (120.0, 110.0, 100.0), "std": (60.0, 61.0, 62.0)}
    back = images.centred_yuv444_to_rgb(centred, q_scale=None, **options)
    bound = 3.28 / 60  # what YUV loses, see jquant.program.insert.parity
    assert np.abs(back - (lattice - np.array(options["mean"])) / options["std"]).max() <= bound
    on_grid = np.asarray(images.centred_yuv444_to_rgb(centred, q_scale=1 / 32, **options))
    assert np.abs(on_grid - np.clip(back, -4, 127 / 32)).max() <= 1 / 64 + 1e-6
    np.testing.assert_array_equal(on_grid * 32, np.rint(on_grid * 32))
    bgr = images.centred_yuv444_to_bgr(
        centred, swing=swing, mean=options["mean"][::-1], std=options["std"][::-1], q_scale=None
    )
    np.testing.assert_array_equal(jnp.flip(bgr, -1), back)


def test_back_at_known_values() -> None:
    yuv = jnp.asarray([[0, 0, 0], [10, 20, -30]], jnp.int8)
    plain = {"mean": 0.0, "std": 1.0, "q_scale": None}
    np.testing.assert_allclose(
        images.centred_yuv444_to_rgb(yuv, **plain),
        [[128, 128, 128], [138 - 42.06, 138 - 6.882 + 21.423, 138 + 35.44]],
        rtol=1e-6,
    )
    black = jnp.asarray([[-112, 0, 0]], jnp.int8)
    np.testing.assert_allclose(images.centred_yuv444_to_rgb(black, swing="studio", **plain), [[0, 0, 0]], atol=1e-4)
    default = images.centred_yuv444_to_rgb(yuv)  # (rgb - 128) / 128 on the grid of 1/128
    np.testing.assert_array_equal(default * 128, [[0, 0, 0], [-32, 25, 45]])


# ---------------------------------------------------------------------------------------------------------------------
# NV12


@pytest.mark.parametrize("swing", SWINGS)
def test_nv12_is_the_reference(pictures: jnp.ndarray, swing: str) -> None:
    y, uv = images.rgb_to_nv12(pictures, swing=swing)
    assert (y.dtype, uv.dtype) == (jnp.uint8, jnp.uint8)
    wanted = reference.nv12(np.asarray(pictures), swing)
    np.testing.assert_array_equal(y, wanted[0])
    np.testing.assert_array_equal(uv, wanted[1])
    joined = reference.join_planes(*wanted)
    np.testing.assert_array_equal(images.nv12_to_centred_yuv444(y, uv), joined - 128)
    np.testing.assert_array_equal(images.rgb_to_nv12_to_yuv444(pictures, swing=swing), joined)
    np.testing.assert_array_equal(images.rgb_to_nv12_to_centred_yuv444(pictures, swing=swing), joined - 128)
    bgr, first = jnp.flip(pictures, -1), jnp.moveaxis(pictures, -1, 1)
    np.testing.assert_array_equal(images.bgr_to_nv12_to_yuv444(bgr, swing=swing), joined)
    np.testing.assert_array_equal(images.bgr_to_nv12_to_centred_yuv444(bgr, swing=swing), joined - 128)
    np.testing.assert_array_equal(images.bgr_to_nv12(bgr, swing=swing)[1], wanted[1])
    along = images.rgb_to_nv12_to_yuv444(first, swing=swing, axis=1)
    np.testing.assert_array_equal(jnp.moveaxis(along, 1, -1), joined)


def test_chroma_is_the_mean_half_up_and_repeated() -> None:
    """Grays have U = V = 128; blue 2 of 4 pixels."""
    gray, blue = [90, 90, 90], [0, 0, 255]
    picture = jnp.asarray([[gray, blue], [blue, gray]], jnp.uint8)
    _, uv = images.rgb_to_nv12(picture)
    np.testing.assert_array_equal(
        uv, [[[192, 118]]]
    )  # (2 * 128 + 2 * 255) / 4 = 191.5, (2 * 128 + 2 * 107) / 4 = 117.5
    back = images.rgb_to_nv12_to_yuv444(picture)
    np.testing.assert_array_equal(back[..., 1:], np.broadcast_to([192, 118], (2, 2, 2)))
    np.testing.assert_array_equal(back[..., 0], images.rgb_to_yuv444(picture)[..., 0])


def test_they_run_inside_jit_and_under_vmap(pictures: jnp.ndarray) -> None:
    wanted = images.rgb_to_nv12_to_centred_yuv444(pictures)
    np.testing.assert_array_equal(jax.jit(images.rgb_to_nv12_to_centred_yuv444)(pictures), wanted)
    np.testing.assert_array_equal(jax.vmap(images.rgb_to_nv12_to_centred_yuv444)(pictures), wanted)
    planes = images.rgb_to_nv12(pictures)
    np.testing.assert_array_equal(jax.vmap(images.nv12_to_centred_yuv444)(*planes), wanted)


def test_refusals(pictures: jnp.ndarray) -> None:
    with pytest.raises(jq.InputError, match="even height and width, not 5 x 8"):
        images.rgb_to_nv12(pictures[:, :5])
    with pytest.raises(jq.InputError, match="even height and width, not 6 x 7"):
        images.rgb_to_nv12_to_yuv444(jnp.moveaxis(pictures[:, :, :7], -1, 1), axis=1)
    with pytest.raises(jq.InputError, match="needs 3 channels along axis 1"):
        images.rgb_to_yuv444(pictures, axis=1)
    with pytest.raises(jq.InputError, match="swing must be"):
        images.rgb_to_yuv444(pictures, swing="video")
    with pytest.raises(jq.InputError, match="take integers"):
        images.rgb_to_centred_yuv444(pictures.astype(jnp.float32))
    with pytest.raises(jq.InputError, match="convert them to float32"):
        images.rgb_to_real_yuv444(pictures)
    with pytest.raises(jq.InputError, match="needs chroma of half"):
        images.nv12_to_centred_yuv444(pictures[..., :1], pictures[..., :2])
    with pytest.raises(jq.InputError, match="has a height"):
        images.rgb_to_nv12(pictures[0, 0])


# ---------------------------------------------------------------------------------------------------------------------
# Operators


def lowered(op: jq.ops.Op, inputs: tuple[jq.Input, ...], scale: float, dtype: str = "int8") -> jq.Program:
    names = tuple(i.name for i in inputs)
    graph = jq.Graph(inputs, (jq.Node("y", op, names),), ("y",))
    spec = jq.int8(scale=scale) if dtype == "int8" else jq.int16(scale=scale)
    model = jq.prepare(graph, {}, jq.QConfig({"*": jq.Policy(output=spec)}), target=jq.targets.NASH_E)
    return jq.lower(model)


PYRAMID = (jq.Input("luma", (None, 6, 8, 1), "uint8"), jq.Input("chroma", (None, 3, 4, 2), "uint8"))


def resizer(*size: int) -> tuple[jq.Input, ...]:
    h, w = size
    return (
        jq.Input("luma", (None, h, w, 1), "uint8"),
        jq.Input("chroma", (None, h // 2, w // 2, 2), "uint8"),
        jq.Input("roi", (None, 4), "int32"),
    )


def test_a_pyramid_input_in_a_prepared_network(pictures: jnp.ndarray) -> None:
    """At an output scale of the unit, integers are centred pixels and reals are centred * unit."""
    planes = images.rgb_to_nv12(pictures)
    wanted = images.nv12_to_centred_yuv444(*planes)
    program = lowered(ops.Nv12ToCentredYuv444(unit=1 / 128), PYRAMID, 1 / 128)
    np.testing.assert_array_equal(jq.run(program, *planes, raw=True), wanted)
    np.testing.assert_array_equal(jq.run(program, *planes), wanted / 128)
    float_value = jq.graph.evaluate_float(
        jq.Graph(PYRAMID, (jq.Node("y", ops.Nv12ToCentredYuv444(), ("luma", "chroma")),), ("y",)), {}, *planes
    )
    np.testing.assert_array_equal(float_value[0], wanted.astype(jnp.float32))


def test_pixels_that_are_not_exact_are_refused() -> None:
    floats = (jq.Input("x", (None, 4, 4, 1)),)
    with pytest.raises(jq.QConfigError, match="its x is int8; give the graph's Input the dtype 'uint8'"):
        lowered(ops.CentrePixels(), floats, 1.0)


REGIONS = np.array(
    [[0, 0, 21, 17], [4, 6, 13, 15], [3, 5, 3, 5], [7, 1, 20, 16], [-5, -9, 30, 25], [30, 4, 40, 9], [9, 9, 2, 2]],
    np.int32,
)


def planes_for(regions: np.ndarray, h: int = 18, w: int = 22) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    n = len(regions)
    y = rng.integers(0, 256, (n, h, w, 1), dtype=np.uint8)
    return y, rng.integers(0, 256, (n, h // 2, w // 2, 2), dtype=np.uint8)


@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
def test_a_region_is_the_crop_interpolated(interpolation: str) -> None:
    """The same integers as cropping the planes and running `Interpolate` on each, then joining them."""
    y, uv = planes_for(REGIONS)
    program = lowered(ops.RoiResize(size=(12, 10), interpolation=interpolation), resizer(18, 22), 1.0)
    made = np.asarray(jq.run(program, *map(jnp.asarray, (y, uv, REGIONS)), raw=True))
    for i, (left, top, right, bottom) in enumerate(REGIONS[:4].tolist()):
        crops = [
            (y[i, top : bottom + 1, left : right + 1], (12, 10)),
            (uv[i, top // 2 : bottom // 2 + 1, left // 2 : right // 2 + 1], (6, 5)),
        ]
        planes = []
        for crop, size in crops:
            op = ops.Interpolate(size=size, mode=interpolation, channels_last=True)
            node_format = jq.program.NodeFormat(("int16",), "int16")
            planes.append(ops.eval_integer(op, node_format, jq.targets.NASH_E, jnp.asarray(crop[None], jnp.int16)))
        chroma = jnp.repeat(jnp.repeat(planes[1], 2, 1), 2, 2)
        np.testing.assert_array_equal(
            made[i], jnp.concatenate([planes[0], chroma], -1)[0] - 128, err_msg=str(REGIONS[i])
        )


@pytest.mark.parametrize("pad_mode", ["constant", "border"])
def test_outside_the_picture(pad_mode: str) -> None:
    y, uv = planes_for(REGIONS)
    op = ops.RoiResize(size=(12, 10), pad_mode=pad_mode, pad_value=(7, -128))
    made = np.asarray(jq.run(lowered(op, resizer(18, 22), 1.0), *map(jnp.asarray, (y, uv, REGIONS)), raw=True))
    beside = made[5]  # the region (30, 4, 40, 9) lies right of the picture
    if pad_mode == "constant":
        np.testing.assert_array_equal(beside, np.broadcast_to([7 - 128, 0, 0], beside.shape))
    else:
        assert (np.ptp(beside, axis=1) == 0).all()  # the last column, everywhere
        assert len(np.unique(beside[..., 0])) > 3
    one = made[6]  # right is left of left: one pixel, where the region starts
    np.testing.assert_array_equal(one, np.broadcast_to(one[0, 0], one.shape))
    assert one[0, 0, 0] == y[6, 9, 9, 0] - 128


def test_the_float_rule_of_a_resize() -> None:
    """Integers cut weights to 8 bits: 255 * 2 * (2^-8 + 13 * 2^-17) and two roundings, below 4."""
    y, uv = planes_for(REGIONS)
    args = tuple(map(jnp.asarray, (y, uv, REGIONS)))
    for interpolation, bound in (("bilinear", 4), ("nearest", 0)):
        op = ops.RoiResize(size=(12, 10), interpolation=interpolation, pad_mode="border")
        real = np.asarray(ops.eval_float(op, *args))
        made = np.asarray(jq.run(lowered(op, resizer(18, 22), 1.0), *args, raw=True))
        assert np.abs(real - made).max() <= bound
        scaled = lowered(op, resizer(18, 22), 1 / 64, "int16")
        np.testing.assert_array_equal(jq.run(scaled, *args), made.astype(np.float32))


def test_extreme_regions_stay_in_int32() -> None:
    low, high = -(2**31), 2**31 - 1
    extreme = np.array([[low, 3, high, 5], [2, low, 4, high], [high, low, low, high], [high, 0, high, 5]], np.int32)
    y, uv = planes_for(extreme)
    op = ops.RoiResize(size=(30, 26))
    program = lowered(op, resizer(18, 22), 1.0)
    args = y, uv, extreme
    _, slow = jq.reference.run(program, *args)
    np.testing.assert_array_equal(jq.run(program, *map(jnp.asarray, args), raw=True), slow["y"])


def test_no_float_enters_the_integers() -> None:
    y, uv = planes_for(REGIONS)
    program = lowered(ops.RoiResize(size=(12, 10)), resizer(18, 22), 1.0)
    inputs = {"luma": jnp.asarray(y), "chroma": jnp.asarray(uv), "roi": jnp.asarray(REGIONS)}
    text = str(
        jax.make_jaxpr(lambda constants, x: run_integers(replace(program, constants=constants), x))(
            program.constants, inputs
        )
    )
    assert "f32" not in text
    assert "f16" not in text
    assert "u8[" in text


@pytest.mark.parametrize("out", [1, 2, 3, 7, 30, 1000, 16383])
def test_divided_is_the_exact_quotient(out: int) -> None:
    from jquant.numerics.crop import divided

    n = np.unique(np.concatenate([np.arange(1, 400), np.random.default_rng(out).integers(1, 2**15, 500), [2**15 - 1]]))
    for bits in (15, 16):
        exact = (2 * n.astype(np.int64) * 2**bits + out) // (2 * out)
        np.testing.assert_array_equal(divided(jnp.asarray(n, jnp.int32), bits, out, "half_up"), exact)


def test_attributes_that_make_no_sense() -> None:
    with pytest.raises(jq.GraphError, match="sides are from 1"):
        ops.RoiResize(size=(0, 4))
    with pytest.raises(jq.InputError, match="even height"):
        ops.RoiResize(size=(3, 4))
    with pytest.raises(jq.GraphError, match="holds bytes"):
        ops.RoiResize(size=(4, 4), pad_value=(0, 256))


def test_what_would_leave_int32_is_refused() -> None:
    fine = jq.targets.NASH_E.with_fields({"resize.weight_bits": 12})
    graph = jq.Graph(resizer(18, 22), (jq.Node("y", ops.RoiResize(size=(4, 4)), ("luma", "chroma", "roi")),), ("y",))
    model = jq.prepare(graph, {}, jq.QConfig({"*": jq.Policy(output=jq.int8(scale=1.0))}), target=fine)
    with pytest.raises(jq.LoweringError, match=r"resize\.weight_bits is above 11"):
        jq.lower(model)
    with pytest.raises(jq.LoweringError, match="has a side above 16383"):
        lowered(ops.RoiResize(size=(4, 4)), resizer(16384, 2), 1.0)
