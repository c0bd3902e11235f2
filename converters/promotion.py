"""Integers of the code that torch turns into floats where they meet one: `x.softmax(1) * torch.arange(n)`.

torch converts an operand by rules of its own, and an exported program does not show it. Here the conversion of what
depends on no input becomes a call, so that it is read as a constant of floats. An index or a count that depends on an
input keeps its dtype: it has no scale that is exact, and its operator says so.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.fx import Node as FxNode

aten = torch.ops.aten
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Whose operands torch brings to one dtype; those in place bring them to that of what they change.
_NAMES = (
    "add sub rsub mul div true_divide floor_divide addcmul addcdiv minimum maximum min max remainder fmod pow clamp "
    "clamp_min clamp_max where cat concat concatenate stack eq ne gt ge lt le atan2"
)
_PROMOTES = {f"aten::{name}{suffix}" for name in _NAMES.split() for suffix in ("", "_")}


def with_conversions(program: Any) -> Any:
    """The program, or a copy of it in which such integers are converted by a call."""
    if not _places(program):
        return program
    program = copy.copy(program)
    program._graph_module = copy.deepcopy(program.graph_module)
    for node, operand in _places(program):
        with node.graph.inserting_before(node):
            made = node.graph.call_function(aten.to.dtype, (operand, torch.float32))
        made.meta = dict(node.meta) | {"val": operand.meta["val"].to(torch.float32)}
        node.replace_input_with(operand, made)
    return program


def _places(program: Any) -> list[tuple[FxNode, FxNode]]:
    """Pairs of a call and an operand of it."""
    given = {
        spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"
    }  # whatever reads one of them depends on an input, apart from its sizes
    inputs: set[FxNode] = set()
    found = []
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in given:
            inputs.add(node)
        if node.op != "call_function":
            continue
        if not isinstance(node.meta.get("val"), torch.SymInt | int) and inputs.intersection(node.all_input_nodes):
            inputs.add(node)
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in _PROMOTES:
            tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
            if any(n.meta["val"].dtype == torch.float32 for n in tensors):
                found += [(node, n) for n in tensors if n not in inputs and n.meta["val"].dtype in _INTEGERS]
    return found
