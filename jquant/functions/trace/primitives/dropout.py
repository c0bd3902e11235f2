"""Dropout and stochastic depth: masks that are drawn from a key which depends on no input.

A mask is a comparison of uniform numbers with a probability, as `jax.random.bernoulli` makes it, or the floor of their
sum; it multiplies or chooses, and what it keeps is scaled up, in whatever order the code does that.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import jquant.ops as ops
from jquant.drafts.values import Draft, Known, Shape, Value, scalar_of
from jquant.functions.trace.reader import Reader
from jquant.types import ConversionError

_MOVES = (
    "broadcast_in_dim",
    "broadcast",
    "reshape",
    "squeeze",
    "expand_dims",
    "transpose",
    "convert_element_type",
    "copy",
)
_WEIGHTS = ("dot_general", "conv_general_dilated")  # random numbers that are drawn once are weights here, as features
_NEAR = 1e-5  # relative: of a probability and a factor in float32


class Drawn(NamedTuple):
    """A mask that has `factor` with the probability `keep`, else 0; `source` is the comparison that was drawn."""

    keep: float
    factor: float
    source: Known


def meet(reader: Reader, equation: Any, operands: Sequence[Value]) -> Value | None:
    """What an equation makes of random numbers and of values of the model: a dropout; None where they are weights.

    Raises:
      ConversionError: they are something else, which would be the same at each step.
    """
    name, shape = equation.primitive.name, tuple(equation.outvars[0].aval.shape)
    if name in _WEIGHTS and not any(isinstance(v, Known) and v.is_trained and reader.is_random(v) for v in operands):
        return None
    found = _masked(name, operands)
    if found is not None:
        mask, x = found
        compact = _compact(operands, mask, shape)
        apart = prod(compact) == prod(mask.source.compact)  # else a mask was repeated, and its axes joined
        if not isinstance(x, Known) and tuple(x.shape) == shape and str(x.dtype) == "float32" and apart:
            return _dropout(reader, x, mask, compact, shape)
    raise ConversionError(
        f"{_place(reader)}: {name} of a value and of random numbers that the function draws is no dropout, so that "
        "they would be the same in every step. A dropout keeps x / p with a probability p, and 0 else, by "
        "jax.random.bernoulli: write it so, trace the model with it off, or draw what is fixed outside of the function"
    )


def scaled_dropout(reader: Reader, x: Draft, factor: float) -> Draft:
    """A dropout that does not scale yet, scaled."""
    assert isinstance(x.op, ops.Dropout)
    made = reader.draft(x.op, *x.operands, shape=x.shape)
    _note(reader, made, reader.unscaled[x] * factor)
    return made


def check_scaled(reader: Reader, drafts: Sequence[Draft]) -> None:
    """Raises ConversionError for a dropout among drafts that does not scale what it keeps up."""
    for draft in drafts:
        if draft in reader.unscaled and isinstance(draft.op, ops.Dropout):
            keep = 1 - draft.op.rate
            raise ConversionError(
                f"{draft.scope or 'the function'}: a mask that keeps each element with a probability of {keep:g} "
                f"multiplies what it keeps by {reader.unscaled[draft]:g}; dropout multiplies by {1 / keep:g}, so that "
                "the mean stays, and evaluation without it is right. Scale right behind the mask, or in front of it"
            )


def _masked(name: str, operands: Sequence[Value]) -> tuple[Drawn, Value] | None:
    """The mask of a product or a choice, and the value that it keeps or not."""
    if name == "mul":
        for mask, x in (operands, operands[::-1]):
            if (found := drawn(mask)) is not None:
                return found, x
    if name == "select_n" and len(operands) == 3 and (found := drawn(operands[0])) is not None:
        _, if_false, if_true = operands
        if scalar_of(if_false) == 0:
            return found, if_true
        if scalar_of(if_true) == 0:
            return found._replace(keep=1 - found.keep), if_false
    return None


def _compact(operands: Sequence[Value], mask: Drawn, shape: Shape) -> Shape:
    """The shape of the mask with an axis of 1 for each that it does not tell apart, in the rank of the value."""
    (known,) = [v for v in operands if isinstance(v, Known) and (found := drawn(v)) and found.source is mask.source]
    return (1,) * (len(shape) - len(known.compact)) + known.compact


def _dropout(reader: Reader, x: Any, mask: Drawn, compact: Shape, shape: Shape) -> Draft:
    if mask.source in reader.masks:
        raise ConversionError(
            f"{_place(reader)}: one random mask is used for several values, as variational dropout of a recurrence "
            "does; every dropout here draws its own. Draw one for each value, or trace the model with it off"
        )
    reader.masks.add(mask.source)
    shared = tuple(i for i, (n, m) in enumerate(zip(shape, compact, strict=True)) if m == 1 and n > 1)
    factor = mask.factor
    if isinstance(x, Draft) and isinstance(x.op, ops.Scale) and _is_one(x.op.factor * factor * mask.keep):
        (x,), factor = x.operands, factor * x.op.factor
    made = reader.draft(ops.Dropout(rate=round(1 - mask.keep, 7), shared_axes=shared), x, shape=shape)
    _note(reader, made, factor)
    return made


def _note(reader: Reader, made: Draft, factor: float) -> None:
    assert isinstance(made.op, ops.Dropout)
    if not _is_one(factor * (1 - made.op.rate)):
        reader.unscaled[made] = factor


def _is_one(number: float) -> bool:
    return abs(number - 1) < _NEAR


def _place(reader: Reader) -> str:
    return reader.scope or "the function"


# ---------------------------------------------------------------------------------------------------------------------
# Masks


def drawn(value: Value) -> Drawn | None:
    """A known value as a mask that is drawn at random, or None."""
    if not isinstance(value, Known) or value.is_trained:
        return None
    name, operands = value.primitive, value.operands
    if name in _MOVES and operands:
        return drawn(operands[0])
    if name in ("lt", "le", "gt", "ge"):
        return _compared(value)
    if name == "floor":
        return _floor(value)
    if name == "not":
        found = drawn(operands[0])
        return found and found._replace(keep=1 - found.keep)
    if name in ("mul", "div"):
        return _times(name, *operands)
    if name == "select_n" and len(operands) == 3 and (found := drawn(operands[0])) is not None:
        if_false, if_true = map(scalar_of, operands[1:])
        if if_false == 0 and if_true:
            return found._replace(factor=if_true)
        if if_true == 0 and if_false:
            return Drawn(1 - found.keep, if_false, found.source)
    return None


def _compared(value: Known) -> Drawn | None:
    """u < p keeps with a probability of p, and u >= p with the rest; u is uniform in [0, 1)."""
    a, b = value.operands
    below = value.primitive in ("lt", "le")
    for u, bound, less in ((a, b, below), (b, a, not below)):
        p = scalar_of(bound)
        if p is not None and 0 < p < 1 and _is_uniform(u):
            return Drawn(p if less else 1 - p, 1.0, value)
    return None


def _floor(value: Known) -> Drawn | None:
    """floor(p + u) is 1 with a probability of p, else 0."""
    total = _bare(value.operands[0])
    if total.primitive == "add":
        for p, u in (total.operands, total.operands[::-1]):
            keep = scalar_of(p)
            if keep is not None and 0 < keep < 1 and _is_uniform(u):
                return Drawn(keep, 1.0, value)
    return None


def _times(name: str, a: Known, b: Known) -> Drawn | None:
    for mask, number in ((a, b), (b, a)) if name == "mul" else ((a, b),):
        found, factor = drawn(mask), scalar_of(number)
        if found is not None and factor:
            return found._replace(factor=found.factor * (factor if name == "mul" else 1 / factor))
    return None


def _is_uniform(value: Known) -> bool:
    """Whether it is `jax.random.uniform` in [0, 1): max(0, bits * 1 + 0)."""
    outer = _bare(value)
    if outer.primitive != "max":
        return False
    inner = _beside(outer, 0)
    inner = _beside(inner, 0) if inner is not None and inner.primitive == "add" else None
    return inner is not None and inner.primitive == "mul" and _beside(inner, 1) is not None


def _beside(value: Known, number: float) -> Known | None:
    """The other operand where one of two is that number."""
    a, b = value.operands
    return _bare(b) if scalar_of(a) == number else _bare(a) if scalar_of(b) == number else None


def _bare(value: Known) -> Known:
    while value.primitive in _MOVES and value.operands:
        value = value.operands[0]
    return value
