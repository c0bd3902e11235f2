"""Running ONNX models by the two runtimes that serve as oracles, and cases of one operator for export and import."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import onnx
import onnx.reference
import onnxruntime
from onnx import TensorProto, helper

import jquant as jq
from jquant import ops
from jquant.graph.evaluate import evaluate
from jquant.graph.float import value_shapes
from jquant.program.integers import quantize_inputs
from jquant_converters import to_onnx
from jquant_converters.onnx_out import channels_last_values


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Optimizations off: onnxruntime would fuse a QDQ model into kernels of which some saturate."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def feeds(model: onnx.ModelProto, inputs: Any) -> dict[str, np.ndarray]:
    return {i.name: np.asarray(x) for i, x in zip(model.graph.input, inputs, strict=True)}


def run_onnxruntime(model: onnx.ModelProto, *inputs: Any) -> list[np.ndarray]:
    return session(model).run(None, feeds(model, inputs))


def run_reference(model: onnx.ModelProto, *inputs: Any) -> list[np.ndarray]:
    return onnx.reference.ReferenceEvaluator(model).run(None, feeds(model, inputs))


def integers(model: onnx.ModelProto, *inputs: Any) -> dict[str, np.ndarray]:
    """The integers of every value with a QuantizeLinear, by the name that jquant has for it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    names = []
    types = {t.name: t.data_type for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            names.append(node.name.removesuffix(":quantize"))
            copy.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], types[node.input[2]], None))
    found = session(copy).run([o.name for o in copy.graph.output][len(model.graph.output) :], feeds(model, inputs))
    return dict(zip(names, found, strict=True))


def apart(model: jq.Model, x: Any) -> dict[str, np.ndarray]:
    """{value: distances in LSB} of a QDQ model from the program, where each node gets the operands of the QDQ model.

    So one node is compared at a time; else a difference of one LSB would come out of the next layer as several.
    """
    program, theirs = jq.lower(model), integers(to_onnx(model), *x)
    last = channels_last_values(model.plan.graph, value_shapes(model.plan.graph, model.params))
    found: dict[str, np.ndarray] = {}

    def tap(name: str, value: Any) -> Any:
        if name not in theirs:
            return value
        given = np.moveaxis(theirs[name], 1, -1) if name in last else theirs[name]
        found[name] = np.abs(given.astype(np.int64) - np.asarray(value))
        return jnp.asarray(given, value.dtype)

    def rule(node: jq.Node, *operands: Any) -> Any:
        constants = program.constants[node.name]
        return jq.ops.eval_integer(node.op, program.formats[node.name], program.target, *operands, **constants)

    named = {entry.name: jnp.asarray(v) for entry, v in zip(model.plan.graph.inputs, x, strict=True)}
    evaluate(program.graph, quantize_inputs(program, named), rule, tap)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# One operator each


def _draw(shape: tuple[int, ...], kind: str = "normal") -> np.ndarray:
    rng = np.random.default_rng([len(shape), *shape])
    match kind:
        case "normal":
            return rng.normal(size=shape).astype(np.float32)
        case "positive":
            return rng.uniform(0.2, 3.0, size=shape).astype(np.float32)
        case "inside":
            return rng.uniform(-0.95, 0.95, size=shape).astype(np.float32)
        case "beyond":
            return rng.uniform(1.05, 4.0, size=shape).astype(np.float32)
        case "bool":
            return rng.random(shape) < 0.5
        case "uint8":
            return rng.integers(0, 256, shape).astype(np.uint8)
    return rng.integers(0, int(kind), shape).astype(np.int32)


X, Y, IMAGE, SEQUENCE = _draw((2, 4, 6)), _draw((2, 4, 6))[:, ::-1], _draw((2, 8, 6, 7)), _draw((2, 5, 6))
SQUARE = _draw((2, 8, 6, 6))
MASK = _draw((2, 4, 6), "bool")
Case = tuple[jq.ops.Op, tuple[np.ndarray, ...], dict[str, np.ndarray]]


def _window(cls: Callable[..., jq.ops.Op], **options: Any) -> jq.ops.Op:
    dilation = {"dilation": (1, 1)} if cls is ops.MaxPool else {}
    return cls(kernel=(3, 3), strides=(2, 2), padding=((1, 1), (0, 1)), **dilation, **options)


def _conv(cls: Callable[..., jq.ops.Op], rank: int, **options: Any) -> jq.ops.Op:
    ones = (1,) * rank
    return cls(**{"strides": (2,) * rank, "padding": ((1, 0),) * rank, "dilation": ones, **options})


def _recurrent(gates: int) -> dict[str, np.ndarray]:
    return {
        "weight_ih": _draw((gates * 3, 6)),
        "weight_hh": _draw((gates * 3, 3)),
        "bias_ih": _draw((gates * 3,)),
        "bias_hh": _draw((gates * 3,)) * 0.5,
    }


def _functions() -> dict[str, Case]:
    """The functions of one operand, at inputs of their domain."""
    domains = {ops.Acos: "inside", ops.Asin: "inside", ops.Atanh: "inside", ops.Acosh: "beyond", ops.Pow: "positive"}
    domains |= dict.fromkeys((ops.Log, ops.Sqrt, ops.Rsqrt, ops.Reciprocal), "positive")
    options: dict[Any, dict[str, Any]] = {ops.Pow: {"exponent": 1.5}}
    return {
        cls.__name__: (cls(**options.get(cls, {})), (_draw((2, 4, 6), domains.get(cls, "normal")),), {})
        for cls in ops.TABLE_FUNCTIONS
    } | {"Pow of exponent 0": (ops.Pow(exponent=0.0), (_draw((2, 4, 6)),), {})}


def _elementwise() -> dict[str, Case]:
    found: dict[str, Case] = {
        cls.__name__: (cls(), (X,), {})
        for cls in (ops.Relu, ops.Relu6, ops.Abs, ops.Neg, ops.Floor, ops.Ceil, ops.Round, ops.Dropout, ops.Requantize)
    }
    same = (ops.QuantStub, ops.DeQuantStub, ops.Dequantize, ops.StopGradient)
    found |= {cls.__name__: (cls(), (X,), {}) for cls in same}
    pairs = (ops.Add, ops.Sub, ops.Mul, ops.Div, ops.Minimum, ops.Maximum, ops.Mod)
    pairs += (ops.Equal, ops.NotEqual, ops.Greater, ops.GreaterEqual, ops.Less, ops.LessEqual)
    found |= {cls.__name__: (cls(), (X, Y), {}) for cls in pairs}
    masks = (ops.LogicalAnd, ops.LogicalOr, ops.LogicalXor, ops.BitwiseAnd, ops.BitwiseOr, ops.BitwiseXor)
    found |= {cls.__name__: (cls(), (MASK, MASK[::-1]), {}) for cls in masks}
    whole = _draw((2, 4, 6), "90")
    return found | {
        "LogicalNot": (ops.LogicalNot(), (MASK,), {}),
        "BitShift": (ops.BitShift(bits=3), (whole,), {}),
        "BitShift to the left": (ops.BitShift(bits=-3), (whole,), {}),
        "BitwiseNot": (ops.BitwiseNot(), (whole,), {}),
        "BitwiseAnd of integers": (ops.BitwiseAnd(), (whole, whole[::-1]), {}),
        "Scale": (ops.Scale(factor=-0.3), (X,), {}),
        "Clamp": (ops.Clamp(minimum=-0.5, maximum=0.7), (X,), {}),
        "Clamp below": (ops.Clamp(minimum=-0.5), (X,), {}),
        "Clamp of integers": (ops.Clamp(minimum=3, maximum=50), (whole,), {}),
        "Add of a mask": (ops.Add(), (X, MASK), {}),
        "Add of integers": (ops.Add(), (whole, whole), {}),
        "Equal to a number": (ops.Equal(value=3.0), (_draw((2, 4, 6), "4"),), {}),
        "Less than a number": (ops.Less(value=0.25), (X,), {}),
        "Mod by a number": (ops.Mod(value=0.3), (X,), {}),
        "Mod as in C": (ops.Mod(value=0.3, same_sign_as_dividend=True), (X,), {}),
        "Gelu by tanh": (ops.Gelu(approximate="tanh"), (X,), {}),
        "Log of a sum": (ops.Log(epsilon=0.5), (_draw((2, 4, 6), "positive"),), {}),
        "Rsqrt of a sum": (ops.Rsqrt(epsilon=0.5), (_draw((2, 4, 6), "positive"),), {}),
        "Softplus with beta": (ops.Softplus(beta=2.0), (X,), {}),
        "ThresholdedRelu with a value": (ops.ThresholdedRelu(threshold=-0.2, value=0.7), (X,), {}),
        "PRelu": (ops.PRelu(), (IMAGE,), {"weight": _draw((8,))}),
        "PRelu of one slope": (ops.PRelu(), (X,), {"weight": _draw((1,))}),
        "Where": (ops.Where(), (MASK, X, Y), {}),
        "MaskedFill": (ops.MaskedFill(value=-3.0), (X, MASK), {}),
        "CentrePixels": (ops.CentrePixels(unit=1 / 128), (_draw((2, 4, 6), "uint8"),), {}),
    }


def _layers() -> dict[str, Case]:
    w = _draw((6, 4, 3, 3))
    affine = {"weight": _draw((8,)), "bias": _draw((8,)) * 0.1}
    statistics = {"running_mean": _draw((8,)), "running_var": _draw((8,), "positive")}
    heads = [_draw((2, 2, 5, 4)), _draw((2, 2, 7, 4)), _draw((2, 2, 7, 3))]
    return {
        "Conv": (_conv(ops.Conv, 2, groups=2), (IMAGE,), {"weight": w, "bias": _draw((6,))}),
        "Conv 1d": (_conv(ops.Conv, 1, dilation=(2,)), (X,), {"weight": _draw((5, 4, 3))}),
        "Conv 3d": (_conv(ops.Conv, 3), (_draw((2, 3, 4, 5, 6)),), {"weight": _draw((2, 3, 2, 3, 3))}),
        "Conv with relu6": (_conv(ops.Conv, 2, groups=2, activation="relu6"), (IMAGE,), {"weight": w}),
        "Conv with an addend": (
            _conv(ops.Conv, 2, groups=2, activation="relu", addend=True),
            (IMAGE, _draw((2, 6, 3, 3))),
            {"weight": w},
        ),
        "ConvTranspose": (
            _conv(ops.ConvTranspose, 2, groups=2, output_padding=(1, 0)),
            (IMAGE,),
            {"weight": _draw((8, 3, 3, 3)), "bias": _draw((6,))},
        ),
        "ConvTranspose alone": (_conv(ops.ConvTranspose, 1, output_padding=(0,)), (X,), {"weight": _draw((4, 3, 3))}),
        "Linear": (ops.Linear(), (_draw((2, 6)),), {"weight": _draw((5, 6)), "bias": _draw((5,))}),
        "Linear of a sequence": (
            ops.Linear(activation="relu"),
            (SEQUENCE,),
            {"weight": _draw((4, 6)), "bias": _draw((4,))},
        ),
        "MatMul": (ops.MatMul(transpose_b=True), (X, Y), {}),
        "Embedding": (ops.Embedding(), (_draw((2, 5), "7"),), {"weight": _draw((7, 3))}),
        "BatchNorm": (ops.BatchNorm(), (IMAGE,), affine | statistics),
        "BatchNorm alone": (ops.BatchNorm(epsilon=1e-3), (IMAGE,), statistics),
        "LayerNorm": (ops.LayerNorm(), (X,), {"weight": _draw((6,)), "bias": _draw((6,))}),
        "LayerNorm over two axes": (ops.LayerNorm(rank=2), (X,), {}),
        "RmsNorm": (ops.RmsNorm(), (X,), {"weight": _draw((6,))}),
        "RmsNorm alone": (ops.RmsNorm(), (X,), {}),
        "GroupNorm": (ops.GroupNorm(groups=4), (IMAGE,), affine),
        "GroupNorm alone": (ops.GroupNorm(groups=2), (IMAGE,), {}),
        "InstanceNorm": (ops.InstanceNorm(), (IMAGE,), affine),
        "Softmax": (ops.Softmax(axis=1), (X,), {}),
        "Softmax with a mask": (ops.Softmax(), (X, MASK), {}),
        "LogSoftmax": (ops.LogSoftmax(axis=-1), (X,), {}),
        "Attention": (ops.Attention(), tuple(heads), {}),
        "Attention, causal": (ops.Attention(causal=True), tuple(heads), {}),
        "Attention with a mask": (ops.Attention(mask="bool"), (*heads, np.arange(70).reshape(2, 1, 5, 7) % 3 != 1), {}),
        "Attention with a bias": (ops.Attention(mask="add", scale=0.3), (*heads, _draw((2, 1, 5, 7))), {}),
        "Attention with a bias and a mask": (
            ops.Attention(mask="add"),
            (*heads, _draw((1, 1, 5, 7)), np.arange(70).reshape(2, 1, 5, 7) % 3 != 1),
            {},
        ),
        "Lstm": (ops.Lstm(), (SEQUENCE,), _recurrent(4)),
        "Lstm, cell": (
            ops.Lstm(reverse=True, output="cell"),
            (SEQUENCE, _draw((2, 3)), _draw((2, 3)) * 0.5),
            _recurrent(4),
        ),
        "Gru": (ops.Gru(), (SEQUENCE,), _recurrent(3)),
        "Gru, hidden": (ops.Gru(reverse=True, output="hidden"), (SEQUENCE, _draw((2, 3))), _recurrent(3)),
    }


def _into(**bounds: Any) -> ops.SliceScatter:
    return ops.SliceScatter(**{"steps": (1, 1, 1)} | bounds)


def _movement() -> dict[str, Case]:
    index = _draw((2, 3, 6), "4")
    return {
        "Reshape": (ops.Reshape(shape=(-1, 3, 8)), (X,), {}),
        "Flatten": (ops.Flatten(), (IMAGE,), {}),
        "Permute": (ops.Permute(axes=(0, 2, 1)), (X,), {}),
        "Cat": (ops.Cat(axis=1), (X, Y, X), {}),
        "Stack": (ops.Stack(axis=2), (X, Y), {}),
        "Expand": (ops.Expand(shape=(-1, 4, 3, 6)), (X[:, :, None],), {}),
        "Tile": (ops.Tile(repeats=(1, 2, 3)), (X,), {}),
        "Roll": (ops.Roll(shifts=(1, -2), axes=(1, 2)), (X,), {}),
        "Flip": (ops.Flip(axes=(1, 2)), (X,), {}),
        "SwapChannels": (ops.SwapChannels(axis=1), (X,), {}),
        "Slice": (ops.Slice(starts=(0, 1, -4), stops=(None, 4, None), steps=(1, 2, 1)), (X,), {}),
        "Pad": (ops.Pad(padding=((0, 0), (1, 2), (0, 1)), value=0.5), (X,), {}),
        "Pad by the border": (ops.Pad(padding=((0, 0), (1, 2), (0, 1)), mode="border"), (X,), {}),
        "Pad by reflection": (ops.Pad(padding=((0, 0), (1, 2), (0, 1)), mode="reflect"), (X,), {}),
        "PixelShuffle": (ops.PixelShuffle(factor=2), (IMAGE,), {}),
        "PixelUnshuffle": (ops.PixelUnshuffle(factor=2), (SQUARE,), {}),
        "ChannelShuffle": (ops.ChannelShuffle(groups=2), (IMAGE,), {}),
        "IndexSelect": (ops.IndexSelect(axis=1, indices=(2, 0, -1)), (X,), {}),
        "IndexSelect by a value": (ops.IndexSelect(axis=2), (X, _draw((3,), "6")), {}),
        "Gather": (ops.Gather(axis=1), (X, index), {}),
        "Gather of fewer": (ops.Gather(axis=1), (X, index[:, :, :4]), {}),
        "Scatter": (ops.Scatter(axis=1, reduce="add"), (X, index, _draw((2, 3, 6))), {}),
        "Scatter of rows": (ops.Scatter(axis=1, reduce="max"), (X, index[:, :, :1], _draw((2, 3, 6))), {}),
        "Scatter of fewer": (ops.Scatter(axis=1, reduce="add"), (X, index[:, :, :4], _draw((2, 3, 4))), {}),
        "SliceScatter": (_into(starts=(0, 1, 0), stops=(None, 4, None)), (X, _draw((2, 3, 6))), {}),
        "SliceScatter of two axes": (
            _into(starts=(0, 1, 2), stops=(None, None, 7), steps=(1, 1, 2)),
            (X, _draw((2, 3, 2))),
            {},
        ),
        "TopK": (ops.TopK(axis=2, k=3), (X,), {}),
        "TopKIndices": (ops.TopKIndices(axis=2, k=3, largest=False), (X,), {}),
        "TopK of a mask": (ops.TopK(axis=2, k=3), (MASK,), {}),
        "TopKIndices of a mask": (ops.TopKIndices(axis=2, k=3), (MASK,), {}),
        "Sort": (ops.Sort(axis=1), (X,), {}),
        "SortIndices": (ops.SortIndices(axis=1, descending=True), (X,), {}),
        "Constant": (ops.Constant(), (), {"value": _draw((3, 2))}),
        "IntegerConstant": (ops.IntegerConstant(shape=(3,), values=(4, -1, 2)), (), {}),
    }


def _reductions() -> dict[str, Case]:
    found: dict[str, Case] = {
        cls.__name__: (cls(axes=(1, 2)), (X,), {}) for cls in (ops.Mean, ops.Sum, ops.ReduceMax, ops.ReduceMin)
    }
    found |= {cls.__name__: (cls(axes=(1,), keepdims=True), (MASK,), {}) for cls in (ops.ReduceAll, ops.ReduceAny)}
    found |= {f"Norm {n}": (ops.Norm(axes=(2,), order=n), (X,), {}) for n in ("1", "2", "max")}
    return found | {
        "Sum of a mask": (ops.Sum(axes=(2,), keepdims=True), (MASK,), {}),
        "ArgMax": (ops.ArgMax(axis=1), (X,), {}),
        "ArgMax of a mask": (ops.ArgMax(axis=1), (MASK,), {}),
        "ArgMin": (ops.ArgMin(axis=-1, keepdims=True), (X,), {}),
        "CumSum": (ops.CumSum(axis=1, exclusive=True, reverse=True), (X,), {}),
        "Variance": (ops.Variance(axes=(1, 2)), (X,), {}),
        "Variance of all": (ops.Variance(axes=(1,), correction=0, keepdims=True), (X,), {}),
    }


def _images() -> dict[str, Case]:
    grid = _draw((2, 5, 4, 2), "inside")
    return {
        "MaxPool": (_window(ops.MaxPool), (IMAGE,), {}),
        "MaxPool, ceil": (_window(ops.MaxPool, ceil_mode=True), (IMAGE,), {}),
        "AvgPool": (_window(ops.AvgPool), (IMAGE,), {}),
        "AvgPool, ceil": (_window(ops.AvgPool, ceil_mode=True), (IMAGE,), {}),
        "AvgPool without the padding": (_window(ops.AvgPool, count_include_pad=False), (IMAGE,), {}),
        "AvgPool with a divisor": (_window(ops.AvgPool, divisor=5), (IMAGE,), {}),
        "AdaptiveAvgPool": (ops.AdaptiveAvgPool(output_size=(1, 1)), (IMAGE,), {}),
        "AdaptiveAvgPool, even": (ops.AdaptiveAvgPool(output_size=(3, 2)), (SQUARE,), {}),
        "AdaptiveAvgPool, uneven": (ops.AdaptiveAvgPool(output_size=(4, 3)), (IMAGE,), {}),
        "AdaptiveMaxPool": (ops.AdaptiveMaxPool(output_size=(4, 3)), (IMAGE,), {}),
        "Interpolate": (ops.Interpolate(size=(9, 10)), (IMAGE,), {}),
        "Interpolate exactly": (ops.Interpolate(size=(9, 10), mode="nearest-exact"), (IMAGE,), {}),
        "Interpolate, bilinear": (ops.Interpolate(size=(9, 4), mode="bilinear"), (IMAGE,), {}),
        "Interpolate, corners": (ops.Interpolate(size=(9, 4), mode="bilinear", align_corners=True), (IMAGE,), {}),
        "Interpolate by a factor": (ops.Interpolate(scale_factor=(1.5, 2.0), mode="bilinear"), (IMAGE,), {}),
        "Interpolate, from the start": (
            ops.Interpolate(size=(9, 4), mode="bilinear", coordinates="asymmetric"),
            (IMAGE,),
            {},
        ),
        "Resample": (ops.Resample(size=(9, 4)), (IMAGE,), {}),
        "Resample with antialiasing": (ops.Resample(size=(3, 4), mode="linear", antialias=True), (IMAGE,), {}),
        "GridSample": (ops.GridSample(), (IMAGE, grid * 1.2), {}),
        "GridSample, border": (ops.GridSample(padding="border", align_corners=True), (IMAGE, grid * 1.2), {}),
        "GridSample, pixels": (ops.GridSample(coordinates="absolute"), (IMAGE, 3 + 4 * grid), {}),
        "Warp": (ops.Warp(), (IMAGE, _draw((2, 2, 6, 7))), {}),
        "AffineGrid": (ops.AffineGrid(size=(4, 5)), (_draw((2, 2, 3)),), {}),
    }


CASES: dict[str, Case] = _functions() | _elementwise() | _layers() | _movement() | _reductions() | _images()


# What onnx.reference 1.23 has no correct form of: groups of a transposed convolution, and before opset 20 the name of
# the bilinear mode.
NOT_IN_REFERENCE = {"ConvTranspose", "GridSample", "GridSample, border", "GridSample, pixels", "Warp"}


def graph_of(case: Case) -> tuple[jq.Graph, dict[str, jnp.ndarray]]:
    """A graph of one node, its batch free where the operands have the batch of 2; a constant gets company."""
    op, operands, roles = case
    inputs = tuple(
        jq.Input(f"x{i}", (None if x.shape[0] == 2 else x.shape[0], *x.shape[1:]), str(x.dtype))
        for i, x in enumerate(operands)
    )
    params = {f"layer.{role}": jnp.asarray(value) for role, value in roles.items()}
    node = jq.Node("layer", op, tuple(i.name for i in inputs), jq.FrozenMap({r: f"layer.{r}" for r in roles}))
    return jq.Graph(inputs, (node,), ("layer",)), params


# ---------------------------------------------------------------------------------------------------------------------
# Models by hand


def model_of(nodes, inputs, outputs, *, opset=21, initializers=None):
    types = {np.dtype(np.float32): 1, np.dtype(np.int64): 7, np.dtype(bool): 9, np.dtype(np.int32): 6}
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(n, types[v.dtype], v.shape) for n, v in inputs.items()],
        [helper.make_tensor_value_info(n, t, None) for n, t in outputs.items()],
        [onnx.numpy_helper.from_array(v, n) for n, v in (initializers or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=min(10, opset))


def draw(*shape):
    return np.random.default_rng([3, *shape]).normal(size=shape).astype(np.float32)


def quantized_conv(*, x_zero=None, w_zero=None, x_dtype=np.int8, outputs_on_grid=True, relu=True, raw=False):
    """x -> Q, DQ -> Conv of a dequantized weight and bias -> Relu -> Q, DQ -> y."""
    weight = np.random.default_rng(1).integers(-128, 128, (4, 3, 3, 3)).astype(np.int8)
    scales = np.float32([0.01, 0.02, 0.015, 0.03])
    constants = {
        "s_x": np.float32(0.05), "z_x": np.asarray(x_zero or 0, x_dtype), "w": weight, "s_w": scales,
        "z_w": np.full(4, w_zero or 0, np.int8), "b": np.int32([100, -200, 300, 4]),
        "s_b": np.float32(0.05) * scales, "s_y": np.float32(0.25),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s_x", "z_x"], ["x_q"]),
        helper.make_node("DequantizeLinear", ["x_q", "s_x", "z_x"], ["x_d"]),
        helper.make_node("DequantizeLinear", ["w", "s_w", "z_w"], ["w_d"], axis=0),
        helper.make_node("DequantizeLinear", ["b", "s_b"], ["b_d"], axis=0),
        helper.make_node("Conv", ["x_d", "w_d", "b_d"], ["c"], "conv", pads=[1, 1, 1, 1]),
    ]
    last = "c"
    if relu:
        nodes.append(helper.make_node("Relu", ["c"], ["r"], "relu"))
        last = "r"
    if outputs_on_grid:
        nodes += [
            helper.make_node("QuantizeLinear", [last, "s_y", "z_x"], ["y_q"]),
            helper.make_node("DequantizeLinear", ["y_q", "s_y", "z_x"], ["y"]),
        ]
        last = "y"
    outputs = {last: TensorProto.FLOAT} | ({"c": TensorProto.FLOAT} if raw else {})
    return model_of(nodes, {"x": draw(2, 3, 5, 5)}, outputs, initializers=constants), constants
