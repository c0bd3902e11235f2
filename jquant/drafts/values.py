"""Values of a function that is being read: known before any input, or made by operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.types import Op

Shape = tuple[int, ...]


@dataclass(eq=False, kw_only=True)
class Known:
    """What depends on no input: a leaf of params, a constant of the code, or what is computed from these.

    `shape` is what the function sees; the array has the shape `compact`, which broadcasts to it, so that an axis that
    only repeats (a bias for every example) takes no part in the size. `array` is None where a floating-point leaf is
    involved: such a value is computed when parameters are given, so that nothing here depends on what they are.
    """

    shape: Shape
    dtype: Any
    compact: Shape
    primitive: str  # "leaf", "constant", or what computed it
    operands: tuple[Known, ...] = ()
    compute: Callable[..., Any] | None = None  # arrays of the operands' compact shapes -> array
    array: Any = None
    path: str = ""  # of a leaf
    index: tuple[int, ...] = ()  # of a leaf's part, one of a stack that a scan goes through
    axes: tuple[int, ...] = ()  # of a transposition

    @property
    def is_trained(self) -> bool:
        return self.array is None

    @property
    def is_scalar(self) -> bool:
        """Whether it is one number, known now, however often it is repeated."""
        return not self.is_trained and prod(self.compact) == 1

    @property
    def number(self) -> float:
        return shortest(np.asarray(self.array).reshape(()))


@dataclass(eq=False, kw_only=True)
class Entry:
    """An input of the function."""

    name: str
    shape: Shape
    dtype: Any


@dataclass(eq=False, kw_only=True)
class Draft:
    """A node before it has a name. Rules replace its operator and operands in place."""

    op: Op
    operands: tuple[Any, ...]  # of values; Any, since rules ask each what it is
    shape: Shape
    dtype: Any
    params: dict[str, Known] = field(default_factory=dict)
    scope: str = ""


Value = Known | Draft | Entry


def shortest(value: Any) -> float:
    """The shortest decimal number that is this one in float32: 0.1, and not 0.10000000149011612."""
    return float(str(np.float32(value)))


def scalar_of(value: Value) -> float | None:
    """The number that a constant repeats, or None."""
    return value.number if isinstance(value, Known) and value.is_scalar else None


def seen_shape(value: Value) -> Shape:
    """The shape with which an operand takes part in broadcasting."""
    return value.compact if isinstance(value, Known) else value.shape


# ---------------------------------------------------------------------------------------------------------------------
# Known values


def constant(array: Any) -> Known:
    """A constant of the code."""
    shape = tuple(jnp.shape(array))
    return Known(shape=shape, dtype=array.dtype, compact=shape, primitive="constant", array=array)


def leaf(path: str, array: Any) -> Known:
    """A leaf of params: trained where it is floating-point, else a constant (a table of indices, a key)."""
    shape = tuple(array.shape)
    trained = jnp.issubdtype(array.dtype, jnp.floating)
    return Known(
        shape=shape,
        dtype=array.dtype,
        compact=shape,
        primitive="leaf",
        array=None if trained else array,
        path=path,
    )


def known_from(
    primitive: str, compute: Callable[..., Any], operands: Sequence[Known], shape: Shape | None = None
) -> Known:
    """What `compute` makes of operands, at once if it can be; `shape` if it repeats the array."""
    found = jax.eval_shape(compute, *(jax.ShapeDtypeStruct(k.compact, k.dtype) for k in operands))
    array = None
    if not any(k.is_trained for k in operands):
        with jax.ensure_compile_time_eval():
            array = compute(*(k.array for k in operands))
    return Known(
        shape=tuple(found.shape) if shape is None else tuple(shape),
        dtype=found.dtype,
        compact=tuple(found.shape),
        primitive=primitive,
        operands=tuple(operands),
        compute=compute,
        array=array,
    )


def evaluate_known(known: Known, leaves: Mapping[str, Any], cache: dict[Known, Any]) -> Any:
    """The array of a known value, of its compact shape, for these leaves. Differentiable, and works inside jit."""
    if known not in cache:
        if known.path:
            cache[known] = leaves[known.path]
        elif not known.is_trained:
            cache[known] = known.array
        else:
            assert known.compute is not None
            cache[known] = known.compute(*(evaluate_known(k, leaves, cache) for k in known.operands))
    return cache[known]


def full(known: Known) -> Known:
    """The same value with nothing left to repeat."""
    if known.compact == known.shape:
        return known
    shape = known.shape
    return known_from("broadcast", lambda a: jnp.broadcast_to(a, shape), [known])


def reshaped(known: Known, shape: Shape) -> Known:
    """A known value in another shape; axes that only repeat stay apart from the others where they can."""
    if shape == known.shape:
        return known
    compact = _reshape_compact(known.shape, known.compact, shape)
    if compact is None:
        known, compact = full(known), shape
    return known_from("reshape", lambda a: jnp.reshape(a, compact), [known], shape)


def _reshape_compact(old: Shape, compact: Shape, new: Shape) -> Shape | None:
    """The compact shape after a reshape, or None where a repeated axis is joined with another one."""
    found: list[int] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = old[i : i + 1], new[j : j + 1]
        i, j = i + len(left), j + len(right)
        while prod(left) != prod(right):  # the smallest groups of axes with equal sizes
            if prod(left) < prod(right):
                left, i = (*left, old[i]), i + 1
            else:
                right, j = (*right, new[j]), j + 1
        kept = compact[i - len(left) : i]
        if kept == left:
            found += right
        elif prod(kept) == 1:
            found += (1,) * len(right)
        else:
            return None
    return tuple(found)


def transposed(known: Known, axes: Sequence[int]) -> Known:
    axes = tuple(axes)
    if axes == tuple(range(len(axes))):
        return known
    if known.axes:  # of a transposition: back again is the value itself
        return transposed(known.operands[0], [known.axes[a] for a in axes])
    shape = tuple(known.shape[a] for a in axes)
    found = known_from("transpose", lambda a: jnp.transpose(a, axes), [known], shape)
    found.axes = axes
    return found


def broadcast_in(known: Known, shape: Shape, axes: Sequence[int]) -> Known:
    """`lax.broadcast_in_dim`: the array keeps an axis of 1 wherever it would be repeated."""
    kept = [1] * len(shape)
    for axis, size in zip(axes, known.compact, strict=True):
        kept[axis] = size
    compact = tuple(kept)
    return known_from("broadcast_in_dim", lambda a: jnp.reshape(a, compact), [known], shape)


def elementwise(primitive: str, compute: Callable[..., Any], operands: Sequence[Known], shape: Shape) -> Known:
    """A function of elements: what is repeated in all operands is computed once."""
    ranked = [k.compact if k.shape else (1,) * len(shape) for k in operands]
    compact = np.broadcast_shapes(*ranked)

    def run(*arrays: Any) -> Any:
        return compute(*(jnp.broadcast_to(a, compact) for a in arrays))

    return known_from(primitive, run, operands, shape)


def part_of_stack(known: Known, i: int) -> Known:
    """Element i of axis 0."""
    if known.compact[0] == 1:
        return known_from("index", lambda a: a[0], [known], known.shape[1:])
    found = known_from("index", lambda a: a[i], [known], known.shape[1:])
    found.index = (*known.index, i)
    return found


def sliced(known: Known, bounds: Sequence[tuple[int, int, int]]) -> Known:
    """known[start:stop:step] along every axis; what is repeated stays so."""
    shape = tuple(-(-(stop - start) // step) for start, stop, step in bounds)
    cut = tuple(
        slice(None) if n == 1 else slice(start, stop, step)
        for n, (start, stop, step) in zip(known.compact, bounds, strict=True)
    )
    return known_from("slice", lambda a: a[cut], [known], shape)


def product(compute: Callable[..., Any], numbers: Any, operands: Sequence[Known], shape: Shape) -> Known:
    """`lax.dot_general`: axes that only repeat stay so where they are not summed."""
    for k in operands:
        if k.is_scalar and k.number == 0:
            return broadcast_in(constant(np.zeros((), k.dtype)), shape, ())
    contracted, batch = numbers
    arrays = []
    for k, sums, shared in zip(operands, contracted, batch, strict=True):
        whole = tuple(
            n if i in (*sums, *shared) else m for i, (n, m) in enumerate(zip(k.shape, k.compact, strict=True))
        )
        arrays.append(broadcast_to(k, whole))
    return known_from("dot_general", compute, arrays, shape)


def broadcast_to(known: Known, compact: Shape) -> Known:
    """The same value with some of what it repeats in the array."""
    if compact == known.compact:
        return known
    return known_from("broadcast", lambda a: jnp.broadcast_to(a, compact), [known], known.shape)
