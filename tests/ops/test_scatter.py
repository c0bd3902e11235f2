"""Writing elements: the float rules against torch, what is written twice, and clear refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant import ops

torch = pytest.importorskip("torch")
REDUCE = {"add": "sum", "max": "amax", "min": "amin"}


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("reduce", REDUCE)
def test_scatter_reduce_is_torchs(axis: int, reduce: str) -> None:
    x, source = draw(4, 5, 6), draw(4, 5, 6, seed=1)
    index = np.random.default_rng(2).integers(0, x.shape[axis], x.shape).astype(np.int32)
    y = jq.ops.eval_float(ops.Scatter(axis=axis, reduce=reduce), *map(jnp.asarray, (x, index, source)))
    wanted = torch.scatter_reduce(
        torch.from_numpy(x), axis, torch.from_numpy(index).long(), torch.from_numpy(source), REDUCE[reduce]
    )
    np.testing.assert_allclose(y, wanted, rtol=1e-6, atol=1e-6)


def test_scatter_is_torchs_where_nothing_is_written_twice() -> None:
    x, source = draw(3, 6), draw(3, 4, seed=1)
    index = np.stack([np.random.default_rng(i).permutation(6)[:4] for i in range(3)]).astype(np.int32)
    y = jq.ops.eval_float(ops.Scatter(axis=1), *map(jnp.asarray, (x, index, source)))
    wanted = torch.scatter(torch.from_numpy(x), 1, torch.from_numpy(index).long(), torch.from_numpy(source))
    np.testing.assert_array_equal(y, wanted)


@pytest.mark.parametrize("reduce", ["none", *REDUCE])
@pytest.mark.parametrize("shapes", [((2, 4, 1), (2, 4, 6)), ((1, 4, 1), (2, 4, 6)), ((1, 4, 5), (2, 4, 5))])
def test_an_index_for_whole_rows_and_a_shorter_source(reduce: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    """As torch with the index of every element written out, by a loop where elements are written twice."""
    x, source = draw(2, 5, 6), draw(*shapes[1], seed=1)
    index = np.random.default_rng(2).integers(0, 5, shapes[0]).astype(np.int32)
    y = jq.ops.eval_float(ops.Scatter(axis=1, reduce=reduce), *map(jnp.asarray, (x, index, source)))
    full = torch.from_numpy(index).long().expand(*shapes[1])
    if reduce != "none":
        wanted = torch.scatter_reduce(torch.from_numpy(x), 1, full, torch.from_numpy(source), REDUCE[reduce]).numpy()
    else:
        wanted = x.copy()
        for at in np.ndindex(*shapes[1]):
            wanted[at[0], int(full[at]), at[2]] = source[at]
    np.testing.assert_allclose(y, wanted, rtol=1e-6, atol=1e-6)


def test_the_last_one_that_writes_counts() -> None:
    op, x = ops.Scatter(axis=0), jnp.zeros(3)
    y = jq.ops.eval_float(op, x, jnp.asarray([1, 2, 1], jnp.int32), jnp.asarray([5.0, 6.0, 7.0]))
    np.testing.assert_array_equal(y, [0.0, 7.0, 6.0])


def test_slice_scatter_is_torchs() -> None:
    x, source = draw(4, 9), draw(4, 3, seed=1)
    op = ops.SliceScatter(starts=(0, 1), stops=(None, 7), steps=(1, 2))
    wanted = torch.slice_scatter(torch.from_numpy(x), torch.from_numpy(source), 1, 1, 7, 2)
    np.testing.assert_array_equal(jq.ops.eval_float(op, jnp.asarray(x), jnp.asarray(source)), wanted)


@pytest.mark.parametrize("reduce", ["none", *REDUCE])
def test_gradients_go_to_what_is_kept(reduce: str) -> None:
    x, source = draw(3, 6), draw(3, 6, seed=1)
    index = np.random.default_rng(2).permuted(np.tile(np.arange(6), (3, 1)), axis=1).astype(np.int32)
    weight = jnp.asarray(draw(3, 6, seed=3))

    def loss(x: jax.Array, source: jax.Array) -> jax.Array:
        return (jq.ops.eval_float(ops.Scatter(axis=1, reduce=reduce), x, jnp.asarray(index), source) * weight).sum()

    found = jax.grad(loss, argnums=(0, 1))(jnp.asarray(x), jnp.asarray(source))
    a, b = (torch.from_numpy(v).requires_grad_() for v in (x, source))
    at = torch.from_numpy(index).long()
    y = a.scatter(1, at, b) if reduce == "none" else a.scatter_reduce(1, at, b, REDUCE[reduce])
    (y * torch.from_numpy(np.array(weight))).sum().backward()
    for mine, theirs in zip(found, (a.grad, b.grad), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)


def test_exact_values_are_written_too() -> None:
    op = ops.Scatter(axis=0, reduce="add")
    y = jq.ops.eval_float(op, jnp.zeros(3, jnp.int32), jnp.asarray([1, 1], jnp.int32), jnp.asarray([2, 3], jnp.int32))
    assert y.dtype == jnp.int32
    np.testing.assert_array_equal(y, [0, 5, 0])


def test_refusals() -> None:
    x = jnp.zeros((2, 3))
    with pytest.raises(jq.GraphError, match="must have one shape"):
        jq.ops.eval_float(ops.Scatter(axis=1), x, jnp.zeros((3, 3), jnp.int32), jnp.zeros((3, 3)))
    with pytest.raises(jq.GraphError, match="must have one shape"):
        jq.ops.eval_float(ops.Scatter(axis=1), x, jnp.zeros((2, 2), jnp.int32), jnp.zeros((2, 3)))
    with pytest.raises(jq.GraphError, match="exact int32"):
        jq.ops.eval_float(ops.BitShift(bits=1), x)
    with pytest.raises(jq.GraphError, match="32 bits"):
        jq.ops.eval_float(ops.BitShift(bits=32), jnp.zeros(2, jnp.int32))


@pytest.mark.parametrize(("sign", "end"), [(1.0, 127), (-1.0, -128)])
def test_a_sum_beyond_the_integers_stays_at_their_end(sign: float, end: int) -> None:
    """100 + 100 at one place and 0 + 100 at another, by hand: 200 is 127, and -200 is -128."""
    spec = jq.Policy(output=jq.int8(scale=2.0**-4))
    node = jq.Node("y", ops.Scatter(axis=1, reduce="add"), ("x", "i", "s"))
    entries = (jq.Input("x", (None, 3)), jq.Input("i", (None, 2), "int32"), jq.Input("s", (None, 2)))
    model = jq.prepare(jq.Graph(entries, (node,), ("y",)), {}, jq.QConfig({"*": spec}), target=jq.targets.NASH_E)
    step = sign * 2.0**-4
    x, source = jnp.asarray([[100 * step, 0, 3 * step]]), jnp.asarray([[100 * step, 100 * step]])
    y = jq.run_with_taps(jq.lower(model), x, jnp.asarray([[0, 1]], jnp.int32), source)["y"]
    np.testing.assert_array_equal(y, [[end, int(100 * sign), int(3 * sign)]])
