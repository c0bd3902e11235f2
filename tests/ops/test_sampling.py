"""Resizing and sampling: float against torch, fast integers against the reference, and against float in a bound."""

import dataclasses
import warnings
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

import jquant as jq
from jquant import ops
from jquant.graph.operator import Lowered, Operand, constraints, eval_float, eval_integer, lower_op
from jquant.numerics.resample import coordinate_bits
from jquant.program.lower import lower_traced
from jquant.reference import rescale_constants, rule_of, sampling
from jquant.reference.call import Call
from jquant.types import NodeFormat, integer_range

NASH = jq.targets.NASH_E
DTYPES = ("int8", "int16")


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng([17, *seed])


def integers(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    """Random over the whole range in the first half of the batch; only its two ends in the second half."""
    low, high = integer_range(dtype)
    values = rng(seed).integers(low, high + 1, shape)
    ends = rng(seed, 1).choice([low, high], shape)
    values[len(values) // 2 :] = ends[len(values) // 2 :]
    if len(values) > 2:
        values[-1] = low  # every product at its largest: the sum is -2^31 for int16
    return values.astype(dtype)


@partial(jax.jit, static_argnames=("op", "node_format", "target"))
def in_integers(
    op: jq.ops.Op, node_format: NodeFormat, target: jq.Target, constants: dict, *operands: Any
) -> jax.Array:
    return eval_integer(op, node_format, target, *operands, **constants)


@partial(jax.jit, static_argnames=("op",))
def jitted_float(op: jq.ops.Op, *operands: Any) -> jax.Array:
    return eval_float(op, *operands)


def in_float(op: jq.ops.Op, *operands: Any) -> np.ndarray:
    return np.asarray(jitted_float(op, *map(jnp.asarray, operands)))


class Layer:
    """An operator on integers: the fast rule, the reference, and the real operands that the integers stand for."""

    def __init__(
        self, op: jq.ops.Op, operands: Sequence[np.ndarray], scales: Sequence[float], target: jq.Target = NASH,
        output: tuple[str, float] | None = None,
    ) -> None:  # fmt: skip
        self.op, self.operands, self.scales, self.target = op, operands, scales, target
        dtype, scale = output or (str(operands[0].dtype), scales[0])
        self.scale = scale
        shape = jax.eval_shape(lambda *a: eval_float(op, *a), *self.real()).shape
        self.inputs = [
            Operand(str(x.dtype), jnp.float32(s), (None, *x.shape[1:])) for x, s in zip(operands, scales, strict=True)
        ]
        self.output = Operand(dtype, jnp.float32(scale), (None, *shape[1:]))
        self.lowered = self.lower(self.inputs, self.output)
        self.format = NodeFormat(tuple(x.dtype for x in self.inputs), dtype)

    def lower(self, inputs: Sequence[Operand], output: Operand) -> Lowered:
        return lower_op(self.op, inputs, output, {}, self.target)

    def real(self) -> list[jnp.ndarray]:
        return [jnp.asarray(x, jnp.float32) * jnp.float32(s) for x, s in zip(self.operands, self.scales, strict=True)]

    def rule(self, constants: dict, *operands: Any) -> jax.Array:
        return eval_integer(self.op, self.format, self.target, *operands, **constants)

    def fast(self) -> np.ndarray:
        operands = map(jnp.asarray, self.operands)
        y = in_integers(self.op, self.format, self.target, self.lowered.constants, *operands)
        assert y.dtype == self.output.dtype
        return np.asarray(y)

    def slow(self) -> np.ndarray:
        constants = {role: np.asarray(v).astype(np.int64) for role, v in self.lowered.constants.items()}
        operands = [x.astype(np.int64) for x in self.operands]
        return rule_of(self.op)(Call(self.op, operands, constants, self.format, self.target))

    def check(self) -> np.ndarray:
        fast, slow = self.fast(), self.slow()
        np.testing.assert_array_equal(fast, slow)
        return fast


def steepest(x: np.ndarray, axis: int) -> float:
    """The largest difference of neighbours along an axis, with zeros around: how fast a sample can change per pixel."""
    around = np.pad(x.astype(np.float64), [(1, 1) if a == axis % x.ndim else (0, 0) for a in range(x.ndim)])
    return float(np.abs(np.diff(around, axis=axis)).max())


# ---------------------------------------------------------------------------------------------------------------------
# Interpolate

RESIZES: dict[str, dict[str, Any]] = {
    "x2": {"size": (10, 14)},
    "x4 and x3": {"size": (20, 21)},
    "down by 2": {"size": (2, 3)},
    "uneven": {"size": (7, 4)},
    "one pixel": {"size": (1, 1)},
    "same": {"size": (5, 7)},
    "factor": {"scale_factor": (1.7, 0.6)},
    "factor x2": {"scale_factor": (2.0, 2.0)},
    "factor recomputed": {"scale_factor": (1.7, 0.6), "recompute_scale_factor": True},
}
MODES = [("nearest", False), ("nearest-exact", False), ("bilinear", False), ("bilinear", True)]


def torch_interpolate(x: np.ndarray, options: dict[str, Any], mode: str, align_corners: bool) -> np.ndarray:
    """In float64, so that only jquant rounds."""
    kept = dict(options)
    if "scale_factor" in kept:
        kept.setdefault("recompute_scale_factor", False)
    kept |= {"align_corners": align_corners} if mode == "bilinear" else {}
    mode = "linear" if mode == "bilinear" and x.ndim == 3 else mode
    return F.interpolate(torch.tensor(x), mode=mode, **kept).numpy()


@pytest.mark.parametrize(("mode", "align_corners"), MODES)
@pytest.mark.parametrize("name", RESIZES)
def test_interpolate_in_float_is_torchs(name: str, mode: str, align_corners: bool) -> None:
    x = rng().normal(size=(2, 3, 5, 7)).astype(np.float32)
    op = ops.Interpolate(**RESIZES[name], mode=mode, align_corners=align_corners)
    expected = torch_interpolate(x, RESIZES[name], mode, align_corners)
    np.testing.assert_allclose(in_float(op, x), expected, atol=1e-5)
    last = dataclasses.replace(op, channels_last=True)
    y = in_float(last, np.moveaxis(x, 1, -1))
    np.testing.assert_allclose(np.moveaxis(y, -1, 1), expected, atol=1e-5)


@pytest.mark.parametrize(("mode", "align_corners"), MODES)
def test_interpolate_of_one_axis_and_of_three(mode: str, align_corners: bool) -> None:
    x = rng().normal(size=(2, 3, 9)).astype(np.float32)
    op = ops.Interpolate(size=(14,), mode=mode, align_corners=align_corners)
    expected = torch_interpolate(x, {"size": 14}, mode, align_corners)
    np.testing.assert_allclose(in_float(op, x), expected, atol=1e-5)
    for dtype in DTYPES:
        Layer(op, [integers((4, 3, 9), dtype)], [0.1]).check()
    volume = ops.Interpolate(size=(4, 6, 3), mode=mode, align_corners=align_corners)
    if mode == "bilinear":
        with pytest.raises(jq.GraphError, match="one or two spatial axes"):
            eval_float(volume, jnp.zeros((1, 2, 2, 3, 5)))
    else:
        Layer(volume, [integers((2, 2, 2, 3, 5), "int8")], [0.1]).check()


@pytest.mark.parametrize(("mode", "align_corners"), MODES)
@pytest.mark.parametrize("name", RESIZES)
def test_interpolate_in_integers(name: str, mode: str, align_corners: bool) -> None:
    """|integer - float| <= 1/2 + (D_y e_y + D_x e_x) LSB with D the largest difference of neighbours, and
    e = (out + 1) * 2^-17 (step and offset, rounded to 16 bits) + 2^-8 (the weight is cut to 8 bits) in pixels."""
    op = ops.Interpolate(**RESIZES[name], mode=mode, align_corners=align_corners)
    for dtype in DTYPES:
        x = integers((4, 3, 5, 7), dtype)
        y = Layer(op, [x], [0.1]).check()
        expected = torch_interpolate(x.astype(np.float64), RESIZES[name], mode, align_corners)
        bound = 0.0
        if mode == "bilinear":
            bound = 0.5 + sum(steepest(x, a) * ((y.shape[a] + 1) * 2.0**-17 + 2.0**-8) for a in (2, 3))
        assert np.abs(y - expected).max() <= bound
    if name == "uneven":
        last = Layer(dataclasses.replace(op, channels_last=True), [np.moveaxis(x, 1, -1)], [0.1]).check()
        np.testing.assert_array_equal(np.moveaxis(last, -1, 1), y)


@pytest.mark.parametrize(("mode", "most"), [("nearest", 255), ("nearest-exact", 180)])
def test_the_nearest_pixel_is_the_exact_one(mode: str, most: int) -> None:
    """Coordinates are off by less than (out + 1.5) * 2^-16, and apart from an integer by 1 / out, or half of that."""
    shift = Fraction(1, 2) if mode == "nearest-exact" else Fraction(0)
    for n, out in product((1, 2, 3, 85, 127, 128, 179, 254, 1023), (1, 2, 3, 5, 60, 127, 128, 160, 179, most)):
        op = ops.Interpolate(size=(out,), mode=mode)
        exact = [int((i + shift) * n / out) for i in range(out)]
        np.testing.assert_array_equal(sampling.axis_coordinates(op, 0, n, NASH.resize) >> 16, exact)
    x = np.arange(n, dtype=np.int16)[None, None]
    np.testing.assert_array_equal(Layer(op, [x], [1.0]).check()[0, 0], exact)


@pytest.mark.parametrize("bits", [0, 4, 9, 12, 14])
@pytest.mark.parametrize("dtype", DTYPES)
def test_interpolate_with_other_fraction_bits_leaves_int32_exactly(bits: int, dtype: str) -> None:
    target = NASH.with_fields({"resize.weight_bits": bits})
    layer = Layer(ops.Interpolate(size=(9, 14), mode="bilinear"), [integers((4, 2, 5, 7), dtype)], [0.1], target)
    layer.check()
    beyond = 2 * bits + (7 if dtype == "int8" else 15) > 31
    assert layer.lowered.accumulator == ("limbs" if beyond else "int32")


def test_interpolate_refuses_what_it_cannot_do() -> None:
    for options in ({}, {"size": (2, 2), "scale_factor": (2.0, 2.0)}, {"size": (0, 2)}):
        with pytest.raises(jq.GraphError):
            ops.Interpolate(**options)
    with pytest.raises(jq.GraphError, match="align_corners is for bilinear"):
        ops.Interpolate(size=(2, 2), align_corners=True)
    with pytest.raises(jq.GraphError, match="nothing is left"):
        eval_float(ops.Interpolate(scale_factor=(0.1, 0.1)), jnp.zeros((1, 1, 4, 4)))
    with pytest.raises(jq.QConfigError, match="weight_bits is 15; it can be 0 to 14"):
        NASH.with_fields({"resize.weight_bits": 15})


def test_gradient_of_interpolate() -> None:
    x, out = rng().normal(size=(1, 2, 5, 7)).astype(np.float32), rng(1).normal(size=(1, 2, 9, 4)).astype(np.float32)
    for mode, align_corners in MODES:
        op = ops.Interpolate(size=(9, 4), mode=mode, align_corners=align_corners)
        ours = jax.grad(lambda x, op=op: (eval_float(op, x) * out).sum())(jnp.asarray(x))
        leaf = torch.tensor(x, requires_grad=True)
        corners = {"align_corners": align_corners} if mode == "bilinear" else {}
        (F.interpolate(leaf, size=(9, 4), mode=mode, **corners) * torch.tensor(out)).sum().backward()
        np.testing.assert_allclose(ours, leaf.grad.numpy(), atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Grid sample

SAMPLING = list(product(("bilinear", "nearest"), ("zeros", "border"), (False, True)))
IMAGES = [((5, 7), (4, 6)), ((1, 1), (3, 3)), ((1, 9), (2, 30)), ((12, 3), (1, 1))]


def torch_grid_sample(x: np.ndarray, grid: np.ndarray, op: ops.GridSample) -> np.ndarray:
    return F.grid_sample(
        torch.tensor(x), torch.tensor(grid), mode=op.mode, padding_mode=op.padding, align_corners=op.align_corners
    ).numpy()


def real_grid(size: tuple[int, int], out: tuple[int, int], align_corners: bool, batch: int = 2) -> np.ndarray:
    """Normalized coordinates inside and around an image, off the half pixels where the nearest one is a tie."""
    return rng(*size).uniform(-1.6, 1.6, (batch, *out, 2)).astype(np.float32)


@pytest.mark.parametrize(("mode", "padding", "align_corners"), SAMPLING)
@pytest.mark.parametrize(("size", "out"), IMAGES)
def test_grid_sample_in_float_is_torchs(size, out, mode: str, padding: str, align_corners: bool) -> None:
    x, grid = rng().normal(size=(2, 3, *size)).astype(np.float32), real_grid(size, out, align_corners)
    op = ops.GridSample(mode=mode, padding=padding, align_corners=align_corners)
    expected = torch_grid_sample(x, grid, op)
    np.testing.assert_allclose(in_float(op, x, grid), expected, atol=1e-5)
    absolute = dataclasses.replace(op, coordinates="absolute")
    pixels = ops.denormalize_grid(jnp.asarray(grid), size, align_corners=align_corners)
    np.testing.assert_allclose(in_float(absolute, x, pixels), expected, atol=1e-5)


@pytest.mark.parametrize(("padding", "align_corners"), [("zeros", False), ("border", True), ("zeros", True)])
def test_gradient_of_grid_sample(padding: str, align_corners: bool) -> None:
    x, grid = rng().normal(size=(2, 3, 5, 7)).astype(np.float32), real_grid((5, 7), (4, 6), align_corners)
    op = ops.GridSample(padding=padding, align_corners=align_corners)
    out = rng(5).normal(size=(2, 3, 4, 6)).astype(np.float32)
    ours = jax.grad(lambda x, g: (eval_float(op, x, g) * out).sum(), argnums=(0, 1))(jnp.asarray(x), jnp.asarray(grid))
    leaves = [torch.tensor(v, requires_grad=True) for v in (x, grid)]
    y = F.grid_sample(*leaves, padding_mode=padding, align_corners=align_corners)
    (y * torch.tensor(out)).sum().backward()
    for mine, leaf in zip(ours, leaves, strict=True):
        np.testing.assert_allclose(mine, leaf.grad.numpy(), atol=1e-4)


def test_a_grid_far_outside_is_finite_in_value_and_gradient() -> None:
    x, grid = jnp.ones((1, 1, 4, 4)), jnp.full((1, 2, 2, 2), 3e38)
    op = ops.GridSample(coordinates="absolute")
    value, gradient = jax.value_and_grad(lambda g: eval_float(op, x, g).sum())(grid)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)
    assert eval_float(dataclasses.replace(op, padding="border"), x, -grid).sum() == 4
    nowhere = eval_float(dataclasses.replace(op, padding="border"), x, grid.at[0, 0, 0, 0].set(jnp.nan))
    np.testing.assert_array_equal(np.isnan(nowhere[0, 0]), [[True, False], [False, False]])


@pytest.mark.parametrize(
    ("mode", "padding", "align_corners", "coordinates"),
    [(*key, "normalized") for key in SAMPLING] + [(*key, "absolute") for key in SAMPLING if not key[2]],
)
def test_grid_sample_in_integers_equals_the_reference(
    mode: str, padding: str, align_corners: bool, coordinates: str
) -> None:
    """Grids over the whole int16 range, at their recommended scale, far finer and far coarser."""
    op = ops.GridSample(mode=mode, padding=padding, align_corners=align_corners, coordinates=coordinates)
    for (size, out), dtype in zip(IMAGES, ("int8", "int16", "int8", "int16"), strict=True):
        bits = coordinate_bits(NASH.grid, *size, *out)
        fitting = 2.0**-bits if coordinates == "absolute" else ops.grid_scale(min(size), align_corners=align_corners)
        x, grid = integers((4, 3, *size), dtype), integers((4, *out, 2), "int16", 2)
        for scale in (fitting, fitting / 37, 0.3) if size == (5, 7) else (fitting,):
            y = Layer(op, [x, grid], [0.1, scale]).check()
    if padding == "zeros":
        last = dataclasses.replace(op, channels_last=True)
        again = Layer(last, [np.moveaxis(x, 1, -1), grid], [0.1, scale]).check()
        np.testing.assert_array_equal(np.moveaxis(again, -1, 1), y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("padding", "align_corners"), [key[1:] for key in SAMPLING if key[0] == "bilinear"])
def test_grid_sample_in_integers_is_near_torch(padding: str, align_corners: bool, dtype: str) -> None:
    """|integer - float| <= 1/2 + (D_y + D_x) * e LSB: D the largest difference of neighbours, zeros around included,
    e = 3/4 * 2^-F pixels: 1/2 for rounding the coordinate, 1/4 for the 15-bit multiplier times an int16."""
    size, out = (5, 7), (40, 20)
    bits = coordinate_bits(NASH.grid, *size, *out)
    scale = ops.grid_scale(min(size), align_corners=align_corners)
    x, grid = integers((4, 3, *size), dtype), integers((4, *out, 2), "int16", 3)
    grid[:2] //= 2  # mostly inside
    op = ops.GridSample(padding=padding, align_corners=align_corners)
    y = Layer(op, [x, grid], [0.1, scale]).fast()
    expected = torch_grid_sample(x.astype(np.float64), grid * np.float64(np.float32(scale)), op)
    bound = 0.5 + (steepest(x, 2) + steepest(x, 3)) * 0.75 * 2.0**-bits
    assert np.abs(y - expected).max() <= bound


def test_nearest_rounds_half_to_even_and_the_absolute_form_is_exact() -> None:
    x = np.arange(8, dtype=np.int8).reshape(1, 1, 1, 8)
    bits = coordinate_bits(NASH.grid, 1, 8)
    at = [0.0, 0.5, 1.5, 2.5, 2.499, 6.5, 7.4, 7.6, -0.5, -0.6]
    grid = np.zeros((1, 1, len(at), 2), np.int16)
    grid[0, 0, :, 0] = np.rint(np.asarray(at) * 2**bits)
    op = ops.GridSample(mode="nearest", coordinates="absolute")
    y = Layer(op, [x, grid], [1.0, 2.0**-bits]).check()
    np.testing.assert_array_equal(y[0, 0, 0], [0, 0, 2, 2, 2, 6, 7, 0, 0, 0])
    smooth = Layer(dataclasses.replace(op, mode="bilinear"), [x * 10, grid], [1.0, 2.0**-bits]).check()
    exact = np.interp(grid[0, 0, :, 0] / 2**bits, np.arange(-1, 9), [0, *range(0, 80, 10), 0])
    np.testing.assert_array_equal(smooth[0, 0, 0], np.floor(exact + 0.5))


def test_grid_sample_in_float_is_onnxs() -> None:
    x, grid = rng().normal(size=(2, 3, 5, 7)).astype(np.float32), real_grid((5, 7), (4, 6), False)
    names = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xgy"]
    for padding, align_corners in product(("zeros", "border"), (0, 1)):
        node = helper.make_node("GridSample", ["x", "g"], ["y"], padding_mode=padding, align_corners=align_corners)
        graph = helper.make_graph([node], "one", names[:2], names[2:])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
        (expected,) = ReferenceEvaluator(model).run(None, {"x": x, "g": grid})
        op = ops.GridSample(padding=padding, align_corners=bool(align_corners))
        np.testing.assert_allclose(in_float(op, x, grid), expected, atol=1e-5)


def test_the_lowest_int16_is_sampled_exactly() -> None:
    """Four products of -32768 and weights that sum to 2^16: the accumulator is -2^31."""
    x = np.full((1, 1, 4, 4), -32768, np.int16)
    grid = np.full((1, 2, 2, 2), 1 << 8, np.int16) + np.int16([77, 200])
    for op in (ops.GridSample(coordinates="absolute"), ops.GridSample(coordinates="absolute", padding="border")):
        np.testing.assert_array_equal(Layer(op, [x, grid], [1.0, 2.0**-8]).check(), -32768)


def test_a_grid_of_one_image_serves_all() -> None:
    x, grid = integers((3, 2, 5, 7), "int8"), integers((1, 4, 6, 2), "int16", 4)
    op = ops.GridSample()
    one = Layer(op, [x, grid], [0.1, 1e-4]).fast()
    each = Layer(op, [x, np.repeat(grid, 3, 0)], [0.1, 1e-4]).fast()
    np.testing.assert_array_equal(one, each)


# ---------------------------------------------------------------------------------------------------------------------
# Constants


@pytest.mark.parametrize(("n", "out"), [(1, 1), (2, 1), (7, 126), (7, 127), (719, 1280), (4096, 10), (16383, 32767)])
def test_coordinate_maps_are_the_exact_rationals(n: int, out: int) -> None:
    bits = coordinate_bits(NASH.grid, n, out)
    assert bits == sampling.coordinate_bits(NASH, n, out) == int(np.clip(15 - np.ceil(np.log2(max(n, out) + 1)), 0, 8))
    scales = [*np.float32(rng(n).uniform(1e-7, 1e-3, 20)), np.float32(3.0), np.float32(1e6), np.float32(2**-23)]
    for align_corners, scale in product((False, True), scales):
        op = ops.GridSample(align_corners=align_corners)
        inputs = [Operand("int8", jnp.float32(1), (None, 1, 1, n)), Operand("int16", scale, (None, 1, out, 2))]
        constants = lower_op(op, inputs, Operand("int8", jnp.float32(1), (None, 1, 1, out)), {}, NASH).constants
        for i, side in enumerate((n, 1)):
            mine = tuple(int(constants[role][i]) for role in ("multiplier", "offset", "shift"))
            expected = sampling.normalized_constants(scale, side, bits, align_corners, NASH.grid)
            assert mine == expected if expected[0] else mine[1:] == expected[1:]
            reach = 32768 * mine[0] + abs(mine[1])
            assert reach - mine[0] * (mine[1] >= 0) < 2**31  # a * 32767 + b, or -a * 32768 + b


def test_an_absolute_grid_is_rescaled_exactly() -> None:
    for scale in [2.0**-8, *rng().uniform(1e-4, 2, 20)]:
        inputs = [
            Operand("int8", jnp.float32(1), (None, 1, 5, 7)),
            Operand("int16", jnp.float32(scale), (None, 3, 3, 2)),
        ]
        op = ops.GridSample(coordinates="absolute")
        constants = lower_op(op, inputs, Operand("int8", jnp.float32(1), (None, 1, 3, 3)), {}, NASH).constants
        expected = rescale_constants(Fraction(float(np.float32(scale))) * 2**8, 16, narrow=True, target=NASH)
        assert tuple(int(constants[role]) for role in ("mantissa", "pre", "post")) == expected


def test_grid_scale_reaches_one_pixel_beyond_the_image() -> None:
    for n, align_corners in product((1, 2, 5, 1024), (False, True)):
        reach = ops.grid_scale(n, align_corners=align_corners) * 32767
        beyond = ops.denormalize_grid(jnp.float32([reach, reach]), (n, n), align_corners=align_corners)
        end = n - 1 if align_corners else n - 0.5  # of the image; on one pixel align_corners has no other coordinate
        assert float(beyond[0]) - end == pytest.approx(0 if align_corners and n == 1 else 1, abs=1e-3)


@pytest.mark.parametrize("align_corners", [False, True])
def test_grid_helpers_undo_each_other(align_corners: bool) -> None:
    pixels = ops.base_grid((4, 6)) * 1.3 - 0.7
    normalized = ops.normalize_grid(pixels, (4, 6), align_corners=align_corners)
    np.testing.assert_allclose(ops.denormalize_grid(normalized, (4, 6), align_corners=align_corners), pixels, atol=1e-5)
    theta = torch.eye(2, 3)[None]
    identity = F.affine_grid(theta, (1, 1, 4, 6), align_corners=align_corners).numpy()[0]
    np.testing.assert_allclose(
        ops.normalize_grid(ops.base_grid((4, 6)), (4, 6), align_corners=align_corners), identity, atol=1e-6
    )


# ---------------------------------------------------------------------------------------------------------------------
# Warp and affine grids


@pytest.mark.parametrize(("mode", "padding"), [("bilinear", "zeros"), ("bilinear", "border"), ("nearest", "zeros")])
def test_warp(mode: str, padding: str) -> None:
    """Warp is grid_sample on absolute coordinates; its bound is that of a coordinate, 1/2 * 2^-F for the rescale."""
    op = ops.Warp(mode=mode, padding=padding)
    sampled = ops.GridSample(mode=mode, padding=padding, coordinates="absolute")
    x, flow = rng().normal(size=(2, 3, 5, 7)).astype(np.float32), rng(1).normal(size=(2, 2, 5, 7)).astype(np.float32)
    grid = ops.base_grid((5, 7)) + jnp.moveaxis(jnp.asarray(flow), 1, -1)
    np.testing.assert_array_equal(in_float(op, x, flow), in_float(sampled, x, grid))
    for dtype, scale, out in (("int8", 2.0**-8, (5, 7)), ("int16", 1e-4, (3, 9)), ("int16", 1.0, (5, 7))):
        x, flow = integers((4, 3, 5, 7), dtype), integers((4, 2, *out), "int16", 5)
        layer = Layer(op, [x, flow], [0.1, scale])
        y = layer.check()
        if mode == "bilinear":
            real, real_flow = layer.real()
            expected = in_float(op, real / np.float32(0.1), real_flow)
            slack = (0.51 + 0.5) * 2.0**-8 + 32768 * scale * 2.0**-16  # of the coordinate, and of the mantissa
            bound = 0.5 + (steepest(x, 2) + steepest(x, 3)) * slack + 0.02
            assert np.abs(y - expected).max() <= bound
    if mode == "bilinear":
        last = Layer(
            dataclasses.replace(op, channels_last=True), [np.moveaxis(v, 1, -1) for v in (x, flow)], [0.1, scale]
        ).check()
        np.testing.assert_array_equal(np.moveaxis(last, -1, 1), y)


def torch_affine_grid(theta: np.ndarray, size: tuple[int, int], align_corners: bool) -> np.ndarray:
    with warnings.catch_warnings():  # an axis of one pixel
        warnings.filterwarnings("ignore", "Since version 1.3.0, affine_grid", UserWarning)
        return F.affine_grid(torch.tensor(theta), (len(theta), 1, *size), align_corners=align_corners).numpy()


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(5, 7), (1, 1), (1, 6)])
def test_affine_grid(size: tuple[int, int], align_corners: bool) -> None:
    """|integer - float| <= 2.9 LSB (section 3, int16) + 3 * 2^-15 * |theta| (the base grid is rounded to 14 bits)."""
    op = ops.AffineGrid(size=size, align_corners=align_corners)
    theta = rng().normal(size=(3, 2, 3)).astype(np.float32)
    expected = torch_affine_grid(theta, size, align_corners)
    np.testing.assert_allclose(in_float(op, theta), expected, atol=1e-5)
    for dtype in DTYPES:
        q = integers((4, 2, 3), dtype)
        unit = 2.0 / 2 ** (7 if dtype == "int8" else 15)
        layer = Layer(op, [q], [unit], output=("int16", 6.1 / 32767))
        y = layer.check()
        exact = torch_affine_grid(np.asarray(layer.real()[0]), size, align_corners)
        assert np.abs(y - exact / (6.1 / 32767)).max() <= 2.9 + 3 * 2.0**-15 * 2 / (6.1 / 32767)
        Layer(op, [q], [unit], output=("int16", 1e-5)).check()  # saturates


# ---------------------------------------------------------------------------------------------------------------------
# Roi align


def roi_align_oracle(x: np.ndarray, boxes: np.ndarray, op: ops.RoiAlign) -> np.ndarray:
    """The definition in float64, point by point."""
    _, channels, height, width = x.shape
    out = np.zeros((len(boxes), channels, *op.output_size))
    n = op.sampling_ratio

    def at(image: np.ndarray, y: float, x: float) -> np.ndarray:
        if y < -1 or y > height or x < -1 or x > width:
            return np.zeros(channels)
        y, x = np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)
        top, left = int(y), int(x)
        low, right = min(top + 1, height - 1), min(left + 1, width - 1)
        upper = image[:, top, left] * (left + 1 - x) + image[:, top, right] * (x - left)
        lower = image[:, low, left] * (left + 1 - x) + image[:, low, right] * (x - left)
        return upper * (top + 1 - y) + lower * (y - top)

    for k, box in enumerate(boxes.astype(np.float64)):
        image = x[int(box[0]) if len(box) == 5 else 0]
        x1, y1, x2, y2 = box[-4:] * op.spatial_scale - (0.5 if op.aligned else 0)
        w, h = (x2 - x1, y2 - y1) if op.aligned else (max(x2 - x1, 1), max(y2 - y1, 1))
        bin_h, bin_w = h / op.output_size[0], w / op.output_size[1]
        for i, j in np.ndindex(*op.output_size):
            points = [
                at(image, y1 + i * bin_h + (a + 0.5) * bin_h / n, x1 + j * bin_w + (b + 0.5) * bin_w / n)
                for a, b in np.ndindex(n, n)
            ]
            out[k, :, i, j] = np.mean(points, axis=0)
    return out


def real_boxes(count: int, images: int, size: tuple[int, int], spatial_scale: float, inside: bool) -> np.ndarray:
    h, w = size
    low, high = (0.1, 0.9) if inside else (-0.4, 1.4)
    corners = rng(count).uniform(low, high, (count, 2, 2)) * [w - 1, h - 1] / spatial_scale
    corners.sort(axis=1)
    index = rng(count, 1).integers(0, images, (count, 1))
    return np.concatenate([index, corners.reshape(count, 4)], axis=1).astype(np.float32)


ROIS = [
    ops.RoiAlign(output_size=(2, 3)),
    ops.RoiAlign(output_size=(3, 2), spatial_scale=0.25, sampling_ratio=3, aligned=True),
    ops.RoiAlign(output_size=(1, 1), spatial_scale=1 / 16, sampling_ratio=1),
    ops.RoiAlign(output_size=(1, 2), sampling_ratio=16, aligned=True),
]


@pytest.mark.parametrize("op", ROIS)
def test_roi_align_in_float(op: ops.RoiAlign) -> None:
    x = rng().normal(size=(2, 3, 9, 12)).astype(np.float32)
    for inside in (True, False):
        boxes = real_boxes(6, 2, (9, 12), op.spatial_scale, inside)
        y = in_float(op, x, boxes)
        np.testing.assert_allclose(y, roi_align_oracle(x, boxes, op), atol=1e-5)
    first = in_float(op, x, boxes[:2, 1:])
    np.testing.assert_allclose(first, roi_align_oracle(x, boxes[:2, 1:], op), atol=1e-5)


@pytest.mark.parametrize("op", ROIS[:2])
def test_gradient_of_roi_align(op: ops.RoiAlign) -> None:
    x = rng().normal(size=(2, 3, 9, 12)).astype(np.float32)
    boxes = real_boxes(6, 2, (9, 12), op.spatial_scale, inside=False)
    weights = rng(3).normal(size=(6, 3, *op.output_size)).astype(np.float32)
    value, (to_x, to_boxes) = jax.value_and_grad(lambda x, b: (eval_float(op, x, b) * weights).sum(), argnums=(0, 1))(
        jnp.asarray(x), jnp.asarray(boxes)
    )
    assert np.vdot(to_x, x) == pytest.approx(float(value), rel=1e-3, abs=1e-3)  # it is linear in x
    assert np.isfinite(to_boxes).all()
    assert np.abs(to_boxes[:, 1:]).max() > 0


@pytest.mark.parametrize("op", ROIS)
def test_roi_align_in_integers(op: ops.RoiAlign) -> None:
    """|integer - float| <= 0.51 + (D_y + D_x) * 2 * 2^-F LSB: a point is off by 3/4 for the corners, 1/2 for the
    shift and at most 3/4 for the 15-bit fraction of the length, in units of 2^-F pixels."""
    size = (9, 12)
    x = integers((2, 48, *size), "int8")
    boxes = real_boxes(6, 2, size, op.spatial_scale, inside=True)
    scale = np.float32(boxes.max() / 32767)
    q = np.rint(boxes / scale).astype(np.int16)
    y = Layer(op, [x, q], [0.1, scale]).check()
    exact = q * np.float64(scale)
    exact[:, 0] = boxes[:, 0]
    bound = 0.51 + (steepest(x[..., 1:-1, 1:-1], 2) + steepest(x, 3)) * 2 * 2.0 ** -coordinate_bits(NASH.grid, *size)
    assert np.abs(y - roi_align_oracle(x.astype(np.float64), exact, op)).max() <= bound
    anywhere = integers((6, 5), "int16", 7)
    for wide in (scale, 1e-6, 0.5, 100.0):
        Layer(op, [x, anywhere], [0.1, wide]).check()
    Layer(op, [x, anywhere[:, 1:]], [0.1, scale]).check()
    last = Layer(dataclasses.replace(op, channels_last=True), [np.moveaxis(x, 1, -1), q], [0.1, scale]).check()
    np.testing.assert_array_equal(np.moveaxis(last, -1, 1), y)


def test_the_mean_of_a_constant_is_the_constant() -> None:
    for value, op in product((-128, 127), ROIS):
        x = np.full((1, 1, 9, 12), value, np.int8)
        q = np.rint(real_boxes(3, 1, (9, 12), op.spatial_scale, inside=True)[:, 1:] * 16).astype(np.int16)
        np.testing.assert_array_equal(Layer(op, [x, q], [0.1, 1 / 16]).check(), value)


def test_roi_align_takes_the_border_up_to_one_pixel_outside() -> None:
    centres = np.array([-1, -1 - 1 / 16, 9, 9 + 1 / 16])
    boxes = np.stack([np.full(4, 3), centres - 1, np.full(4, 5), centres + 1], axis=1)
    x = np.full((1, 1, 9, 12), 100, np.int8)
    op = ops.RoiAlign(output_size=(1, 1), sampling_ratio=1)
    y = Layer(op, [x, (boxes * 16).astype(np.int16)], [1.0, 1 / 16]).check()
    np.testing.assert_array_equal(y[:, 0, 0, 0], [100, 0, 100, 0])
    np.testing.assert_array_equal(
        in_float(op, x.astype(np.float32), boxes.astype(np.float32))[:, 0, 0, 0], y[:, 0, 0, 0]
    )


def test_roi_align_refuses_what_it_cannot_do() -> None:
    with pytest.raises(jq.GraphError, match="fixed number of samples"):
        ops.RoiAlign(output_size=(2, 2), sampling_ratio=0)
    x, boxes, y = (Operand(d, jnp.float32(1), (None, 4)) for d in ("int16", "int8", "int16"))
    found = constraints(ops.RoiAlign(output_size=(2, 2), sampling_ratio=17), [x, boxes], y, None, NASH)
    assert [text.split()[0:2] for text in found] == [["its", "data"], ["its", "boxes"], ["sampling_ratio", "17"]]


# ---------------------------------------------------------------------------------------------------------------------
# In a program


def cases() -> list[tuple[jq.ops.Op, list[np.ndarray], list[float]]]:
    x = integers((3, 4, 6, 8), "int8")
    grid, flow = integers((3, 5, 4, 2), "int16", 1), integers((3, 2, 6, 8), "int16", 2)
    boxes = np.abs(integers((3, 5), "int16", 3) // 4)
    return [
        (ops.Interpolate(size=(12, 16), mode="bilinear"), [x], [0.1]),
        (ops.Interpolate(size=(9, 5), mode="nearest"), [x], [0.1]),
        (ops.GridSample(), [x, grid], [0.1, 4e-5]),
        (ops.GridSample(coordinates="absolute", mode="nearest", padding="border"), [x, grid], [0.1, 3e-4]),
        (ops.Warp(), [x, flow], [0.1, 1e-3]),
        (ops.RoiAlign(output_size=(2, 2)), [x, boxes], [0.1, 1e-3]),
    ]


@pytest.mark.parametrize("i", range(6))
def test_the_same_bits_however_it_is_run(i: int) -> None:
    layer = Layer(*cases()[i])
    y, constants = layer.fast(), layer.lowered.constants
    operands = [jnp.asarray(x) for x in layer.operands]
    with jax.disable_jit():
        np.testing.assert_array_equal(layer.rule(constants, *operands), y)
    text = str(jax.make_jaxpr(layer.rule)(constants, *operands))
    assert "f32" not in text
    assert "f16" not in text
    if not isinstance(layer.op, ops.RoiAlign):
        one = jax.vmap(lambda *v: layer.rule(constants, *(a[None] for a in v))[0])(*operands)
        np.testing.assert_array_equal(one, y)
    inside = jax.jit(
        lambda scales: (
            layer.lower(
                [dataclasses.replace(x, scale=s) for x, s in zip(layer.inputs, scales, strict=True)], layer.output
            ).constants
        )
    )([x.scale for x in layer.inputs])
    for role, constant in constants.items():
        np.testing.assert_array_equal(inside[role], constant, err_msg=role)


def network() -> tuple[jq.Graph, dict]:
    """A conv makes a flow, a linear layer a theta; a resize, a warp and a grid sample follow."""
    weight = rng().normal(size=(4, 3, 3, 3)).astype(np.float32) * 0.2
    flow = rng(1).normal(size=(2, 4, 1, 1)).astype(np.float32) * 0.3
    theta = rng(2).normal(size=(6, 4)).astype(np.float32) * 0.2
    bias = np.float32([1, 0, 0, 0, 1, 0])
    same = {"strides": (1, 1), "dilation": (1, 1)}
    nodes = (
        jq.Node("conv", ops.Conv(**same, padding=((1, 1), (1, 1))), ("x",), jq.FrozenMap({"weight": "w"})),
        jq.Node("flow", ops.Conv(**same, padding=((0, 0), (0, 0))), ("conv",), jq.FrozenMap({"weight": "f"})),
        jq.Node("warp", ops.Warp(padding="border"), ("conv", "flow")),
        jq.Node("up", ops.Interpolate(scale_factor=(2.0, 2.0), mode="bilinear"), ("warp",)),
        jq.Node("mean", ops.Mean(axes=(2, 3)), ("conv",)),
        jq.Node("linear", ops.Linear(), ("mean",), jq.FrozenMap({"weight": "t", "bias": "b"})),
        jq.Node("theta", ops.Reshape(shape=(-1, 2, 3)), ("linear",)),
        jq.Node("grid", ops.AffineGrid(size=(7, 9)), ("theta",)),
        jq.Node("sample", ops.GridSample(), ("up", "grid")),
        jq.Node("relu", ops.Relu(), ("sample",)),
    )
    params = {"w": weight, "f": flow, "t": theta, "b": bias}
    graph = jq.Graph((jq.Input("x", (None, 3, 6, 8)),), nodes, ("relu",))
    return graph, {k: jnp.asarray(v) for k, v in params.items()}


CONFIG = {
    "*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8()),
    "flow": jq.Policy(output=jq.int16()),
    "linear": jq.Policy(output=jq.int16()),
    "theta": jq.Policy(output=jq.int16()),
    "grid": jq.Policy(output=jq.int16(scale=ops.grid_scale(12, align_corners=False) * 2)),
}


def test_a_network_equals_the_reference_layer_by_layer_and_lowers_inside_jit() -> None:
    graph, params = network()
    x = jnp.asarray(rng(9).normal(size=(3, 3, 6, 8)), jnp.float32)
    model = jq.prepare(graph, params, jq.QConfig(CONFIG), target=NASH)
    model = jq.calibrate(model, [x])
    program = jq.lower(model)
    fast = jq.run_with_taps(program, x)
    _, slow = jq.reference.run(program, np.asarray(x))
    for name in program.graph.values:
        np.testing.assert_array_equal(np.asarray(fast[name]), slow[name], err_msg=name)
    inside = jax.jit(lower_traced)(model)
    for node, roles in program.constants.items():
        for role, constant in roles.items():
            np.testing.assert_array_equal(constant, inside.constants[node][role], err_msg=f"{node} {role}")
    np.testing.assert_array_equal(jq.apply(model, x, mode="bit_true"), jq.run(program, x))
    real, integer = (jq.apply(model, x, mode=m) for m in ("float", "bit_true"))
    assert np.abs(real - integer).max() < 0.1 * np.abs(real).max()


def test_an_int8_grid_is_refused_with_what_to_do() -> None:
    graph, params = network()
    config = {k: v for k, v in CONFIG.items() if k not in ("grid", "flow")}
    with pytest.raises(
        jq.QConfigError, match=r"(?s)warp .Warp.: its flow is int8.*sample .GridSample.: its grid is int8"
    ):
        jq.prepare(graph, params, jq.QConfig(config), target=NASH)


@pytest.mark.parametrize(
    ("op", "shapes", "text"),
    [
        (ops.GridSample(), [(1, 2, 3, 3), (1, 3, 3, 3)], "grid .N, Ho, Wo, 2."),
        (ops.GridSample(), [(2, 3, 3), (1, 3, 3, 2)], "x must be"),
        (ops.Warp(), [(1, 2, 3, 3), (1, 3, 3, 3)], "flow .N, 2, Ho, Wo."),
        (ops.AffineGrid(size=(2, 2)), [(1, 3, 3)], "theta must be"),
        (ops.RoiAlign(output_size=(2, 2)), [(1, 2, 3, 3), (1, 6)], "boxes .K, 4. or .K, 5."),
        (ops.Interpolate(size=(2, 2)), [(1, 2, 3)], "1 spatial axes and 2 sizes"),
    ],
)
def test_operands_of_a_wrong_shape_are_named(op: jq.ops.Op, shapes: list[tuple[int, ...]], text: str) -> None:
    with pytest.raises(jq.GraphError, match=text):
        eval_float(op, *map(jnp.zeros, shapes))


def test_an_image_beyond_the_coordinates_is_refused() -> None:
    x, grid = Operand("int8", jnp.float32(1), (None, 1, 2, 40000)), Operand("int16", jnp.float32(1), (None, 2, 2, 2))
    y = Operand("int8", jnp.float32(1), (None, 1, 2, 2))
    (text,) = constraints(ops.GridSample(), [x, grid], y, None, NASH)
    assert "40000" in text
