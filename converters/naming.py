"""From drafts to a graph: every node and parameter gets its name.

Names go to layers first, then to parameters, then to functional calls; inputs take what is left.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import torch
from torch.fx import Node as FxNode

from jquant.ir.graph import validate
from jquant.ir.passes import prune
from jquant.types import Array, ConversionError, FrozenMap, Graph, Input, Node

from .drafts import Draft, Param
from .habits import mark_of

Names = Mapping[Draft, str]
Keys = dict[Param, str]  # of the constants of the code


def path_of(node: FxNode) -> str:
    """The path of the module that makes a call; "" at the top level."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0] if stack else ""


def name_graph(
    module: torch.nn.Module | None, program: Any, drafts: Sequence[Draft], inputs: Sequence[Input], outputs: list[Draft]
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
    names, keys = _name_drafts(_layers(module, program, drafts), drafts, taken, known)
    _report_reuse(module, names)
    entries = {entry.name: replace(entry, name=_unique(entry.name, taken)) for entry in inputs}
    params: dict[str, Array] = {}
    nodes = []
    for draft in drafts:
        roles = _name_params(draft, names[draft], keys, known, params)
        operands = tuple(entries[o.name].name if isinstance(o, Input) else names[o] for o in draft.operands)
        nodes.append(Node(names[draft], draft.op, operands, roles))
    graph = prune(Graph(tuple(entries.values()), tuple(nodes), tuple(names[o] for o in outputs)))
    params = {key: params[key] for key in graph.param_names}
    return validate(graph, params), params


def _read_by(outputs: list[Draft], drafts: Sequence[Draft]) -> list[Draft]:
    """Drafts that an output depends on: the others take no names."""
    found: set[Draft] = set()
    wanted = list(outputs)
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
    return bool(path) and known and not any(True for _ in found.children())


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
    for draft in layers:
        names[draft] = _unique(path_of(draft.source), taken)
    for draft in constants:
        if draft.constant is not None and draft.constant.key:
            names[draft] = _unique(draft.constant.key, taken)
    for draft in others:
        if draft not in names:
            parts = (path_of(draft.source), _op_name(draft.source), draft.label)
            names[draft] = _unique(".".join(p for p in parts if p), taken)
    for draft in constants:
        if draft not in names:
            reader, role = draft.constant_of
            if reader is not None and reader not in names:  # another one took its operands
                reader = next(d for d in others if draft in d.operands)
            names[draft] = _unique(f"{names[reader]}.{role}" if reader else "constant", taken)
            if draft.constant is not None:
                keys[draft.constant] = _unique(names[draft], known)
    return names, keys


def _name_params(draft: Draft, name: str, keys: Keys, known: set[str], params: dict[str, Array]) -> FrozenMap[str]:
    """{role: key} of a draft; what is new goes into `keys` and `params`."""
    roles = {}
    for role, parameter in draft.params.items():
        key = parameter.key or keys.get(parameter) or _unique(f"{name}.{role}", known)
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
                stacklevel=4,  # the caller of from_torch
            )


def _op_name(node: FxNode) -> str:
    """`aten.add_.Tensor` -> "add"."""
    name: str = node.target._schema.name
    return name.split("::")[-1].strip("_")


def _unique(name: str, taken: set[str]) -> str:
    candidates = (name if i == 0 else f"{name}_{i}" for i in range(len(taken) + 1))
    found = next(c for c in candidates if c not in taken)
    taken.add(found)
    return found


def _to_array(key: str, tensor: torch.Tensor) -> Array:
    if tensor.dtype != torch.float32:
        raise ConversionError(f"parameter {key!r} is {tensor.dtype}; convert it to float32 in the model")
    if not bool(torch.isfinite(tensor).all()):
        raise ConversionError(f"parameter {key!r} contains NaN or infinite values; was the checkpoint loaded wrongly?")
    return jnp.array(tensor.detach().cpu().numpy())  # a copy: training the module further must not change it
