"""Quantizers against formulas written anew in numpy: float32 for values, float64 for gradients."""

import doctest
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant import quantizers
from jquant.numerics.rounding import quantize
from jquant.quantizers import fake_quant, lsq, pact
from jquant.types import InputError, QuantSpec, integer_range

ALL = [fake_quant, lsq, pact]
DTYPES = ["int2", "int3", "int4", "int8", "int16", "uint2", "uint3", "uint4", "uint8"]
by_name = pytest.mark.parametrize("quantizer", ALL, ids=lambda q: q.name)
by_dtype = pytest.mark.parametrize("dtype", DTYPES)


def draw(dtype, shape, scale, seed=0):
    """Values inside, outside and exactly on ties, edges and grid points of the grid of `scale`."""
    rng = np.random.default_rng(seed)
    low, high = integer_range(dtype)
    spread = rng.uniform(1.5 * low - 3, 1.5 * high + 3, shape)
    half_steps = np.round(2 * spread) / 2
    values = np.where(rng.random(shape) < 0.5, spread, half_steps)
    return (values * np.asarray(scale, np.float64)).astype(np.float32)


def expected(x, scale, dtype):
    """rhe(x / s) in numpy float32."""
    low, high = integer_range(dtype)
    scale = np.asarray(scale, np.float32)
    return (np.clip(np.rint(x / scale), low, high) * scale + np.float32(0)).astype(np.float32)


def bits(x):
    return np.asarray(x, np.float32).view(np.int32)


def sum_over(values, shape):
    """The sum over the axes that `shape` broadcasts (full rank, or scalar)."""
    if shape == ():
        return values.sum()
    return values.sum(axis=tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True)


# ---------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("scale", [0.1, 0.5, 0.0078431377, 3.7, 2.0**-23])
@by_dtype
@by_name
def test_forward_is_the_integer_times_the_scale(quantizer, dtype, scale):
    spec = QuantSpec(dtype=dtype)
    x = draw(dtype, 100_000, scale)
    parameter = quantizer.init(jnp.float32(scale), spec)
    effective = quantizer.scale(parameter, spec)
    eager = quantizer(x, parameter, spec)
    jitted = jax.jit(quantizer, static_argnums=2)(x, parameter, spec)
    np.testing.assert_array_equal(bits(eager), bits(expected(x, effective, dtype)))
    np.testing.assert_array_equal(bits(eager), bits(jitted))
    integers = quantize(jnp.asarray(x), effective, dtype)
    np.testing.assert_array_equal(bits(eager), bits(integers.astype(jnp.float32) * effective))


@by_dtype
@by_name
def test_per_channel_forward(quantizer, dtype):
    spec = QuantSpec(dtype=dtype, axis="out")
    scales = np.array([0.1, 0.37, 1e-3, 5.0], np.float32)
    x = draw(dtype, (4, 3, 5, 2), scales[:, None, None, None])
    parameter = quantizer.init(scales, spec)
    want = expected(x, np.asarray(quantizer.scale(parameter, spec))[:, None, None, None], dtype)
    np.testing.assert_array_equal(bits(quantizer(x, parameter, spec)), bits(want))
    np.testing.assert_array_equal(bits(quantizer(x, parameter.reshape(4, 1, 1, 1), spec)), bits(want))
    moved = np.moveaxis(x, 0, -1)  # a channel axis elsewhere: the caller shapes the parameter
    got = quantizer(moved, parameter.reshape(1, 1, 1, 4), spec)
    np.testing.assert_array_equal(bits(got), bits(np.moveaxis(want, 0, -1)))


@by_dtype
@by_name
def test_scale_inverts_init(quantizer, dtype):
    spec = QuantSpec(dtype=dtype)
    scales = np.exp(np.random.default_rng(1).uniform(-12, 12, 10_000)).astype(np.float32)
    back = np.asarray(quantizer.scale(quantizer.init(scales, spec), spec))
    if quantizer is pact and dtype.startswith("u"):
        assert np.all(np.abs(bits(back) - bits(scales)) <= 1)  # one rounding: one ulp
    else:
        np.testing.assert_array_equal(back, scales)


@by_name
def test_scale_is_legal(quantizer):
    raw = jnp.array([0.0, 1e-30, -1e-30, -0.5, 0.5])
    for dtype in DTYPES:
        assert np.all(np.asarray(quantizer.scale(raw, QuantSpec(dtype=dtype))) >= 2.0**-23)
        snapped = np.asarray(quantizer.scale(raw, QuantSpec(dtype=dtype, scale_form="pow2")))
        assert np.all(np.frexp(snapped)[0] == 0.5)
    assert np.isnan(quantizer.scale(jnp.float32(np.nan), QuantSpec(dtype="int8", scale_form="pow2")))


@by_name
def test_nan_is_not_hidden(quantizer):
    got = np.asarray(quantizer(jnp.array([np.nan, np.inf, -np.inf, 0.0]), 1.0, QuantSpec(dtype="int8")))
    assert np.isnan(got[0])
    assert np.isfinite(got[1:]).all()


# ---------------------------------------------------------------------------------------------------------------------
# Gradients, against float64. Sums of at most 1e4 float32 terms: relative to the sum of magnitudes, 1e-5 is generous.


def gradients(quantizer, x, parameter, spec, upstream):
    def loss(x, parameter):
        return jnp.sum(quantizer(x, parameter, spec) * upstream)

    return jax.grad(loss, argnums=(0, 1))(jnp.asarray(x), jnp.asarray(parameter, jnp.float32))


def gradient_case(dtype, shape):
    scale = np.float32(0.25) if shape == () else np.array([0.25, 0.1, 2.0], np.float32).reshape(shape)
    x = draw(dtype, (3, 40, 7), scale, seed=3)
    upstream = np.random.default_rng(4).normal(size=x.shape).astype(np.float32)
    return x, scale, upstream


by_shape = pytest.mark.parametrize("shape", [(), (3, 1, 1)], ids=["per tensor", "per channel"])


@by_shape
@by_dtype
def test_fake_quant_gradient(dtype, shape):
    x, scale, upstream = gradient_case(dtype, shape)
    low, high = integer_range(dtype)
    v = x / scale
    to_x, to_scale = gradients(fake_quant, x, scale, QuantSpec(dtype=dtype), upstream)
    np.testing.assert_array_equal(to_x, np.where((v >= low) & (v <= high), upstream, 0))
    np.testing.assert_array_equal(to_scale, np.zeros(shape))


@by_shape
@by_dtype
def test_lsq_gradient(dtype, shape):
    x, scale, upstream = gradient_case(dtype, shape)
    low, high = integer_range(dtype)
    v = (x / scale).astype(np.float32)
    inside = (v > low) & (v < high)
    wide = v.astype(np.float64)
    slope = np.where(inside, np.rint(wide) - wide, np.where(wide <= low, low, high))
    factor = 1 / math.sqrt(x.size / scale.size * high)
    to_x, to_scale = gradients(lsq, x, scale, QuantSpec(dtype=dtype), upstream)
    np.testing.assert_array_equal(to_x, np.where(inside, upstream, 0))
    assert to_scale.shape == shape
    bound = 1e-5 * sum_over(np.abs(upstream * slope), shape) * factor
    assert np.all(np.abs(to_scale - sum_over(upstream.astype(np.float64) * slope, shape) * factor) <= bound)


@by_shape
@by_dtype
def test_pact_gradient(dtype, shape):
    x, scale, upstream = gradient_case(dtype, shape)
    spec = QuantSpec(dtype=dtype)
    alpha = np.asarray(pact.init(scale, spec))
    signed = dtype.startswith("int")
    above = x >= alpha
    below = x <= -alpha if signed else x < 0
    to_x, to_alpha = gradients(pact, x, alpha, spec, upstream)
    np.testing.assert_array_equal(to_x, np.where(above | below, 0, upstream))
    slope = above.astype(np.float64) - (below if signed else 0)
    assert to_alpha.shape == shape
    bound = 1e-5 * sum_over(np.abs(upstream * slope), shape)
    assert np.all(np.abs(to_alpha - sum_over(upstream * slope, shape)) <= bound)


@by_name
def test_one_axis_parameter_gets_a_gradient_of_its_shape(quantizer):
    spec = QuantSpec(dtype="int4", axis="out")
    x = draw("int4", (3, 5, 7), 0.25)
    flat = gradients(quantizer, x, [0.25, 0.5, 1.0], spec, 1.0)[1]
    shaped = gradients(quantizer, x, np.reshape([0.25, 0.5, 1.0], (3, 1, 1)), spec, 1.0)[1]
    assert flat.shape == (3,)
    np.testing.assert_array_equal(flat, shaped.reshape(3))


def test_dead_gradients():
    spec = QuantSpec(dtype="int8")
    saturated = np.full(16, 1e3, np.float32)
    for quantizer in ALL:
        to_x, to_parameter = gradients(quantizer, saturated, 1.0, spec, 1.0)
        np.testing.assert_array_equal(to_x, 0)
        assert (to_parameter > 0) == (quantizer is not fake_quant)  # the trained range can grow
    for tiny in (0.0, 1e-30, -1e-30):  # a parameter below the smallest scale can come back
        for quantizer in (lsq, pact):
            assert gradients(quantizer, saturated, tiny, spec, 1.0)[1] != 0


def test_sign_of_a_negative_parameter():
    x = draw("int4", 1000, 0.3)
    for quantizer in (lsq, pact):
        plus, minus = (gradients(quantizer, x, p, QuantSpec(dtype="int4"), 1.0)[1] for p in (0.3, -0.3))
        assert plus == -minus


# ---------------------------------------------------------------------------------------------------------------------
# Power-of-two scales


@by_dtype
@by_name
def test_pow2_forward_and_straight_through(quantizer, dtype):
    real, snapped = QuantSpec(dtype=dtype), QuantSpec(dtype=dtype, scale_form="pow2")
    x = draw(dtype, (50, 20), 0.5)
    for raw, power in ((0.3, 0.5), (0.5, 0.5), (0.50001, 1.0)):
        parameter = quantizer.init(jnp.float32(raw), snapped)
        if raw == 0.5 and quantizer is pact and dtype.startswith("u"):
            power = float(2.0 ** np.ceil(np.log2(np.float32(parameter) / np.float32(integer_range(dtype)[1]))))
        assert quantizer.scale(parameter, snapped) == power
        np.testing.assert_array_equal(bits(quantizer(x, parameter, snapped)), bits(expected(x, power, dtype)))
        got = gradients(quantizer, x, parameter, snapped, 1.0)
        want = gradients(quantizer, x, quantizer.init(jnp.float32(power), real), real, 1.0)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])
    slope = jax.grad(lambda p: quantizer.scale(p, snapped))(jnp.float32(0.3))
    assert slope == jax.grad(lambda p: quantizer.scale(p, real))(jnp.float32(0.3))
    assert slope > 0


# ---------------------------------------------------------------------------------------------------------------------
# Transformations and errors


@by_name
def test_vmap_scan_and_remat(quantizer):
    spec = QuantSpec(dtype="int4")
    x = draw("int4", (6, 50), 0.3)
    parameters = jnp.asarray(np.linspace(0.5, 3.0, 6), jnp.float32)
    rows = np.stack([quantizer(row, p, spec) for row, p in zip(x, parameters, strict=True)])
    np.testing.assert_array_equal(jax.vmap(lambda r, p: quantizer(r, p, spec))(x, parameters), rows)
    scanned = jax.lax.scan(lambda carry, row: (carry, quantizer(row[0], row[1], spec)), 0, (x, parameters))[1]
    np.testing.assert_array_equal(scanned, rows)

    def loss(p):
        return quantizer(jnp.asarray(x), p, spec).sum()

    np.testing.assert_array_equal(jax.grad(loss)(parameters), jax.grad(jax.checkpoint(loss))(parameters))
    batched = jax.vmap(jax.grad(lambda p, r: quantizer(r, p, spec).sum()))(parameters, x)
    np.testing.assert_allclose(batched, jax.grad(loss)(parameters), rtol=1e-5)


@by_name
def test_hashable_and_named(quantizer):
    assert hash(QuantSpec(dtype="int8", quantizer=quantizer)) == hash(QuantSpec(dtype="int8", quantizer=quantizer))
    assert getattr(quantizers, quantizer.name) is quantizer


@pytest.mark.parametrize("shape", [(3,), (5, 1), (2, 1, 1), (1, 1, 1)])
def test_parameter_that_does_not_fit(shape):
    with pytest.raises(InputError, match="does not fit"):
        fake_quant(np.zeros((2, 3), np.float32), np.ones(shape, np.float32), QuantSpec(dtype="int8"))


def test_examples():
    assert doctest.testmod(quantizers).failed == 0
    assert doctest.testmod(quantizers).attempted > 0
