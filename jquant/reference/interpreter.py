"""Runs an integer program node by node. This is the definition of what a program computes."""

from collections.abc import Callable, Mapping

import numpy as np

from jquant.reference import layers, pointwise
from jquant.reference.arithmetic import dequantize, quantize
from jquant.reference.call import Call
from jquant.types import GraphError, InputError, LoweringError, Node, Program, integer_range

# The rule of an operator, by the name of its class: importing the operators would import what is to be checked.
RULES: dict[str, Callable[[Call], np.ndarray]] = {
    "AdaptiveAvgPool": layers.adaptive_avg_pool,
    "Add": pointwise.add,
    "AvgPool": layers.avg_pool,
    "Cat": pointwise.cat,
    "Constant": pointwise.constant,
    "Conv": layers.conv,
    "Dropout": pointwise.identity,
    "Flatten": pointwise.flatten,
    "LeakyRelu": pointwise.table,
    "Linear": layers.linear,
    "MaxPool": layers.max_pool,
    "Mean": layers.mean,
    "Mul": pointwise.mul,
    "PRelu": pointwise.prelu,
    "Pad": pointwise.pad,
    "Permute": pointwise.permute,
    "Relu": pointwise.relu,
    "Relu6": pointwise.relu6,
    "Requantize": pointwise.requantize,
    "Reshape": pointwise.reshape,
    "Scale": pointwise.scale,
    "Sigmoid": pointwise.table,
}


def run(program: Program, *inputs, raw: bool = False) -> tuple[tuple[np.ndarray, ...], dict[str, np.ndarray]]:
    """Evaluates `program` on one array for each graph input, in order.

    Real inputs are float32, quantized here (section 2); with `raw` they are integers already.
    Returns (outputs, values): outputs float32, or int64 with `raw`; values {input or node: int64} in either case.
    `NodeFormat.accumulator` is ignored: accumulation is exact.
    """
    target = program.target
    if not target.integer:
        raise LoweringError(f"{target.name}: the integer post-processing is not public, so a program cannot be run")
    names = [graph_input.name for graph_input in program.graph.inputs]
    if len(inputs) != len(names):
        raise InputError(f"the program has {len(names)} inputs ({', '.join(names)}); got {len(inputs)} arrays")
    values: dict[str, np.ndarray] = {}
    for name, array in zip(names, inputs, strict=True):
        dtype = program.inputs[name]
        if raw:
            values[name] = checked_integers(np.asarray(array), dtype, f"input {name!r}")
        else:
            values[name] = quantize(array, program.scales[name], dtype, target.quantize_rounding)
    for node in program.graph.nodes:
        values[node.name] = evaluate(program, node, values)
    names = list(program.graph.outputs)
    return tuple(values[n] if raw else dequantize(values[n], program.scales[n]) for n in names), values


def evaluate(program: Program, node: Node, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """The value of one node, int64. Errors name the node, its operator and the shapes of its operands."""
    kind = type(node.op).__name__
    where = f"node {node.name!r} ({kind})"
    if kind not in RULES:
        raise GraphError(f"{where}: the reference has no rule for this operator; known: {', '.join(RULES)}")
    if (node_format := program.formats.get(node.name)) is None:
        raise GraphError(f"{where}: the program has no format for this node")
    operands = [values[name] for name in node.inputs]
    constants = {
        role: np.asarray(array).astype(np.int64) for role, array in program.constants.get(node.name, {}).items()
    }
    try:
        y = RULES[kind](Call(node.op, operands, constants, node_format, program.target))
    except KeyError as error:
        raise GraphError(f"{where}: the constant {error} is missing; present: {sorted(constants)}") from error
    except (GraphError, ValueError, IndexError) as error:
        shapes = ", ".join(str(operand.shape) for operand in operands)
        raise GraphError(f"{where} on operands of shape {shapes}: {error}") from error
    return checked_integers(y, node_format.output, where)


def checked_integers(array: np.ndarray, dtype: str, where: str) -> np.ndarray:
    """`array` as int64, once it is known to hold only integers of `dtype`."""
    if array.dtype.kind not in "iu":
        raise InputError(f"{where}: integers are needed, not {array.dtype}")
    low, high = integer_range(dtype)
    if array.size and not (low <= array.min() and array.max() <= high):
        raise InputError(f"{where}: [{array.min()}, {array.max()}] leaves the range of {dtype}, [{low}, {high}]")
    return array.astype(np.int64)
