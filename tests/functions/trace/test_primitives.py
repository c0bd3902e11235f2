"""Each primitive: the operator that stands for it gives what lax gives, in float and for exact values bit for bit."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jquant as jq

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 6, 8)), jnp.float32)
UNIT = jnp.asarray(RNG.uniform(0.1, 0.9, (2, 6, 8)), jnp.float32)
IDS = jnp.asarray(RNG.integers(0, 6, (2, 6)), jnp.int32)
MASK = jnp.asarray(RNG.integers(0, 2, (2, 6)), bool)
W = jnp.asarray(RNG.normal(size=(6, 8)), jnp.float32)


def check(fn: Callable, *inputs: jax.Array, opaque: bool = False) -> None:
    graph, params = jq.trace(fn, {"w": W}, *inputs)
    expected, found = jax.tree.leaves(fn({"w": W}, *inputs)), jq.graph.evaluate_float(graph, params, *inputs)
    for a, b in zip(expected, found, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if a.dtype == jnp.float32:
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-6 * max(float(jnp.abs(a).max()), 1.0))
        else:
            np.testing.assert_array_equal(a, b)
    assert any(isinstance(node.op, jq.ops.Opaque) for node in graph.nodes) == opaque


ON_NUMBERS: dict[str, Callable] = {
    **{f.__name__: f for f in (jnp.abs, jnp.exp, jnp.tanh, jnp.sin, jnp.cos, jnp.sign, jnp.floor, jnp.ceil, jnp.round)},
    **{f.__name__: f for f in (jnp.sinh, jnp.cosh, jnp.arctan, jnp.arcsinh, jnp.square, jnp.expm1, jnp.exp2)},
    "power": lambda x: x**3 + x**2,
    "inverse": lambda x: 1.0 / (x * x + 1.0) + (x * x + 1.0) ** -1,
    "remainder": lambda x: lax.rem(x, jnp.full_like(x, 0.7)),
    "clamp": lambda x: lax.clamp(-0.5, x, 0.3) + jnp.maximum(x, 0.1) + jnp.minimum(x, 0.2),
    "two operands": lambda x: jnp.maximum(x, x[:, ::-1]) * jnp.minimum(x, 2.0 * x) - x / (x * x + 1.0),
    "comparisons": lambda x: [x > 0.1, x[:, :3] >= x[:, 3:], x > 0.2, x <= 0.5, x == 0.0, x != 1.0],
    "where": lambda x: jnp.where(x > 0, x, 0.5) + jnp.where(x > 0, 0.25, x) + jnp.where(x > 0, x, -2.0 * x),
    "stop gradient": lambda x: x * lax.stop_gradient(x),
    "convert": lambda x: (x > 0).astype(jnp.float32) * x,
    "erf": lambda x: lax.erf(x) + lax.erfc(x),
    "reshape": lambda x: x.reshape(x.shape[0], -1, 4).transpose(0, 2, 1),
    "expand": lambda x: jnp.broadcast_to(x[:, :1], x.shape) + x[:, :, None, 3],
    "concatenate": lambda x: jnp.concatenate([x, x[:, ::2, :], jnp.zeros((x.shape[0], 1, 8))], axis=1),
    "slices": lambda x: x[:, 1:5:2, 2:] * x[:, 0, 0][:, None, None],
    "split": lambda x: jnp.split(x, [3, 5], axis=2),
    "flip": lambda x: jnp.flip(x, (1, 2)),
    "pad": lambda x: lax.pad(x, 0.5, ((0, 0, 0), (1, -1, 0), (-2, 3, 0))),
    "tile": lambda x: jnp.tile(x, (1, 2, 3)),
    "roll": lambda x: jnp.roll(x, 2, axis=1),
    "update": lambda x: lax.dynamic_update_slice(x, x[:, :2, :3], (0, 1, 2)),
    "take": lambda x: x[:, jnp.array([4, 0, 1])] + x[:, jnp.array([0, 2, 4])],
    "sums": lambda x: [x.sum((1, 2)), x.max(2), x.min(1), jnp.cumsum(x, 1), x.argmax(2), x.argmin(1)],
    "reverse sum": lambda x: lax.cumsum(x, axis=1, reverse=True),
    "order": lambda x: [jnp.sort(x, axis=1), jnp.argsort(x, axis=2), *lax.top_k(x, 3)],
    "masks": lambda x: [(x > 0).all(1), (x > 1).any(2), ~(x > 0), (x > 0) & (x < 1), (x > 0) | (x < -1)],
    "new axes": lambda x: jnp.stack([x, 2.0 * x], axis=2),
}
PRODUCTS: dict[str, Callable] = {
    "linear": lambda p, x: x @ p["w"].T,
    "linear from the left": lambda p, x: jnp.einsum("ok,nkc->noc", p["w"].T, x),
    "heads": lambda p, x: jnp.einsum("ntc,hdc->nthd", x, p["w"].reshape(2, 3, 8)),
    "from heads": lambda p, x: jnp.einsum("nthd,hdo->nto", x.reshape(x.shape[0], 6, 2, 4), p["w"].reshape(2, 4, 6)),
    "two sums": lambda p, x: jnp.einsum("ntc,tc->n", x, p["w"]),
    "vectors": lambda p, x: x[:, 0] @ p["w"][0],
    "activations": lambda p, x: jnp.einsum("nic,njc->nij", x, 0.5 * x),
    "transposed": lambda p, x: jnp.einsum("nic,nid->ncd", x, 0.5 * x),
    "outer": lambda p, x: jnp.einsum("nic,njd->nijcd", x[:, :2, :2], x[:, :, :3]),
    "by example": lambda p, x: jnp.einsum("nc,nc->n", x[:, 0], x[:, 1]),
    "shared with the batch axes": lambda p, x: jnp.einsum("ntc,tcd->ntd", x, p["w"][:, :, None] * jnp.ones(3)),
}


@pytest.mark.parametrize("name", ON_NUMBERS)
def test_on_numbers(name: str) -> None:
    check(lambda params, x: ON_NUMBERS[name](x), X)


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    check(PRODUCTS[name], X)


@pytest.mark.parametrize("fn", [jnp.log, jnp.sqrt, lax.rsqrt, jnp.log1p, jnp.arcsin, jnp.arccos, jnp.arctanh, jnp.tan])
def test_on_part_of_the_numbers(fn: Callable) -> None:
    check(lambda params, x: fn(x), UNIT)


def test_on_exact_values() -> None:
    check(lambda params, i, m: [i + 3, i * 2 - i, jnp.maximum(i, 2), i > 2, i[:, ::2], m ^ (i > 3)], IDS, MASK)
    check(lambda params, i: params["w"][i] + jnp.take(params["w"], i, axis=0), IDS)
    check(lambda params, i, x: jnp.where((i > 2)[..., None], x, 0.0), IDS, X)


CONVOLUTIONS = {
    "same": ((2, 8, 6, 4), (3, 3, 4, 5), {"padding": "SAME"}, "NHWC"),
    "strided": ((2, 9, 6, 4), (3, 2, 4, 5), {"window_strides": (2, 1), "padding": "VALID"}, "NHWC"),
    "dilated": ((2, 9, 7, 4), (3, 3, 4, 5), {"rhs_dilation": (2, 1), "padding": ((1, 2), (0, 1))}, "NHWC"),
    "depthwise": ((2, 8, 6, 4), (3, 3, 1, 8), {"feature_group_count": 4, "padding": "SAME"}, "NHWC"),
    "channels first": ((2, 4, 8, 6), (5, 4, 3, 3), {"padding": "SAME"}, "NCHW"),
    "channels first to last": ((2, 4, 8, 6), (5, 4, 3, 3), {"padding": "SAME"}, ("NCHW", "OIHW", "NHWC")),
    "one axis": ((2, 8, 4), (3, 4, 5), {"padding": ((2, 0),)}, ("NWC", "WIO", "NWC")),
    "three axes": ((2, 4, 5, 6, 2), (2, 2, 2, 2, 3), {"padding": "SAME"}, ("NDHWC", "DHWIO", "NDHWC")),
    "transposed": ((2, 4, 5, 3), (3, 2, 3, 4), {"lhs_dilation": (2, 3), "padding": ((2, 2), (1, 2))}, "NHWC"),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str) -> None:
    shape, kernel, options, layout = CONVOLUTIONS[name]
    numbers = layout if isinstance(layout, tuple) else (layout, "HWIO" if layout == "NHWC" else "OIHW", layout)
    options = {"window_strides": (1,) * (len(shape) - 2), **options}
    weight, x = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in (kernel, shape))

    def fn(params, x):
        return lax.conv_general_dilated(x, params["kernel"], dimension_numbers=numbers, **options)

    graph, params = jq.trace(fn, {"kernel": weight}, x)
    (found,) = jq.graph.evaluate_float(graph, params, x)
    expected = fn({"kernel": weight}, x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * float(jnp.abs(expected).max()))
    kinds = {type(node.op).__name__ for node in graph.nodes}
    assert kinds <= {"Conv", "ConvTranspose", "Permute"}
    assert ("ConvTranspose" in kinds) == (name == "transposed")


def test_what_has_no_operator_is_opaque() -> None:
    check(lambda params, x: lax.cumprod(x, axis=1) + lax.atan2(x, 2.0 * x), X, opaque=True)
