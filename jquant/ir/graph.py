"""Checks graphs and their parameters."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.text import did_you_mean
from jquant.types import CalibrationError, Graph, GraphError, Op


def validate(graph: Graph, params: Mapping[str, Any] | None = None) -> Graph:
    """Returns the graph if it is well formed, and with `params` if they are complete, float32 and finite.

    Raises:
      GraphError: a name used twice, an operand used before it is made, an output nobody makes, a missing parameter.
      CalibrationError: a parameter that is not finite.
    """
    seen: set[str] = set()
    for value in graph.values:
        if not value or value in seen:
            raise GraphError(f"the name {value!r} is {'used twice' if value else 'empty'}; every value needs its own")
        seen.add(value)
    made = {i.name for i in graph.inputs}
    for node in graph.nodes:
        if not isinstance(node.op, Op):
            raise GraphError(f"node {node.name!r}: {node.op!r} is not an operator (a subclass of jq.Op)")
        for operand in node.inputs:
            if operand not in made:
                state = "used before it is made" if operand in seen else f"unknown{did_you_mean(operand, seen)}"
                raise GraphError(f"node {node.name!r} ({type(node.op).__name__}): operand {operand!r} is {state}")
        made.add(node.name)
    if not graph.outputs:
        raise GraphError("the graph has no outputs")
    for output in graph.outputs:
        if output not in made:
            raise GraphError(f"output {output!r} is made by no node{did_you_mean(output, made)}")
    if params is not None:
        check_params(graph, params)
    return graph


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


def is_finite(array: Any) -> bool:
    """Whether all values are finite; True for a traced array, whose values nobody knows yet."""
    if isinstance(array, jax.core.Tracer):
        return True
    if isinstance(array, np.ndarray):
        return bool(np.isfinite(array).all())
    with jax.ensure_compile_time_eval():  # the array may be a constant of somebody's jit
        return bool(jnp.isfinite(array).all())
