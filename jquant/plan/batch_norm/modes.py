"""How each batch norm is kept for training: chosen in `prepare`, checked, and changed later."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from jquant.config.qconfig import matches
from jquant.ops.batch_norm import BatchNorm, BatchNormMode
from jquant.ops.conv import ConvTranspose
from jquant.plan.batch_norm.fold import Layer, kept_batch_norm, kept_nodes
from jquant.text import did_you_mean, near_or_known
from jquant.types import Graph, Model, Node, Plan, QConfigError, QuantSpec

BatchNormHandling = Literal["fold", "live", "frozen", "reverse_fold"]
HANDLINGS = ("fold", "live", "frozen", "reverse_fold")
Statistics = Literal["batch", "running"]  # of kept batch norms in training


def kept_batch_norms(
    graph: Graph, batch_norm: BatchNormHandling | Mapping[str, BatchNormHandling]
) -> dict[str, BatchNormMode]:
    """{batch norm: how it is kept}."""
    rules = {"*": batch_norm} if isinstance(batch_norm, str) else dict(batch_norm)
    norms = {node.name: node.op for node in graph.nodes if isinstance(node.op, BatchNorm) and node.op.running}
    found: dict[str, BatchNormMode] = {}
    for pattern, mode in rules.items():
        if mode not in HANDLINGS:
            raise QConfigError(
                f"batch_norm {mode!r}; known: {', '.join(HANDLINGS)}{did_you_mean(str(mode), HANDLINGS)}"
            )
        names = [name for name in norms if matches(pattern, name, "BatchNorm")]
        if not names and not isinstance(batch_norm, str):
            raise QConfigError(f"batch_norm rule {pattern!r} matches no batch norm{near_or_known(pattern, norms)}")
        shared = {graph.by_name[name].params["running_mean"] for name in names}
        names = [name for name in norms if graph.by_name[name].params["running_mean"] in shared]  # every call of each
        for name in names:
            found.pop(name, None)
            if mode != "fold":
                found[name] = mode
    for name, mode in found.items():
        if mode != "frozen" and not 0 < norms[name].momentum <= 1:
            raise QConfigError(
                f"batch norm {name!r} has the momentum {norms[name].momentum} (which momentum=None of torch is, "
                "too: an average over all batches): running statistics would not follow the batches; give the module a "
                "momentum such as 0.1, or keep it 'frozen'"
            )
    return found


def check_kept(graph: Graph, weights: Mapping[str, QuantSpec]) -> None:
    """Raises QConfigError where a kept batch norm could not be folded into the integers that training sees."""
    readers: dict[str, set[tuple[str, ...]]] = {}
    for node in graph.nodes:
        norm = kept_batch_norm(node)
        spec = weights.get(node.params["weight"]) if norm is not None else None
        if norm is None or spec is None or spec.is_float:
            continue
        why, instead = "", "'reverse_fold' or 'fold'"
        if norm.scaled:
            roles = readers.setdefault(node.params["weight"], set())
            roles.add(tuple(key for role, key in node.params.items() if role.startswith("norm_")))
            if len(roles) > 1:
                why, instead = (
                    "its weight is shared by layers with other batch norms, and would need two scales",
                    "'fold'",
                )
        elif spec.scale_form == "pow2":
            why = "folded, its weight scale would be no power of two"
        elif spec.fixed_scale is not None:
            why = "folded, its weight would not have the fixed scale"
        elif isinstance(node.op, ConvTranspose) and node.op.groups > 1:
            why = "the groups of a transposed convolution share their weight scales, and its batch norm splits them"
        if why:
            raise QConfigError(
                f"node {node.name!r} ({type(node.op).__name__}) cannot keep its batch norm so: {why}; use {instead}"
            )


def with_exact_ones(graph: Graph, weights: Mapping[str, QuantSpec]) -> dict[str, QuantSpec]:
    """The weights, those of a batch norm without a layer (ones) at a fixed scale, which makes them exact."""
    found = dict(weights)
    for node in graph.nodes:
        norm, spec = kept_batch_norm(node), weights.get(node.params.get("weight", ""))
        if norm is not None and norm.alone and not norm.scaled and spec is not None and not spec.is_float:
            found[node.params["weight"]] = replace(spec, fixed_scale=1 / spec.range[1])
    return found


def set_batch_statistics(model: Model, statistics: Statistics, names: Sequence[str] = ("*",)) -> Model:
    """The model with other statistics for its kept batch norms in training: "running" freezes them, "batch" frees them.

    Parameters, scales and their names stay as they are, so training goes on with the state that there is.

    Args:
      model: prepared with `batch_norm` "live", "frozen" or "reverse_fold".
      statistics: "batch" or "running".
      names: patterns as in a qconfig, on the names of nodes.

    Raises:
      QConfigError: another word, or a pattern that matches no node that keeps a batch norm.
    """
    return model.replace(plan=with_statistics(model.plan, statistics, names))


def with_statistics(plan: Plan, statistics: Statistics, names: Sequence[str] = ("*",)) -> Plan:
    """The plan of `set_batch_statistics`."""
    if statistics not in ("batch", "running"):
        raise QConfigError(f"statistics must be 'batch' or 'running', not {statistics!r}")
    kept = kept_nodes(plan)
    for pattern in names:
        if not any(matches(pattern, node.name, type(node.op).__name__) for node in kept):
            known = [node.name for node in kept]
            raise QConfigError(
                f"{pattern!r} matches no node that keeps a batch norm{near_or_known(pattern, known)}"
                + ("" if kept else "; this plan has none: prepare with batch_norm='live', for example")
            )

    def changed(node: Node) -> Node:
        norm = kept_batch_norm(node)
        if norm is None or not any(matches(p, node.name, type(node.op).__name__) for p in names):
            return node
        assert isinstance(node.op, Layer)
        return replace(node, op=replace(node.op, batch_norm=replace(norm, statistics=statistics)))

    return replace(plan, graph=replace(plan.graph, nodes=tuple(map(changed, plan.graph.nodes))))
