"""Making drafts: new ones, and known values that are made once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jquant.drafts import values
from jquant.drafts.values import Draft, Known, Value
from jquant.ops.compare import LogicalNot
from jquant.ops.indexing import Slice
from jquant.ops.movement import Permute, Reshape
from jquant.types import Op


class Maker:
    """Makes the drafts of one graph. Until rules look at them, two equal ones are one."""

    repeats = True  # whether a parameter may be another one, repeated

    def __init__(self) -> None:
        self.scope = ""
        self.made: dict[tuple[Any, ...], Draft] | None = {}  # None once rules may change what was made
        self.shared: dict[tuple[Any, ...], Known] = {}  # one value for what is computed twice from the same leaf

    def draft(
        self,
        op: Op,
        *operands: Value,
        shape: Sequence[int],
        dtype: Any = None,
        scope: str | None = None,
        **params: Known,
    ) -> Draft:
        """A new node; its dtype is that of the first operand, its scope that of the equation that is read."""
        dtype = operands[0].dtype if dtype is None else dtype
        scope = self.scope if scope is None else scope
        made = Draft(op=op, operands=operands, shape=tuple(shape), dtype=np.dtype(dtype), params=params, scope=scope)
        if self.made is None or op.stochastic:
            return made
        key = (op, operands, tuple(params.items()), made.shape)
        return self.made.setdefault(key, made)

    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        shape = tuple(shape)
        if shape == value.shape:
            return value
        if isinstance(value, Known):
            return self.share(value, ("reshape", shape), lambda: values.reshaped(value, shape))
        if isinstance(value, Draft) and isinstance(value.op, Reshape):
            return self.reshape(value.operands[0], shape)
        return self.draft(Reshape(shape=shape), value, shape=shape)

    def permute(self, value: Value, axes: Sequence[int]) -> Value:
        axes = tuple(int(a) for a in axes)
        if axes == tuple(range(len(axes))):
            return value
        if isinstance(value, Known):
            return self.share(value, ("permute", axes), lambda: values.transposed(value, axes))
        if isinstance(value, Draft) and isinstance(value.op, Permute):
            return self.permute(value.operands[0], [value.op.axes[a] for a in axes])
        if 1 in value.shape[1:] or (axes[0] != 0 and value.shape[0] == 1):  # without axes of 1, for one form of it
            wide = [a for a in range(len(axes)) if value.shape[a] != 1 or (a == 0 and axes[0] == 0)]
            inner = self.reshape(value, [value.shape[a] for a in wide])
            moved = self.permute(inner, [wide.index(a) for a in axes if a in wide])
            return self.reshape(moved, [value.shape[a] for a in axes])
        return self.draft(Permute(axes=axes), value, shape=[value.shape[a] for a in axes])

    def slice(self, x: Value, starts: Sequence[int], stops: Sequence[int], steps: Sequence[int]) -> Value:
        """x[start:stop:step] along every axis."""
        if isinstance(x, Known):
            return self.cut(x, starts, stops, steps)
        if all(a == 0 and b == n and s == 1 for a, b, s, n in zip(starts, stops, steps, x.shape, strict=True)):
            return x
        ends = tuple(None if b == n else int(b) for b, n in zip(stops, x.shape, strict=True))
        op = Slice(starts=tuple(map(int, starts)), stops=ends, steps=tuple(map(int, steps)))
        return self.draft(op, x, shape=[-(-(b - a) // s) for a, b, s in zip(starts, stops, steps, strict=True)])

    def share(self, known: Known, key: tuple[Any, ...], make: Callable[[], Known]) -> Known:
        """One value for one computation, so that a weight that is read twice stays one parameter."""
        key = (known, *key)
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def cut(self, known: Known, starts: Sequence[int], stops: Sequence[int], steps: Sequence[int]) -> Known:
        bounds = tuple((int(a), int(b), int(s)) for a, b, s in zip(starts, stops, steps, strict=True))
        return self.share(known, ("slice", bounds), lambda: values.sliced(known, bounds))

    def inverted(self, mask: Value) -> Value:
        if isinstance(mask, Known):
            invert = jnp.logical_not
            return self.share(mask, ("not",), lambda: values.elementwise("not", invert, [mask], mask.shape))
        return self.draft(LogicalNot(), mask, shape=mask.shape)
