"""A linear net whose errors numpy computes exactly: all are multiples of powers of two, so that no sum rounds."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jquant as jq
from jquant.analysis import BadCases, Comparison

RNG = np.random.default_rng(0)
WEIGHTS = (RNG.integers(-127, 128, size=(6, 4)) / 64).astype(np.float32)
DATA = (RNG.integers(-2048, 2048, size=(61, 6)) / 128).astype(np.float32)
DATA[[9, 33, 50]] = DATA[21]  # equal errors


def exact_net(outputs: int = 4) -> jq.Model:
    return _calibrated(lambda p, x: x @ p["w"], WEIGHTS[:, :outputs], DATA)


def _calibrated(function: Callable[..., Any], weights: np.ndarray, x: np.ndarray) -> jq.Model:
    graph, params = jq.trace(function, {"w": weights}, jnp.asarray(x[:8]))
    rule = jq.Policy(weight=jq.int8(scale=1 / 64), output=jq.int8(scale=1 / 16))
    return jq.calibrate(jq.prepare(graph, params, jq.QConfig({"*": rule}), target="nash-e"), [x])


def joined_net() -> tuple[jq.Model, np.ndarray]:
    """The net on [N, 2, 6], whose batch lies in one axis with the next, and data of 30 samples."""

    def joined(p: dict, x: jax.Array) -> jax.Array:
        return (x.reshape(-1, 6) @ p["w"]).reshape(-1, 2, 4)

    x = DATA[:60].reshape(30, 2, 6)
    return _calibrated(joined, WEIGHTS, x), x


def rounded(x: np.ndarray) -> np.ndarray:
    """What the input is in fake-quant and in integers, real."""
    return (np.clip(np.rint(x * 16), -128, 127) / 16).astype(np.float32)


def errors_of(x: np.ndarray) -> np.ndarray:
    """Mean absolute error of each sample [N], float32."""
    return np.abs((rounded(x) - x) @ WEIGHTS).mean(axis=1)


def cut(first: int, last: int, size: int) -> list[np.ndarray]:
    """Samples `first` to `last` of the data in batches."""
    return [DATA[i : min(i + size, last)] for i in range(first, last, size)]


def check(cases: BadCases, count: int) -> None:
    """The cases are those of a sort of all errors; equal ones stay in order."""
    order = np.argsort(-errors_of(DATA), kind="stable")[:count]
    assert cases.index.tolist() == order.tolist()
    np.testing.assert_array_equal(cases.error, errors_of(DATA)[order])
    np.testing.assert_array_equal(cases.inputs["x"], DATA[order])


def check_rows(found: Comparison, bound: float = 1e-12) -> None:
    """Input and output of float against what is rounded, on all of the data, sums within a share of them.

    Sums of numpy are float64, as those of `compare`: equal but for their order, far below 1e-12 of them. Those of many
    batches have terms of float32, which are 2^-24 off: 2^-22 covers two sums and their quotient.
    """
    step = 1 / 16
    pairs = {"x": (DATA, rounded(DATA)), "linear": (DATA @ WEIGHTS, rounded(DATA) @ WEIGHTS)}
    assert [row.name for row in found.rows] == list(pairs)
    for row, (a, b) in zip(found.rows, pairs.values(), strict=True):
        error = np.abs(b - a)
        assert (row.size, row.minimum, row.maximum) == (a.size, a.min(), a.max())
        assert (row.b_minimum, row.b_maximum, row.max_error) == (b.min(), b.max(), error.max())
        a, b, error = (v.astype(np.float64) for v in (a, b, error))
        np.testing.assert_allclose((row.l1, row.mse), (error.mean(), (error**2).mean()), rtol=bound)
        np.testing.assert_allclose(row.sqnr, 10 * np.log10((a**2).sum() / (error**2).sum()), rtol=0, atol=5 * bound)
        np.testing.assert_allclose(row.cosine, (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()), rtol=bound)
        low, high = min(a.min(), b.min()), max(a.max(), b.max())
        places = [np.minimum(np.floor((v - low) / ((high - low) / 64)), 63).astype(int).ravel() for v in (a, b)]
        counts = [np.bincount(place, minlength=64) for place in places]
        moved = [
            np.abs(np.array(of) - n).sum() for of, n in zip((row.histogram.a, row.histogram.b), counts, strict=True)
        ]
        assert sum(row.histogram.a) == sum(row.histogram.b) == a.size
        assert max(moved) <= 4  # float32 may put a number at the edge of a bin to the other side
    x, linear = found.rows
    assert (x.max_lsb, x.own_max_error) == (np.abs(rounded(DATA) - DATA).max() / step, None)
    assert x.saturated == np.mean((-128.5 * step > DATA) | (127.5 * step < DATA)) > 0.1
    assert x.differing == np.mean(np.abs(rounded(DATA) - DATA) > step / 2)
    assert (linear.max_lsb, linear.own_max_error) == (None, 0.0)
    assert linear.differing == np.mean(rounded(DATA) @ WEIGHTS != DATA @ WEIGHTS)
