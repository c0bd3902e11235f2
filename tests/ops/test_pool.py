"""Pooling: float and its gradient against torch, integers and the reference against torch in float64."""

from collections.abc import Callable
from itertools import product
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import jquant as jq
from jquant import ops
from jquant.graph.operator import constraints, eval_float, eval_integer, lower_op
from jquant.reference import rule_of
from jquant.reference.call import Call
from jquant.types import NodeFormat, integer_range

NASH = jq.targets.NASH_E
MAX = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
AVG = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
ADAPTIVE_MAX = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)
ADAPTIVE_AVG = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)

# size, kernel, strides, padding (the same on both sides, as torch has it), dilation of a maximum
WINDOWS = [
    ((9,), (2,), (2,), (0,), (1,)),
    ((10,), (5,), (3,), (2,), (2,)),
    ((8, 8), (2, 2), (2, 2), (0, 0), (1, 1)),
    ((9, 7), (3, 3), (2, 2), (1, 1), (1, 1)),
    ((9, 12), (3, 2), (1, 3), (1, 0), (2, 3)),
    ((7, 7), (7, 7), (7, 7), (0, 0), (1, 1)),
    ((13, 16), (13, 6), (1, 2), (6, 3), (1, 1)),
    ((5, 6, 4), (2, 3, 2), (1, 2, 2), (1, 1, 0), (1, 1, 2)),
]


def pairs(padding: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((p, p) for p in padding)


def integers(seed: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """The whole range in the first half of the batch; in the second only its ends, the last example at the lowest."""
    rng = np.random.default_rng([31, seed])
    low, high = integer_range(dtype)
    x = rng.integers(low, high, shape, endpoint=True)
    x[len(x) // 2 :] = rng.choice([low, high], x[len(x) // 2 :].shape)
    x[-1] = low
    return x.astype(dtype)


def images(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def integer_rules(op: jq.ops.Op, x: np.ndarray, scale: float, output: str, output_scale: float) -> tuple:
    """(fast, reference) of a pool on channels-last integers."""
    y = jax.eval_shape(lambda v: eval_float(op, v), jax.ShapeDtypeStruct(x.shape, jnp.float32))
    inputs = [ops.Operand(str(x.dtype), jnp.float32(scale), (None, *x.shape[1:]))]
    made = ops.Operand(output, jnp.float32(output_scale), (None, *y.shape[1:]))
    constants = lower_op(op, inputs, made, {}, NASH).constants
    node_format = NodeFormat((str(x.dtype),), output)
    traced = jax.jit(lambda c, v: eval_integer(op, node_format, NASH, v, **c)).trace(constants, x)
    assert "f32" not in str(traced.jaxpr)
    fast = traced.lower().compile()(constants, x)
    assert fast.dtype == output
    wide = {role: np.asarray(v).astype(np.int64) for role, v in constants.items()}
    return np.asarray(fast), rule_of(op)(Call(op, [x.astype(np.int64)], wide, node_format, NASH))


def compare(op: jq.ops.Op, by_torch: Callable, shape: tuple[int, ...], tolerance: float) -> None:
    """Float and gradient, within the rounding of the averages; a gradient sums up to 40 of them."""
    x = images(0, shape)
    tensor = torch.from_numpy(x).requires_grad_()
    y = by_torch(tensor)
    real = jax.jit(lambda v: eval_float(op, v))(jnp.asarray(x))
    np.testing.assert_allclose(real, y.detach().numpy(), rtol=0, atol=tolerance)
    weight = np.random.default_rng(1).integers(-4, 5, size=y.shape).astype(np.float32)
    (y * torch.from_numpy(weight)).sum().backward()
    grad = jax.jit(jax.grad(lambda v: (eval_float(op, v) * weight).sum()))(jnp.asarray(x))
    np.testing.assert_allclose(grad, tensor.grad.numpy(), rtol=0, atol=40 * tolerance)


def max_pool(window: tuple, ceil_mode: bool, **options: Any) -> tuple[jq.ops.Op, Callable]:
    _, kernel, strides, padding, dilation = window
    op = ops.MaxPool(
        kernel=kernel, strides=strides, padding=pairs(padding), dilation=dilation, ceil_mode=ceil_mode, **options
    )
    pool = MAX[len(kernel) - 1]
    return op, lambda x: pool(x, kernel, strides, padding, dilation=dilation, ceil_mode=ceil_mode)


def avg_pool(window: tuple, ceil_mode: bool, include: bool, divisor: int | None, **options: Any) -> tuple:
    _, kernel, strides, padding, _ = window
    op = ops.AvgPool(
        kernel=kernel, strides=strides, padding=pairs(padding), ceil_mode=ceil_mode,
        count_include_pad=include, divisor=divisor, **options,
    )  # fmt: skip
    pool, extra = AVG[len(kernel) - 1], {} if divisor is None else {"divisor_override": divisor}
    return op, lambda x: pool(x, kernel, strides, padding, ceil_mode, include, **extra)


def averages() -> list[tuple]:
    found = []
    for window, ceil_mode, include, divisor in product(WINDOWS, (False, True), (False, True), (None, 5)):
        if not (divisor and len(window[0]) == 1):  # torch has no divisor in one dimension
            found.append((window, ceil_mode, include, divisor))
    return found


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_max_pool_is_that_of_torch(window: tuple, ceil_mode: bool) -> None:
    compare(*max_pool(window, ceil_mode), (2, 3, *window[0]), tolerance=0.0)
    op, by_torch = max_pool(window, ceil_mode, channels_last=True)
    for dtype in ("int8", "int16"):
        x = integers(1, (4, *window[0], 3), dtype)
        expected = by_torch(torch.from_numpy(np.moveaxis(x, -1, 1).astype(np.float64))).numpy()
        for result in integer_rules(op, x, 1.0, dtype, 1.0):
            np.testing.assert_array_equal(np.moveaxis(result, -1, 1), expected)


@pytest.mark.parametrize(("window", "ceil_mode", "include", "divisor"), averages(), ids=str)
def test_avg_pool_is_that_of_torch(window: tuple, ceil_mode: bool, include: bool, divisor: int | None) -> None:
    elements = prod(window[1])
    tolerance = 2.0**-23 * elements * elements / (divisor or elements)  # of a float32 sum of values around 1
    compare(*avg_pool(window, ceil_mode, include, divisor), (2, 3, *window[0]), tolerance)
    op, by_torch = avg_pool(window, ceil_mode, include, divisor, channels_last=True)
    for dtype, bound in (("int8", 0.51), ("int16", 2.9)):  # LSB of the output: specification, section 3
        x = integers(1, (4, *window[0], 3), dtype)
        exact = by_torch(torch.from_numpy(np.moveaxis(x, -1, 1).astype(np.float64))).numpy() / 0.75
        fast, slow = integer_rules(op, x, 1.0, dtype, 0.75)
        np.testing.assert_array_equal(fast, slow)
        error = np.moveaxis(fast, -1, 1) - np.clip(exact, *integer_range(dtype))
        assert np.abs(error).max() <= bound


ADAPTIVE = [((7,), (3,)), ((9, 8), (4, 3)), ((5, 5), (7, 1)), ((8, 6), (4, 3)), ((4, 5, 6), (3, 2, 6))]


@pytest.mark.parametrize(("size", "output"), ADAPTIVE, ids=str)
def test_adaptive_pools_are_those_of_torch(size: tuple, output: tuple) -> None:
    rank = len(size)
    compare(ops.AdaptiveMaxPool(output_size=output), lambda x: ADAPTIVE_MAX[rank - 1](x, output), (2, 3, *size), 0.0)
    compare(ops.AdaptiveAvgPool(output_size=output), lambda x: ADAPTIVE_AVG[rank - 1](x, output), (2, 3, *size), 1e-6)
    op = ops.AdaptiveMaxPool(output_size=output, channels_last=True)
    for dtype in ("int8", "int16"):
        x = integers(2, (4, *size, 3), dtype)
        expected = ADAPTIVE_MAX[rank - 1](torch.from_numpy(np.moveaxis(x, -1, 1).astype(np.float64)), output).numpy()
        for result in integer_rules(op, x, 1.0, dtype, 1.0):
            np.testing.assert_array_equal(np.moveaxis(result, -1, 1), expected)


def test_a_tie_gives_its_gradient_to_one_element() -> None:
    op = ops.MaxPool(kernel=(3,), strides=(1,), padding=((1, 1),), dilation=(1,))
    grad = jax.grad(lambda x: (eval_float(op, x) * jnp.asarray([1.0, 2.0, 4.0, 8.0])).sum())
    np.testing.assert_array_equal(grad(jnp.zeros((1, 1, 4))), [[[3, 4, 8, 0]]])  # the first, as in torch
    assert jnp.isnan(eval_float(op, jnp.asarray([[[jnp.nan, 1.0, jnp.nan, 1.0]]]))).all()


@pytest.mark.parametrize("kind", ["AvgPool", "AdaptiveAvgPool"])
@pytest.mark.parametrize("value", [-32768, 32767])
def test_the_largest_sum_of_int16_fits(kind: str, value: int) -> None:
    """65,535 elements of -32768 are above -2^31; the limit of the target keeps larger windows out."""
    size = (255, 257)
    op: jq.ops.Op = ops.AdaptiveAvgPool(output_size=(1, 1), channels_last=True)
    if kind == "AvgPool":
        op = ops.AvgPool(kernel=size, strides=(1, 1), padding=((0, 0),) * 2, channels_last=True)
    x = np.full((1, *size, 1), value, np.int16)
    fast, slow = integer_rules(op, x, 1.0, "int16", 1.0)
    np.testing.assert_array_equal(fast, slow)
    assert abs(int(fast.item()) - value) <= 2.9
    wide = ops.AvgPool(kernel=(256, 256), strides=(1, 1), padding=((0, 0),) * 2, channels_last=True)
    assert constraints(wide, [], None, None, NASH) == ["65536 elements are reduced, more than 65535"]


def prepare(op: jq.ops.Op, size: tuple[int, ...]) -> jq.Model:
    graph = jq.Graph((jq.Input("x", (None, 3, *size)),), (jq.Node("y", op, ("x",)),), ("y",))
    return jq.prepare(graph, {}, jq.QConfig({"*": jq.Policy(output=jq.int8())}), target=NASH)


def test_adaptive_averages_of_unequal_windows_are_refused() -> None:
    message = r"y \(AdaptiveAvgPool\): input size \(7, 8\) does not divide into \(3, 2\); resize the input"
    with pytest.raises(jq.QConfigError, match=message):
        prepare(ops.AdaptiveAvgPool(output_size=(3, 2)), (7, 8))


@pytest.mark.parametrize(
    "op",
    [
        ops.MaxPool(kernel=(3, 2), strides=(2, 1), padding=((1, 1), (0, 1)), dilation=(1, 2), ceil_mode=True),
        ops.AvgPool(kernel=(3, 2), strides=(2, 1), padding=((1, 1), (0, 1)), count_include_pad=False),
        ops.AdaptiveMaxPool(output_size=(3, 3)),
        ops.AdaptiveAvgPool(output_size=(4, 2)),
    ],
    ids=lambda op: type(op).__name__,
)
def test_the_same_bits_in_a_program_however_it_runs(op: jq.ops.Op, tmp_path: Any) -> None:
    model = prepare(op, (8, 6))
    x = jnp.asarray(images(3, (5, 3, 8, 6)))
    model = jq.calibrate(model, [x])
    program = jq.lower(model)
    y = jq.run(program, x)
    (slow,), _ = jq.reference.run(program, np.asarray(x))
    np.testing.assert_array_equal(y, slow)
    np.testing.assert_array_equal(jax.vmap(lambda v: jq.run(program, v[None])[0])(x), y)
    np.testing.assert_array_equal(jnp.concatenate([jq.run(program, x[:2]), jq.run(program, x[2:])]), y)
    np.testing.assert_array_equal(jq.apply(model, x, mode="bit_true"), y)
    jq.save(tmp_path / "program", program)
    np.testing.assert_array_equal(jq.run(jq.load(tmp_path / "program"), x), y)


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (ops.MaxPool(kernel=(3,), strides=(1,), padding=((0, 0),), dilation=(2,)), "does not fit"),
        (ops.AvgPool(kernel=(5,), strides=(1,), padding=((0, 0),)), "does not fit"),
        (ops.AvgPool(kernel=(2,), strides=(1,), padding=((0, 0),), divisor=0), "must be positive"),
        (
            ops.AvgPool(kernel=(2,), strides=(1,), padding=((3, 0),), count_include_pad=False),
            "without an element; pad less",
        ),
    ],
    ids=str,
)
def test_what_is_refused(op: jq.ops.Op, message: str) -> None:
    with pytest.raises(jq.GraphError, match=message):
        eval_float(op, jnp.zeros((1, 1, 4)))
