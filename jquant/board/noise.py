"""What is wrong with a dump that no world explains: swapped names, another order of axes, damaged integers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

import numpy as np

from jquant.board.asking import Question
from jquant.board.questions import again
from jquant.board.sifting import Left

_DAMAGED = 0.1  # the share of integers that may be damaged for the rest to speak


@dataclass(frozen=True)
class Suspect:
    """A dump that no world explains.

    `kind`  swapped: with the dump `other`. layout: its axes are in another order. damaged: a few integers are wrong.
            unexplained: nothing of that
    """

    where: tuple[str, str]
    kind: Literal["swapped", "layout", "damaged", "unexplained"]
    says: str
    other: tuple[str, str] | None = None

    def __str__(self) -> str:
        return f"{'/'.join(self.where)}: {self.says}"


def suspects(sifted: Left, questions: Sequence[Question]) -> list[Suspect]:
    """Each unexplained dump with what is wrong with it."""
    return [_swapped(q, sifted, questions) or _laid_out(q, sifted) or _damaged(q, sifted) for q in sifted.unexplained]


def _swapped(question: Question, sifted: Left, questions: Sequence[Question]) -> Suspect | None:
    for other in questions:
        alike = other is not question and other.wanted.shape == question.wanted.shape
        if alike and sifted.explains(again(question, other.wanted)) and sifted.explains(again(other, question.wanted)):
            says = f"swapped with {'/'.join(other.where)}: each explains the other's place"
            return Suspect(question.where, "swapped", says, other.where)
    return None


def _laid_out(question: Question, sifted: Left) -> Suspect | None:
    for order, array in _other_orders(question.wanted):
        if sifted.explains(again(question, array)):
            says = f"its axes lie in another order: the file has those of the value in the order {list(order)}"
            return Suspect(question.where, "layout", says)
    return None


def _other_orders(array: np.ndarray) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """The array as if its memory held the axes in another order."""
    for order in permutations(range(array.ndim)):
        if order != tuple(range(array.ndim)):
            stored = array.reshape([array.shape[axis] for axis in order])
            if not np.array_equal(moved := stored.transpose(np.argsort(order)), array):
                yield order, moved


def _damaged(question: Question, sifted: Left) -> Suspect:
    count, size = sifted.fewest(question), question.wanted.size
    if count <= _DAMAGED * size:
        says = f"damaged, or an exception of the board: {int(count)} of {size} integers, the rest is explained"
        return Suspect(question.where, "damaged", says)
    nearest = (
        f"the nearest has {int(count)} of {size} integers wrong" if np.isfinite(count) else "none has a form for it"
    )
    return Suspect(question.where, "unexplained", f"no march explains it with the other dumps: {nearest}")
