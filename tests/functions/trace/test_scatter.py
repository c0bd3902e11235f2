"""Writing elements in functions of JAX: `x.at[...]` and segment sums, in every mode of an index, against JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq

B, N, D, K = 3, 5, 4, 3
RNG = np.random.default_rng(0)
PLACES = jnp.asarray([0, 3, 4])
X = jnp.asarray(RNG.normal(size=(B, N, D)), jnp.float32)
V = jnp.asarray(RNG.normal(size=(B, K, D)), jnp.float32)
INSIDE = jnp.asarray(RNG.integers(0, N, (B, K)), jnp.int32)
ANY = jnp.asarray([[0, -1, 9], [4, -7, 4], [2, 2, 5]], jnp.int32)


def each(f):
    return lambda x, v, i: jax.vmap(f)(x, v, i)


FUNCTIONS = {
    "element": lambda x, v, i: x.at[:, 0].set(v[:, 1]),
    "element, number": lambda x, v, i: x.at[:, -1].set(0.5),
    "slice": lambda x, v, i: x.at[:, 1:4].set(v),
    "slice, add": lambda x, v, i: x.at[:, 1:4].add(v),
    "slice, max": lambda x, v, i: x.at[:, :, 2:].max(0.25),
    "steps": lambda x, v, i: x.at[:, ::2].multiply(1.0) + x.at[:, ::2].set(v),
    "steps, min": lambda x, v, i: x.at[:, ::2].min(v),
    "known": lambda x, v, i: x.at[:, PLACES].set(v),
    "known, add": lambda x, v, i: x.at[:, PLACES].add(v),
    "known, the same place twice": lambda x, v, i: x.at[:, jnp.asarray([1, 1, 3])].add(v),
    "known, last axis": lambda x, v, i: x.at[..., jnp.asarray([3, 1])].add(1.5),
    "known, two axes": lambda x, v, i: x.at[:, jnp.asarray([0, 4]), jnp.asarray([3, 1])].set(v[:, 0, :2]),
    "add": each(lambda x, v, i: x.at[i].add(v)),
    "set": each(lambda x, v, i: x.at[i].set(v)),
    "max": each(lambda x, v, i: x.at[i].max(v)),
    "min": each(lambda x, v, i: x.at[i].min(v)),
    "set, clip": each(lambda x, v, i: x.at[i].set(v, mode="clip")),
    "add, clip": each(lambda x, v, i: x.at[i].add(v, mode="clip")),
    "add, drop": each(lambda x, v, i: x.at[i].add(v, mode="drop", wrap_negative_indices=False)),
    "columns": each(lambda x, v, i: x.at[:, jnp.minimum(i, D - 1)].add(v[:, :1].T)),
    "two axes": each(lambda x, v, i: x.at[i, jnp.minimum(i, D - 1)].add(v[:, 0])),
    "two axes apart": lambda x, v, i: (
        jax.vmap(lambda x, v, i: x.at[i, :, i].add(v))(x[:, :, None, :], v[..., :1], jnp.minimum(i, D - 1))
    ),
    "arange": lambda x, v, i: x.at[jnp.arange(x.shape[0])[:, None], i].add(v),
    "number": each(lambda x, v, i: x.at[i].set(0.0)),
    "segments": lambda x, v, i: jax.vmap(lambda v, i: jax.ops.segment_sum(v, i, N))(v, i),
    "counts": lambda x, v, i: jax.vmap(lambda i: jnp.zeros(N, jnp.int32).at[i].add(1))(i),
    "indices": lambda x, v, i: i.at[:, 1].set(7),
}  # fmt: skip
OPAQUE = {"steps"}  # no operator multiplies what is there


@pytest.mark.parametrize("index", ["inside", "any"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_writing_is_what_jax_does(name, index):
    inputs = X, V, INSIDE if index == "inside" else ANY
    function = FUNCTIONS[name]
    graph, params = jq.trace(lambda _, *xs: function(*xs), {}, *inputs)
    assert any(isinstance(node.op, jq.ops.Opaque) for node in graph.nodes) == (name in OPAQUE)
    (found,) = jax.tree.leaves(jq.graph.evaluate_float(graph, params, *inputs))
    wanted = function(*inputs)
    assert found.dtype == wanted.dtype
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)
    more = tuple(jnp.concatenate([x, x[::-1]]) for x in inputs)  # another batch size
    (found,) = jax.tree.leaves(jq.graph.evaluate_float(graph, params, *more))
    np.testing.assert_allclose(found, function(*more), rtol=0, atol=2e-6)


def test_an_index_that_is_clamped_needs_no_place_behind_the_last():
    function = each(lambda x, v, i: x.at[i].add(v, mode="clip"))
    graph, _ = jq.trace(lambda _, *xs: function(*xs), {}, X, V, INSIDE)
    kinds = [type(node.op).__name__ for node in graph.nodes]
    assert "Scatter" in kinds
    assert "Pad" not in kinds
    assert "Slice" not in kinds


def test_known_places_outside_stay_jax():
    """What is dropped there is left to JAX, and said by `lower`."""
    function = lambda _, x: x.at[:, jnp.asarray([1, 9])].set(1.0)  # noqa: E731
    graph, params = jq.trace(function, {}, X)
    assert any(isinstance(node.op, jq.ops.Opaque) for node in graph.nodes)
    (found,) = jax.tree.leaves(jq.graph.evaluate_float(graph, params, X))
    np.testing.assert_array_equal(found, function({}, X))


def test_a_pooling_of_points_in_integers():
    """Features of points are added to the cells of a grid: integers equal the reference, near the float function."""

    def pool(params, points, cells):
        features = jax.nn.relu(points @ params["w"])
        return jax.vmap(lambda f, i: jnp.zeros((6, 4)).at[i].add(f))(features, cells)

    weight = {"w": jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)}
    points = jnp.asarray(RNG.normal(size=(2, 8, 3)), jnp.float32)
    cells = jnp.asarray(RNG.integers(0, 8, (2, 8)), jnp.int32)  # some lie outside, and are dropped
    graph, params = jq.trace(pool, weight, points, cells)
    qconfig = jq.QConfig({"*": jq.Policy(output=jq.int16(), weight=jq.int8(axis="out"))})
    model = jq.calibrate(jq.prepare(graph, params, qconfig, target=jq.targets.NASH_E), [(points, cells)])
    program = jq.lower(model)
    fast = jax.tree.leaves(jq.run(program, points, cells))[0]
    slow = jax.tree.leaves(jq.reference.run(program, np.asarray(points), np.asarray(cells))[0])[0]
    np.testing.assert_array_equal(fast, slow)
    wanted = pool(weight, points, cells)
    assert float(jnp.abs(fast - wanted).max()) < 0.02 * float(jnp.abs(wanted).max())
