"""Modules of equinox need no helper: they are pytrees, and `eqx.partition` tells their arrays from the rest."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jquant as jq

QCONFIG = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out", quantizer=jq.lsq), output=jq.int8())})


class Net(eqx.Module):
    """Of one example [3, 8, 8]; a batch takes jax.vmap, as everywhere in equinox."""

    conv: eqx.nn.Conv2d
    norm: eqx.nn.LayerNorm
    hidden: eqx.nn.MLP
    dropout: eqx.nn.Dropout

    def __init__(self, key: jax.Array) -> None:
        first, second = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(3, 8, 3, stride=2, padding=1, key=first)
        self.norm = eqx.nn.LayerNorm(8)
        self.hidden = eqx.nn.MLP(8, 5, width_size=16, depth=1, key=second)
        self.dropout = eqx.nn.Dropout(0.5, inference=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.hidden(self.dropout(self.norm(jax.nn.relu(self.conv(x)).mean((1, 2)))))


@pytest.fixture
def net():
    with jax.numpy_dtype_promotion("standard"):
        params, static = eqx.partition(Net(jax.random.key(0)), eqx.is_inexact_array)
        yield lambda params, x: jax.vmap(eqx.combine(params, static))(x), params


IMAGES = jax.random.normal(jax.random.key(1), (6, 3, 8, 8))


def test_its_layers_have_the_names_of_its_fields(net) -> None:
    graph, params = jq.trace(*net, IMAGES)
    expected = net[0](net[1], IMAGES)
    (found,) = jq.graph.evaluate_float(graph, params, IMAGES)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * float(jnp.abs(expected).max()))
    layers = {node.name: type(node.op).__name__ for node in graph.nodes if node.params}
    assert layers == {"conv": "Conv", "norm": "LayerNorm", "hidden.layers.0": "Linear", "hidden.layers.1": "Linear"}
    assert graph.inputs[0].shape[0] is None


def test_it_trains_and_its_integers_are_those_of_the_specification(net) -> None:
    fn, params = net
    qfn, variables = jq.quantize(fn, params, QCONFIG, [IMAGES])
    labels = jnp.arange(6) % 5

    def loss(variables):
        return optax.softmax_cross_entropy_with_integer_labels(qfn(variables, IMAGES), labels).mean()

    optimizer = optax.sgd(0.1)
    state, first = optimizer.init(variables), loss(variables)
    for _ in range(10):
        updates, state = optimizer.update(jax.grad(loss)(variables), state, variables)
        variables = optax.apply_updates(variables, updates)
    assert float(loss(variables)) < 0.9 * float(first)
    program = qfn.lower(variables)
    (reference,) = jax.tree.leaves(jq.reference.run(program, np.asarray(IMAGES))[0])
    np.testing.assert_array_equal(jq.run(program, IMAGES), reference)
