"""Dumps of probes, or of a model, as questions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from jquant.board.answers import Answers, Operands
from jquant.board.asking import Question
from jquant.board.dumps import Dumps
from jquant.board.lone import Lone, lone_values
from jquant.board.neutral import NEUTRAL
from jquant.board.probes import Probe
from jquant.board.values import Expected, channels_last, take
from jquant.types import Model

_MOVED = (".to_last", ".to_first")  # permutations that jquant inserts: no board has their values under these names


@dataclass(frozen=True, eq=False)
class Asked:
    """A probe with what it takes to ask its questions again and again: answers that were computed are kept."""

    probe: Probe

    @cached_property
    def lones(self) -> dict[str, Lone]:
        return lone_values(self.probe.model)

    @cached_property
    def answers(self) -> dict[str, Answers]:
        return {name: Answers(self.lones[name], asks) for name, asks in self.probe.asks.items()}

    @cached_property
    def expected(self) -> dict[str, Expected]:
        return expected_of(self.probe.model, self.lones)

    def questions(self, dumps: Dumps) -> tuple[list[Question], list[str]]:
        """A question for each value that the dumps have with its operands; and in words what they lack."""
        plan = self.probe.model.plan
        inserted = [name for name in self.expected if name.endswith(_MOVED)]
        needed = {v for name in self.probe.asks for v in (name, *self.lones[name].operands)}
        optional = [name for name in self.expected if name in inserted or name not in needed]
        taken = take(dumps, self.expected, optional)
        values = with_moved(taken.values, self.lones)
        found, problems = [], [f"{self.probe.name}/{text}" for text in taken.problems]
        for name, answers in self.answers.items():
            operands = self._operands(name, values)
            if name in values and operands is not None:
                found.append(Question((self.probe.name, name), answers, Operands(operands), values[name]))
        if plan.graph.inputs and not found and not problems:
            problems.append(f"{self.probe.name}: no value with its operands")
        return found, problems

    def _operands(self, name: str, values: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...] | None:
        lone = self.lones[name]
        if lone.node is None:
            return (self.probe.inputs[name],)
        return None if any(v not in values for v in lone.operands) else tuple(values[v] for v in lone.operands)


def expected_of(model: Model, lones: Mapping[str, Lone]) -> dict[str, Expected]:
    """The dtype, shape and order of axes of every value."""
    last = channels_last(model.plan.graph)
    batched = {entry.name: entry.shape[:1] == (None,) for entry in model.plan.graph.inputs}
    whole = any(batched.values())
    found = {}
    for name, lone in lones.items():
        shape = lone.output.shape if whole and batched.get(name, True) else _fixed(model, name, lone)
        found[name] = Expected(lone.output.dtype, shape, name in last)
    return found


def _fixed(model: Model, name: str, lone: Lone) -> tuple[int | None, ...]:
    """A shape whose first axis is no batch."""
    given = {entry.name: entry.shape for entry in model.plan.graph.inputs}
    return given.get(name, lone.output.shape)


def with_moved(values: Mapping[str, np.ndarray], lones: Mapping[str, Lone]) -> dict[str, np.ndarray]:
    """The values, and those that a permutation of jquant's makes of them."""
    found = dict(values)
    for name, lone in lones.items():
        if name.endswith(_MOVED) and name not in found and lone.operands[0] in found:
            found[name] = lone.evaluate(NEUTRAL, lone.constants(NEUTRAL), [found[lone.operands[0]]])
    return found


def questions_of(asked: Sequence[Asked], dumps: Mapping[str, Dumps]) -> tuple[list[Question], list[str]]:
    """The questions of all probes that have dumps, {probe: dumps}; and in words what is missing."""
    found: list[Question] = []
    problems: list[str] = []
    for one in asked:
        if one.probe.name not in dumps:
            problems.append(f"{one.probe.name}: no dumps")
            continue
        questions, lacking = one.questions(dumps[one.probe.name])
        found += questions
        problems += lacking
    return found, problems


def again(question: Question, wanted: np.ndarray) -> Question:
    """The same question with other integers of the board."""
    return replace(question, wanted=wanted)
