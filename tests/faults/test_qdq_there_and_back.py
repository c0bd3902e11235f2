"""`model_from_onnx` of what `to_onnx` and other tools write: the same integers, and the scales of the file."""

import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from support.onnx_helpers import CASES, graph_of

import jquant as jq
from jquant_converters import from_torch, model_from_onnx, to_onnx

QCONFIG = jq.QConfig({"*": jq.Policy(output=jq.int8(), weight=jq.int8(axis="out"))})
INT16 = jq.QConfig({"*": jq.Policy(output=jq.int16(), weight=jq.int8(axis="out"))})
TARGET = jq.targets.NASH_E
# What did not come back: fused with ReLU6 or an addition, or several nodes in ONNX.
PARTS = ("Relu6", "AvgPool with a divisor", "AvgPool, ceil", "Mod", "Mod by a number", "Mod as in C", "Gelu by tanh",
         "Softplus with beta", "CentrePixels", "Add of a mask", "AdaptiveMaxPool", "AffineGrid", "Conv with an addend",
         "LogicalAnd", "Sum of a mask", "Clamp", "ConvTranspose", "LayerNorm", "Softmax")  # fmt: skip
NOT_ON_TARGET = {"DeQuantStub", "Dequantize", "Pad by reflection", "AdaptiveAvgPool, uneven"}
FLOAT_ONLY = {"Resample", "Resample with antialiasing"}  # cubic and antialiasing: float and fake-quant
COORDINATES = {"GridSample", "GridSample, border", "GridSample, pixels", "Warp"}


def check_case(name):
    op, operands, roles = CASES[name]
    graph, params = graph_of((op, operands, roles))
    x = tuple(jnp.asarray(v) for v in operands)
    model = jq.prepare(graph, params, INT16 if name in COORDINATES else QCONFIG, target=TARGET)
    model = jq.calibrate(model, [x])
    file = to_onnx(model)
    again = model_from_onnx(file.SerializeToString(), target=TARGET)
    if name in FLOAT_ONLY:
        np.testing.assert_array_equal(jq.apply(again, *x), jq.apply(model, *x))
        return file, again
    want = jq.run(jq.lower(model), *x)
    np.testing.assert_array_equal(jq.run(jq.lower(again), *x), want)
    return file, again


@pytest.mark.parametrize("name", PARTS)
def test_an_operator_that_is_several_nodes_comes_back(name):
    check_case(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(CASES) - set(PARTS) - NOT_ON_TARGET))
def test_every_operator_comes_back(name):
    check_case(name)


def test_a_note_counts_only_where_nothing_was_changed():
    """Another tool doubles the divisor: its file is read as it is, not as the note says."""
    model, _ = check_case("Mod by a number")
    (divisor,) = [t for t in model.graph.initializer if t.name == "layer:divisor"]
    divisor.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(divisor), divisor.name))
    model = model_from_onnx(model, target=TARGET, batches=[tuple(map(jnp.asarray, CASES["Mod by a number"][1]))])
    assert not any(isinstance(node.op, jq.ops.Mod) for node in model.plan.graph.nodes)


class Mobile(torch.nn.Module):
    """An inverted residual of MobileNetV2, with ReLU6, and a head behind an average with another divisor."""

    def __init__(self, activation=torch.nn.ReLU6):
        super().__init__()
        self.expand = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 1, bias=False), torch.nn.BatchNorm2d(8), activation())
        self.depth = torch.nn.Sequential(
            torch.nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), torch.nn.BatchNorm2d(8), activation()
        )
        self.project = torch.nn.Sequential(torch.nn.Conv2d(8, 4, 1, bias=False), torch.nn.BatchNorm2d(4))
        self.head = torch.nn.Linear(16, 3)

    def forward(self, x):
        y = x + self.project(self.depth(self.expand(x)))
        y = torch.nn.functional.avg_pool2d(y, 3, divisor_override=7)
        return self.head(y.flatten(1))


@pytest.mark.parametrize("wide", [1.0, 9.0])  # whether 6 lies beyond the range of the values, or inside
@pytest.mark.parametrize("activation", [torch.nn.ReLU6, torch.nn.ReLU, lambda: torch.nn.Hardtanh(-1.0, 1.0)])
def test_mobilenet_blocks_come_back(activation, wide):
    torch.manual_seed(0)
    x = wide * torch.randn(2, 4, 6, 6)
    graph, params = from_torch(Mobile(activation).eval(), (x,))
    model = jq.prepare(graph, params, QCONFIG, target=TARGET)
    model = jq.calibrate(model, [jnp.asarray(x.numpy())])
    file = to_onnx(model)
    again = model_from_onnx(file, target=TARGET)
    want = jq.run(jq.lower(model), jnp.asarray(x.numpy()))
    np.testing.assert_array_equal(jq.run(jq.lower(again), jnp.asarray(x.numpy())), want)


# ---------------------------------------------------------------------------------------------------------------------
# Files of other tools


class File:
    """Nodes of a QDQ model, written by hand."""

    def __init__(self):
        self.nodes, self.tensors = [], [numpy_helper.from_array(np.int8(0), "zero")]
        self.rng = np.random.default_rng(0)

    def constant(self, name, value):
        self.tensors.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, kind, inputs, name):
        self.nodes.append(helper.make_node(kind, inputs, [name], name))
        return name

    def pair(self, x, scale, name):
        step = self.constant(f"{name}_scale", np.float32(scale))
        return self.node(
            "DequantizeLinear", [self.node("QuantizeLinear", [x, step, "zero"], f"{name}_q"), step, "zero"], name
        )

    def conv(self, x, name):
        weight = self.constant(f"{name}_w", self.rng.integers(-127, 128, (4, 4, 1, 1)).astype(np.int8))
        step = self.constant(f"{name}_ws", np.float32(0.01))
        return self.node("Conv", [x, self.node("DequantizeLinear", [weight, step, "zero"], f"{name}_wd")], name)

    def activation(self, x, kind):
        if kind.startswith("Clip"):
            bounds = [self.constant(n, np.float32(v)) for n, v in (("low", 0), ("high", float(kind[4:])))]
            return self.node("Clip", [x, *bounds], "activation")
        return self.node(kind, [x], "activation") if kind else x

    def model(self, output):
        info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 4, 3, 3]) for n in ("x", output)]
        graph = helper.make_graph(self.nodes, "hand", info[:1], info[1:], self.tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("other", ["input", "conv", "rounded conv"])
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("activation", ["", "Relu", "Clip6", "Clip0.5"])
def test_a_convolution_in_front_of_an_addition_keeps_the_scale_of_the_file(activation, rounded, other, first):
    file = File()
    x = file.pair("x", 1 / 64, "input")
    y = file.conv(x, "conv_a")
    y = file.pair(y, 0.011, "conv_pair") if rounded else y
    y = file.pair(file.activation(y, activation), 0.003, "left")
    z = x if other == "input" else file.conv(x, "conv_b")
    z = file.pair(z, 0.017, "right") if other == "rounded conv" else z
    total = file.node("Add", [y, z] if first else [z, y], "sum")
    model = file.model(file.pair(total, 0.03, "y"))
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(1).normal(size=(2, 4, 3, 3)).astype(np.float32)
    (want,) = session.run(None, {"x": images})
    model = model_from_onnx(model, target=TARGET)
    scales = {round(float(v), 5) for key, v in model.qparams.items() if key not in model.params}
    assert {0.03, 0.011 if rounded else 0.003} <= scales
    got = np.asarray(jq.run(jq.lower(model), jnp.asarray(images)))
    # Two mantissas and truncating shifts, then one rounding: a step of the output at most.
    assert np.abs(got - want).max() <= 1.001 * 0.03


@pytest.mark.parametrize("activation", ["", "Relu", "Clip6", "Clip0.5"])
def test_a_convolution_with_an_activation_of_another_tool_lowers(activation):
    file = File()
    x = file.pair("x", 1 / 64, "input")
    model = file.model(file.pair(file.activation(file.conv(x, "conv_a"), activation), 0.003, "y"))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(1).normal(size=(2, 4, 3, 3)).astype(np.float32)
    (want,) = session.run(None, {"x": images})
    got = np.asarray(jq.run(jq.lower(model_from_onnx(model, target=TARGET)), jnp.asarray(images)))
    assert np.abs(got - want).max() <= 1.001 * 0.003
