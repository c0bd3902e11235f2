"""The quotient that a GPU rounds only roughly, against numpy's division."""

import jax
import numpy as np
import pytest

from jquant.numerics.platform import tracing_for
from jquant.numerics.rounding import divide, nearest_quotient, quantize, round_real, to_float16

COUNT = 2**20


def pairs(kind: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    scale = np.exp2(rng.uniform(-23, 10, COUNT)).astype(np.float32)
    match kind:
        case "real":
            return (rng.normal(size=COUNT) * np.exp2(rng.uniform(-20, 20, COUNT))).astype(np.float32), scale
        case "integers":
            return tuple(rng.integers(1, 2**24, COUNT).astype(np.float32) for _ in range(2))
    middle = rng.integers(2**23, 2**24, COUNT) + 0.5  # quotients that lie as near to a tie as they can
    return (middle * scale.astype(np.float64)).astype(np.float32), scale


@pytest.mark.parametrize("kind", ["real", "integers", "near ties"])
def test_a_quotient_two_ulp_away_becomes_the_nearest(kind: str) -> None:
    x, scale = pairs(kind)
    exact = x / scale
    ulps = np.random.default_rng(1).integers(-2, 3, COUNT).astype(np.int32)
    rough = (exact.view(np.int32) + ulps).view(np.float32)
    np.testing.assert_array_equal(jax.jit(nearest_quotient)(rough, x, scale), exact)


def test_what_is_not_finite_stays() -> None:
    x, scale = np.float32([0, 0, 1, np.inf, -np.inf, np.nan, 1e30]), np.float32([1, 0, 0, 2, 2, 1, 1e-23])
    with np.errstate(all="ignore"):
        exact = x / scale
    np.testing.assert_array_equal(jax.jit(nearest_quotient)(exact, x, scale), exact)


def test_division_for_a_gpu_keeps_infinities() -> None:
    x = np.float32([np.inf, -np.inf, 1e30, -1e30, np.nan])
    with tracing_for(["cuda"]):
        np.testing.assert_array_equal(jax.jit(lambda x: divide(x, np.float32(1e-10)))(x), np.sign(x) * np.inf)
        saturated = jax.jit(lambda x: quantize(x, np.float32(0.5), "int16"))(x[:4])
    np.testing.assert_array_equal(saturated, [32767, -32768, 32767, -32768])


def test_division_for_a_gpu_keeps_value_and_gradient() -> None:
    x, scale = (v[:1000] for v in pairs("real"))

    def total(x, scale):
        return divide(x, scale).sum()

    with tracing_for(["cuda"]):
        np.testing.assert_array_equal(jax.jit(lambda x, s: divide(x, s))(x, scale), x / scale)
        by_x, by_scale = jax.jit(jax.grad(total, (0, 1)))(x, scale)
    np.testing.assert_allclose(by_x, 1 / scale.astype(np.float64), rtol=1e-6)
    np.testing.assert_allclose(by_scale, -x.astype(np.float64) / scale.astype(np.float64) ** 2, rtol=1e-6)


def test_half_up_rounds_no_sum() -> None:
    """Where the float32 sum v + 1/2 rounds, or a half is lost: below 1/2, at odd numbers from 2^23 on."""
    edges = np.float32([0.0, 0.25, 0.5, 1.5, 2.5, 2**22 + 0.5, 2**23 - 0.5, 2**23 + 1, 2**24, 2**31, 2**126])
    near = np.concatenate([edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(np.inf))])
    v = np.concatenate([near, -near, pairs("real")[0], np.float32([np.inf, -np.inf])])
    found = jax.jit(lambda v: round_real(v, "half_up"))(v)
    np.testing.assert_array_equal(found, np.floor(v.astype(np.float64) + 0.5))


def test_float16_is_rounded_before_the_cast() -> None:
    """Every float16, its neighbours, what lies half-way to the next, and beyond the largest."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = np.sort(every[np.isfinite(every)])
    middle = (finite[1:] + finite[:-1]) / 2
    some = np.concatenate([finite, middle, np.float32([65519, 65520, 1e6, np.inf, 1e-9, 0.0])])
    near = [np.nextafter(some, np.float32(to)) for to in (-np.inf, np.inf)]
    v = np.concatenate([some, *near, -some])
    expected = np.clip(v, -65504, 65504).astype(np.float16)
    np.testing.assert_array_equal(jax.jit(to_float16)(v), expected)
    assert np.isnan(to_float16(np.float32(np.nan)))
    before = str(jax.make_jaxpr(to_float16)(v)).split("convert_element_type[new_dtype=float16")[0]
    assert "reduce_precision" in before
