"""Foreign oracles: the ONNX node cases, through an adapter from ONNX's asymmetric uint8 to symmetric integers.

Nobody here wrote the expected values. Where ONNX subtracts a zero point, the difference has up to 9 bits; the adapter
splits it into int8 pieces, whose exact accumulators add up.
"""

import itertools
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.numerics.rescale import ratio, rescale, rescale_of
from jquant.numerics.rounding import dequantize, quantize

onnx = pytest.importorskip("onnx")

OPERATORS = {
    "ConvInteger": 2,
    "MatMulInteger": 1,
    "QLinearConv": 1,
    "QLinearMatMul": 8,
    "QuantizeLinear": 4,
    "DequantizeLinear": 4,
    "GridSample": 10,
    "Resize": 3,
}
INTEGER_TYPES = ("uint8", "int8", "uint16", "int16")


def node_cases() -> dict[str, list[Any]]:
    """The cases of each operator that stay within what Nash has: no float8, no blocks, no cubic, no reflection."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy warns while the cases of other operators are made
        from onnx.backend.test.case.node import collect_testcases

        found: dict[str, list[Any]] = {name: [] for name in OPERATORS}
        for case in collect_testcases(""):
            nodes = case.model.graph.node
            if len(nodes) == 1 and nodes[0].op_type in found and supported(case):
                found[nodes[0].op_type].append(case)
    return found


def data(case: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Inputs and expected outputs."""
    to_array = onnx.numpy_helper.to_array
    inputs, outputs = case.data_sets[0]
    return tuple(
        [to_array(v) if isinstance(v, onnx.TensorProto) else np.asarray(v) for v in s] for s in (inputs, outputs)
    )


def attributes(case: Any) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in case.model.graph.node[0].attribute}


def supported(case: Any) -> bool:
    given, kind = attributes(case), case.model.graph.node[0].op_type
    inputs, outputs = data(case)
    if kind in ("QuantizeLinear", "DequantizeLinear"):
        integers = outputs[0] if kind == "QuantizeLinear" else inputs[0]
        return str(integers.dtype) in INTEGER_TYPES and "block_size" not in given
    if kind == "GridSample":
        plain = given.get("padding_mode", b"zeros") != b"reflection" and given.get("mode", b"linear") != b"cubic"
        return plain and inputs[0].ndim == 4
    if kind == "Resize":
        modes = given.get("mode"), given.get("coordinate_transformation_mode", b"half_pixel")
        plain = given.keys() <= {"mode", "coordinate_transformation_mode"}
        return (
            plain
            and modes[0] == b"linear"
            and (modes[1] == b"half_pixel" or (modes[1] == b"align_corners" and whole(case)))
        )
    return True


def whole(case: Any) -> bool:
    """Whether the scales give whole sizes. Where not, ONNX aligns the corners of a fractional size."""
    inputs, _ = data(case)
    return all(float(n * scale).is_integer() for n, scale in zip(inputs[0].shape, inputs[-1], strict=True))


CASES = node_cases()


def of(kind: str) -> Any:
    return pytest.mark.parametrize("case", CASES[kind], ids=lambda case: case.name)


def test_the_suite_is_there() -> None:
    counts = {kind: len(cases) for kind, cases in CASES.items()}
    assert all(counts[kind] >= least for kind, least in OPERATORS.items()), counts


# ---------------------------------------------------------------------------------------------------------------------
# Accumulators


def centred(case_inputs: list[np.ndarray], i: int, zero: int, axis: int = -1) -> np.ndarray:
    """Input i minus its zero point (input `zero`, if there is one; along `axis` where it is a vector), int64."""
    v = case_inputs[i].astype(np.int64)
    if zero >= len(case_inputs):
        return v
    point = case_inputs[zero].astype(np.int64)
    return v - (point if point.ndim == 0 else point.reshape([-1 if k == axis % v.ndim else 1 for k in range(v.ndim)]))


def int8_pieces(v: np.ndarray) -> list[np.ndarray]:
    """Arrays of int8 whose sum is v."""
    pieces = []
    while True:
        pieces.append(np.clip(v, -128, 127).astype(np.int8))
        v = v - pieces[-1]
        if not v.any():
            return pieces


def accumulated(op: jq.ops.Op, x: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The int32 accumulators of a conv (other is its weight) or of a matrix product, summed over int8 pieces."""
    total = np.zeros((), np.int64)
    for a, b in itertools.product(int8_pieces(x), int8_pieces(other)):
        total = total + np.asarray(one_program(op, a, b)).astype(np.int64)
    return total


def one_program(op: jq.ops.Op, a: np.ndarray, b: np.ndarray) -> jnp.ndarray:
    unit = jq.int8(scale=1.0)
    config = jq.QConfig({"*": jq.Policy(output=unit, weight=unit), "y": jq.Policy(output=jq.high_precision)})
    is_conv, inputs, params = bool(op.weight_roles), [jq.Input("a", (None, *a.shape[1:]))], {}
    if is_conv:
        node = jq.Node("y", op, ("a",), jq.FrozenMap({"weight": "w"}))
        params, arrays = {"w": jnp.asarray(b, jnp.float32)}, (a,)
    else:
        node, arrays = jq.Node("y", op, ("a", "b")), (a, b)
        inputs.append(jq.Input("b", b.shape if b.shape[0] != a.shape[0] else (None, *b.shape[1:])))
    graph = jq.Graph(tuple(inputs), (node,), ("y",))
    model = jq.prepare(graph, params, config, target=jq.targets.NASH_E, high_precision_outputs=False)
    return jq.run(jq.lower(model), *map(jnp.asarray, arrays), raw=True)


def conv_of(case: Any, spatial: int) -> jq.ops.Op:
    given = attributes(case)
    pads = given.get("pads", [0] * 2 * spatial)
    padding = tuple(zip(pads[:spatial], pads[spatial:], strict=True))
    return jq.ops.Conv(strides=(1,) * spatial, padding=padding, dilation=(1,) * spatial)


@of("ConvInteger")
def test_conv_integer(case: Any) -> None:
    inputs, (expected,) = data(case)
    x, w = centred(inputs, 0, 2), centred(inputs, 1, 3, axis=0)
    np.testing.assert_array_equal(accumulated(conv_of(case, 2), x, w), expected)


@of("MatMulInteger")
def test_matmul_integer(case: Any) -> None:
    inputs, (expected,) = data(case)
    a, b = centred(inputs, 0, 2), centred(inputs, 1, 3)
    np.testing.assert_array_equal(accumulated(jq.ops.MatMul(), a, b), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Accumulators and rescale


def assert_rescaled(total: np.ndarray, scales: tuple, zero: np.ndarray, expected: np.ndarray) -> None:
    """Within an LSB: ONNX rounds the float quotient half to even, section 3 a 15-bit mantissa half up.

    Without its zero point an output has up to 9 bits. So an int16 row of the high-precision rescale has to hold all of
    them, and the int8 row of the default one those that are int8.
    """
    s_a, s_b, s_y = (jnp.asarray(s, jnp.float32) for s in scales)
    zero = zero.astype(np.int64)
    limits, exact = np.iinfo(expected.dtype), expected.astype(np.int64) - zero
    high = jq.targets.NASH_E.with_fields({"rescale.high_precision": True})
    for bits, target in ((16, high), (8, jq.targets.NASH_E)):
        by = rescale_of(ratio(s_a, s_b, s_y, 1.0), bits=bits, form=jq.targets.NASH_E.rescale)
        y = np.asarray(rescale(jnp.asarray(total, jnp.int32), by, f"int{bits}", target)).astype(np.int64)
        y = np.clip(y, limits.min - zero, limits.max - zero)
        narrow = (exact >= -128) & (exact <= 127) if bits == 8 else np.ones(exact.shape, bool)
        assert np.abs(y - exact)[narrow].max() <= 1
        assert (y == exact)[narrow].mean() >= 0.9


@of("QLinearConv")
def test_qlinear_conv(case: Any) -> None:
    inputs, (expected,) = data(case)
    x, s_x, z_x, w, s_w, z_w, s_y, z_y = inputs
    total = accumulated(conv_of(case, 2), x.astype(np.int64) - z_x, w.astype(np.int64) - z_w)
    assert_rescaled(total, (s_x, s_w, s_y), z_y, expected)


@of("QLinearMatMul")
def test_qlinear_matmul(case: Any) -> None:
    inputs, (expected,) = data(case)
    a, s_a, z_a, b, s_b, z_b, s_y, z_y = inputs
    total = accumulated(jq.ops.MatMul(), a.astype(np.int64) - z_a, b.astype(np.int64) - z_b)
    assert_rescaled(total, (s_a, s_b, s_y), z_y, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Quantize and dequantize


def along(v: np.ndarray, case: Any, rank: int) -> np.ndarray:
    """A scale or zero point, shaped to broadcast along the case's axis."""
    axis = attributes(case).get("axis", 1) % max(rank, 1)
    return v.reshape([-1 if i == axis else 1 for i in range(rank)]) if v.ndim == 1 else v


@of("QuantizeLinear")
def test_quantize_linear(case: Any) -> None:
    inputs, (expected,) = data(case)
    x, scale, zero = inputs[0], inputs[1], inputs[2]
    q = quantize(jnp.asarray(x, jnp.float32), jnp.asarray(along(scale, case, x.ndim), jnp.float32), "int32")
    limits = np.iinfo(expected.dtype)
    shifted = np.asarray(q).astype(np.int64) + along(zero, case, x.ndim).astype(np.int64)
    np.testing.assert_array_equal(np.clip(shifted, limits.min, limits.max), expected)


@of("DequantizeLinear")
def test_dequantize_linear(case: Any) -> None:
    inputs, (expected,) = data(case)
    q, scale = inputs[0], along(inputs[1], case, inputs[0].ndim)
    zero = along(inputs[2], case, q.ndim).astype(np.int64) if len(inputs) > 2 else 0
    real = dequantize(jnp.asarray(q.astype(np.int64) - zero, jnp.int32), jnp.asarray(scale, jnp.float32))
    np.testing.assert_array_equal(real, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling: float to rounding, integers within a bound in LSB


def sampled(op: jq.ops.Op, data: np.ndarray, others: list[np.ndarray], scales: list[float]) -> tuple[np.ndarray, float]:
    """The integer program's real output for int16 data (and an int16 grid), and the scale of the data."""
    names = ["x", "grid"][: 1 + len(others)]
    rules = {n: jq.Policy(output=jq.int16(scale=s)) for n, s in zip(names, scales, strict=True)}
    inputs = [jq.Input(n, v.shape) for n, v in zip(names, [data, *others], strict=True)]
    graph = jq.Graph(tuple(inputs), (jq.Node("y", op, tuple(names)),), ("y",))
    model = jq.prepare(graph, {}, jq.QConfig({"*": jq.Policy(output=jq.int16()), **rules}), target=jq.targets.NASH_E)
    y = jq.run(jq.lower(model), *(jnp.asarray(v) for v in (data, *others)))
    return np.asarray(y), scales[0]


@of("GridSample")
def test_grid_sample(case: Any) -> None:
    (x, grid), (expected,) = data(case)
    given = attributes(case)
    align, nearest = bool(given.get("align_corners", 0)), given.get("mode") == b"nearest"
    op = jq.ops.GridSample(
        mode="nearest" if nearest else "bilinear",
        padding=given.get("padding_mode", b"zeros").decode(),
        align_corners=align,
    )
    np.testing.assert_allclose(jq.ops.eval_float(op, jnp.asarray(x), jnp.asarray(grid)), expected, rtol=1e-4, atol=1e-5)
    if nearest:
        return  # a coordinate on the border between two pixels may fall either way
    reach = float(np.abs(x).max())
    s_grid = max(max(jq.ops.grid_scale(n, align_corners=align) for n in x.shape[2:]), float(np.abs(grid).max()) / 32767)
    y, s_x = sampled(op, x, [grid], [reach / 32767, s_grid])
    # Pixels of error along an axis: half a grid step, and two roundings to the fraction bits (8 at these sizes).
    pixels = 0.5 * s_grid * max(x.shape[2:]) / 2 + 2 * 2**-8
    assert np.abs(y - expected).max() <= 2 * pixels * 2 * reach + s_x


@of("Resize")
def test_resize(case: Any) -> None:
    inputs, (expected,) = data(case)
    x = np.asarray(inputs[0], np.float32)
    align = attributes(case).get("coordinate_transformation_mode") == b"align_corners"
    scales = tuple(float(v) for v in inputs[-1][2:])
    option = {"size": expected.shape[2:]} if align else {"scale_factor": scales}
    op = jq.ops.Interpolate(mode="bilinear", align_corners=align, **option)
    np.testing.assert_allclose(jq.ops.eval_float(op, jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)
    reach = float(np.abs(x).max())
    y, s_x = sampled(op, x, [], [reach / 32767])
    assert np.abs(y - expected).max() <= 2 * 2**-8 * 2 * reach + s_x  # weights of 8 bits on two axes, one rounding
