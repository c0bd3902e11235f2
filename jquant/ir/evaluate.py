"""The one evaluation loop. Float, fake-quant and integer meanings differ only in the rule applied at a node."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jquant.ir.graph import is_finite
from jquant.types import Array, Graph, GraphError, InputError, JQuantError, Node

Rule = Callable[..., Array]
Tap = Callable[[str, Array], Array]


def evaluate(graph: Graph, inputs: Mapping[str, Array], rule: Rule, tap: Tap | None = None) -> dict[str, Array]:
    """Evaluates every node in order and returns all values by name.

    Args:
      graph: a valid graph.
      inputs: one array for each graph input.
      rule: `rule(node, *operands) -> value`.
      tap: `tap(name, value) -> value`, called for every graph input and node; what it returns takes the value's place.

    Raises:
      GraphError: whatever a rule raised, with the node, its operator and the operand shapes.
    """
    values: dict[str, Array] = {}
    for entry in graph.inputs:
        values[entry.name] = inputs[entry.name] if tap is None else tap(entry.name, inputs[entry.name])
    evaluate_nodes(graph.nodes, values, rule, tap)
    return values


def evaluate_nodes(nodes: Iterable[Node], values: dict[str, Array], rule: Rule, tap: Tap | None = None) -> None:
    """Adds the values of some nodes to those of their operands, as `evaluate`."""
    for node in nodes:
        operands = [values[name] for name in node.inputs]
        try:
            value = rule(node, *operands)
            values[node.name] = value if tap is None else tap(node.name, value)
        except JQuantError as error:
            raise type(error)(f"{describe(node, operands)}: {error}") from error
        except (TypeError, ValueError, IndexError, KeyError, ZeroDivisionError) as error:
            raise GraphError(f"{describe(node, operands)}: {error}") from error


def describe(node: Node, operands: Sequence[Array]) -> str:
    shapes = ", ".join(f"{name} {v.dtype}{list(v.shape)}" for name, v in zip(node.inputs, operands, strict=True))
    return f"node {node.name!r} ({type(node.op).__name__}) on {shapes or 'no operands'}"


def bind_inputs(graph: Graph, inputs: Sequence[Any], dtypes: Mapping[str, str] | None = None) -> dict[str, Array]:
    """Checks positional inputs against the graph and names them.

    Raises:
      InputError: wrong number, shape, dtype, unequal batches, or (unless traced) values that are not finite.
    """
    if len(inputs) != len(graph.inputs):
        names = ", ".join(i.name for i in graph.inputs)
        raise InputError(f"the graph has {len(graph.inputs)} inputs ({names}), {len(inputs)} were given")
    bound, batch = {}, None
    for entry, array in zip(graph.inputs, inputs, strict=True):
        want = (dtypes or {}).get(entry.name, entry.dtype)
        if not hasattr(array, "dtype") or not hasattr(array, "shape"):
            raise InputError(f"input {entry.name!r} must be an array, not {type(array).__name__}")
        if str(array.dtype) != want:
            raise InputError(f"input {entry.name!r} is {array.dtype}, expected {want}; convert it before the call")
        fits = len(array.shape) == len(entry.shape) and all(
            n is None or n == m for n, m in zip(entry.shape, array.shape, strict=True)
        )
        if not fits:
            shown = ", ".join("batch" if n is None else str(n) for n in entry.shape)
            raise InputError(f"input {entry.name!r} has shape {list(array.shape)}, expected [{shown}]")
        if entry.shape and entry.shape[0] is None:
            if batch is not None and array.shape[0] != batch:
                raise InputError(f"input {entry.name!r} has batch {array.shape[0]}, other inputs {batch}")
            batch = array.shape[0]
            if batch == 0:
                raise InputError(f"input {entry.name!r} has an empty batch")
        if jnp.issubdtype(array.dtype, jnp.floating) and not is_finite(array):
            raise InputError(f"input {entry.name!r} contains NaN or infinite values; check the preprocessing")
        bound[entry.name] = array
    return bound
