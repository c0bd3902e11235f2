"""Observers on data of few values: no value is clipped away where nothing is won by it."""

import jax.numpy as jnp
import numpy as np
import pytest

from jquant.observers import kl, min_max, mix, mse, norm, percentile
from jquant.types import QuantSpec, integer_range

SEARCHING = [kl(), percentile(), mse(), norm(1.0), norm(4.0), mix()]
FEW_VALUES = {
    "constant": np.ones(1000),
    "two values": np.array([0.3, 1.0] * 300),
    "three levels": np.array([0.0, 0.5, 1.0] * 300),
    "two signs": np.array([-1.0, -0.25, 0.25, 1.0] * 300),
    "negative only": np.array([-0.5, -1.0] * 300),
    "rare": np.r_[np.zeros(99_999), 1.0],
}


def scale_of(observer, x, dtype):
    state = observer.update(observer.init(1), jnp.asarray(x[None], jnp.float32))
    return float(observer.finalize(state, QuantSpec(dtype=dtype))[0])


@pytest.mark.parametrize("observer", SEARCHING, ids=lambda o: f"{o.name}{dict(o.options).get('p', '')}")
@pytest.mark.parametrize("name", FEW_VALUES)
def test_every_one_of_few_values_is_within_one_step(observer, name):
    x = FEW_VALUES[name]
    for dtype in ("int8", "int16"):
        scale, (low, high) = scale_of(observer, x, dtype), integer_range(dtype)
        error = np.abs(np.clip(np.rint(x / scale), low, high) * scale - x).max()
        assert error <= 1 / high, f"{name}, {dtype}: an error of {error} for a range of 1"


def test_kl_of_levels_that_are_more_than_the_integers():
    """12 levels and 7 positive integers: one level alone has the divergence 0, and the other 11 were clipped to it."""
    levels = np.arange(1, 13) / 12
    x = np.repeat(levels, np.arange(12, 0, -1) ** 2)
    assert scale_of(kl(), x, "int4") * 7.5 > 0.7


def test_kl_still_clips_heavy_tails():
    x = np.random.default_rng(0).standard_cauchy(10_000)
    assert scale_of(kl(), x, "int8") < 0.2 * scale_of(min_max(), x, "int8")


def test_the_percentile_of_zeros_is_no_scale():
    """One sample of 100,000 is not 0: the 99.99th percentile is 0, to which everything would be clipped."""
    x = FEW_VALUES["rare"]
    assert np.percentile(x, 99.99, method="inverted_cdf") == 0
    assert scale_of(percentile(99.99), x, "int8") == scale_of(min_max(), x, "int8")
    assert scale_of(percentile(99.99), np.r_[x, 0.5 * np.ones(100)], "int8") < 0.6 / 127  # here it clips the outlier
