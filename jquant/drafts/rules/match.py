"""What rules look at: a value backwards through its operands."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any

from jquant.drafts import values
from jquant.drafts.maker import Maker
from jquant.drafts.values import Draft, Known, Value, scalar_of
from jquant.ops.conv import Conv, ConvTranspose
from jquant.ops.elementwise import Add, Mul, Scale, Sub
from jquant.ops.movement import Expand, Reshape
from jquant.types import Op


@dataclass(eq=False)
class Context:
    """What a rule may need beyond the draft: the maker of new ones, how often a draft is read, who is gone.

    A rule takes this and a draft, and returns whether it replaced the draft's operator, or the draft by another value.
    """

    maker: Maker
    readers: dict[Value, int]
    replaced: dict[Value, Value] = field(default_factory=dict)

    def resolve(self, value: Value) -> Value:
        while value in self.replaced:
            value = self.replaced[value]
        return value

    def is_only_reader(self, value: Value) -> bool:
        return self.readers.get(value, 1) <= 1

    def replace(self, draft: Draft, value: Value) -> bool:
        """Lets every reader of the draft read another value."""
        self.replaced[draft] = value
        self.readers[value] = self.readers.get(value, 0) + self.readers.get(draft, 1) - 1
        return True


Rule = Callable[[Context, Draft], bool]


def become(draft: Draft, op: Op, *operands: Value, **params: Known) -> bool:
    draft.op, draft.operands, draft.params = op, operands, params
    return True


def op_of(value: Any, *kinds: type[Op]) -> Any:
    """The operator of a draft of one of these kinds, or None."""
    return value.op if isinstance(value, Draft) and isinstance(value.op, kinds) else None


def through(value: Any, *kinds: type[Op]) -> Any:
    """The value behind operators of these kinds."""
    while op_of(value, *kinds):
        value = value.operands[0]
    return value


def unshaped(value: Any) -> Any:
    """The value behind reshapes and repetitions, as statistics have them on the way to what they normalize."""
    return through(value, Reshape, Expand)


def is_near(value: float | None, wanted: float, tolerance: float = 1e-5) -> bool:
    return value is not None and abs(value - wanted) <= tolerance * max(abs(wanted), 1e-30)


@dataclass
class Product:
    """A product taken apart: a number, known factors, and the others."""

    number: float = 1.0
    known: list[Known] = field(default_factory=list)
    drafts: list[Any] = field(default_factory=list)


def factors(context: Context, value: Value) -> Product:
    """The factors of a value; a product that others read too counts as one."""
    found = Product()

    def collect(v: Any, *, root: bool) -> None:
        number = scalar_of(v)
        if number is not None:
            found.number *= number
        elif isinstance(v, Known):
            found.known.append(v)
        elif op_of(v, Scale) and (root or context.is_only_reader(v)):
            found.number *= v.op.factor
            collect(v.operands[0], root=False)
        elif op_of(v, Mul) and (root or (v.operands[0] is not v.operands[1] and context.is_only_reader(v))):
            for operand in v.operands:
                collect(operand, root=False)
        else:
            found.drafts.append(v)

    collect(value, root=True)
    return found


def plus_number(value: Any) -> tuple[Any, float] | None:
    """(x, c) of x + c, or of x - (-c)."""
    if op_of(value, Sub):
        number = scalar_of(value.operands[1])
        return None if number is None else (value.operands[0], -number)
    if op_of(value, Add):
        for x, other in (value.operands, value.operands[::-1]):
            number = scalar_of(other)
            if number is not None and not isinstance(x, Known):
                return x, number
    return None


def partner(values: Iterable[Any], value: Any) -> Any:
    """The other one of two values."""
    found = list(values)
    if len(found) != 2 or value not in found:
        return None
    return found[1] if found[0] is value else found[0]


def varying_axes(known: Known) -> list[int]:
    """The axes along which a known value is more than a repetition."""
    return [i for i, n in enumerate(known.compact) if n != 1]


def channel_axis(op: Op, rank: int) -> int:
    """Where a convolution or linear layer has its output channels."""
    return 1 if isinstance(op, Conv | ConvTranspose) and not op.channels_last else rank - 1


def along_axis(context: Context, known: Known, axis: int, shape: tuple[int, ...]) -> Known | None:
    """A known value that varies along one axis of `shape` only, as a vector; None where it varies elsewhere.

    One trained number is no vector where parameters keep their sizes.
    """
    if known.is_trained and not context.maker.repeats and prod(known.compact) == 1 != shape[axis]:
        return None
    if not known.shape:
        known = values.broadcast_in(known, (1,) * len(shape), ())
    if len(known.compact) != len(shape) or any(i != axis for i in varying_axes(known)):
        return None

    def vector() -> Known:
        spread = values.broadcast_to(known, tuple(n if i == axis else 1 for i, n in enumerate(shape)))
        return values.known_from("reshape", lambda a: a.reshape(-1), [spread])

    return context.maker.share(known, ("along", axis, shape[axis]), vector)
