"""Indices outside of an axis in traced functions: every mode gives what JAX gives, or is refused at lowering."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jquant as jq

TABLE = {"t": jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)}
X = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 4)), jnp.float32)
PLACES = (0, 4, 5, 7, -1, -5, -6, -9)
IDS = jnp.asarray([PLACES, PLACES[::-1]], jnp.int32)


def traced(fn, *inputs, **options):
    graph, params = jq.trace(fn, TABLE, *inputs, **options)
    used = [x for x, _ in zip(inputs, graph.inputs, strict=True)]
    return graph, np.asarray(jq.graph.evaluate_float(graph, params, *used)[0])


def check(fn, *inputs, **options):
    """The same as JAX, NaN for NaN; returns the graph."""
    graph, got = traced(fn, *inputs, **options)
    np.testing.assert_array_equal(got, np.asarray(fn(TABLE, *inputs)))
    return graph


@pytest.mark.parametrize("mode", [None, "fill", "clip", "wrap"])
def test_take_rows_of_a_table(mode):
    graph = check(lambda p, i: jnp.take(p["t"], i, axis=0, mode=mode), IDS)
    if mode in (None, "fill"):
        assert [type(n.op) for n in graph.nodes] == [jq.ops.Embedding]
        assert np.isnan(traced(lambda p, i: jnp.take(p["t"], i, axis=0, mode=mode), IDS)[1]).any()


@pytest.mark.parametrize("mode", [None, "fill", "clip", "wrap"])
@pytest.mark.parametrize("places", [PLACES, (4, 5, 6), (-7, -6, -5), (0, 2, 4), (3, 1)])
def test_take_at_known_places(mode, places):
    check(lambda p, x: jnp.take(x, jnp.asarray(places), axis=1, mode=mode), X, dynamic_batch=False)


@pytest.mark.parametrize("mode", ["clip", "fill", "wrap"])
def test_take_at_places_of_an_input(mode):
    check(lambda p, x, i: jnp.take(x, i, axis=1, mode=mode), X, jnp.asarray(PLACES), dynamic_batch=False)


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, i: p["t"][i],
        lambda p, i: p["t"].at[i].get(mode="fill", fill_value=9.0),
        lambda p, i: p["t"].at[i].get(mode="clip"),
        lambda p, i: jax.nn.one_hot(i, 5),
    ],
)
def test_indexing_a_table(fn):
    check(fn, IDS)


@pytest.mark.parametrize("start", [-9, -2, 0, 3, 9])
def test_a_dynamic_slice_is_moved_into_the_array(start):
    check(lambda p, x: lax.dynamic_slice(x, (0, start, 0), (x.shape[0], 3, 4)), X)
    check(lambda p, x: lax.dynamic_update_slice(x, 2 * x[:, :3], (0, start, 0)), X)
    of_input = jnp.full((2, 1), start, jnp.int32)
    check(lambda p, x, i: lax.dynamic_slice(x, (0, i[0, 0], 0), (2, 3, 4)), X, of_input, dynamic_batch=False)


@pytest.mark.parametrize("mode", [None, "drop", "clip", "promise_in_bounds"])
@pytest.mark.parametrize("kind", ["set", "add", "max"])
def test_scatter(kind, mode):
    known = jnp.asarray([0, 7, -9, -1])
    check(lambda p, x: getattr(x.at[:, known], kind)(2 * x[:, :4] + 1, mode=mode), X)
    index = jnp.asarray([[0, 7, -9, -1], [1, 2, 5, -6]], jnp.int32)
    check(lambda p, x, i: jax.vmap(lambda a, j: getattr(a.at[j], kind)(2 * a[:4], mode=mode))(x, i), X, index)


def test_integers_count_negative_indices_from_the_end():
    graph, params = jq.trace(lambda p, i: p["t"][i], TABLE, IDS)
    qconfig = jq.QConfig({"*": jq.Policy(output=jq.int8())})
    model = jq.prepare(graph, params, qconfig, target=jq.targets.NASH_E)
    model = jq.calibrate(model, [IDS])
    program = jq.lower(model)
    got = np.asarray(jq.run(program, IDS))
    table = np.asarray(TABLE["t"])
    want = table[np.clip(np.where(IDS < 0, IDS + 5, IDS), 0, 4)]
    np.testing.assert_allclose(got, want, atol=np.abs(table).max() / 127)
    inside = jnp.asarray([[0, 4, -1, -5, 2, 3, 1, -2]], jnp.int32)
    got = np.asarray(jq.run(program, inside))
    np.testing.assert_array_equal(got, jq.reference.run(program, np.asarray(inside))[0][0])
