"""Checks graphs and their parameters."""

import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from math import inf, isfinite
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.graph.operator import eval_float
from jquant.graph.structure import check_structures, output_names
from jquant.text import did_you_mean
from jquant.types import EXACT_DTYPES, CalibrationError, Graph, GraphError, Input, Node, Op


def validate(graph: Graph, params: Mapping[str, Any] | None = None) -> Graph:
    """Returns the graph if it is well formed, and with `params` if they are complete, float32 and finite.

    Raises:
      GraphError: no `Graph`, a name used twice, an operand used before it is made, more or fewer operands than the
        operator has, an input of a dtype that no graph has, an output that no node makes, a missing parameter.
      CalibrationError: a parameter that is not finite.
    """
    check_graph(graph)
    seen: set[str] = set()
    for value in graph.values:
        if not value or value in seen:
            raise GraphError(f"the name {value!r} is {'used twice' if value else 'empty'}; every value needs its own")
        seen.add(value)
    made = {i.name for i in graph.inputs}
    for node in graph.nodes:
        if not isinstance(node.op, Op):
            raise GraphError(f"node {node.name!r}: {node.op!r} is not an operator (a subclass of jq.ops.Op)")
        for operand in node.inputs:
            if operand not in made:
                state = "used before it is made" if operand in seen else f"unknown{did_you_mean(operand, seen)}"
                raise GraphError(f"node {node.name!r} ({type(node.op).__name__}): operand {operand!r} is {state}")
        check_operands(node)
        made.add(node.name)
    for entry in graph.inputs:
        _check_input(entry)
    if not graph.outputs:
        raise GraphError("the graph has no outputs")
    for output in graph.outputs:
        if output not in made:
            raise GraphError(f"output {output!r} is made by no node{did_you_mean(output, made)}")
    check_structures(graph)
    if params is not None:
        check_params(graph, params)
    return graph


def check_operands(node: Node) -> None:
    """Operands and parameters are those of the operator's float rule; one with a fused addend has one operand more.

    Raises:
      GraphError: more or fewer.
    """
    where = f"node {node.name!r} ({type(node.op).__name__})"
    least, most, required, known = _signature(eval_float.dispatch(type(node.op)))
    addend = getattr(node.op, "addend", None)
    if isinstance(addend, bool):
        least = most = 1 + addend
    if not least <= len(node.inputs) <= most:
        wanted = f"{least}" if least == most else f"{least} or more" if most == inf else f"{least} to {most:.0f}"
        raise GraphError(f"{where}: {len(node.inputs)} operands were given, and it has {wanted}")
    if missing := required - set(node.params):
        raise GraphError(f"{where}: the parameter {min(missing)!r} is missing")
    if known is not None and (unknown := set(node.params) - known):
        raise GraphError(f"{where}: it has no parameter {min(unknown)!r}{did_you_mean(min(unknown), known)}")


@cache
def _signature(rule: Callable[..., Any]) -> tuple[int, float, frozenset[str], frozenset[str] | None]:
    """Least and largest number of operands, required and known parameters of a float rule; None: any parameter."""
    parameters = [*inspect.signature(rule).parameters.values()][1:]
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    by_role = {p.name: p.default is p.empty for p in parameters if p.kind == p.KEYWORD_ONLY}
    most = inf if any(p.kind == p.VAR_POSITIONAL for p in parameters) else len(by_position)
    known = None if any(p.kind == p.VAR_KEYWORD for p in parameters) else frozenset(by_role)
    least = sum(p.default is p.empty for p in by_position)
    return least, most, frozenset(role for role, required in by_role.items() if required), known


def _check_input(entry: Input) -> None:
    if entry.dtype not in ("float32", *EXACT_DTYPES):
        known = ", ".join(("float32", *EXACT_DTYPES))
        raise GraphError(f"input {entry.name!r} is {entry.dtype!r}; inputs are one of {known}")
    if not all(size is None or 0 <= size < 2**31 for size in entry.shape):
        raise GraphError(f"input {entry.name!r} has the shape {entry.shape}; sizes are 0 to 2^31 - 1, or None")


def check_lengths(op: Op, *names: str, positive: Sequence[str] = ()) -> None:
    """Attributes that have one entry an axis have as many as each other; those that count are positive.

    Raises:
      GraphError: with the attribute.
    """
    kind, (first, *others) = type(op).__name__, names
    for name in others:
        if len(getattr(op, name)) != len(getattr(op, first)):
            raise GraphError(f"{kind}: {name} {getattr(op, name)} and {first} {getattr(op, first)} differ in length")
    for name in positive:
        if min(getattr(op, name), default=1) < 1:
            raise GraphError(f"{kind}: {name} {getattr(op, name)} must be positive")


def check_epsilon(op: Any) -> None:
    """The epsilon of a normalization is finite and not negative.

    Raises:
      GraphError: with the value.
    """
    if not (op.epsilon >= 0 and isfinite(op.epsilon)):
        raise GraphError(f"{type(op).__name__}: epsilon {op.epsilon} must be finite and not negative")


def check_graph(graph: Any) -> None:
    """Raises GraphError for something else than a `Graph`, and says how to get one from it."""
    if isinstance(graph, Graph):
        return
    kind = type(graph).__name__
    whole = "and that of a plan is fused already: keep what from_torch, from_onnx or jq.trace returned"
    ways = {"Plan": whole, "Program": whole, "ExportedProgram": "make one with jquant_converters.from_torch"}
    way = ways.get(kind, "make one with jquant_converters.from_torch or from_onnx, or with jq.trace")
    raise GraphError(f"a float jq.Graph is needed, not {kind}; {way}")


def check_params(graph: Graph, params: Mapping[str, Any]) -> None:
    """Every parameter is there, float32 and (where it is not traced) finite."""
    for node in graph.nodes:
        for role, key in node.params.items():
            if key not in params:
                hint = did_you_mean(key, params)
                raise GraphError(
                    f"node {node.name!r} ({type(node.op).__name__}): parameter {key!r} ({role}) is missing{hint}"
                )
    for key in graph.param_names:
        array = params[key]
        if getattr(array, "dtype", None) != jnp.float32:
            raise GraphError(
                f"parameter {key!r} is {getattr(array, 'dtype', type(array).__name__)}; convert it to float32"
            )
        if not is_finite(array):
            raise CalibrationError(
                f"parameter {key!r} contains NaN or infinite values; the float model is broken, or was loaded wrongly"
            )


def is_on_host(array: jax.Array) -> bool:
    """Whether numpy reads the memory of a JAX array without moving or compiling anything."""
    return len(array.sharding.device_set) == 1 and array.is_fully_addressable and array.platform() == "cpu"


def deployed_outputs(graph: Graph, outputs: Sequence[str] | str | None) -> tuple[str, ...]:
    """The names of the deployed outputs, all for None. Behind an output there may be a permutation, `name.to_first`.

    Raises:
      GraphError: none, or one that the graph does not have, with near names.
    """
    if outputs is None:
        return graph.outputs
    chosen, named = [], output_names(graph)
    for given in [outputs] if isinstance(outputs, str) else outputs:
        name = named.get(given, given)
        final = name if name in graph.outputs else f"{name}.to_first"
        if final not in graph.outputs:
            near = did_you_mean(str(name), [*named, *graph.outputs])
            known = ", ".join(f"{value} ({path})" for path, value in named.items()) or ", ".join(graph.outputs)
            raise GraphError(f"{name!r} is no output of the graph; outputs: {known}{near}")
        chosen.append(final)
    if not chosen:
        raise GraphError(f"outputs is empty; name at least one of {', '.join(graph.outputs)}")
    return tuple(chosen)


def deployed(graph: Graph, outputs: Sequence[str] | str | None) -> Graph:
    """The graph with the deployed outputs alone; as it is for None."""
    if outputs is None:
        return graph
    return replace(graph, outputs=deployed_outputs(graph, outputs), gives=None)


# {id: array of JAX that was found finite}. Such an array never changes, so that one look is enough: parameters and
# scales are looked at once, and not in each call.
_FINITE: dict[int, weakref.ref[Any]] = {}


def is_finite(array: Any) -> bool:
    """Whether all values are finite; True for a traced array, whose values are not known yet."""
    if isinstance(array, jax.core.Tracer):
        return True
    if isinstance(array, np.ndarray | np.generic):
        return bool(np.isfinite(array).all())
    key = id(array)
    known = _FINITE.get(key)
    if known is not None and known() is array:
        return True
    if is_on_host(array):
        finite = bool(np.isfinite(np.asarray(array)).all())
    else:
        with jax.ensure_compile_time_eval():  # the array may be a constant of somebody's jit
            finite = bool(jnp.isfinite(array).all())
    if finite:
        _FINITE[key] = weakref.ref(array, lambda gone: _forget(key, gone))
    return finite


def _forget(key: int, gone: weakref.ref[Any]) -> None:
    if _FINITE.get(key) is gone:  # another array may have the id by now
        del _FINITE[key]
