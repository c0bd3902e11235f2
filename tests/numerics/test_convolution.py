"""Exact convolutions and matrix products against int64 and torch, every kernel choice, operand type and extreme."""

from functools import partial

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import jquant as jq
from jquant.numerics import convolution
from jquant.numerics.convolution import (
    NO_WINDOW,
    Window,
    accumulate_exactly,
    batch_matmul,
    kernel_of,
    multiply_exactly,
    runnable,
)
from jquant.numerics.limbs import Limbs
from jquant.numerics.platform import platform, tracing_for
from jquant.numerics.transposed import transpose_convolve

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
    # kernel: (spatial, channels, kernel, out, groups, window)
    "dense": ((7, 6), 8, (3, 3), 5, 1, Window((1, 1), ((1, 1), (1, 1)), (1, 1))),
    "dense strided dilated": ((9, 8), 6, (3, 2), 4, 1, Window((2, 1), ((2, 0), (1, 2)), (2, 1))),
    "dense wide padding": ((5, 4), 8, (2, 3), 4, 1, Window((1, 2), ((2, 1), (3, 0)), (1, 1))),
    "dense stem": ((9, 9), 3, (3, 3), 8, 1, Window((2, 2), ((1, 1), (1, 1)), (1, 1))),
    "dense one channel": ((6, 5), 1, (3, 3), 4, 1, Window((1, 1), ((1, 1), (0, 1)), (1, 1))),
    "dense pointwise": ((5, 4), 6, (1, 1), 7, 1, Window((1, 1), ((0, 0), (0, 0)), (1, 1))),
    "dense pointwise strided": ((7, 6), 5, (1, 1), 4, 1, Window((3, 2), ((1, 0), (0, 0)), (2, 1))),
    "dense disjoint": ((9, 8), 3, (4, 2), 6, 1, Window((4, 2), ((0, 0), (1, 0)), (1, 1))),
    "dense disjoint but dilated": ((9, 8), 3, (2, 2), 6, 1, Window((2, 2), ((0, 0), (0, 0)), (2, 1))),
    "dense disjoint 1d": ((11,), 4, (3,), 5, 1, Window((3,), ((0, 0),), (1,))),
    "dense disjoint 3d": ((5, 4, 6), 2, (2, 1, 3), 4, 1, Window((2, 1, 3), ((0, 0),) * 3, (1, 1, 1))),
    "dense 1d": ((11,), 8, (3,), 4, 1, Window((2,), ((1, 0),), (1,))),
    "dense 1d one channel": ((12,), 1, (4,), 3, 1, Window((1,), ((2, 1),), (2,))),
    "dense 3d": ((4, 5, 3), 6, (2, 3, 1), 3, 1, Window((1, 1, 1), ((0, 1), (1, 1), (0, 0)), (1, 1, 1))),
    "dense 3d strided dilated": ((7, 5, 6), 3, (3, 2, 2), 5, 1, Window((2, 1, 2), ((2, 1), (1, 0), (0, 1)), (2, 2, 1))),
    "matmul": ((), 40, (), 7, 1, NO_WINDOW),
    "depthwise": ((7, 8), 6, (3, 3), 6, 6, Window((2, 1), ((1, 1), (0, 2)), (1, 2))),
    "depthwise 3d": ((4, 4, 4), 3, (2, 2, 2), 3, 3, Window((1, 1, 1), ((1, 0),) * 3, (1, 1, 1))),
    "depthwise without a window": ((), 6, (), 6, 6, NO_WINDOW),
    "depthwise multiplier": ((6, 5), 3, (3, 3), 6, 3, Window((1, 1), ((0, 0), (1, 1)), (1, 1))),
    "grouped": ((6, 6), 36, (3, 3), 4, 2, Window((1, 1), ((1, 1), (1, 1)), (1, 1))),
    "grouped merged": ((5, 6), 48, (3, 3), 24, 12, Window((1, 1), ((1, 1), (1, 1)), (1, 1))),
    "grouped prime": ((4, 4), 58, (2, 2), 29, 29, Window((1, 1), ((1, 1), (1, 1)), (1, 1))),
    "grouped few channels": ((6, 6), 4, (3, 3), 6, 2, Window((1, 1), ((1, 1), (1, 1)), (1, 1))),
    "grouped 1d": ((9,), 20, (3,), 10, 5, Window((2,), ((1, 1),), (1,))),
    "grouped 3d": ((4, 3, 5), 12, (3, 2, 2), 8, 4, Window((1, 1, 2), ((1, 1), (0, 0), (1, 0)), (1, 1, 1))),
}


@pytest.mark.parametrize("types", TYPES, ids="x".join)
@pytest.mark.parametrize("case", CASES)
def test_every_kernel_equals_int64(case: str, types: tuple) -> None:
    spatial, channels, kernel, out, groups, window = CASES[case]
    weight_shape = (*kernel, channels // groups, out)
    chosen = kernel_of(weight_shape, groups)
    assert case.startswith(chosen)
    x, weight = draw(0, (2, *spatial, channels), types[0]), draw(1, weight_shape, types[1])
    expected = slow(x, weight, window, groups)
    others = {"patches", "dense" if groups == 1 else "grouped"} if kernel and types == TYPES[0] else ()
    for name in {chosen, *others}:
        got = jax.jit(partial(accumulate_exactly, window=window, groups=groups, kernel=name))(x, weight)
        assert isinstance(got, Limbs) == ("int16" in types)
        np.testing.assert_array_equal(join(got), expected, err_msg=name)


@pytest.mark.parametrize("channels", [(3, 17), (20, 1), (1, 1), (24, 32)])
@pytest.mark.parametrize("types", TYPES, ids="x".join)
def test_padding_that_somebody_else_did_stays_out_of_the_convolution(channels: tuple, types: tuple) -> None:
    """XLA moves it in, and its integer convolution with more padding than "same" is wrong from 17 channels on."""
    padding = ((2, 1), (3, 0))
    window = Window((1, 2), ((0, 0), (0, 0)), (1, 1))
    x, weight = draw(0, (2, 5, 4, channels[0]), types[0]), draw(1, (2, 3, *channels), types[1])
    expected = slow(x, weight, window._replace(padding=padding), 1)
    got = jax.jit(lambda x, w: accumulate_exactly(convolution.pad_spatial(x, padding), w, window, 1))(x, weight)
    np.testing.assert_array_equal(join(got), expected)


@pytest.mark.parametrize("types", TYPES[1:], ids="x".join)
def test_a_sum_that_is_known_to_fit_is_int32(types: tuple) -> None:
    spatial, channels, kernel, out, groups, window = CASES["dense"]
    x, weight = draw(0, (2, *spatial, channels), types[0]), draw(1, (*kernel, channels, out), types[1])
    got = accumulate_exactly(x, weight, window, groups, accumulator="int32")
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, slow(x, weight, window, groups))


@pytest.mark.parametrize("types", TYPES, ids="x".join)
@pytest.mark.parametrize("ends", ["minmin", "maxmax", "minmax", "maxmin"])
@pytest.mark.parametrize("kernel", ["dense", "grouped", "patches", "matmul", "transposed"])
def test_4608_products_of_extremes(types: tuple, ends: str, kernel: str) -> None:
    a, b = (getattr(np.iinfo(t), e) for t, e in zip(types, (ends[:3], ends[3:]), strict=True))
    groups = 2 if kernel == "grouped" else 1
    x, weight = np.full((1, 3, 3, 512 * groups), a, types[0]), np.full((3, 3, 512, 2), b, types[1])
    window = Window((1, 1), ((0, 0), (0, 0)), (1, 1))
    if kernel == "matmul":
        got = accumulate_exactly(x.reshape(1, -1), weight.reshape(-1, 2), NO_WINDOW, 1)
        also = multiply_exactly(jnp.asarray(x.reshape(1, -1)), jnp.asarray(weight.reshape(-1, 2)))
        np.testing.assert_array_equal(join(got), join(also))
    elif kernel == "transposed":
        window = window._replace(padding=((2, 2), (2, 2)))  # one output, which all of the kernel reaches
        got = transpose_convolve(x, weight, window, (0, 0), 1, accumulate_exactly)
    else:
        got = accumulate_exactly(x, weight, window, groups, kernel=kernel)
    assert (join(got) == 4608 * a * b).all()


@pytest.mark.parametrize("wide", [-32768, -1, 255, 32767])
@pytest.mark.parametrize("narrow", [-128, 127])
def test_65535_products_whose_low_bytes_are_largest(wide: int, narrow: int) -> None:
    """The documented limit: 65535 * 255 * 128 is the largest partial sum, 0.4 % below 2^31."""
    x, weight = np.full((1, 65535), wide, np.int16), np.full((65535, 1), narrow, np.int8)
    for a, b in ((x, weight), (weight.T, x.T)):
        assert join(accumulate_exactly(a, b, NO_WINDOW, 1)) == 65535 * wide * narrow
        assert join(multiply_exactly(jnp.asarray(a), jnp.asarray(b))) == 65535 * wide * narrow
    ones = Window((1,), ((0, 0),), (1,))
    for kernel in ("dense", "patches"):
        got = accumulate_exactly(x[:, None], weight[None], ones, 1, kernel=kernel)
        assert join(got) == 65535 * wide * narrow


@pytest.mark.parametrize("types", TYPES, ids="x".join)
@pytest.mark.parametrize(
    "shapes", [((5, 7), (7, 3)), ((2, 3, 5, 7), (2, 3, 7, 4)), ((2, 1, 5, 7), (3, 7, 4)), ((4, 7), (2, 7, 1))]
)
def test_a_matrix_product_equals_int64(types: tuple, shapes: tuple) -> None:
    a, b = (draw(i, shape, dtype) for i, (shape, dtype) in enumerate(zip(shapes, types, strict=True)))
    got = join(jax.jit(multiply_exactly)(a, b))
    np.testing.assert_array_equal(got, np.matmul(a.astype(np.int64), b.astype(np.int64)))


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


@pytest.mark.parametrize("case", ["dense pointwise", "dense pointwise strided", "dense disjoint", "dense disjoint 3d"])
def test_windows_that_do_not_overlap_are_products_in_the_gradient_too(case: str) -> None:
    """Small integers again, so that the gradients of XLA's own convolution are equal."""
    spatial, channels, kernel, out, _, window = CASES[case]
    rng = np.random.default_rng(3)
    x = rng.integers(-9, 10, (2, *spatial, channels)).astype(np.float32)
    weight = rng.integers(-9, 10, (*kernel, channels, out)).astype(np.float32)
    upstream = rng.integers(-9, 10, convolution.convolve(x, weight, window).shape).astype(np.float32)

    def gradient(run):
        return jax.jit(jax.grad(lambda x, w: jnp.sum(run(x, w, window, 1) * upstream), argnums=(0, 1)))

    found, expected = gradient(convolution.convolve), gradient(convolution._native)
    for a, b in zip(found(x, weight), expected(x, weight), strict=True):
        np.testing.assert_array_equal(a, b)
    if jax.default_backend() == "cpu":
        assert " convolution(" not in found.lower(x, weight).compile().as_text()


# ---------------------------------------------------------------------------------------------------------------------
# The choice by platform


@pytest.mark.parametrize("device", ["tpu", "cuda"])
@pytest.mark.parametrize("case", CASES)
def test_off_the_cpu_no_integer_convolution_is_left(case: str, device: str) -> None:
    """On a GPU no integer product either: float32 holds the bytes, their products and sums."""
    spatial, channels, kernel, out, groups, window = CASES[case]
    rng = np.random.default_rng(3)
    x, weight = (
        jnp.asarray(np.where(rng.random(shape) < 0.8, 127, rng.integers(-128, 128, shape)), jnp.int8)
        for shape in ((2, *spatial, channels), (*kernel, channels // groups, out))
    )
    expected = accumulate_exactly(x, weight, window, groups)
    with tracing_for([device]):
        name = runnable("", weight.shape, groups, integer=True, platform="gpu")
        traced = jax.make_jaxpr(partial(accumulate_exactly, window=window, groups=groups, kernel=name))(x, weight)
    text = str(traced)
    assert "conv_general" not in text
    assert ("f32" in text) == (device == "cuda" and "dot_general" in text)
    if device == "cuda" or jax.default_backend() == "cpu":  # what is for a TPU, a GPU gets wrong
        np.testing.assert_array_equal(jax.jit(jax.extend.core.jaxpr_as_fun(traced))(x, weight)[0], expected)


@pytest.mark.parametrize("inner", [5, 512, 513, 4609])
@pytest.mark.parametrize("stack", [((), ()), ((3, 1), (2,))])
def test_matrix_products_for_a_gpu_are_exact(inner: int, stack: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    rng = np.random.default_rng(inner)
    shapes = (*stack[0], 7, inner), (*stack[1], inner, 3)
    for a, b in (
        [rng.integers(-128, 128, shape).astype(np.int8) for shape in shapes],
        [np.full(shape, 127, np.int8) for shape in shapes],
    ):
        with tracing_for(["cuda"]):
            found = jax.jit(lambda a, b: batch_matmul(a, b))(a, b)  # of its own: no trace for another platform
        np.testing.assert_array_equal(found, np.matmul(a.astype(np.int64), b.astype(np.int64)))


def test_platforms_by_their_names() -> None:
    assert platform() == jax.default_backend()
    for names, kind in ((["cpu"], "cpu"), (["cuda"], "gpu"), (["cuda", "rocm"], "gpu"), (["cpu", "tpu"], "gpu")):
        with tracing_for(names):
            assert platform() == kind
    assert platform() == jax.default_backend()


def test_a_recorded_kernel_is_checked_and_follows_the_platform() -> None:
    shape = (3, 3, 8, 16)
    assert runnable("dense", shape, 1, integer=True, platform="cpu") == "dense"
    assert runnable("dense", shape, 1, integer=True, platform="tpu") == "patches"
    assert runnable("dense", shape, 1, integer=False, platform="gpu") == "dense"
    assert runnable("grouped", shape, 2, integer=False, platform="gpu") == "grouped"
    assert runnable("grouped", shape, 2, integer=False, platform="cpu") == "patches"
    assert runnable("grouped", shape, 2, integer=True, platform="cpu") == "grouped"
    assert runnable("depthwise", (3, 3, 1, 8), 8, integer=True, platform="gpu") == "depthwise"
    for kernel, groups in (("depthwise", 1), ("matmul", 1), ("dense", 2), ("winograd", 1)):
        with pytest.raises(jq.GraphError, match=f"kernel '{kernel}' cannot run a weight"):
            runnable(kernel, shape, groups, integer=True, platform="cpu")


SAME = Window((1, 1), ((1, 1), (1, 1)), (1, 1))
FAST = {
    # name: (window, groups, x, weight)
    "dense": (SAME, 1, (1, 28, 28, 64), (3, 3, 64, 64)),
    "1x1": (SAME._replace(padding=((0, 0), (0, 0))), 1, (1, 28, 28, 64), (1, 1, 64, 64)),
    "stem": (SAME._replace(strides=(2, 2)), 1, (1, 64, 64, 3), (3, 3, 3, 32)),
    "narrow": (SAME, 1, (1, 32, 32, 16), (3, 3, 16, 16)),
    "one channel": (SAME, 1, (1, 32, 32, 1), (3, 3, 1, 1)),
    "wide padding": (SAME._replace(padding=((2, 2), (3, 1))), 1, (1, 28, 28, 64), (3, 3, 64, 64)),
    "1d": (Window((1,), ((1, 1),), (1,)), 1, (1, 512, 32), (3, 32, 64)),
    "3d": (Window((1,) * 3, ((1, 1),) * 3, (1,) * 3), 1, (1, 8, 16, 16, 32), (3, 3, 3, 32, 32)),
    "grouped": (SAME, 32, (1, 28, 28, 128), (3, 3, 4, 128)),
}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the fast integer library of XLA is on the CPU")
@pytest.mark.parametrize("case", FAST)
def test_int8_convolutions_reach_the_fast_library(case: str) -> None:
    """On a CPU, XLA lowers an integer convolution to a loop over single elements unless it has the right form."""
    window, groups, x, weight = FAST[case]
    run = jax.jit(partial(accumulate_exactly, window=window, groups=groups))
    assert "__ynn_fusion" in run.lower(jnp.zeros(x, jnp.int8), jnp.zeros(weight, jnp.int8)).compile().as_text()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the fast integer library of XLA is on the CPU")
@pytest.mark.parametrize("kernel", [2, 3, 4])
@pytest.mark.parametrize("padding", [0, 1])
def test_int8_transposed_convolutions_reach_the_fast_library(kernel: int, padding: int) -> None:
    window = Window((2, 2), ((padding,) * 2,) * 2, (1, 1))
    x, weight = jnp.zeros((1, 28, 28, 64), jnp.int8), jnp.zeros((kernel, kernel, 64, 32), jnp.int8)
    run = jax.jit(lambda x, w: transpose_convolve(x, w, window, (0, 0), 1, accumulate_exactly))
    text = run.lower(x, weight).compile().as_text()
    assert "__ynn_fusion" in text
    assert " convolution(%wrapped_convert" not in text  # what is left of an integer convolution elsewhere


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the fast integer library of XLA is on the CPU")
@pytest.mark.parametrize("transposed", [False, True])
def test_int8_matrix_products_reach_the_fast_library(transposed: bool) -> None:
    def run(a, b):
        return multiply_exactly(a, jnp.swapaxes(b, -1, -2) if transposed else b)

    a, b = jnp.zeros((4, 64, 48), jnp.int8), jnp.zeros((4, 96, 48) if transposed else (4, 48, 96), jnp.int8)
    assert "__ynn_fusion" in jax.jit(run).lower(a, b).compile().as_text()


# ---------------------------------------------------------------------------------------------------------------------
# Transposed convolution


@st.composite
def transposed(draw: st.DrawFn) -> tuple:
    rank, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    sizes, kernel, strides, dilation = each(1, 6 - rank), each(1, 4), each(1, 3), each(1, 3)
    padding = tuple(draw(st.integers(0, k)) for k in kernel)
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(strides, dilation, strict=True))
    out = [
        (n - 1) * s - 2 * p + d * (k - 1) + e + 1
        for n, s, p, d, k, e in zip(sizes, strides, padding, dilation, kernel, extra, strict=True)
    ]
    assume(min(out) >= 1)
    return sizes, kernel, strides, padding, extra, dilation, groups, *each(1, 3)[:1], draw(st.integers(1, 3))


@pytest.mark.parametrize("types", TYPES, ids="x".join)
@settings(max_examples=10)
@given(case=transposed())
def test_transposed_equals_torch(types: tuple, case: tuple) -> None:
    """In float64 torch is exact on integers."""
    sizes, kernel, strides, padding, extra, dilation, groups, per_group, out = case
    x = draw(0, (2, groups * per_group, *sizes), types[0])
    weight = draw(1, (groups * per_group, out, *kernel), types[1])
    run = getattr(torch.nn.functional, f"conv_transpose{len(kernel)}d")
    args = torch.tensor(x).double(), torch.tensor(weight).double()
    expected = run(*args, None, strides, padding, extra, groups, dilation).numpy()
    split = np.moveaxis(weight.reshape(groups, per_group, out, *kernel), (1, 0, 2), (-3, -2, -1))
    window = Window(strides, tuple((p, p) for p in padding), dilation)
    last, flat = np.moveaxis(x, 1, -1), split.reshape(*kernel, per_group, groups * out)
    got = jax.jit(lambda a, b: transpose_convolve(a, b, window, extra, groups, accumulate_exactly))(last, flat)
    np.testing.assert_array_equal(np.moveaxis(join(got), -1, 1), expected)


def test_a_transposed_window_without_output_is_refused() -> None:
    window = Window((1,), ((3, 3),), (1,))
    with pytest.raises(jq.GraphError, match="leaves no output"):
        transpose_convolve(jnp.zeros((1, 2, 4)), jnp.zeros((3, 4, 4)), window, (0,), 1, convolution.convolve)
