"""Quantizers against formulas written anew in numpy: float32 for values, float64 for gradients, and against torch."""

import doctest
import importlib
import math
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.quantizer_cases import ALL, bits, draw, gradients

from jquant import quantizers
from jquant.numerics.rounding import quantize
from jquant.quantizers import (
    adaround,
    adaround_parameter,
    fake_quant,
    lsq,
    lsq_plus,
    pact,
    rectified_sigmoid,
    rounding_regularizer,
)
from jquant.types import InputError, QuantSpec, integer_range

DTYPES = ["int2", "int3", "int4", "int8", "int16", "uint2", "uint3", "uint4", "uint8"]
by_name = pytest.mark.parametrize("quantizer", ALL, ids=lambda q: q.name)
by_dtype = pytest.mark.parametrize("dtype", DTYPES)


def expected(x, scale, dtype):
    """rhe(x / s) in numpy float32."""
    low, high = integer_range(dtype)
    scale = np.asarray(scale, np.float32)
    return (np.clip(np.rint(x / scale), low, high) * scale + np.float32(0)).astype(np.float32)


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


@pytest.mark.parametrize("name", sorted(m.name for m in pkgutil.iter_modules(quantizers.__path__)))
def test_examples(name):
    module = importlib.import_module(f"jquant.quantizers.{name}")
    assert doctest.testmod(module).failed == 0
    assert doctest.testmod(quantizers).failed == 0


# ---------------------------------------------------------------------------------------------------------------------
# LSQ+ and AdaRound


@by_shape
@by_dtype
def test_lsq_plus(dtype, shape):
    x, scale, upstream = gradient_case(dtype, shape)
    spec, offset = QuantSpec(dtype=dtype), (np.float32(-0.75) * scale).astype(np.float32)
    low, high = integer_range(dtype)
    v = ((x - offset) / scale).astype(np.float32)
    parameter = np.stack([scale, offset])
    want = (np.clip(np.rint(v), low, high) * scale + offset).astype(np.float32)
    np.testing.assert_array_equal(bits(lsq_plus(x, parameter, spec)), bits(want))
    inside, wide = (v > low) & (v < high), v.astype(np.float64)
    slopes = np.where(inside, np.rint(wide) - wide, np.where(wide <= low, low, high)), np.where(inside, 0.0, 1.0)
    factor = 1 / math.sqrt(x.size / scale.size * high)
    to_x, to_parameter = gradients(lsq_plus, x, parameter, spec, upstream)
    np.testing.assert_array_equal(to_x, np.where(inside, upstream, 0))
    for got, slope in zip(to_parameter, slopes, strict=True):
        bound = 1e-5 * sum_over(np.abs(upstream * slope), shape) * factor
        assert np.all(np.abs(got - sum_over(upstream.astype(np.float64) * slope, shape) * factor) <= bound)


def test_lsq_plus_without_an_offset_is_lsq():
    for axis, scale in ((None, np.float32(0.3)), ("out", np.array([0.3, 0.7], np.float32))):
        spec, x = QuantSpec(dtype="int4", axis=axis), draw("int4", (2, 50), 0.4)
        parameter = lsq_plus.init(scale, spec)
        assert parameter.shape == (2, *np.shape(scale))
        np.testing.assert_array_equal(bits(lsq_plus(x, parameter, spec)), bits(lsq(x, scale, spec)))
        ours, plain = (gradients(q, x, p, spec, 1.0) for q, p in ((lsq_plus, parameter), (lsq, scale)))
        np.testing.assert_array_equal(ours[0], plain[0])
        np.testing.assert_array_equal(ours[1][0], plain[1])
        np.testing.assert_array_equal(lsq_plus.scale(parameter, spec), scale)


@by_shape
@by_dtype
def test_adaround(dtype, shape):
    x, scale, upstream = gradient_case(dtype, shape)
    spec, (low, high) = QuantSpec(dtype=dtype), integer_range(dtype)
    v = np.random.default_rng(5).normal(scale=2, size=x.shape).astype(np.float32)
    full = np.broadcast_to(scale, x.shape)
    sigmoid = 1 / (1 + np.exp(-v.astype(np.float64)))
    h = np.clip(1.2 * sigmoid - 0.1, 0, 1)
    ratio = x / scale
    soft = np.floor(ratio) + h
    parameter = jnp.stack([full, v])
    got = adaround(x, parameter, spec)
    # h is off by some ulp of 1, and a sum of magnitude 2^bits by half of its own.
    np.testing.assert_allclose(got, np.clip(soft, low, high) * full, rtol=2e-7, atol=4e-7 * full.max())
    to_x, to_parameter = gradients(adaround, x, parameter, spec, upstream)
    np.testing.assert_array_equal(to_x, np.where((ratio >= low) & (ratio <= high), upstream, 0))
    np.testing.assert_array_equal(to_parameter[0], 0)
    moves = (h > 0) & (h < 1) & (soft > low) & (soft < high)
    want = np.where(moves, 1.2 * sigmoid * (1 - sigmoid), 0) * full * upstream
    edge = np.abs(soft - np.rint(soft)) < 1e-5  # float32 and float64 may see the kink of h or a clip differently there
    np.testing.assert_allclose(np.where(edge, 0, to_parameter[1]), np.where(edge, 0, want), rtol=5e-6, atol=1e-8)
    assert edge.mean() < 0.5


def test_adaround_starts_at_x_and_ends_on_the_grid():
    spec, x = QuantSpec(dtype="int4", axis="out"), np.random.default_rng(0).uniform(-1.0, 1.0, (3, 200))
    scale = jnp.asarray([0.2, 0.3, 0.5], jnp.float32)
    parameter = adaround_parameter(x, scale, spec)
    np.testing.assert_allclose(adaround(x, parameter, spec), x, atol=1e-6)
    h = np.asarray(rectified_sigmoid(parameter[1]))
    assert ((h >= 0) & (h < 1)).all()
    settled = parameter.at[1].set(jnp.where(parameter[1] < 0, -9.0, 9.0))  # every h at its nearer end
    ends = np.asarray(rectified_sigmoid(settled[1]))
    assert set(np.unique(ends)) <= {0.0, 1.0}
    assert rounding_regularizer(settled, 2.0) == 0 < rounding_regularizer(parameter, 2.0)
    want = np.sum(1 - np.abs(2 * h.astype(np.float64) - 1) ** 8)
    np.testing.assert_allclose(rounding_regularizer(parameter, 8.0), want, rtol=1e-5)
    got = np.asarray(adaround(x, settled, spec)) / scale[:, None]
    np.testing.assert_array_equal(got, np.floor(np.float32(x) / scale[:, None]) + ends)


def test_parameters_of_two_values_are_checked():
    spec = QuantSpec(dtype="int4")
    with pytest.raises(InputError, match=r"the scale and the offset; make it with jq\.lsq_plus\.init"):
        lsq_plus(np.zeros(3, np.float32), 0.5, spec)
    with pytest.raises(InputError, match=r"make it with jq\.quantizers\.adaround_parameter"):
        adaround(np.zeros(3, np.float32), np.zeros(3, np.float32), spec)
    with pytest.raises(InputError, match=r"a v for every element of x \[3\], not \[\]"):
        adaround(np.zeros(3, np.float32), np.zeros(2, np.float32), spec)
    with pytest.raises(InputError, match=r"use another quantizer in the qconfig, then jq\.ptq\.adaround"):
        adaround.init(jnp.float32(0.5), spec)


# ---------------------------------------------------------------------------------------------------------------------
# torch's kernels. They take the outermost half steps, qmin - 1/2 .. qmin and qmax .. qmax + 1/2, as inside, where the
# paper has them outside, and multiply by 1 / scale: inputs keep away from those and from ties, so both round alike.
# The sums of 840 float32 terms differ by their order: 1e-5 of the sum of magnitudes is more than 840 / 2 ulp of 2^-24.


def away_from_ties(dtype, shape, scale, seed=7):
    rng, (low, high) = np.random.default_rng(seed), integer_range(dtype)
    v = np.floor(rng.uniform(1.5 * low - 3, 1.5 * high + 3, shape)) + rng.uniform(-0.4, 0.4, shape)
    v = np.where(
        (v > low - 0.6) & (v < low + 0.1), low + 0.25, np.where((v > high - 0.1) & (v < high + 0.6), high - 0.25, v)
    )
    return (v * scale).astype(np.float32)


@by_shape
@by_dtype
@pytest.mark.parametrize("zero_point", [0, 3])
def test_torch_has_the_gradients_of_lsq(dtype, shape, zero_point):
    torch = pytest.importorskip("torch")
    spec, (low, high) = QuantSpec(dtype=dtype), integer_range(dtype)
    zero_point = min(zero_point, high)
    scale = np.float32(0.25) if shape == () else np.array([0.25, 0.1, 2.0], np.float32).reshape(shape)
    offset = (-zero_point * scale).astype(np.float32)
    x = away_from_ties(dtype, (3, 40, 7), scale) + offset
    upstream = np.random.default_rng(8).normal(size=x.shape).astype(np.float32)
    factor = 1 / math.sqrt(x.size / scale.size * high)
    leaves = [
        torch.tensor(v, requires_grad=True) for v in (x, scale.reshape(-1), np.full(scale.size, zero_point, "f4"))
    ]
    if shape == ():
        y = torch._fake_quantize_learnable_per_tensor_affine(*leaves, low, high, factor)
    else:
        y = torch._fake_quantize_learnable_per_channel_affine(*leaves, 0, low, high, factor)
    y.backward(torch.tensor(upstream))
    parameter = np.stack([scale, offset]) if zero_point else scale
    quantizer = lsq_plus if zero_point else lsq
    close = 2.0**-22 * (np.abs(np.asarray(quantizer(x, parameter, spec))) + np.abs(offset) + scale * max(high, -low))
    assert np.all(np.abs(np.asarray(quantizer(x, parameter, spec)) - y.detach().numpy()) <= close)
    to_x, to_parameter = gradients(quantizer, x, parameter, spec, upstream)
    np.testing.assert_array_equal(to_x, leaves[0].grad.numpy())
    to_scale, to_zero = (leaf.grad.numpy().reshape(shape) for leaf in leaves[1:])
    # torch holds the zero point where LSQ+ holds the offset = -zero_point * scale: the chain rule between the two.
    wanted = [to_scale - to_zero * zero_point / scale, -to_zero / scale] if zero_point else [to_scale]
    terms = np.abs(upstream) * max(high + zero_point, -low + zero_point)
    bound = 1e-5 * sum_over(terms, shape) * factor
    for got, want in zip(np.asarray(to_parameter).reshape(len(wanted), *shape), wanted, strict=True):
        assert np.all(np.abs(got - want) <= bound)
