"""An If whose condition is a constant: the branch that is taken, in its place."""

from __future__ import annotations

import onnx

from ..onnx_in.load import array_of
from .edit import PLAIN

MAX_NODES = 100_000


def without_branches(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model itself where it has no such If, else a copy without them. Other Ifs stay, and are refused by name."""
    while True:
        found = _taken(model)
        if found is None:
            return model
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        index, branch = found
        node = copy.graph.node[index]
        new = _inlined(copy, branch, node, f"{node.name or node.output[0]}.")
        nodes = [*copy.graph.node[:index], *new, *copy.graph.node[index + 1 :]]
        if len(nodes) > MAX_NODES:
            return model
        del copy.graph.node[:]
        copy.graph.node.extend(nodes)
        model = copy


def _taken(model: onnx.ModelProto) -> tuple[int, onnx.GraphProto] | None:
    constants = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.output:
            constants.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
    for index, node in enumerate(model.graph.node):
        if node.op_type != "If" or node.domain not in PLAIN or not node.input or node.input[0] not in constants:
            continue
        condition = array_of(constants[node.input[0]], None).reshape(-1)
        wanted = "then_branch" if condition.size == 1 and condition[0] else "else_branch"
        branch = next((a.g for a in node.attribute if a.name == wanted), None)
        if branch is not None and len(branch.output) == len(node.output):
            return index, branch
    return None


def _inlined(
    model: onnx.ModelProto, branch: onnx.GraphProto, node: onnx.NodeProto, prefix: str
) -> list[onnx.NodeProto]:
    """The nodes of a branch: what it makes has names of its own, what it reads from outside stays."""
    inner = {name for n in branch.node for name in n.output if name} | {t.name for t in branch.initializer}
    names = {name: prefix + name for name in inner}
    results = [entry.name for entry in branch.output]
    made = {name for n in branch.node for name in n.output}
    names |= {name: out for name, out in zip(results, node.output, strict=True) if name in made}
    for tensor in branch.initializer:
        stored = model.graph.initializer.add()
        stored.CopyFrom(tensor)
        stored.name = names[tensor.name]
    nodes = []
    for old in branch.node:
        new = onnx.NodeProto()
        new.CopyFrom(old)
        new.name = prefix + old.name if old.name else ""
        for part in (new.input, new.output):
            for i, name in enumerate(part):
                part[i] = names.get(name, name)
        nodes.append(new)
    passed = [(names.get(name, name), out) for name, out in zip(results, node.output, strict=True)]
    return nodes + [onnx.helper.make_node("Identity", [name], [out]) for name, out in passed if name != out]
