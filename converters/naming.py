"""From drafts to a graph: every node and parameter gets its name.

Names go to layers first, then to parameters, then to functional calls; inputs take what is left.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import torch
from torch.fx import Node as FxNode
from torch.utils import _pytree as pytree

from jquant.drafts.graphs import simplified
from jquant.drafts.names import snake_case, unique
from jquant.graph.checks import validate
from jquant.graph.passes import prune
from jquant.graph.structure import structure_from
from jquant.types import Array, ConversionError, FrozenMap, Graph, Input, Node, Op, Params, Structure

from .drafts import Draft, Param
from .habits import mark_of
from .index_arithmetic import exact_indices, types_of
from .keys import key_of_part

Names = Mapping[Draft, str]
Keys = dict[Param, str]  # of the constants of the code


def path_of(node: FxNode) -> str:
    """The path of the module that makes a call; "" at the top level."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0] if stack else ""


def _structures(program: Any, graph: Graph) -> tuple[Structure | None, Structure | None]:
    """How the model nests its arguments and its result."""

    def arguments(leaves: list[int]) -> Any:
        positional, named = pytree.tree_unflatten(leaves, program.call_spec.in_spec)
        return (*positional, named) if named else positional

    def result(leaves: list[int]) -> Any:
        of_tensors = iter(leaves)
        every = [None if none else next(of_tensors) for none in nones]
        return pytree.tree_unflatten(every, program.call_spec.out_spec)

    nones = _nones(program)
    specs, inputs, outputs = program.call_spec, len(graph.inputs), len(graph.outputs)
    takes = structure_from(arguments, inputs, arguments=True) if specs.in_spec.num_leaves == inputs else None
    return takes, structure_from(result, outputs) if specs.out_spec.num_leaves == len(nones) else None


def _nones(program: Any) -> list[bool]:
    """Which of the model's results are None: in torch they are leaves, and a graph has no output for them."""
    output = next(n for n in program.graph.nodes if n.op == "output")
    specs = program.graph_signature.output_specs
    pairs = zip(specs, output.args[0], strict=True)
    return [value is None for spec, value in pairs if spec.kind.name == "USER_OUTPUT"]


def name_graph(
    module: torch.nn.Module | None,
    program: Any,
    drafts: Sequence[Draft],
    inputs: Sequence[Input],
    outputs: list[Draft | Input],
) -> tuple[Graph, dict[str, Array]]:
    """The graph of what the outputs depend on, and its params.

    Args:
      module: what was exported; None where only the program is known.
      program: the exported program, for its modules and the keys of its state.
      drafts, inputs, outputs: what was read of it, in order.
    """
    drafts = _read_by(outputs, drafts)
    taken: set[str] = set()
    known = {*program.state_dict, *program.constants}  # no constant of the code takes one of these keys
    layers = _layers(module, program, drafts)
    names, keys = _name_drafts(layers, drafts, taken, known)
    calls = {draft: path for draft in layers if (path := path_of(draft.source)) != names[draft]}
    _report_reuse(module, names)
    entries = {entry.name: replace(entry, name=unique(entry.name, taken)) for entry in inputs}
    params: dict[str, Array] = {}

    def name_of(value: Draft | Input) -> str:
        return entries[value.name].name if isinstance(value, Input) else names[value]

    nodes = []
    for draft in drafts:
        roles = _name_params(draft, names[draft], keys, known, params)
        operands = tuple(map(name_of, draft.operands))
        nodes.append(Node(names[draft], draft.op, operands, roles, calls.get(draft, "")))
    graph = prune(Graph(tuple(entries.values()), tuple(nodes), tuple(map(name_of, outputs))))
    takes, gives = _structures(program, graph)
    graph = replace(graph, takes=takes, gives=gives)
    params = {key: params[key] for key in graph.param_names}
    validate(graph, params)
    trained = {spec.target for spec in program.graph_signature.input_specs if spec.kind.name == "PARAMETER"}
    graph, found = simplified(graph, params, fixed=params.keys() - trained, name=_named_by_operator)
    graph, found = _with_views(graph, found, params)
    return exact_indices(graph, lambda: types_of(graph, found), lambda: _widths(names)), dict(found)


def _with_views(graph: Graph, found: Params, params: Params) -> tuple[Graph, Params]:
    """Parameters that an operator reads in another shape get the key of a view, so that they find their way back."""
    renamed: dict[str, str] = {}
    for key in found.keys() & params.keys():
        if found[key].shape != params[key].shape:
            whole = torch.empty(params[key].shape)
            renamed[key] = key_of_part(key, whole, whole.reshape(found[key].shape)) or key
    if not renamed:
        return graph, found
    nodes = []
    for node in graph.nodes:
        roles = {role: renamed.get(key, key) for role, key in node.params.items()}
        nodes.append(replace(node, params=FrozenMap(roles)))
    return replace(graph, nodes=tuple(nodes)), {renamed.get(key, key): array for key, array in found.items()}


def _named_by_operator(name: str, op: Op) -> str:
    """A call's name, with the operator in the place of the function of torch."""
    path, dot, _ = name.rpartition(".")
    return f"{path}{dot}{snake_case(type(op).__name__)}"


def _widths(names: Names) -> dict[str, str]:
    """{value: its integer dtype in torch} of calls; the helpers of a call count with the widest."""
    found = {}
    for draft, name in names.items():
        value = draft.source.meta.get("val")
        if not draft.label and isinstance(value, torch.Tensor) and not value.is_floating_point():
            found[name] = str(value.dtype).removeprefix("torch.")
    return found


def _read_by(outputs: list[Draft | Input], drafts: Sequence[Draft]) -> list[Draft]:
    """Drafts that an output depends on: the others take no names."""
    found: set[Draft] = set()
    wanted = [o for o in outputs if isinstance(o, Draft)]
    while wanted:
        draft = wanted.pop()
        if draft not in found:
            found.add(draft)
            wanted += [o for o in draft.operands if isinstance(o, Draft)]
    return [d for d in drafts if d in found]


# ---------------------------------------------------------------------------------------------------------------------
# Layers: the drafts that have the name of their module


def _layers(module: torch.nn.Module | None, program: Any, drafts: Sequence[Draft]) -> list[Draft]:
    """The drafts that stand for a whole call of a layer."""
    whole = [d for d in drafts if not d.label and d.constant is None]
    calls, last = Counter(_call_of(d.source) for d in whole), {_call_of(d.source): d for d in whole}
    parents = _parents(program)

    def stands_alone(draft: Draft) -> bool:
        call = _call_of(draft.source)
        return calls[call] == 1 or (mark_of(draft.source) != "" and last[call] is draft)  # add_relu ends with relu

    return [d for d in whole if stands_alone(d) and _is_layer(module, parents, d.source)]


def _is_layer(module: torch.nn.Module | None, parents: set[str], node: FxNode) -> bool:
    """Whether a call is by a leaf torch.nn module, by one derived from such, or by what stands for a stub."""
    path = path_of(node)
    if mark_of(node):
        return True
    if module is None:
        kind = str(list(node.meta["nn_module_stack"].values())[-1][1]) if path else ""
        return kind.startswith("torch.nn.modules.") and path not in parents
    try:
        found = module.get_submodule(path)
    except AttributeError:
        return False
    bases = type(found).__mro__
    known = any(b.__module__.startswith("torch.nn.") and b is not torch.nn.Module for b in bases)
    return bool(path) and known and all(name == "parametrizations" for name, _ in found.named_children())


def _parents(program: Any) -> set[str]:
    """The paths of an exported program that have modules below them."""
    stacks = [list((n.meta.get("nn_module_stack") or {}).values()) for n in program.graph.nodes]
    return {entry[0] for stack in stacks for entry in stack[:-1]}


def _call_of(node: FxNode) -> Any:
    """One call of a module: its key in the module stack, which counts the calls of a shared module."""
    stack = list(node.meta.get("nn_module_stack") or {})
    return stack[-1] if stack else ""


# ---------------------------------------------------------------------------------------------------------------------
# Names


def _name_drafts(
    layers: Sequence[Draft], drafts: Sequence[Draft], taken: set[str], known: set[str]
) -> tuple[dict[Draft, str], Keys]:
    constants = [d for d in drafts if d.constant is not None]
    others = [d for d in drafts if d.constant is None]
    names: dict[Draft, str] = {}
    keys: Keys = {}
    later = []
    for draft in layers:  # a later call takes no name that another module has
        path = path_of(draft.source)
        if path in taken:
            later.append(draft)
        else:
            names[draft] = unique(path, taken)
    for draft in later:
        names[draft] = unique(path_of(draft.source), taken)
    for draft in constants:
        if draft.constant is not None and draft.constant.key:
            names[draft] = unique(draft.constant.key, taken)
    for draft in others:
        if draft not in names:
            parts = (path_of(draft.source), _op_name(draft.source), draft.label)
            names[draft] = unique(".".join(p for p in parts if p), taken)
    for draft in constants:
        if draft not in names:
            reader, role = draft.constant_of
            if reader is not None and reader not in names:  # another one took its operands
                reader = next(d for d in others if draft in d.operands)
            names[draft] = unique(f"{names[reader]}.{role}" if reader else "constant", taken)
            if draft.constant is not None:
                keys[draft.constant] = unique(names[draft], known)
    return names, keys


def _name_params(draft: Draft, name: str, keys: Keys, known: set[str], params: dict[str, Array]) -> FrozenMap[str]:
    """{role: key} of a draft; what is new goes into `keys` and `params`."""
    roles = {}
    for role, parameter in draft.params.items():
        key = parameter.key or keys.get(parameter) or unique(f"{name}.{role}", known)
        keys[parameter] = key
        if key not in params:
            params[key] = _to_array(key, parameter.tensor)
        roles[role] = key
    return FrozenMap(roles)


def _report_reuse(module: torch.nn.Module | None, names: Names) -> None:
    """Warns of float functionals that are called at several places."""
    if module is None:
        return
    found: dict[torch.nn.Module, tuple[str, dict[Any, str]]] = {}  # a module may have several paths
    for draft, name in names.items():
        if mark_of(draft.source) == "FunctionalMark":
            path = path_of(draft.source)
            calls = found.setdefault(module.get_submodule(path), (path, {}))[1]
            calls[_call_of(draft.source)] = name
    for path, calls in found.values():
        if len(calls) > 1:
            warnings.warn(
                f"the float functional {path!r} is called at {len(calls)} places; each has a scale of its own "
                f"here, as {', '.join(map(repr, calls.values()))}",
                stacklevel=6,  # the caller of from_torch
            )


def _op_name(node: FxNode) -> str:
    """`aten.add_.Tensor` -> "add"."""
    name: str = node.target._schema.name
    return name.split("::")[-1].strip("_")


def _to_array(key: str, tensor: torch.Tensor) -> Array:
    if tensor.dtype != torch.float32:
        raise ConversionError(f"parameter {key!r} is {tensor.dtype}; convert it to float32 in the model")
    if not bool(torch.isfinite(tensor).all()):
        if bool(torch.isnan(tensor).any()):
            raise ConversionError(f"parameter {key!r} contains NaN; was the checkpoint loaded wrongly?")
        raise ConversionError(
            f"parameter {key!r} contains infinite values, which have no scale. Where it masks scores, give the model a "
            "mask of bool: scores.masked_fill(mask, float('-inf'))"
        )
    return jax.device_put(tensor.detach().cpu().numpy().copy())  # training the module further must not change it
