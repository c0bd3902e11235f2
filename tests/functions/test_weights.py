"""Fake-quant of any pytree: names, axes, gradients, transformations."""

import doctest
import importlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.functions.weights import quantize_params, weight_qparams
from jquant.quantizers import float16_cast, forward_mode, lsq_plus

W8 = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"))})


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


class Dense(NamedTuple):
    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Module:
    weight: Any
    layers: list


def tree():
    return {
        "stem": {"conv": Dense(normal(3, 3, 4, 8), normal(8))},
        "blocks": [
            {"kernel": normal(8, 6), "scale": normal(6)},
            {"kernel": normal(6, 6, seed=1), "step": jnp.int32(3)},
        ],
        "head": Module(normal(6, 5), [normal(2, 2), None]),
    }


def expected(weight, axis=-1, levels=127.5, low=-128, high=127):
    """In float32, as numpy does it: one scale per channel from max |w|."""
    others = tuple(i for i in range(weight.ndim) if i != axis % weight.ndim)
    scale = (np.abs(np.asarray(weight)).max(others, keepdims=True) / np.float32(levels)).astype(np.float32)
    return np.clip(np.rint(np.asarray(weight) / scale), low, high).astype(np.float32) * scale


def test_every_weight_and_nothing_else():
    params = tree()
    out = quantize_params(params, W8)
    assert jax.tree.structure(out) == jax.tree.structure(params)
    for got, leaf in zip(jax.tree.leaves(out), jax.tree.leaves(params), strict=True):
        assert got.dtype == leaf.dtype
        np.testing.assert_array_equal(got, expected(leaf) if leaf.ndim >= 2 else leaf)
    names = weight_qparams(params, W8)
    wanted = ["blocks.0.kernel", "blocks.1.kernel", "head.layers.0", "head.weight", "stem.conv.kernel"]
    assert sorted(names) == wanted
    assert names["stem.conv.kernel"].shape == (8,)


def test_rules_and_axes():
    params = tree()
    rules = jq.QConfig(
        {
            "*": jq.Policy(weight=jq.int8(axis="out")),
            "stem.*": None,
            "blocks.0.*": jq.Policy(weight=jq.int4()),
            r"re:head\.weight": jq.Policy(weight=jq.int8(scale=0.5)),
        }
    )
    out = quantize_params(params, rules, channel_axis=0)
    np.testing.assert_array_equal(out["stem"]["conv"].kernel, params["stem"]["conv"].kernel)
    np.testing.assert_array_equal(out["blocks"][1]["kernel"], expected(params["blocks"][1]["kernel"], axis=0))
    whole = params["blocks"][0]["kernel"]
    want = expected(whole.reshape(-1, 1), levels=7.5, low=-8, high=7).reshape(whole.shape)
    np.testing.assert_array_equal(out["blocks"][0]["kernel"], want)
    np.testing.assert_array_equal(out["head"].weight, np.rint(np.asarray(params["head"].weight) / 0.5) * 0.5)
    np.testing.assert_array_equal(
        quantize_params({"b": normal(7)}, jq.QConfig({"b": jq.Policy(weight=jq.int8())}), min_rank=1)["b"],
        expected(normal(7).reshape(-1, 1)).reshape(7),
    )


def test_dtypes():
    half = {"w": normal(4, 4).astype(jnp.bfloat16), "n": np.ones((2, 2), np.int32), "f": normal(3, 3)}
    rules = jq.QConfig(
        {"w": jq.Policy(weight=jq.int8()), "n": jq.Policy(weight=jq.int8()), "f": jq.Policy(weight=jq.float16())}
    )
    out = quantize_params(half, rules)
    assert out["w"].dtype == jnp.bfloat16
    assert out["n"] is half["n"]
    np.testing.assert_array_equal(out["f"], float16_cast(half["f"], 1.0, jq.float16()))


def test_inside_the_transformations_of_jax():
    params, x = {"a": normal(4, 6), "b": normal(6, 2)}, normal(5, 4)

    def loss(params, x):
        q = quantize_params(params, W8)
        return jnp.sum(jnp.sin(jnp.tanh(x @ q["a"]) @ q["b"]))

    eager = jax.value_and_grad(loss)(params, x)
    jitted = jax.jit(jax.value_and_grad(loss))(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), jitted, eager)
    # Straight through: the gradient at the quantized weights, 0 where max |w| rounds beyond the range.
    at = jax.grad(lambda q: jnp.sum(jnp.sin(jnp.tanh(x @ q["a"]) @ q["b"])))(quantize_params(params, W8))
    for name, weight in params.items():
        largest = np.abs(weight).max(0, keepdims=True)
        inside = np.asarray(weight) <= largest * (127 / 127.5)
        np.testing.assert_allclose(eager[1][name], np.where(inside, at[name], 0), rtol=1e-5, atol=1e-6)
    several = jax.tree.map(lambda v: jnp.stack([v, 2 * v, v + 1]), params)
    batched = jax.vmap(lambda p: quantize_params(p, W8))(several)
    for i in range(3):
        alone = quantize_params(jax.tree.map(lambda v, i=i: v[i], several), W8)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda v, i=i: v[i], batched), alone)
    scanned = jax.lax.scan(lambda c, p: (c, quantize_params(p, W8)), 0, several)[1]
    jax.tree.map(np.testing.assert_array_equal, scanned, batched)
    remat = jax.grad(jax.checkpoint(loss))(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), remat, eager[1])


@pytest.mark.parametrize("quantizer", [jq.lsq, jq.pact], ids=lambda q: q.name)
@pytest.mark.parametrize("axis", [None, "out"])
def test_trained_scales(quantizer, axis):
    params = {"a": normal(4, 6), "b": normal(6, 2)}
    rules = jq.QConfig({"*": jq.Policy(weight=jq.int4(axis=axis, quantizer=quantizer))})
    qparams = weight_qparams(params, rules)
    same = quantize_params(params, rules, qparams=qparams)
    jax.tree.map(np.testing.assert_array_equal, same, quantize_params(params, rules))

    def loss(qparams):
        q = quantize_params(params, rules, qparams=qparams)
        return sum(jnp.sum((q[k] - params[k]) ** 2) for k in params)

    tight = {k: 0.7 * v for k, v in qparams.items()}  # PACT learns from what is clipped
    slopes = jax.grad(loss)(tight)
    assert all(slopes[k].shape == qparams[k].shape and np.any(slopes[k] != 0) for k in qparams)
    twin = jq.QConfig({"*": jq.Policy(weight=jq.int4(axis=axis, quantizer=forward_mode(quantizer)))})
    _, slope = jax.jvp(
        lambda q: sum(jnp.sum(v**2) for v in quantize_params(params, twin, qparams=q).values()), (qparams,), (qparams,)
    )
    assert np.isfinite(slope)


def test_lsq_plus_per_channel():
    rules = jq.QConfig({"*": jq.Policy(weight=jq.int4(axis="out", quantizer=lsq_plus))})
    params = {"a": normal(4, 6)}
    qparams = weight_qparams(params, rules)
    assert qparams["a"].shape == (2, 6)
    np.testing.assert_array_equal(
        quantize_params(params, rules, qparams=qparams)["a"], expected(params["a"], levels=7.5, low=-8, high=7)
    )


def test_errors():
    params = {"dense": {"kernel": normal(2, 2)}}

    def rules(pattern):
        return jq.QConfig({pattern: jq.Policy(weight=jq.int8())})

    with pytest.raises(jq.QConfigError, match=r"'dense.kernal' matches no leaf; did you mean 'dense.kernel'"):
        quantize_params(params, rules("dense.kernal"))
    with pytest.raises(jq.QConfigError, match="a leaf of a pytree has no operator type; use its name"):
        quantize_params(params, rules("type:Linear"))
    with pytest.raises(jq.QConfigError, match=r"takes a jq\.QConfig, not dict"):
        quantize_params(params, {})
    with pytest.raises(jq.InputError, match=r"qparams lacks 'dense\.kernel'"):
        quantize_params(params, rules("*"), qparams={})
    with pytest.raises(jq.InputError, match=r"'dense\.bias'; did you mean 'dense\.kernel'|leaf of no quantized weight"):
        quantize_params(params, rules("*"), qparams={"dense.kernel": jnp.float32(1), "dense.bias": jnp.float32(1)})


def test_example():
    module = importlib.import_module("jquant.functions.weights")
    assert doctest.testmod(module).failed == 0
    assert doctest.testmod(module).attempted > 0
