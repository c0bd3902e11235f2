"""Resizing by a factor that leaves the size, and to one pixel: against torch and onnxruntime."""

import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper

import jquant as jq
from jquant_converters import from_onnx, from_torch, to_onnx, to_torch

FACTORS = [(1.05, 2.1), (1.1, 1.3), (2.05, 1.05), (1.2, 2.3), (0.5, 1.1), (2.0, 1.0)]
MODES = [("nearest", None), ("nearest-exact", None), ("bilinear", False), ("bilinear", True)]
X = np.random.default_rng(0).normal(size=(3, 2, 4, 7)).astype(np.float32)


class Resize(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, x):
        return F.interpolate(x, **self.options)


def run_onnx(model, x):
    """onnxruntime without graph optimizations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


@pytest.mark.parametrize(("mode", "corners"), MODES)
@pytest.mark.parametrize("factors", FACTORS, ids=str)
def test_a_factor_is_what_torch_makes_of_it(factors, mode, corners):
    model = Resize(scale_factor=factors, mode=mode, align_corners=corners).eval()
    want = model(torch.from_numpy(X)).numpy()
    graph, params = from_torch(model, (torch.from_numpy(X),))
    np.testing.assert_allclose(jq.graph.evaluate_float(graph, params, jnp.asarray(X))[0], want, atol=1e-5)
    np.testing.assert_allclose(to_torch(graph, params)(torch.from_numpy(X)).numpy(), want, atol=1e-5)
    if not corners:  # with corners ONNX takes a size, of whole factors only
        np.testing.assert_allclose(run_onnx(to_onnx(graph, params), X), want, atol=1e-5)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear"])
def test_integers_take_the_pixels_of_torch(mode):
    """Values on the grid, scale 1: nearest gives torch's pixels, bilinear within half an LSB and the weights."""
    x = np.random.default_rng(1).integers(-128, 128, (2, 3, 5, 6)).astype(np.float32)
    module = Resize(scale_factor=(1.1, 2.05), mode=mode).eval()
    graph, params = from_torch(module, (torch.from_numpy(x),))
    spec = jq.QuantSpec(dtype="int8", fixed_scale=1.0)
    model = jq.prepare(graph, params, jq.QConfig({"*": jq.Policy(output=spec)}), target=jq.targets.NASH_E)
    program = jq.lower(model)
    got, want = np.asarray(jq.run(program, jnp.asarray(x))), module(torch.from_numpy(x)).numpy()
    # Weights are cut to `resize.weight_bits` an axis: each moves the result by at most 256 / 2^bits.
    bound = 0 if mode != "bilinear" else 0.5 + 2 * 256 / 2**model.plan.target.resize.weight_bits
    assert np.abs(got - want).max() <= bound
    np.testing.assert_array_equal(got, np.asarray(jq.reference.run(program, x)[0][0], np.float32))


def resize_model(sizes, scales, **attributes):
    names = ["x", "", "scales" if scales else "", "sizes" if sizes else ""]
    constants = [(np.array(sizes, np.int64), "sizes")] if sizes else [(np.array(scales, np.float32), "scales")]
    graph = helper.make_graph(
        [helper.make_node("Resize", names, ["y"], **attributes)],
        "resize",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, X.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for array, name in constants],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 5), (8, 1)])
def test_pytorch_half_pixel_to_one_pixel_is_the_first(mode, sizes):
    rounding = {"nearest_mode": "round_prefer_ceil"} if mode == "nearest" else {}
    model = resize_model(
        [3, 2, *sizes], None, mode=mode, coordinate_transformation_mode="pytorch_half_pixel", **rounding
    )
    graph, params = from_onnx(model)
    got = jq.graph.evaluate_float(graph, params, jnp.asarray(X))[0]
    np.testing.assert_allclose(got, run_onnx(model, X), atol=1e-5)


@pytest.mark.parametrize("factor", [1.2, 2.2])
def test_an_onnx_factor_that_torch_would_ignore_is_refused(factor):
    model = resize_model(
        None, [1, 1, factor, 2], mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"
    )
    with pytest.raises(jq.ConversionError, match="which torch takes for"):
        from_onnx(model)
