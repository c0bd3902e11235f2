"""`trace`: a function of params and inputs to a graph and its params, through its jaxpr."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.drafts import values
from jquant.drafts.simplify import evaluation_order, simplify
from jquant.drafts.values import Draft, Entry, Known
from jquant.functions.trace.batch import with_symbolic_batch
from jquant.functions.trace.build import Built, build, evaluate_params
from jquant.functions.trace.names import input_names, leaf_names
from jquant.functions.trace.one_example import check_one_example
from jquant.functions.trace.primitives import TABLE
from jquant.functions.trace.primitives.dropout import check_scaled, meet
from jquant.functions.trace.primitives.named import named_operator
from jquant.functions.trace.reader import Reader
from jquant.graph.checks import validate
from jquant.graph.evaluate import describe
from jquant.graph.float import value_types
from jquant.graph.passes import prune
from jquant.graph.structure import structure_from
from jquant.types import EXACT_DTYPES, Array, ConversionError, Graph, JQuantError


@dataclass(frozen=True, eq=False)
class Traced:
    """A function that was read: its graph, what the graph's params are computed from, and its signature."""

    graph: Graph
    params: Mapping[str, Known]
    leaves: tuple[str, ...]
    outputs: Any  # the tree of the function's result

    def graph_params(self, params: Any) -> dict[str, Array]:
        """The graph's params for a pytree like the one that was traced. Differentiable, and works inside jit."""
        found = dict(zip(self.leaves, jax.tree.leaves(params), strict=True))
        return evaluate_params(dict(self.params), found)


def trace(
    fn: Callable[..., Any], params: Any, *inputs: Any, dynamic_batch: bool = True, check: bool = True
) -> tuple[Graph, dict[str, Array]]:
    """Reads a function of JAX as a graph of operators.

    Calls are inlined (jit, custom_jvp and custom_vjp with the derivative of what they compute, remat, scan step by
    step, cond with a known predicate), what depends on `params` alone is folded, and groups of primitives become
    operators. A primitive without an operator becomes an `Opaque` node: it runs in float and fake-quant, and `lower`
    refuses it.

    Args:
      fn: `fn(params, *inputs)`, with running statistics. A dropout whose key depends on no input becomes `Dropout`,
        active where `apply_train` gets a key. Modules of flax: `jq.flax`.
      params: a pytree. Its floating-point leaves are float32 and become parameters, named by their path, such as
        "block1.conv.kernel", in the layout of the operator that reads them.
      *inputs: example arrays, float32, or int32, bool and uint8 for exact inputs, or pytrees of them. `jq.apply`,
        `jq.run` and calibration take and give the same dicts, tuples, lists and dataclasses.
      dynamic_batch: axis 0 of every input is a batch of any size; False fixes all shapes to the example.
      check: with a free batch, compares the graph with the function for 1 example where a branch may depend on that.

    Returns:
      The graph, with nodes named by the path of their weight or by their named scope, and {name: float32 array}.

    Raises:
      ConversionError: a dtype that the operators do not compute in, a batch that cannot stay symbolic, or a branch on
        the number of examples.

    Example:
      >>> import jax, jax.numpy as jnp, jquant as jq
      >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
      >>> def model(params, x):
      ...     return jax.nn.relu(x @ params["dense"]["kernel"] + params["dense"]["bias"])
      >>> graph, params = jq.trace(model, params, jnp.ones((1, 4)))
      >>> [(node.name, type(node.op).__name__) for node in graph.nodes]
      [('dense', 'Linear'), ('relu', 'Relu')]
      >>> params["dense.kernel"].shape
      (3, 4)
    """
    traced = read(fn, params, inputs, dynamic_batch=dynamic_batch, check=check)
    found = {key: jnp.asarray(array) for key, array in traced.graph_params(params).items()}
    return validate(traced.graph, found), found


def read(
    fn: Callable[..., Any], params: Any, inputs: Sequence[Any], *, dynamic_batch: bool, check: bool = True
) -> Traced:
    """`trace`, without computing the params."""
    arrays = [_checked(array) for array in jax.tree.leaves(inputs)]
    if not arrays:
        raise ConversionError("trace needs an example of every input: jq.trace(fn, params, x)")
    names = input_names(inputs, _argument_names(fn, len(inputs)))
    if not dynamic_batch:
        built, tree = _read_at(fn, params, inputs, names, None)
        graph = built.graph
    else:
        if scalars := [name for name, array in zip(names, arrays, strict=True) if not array.shape]:
            raise ConversionError(f"input {scalars[0]!r} has no batch axis; pass dynamic_batch=False, or close over it")
        sizes = {array.shape[0] for array in arrays}
        if len(sizes) > 1:
            raise ConversionError(f"the inputs have batches of {sorted(sizes)}; give one, or pass dynamic_batch=False")
        size = max(*sizes, 2)
        built, tree = _read_at(fn, params, inputs, names, size)
        graph = with_symbolic_batch(built, _read_at(fn, params, inputs, names, 2 * size)[0])
    takes = structure_from(partial(jax.tree.unflatten, jax.tree.structure(tuple(inputs))), len(arrays), arguments=True)
    gives = structure_from(partial(jax.tree.unflatten, tree), len(graph.outputs))
    graph = prune(validate(replace(graph, takes=takes, gives=gives)))
    _check_shapes(graph, built, arrays[0].shape[0] if not dynamic_batch else max(arrays[0].shape[0], 2))
    kept = {key: built.params[key] for key in graph.param_names}
    traced = Traced(graph, kept, tuple(leaf_names(params)), tree)
    if check and dynamic_batch and not any(node.op.stochastic for node in graph.nodes):  # which draws in the function
        check_one_example(fn, params, inputs, graph, lambda: traced.graph_params(params))
    return traced


def _read_at(
    fn: Callable[..., Any], params: Any, inputs: Sequence[Any], names: Sequence[str], batch: int | None
) -> tuple[Built, Any]:
    """The graph at one batch size (None: that of the example), and the tree of the function's result."""

    def example(array: Any) -> jax.ShapeDtypeStruct:
        shape = tuple(array.shape)
        return jax.ShapeDtypeStruct(shape if batch is None else (batch, *shape[1:]), array.dtype)

    examples = jax.tree.map(example, tuple(inputs))
    try:
        closed, tree = jax.make_jaxpr(fn, return_shape=True)(params, *examples)
    except JQuantError:
        raise
    except (TypeError, ValueError, IndexError, ZeroDivisionError, jax.errors.JAXTypeError) as error:
        at = "" if batch is None else f" at a batch of {batch} (dynamic_batch=False takes the example's)"
        raise ConversionError(f"the function cannot be traced by JAX{at}: {error}") from error
    leaves = leaf_names(params)
    known = [values.leaf(name, array) for name, array in zip(leaves, jax.tree.leaves(params), strict=True)]
    entries = [
        Entry(name=name, shape=tuple(e.shape), dtype=np.dtype(e.dtype))
        for name, e in zip(names, jax.tree.leaves(examples), strict=True)
    ]
    reader = Reader(TABLE, named_operator, meet)
    outputs = reader.read_closed(closed, [*known, *entries])
    check_scaled(reader, evaluation_order(outputs))
    if not outputs:
        raise ConversionError("the function returns no array")
    outputs = simplify(reader, outputs)
    drafts: list[Draft] = evaluation_order(outputs)
    return build(drafts, entries, outputs, leaves), jax.tree.structure(tree)


def _checked(array: Any) -> Any:
    if not hasattr(array, "dtype") or not hasattr(array, "shape"):
        raise ConversionError(f"an example input is {type(array).__name__}, not an array")
    if str(array.dtype) == "uint32" or jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        raise ConversionError(
            f"an example input is {array.dtype}, a key of random numbers; let the function close over any key, such as "
            "jax.random.key(0): its dropout becomes `Dropout`, which draws from the key that apply_train(rngs=) gets"
        )
    if str(array.dtype) not in ("float32", *EXACT_DTYPES):
        raise ConversionError(f"an example input is {array.dtype}; use float32, int32, bool or uint8")
    return array


def _argument_names(fn: Callable[..., Any], count: int) -> list[str]:
    """What the function calls its inputs; x0, x1 and so on where it does not say."""
    try:
        found = list(inspect.signature(fn).parameters.values())[1:]
    except (TypeError, ValueError):
        found = []
    positional = [p.name for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) >= count:
        return positional[:count]
    return ["x"] if count == 1 else [f"x{i}" for i in range(count)]


def _check_shapes(graph: Graph, built: Built, batch: int) -> None:
    """Compares every node with the function: another shape or dtype would be a fault of a rule, found here."""
    zeros = {key: np.broadcast_to(np.float32(0), known.compact) for key, known in built.params.items()}
    types = value_types(graph, zeros, batch)
    for node in graph.nodes:
        if types[node.name].shape != built.shapes[node.name]:
            operands: Any = [types[v] for v in node.inputs]
            raise ConversionError(
                f"{describe(node, operands)} makes {list(types[node.name].shape)}, the function "
                f"{list(built.shapes[node.name])}: please report this"
            )
