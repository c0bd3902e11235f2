"""The state of a torch optimizer as that of optax, so that its moments move into training with quantization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import torch

from jquant.text import did_you_mean
from jquant.types import Array, ConversionError, Graph

from .keys import view_of

_MOMENTS = {"momentum_buffer": "trace", "exp_avg": "mu", "exp_avg_sq": "nu"}


def optimizer_state_from_torch(state_dict: Mapping[str, Any], names: Sequence[str], graph: Graph) -> tuple[Any, ...]:
    """The moments of SGD, Adam or AdamW as optax keeps them, by the names of the graph's parameters.

    Args:
      state_dict: `optimizer.state_dict()`.
      names: of the parameters in the order in which the optimizer has them: `[n for n, _ in model.named_parameters()]`
        where it was made of `model.parameters()`.
      graph: what `from_torch` made of the model.

    Returns:
      `optax.TraceState` of a momentum, `optax.ScaleByAdamState` of Adam's moments: for
      `jq.training.migrate_optimizer_state`, with a new optimizer that has the same kind.

    Raises:
      ConversionError: no optimizer state, names that do not fit it, moments of some parameters only, or no moments.

    Example:
      moments = optimizer_state_from_torch(optimizer.state_dict(), [n for n, _ in model.named_parameters()], graph)
      opt_state = jq.training.migrate_optimizer_state(graph, params, moments, tx=tx, trainable=state.trainable)
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise ConversionError("no state dict of a torch optimizer: it has no 'state' and 'param_groups'")
    order = [index for group in state_dict["param_groups"] for index in group["params"]]
    names = list(names)
    if len(order) != len(names):
        raise ConversionError(f"the optimizer has {len(order)} parameters, and {len(names)} names were given")
    found: dict[str, dict[str, torch.Tensor]] = {field: {} for field in (*_MOMENTS, "step")}
    for index, name in zip(order, names, strict=True):
        for field, value in state_dict["state"].get(index, {}).items():
            if field in found and value is not None:
                found[field][name] = torch.as_tensor(value)
    moments = {_MOMENTS[field]: _by_key(field, found[field], names, graph) for field in _MOMENTS if found[field]}
    if not moments:
        raise ConversionError("the optimizer state holds no moments: no momentum, or not a step was taken")
    return _as_optax(moments, found["step"])


def _by_key(field: str, moments: Mapping[str, torch.Tensor], names: Sequence[str], graph: Graph) -> dict[str, Array]:
    """{parameter of the graph: its moment}; a part of a packed parameter has that part of the moment."""
    values = {}
    for key in graph.param_names:
        view = view_of(key)
        if view.source not in names:
            continue  # a constant or a statistic, which no optimizer has
        if view.source not in moments:
            near = did_you_mean(view.source, moments)
            raise ConversionError(f"the optimizer has no {field} of {view.source!r}{near}; others have one")
        values[key] = jnp.array(view.of(moments[view.source].detach().cpu().float().contiguous()).numpy())
    if not values:
        raise ConversionError(f"no name is that of a parameter of the graph{did_you_mean(names[0], graph.param_names)}")
    return values


def _as_optax(moments: Mapping[str, dict[str, Array]], steps: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
    import optax

    state: tuple[Any, ...] = ()
    if "trace" in moments:
        state += (optax.TraceState(trace=moments["trace"]),)
    if "mu" in moments and "nu" in moments:
        count = jnp.int32(max((int(step) for step in steps.values()), default=0))
        state += (optax.ScaleByAdamState(count=count, mu=moments["mu"], nu=moments["nu"]),)
    return state
