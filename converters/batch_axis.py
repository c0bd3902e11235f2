"""Models whose batch is not axis 0, such as a time-first LSTM: graphs have it in front, and a permutation behind."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.fx import Node as FxNode

aten = torch.ops.aten


def batch_first(program: Any, axis: int) -> Any:
    """An exported program that takes the batch as axis 0 instead of `axis`, and returns it there.

    A result has its batch in front where one axis of it depends on the number of examples. Others stay.

    Args:
      program: an exported program; it is left as it is.
      axis: of all its inputs, the one that is free.

    Returns:
      A copy for the reader, whose own signature and modules are those of the program.
    """
    if axis == 0:
        return program
    program = copy.copy(program)
    program._graph_module = copy.deepcopy(program.graph_module)
    kinds = {spec.arg.name: spec.kind.name for spec in program.graph_signature.input_specs if hasattr(spec.arg, "name")}
    for node in list(program.graph.nodes):
        if node.op == "placeholder" and kinds.get(node.name) == "USER_INPUT":
            _take_in_front(node, axis)
        elif node.op == "output":
            _return_in_front(node, program.graph_signature.output_specs)
    return program


def _take_in_front(node: FxNode, axis: int) -> None:
    value, rank = node.meta["val"], node.meta["val"].ndim
    order = [*range(1, axis + 1), 0, *range(axis + 1, rank)]
    with node.graph.inserting_after(node):
        moved = node.graph.call_function(aten.permute.default, (node, order))
    moved.meta["val"] = value
    node.replace_all_uses_with(moved, delete_user_cb=lambda user: user is not moved)
    node.meta["val"] = value.movedim(axis, 0)


def _return_in_front(output: FxNode, specs: Any) -> None:
    found = list(output.args[0])
    for i, (spec, node) in enumerate(zip(specs, found, strict=True)):
        value = node.meta.get("val") if isinstance(node, FxNode) else None
        if spec.kind.name != "USER_OUTPUT" or not isinstance(value, torch.Tensor):
            continue
        free = [axis for axis, n in enumerate(value.shape) if not isinstance(n, int)]
        if len(free) != 1 or free[0] == 0:
            continue
        order = [free[0], *(axis for axis in range(value.ndim) if axis != free[0])]
        with output.graph.inserting_before(output):
            found[i] = output.graph.call_function(aten.permute.default, (node, order))
        found[i].meta["val"] = value.permute(order)
    output.args = (tuple(found),)
