"""A float optimizer's state, carried through `prepare` into training with quantization."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jquant.ops.batch_norm import BatchNorm
from jquant.plan.batch_norm import kept_batch_norm
from jquant.plan.fold import eval_batch_norm, scale_outputs
from jquant.text import did_you_mean
from jquant.types import Array, Graph, JQuantError, Model, Node, Op, Params

SECOND_MOMENTS = ("nu", "nu_max", "v")  # fields of optax states that hold squares of gradients


@dataclass(frozen=True)
class Source:
    """Where a parameter of a plan comes from: the float parameter `key`, by new = old * multiplier (+ a constant).

    `multiplier` is [O], for `op`'s output channels, or None for 1. A gradient goes the other way, divided by it.
    """

    key: str
    op: Op | None = None
    multiplier: Array | None = None


def parameter_sources(graph: Graph, params: Params, model: Model) -> dict[str, Source]:
    """{parameter of the plan: where it comes from}: the key map of what `prepare` fused.

    A folded weight comes from the float weight, a folded bias from the batch norm's, or from the layer's where that has
    none. The kernel that a batch norm alone becomes has no source, since its weight moves the folded bias as well.

    Args:
      graph: the float graph that `prepare` was given.
      params: the float parameters.
      model: what `prepare` returned.

    Raises:
      JQuantError: a graph that is not the model's.
    """
    plan = model.plan
    before = graph.by_name
    into: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if isinstance(node.op, BatchNorm):
            into.setdefault(plan.renamed.get(node.name, node.name), []).append(node)
    found: dict[str, Source] = {}
    for node in plan.graph.nodes:
        norms = into.get(node.name, []) if kept_batch_norm(node) is None else []
        if norms:
            found |= _folded(node, before[node.name], norms, params)
        else:
            found |= {key: Source(key) for key in node.params.values() if key in params}
    unknown = [key for key in plan.graph.param_names if key not in found and not key.endswith(".folded_weight")]
    if unknown:
        raise JQuantError(f"{unknown[0]!r} of the plan comes from no parameter of this graph: is it the plan's?")
    return found


def _folded(node: Node, first: Node, norms: list[Node], params: Params) -> dict[str, Source]:
    multiplier: Array | float = 1.0
    for norm in norms:
        multiplier = eval_batch_norm(norm, params)[0] * multiplier
    assert isinstance(multiplier, jax.Array)
    found = {}
    if not isinstance(first.op, BatchNorm):  # alone, its weight moves the folded bias as well
        found[node.params["weight"]] = Source(first.params["weight"], node.op, multiplier)
    bias = node.params.get("bias", "")
    if "bias" in norms[-1].params:
        found[bias] = Source(norms[-1].params["bias"])
    elif "bias" in first.params and not isinstance(first.op, BatchNorm):
        found[bias] = Source(first.params["bias"], None, multiplier)
    return found


def migrate_optimizer_state(graph: Graph, params: Params, state: Any, *, tx: Any, trainable: Model) -> Any:
    """The state of a float optimizer as a state of `tx` on what QAT trains: moments move, schedules start again.

    States of optax that hold moments (`TraceState`, `ScaleByAdamState`, ...) are found by their type, so the new chain
    may differ, `optax.multi_transform` included. A moment of a folded weight w * m is divided by m, a second one by
    m^2; scales and biases that were not there start at 0.

    Args:
      graph, params: the float graph and parameters that `prepare` was given.
      state: the float optimizer's, over {name: array}.
      tx: the optimizer of QAT.
      trainable: what it trains, `TrainState.create(...).trainable`.

    Returns:
      A state for `TrainState.create(..., opt_state=...)`.

    Raises:
      JQuantError: no moments to move, or two states of one type, and nothing says which is meant.
    """
    names = set(graph.param_names)
    old: dict[str, Any] = {}
    for part in _named_tuples(state):
        if any(_is_params(value, names) for value in part):
            kind = type(part).__name__
            if kind in old:
                raise JQuantError(f"the optimizer state has two {kind}: join them first, or start again with tx.init")
            old[kind] = part
    if not old:
        raise JQuantError("the optimizer state holds no moments over the float parameters: start again with tx.init")
    sources, fresh = parameter_sources(graph, params, trainable), tx.init(trainable)
    moved: set[str] = set()

    def move(part: Any) -> Any:
        kind = type(part).__name__
        if not _is_moments(part, old):
            return part
        moved.add(kind)
        pairs = zip(part._fields, part, old[kind], strict=True)
        return type(part)(*(_moved(field, new, known, names, sources) for field, new, known in pairs))

    result = jax.tree.map(move, fresh, is_leaf=lambda part: _is_moments(part, old))
    if not moved:
        raise JQuantError(
            f"the new optimizer has no state like {', '.join(old)}{did_you_mean(next(iter(old)), _kinds(fresh))}: "
            "moments of another kind cannot be moved; start again with tx.init"
        )
    return result


def _moved(field: str, new: Any, old: Any, names: set[str], sources: Mapping[str, Source]) -> Any:
    """A field of a moments state: params-like trees by key, counts as they are."""
    if not _is_params(old, names) or not isinstance(new, Model):
        return old
    power = 2 if field in SECOND_MOMENTS else 1

    def fill(key: str, fresh: Any) -> Any:
        source = sources.get(key)
        if not hasattr(fresh, "shape") or source is None or source.key not in old:
            return fresh  # masked for another optimizer, or new
        moment = jnp.asarray(old[source.key])
        if source.multiplier is not None:
            dead = source.multiplier == 0
            inverse = jnp.where(dead, 0.0, 1 / jnp.where(dead, 1.0, source.multiplier))
            moment = _by_channel(source, moment, inverse**power)
        return moment.reshape(fresh.shape).astype(fresh.dtype)

    return new.replace(params={key: fill(key, fresh) for key, fresh in new.params.items()})


def _by_channel(source: Source, moment: Array, factor: Array) -> Array:
    if source.op is None or moment.ndim == 1:
        return moment * factor
    return scale_outputs(source.op, moment, factor)


def _is_moments(part: Any, old: Mapping[str, Any]) -> bool:
    return isinstance(part, tuple) and hasattr(part, "_fields") and type(part).__name__ in old


def _is_params(value: Any, names: set[str]) -> bool:
    return isinstance(value, Mapping) and bool(value) and set(value) <= names


def _named_tuples(state: Any) -> Iterator[Any]:
    """Every NamedTuple in an optimizer state, outer ones first."""
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        yield state
    if isinstance(state, Model):
        return
    if isinstance(state, tuple | list):
        for part in state:
            yield from _named_tuples(part)
    elif isinstance(state, Mapping):
        for part in state.values():
            yield from _named_tuples(part)


def _kinds(state: Any) -> list[str]:
    return sorted({type(part).__name__ for part in _named_tuples(state)})
