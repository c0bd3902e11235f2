"""The smallest failing case of a dump that no world explains, in full."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jquant.board.asking import Question
from jquant.board.sifting import Left


@dataclass(frozen=True)
class Case:
    """One integer of a board that nothing explains, as the nearest world has it.

    `differing` of `size`  how many integers of the dump that world has wrong
    `operands`     {value: (integer, real)} at the place, where an operand has one integer for it
    `accumulator`  in acc, where the operator rescales one
    `world`        the values of the fields in that world
    """

    where: tuple[str, str]
    operator: str
    index: tuple[int, ...]
    wanted: int
    found: int
    differing: int
    size: int
    operands: dict[str, tuple[int, float]]
    accumulator: int | None
    world: dict[str, Any]

    def __str__(self) -> str:
        operands = ", ".join(f"{name} = {q} ({real:g})" for name, (q, real) in self.operands.items())
        acc = "" if self.accumulator is None else f", accumulator {self.accumulator}"
        return (
            f"case: {'/'.join(self.where)} ({self.operator}) at {list(self.index)}: the board has {self.wanted}, the "
            f"nearest march {self.found}{acc}; {operands or 'operands of many places'}; "
            f"{self.differing} of {self.size} integers differ"
        )


def case_of(question: Question, sifted: Left) -> Case:
    """Of the world with the fewest wrong integers, the wrong one with the smallest accumulator or value."""
    row = sifted.nearest(question)
    found = question.answers(row, question.operands)
    lone = question.answers.lone
    world = dict(zip(question.asks, row, strict=True))
    if found is None or found.shape != question.wanted.shape:
        return Case(
            question.where, lone.operator, (), 0, 0, question.wanted.size, question.wanted.size, {}, None, world
        )
    wrong = np.argwhere(found != question.wanted)
    target = question.answers.target(row)
    sums = lone.accumulator(target, question.operands.arrays)
    sizes = np.abs(question.wanted if sums is None else sums)[tuple(wrong.T)]
    index = tuple(int(i) for i in wrong[int(sizes.argmin())])
    return Case(
        question.where,
        lone.operator,
        index,
        int(question.wanted[index]),
        int(found[index]),
        len(wrong),
        question.wanted.size,
        _operands(question, index),
        None if sums is None else int(sums[index]),
        world,
    )


def _operands(question: Question, index: tuple[int, ...]) -> dict[str, tuple[int, float]]:
    lone, found = question.answers.lone, {}
    for name, operand, array in zip(lone.operands, lone.inputs, question.operands.arrays, strict=False):
        if array.shape == question.wanted.shape:
            scale = float(np.asarray(operand.scale).ravel()[0])
            found[name] = int(array[index]), int(array[index]) * scale
    return found
