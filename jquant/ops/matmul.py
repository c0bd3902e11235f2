"""Products of two activations, and the table lookup that stands for a product with a one-hot vector."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jquant.graph.operator import Lowered, Operand, constraints, derived_scale, eval_float, eval_integer, lower_op
from jquant.numerics.convolution import batch_matmul, multiply_exactly
from jquant.numerics.rescale import ratio, rescale_of
from jquant.numerics.rounding import quantize, widen
from jquant.ops.conv import finish_accumulator
from jquant.types import Array, GraphError, LoweringError, NodeFormat, Op, Target, bit_width


@dataclass(frozen=True, kw_only=True)
class MatMul(Op):
    """a @ b over the last two axes as `torch.matmul`, batch axes broadcast; `transpose_*` swaps the last two first."""

    ports: ClassVar = ("a", "b")
    keeps_accumulator: ClassVar = True

    transpose_a: bool = False
    transpose_b: bool = False


@dataclass(frozen=True, kw_only=True)
class Embedding(Op):
    """Rows of a table. Operand: index, exact integers of any shape. Parameter: weight [rows, dim].

    The output has a scale of its own, and the table is quantized at it, as a `Constant` is; `Policy.weight` does not
    apply. An index outside the table gives NaN in float, zeros in the integer program, which has no NaN, and an error
    in the reference. `padding_index`: a row that is not trained; -1 for none. `from_end`: an index below 0 counts from
    the end, as in numpy and JAX; else it is outside, as in torch.
    """

    takes_exact: ClassVar = True
    ports: ClassVar = ("index",)

    padding_index: int = -1
    from_end: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# MatMul: acc = sum a * b, rescaled from s_a * s_b (section 4)


def _oriented(op: MatMul, a: Array, b: Array) -> tuple[Array, Array]:
    if (op.transpose_a and a.ndim < 2) or (op.transpose_b and b.ndim < 2):
        raise GraphError(f"a vector has no last two axes to swap: {a.shape} @ {b.shape}; use transpose_*=False")
    return jnp.swapaxes(a, -1, -2) if op.transpose_a else a, jnp.swapaxes(b, -1, -2) if op.transpose_b else b


@eval_float.register
def _(op: MatMul, a: Array, b: Array) -> Array:
    return batch_matmul(*_oriented(op, a, b))


@lower_op.register
def _(op: MatMul, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    a, b = inputs
    count = _products(op, a)
    if count is None:
        raise LoweringError("it sums over the batch, whose size is not known; swap the operands' axes before")
    worst = count << (bit_width(a.dtype) + bit_width(b.dtype) - 2)
    by = {}
    if output.dtype != "int32":
        to_output = ratio(a.scale, b.scale, output.scale, 1.0)
        by = rescale_of(to_output, bits=bit_width(output.dtype), form=target.rescale)._asdict()
    wide = worst >= 2**31
    # Both operands are data, so that every column of an int32 output can leave 32 bits.
    columns = b.shape[-2 if op.transpose_b else -1] if output.dtype == "int32" else None
    saturating = None if columns is None else np.full(columns, wide)
    return Lowered(by, "limbs" if wide else "int32", worst, "matmul", saturating)


def _products(op: MatMul, a: Operand) -> int | None:
    """How many products a sum has; None where that is the batch."""
    return a.shape[-2 if op.transpose_a else -1]


@eval_integer.register
def _(op: MatMul, node_format: NodeFormat, target: Target, a: Array, b: Array, **by: Array) -> Array:
    a, b = _oriented(op, a, b)
    products = multiply_exactly(jnp.atleast_2d(a), b if b.ndim > 1 else b[:, None], accumulator=node_format.accumulator)
    products = jax.tree.map(lambda v: _drop_vector_axes(v, a.ndim, b.ndim), products)
    return finish_accumulator(products, node_format, target, **by)


def _drop_vector_axes(v: Array, rank_a: int, rank_b: int) -> Array:
    """Takes out the axes of size 1 that a vector operand got."""
    v = v if rank_b > 1 else v[..., 0]
    return v if rank_a > 1 else jnp.squeeze(v, -1 if rank_b == 1 else -2)


@derived_scale.register
def _(op: MatMul, *scales: Array) -> Array:
    return scales[0] * scales[1]


@constraints.register
def _(op: MatMul, inputs: Sequence[Operand], output: Operand, weight_dtype: str | None, target: Target) -> list[str]:
    a, b = inputs
    broken = []
    if a.dtype == b.dtype == "int16":
        broken.append("both operands are int16; one of them has to be int8")
    count = _products(op, a)
    if count is not None and count > target.max_conv_inputs:
        broken.append(f"{count} products a sum are more than {target.max_conv_inputs}")
    return broken


# ---------------------------------------------------------------------------------------------------------------------
# Embedding


def _rows(op: Embedding, table: Array, index: Array, outside: Array) -> Array:
    index = widen(index)
    index = jnp.where(index < 0, index + table.shape[0], index) if op.from_end else index
    inside = (index >= 0) & (index < table.shape[0])
    rows = jnp.take(table, jnp.where(inside, index, 0), axis=0)
    return jnp.where(inside[..., None], rows, outside)


@eval_float.register
def _(op: Embedding, index: Array, *, weight: Array) -> Array:
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise GraphError(f"the index of an embedding is {index.dtype}; it takes an input of dtype int32")
    if op.padding_index >= 0:
        weight = weight.at[op.padding_index].set(jax.lax.stop_gradient(weight[op.padding_index]))
    return _rows(op, weight, index, jnp.full((), jnp.nan, weight.dtype))


@lower_op.register
def _(op: Embedding, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    return Lowered({"weight": quantize(params["weight"], output.scale, output.dtype, target.quantize_rounding)})


@eval_integer.register
def _(op: Embedding, node_format: NodeFormat, target: Target, index: Array, *, weight: Array) -> Array:
    return _rows(op, weight, index, jnp.zeros((), weight.dtype))
