"""Each rule alone: the arithmetic that people write becomes the operator that is meant, with the same floats."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 6, 8)), jnp.float32)
IMAGE = jnp.asarray(RNG.normal(size=(2, 6, 4, 8)), jnp.float32)
GAIN, SHIFT = (jnp.asarray(RNG.uniform(0.5, 1.5, 8), jnp.float32) for _ in range(2))
PARAMS = {"norm": {"scale": GAIN, "bias": SHIFT, "mean": SHIFT - 1.0, "var": GAIN}, "w": X[0]}


def operators(fn: Callable, x: jax.Array = X, params: object = PARAMS) -> list[str]:
    """The operators of a traced function, in order, after comparing its floats."""
    graph, kept = jq.trace(fn, params, x)
    expected = fn(params, x)
    (found,) = jq.graph.evaluate_float(graph, kept, x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * float(jnp.abs(expected).max()))
    return [type(node.op).__name__ for node in graph.nodes]


ACTIVATIONS = {
    "relu": (jax.nn.relu, "Relu"),
    "relu6": (jax.nn.relu6, "Relu6"),
    "relu6 the other way round": (lambda x: jnp.maximum(jnp.minimum(x, 6.0), 0.0), "Relu6"),
    "clip to relu6": (lambda x: jnp.clip(x, 0.0, 6.0), "Relu6"),
    "sigmoid": (jax.nn.sigmoid, "Sigmoid"),
    "sigmoid by hand": (lambda x: 1.0 / (1.0 + jnp.exp(-x)), "Sigmoid"),
    "silu": (jax.nn.silu, "Silu"),
    "silu by hand": (lambda x: x / (1.0 + jnp.exp(-x)), None),
    "gelu": (jax.nn.gelu, "Gelu"),
    "exact gelu": (lambda x: jax.nn.gelu(x, approximate=False), "Gelu"),
    "gelu by hand": (lambda x: x * 0.5 * (1.0 + jax.lax.erf(x / np.float32(np.sqrt(2.0)))), "Gelu"),
    "tanh gelu by hand": (
        lambda x: 0.5 * x * (1.0 + jnp.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + 0.044715 * x * x * x))),
        "Gelu",
    ),
    "hard sigmoid": (jax.nn.hard_sigmoid, "HardSigmoid"),
    "hard swish": (jax.nn.hard_swish, "HardSwish"),
    "hard swish by hand": (lambda x: x * jax.nn.relu6(x + 3.0) / 6.0, "HardSwish"),
    "leaky relu": (lambda x: jax.nn.leaky_relu(x, 0.2), "LeakyRelu"),
    "elu": (jax.nn.elu, "Elu"),
    "selu": (jax.nn.selu, "Selu"),
    "softplus": (jax.nn.softplus, "Softplus"),
    "mish": (jax.nn.mish, "Mish"),
    "log sigmoid": (jax.nn.log_sigmoid, "LogSigmoid"),
    "softmax": (jax.nn.softmax, "Softmax"),
    "softmax over another axis": (lambda x: jax.nn.softmax(x, axis=1), "Softmax"),
    "softmax by hand": (lambda x: jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True), "Softmax"),
    "log softmax": (jax.nn.log_softmax, "LogSoftmax"),
    "rsqrt": (lambda x: jax.lax.rsqrt(x * x + 0.1), None),
    "mean": (lambda x: jnp.mean(x, axis=1), "Mean"),
    "mean by hand": (lambda x: x.sum(-1, keepdims=True) / 8.0, "Mean"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_functions(name: str) -> None:
    fn, operator = ACTIVATIONS[name]
    found = operators(lambda params, x: fn(x))
    if operator is not None:
        assert found == [operator]
    assert "Opaque" not in found


def test_what_only_looks_like_gelu_is_left_alone() -> None:
    assert "Gelu" not in operators(lambda params, x: 0.5 * x * (1.0 + jax.lax.erf(x / 1.5)))
    assert "Silu" not in operators(lambda params, x: x * jax.nn.sigmoid(x + 1.0))
    assert "HardSwish" not in operators(lambda params, x: x * jax.nn.relu6(x + 3.0) / 5.0)


def test_a_value_that_others_read_is_kept() -> None:
    def fn(params, x):
        y = jax.nn.sigmoid(x)
        return x * y + y

    assert sorted(operators(fn)) == ["Add", "Sigmoid", "Silu"]


# ---------------------------------------------------------------------------------------------------------------------
# Norms


def layer_norm(x, *, fast: bool):
    mean = x.mean(-1, keepdims=True)
    variance = (
        jnp.maximum((x * x).mean(-1, keepdims=True) - mean * mean, 0.0) if fast else jnp.var(x, -1, keepdims=True)
    )
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5)


@pytest.mark.parametrize("fast", [True, False])
def test_layer_norm(fast: bool) -> None:
    def fn(params, x):
        return layer_norm(x, fast=fast) * params["norm"]["scale"] + params["norm"]["bias"]

    assert operators(fn) == ["LayerNorm"]
    assert operators(lambda params, x: layer_norm(x, fast=fast)) == ["LayerNorm"]
    graph, params = jq.trace(fn, PARAMS, X)
    assert graph.nodes[0].name == "norm"
    assert set(params) == {"norm.scale", "norm.bias"}


def test_layer_norm_by_division() -> None:
    def fn(params, x):
        centred = x - x.mean(-1, keepdims=True)
        return params["norm"]["scale"] * (centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6))

    assert operators(fn) == ["LayerNorm"]


def test_rms_norm() -> None:
    def fn(params, x):
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * params["norm"]["scale"]

    assert operators(fn) == ["RmsNorm"]


def test_norm_over_the_spatial_axes_is_a_group_norm() -> None:
    def fn(params, x):
        mean, variance = x.mean((1, 2), keepdims=True), jnp.var(x, (1, 2), keepdims=True)
        return (x - mean) * jax.lax.rsqrt(variance + 1e-5)

    assert operators(fn, IMAGE) == ["GroupNorm"]


def test_batch_norm_keeps_its_statistics_and_folds() -> None:
    def fn(params, x):
        y = x @ params["w"].T
        n = {k: v[:6] for k, v in params["norm"].items()}
        return (y - n["mean"]) * (jax.lax.rsqrt(n["var"] + 1e-5) * n["scale"]) + n["bias"]

    assert operators(fn) == ["Linear", "BatchNorm"]
    graph, params = jq.trace(fn, PARAMS, X)
    assert graph.nodes[1].op.epsilon == pytest.approx(1e-5)
    np.testing.assert_array_equal(params["norm.var"], GAIN[:6])
    model = jq.prepare(graph, params, jq.QConfig({"*": None}), target=jq.targets.NASH_E)
    assert [type(node.op).__name__ for node in model.plan.graph.nodes] == ["Linear"]


def test_a_batch_norm_whose_multiplier_is_computed_otherwise() -> None:
    def fn(params, x):
        n = params["norm"]
        return (x - n["mean"]) / jnp.sqrt(n["var"] + 1e-3) * n["scale"] + n["bias"]

    found = operators(fn)
    assert found[0] == "BatchNorm"
    assert "Opaque" not in found


# ---------------------------------------------------------------------------------------------------------------------
# Attention, pools, resizing


def attention(q, k, v, mask=None, bias=None):
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.float32(2.0)
    scores = scores if bias is None else scores + bias
    scores = scores if mask is None else jnp.where(mask, scores, -1e9)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)


CAUSAL = np.tril(np.ones((6, 6), bool))


@pytest.mark.parametrize(
    "options",
    [{}, {"mask": CAUSAL}, {"bias": np.where(CAUSAL, 0, -1e9).astype(np.float32)}],
    ids=["plain", "masked", "added"],
)
def test_attention(options: dict) -> None:
    def fn(params, x):
        q, k, v = (x.reshape(x.shape[0], 6, 2, 4) * s for s in (1.0, 0.7, 0.5))
        return attention(q, k, v, **options)

    found = operators(fn)
    assert found.count("Attention") == 1
    assert not {"Softmax", "MatMul", "Opaque"} & set(found)


@pytest.mark.parametrize("causal", [True, False])
def test_the_attention_of_jax(causal: bool) -> None:
    def fn(params, x):
        heads = x.reshape(x.shape[0], 6, 2, 4)
        return jax.nn.dot_product_attention(heads, heads * 0.7, heads * 0.5, is_causal=causal)

    found = operators(fn)
    assert found.count("Attention") == 1
    assert "Opaque" not in found


def window_mean(x, padding, *, count: bool):
    window = (1, 2, 2, 1)
    total = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, window, padding)
    if count:
        return total / jax.lax.reduce_window(jnp.ones_like(x), 0.0, jax.lax.add, window, window, padding)
    return total / 4.0


def test_average_pools() -> None:
    assert operators(lambda params, x: window_mean(x, "VALID", count=False), IMAGE) == ["AvgPool"]
    padding = ((0, 0), (1, 1), (0, 0), (0, 0))
    graph, _ = jq.trace(lambda params, x: window_mean(x, padding, count=True), PARAMS, IMAGE)
    assert [node.op.count_include_pad for node in graph.nodes] == [False]
    assert operators(lambda params, x: window_mean(x, padding, count=True), IMAGE) == ["AvgPool"]


def test_max_and_min_pools() -> None:
    def pool(x, initial, combine):
        return jax.lax.reduce_window(x, initial, combine, (1, 3, 2, 1), (1, 2, 2, 1), "SAME")

    assert operators(lambda params, x: pool(x, -jnp.inf, jax.lax.max), IMAGE) == ["MaxPool"]
    assert operators(lambda params, x: pool(x, jnp.inf, jax.lax.min), IMAGE) == ["Neg", "MaxPool", "Neg"]


@pytest.mark.parametrize("method", ["bilinear", "nearest"])
def test_resize(method: str) -> None:
    def fn(params, x):
        return jax.image.resize(x, (x.shape[0], 12, 8, 8), method)

    assert operators(fn, IMAGE) == ["Interpolate"]


def test_repeat_is_a_resize() -> None:
    assert operators(lambda params, x: jnp.repeat(jnp.repeat(x, 2, 1), 2, 2), IMAGE) == ["Interpolate"]


def test_a_resize_that_smooths_is_a_linear_layer() -> None:
    found = operators(lambda params, x: jax.image.resize(x, (x.shape[0], 3, 2, 8), "bilinear"), IMAGE)
    assert "Interpolate" not in found
    assert found.count("Linear") == 2
