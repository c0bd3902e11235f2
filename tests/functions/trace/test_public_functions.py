"""Every public function of `jquant.ops` in a traced model: found again, trained through, and right as integers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jquant as jq
from jquant import ops
from jquant.ops import functional

RNG = np.random.default_rng(0)


def real(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def pixels(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.integers(0, 256, shape), jnp.uint8)


def boxes(images: int) -> jax.Array:
    corners = RNG.uniform(0, 6, (3 * images, 2, 2)).astype(np.float32)
    corners.sort(1)
    index = np.arange(3 * images, dtype=np.float32)[:, None] % images
    return jnp.asarray(np.concatenate([index, corners.reshape(-1, 4)], 1))


# name: (the function, of inputs; the operator; the inputs)
CASES: dict[str, tuple[Callable, type, tuple]] = {
    "affine_grid": (
        lambda x, theta: ops.grid_sample(x, ops.affine_grid(theta, (5, 4))), ops.AffineGrid,
        (real(2, 6, 6, 8), real(2, 2, 3) * 0.3),
    ),
    "bgr_to_centred_yuv444": (
        lambda x: ops.bgr_to_centred_yuv444(x, swing="studio", unit=1 / 128), ops.RgbToCentredYuv444,
        (pixels(2, 6, 6, 3),),
    ),
    "channel_shuffle": (lambda x: ops.channel_shuffle(x, 4), ops.ChannelShuffle, (real(2, 6, 6, 8),)),
    "grid_sample": (
        lambda x, grid: ops.grid_sample(x, jnp.tanh(grid)), ops.GridSample, (real(2, 6, 6, 8), real(2, 5, 4, 2)),
    ),
    "interpolate": (lambda x: ops.interpolate(x, size=(9, 12)), ops.Interpolate, (real(2, 6, 6, 8),)),
    "nv12_to_centred_yuv444": (
        lambda y, uv: ops.nv12_to_centred_yuv444(y, uv, unit=1 / 128), ops.Nv12ToCentredYuv444,
        (pixels(2, 6, 6, 1), pixels(2, 3, 3, 2)),
    ),
    "pixel_shuffle": (lambda x: ops.pixel_shuffle(x, 2), ops.PixelShuffle, (real(2, 6, 6, 8),)),
    "pixel_unshuffle": (lambda x: ops.pixel_unshuffle(x, 2), ops.PixelUnshuffle, (real(2, 6, 6, 8),)),
    "rgb_to_centred_yuv444": (
        lambda x: ops.rgb_to_centred_yuv444(x, unit=1 / 128), ops.RgbToCentredYuv444, (pixels(2, 6, 6, 3),),
    ),
    "warp": (lambda x, flow: ops.warp(x, flow), ops.Warp, (real(2, 6, 6, 8), real(2, 6, 6, 2))),
}  # fmt: skip


def module(function: Callable) -> Callable:
    """The function, and a convolution behind it, so that there is something to train."""

    def fn(params: dict, *inputs: jax.Array) -> jax.Array:
        y = function(*inputs)
        axes = jax.lax.conv_dimension_numbers(y.shape, params["kernel"].shape, ("NHWC", "HWIO", "NHWC"))
        return jax.nn.relu(jax.lax.conv_general_dilated(y, params["kernel"], (1, 1), "SAME", dimension_numbers=axes))

    return fn


def test_every_public_function_has_a_case() -> None:
    here = {name for name in ops.__all__ if getattr(getattr(ops, name), "__module__", "") == functional.__name__}
    assert here == {*CASES, "roi_align"}


@pytest.mark.parametrize("name", CASES)
def test_found_trained_and_lowered(name: str) -> None:
    function, operator, inputs = CASES[name]
    channels = jax.eval_shape(function, *inputs).shape[-1]
    original, params = module(function), {"kernel": real(3, 3, channels, 4)}
    graph, flat = jq.trace(original, params, *inputs)
    assert [type(node.op) for node in graph.nodes].count(operator) == 1
    exact = np.asarray(original(params, *inputs))
    (found,) = jq.graph.evaluate_float(graph, flat, *inputs)
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-6 * np.abs(exact).max())

    rules = {"*": jq.Policy(weight=jq.int8(axis="out", quantizer=jq.lsq), output=jq.int8(quantizer=jq.lsq))}
    rules |= jq.templates.grid_int16(graph)
    model = jq.prepare(graph, flat, jq.QConfig(rules), target=jq.targets.NASH_E)
    model = jq.calibrate(model, [inputs])
    state = jq.TrainState.create(model, tx=optax.sgd(1e-3))

    def loss(trainable: jq.Model) -> jax.Array:
        return jnp.mean(jq.apply_train(trainable, *inputs)[0] ** 2)

    grads = jax.grad(loss)(state.trainable)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all(), jax.tree_util.keystr(path)
    for key in model.plan.weights:
        assert np.abs(grads.params[key]).max() > 0
        assert np.abs(grads.qparams[key]).max() > 0
    state = state.update(grads)
    program = jq.lower(state.model)
    outputs, _ = jq.reference.run(program, *map(np.asarray, inputs))
    np.testing.assert_array_equal(jq.run(program, *inputs), outputs[0])
    bit_true = jq.apply(state.model, *inputs, mode="bit_true")
    np.testing.assert_array_equal(bit_true, outputs[0])


def test_roi_align_has_its_own_batch() -> None:
    """Its rows are boxes and not pictures, so it ends a model: there is no convolution behind it."""
    x, regions = real(2, 8, 8, 4), boxes(2)

    def fn(params: dict, x: jax.Array, regions: jax.Array) -> jax.Array:
        return ops.roi_align(x, regions, (3, 3))

    graph, params = jq.trace(fn, {}, x, regions, dynamic_batch=False)
    assert [type(node.op) for node in graph.nodes] == [ops.RoiAlign]
    exact = np.asarray(ops.roi_align(x, regions, (3, 3)))
    np.testing.assert_allclose(jq.graph.evaluate_float(graph, params, x, regions)[0], exact, rtol=0, atol=1e-6)
    rules = {
        "*": jq.Policy(output=jq.int8()),
        **jq.templates.grid_int16(graph),
        "regions": jq.Policy(output=jq.int16()),
    }
    model = jq.prepare(graph, params, jq.QConfig(rules), target=jq.targets.NASH_E)
    program = jq.lower(jq.calibrate(model, [(x, regions)]))
    outputs, _ = jq.reference.run(program, np.asarray(x), np.asarray(regions))
    np.testing.assert_array_equal(jq.run(program, x, regions), outputs[0])


@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("swing", ["full", "studio"])
def test_yuv_in_a_model_is_that_of_the_pictures(order: str, swing: str) -> None:
    x = pixels(2, 16, 16, 3)
    convert = {"rgb": ops.rgb_to_centred_yuv444, "bgr": ops.bgr_to_centred_yuv444}[order]
    wanted = {"rgb": jq.images.rgb_to_centred_yuv444, "bgr": jq.images.bgr_to_centred_yuv444}[order](x, swing=swing)
    np.testing.assert_array_equal(convert(x, swing=swing), np.float32(wanted))
    graph, params = jq.trace(lambda params, x: convert(x, swing=swing, unit=1 / 128), {}, x)
    rules = jq.QConfig({"*": jq.Policy(output=jq.int8(scale=1 / 128))})
    model = jq.prepare(graph, params, rules, target=jq.targets.NASH_E)
    program = jq.lower(jq.calibrate(model, [x]))
    np.testing.assert_array_equal(jq.run(program, x, raw=True), wanted)


def test_wrong_pixels_are_refused() -> None:
    with pytest.raises(jq.InputError, match=r"RGB pixels are \[..., 3\], channels last, not \(2, 3, 4, 4\)"):
        ops.rgb_to_centred_yuv444(pixels(2, 3, 4, 4))
    with pytest.raises(jq.InputError, match="swing must be 'full'"):
        ops.rgb_to_centred_yuv444(pixels(2, 4, 3), swing="video")
    with pytest.raises(jq.GraphError, match="order must be 'rgb' or 'bgr', not 'grb'"):
        ops.RgbToCentredYuv444(order="grb")
