"""Runs an integer program node by node. This is the definition of what a program computes."""

from collections.abc import Callable, Mapping

import numpy as np

from jquant.reference import compare, images, layers, movement, pointwise, pool, reduce, sampling, scatter, tables
from jquant.reference.arithmetic import dequantize, quantize
from jquant.reference.call import Call
from jquant.types import GraphError, InputError, LoweringError, Node, Op, Program, integer_range

# The rule of an operator, by the name of its class: importing the operators would import what is to be checked. Any
# operator with a field `table` is looked up in its tables.
RULES: dict[str, Callable[[Call], np.ndarray]] = {
    "Abs": pointwise.absolute,
    "AdaptiveAvgPool": pool.adaptive_avg_pool,
    "AdaptiveMaxPool": pool.adaptive_max_pool,
    "Add": pointwise.add,
    "AffineGrid": sampling.affine_grid,
    "ArgMax": reduce.arg_max,
    "ArgMin": reduce.arg_min,
    "AvgPool": pool.avg_pool,
    "BitShift": scatter.bit_shift,
    "BitwiseAnd": compare.bitwise,
    "BitwiseNot": compare.bitwise,
    "BitwiseOr": compare.bitwise,
    "BitwiseXor": compare.bitwise,
    "Cat": movement.cat,
    "Ceil": compare.whole,
    "CentrePixels": images.centre_pixels,
    "ChannelShuffle": movement.channel_shuffle,
    "Clamp": pointwise.clamp,
    "Constant": pointwise.constant,
    "Conv": layers.conv,
    "ConvTranspose": layers.conv_transpose,
    "CumSum": reduce.cum_sum,
    "Dequantize": pointwise.dequantized,
    "Dropout": pointwise.identity,
    "StopGradient": pointwise.identity,
    "Embedding": layers.embedding,
    "Equal": compare.comparison,
    "Expand": movement.expand,
    "Flatten": movement.flatten,
    "Flip": movement.flip,
    "Floor": compare.whole,
    "Gather": movement.gather,
    "Greater": compare.comparison,
    "GreaterEqual": compare.comparison,
    "GridSample": sampling.grid_sample,
    "IndexSelect": movement.index_select,
    "IntegerConstant": pointwise.integer_constant,
    "Interpolate": sampling.interpolate,
    "Less": compare.comparison,
    "LessEqual": compare.comparison,
    "Linear": layers.linear,
    "LogicalAnd": compare.logical,
    "LogicalNot": compare.logical,
    "LogicalOr": compare.logical,
    "LogicalXor": compare.logical,
    "MaskedFill": compare.masked_fill,
    "MatMul": layers.matmul,
    "MaxPool": pool.max_pool,
    "Maximum": compare.maximum,
    "Mean": reduce.sum_or_mean,
    "Minimum": compare.minimum,
    "Mod": compare.mod,
    "Mul": pointwise.mul,
    "Neg": pointwise.neg,
    "NotEqual": compare.comparison,
    "Nv12ToCentredYuv444": images.nv12_to_centred_yuv444,
    "PRelu": pointwise.prelu,
    "Pad": movement.pad,
    "Permute": movement.permute,
    "PixelShuffle": movement.pixel_shuffle,
    "PixelUnshuffle": movement.pixel_unshuffle,
    "ReduceAll": reduce.reduce_all,
    "ReduceAny": reduce.reduce_any,
    "ReduceMax": reduce.reduce_max,
    "ReduceMin": reduce.reduce_min,
    "Relu": pointwise.relu,
    "Relu6": pointwise.relu6,
    "Requantize": pointwise.requantize,
    "Reshape": movement.reshape,
    "RgbToCentredYuv444": images.rgb_to_centred_yuv444,
    "RoiAlign": sampling.roi_align,
    "RoiResize": images.roi_resize,
    "Roll": movement.roll,
    "Round": compare.whole,
    "Scale": pointwise.scale,
    "Scatter": scatter.scatter,
    "Slice": movement.slice_,
    "SliceScatter": scatter.slice_scatter,
    "Sort": movement.sort,
    "SortIndices": movement.sort_indices,
    "Stack": movement.stack,
    "Sub": pointwise.sub,
    "Sum": reduce.sum_or_mean,
    "SwapChannels": images.swap_channels,
    "Tile": movement.tile,
    "TopK": movement.top_k,
    "TopKIndices": movement.top_k_indices,
    "Warp": sampling.warp,
    "Where": compare.where,
}


def rule_of(op: Op) -> Callable[[Call], np.ndarray] | None:
    """The rule of an operator; None where the reference has none."""
    return RULES.get(type(op).__name__, tables.table if hasattr(op, "table") else None)


def run(program: Program, *inputs, raw: bool = False) -> tuple[tuple[np.ndarray, ...], dict[str, np.ndarray]]:
    """Evaluates `program` on one array for each graph input, in order.

    Real inputs are float32, quantized here (section 2); with `raw` they are integers already.
    Returns (outputs, values): outputs float32, or int64 with `raw`; values {input or node: int64} in either case.
    Behind a `Dequantize` both are float32.
    `NodeFormat.accumulator` is ignored: accumulation is exact.
    """
    target = program.target
    program.check_target()
    if not target.integer:
        raise LoweringError(f"{target.name}: the integer post-processing is not public, so a program cannot be run")
    names = [graph_input.name for graph_input in program.graph.inputs]
    if len(inputs) != len(names):
        raise InputError(f"the program has {len(names)} inputs ({', '.join(names)}); got {len(inputs)} arrays")
    values: dict[str, np.ndarray] = {}
    for name, array in zip(names, inputs, strict=True):
        dtype = program.inputs[name]
        if raw or name not in program.scales:  # an exact input (mask, index, pixel) has no scale
            values[name] = checked_integers(np.asarray(array), dtype, f"input {name!r}")
        else:
            values[name] = quantize(array, program.scales[name], dtype, target.quantize_rounding)
    for node in program.graph.nodes:
        values[node.name] = evaluate(program, node, values)
    outputs = [(name, values[name]) for name in program.graph.outputs]
    return tuple(v if raw or n not in program.scales else dequantize(v, program.scales[n]) for n, v in outputs), values


def evaluate(program: Program, node: Node, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """The value of one node, int64. Errors name the node, its operator and the shapes of its operands."""
    kind = type(node.op).__name__
    where = f"node {node.name!r} ({kind})"
    rule = rule_of(node.op)
    if rule is None:
        raise GraphError(f"{where}: the reference has no rule for this operator; known: {', '.join(RULES)}")
    if (node_format := program.formats.get(node.name)) is None:
        raise GraphError(f"{where}: the program has no format for this node")
    if "float16" in (node_format.output, *node_format.inputs):
        raise GraphError(f"{where}: a float island has no integer arithmetic; compare such a program with fake-quant")
    operands = [values[name] for name in node.inputs]
    real = node_format.output == "float32"
    constants = {
        role: np.asarray(array).astype(np.float32 if real else np.int64)
        for role, array in program.constants.get(node.name, {}).items()
    }
    try:
        y = rule(Call(node.op, operands, constants, node_format, program.target))
    except KeyError as error:
        raise GraphError(f"{where}: the constant {error} is missing; present: {sorted(constants)}") from error
    except (GraphError, ValueError, IndexError) as error:
        shapes = ", ".join(str(operand.shape) for operand in operands)
        raise GraphError(f"{where} on operands of shape {shapes}: {error}") from error
    return y if real else checked_integers(y, node_format.output, where)


def checked_integers(array: np.ndarray, dtype: str, where: str) -> np.ndarray:
    """`array` as int64, once it is known to hold only integers of `dtype`."""
    if array.dtype.kind not in "iub":
        raise InputError(f"{where}: integers are needed, not {array.dtype}")
    low, high = (0, 1) if dtype == "bool" else integer_range(dtype)
    if array.size and not (low <= array.min() and array.max() <= high):
        raise InputError(f"{where}: [{array.min()}, {array.max()}] leaves the range of {dtype}, [{low}, {high}]")
    return array.astype(np.int64)
