"""Attention: a composite of matrix products, a mask and softmax."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jquant.graph.operator import Parts, decompose, eval_float
from jquant.ops.compare import LogicalNot, LogicalOr
from jquant.ops.composite import Chain, Shapes, Softmax, masked_softmax
from jquant.ops.elementwise import Add, Clamp, IntegerConstant, Scale
from jquant.ops.matmul import MatMul
from jquant.types import Array, Node, Op

T = TypeVar("T")

LEAST_ADDED = -30.0  # of an added mask: exp is 1e-13, and the sum keeps a scale that resolves the scores


@dataclass(frozen=True, kw_only=True)
class Attention(Op):
    """softmax(q @ k.T * scale + mask) @ v over the last two axes.

    Operands: query [..., L, E], key [..., S, E], value [..., S, D], and a mask [..., L, S] if there is one. `mask`
    "bool": exact, True where attention is allowed; "add": a number to add to the score, cut at -30, behind which a
    fifth operand may say where attention is allowed. `scale` None is 1 / sqrt(E). `causal` masks keys after the query.
    `empty` is that of `Softmax`: torch's attention gives zeros to a query whose keys are all masked.
    """

    takes_exact: ClassVar = True
    ports: ClassVar = ("query", "key", "value", "mask", "allowed")

    scale: float | None = None
    causal: bool = False
    mask: Literal["none", "bool", "add"] = "none"
    empty: Literal["zero", "mean", "scores", "nan"] = "zero"


def allowed_of(op: Attention, masks: Sequence[T]) -> Sequence[T]:
    """Of the operands behind query, key and value: the one that says where attention is allowed, if there is one."""
    return masks if op.mask == "bool" else masks[1:]


def _factor(op: Attention, features: int) -> float:
    return 1 / sqrt(features) if op.scale is None else op.scale


def _later(queries: int, keys: int) -> np.ndarray:
    """[L, S]: True where the key comes after the query."""
    return ~np.tril(np.ones((queries, keys), bool))


@eval_float.register
def _(
    op: Attention,
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None = None,
    allowed: Array | None = None,
) -> Array:
    scores = jnp.matmul(query, key.swapaxes(-1, -2)) * _factor(op, query.shape[-1])
    if mask is not None and op.mask == "add":
        scores = scores + jnp.maximum(mask, LEAST_ADDED)
    masked = None
    if op.causal:
        masked = jnp.asarray(_later(*scores.shape[-2:]))
    allowed = mask if op.mask == "bool" else allowed
    if allowed is not None:
        masked = ~allowed if masked is None else masked | ~allowed
    if masked is None:
        probabilities = jax.nn.softmax(scores, axis=-1)
    else:
        probabilities = masked_softmax(scores, masked, -1, op.empty)
    return jnp.matmul(probabilities, value)


@decompose.register
def _(op: Attention, node: Node, shapes: Shapes) -> Parts:
    chain = Chain(node)
    query, key, value, *given = node.inputs
    length, features = shapes[query][-2:]
    products = chain.add("products", MatMul(transpose_b=True), query, key)
    scores = chain.add("scores", Scale(factor=_factor(op, features)), products)
    if op.mask == "add":
        scores = chain.add("biased", Add(), scores, chain.add("bias", Clamp(minimum=LEAST_ADDED), given[0]))
    masks = [chain.add("not_allowed", LogicalNot(), name) for name in allowed_of(op, given)]
    if op.causal:
        later = _later(length, shapes[key][-2])
        constant = IntegerConstant(shape=later.shape, values=tuple(map(int, later.flat)), dtype="bool")
        masks.append(chain.add("later", constant))
    if len(masks) == 2:
        masks = [chain.add("masked", LogicalOr(), *masks)]
    probabilities = chain.add("softmax", Softmax(axis=-1, empty=op.empty), scores, *masks)
    chain.add("output", MatMul(), probabilities, value)
    return chain.parts()
