"""Reductions: float against torch, integers against exact sums, and the layouts they run in."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jquant as jq
from jquant import ops
from jquant.graph.operator import Operand, constraints, eval_float

NASH = jq.targets.NASH_E
X = np.random.default_rng(3).normal(size=(2, 3, 4, 5)).astype(np.float32)
TORCH: dict[type[jq.ops.Op], Callable] = {
    ops.Mean: torch.mean,
    ops.Sum: torch.sum,
    ops.ReduceMax: torch.amax,
    ops.ReduceMin: torch.amin,
}
AXES = ((1,), (2, 3), (-1,), (1, 2, 3), (1, 3))


def program_of(
    op: jq.ops.Op, shape: tuple[int, ...], x: jq.QuantSpec, y: jq.QuantSpec, target: jq.Target = NASH, exact: str = ""
) -> jq.Program:
    graph = jq.Graph((jq.Input("x", (None, *shape), exact or "float32"),), (jq.Node("y", op, ("x",)),), ("y",))
    rules = {"y": jq.Policy(output=y)} | ({} if exact else {"x": jq.Policy(output=x)})
    model = jq.prepare(graph, {}, jq.QConfig(rules), target=target)
    return jq.lower(model)


@pytest.mark.parametrize("operator", TORCH, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("keepdims", [False, True])
def test_values_and_gradients_are_torchs(operator: type, axes: tuple[int, ...], keepdims: bool) -> None:
    op, x = operator(axes=axes, keepdims=keepdims), torch.from_numpy(X).requires_grad_()
    y = TORCH[operator](x, dim=axes, keepdim=keepdims)
    y.pow(2).sum().backward()
    np.testing.assert_allclose(eval_float(op, jnp.asarray(X)), y.detach(), rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda v: (eval_float(op, v) ** 2).sum())(jnp.asarray(X))
    np.testing.assert_allclose(gradient, x.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_running_sums(exclusive: bool, reverse: bool) -> None:
    op, x = ops.CumSum(axis=2, exclusive=exclusive, reverse=reverse), torch.from_numpy(X).requires_grad_()
    y = torch.cumsum(x.flip(2) if reverse else x, 2)
    y = torch.nn.functional.pad(y, (0, 0, 1, 0))[:, :, :-1] if exclusive else y
    y = y.flip(2) if reverse else y
    y.pow(2).sum().backward()
    np.testing.assert_allclose(eval_float(op, jnp.asarray(X)), y.detach(), rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda v: (eval_float(op, v) ** 2).sum())(jnp.asarray(X))
    np.testing.assert_allclose(gradient, x.grad, rtol=1e-5, atol=1e-5)


def test_masks_and_positions() -> None:
    x = np.array([[0, 3, 3, -1], [-128, 0, -128, 0]], np.int8)
    assert eval_float(ops.ArgMax(axis=1), jnp.asarray(x)).tolist() == [1, 1]  # the first of several
    assert eval_float(ops.ArgMin(axis=-1, keepdims=True), jnp.asarray(x)).tolist() == [[3], [0]]
    assert eval_float(ops.ReduceAny(axes=(1,)), jnp.asarray(x != 0)).tolist() == [True, True]
    assert eval_float(ops.ReduceAll(axes=(1,)), jnp.asarray([[1.0, 2.0], [0.0, 1.0]])).tolist() == [True, False]
    assert eval_float(ops.Sum(axes=(1,)), jnp.asarray(x != 0)).tolist() == [3, 2]  # how many
    with pytest.raises(jq.GraphError, match="may leave int32; sum masks"):
        eval_float(ops.Sum(axes=(1,)), jnp.asarray(x).astype(jnp.int32))


@pytest.mark.parametrize(("op", "count"), [(ops.Sum(axes=(1,)), 1), (ops.Mean(axes=(1,)), 65535)], ids=str)
def test_the_largest_sum_on_the_chip_fits_in_int32(op: jq.ops.Op, count: int) -> None:
    """65,535 times -32,768 is above -2^31."""
    x, y = jq.int16(scale=1.0), jq.int16(scale=65535.0 / count)
    program = program_of(op, (65535,), x, y)
    assert program.formats["y"].accumulator == "int32"
    assert int(program.accumulators["y"].worst_case) == 65535 * 2**15
    data = np.stack([np.full(65535, v, np.int16) for v in (-32768, 32767, 1, 0)])
    fast = jq.run(program, jnp.asarray(data), raw=True)
    np.testing.assert_allclose(fast, [-32768, 32767, 1, 0], atol=1)
    np.testing.assert_array_equal(fast, jq.reference.run(program, data, raw=True)[0][0])


@pytest.mark.parametrize(
    "op", [ops.Sum(axes=(1,)), ops.Mean(axes=(1,)), ops.CumSum(axis=1), ops.CumSum(axis=1, reverse=True)], ids=str
)
def test_a_larger_sum_is_carried_in_limbs(op: jq.ops.Op) -> None:
    target = replace(NASH, max_reduced=2**20)
    program = program_of(op, (100_000,), jq.int16(scale=1.0), jq.int16(scale=100_000.0), target)
    assert program.formats["y"].accumulator == "limbs"
    assert int(program.accumulators["y"].worst_case) == 100_000 * 2**15
    rng = np.random.default_rng(0)
    ends = [np.full(100_000, v, np.int16) for v in (-32768, 32767)]
    data = np.stack([*ends, rng.integers(-32768, 32768, 100_000).astype(np.int16)])
    fast = jq.run(program, jnp.asarray(data), raw=True)
    np.testing.assert_array_equal(fast, jq.reference.run(program, data, raw=True)[0][0])
    if isinstance(op, ops.Sum):
        np.testing.assert_allclose(fast[:2], [-32768, 32767], atol=1)


def test_counts_of_masks_are_exact() -> None:
    mask = np.random.default_rng(0).random((3, 50)) < 0.5
    spec = jq.int8(scale=1.0)
    program = program_of(ops.Sum(axes=(1,)), (50,), spec, spec, exact="bool")
    y = jq.run(program, jnp.asarray(mask))
    assert y.dtype == jnp.int32
    np.testing.assert_array_equal(y, mask.sum(1))
    mean = program_of(ops.Mean(axes=(1,)), (50,), spec, jq.int8(scale=1 / 128), exact="bool")
    np.testing.assert_allclose(jq.run(mean, jnp.asarray(mask)), mask.mean(1), atol=1 / 256)


@pytest.mark.parametrize(
    ("op", "shape", "message"),
    [
        (ops.Sum(axes=(0,)), (2, 4), "reduces over the batch"),
        (ops.Mean(axes=(-2,)), (2, 4), "reduces over the batch"),
        (ops.ArgMax(axis=0), (2, 4), "reduces over the batch"),
        (ops.CumSum(axis=-3), (2, 4, 4), "reduces over the batch"),
        (ops.Sum(axes=(1, 2)), (2, 256, 256), "65536 elements are reduced, more than 65535"),
        (ops.ReduceAll(axes=(1, 2)), (2, 256, 256), "65536 elements"),
        (ops.CumSum(axis=1), (2, 65536), "65536 elements"),
        (ops.ArgMax(axis=1), (2, 32768), "searches 32768 elements, more than 32767"),
    ],
    ids=str,
)
def test_limits_are_sentences(op: jq.ops.Op, shape: tuple[int, ...], message: str) -> None:
    x = Operand("int8", jnp.float32(1), shape)
    (sentence,) = constraints(op, [x], x, None, NASH)
    assert message in sentence


POOL = ops.MaxPool(kernel=(1, 1), strides=(1, 1), padding=((0, 0),) * 2, dilation=(1, 1))


def channels_last_model(op: jq.ops.Op) -> tuple[jq.Graph, jq.Model]:
    nodes = jq.Node("p", POOL, ("x",)), jq.Node("y", op, ("p",))
    graph = jq.Graph((jq.Input("x", (None, 3, 4, 5)),), nodes, ("y",))
    return graph, jq.prepare(graph, {}, jq.QConfig({"*": jq.Policy(output=jq.int8())}), target=NASH)


@pytest.mark.parametrize(
    ("op", "permutes"),
    [
        (ops.Sum(axes=(2, 3)), ["x.to_last"]),
        (ops.Mean(axes=(1,)), ["x.to_last"]),  # without channels the order is the framework's
        (ops.ArgMax(axis=1), ["x.to_last"]),
        (ops.ReduceMax(axes=(1, 3)), ["x.to_last"]),
        (ops.ReduceAny(axes=(-1,)), ["x.to_last", "p.to_first"]),
        (ops.ArgMin(axis=2), ["x.to_last", "p.to_first"]),
        (ops.ArgMin(axis=2, keepdims=True), ["x.to_last", "y.to_first"]),
        (ops.ReduceMin(axes=(1, 2), keepdims=True), ["x.to_last", "y.to_first"]),
        (ops.CumSum(axis=1), ["x.to_last", "y.to_first"]),
    ],
    ids=str,
)
def test_reductions_run_channels_last_where_they_can(op: jq.ops.Op, permutes: list[str]) -> None:
    graph, model = channels_last_model(op)
    assert [n.name for n in model.plan.graph.nodes if isinstance(n.op, ops.Permute)] == permutes
    np.testing.assert_allclose(
        jq.apply(model, jnp.asarray(X), mode="float"),
        jq.graph.evaluate_float(graph, {}, jnp.asarray(X))[0],
        rtol=1e-5,
    )


def test_an_example_does_not_depend_on_the_batch() -> None:
    data = np.random.default_rng(0).integers(-128, 128, (6, 3, 4, 5)).astype(np.int8)
    for op in (ops.Sum(axes=(2, 3)), ops.ArgMax(axis=1), ops.CumSum(axis=3)):
        program = program_of(op, (3, 4, 5), jq.int8(scale=0.1), jq.int8(scale=0.5))
        run = partial(jq.run, program, raw=True)
        parts = [run(jnp.asarray(data[i : i + 2])) for i in (0, 2, 4)]
        np.testing.assert_array_equal(run(jnp.asarray(data)), np.concatenate(parts))
