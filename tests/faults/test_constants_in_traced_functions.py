"""`jq.trace`: what depends on constants alone is computed, and Python numbers have the dtype of the primitive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jquant as jq

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
P = {
    "a": jnp.arange(1.0, 4.0),
    "b": jnp.asarray(np.random.default_rng(1).normal(size=(3, 3)), jnp.float32),
    "k": jnp.asarray(np.random.default_rng(2).normal(size=(2, 2, 3, 3)), jnp.float32),
}

PRODUCTS = {
    "resize to one pixel, bilinear": lambda p, x: jax.image.resize(x, (x.shape[0], 1, 1, 3), "bilinear"),
    "resize to one pixel, cubic": lambda p, x: jax.image.resize(x, (x.shape[0], 1, 1, 3), "cubic"),
    "weights of weights": lambda p, x: x @ (p["b"] @ p["b"].T),
    "weights of a weight and a constant": lambda p, x: x @ (p["b"] @ (0.5 * jnp.eye(3))),
    "constants alone": lambda p, x: x @ (jnp.ones((3, 3)) @ jnp.eye(3)),
    "a scalar of constants": lambda p, x: x * jnp.dot(jnp.arange(3.0), jnp.arange(3.0)),
    "a scalar of weights": lambda p, x: x * (p["a"] @ p["a"]),
    "a batched product": lambda p, x: x @ jnp.einsum("kij,kjl->il", p["k"][0], p["k"][1]),
    "a normalized weight": lambda p, x: x @ (p["b"] / jnp.linalg.norm(p["b"])),
    "a convolution of constants": lambda p, x: x + lax.conv_general_dilated(
        jnp.ones((1, 8, 8, 3)), p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
}  # fmt: skip

WINDOW = ((1, 2, 2, 1), (1, 2, 2, 1), "VALID")
LITERALS = {
    "pad": lambda p, x: lax.pad(x, 0.0, ((0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0))),
    "pad inside": lambda p, x: lax.pad(x, 0.0, ((0, 0, 0), (1, 1, 1), (1, 1, 1), (0, 0, 0))),
    "pad with a number": lambda p, x: lax.pad(x, 2.5, ((0, 0, 0), (0, 1, 1), (0, 0, 0), (0, 0, 0))),
    "largest of windows": lambda p, x: lax.reduce_window(x, -jnp.inf, lax.max, *WINDOW),
    "largest of windows and a number": lambda p, x: lax.reduce_window(x, 0.5, lax.max, *WINDOW),
    "sum of windows": lambda p, x: lax.reduce_window(x, 0.0, lax.add, *WINDOW),
    "product of windows": lambda p, x: lax.reduce_window(x, 1.0, lax.mul, *WINDOW),
    "product": lambda p, x: lax.reduce(x, 1.0, lax.mul, (1, 2)),
    "arctangent": lambda p, x: jnp.arctan2(x, 1.0),
    "next number": lambda p, x: jnp.nextafter(x, 1.0),
    "incomplete beta": lambda p, x: jax.scipy.special.betainc(1.0, 2.0, jnp.abs(jnp.tanh(x))),
    "a loop": lambda p, x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 2.0), (0, x))[1],
}  # fmt: skip


def check(fn, **options):
    graph, params = jq.trace(fn, P, X, **options)
    got = np.asarray(jq.graph.evaluate_float(graph, params, X)[0])
    np.testing.assert_allclose(got, np.asarray(fn(P, X)), rtol=1e-5, atol=1e-5)
    return graph, params


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_of_constants_is_computed(name):
    graph, _ = check(PRODUCTS[name])
    assert not any(isinstance(node.op, jq.ops.Opaque) for node in graph.nodes)


@pytest.mark.parametrize("name", LITERALS)
def test_a_python_number_in_a_primitive(name):
    check(LITERALS[name], dynamic_batch=name != "a loop")


def test_weights_of_weights_follow_the_params_that_are_given_later():
    fn = PRODUCTS["weights of weights"]
    qconfig = jq.QConfig({"*": jq.Policy(output=jq.int16(), weight=jq.int8())})
    qfn, variables = jq.quantize(fn, P, qconfig, [X])
    other = {**P, "b": P["b"] * 0.5}
    got = qfn({**variables, "params": other}, X, mode="float")
    np.testing.assert_allclose(got, fn(other, X), rtol=1e-5, atol=1e-5)
