"""Resizing takes torch's pixels in every meaning, at every size: indices are static, so they are exact.

Seen: steps of 16 fraction bits took other pixels from 362 outputs on, and at factors such as 1.3, 2.3 and 2.7.
"""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.meanings import meanings
from support.onnx_helpers import run_onnxruntime

import jquant as jq
from jquant import ops
from jquant.ops.resample import nearest_indices
from jquant_converters import to_onnx

NEAREST = ("nearest", "nearest-exact")


def torch_pixels(mode: str, n: int, **how: object) -> np.ndarray:
    """The pixel that torch takes for each output: a resized ramp. In float32, since float64 data has other indices."""
    return F.interpolate(torch.arange(n, dtype=torch.float32).reshape(1, 1, n), mode=mode, **how).numpy().astype(int)


@pytest.mark.parametrize("mode", NEAREST)
def test_pixels_of_a_size_are_those_of_torch(mode: str) -> None:
    for n in (1, 3, 7, 48, 100, 255, 640):
        for out in (1, 2, 5, 63, 362, 363, 999, 1280, 2049):
            (found,) = nearest_indices(ops.Interpolate(size=(out,), mode=mode), (n,))
            np.testing.assert_array_equal(found, torch_pixels(mode, n, size=out)[0, 0], err_msg=f"{n} to {out}")


@pytest.mark.parametrize("mode", NEAREST)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_pixels_of_a_factor_are_those_of_torch(mode: str, axes: int) -> None:
    """Of two axes torch ignores a factor that gives n or 2 n pixels, of one and of three it does not.

    With two axes it does so up to 128 rows and columns of the result, by the choice of its CPU kernels.
    """
    for n, factor in itertools.product((3, 10, 77, 224), (0.7, 1.0, 1.1, 1.3, 2.0, 2.01, 2.3, 2.7, 3.1, 1 / 3)):
        if axes == 2 and n == 77 and int(n * factor) == 2 * n:
            continue
        op = ops.Interpolate(scale_factor=(factor,) + (1.0,) * (axes - 1), mode=mode)
        (found, *_) = nearest_indices(op, (n,) + (1,) * (axes - 1))
        ramp = torch.arange(n, dtype=torch.float32).reshape(1, 1, n, *(1,) * (axes - 1))
        wanted = F.interpolate(ramp, scale_factor=op.scale_factor, mode=mode).numpy().reshape(-1)
        np.testing.assert_array_equal(found, wanted, err_msg=f"{n} by {factor}")


@pytest.mark.parametrize("op", [ops.Interpolate(size=(9, 1111)), ops.Interpolate(scale_factor=(1.3, 2.7))], ids=str)
@pytest.mark.parametrize("mode", NEAREST)
def test_every_meaning_takes_the_same_pixels(op: ops.Interpolate, mode: str) -> None:
    op = replace(op, mode=mode)
    x = np.random.default_rng(0).integers(-128, 128, size=(2, 2, 7, 370)).astype(np.int8)
    found = meanings(op, x, scales=(0.1,))
    found.agree()
    how = {"size": op.size} if op.size else {"scale_factor": op.scale_factor}
    wanted = F.interpolate(torch.tensor(x, dtype=torch.float32), mode=mode, **how).numpy()
    np.testing.assert_array_equal(found.integers, wanted)
    (y,) = run_onnxruntime(to_onnx(jq.Model(found.plan, {}, found.qparams)), x.astype(np.float32) * np.float32(0.1))
    np.testing.assert_array_equal(y, found.fake)


def test_steps_of_16_bits_stay_as_a_choice_of_the_target() -> None:
    """Fake-quant and the reference follow it; it takes other pixels than torch at such a size."""
    target = jq.targets.NASH_E.with_fields({"resize.nearest_index": "fixed"})
    x = np.random.default_rng(1).integers(-128, 128, size=(2, 1, 3, 500)).astype(np.int8)
    op = ops.Interpolate(size=(3, 1777))
    fixed = meanings(op, x, scales=(0.1,), target=target)
    fixed.agree()
    assert (fixed.integers != meanings(op, x, scales=(0.1,)).integers).any()
    with pytest.raises(jq.QConfigError, match="nearest_index is 'other'; it can be 'exact', 'fixed'"):
        target.with_fields({"resize.nearest_index": "other"})


@pytest.mark.parametrize(("n", "out"), [(48, 100), (100, 362), (255, 1280), (640, 999), (1000, 1001)])
@pytest.mark.parametrize("align_corners", [False, True])
def test_bilinear_coordinates_are_off_by_less_than_a_pixel_counts(n: int, out: int, align_corners: bool) -> None:
    """The step and the offset are rounded to 16 bits, so coordinate i is off by at most (i + 1) / 2^17 pixels.

    An index may so be the one before; its fraction is then nearly 1, and the value, which is continuous in the
    coordinate, moves by no more than that and the cut of the weight, 2^-8, times the difference of the neighbours.
    """
    op = ops.Interpolate(size=(out,), mode="bilinear", align_corners=align_corners)
    x = np.random.default_rng(2).integers(-128, 128, size=(2, 1, n)).astype(np.int8)
    whole = meanings(op, x, scales=(0.1,)).integers.astype(np.float64)
    real = F.interpolate(torch.tensor(x, dtype=torch.float64), size=out, mode="linear", align_corners=align_corners)
    steepest = np.abs(np.diff(x.astype(np.float64))).max()
    bound = 0.5 + steepest * ((np.arange(out) + 1) / 2.0**17 + 2.0**-8)
    assert (np.abs(whole - real.numpy()) <= bound + 1e-9).all()


@pytest.mark.parametrize("size", [(6, 1), (1, 6), (1, 1), (8, 1)])
@pytest.mark.parametrize("method", ["linear", "nearest", "cubic"])
def test_a_resize_of_jax_to_one_row_or_column_has_a_free_batch(size: tuple[int, int], method: str) -> None:
    """To one column it ended in a resize over the batch, which "depends on the batch size"."""

    def resize(params: dict, x: jax.Array) -> jax.Array:
        return jax.image.resize(x, (x.shape[0], *size, 3), method)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 6, 3)), jnp.float32)
    graph, params = jq.trace(resize, {}, x[:2])
    (found,) = jq.graph.evaluate_float(graph, params, x)
    np.testing.assert_allclose(found, resize({}, x), atol=1e-6)


def test_a_resize_of_jax_keeps_its_pixels() -> None:
    """jax.image.resize multiplies before it divides: where that takes another pixel than torch, it still does."""
    for n, out in ((7, 50), (48, 100), (370, 1111), (131, 999)):

        def resize(params: dict, x: jax.Array, out: int = out) -> jax.Array:
            return jax.image.resize(x, (x.shape[0], 2, out, 1), "nearest")

        x = jnp.arange(2 * 2 * n, dtype=jnp.float32).reshape(2, 2, n, 1)
        graph, params = jq.trace(resize, {}, x)
        (found,) = jq.graph.evaluate_float(graph, params, x)
        np.testing.assert_array_equal(found, resize({}, x))
