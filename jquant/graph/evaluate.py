"""The one evaluation loop. Float, fake-quant and integer meanings differ only in the rule applied at a node."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import permutations
from typing import Any

import jax.numpy as jnp

from jquant.graph.checks import is_finite
from jquant.graph.structure import input_leaves
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


def _way_to_give(graph: Graph, inputs: Sequence[Any]) -> str:
    """What to write where the number of inputs is another."""
    if len(inputs) < len(graph.inputs):
        wanted = [entry.name for entry in graph.inputs]
        if inputs and isinstance(inputs[0], Mapping):
            return f"; they go by position: ({', '.join(f'batch[{name!r}]' for name in wanted)})"
        return f"; a batch is a tuple of them: ({', '.join(wanted)})"
    names = ", ".join(f"x{i}" for i in range(len(graph.inputs))) if len(graph.inputs) > 1 else "x"
    item = f"({names})" if len(graph.inputs) > 1 else names
    return f"; give inputs only, without labels: ({item} for {names}, y in loader)"


def host_array(value: Any, where: str) -> Any:
    """A torch tensor of the CPU as a numpy array of the same memory; anything else as it is.

    Raises:
      InputError: a tensor of another device, or of a dtype that numpy lacks.
    """
    if not type(value).__module__.startswith("torch") or not hasattr(value, "numpy"):
        return value
    if str(value.device) != "cpu":
        raise InputError(f"{where} is a torch tensor on {value.device}; give it as tensor.cpu()")
    try:
        return value.detach().numpy()
    except (TypeError, RuntimeError) as error:
        raise InputError(f"{where} is a torch tensor of {value.dtype}: {error}; convert it to float32") from error


def describe(node: Node, operands: Sequence[Array]) -> str:
    shapes = ", ".join(f"{name} {v.dtype}{list(v.shape)}" for name, v in zip(node.inputs, operands, strict=True))
    return f"node {node.name!r} ({type(node.op).__name__}) on {shapes or 'no operands'}"


def bind_inputs(graph: Graph, inputs: Sequence[Any], dtypes: Mapping[str, str] | None = None) -> dict[str, Array]:
    """Checks positional inputs, flat or nested as the model takes them, against the graph and names them.

    Raises:
      InputError: wrong number, shape, dtype, unequal batches, or (unless traced) values that are not finite.
    """
    inputs = input_leaves(graph, inputs)
    if len(inputs) != len(graph.inputs):
        names = ", ".join(i.name for i in graph.inputs)
        raise InputError(
            f"the graph has {len(graph.inputs)} inputs ({names}), {len(inputs)} were given{_way_to_give(graph, inputs)}"
        )
    bound, batch = {}, None
    for entry, given in zip(graph.inputs, inputs, strict=True):
        array = host_array(given, f"input {entry.name!r}")
        want = (dtypes or {}).get(entry.name, entry.dtype)
        if not hasattr(array, "dtype") or not hasattr(array, "shape"):
            raise InputError(f"input {entry.name!r} must be an array, not {type(array).__name__}")
        if str(array.dtype) != want:
            raise InputError(f"input {entry.name!r} is {array.dtype}, expected {want}; {_conversion(array, want)}")
        fits = len(array.shape) == len(entry.shape) and all(
            n is None or n == m for n, m in zip(entry.shape, array.shape, strict=True)
        )
        if not fits:
            shown = ", ".join("batch" if n is None else str(n) for n in entry.shape)
            hint = _axes_hint(entry.shape, array.shape)
            raise InputError(f"input {entry.name!r} has shape {list(array.shape)}, expected [{shown}]{hint}")
        if entry.shape and entry.shape[0] is None:
            if batch is not None and array.shape[0] != batch:
                raise InputError(f"input {entry.name!r} has batch {array.shape[0]}, other inputs {batch}")
            batch = array.shape[0]
            if batch == 0:
                raise InputError(f"input {entry.name!r} has an empty batch")
        if jnp.issubdtype(array.dtype, jnp.floating) and not is_finite(array):
            raise InputError(f"input {entry.name!r} contains NaN or infinite values; check the preprocessing")
        bound[entry.name] = array if array is given else jnp.asarray(array)
    return bound


def _conversion(array: Any, want: str) -> str:
    """The step from an array of another dtype to the input."""
    kind = jnp.dtype(array.dtype).kind if want == "float32" else ""
    if kind in ("i", "u"):
        return "make it what the model was trained on, such as (x.astype(np.float32) / 255 - mean) / std"
    if kind == "f":
        return "convert it: x.astype(np.float32)"
    if want == "int32":
        return "convert it: x.astype(np.int32), of torch x.int()"
    return "convert it before the call"


def _axes_hint(wanted: tuple[int | None, ...], shape: tuple[int, ...]) -> str:
    """The step to the wanted shape where the batch axis is missing, or the axes are in another order."""

    def fits(found: tuple[int, ...]) -> bool:
        return len(found) == len(wanted) and all(n in (None, m) for n, m in zip(wanted, found, strict=True))

    if wanted[:1] == (None,) and fits((1, *shape)):
        return "; the batch axis is missing: x[None]"
    if wanted[:1] == (None,) and 2 < len(shape) == len(wanted) < 7:
        for rest in permutations(range(1, len(shape))):
            if fits((shape[0], *(shape[i] for i in rest))):
                return f"; the axes are in another order: x.transpose{(0, *rest)}"
    if wanted[:1] == (None,) and 1 < len(shape) == len(wanted):
        return "; the batch alone is free: pad or resize to the size of the import, or import with this one"
    return ""
