"""A linear net whose errors numpy computes exactly: all are multiples of powers of two, so that no sum rounds."""

import jax.numpy as jnp
import numpy as np

import jquant as jq
from jquant.analysis import BadCases

RNG = np.random.default_rng(0)
WEIGHTS = (RNG.integers(-127, 128, size=(6, 4)) / 64).astype(np.float32)
DATA = (RNG.integers(-2048, 2048, size=(61, 6)) / 128).astype(np.float32)
DATA[[9, 33, 50]] = DATA[21]  # equal errors


def exact_net() -> jq.Model:
    graph, params = jq.trace(lambda p, x: x @ p["w"], {"w": WEIGHTS}, jnp.zeros((8, 6)))
    rule = jq.Policy(weight=jq.int8(scale=1 / 64), output=jq.int8(scale=1 / 16))
    return jq.calibrate(jq.prepare(graph, params, jq.QConfig({"*": rule}), target="nash-e"), [DATA])


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
