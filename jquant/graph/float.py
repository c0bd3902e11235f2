"""The float meaning of a graph, and the shape and dtype that every value has in it."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from jquant.graph.checks import check_graph, check_params
from jquant.graph.evaluate import bind_inputs, evaluate
from jquant.graph.operator import eval_float
from jquant.types import Array, Graph, Node, Op, Params


def float_rule(
    graph: Graph, params: Params, rng: Array | None = None, positions: Mapping[str, Any] | None = None
) -> Callable[..., Array]:
    """The rule of the float meaning. With `rng`, stochastic operators are active, each with a key of its own.

    The key is made of a node's position, in the graph or as `positions` has it.
    """
    if positions is None:
        positions = positions_of(graph) if rng is not None else {}

    def rule(node: Node, *operands: Array) -> Array:
        key = {"rng": jax.random.fold_in(rng, positions[node.name])} if rng is not None and node.op.stochastic else {}
        return eval_float(node.op, *operands, **{role: params[k] for role, k in node.params.items()}, **key)

    return rule


def positions_of(graph: Graph) -> dict[str, int]:
    return {node.name: i for i, node in enumerate(graph.nodes)}


def evaluate_float(graph: Graph, params: Params, *inputs: Array) -> tuple[Array, ...]:
    """Runs a float graph as imported.

    Args:
      graph: a valid graph, in its framework's layout.
      params: {name: float32 array}.
      *inputs: one array for each graph input.

    Returns:
      The outputs, in order.

    Raises:
      GraphError: no graph, or parameters that are missing or no float32.
    """
    check_graph(graph)
    check_params(graph, params)
    values = evaluate(graph, bind_inputs(graph, inputs), float_rule(graph, params))
    return tuple(values[name] for name in graph.outputs)


def value_shapes(graph: Graph, params: Mapping[str, Any], batch: int = 2) -> dict[str, tuple[int, ...]]:
    """The shape of every value at a batch size, without computing anything."""
    return {name: value.shape for name, value in value_types(graph, params, batch).items()}


def value_types(graph: Graph, params: Mapping[str, Any], batch: int = 2) -> dict[str, jax.ShapeDtypeStruct]:
    """The shape and the float meaning's dtype of every value. What is not float32 is exact: a mask, index or pixel."""
    inputs: dict[str, Any] = {
        i.name: jax.ShapeDtypeStruct(tuple(batch if n is None else n for n in i.shape), jnp.dtype(i.dtype))
        for i in graph.inputs
    }
    shapes = {key: tuple(jnp.shape(params[key])) for key in graph.param_names}

    def rule(node: Node, *operands: Any) -> Any:
        kinds = tuple((tuple(x.shape), str(x.dtype)) for x in operands)
        return result_type(node.op, kinds, tuple((role, shapes[key]) for role, key in node.params.items()))

    types: dict[str, Any] = evaluate(graph, inputs, rule)
    return types


@lru_cache(maxsize=2**14)
def result_type(op: Op, operands: tuple[Any, ...], params: tuple[Any, ...]) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a result by the float rule, without computing anything.

    Args:
      op: the operator.
      operands: a (shape, dtype name) each.
      params: (role, shape) each; they are float32.
    """
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in operands]
    weights = {role: jax.ShapeDtypeStruct(shape, jnp.float32) for role, shape in params}
    kind = jax.eval_shape(lambda a, w: eval_float(op, *a, **w), arrays, weights)
    return jax.ShapeDtypeStruct(kind.shape, kind.dtype)
