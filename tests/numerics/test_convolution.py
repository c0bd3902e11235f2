"""Exact convolutions against numpy int64, every kernel choice, operand type and extreme."""

import jax
import numpy as np
import pytest

from jquant.numerics import convolution
from jquant.numerics.convolution import Window, accumulate_exactly, kernel_of
from jquant.numerics.limbs import Limbs

TYPES = [("int8", "int8"), ("int16", "int8"), ("int8", "int16")]


def join(a) -> np.ndarray:
    if not isinstance(a, Limbs):
        return np.asarray(a).astype(np.int64)
    low, middle, high = (np.asarray(v).astype(np.int64) for v in a)
    return (high << 32) + (middle << 16) + low


def slow(x: np.ndarray, weight: np.ndarray, window: Window, groups: int) -> np.ndarray:
    """Output position by output position, in int64."""
    x = np.pad(x.astype(np.int64), [(0, 0), *window.padding, (0, 0)])
    *kernel, per_group, out = weight.shape
    spatial = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(x.shape[1:-1], kernel, window.strides, window.dilation, strict=True)
    ]
    y = np.zeros((x.shape[0], *spatial, out), np.int64)
    for at in np.ndindex(*spatial):
        cut = tuple(
            slice(p * s, p * s + d * (k - 1) + 1, d)
            for p, s, d, k in zip(at, window.strides, window.dilation, kernel, strict=True)
        )
        patch = x[(slice(None), *cut)].reshape(x.shape[0], -1, groups, per_group)
        by_group = weight.astype(np.int64).reshape(-1, per_group, groups, out // groups)
        y[(slice(None), *at)] = np.einsum("nkgi,kigo->ngo", patch, by_group).reshape(x.shape[0], out)
    return y


def draw(seed: int, shape: tuple, dtype: str) -> np.ndarray:
    info, rng = np.iinfo(dtype), np.random.default_rng(seed)
    v = rng.integers(info.min, info.max + 1, shape)
    return np.where(rng.random(shape) < 0.2, rng.choice([info.min, info.max], shape), v).astype(dtype)


CASES = {
    # kind: (spatial, channels, kernel, out, groups, window)
    "dense": ((7, 6), 8, (3, 3), 5, 1, Window((1, 1), ((1, 1), (1, 1)), (1, 1))),
    "dense strided dilated": ((9, 8), 6, (3, 2), 4, 1, Window((2, 1), ((2, 0), (1, 2)), (2, 1))),
    "dense 1d": ((11,), 8, (3,), 4, 1, Window((2,), ((1, 0),), (1,))),
    "dense 3d": ((4, 5, 3), 6, (2, 3, 1), 3, 1, Window((1, 1, 1), ((0, 1), (1, 1), (0, 0)), (1, 1, 1))),
    "patches": ((9, 9), 3, (3, 3), 8, 1, Window((2, 2), ((1, 1), (1, 1)), (1, 1))),
    "patches 1d": ((12,), 1, (4,), 3, 1, Window((1,), ((2, 1),), (2,))),
    "patches linear": ((), 40, (), 7, 1, Window((), (), ())),
    "depthwise": ((7, 8), 6, (3, 3), 6, 6, Window((2, 1), ((1, 1), (0, 2)), (1, 2))),
    "depthwise 3d": ((4, 4, 4), 3, (2, 2, 2), 3, 3, Window((1, 1, 1), ((1, 0),) * 3, (1, 1, 1))),
    "grouped": ((6, 6), 12, (3, 3), 4, 2, Window((1, 1), ((1, 1), (1, 1)), (1, 1))),
    "grouped few channels": ((6, 6), 4, (3, 3), 6, 2, Window((1, 1), ((1, 1), (1, 1)), (1, 1))),
    "grouped multiplier": ((6, 5), 3, (3, 3), 6, 3, Window((1, 1), ((0, 0), (1, 1)), (1, 1))),
}


@pytest.mark.parametrize("types", TYPES, ids="x".join)
@pytest.mark.parametrize("case", CASES)
def test_every_kernel_equals_int64(case: str, types: tuple) -> None:
    spatial, channels, kernel, out, groups, window = CASES[case]
    weight_shape = (*kernel, channels // groups, out)
    assert case.startswith(kernel_of(weight_shape, groups))
    x, weight = draw(0, (2, *spatial, channels), types[0]), draw(1, weight_shape, types[1])
    got = jax.jit(accumulate_exactly, static_argnums=(2, 3))(x, weight, window, groups)
    assert isinstance(got, Limbs) == ("int16" in types)
    np.testing.assert_array_equal(join(got), slow(x, weight, window, groups))


@pytest.mark.parametrize("types", TYPES, ids="x".join)
@pytest.mark.parametrize("ends", ["minmin", "maxmax", "minmax", "maxmin"])
@pytest.mark.parametrize("kind", ["dense", "linear"])
def test_4608_products_of_extremes(types: tuple, ends: str, kind: str) -> None:
    a, b = (getattr(np.iinfo(t), e) for t, e in zip(types, (ends[:3], ends[3:]), strict=True))
    shape, kernel, window = (
        ((1, 3, 3, 512), (3, 3, 512, 2), Window((1, 1), ((0, 0), (0, 0)), (1, 1)))
        if kind == "dense"
        else ((1, 4608), (4608, 2), Window((), (), ()))
    )
    got = join(accumulate_exactly(np.full(shape, a, types[0]), np.full(kernel, b, types[1]), window, 1))
    assert (got == 4608 * a * b).all()


@pytest.mark.parametrize("case", CASES)
def test_float_takes_the_same_sums(case: str) -> None:
    """Small integers are exact in float32, so the float path must agree bit for bit."""
    spatial, channels, kernel, out, groups, window = CASES[case]
    rng = np.random.default_rng(2)
    x = rng.integers(-9, 10, (2, *spatial, channels)).astype(np.float32)
    weight = rng.integers(-9, 10, (*kernel, channels // groups, out)).astype(np.float32)
    got = convolution.convolve(x, weight, window, groups)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, slow(x, weight, window, groups))
