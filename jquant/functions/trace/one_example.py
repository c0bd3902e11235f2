"""Whether a function of JAX that was read at two batch sizes computes the same for one example."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.functions.trace.batch import FIX
from jquant.graph.float import evaluate_float
from jquant.types import Array, ConversionError, Graph

_MANY = 97  # a prime, so that a multiple of it in a jaxpr comes from the batch
_TOLERANCE = 1e-3  # of the largest value: sums of another order, where a branch makes other values
_TOKENS = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?|\w+|\S")


def check_one_example(
    fn: Callable[..., Any], params: Any, inputs: Sequence[Any], graph: Graph, graph_params: Callable[[], Any]
) -> None:
    """Compares the function with its graph for one example, where its jaxpr says more than another batch size.

    A function that cannot take one example is left out.

    Raises:
      ConversionError: an output that differs, or another number of outputs.
    """
    if _is_traced(params) or _reads_alike(fn, params, inputs):
        return
    one = jax.tree.map(lambda x: jnp.asarray(x)[:1], tuple(inputs))
    try:
        wanted = jax.tree.leaves(jax.jit(fn)(params, *one))
    except Exception:  # whatever the function's own code raises
        return
    entries = jax.tree.leaves(one)
    found: Sequence[Array] = jax.jit(lambda p, x: evaluate_float(graph, p, *x))(graph_params(), entries)
    for i, expected in enumerate(wanted):
        if i >= len(found) or not _alike(np.asarray(found[i]), np.asarray(expected)):
            raise ConversionError(
                f"output {i} of the graph is not that of the function for 1 example: the function has a branch on the "
                f"number of examples. Take the branch out, or {FIX}; check=False reads it all the same"
            )


def _is_traced(params: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))


def _reads_alike(fn: Callable[..., Any], params: Any, inputs: Sequence[Any]) -> bool:
    """Whether the jaxprs for many examples and for one differ in the batch alone."""
    texts = []
    for batch in (_MANY, 1):
        examples = jax.tree.map(lambda x, n=batch: jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype), tuple(inputs))
        try:
            texts.append(_TOKENS.findall(str(jax.make_jaxpr(fn)(params, *examples))))
        except Exception:  # whatever the function's own code raises
            return batch == 1  # it takes no single example: nothing to compare
    many, one = texts
    return len(many) == len(one) and all(a == b or _is_batch(a, b) for a, b in zip(many, one, strict=True))


def _is_batch(many: str, one: str) -> bool:
    return many.isdigit() and one.isdigit() and int(many) == _MANY * int(one)


def _alike(found: np.ndarray, wanted: np.ndarray) -> bool:
    if found.shape != wanted.shape:
        return False
    if wanted.dtype.kind != "f":
        return bool((found == wanted).all())
    finite = np.abs(wanted[np.isfinite(wanted)])
    largest = float(finite.max()) if finite.size else 0.0
    return bool(np.allclose(found, wanted, rtol=_TOLERANCE, atol=_TOLERANCE * largest, equal_nan=True))
