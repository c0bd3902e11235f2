"""Programs that write into parts of tensors, as programs without a change in place.

torch does the rewriting: `x[:, 0] = y` becomes a `select_scatter`, and every other view of x is read again from the
result. It also takes dropout in eval mode out, which training needs; a marked call keeps its place.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch.fx import Node as FxNode

from .repeated import writes
from .torch_functions import KEPT_DROPOUT

aten = torch.ops.aten
_DROPOUT = {aten.dropout.default, aten.dropout_.default}
_OTHER_DROPOUT = {aten.feature_dropout.default, aten.alpha_dropout.default, aten.feature_alpha_dropout.default}


def without_changes_in_place(program: Any) -> Any | None:
    """The program in functional form, or None: it changes nothing in place, or torch cannot rewrite it."""
    calls = [n for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    lost = any(n.target in _OTHER_DROPOUT and n.args[1] != 0 for n in calls)  # of which none but dropout is kept
    if lost or not any(writes(n) and n.target not in _DROPOUT for n in calls):
        return None
    program = copy.copy(program)
    program._graph_module = copy.deepcopy(program.graph_module)
    for node in program.graph.nodes:
        if node.target in _DROPOUT:
            _mark(node)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            found = program.run_decompositions(decomp_table={})
    except Exception:  # torch raises a dozen types; the caller says what cannot be read
        return None
    kinds = {spec.kind.name for spec in found.graph_signature.output_specs}
    return found if kinds <= {"USER_OUTPUT", "USER_INPUT_MUTATION"} else None  # it changes parameters or buffers


def _mark(node: FxNode) -> None:
    """An operator that torch leaves as it is in the place of dropout. In place, it is copied back."""
    rate = node.args[1]
    was_in_place = node.target is aten.dropout_.default
    if not was_in_place:
        node.target, node.args, node.kwargs = KEPT_DROPOUT, (node.args[0], rate), {}
        return
    with node.graph.inserting_before(node):
        kept = node.graph.call_function(KEPT_DROPOUT, (node.args[0], rate))
        kept.meta = dict(node.meta)
    node.target, node.args, node.kwargs = aten.copy_.default, (node.args[0], kept), {}
