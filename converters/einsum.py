"""The equation of an einsum as sums, transpositions and products of matrices, for the torch and ONNX doors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jquant.ops as ops
from jquant.types import Op

Sizes = tuple[Any, ...]  # of int, and of something else that is equal to itself where a size depends on the batch


class NoForm(Exception):  # noqa: N818 - a reason that is collected, not an error that callers see
    """Why an equation has no operators."""


@dataclass(frozen=True)
class Step:
    """An operator on steps, or on operands of the einsum, which are their numbers."""

    op: Op
    operands: tuple[Any, ...]
    label: str


@dataclass(frozen=True)
class Term:
    """A value with a letter for each axis."""

    value: Any
    letters: str
    sizes: Sizes

    def size(self, letter: str) -> Any:
        return self.sizes[self.letters.index(letter)]

    def drop(self, letters: str) -> Term:
        kept = [i for i, c in enumerate(self.letters) if c not in letters]
        return replace(self, letters="".join(self.letters[i] for i in kept), sizes=tuple(self.sizes[i] for i in kept))


def einsum_steps(equation: str, shapes: Sequence[Sizes]) -> Step | int:
    """The steps of an equation, from left to right two operands at a time.

    Args:
      equation: as that of torch.einsum and of ONNX, with or without an arrow, with an ellipsis or not.
      shapes: of the operands.

    Returns:
      The last step; the number of an operand where nothing is to be done.

    Raises:
      NoForm: a letter twice in an operand (a diagonal), shapes that do not fit, or a size that depends on the batch
        and would be joined with another one.

    Example:
      >>> step = einsum_steps("bic,bjc->bij", [(2, 5, 3), (2, 4, 3)])
      >>> step.op
      MatMul(transpose_a=False, transpose_b=True)
    """
    inputs, output = parsed(equation, [len(s) for s in shapes])
    terms = [Term(i, letters, tuple(s)) for i, (letters, s) in enumerate(zip(inputs, shapes, strict=True))]
    for term in terms:
        if len(set(term.letters)) < len(term.letters):
            raise NoForm(f"a letter twice in {term.letters!r}, a diagonal")
    current = terms[0]
    for k, other in enumerate(terms[1:], start=1):
        later = output + "".join(t.letters for t in terms[k + 1 :])
        current = product(current, other, later, f"{k}" if len(terms) > 2 else "")
    current = summed(current, [c for c in current.letters if c not in output], "sum")
    if set(output) != set(current.letters):
        raise NoForm(f"the result has letters that no operand has, in {equation!r}")
    found = permuted(current, output, "turned").value
    return replace(found, label="") if isinstance(found, Step) else found


def parsed(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """Letters of every operand and of the result; an ellipsis becomes capital letters that are not used."""
    text = equation.replace(" ", "")
    if not re.fullmatch(r"[A-Za-z.,]*(->[A-Za-z.]*)?", text):
        raise NoForm(f"the equation {equation!r}")
    left, arrow, right = text.partition("->")
    parts = left.split(",")
    if len(parts) != len(ranks):
        raise NoForm(f"{len(ranks)} operands for the equation {equation!r}")
    free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz" if c not in text]
    hidden = [
        rank - len(part.replace("...", "")) if "..." in part else 0 for part, rank in zip(parts, ranks, strict=True)
    ]
    most = max(hidden, default=0)
    if min(hidden, default=0) < 0 or most > len(free):
        raise NoForm(f"operands of {list(ranks)} axes for the equation {equation!r}")
    dots = "".join(free[:most])
    inputs = [part.replace("...", dots[most - count :]) for part, count in zip(parts, hidden, strict=True)]
    if any(len(letters) != rank for letters, rank in zip(inputs, ranks, strict=True)):
        raise NoForm(f"operands of {list(ranks)} axes for the equation {equation!r}")
    if arrow:
        return inputs, right.replace("...", dots)
    given = left.replace("...", "").replace(",", "")
    return inputs, dots + "".join(sorted(c for c in set(given) if given.count(c) == 1))


def product(a: Term, b: Term, later: str, number: str) -> Term:
    """Of two terms: what both have and nothing later needs is summed over."""
    a = squeezed(summed(a, [c for c in a.letters if c not in later + b.letters], f"sum{number}_a"), b, f"row{number}_a")
    b = squeezed(summed(b, [c for c in b.letters if c not in later + a.letters], f"sum{number}_b"), a, f"row{number}_b")
    common = [c for c in a.letters if c in b.letters]
    for c in common:
        if a.size(c) != b.size(c):
            raise NoForm(f"sizes {a.size(c)} and {b.size(c)} of {c!r}")
    inner = "".join(c for c in common if c not in later)
    batch = "".join(c for c in common if c in later)
    rows = "".join(c for c in a.letters if c not in common)
    columns = "".join(c for c in b.letters if c not in common)
    if not inner:
        return multiplied(a, b, batch + rows + columns, number)
    sizes = tuple(
        {**dict(zip(a.letters, a.sizes, strict=True)), **dict(zip(b.letters, b.sizes, strict=True))}[c]
        for c in batch + rows + columns
    )
    first, transpose_a = factor(a, batch, rows, inner, f"a{number}", whole=not batch)
    second, transpose_b = factor(b, batch, columns, inner, f"b{number}", last=False)
    op = ops.MatMul(transpose_a=transpose_a, transpose_b=transpose_b)
    made = Step(op, (first, second), f"matmul{number}")
    count = len(sizes)
    plain = len(columns) == 1 and (len(rows) == 1 or (not batch and len(rows) > 1 and not transpose_a))
    value = made if plain else reshaped(made, sizes, f"split{number}", always=True)
    return Term(value, (batch + rows + columns)[:count], sizes)


def factor(
    x: Term, batch: str, free: str, inner: str, label: str, *, last: bool = True, whole: bool = False
) -> tuple[Any, bool]:
    """x as [*batch, free, inner] (or [*batch, inner, free]), and whether the product is to transpose it.

    With `whole`, free axes that lie before the inner ones stay as they are.
    """
    natural = batch + free + inner if last else batch + inner + free
    swapped = batch + inner + free if last else batch + free + inner
    turned = x.letters == swapped and x.letters != natural
    order = swapped if turned else natural
    x = permuted(x, order, f"{label}_turned")
    sizes = dict(zip(x.letters, x.sizes, strict=True))
    joined = joint([sizes[c] for c in free]), joint([sizes[c] for c in inner])
    free_last = last == turned
    ends = (joined[1], joined[0]) if free_last else joined
    if whole and len(free) > 1 and not free_last:
        ends = (*(sizes[c] for c in free), joined[1])
    target = (*(sizes[c] for c in batch), *ends)
    return reshaped(x.value, target, f"{label}_joined", was=x.sizes), turned


def joint(sizes: Sequence[Any]) -> Any:
    """The size of several axes as one; of none it is 1. With one that depends on the batch, so does the result."""
    if len(sizes) == 1:
        return sizes[0]
    unknown = [s for s in sizes if not isinstance(s, int)]
    if len(unknown) > 1:
        raise NoForm("two axes that depend on the batch become one")
    return ("joined", tuple(sizes)) if unknown else prod(sizes)


def multiplied(a: Term, b: Term, letters: str, number: str) -> Term:
    """An outer product: both with every axis, 1 long where they lack it."""
    sizes = {**dict(zip(b.letters, b.sizes, strict=True)), **dict(zip(a.letters, a.sizes, strict=True))}
    parts = []
    for x, name in ((a, "a"), (b, "b")):
        x = permuted(x, "".join(c for c in letters if c in x.letters), f"{name}{number}_turned")
        full = tuple(x.size(c) if c in x.letters else 1 for c in letters)
        parts.append(reshaped(x.value, full, f"{name}{number}_spread", was=x.sizes))
    return Term(Step(ops.Mul(), tuple(parts), f"product{number}"), letters, tuple(sizes[c] for c in letters))


def squeezed(x: Term, other: Term, label: str) -> Term:
    """Without the axes of size 1 that are longer in the other term: they broadcast."""
    gone = "".join(c for c in x.letters if c in other.letters and x.size(c) == 1 and other.size(c) != 1)
    if not gone:
        return x
    kept = x.drop(gone)
    return replace(kept, value=reshaped(x.value, kept.sizes, label, was=x.sizes))


def summed(x: Term, letters: Sequence[str], label: str) -> Term:
    if not letters:
        return x
    axes = tuple(sorted(x.letters.index(c) for c in letters))
    return replace(x.drop("".join(letters)), value=Step(ops.Sum(axes=axes), (x.value,), label))


def permuted(x: Term, letters: str, label: str) -> Term:
    if x.letters == letters:
        return x
    axes = tuple(x.letters.index(c) for c in letters)
    return Term(Step(ops.Permute(axes=axes), (x.value,), label), letters, tuple(x.sizes[a] for a in axes))


def reshaped(value: Any, sizes: Sizes, label: str, *, was: Sizes | None = None, always: bool = False) -> Any:
    if not always and was == sizes:
        return value
    if sum(not isinstance(n, int) for n in sizes) > 1:
        raise NoForm("more than one axis depends on the batch")
    return Step(ops.Reshape(shape=tuple(n if isinstance(n, int) else -1 for n in sizes)), (value,), label)
