"""Dumps of a network as questions: of every node, with the board's own operands, what its integers depend on."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jquant.board.answers import ONLY_EVALUATED, ONLY_LOWERED, Answers, Operands
from jquant.board.asking import Question
from jquant.board.comparison import expected_of_program
from jquant.board.dumps import Declared, Dump, Dumps
from jquant.board.lone import Constants, Lone, lone_values
from jquant.board.probes import domains
from jquant.board.questions import expected_of, with_moved
from jquant.board.reading import fields_read
from jquant.board.values import Expected, take
from jquant.graph.operator import Operand, lower_op
from jquant.numerics.namespace import real, to_host
from jquant.plan.scales import check_model
from jquant.reference.interpreter import rule_of
from jquant.targets import value_of
from jquant.types import InputError, JQuantError, Model, Node, Program, Target

_MOVED = (".to_last", ".to_first")  # permutations that jquant inserts
_FLOATS = ("float16", "float32")
# What made the constants of a role, where it was made of real numbers that a program does not hold.
_MADE_BY: Mapping[str, tuple[str, ...]] = {
    "weight": ("quantize_rounding",),
    "value": ("quantize_rounding",),
    "bias": ("bias_rounding",),
    "slope": ("slope_dtype", "quantize_rounding"),
    "upper": ("number_rounding",),
    "sumin_scale": ("addend.",),
    "sumin_rshift": ("addend.",),
    **dict.fromkeys(("mantissa", "pre", "post"), ("rescale.",)),
    **dict.fromkeys(("negative_mantissa", "negative_pre", "negative_post"), ("rescale.", "slope_dtype")),
}


@dataclass(frozen=True, eq=False)
class Given(Lone):
    """A node of a program whose constants are as the program has them: for another march they may be others.

    `made`  {role: integers}
    `held`  {field: value}: the march that they were made for, as far as they can depend on it
    """

    made: Constants
    held: Mapping[str, Any]

    def constants(self, target: Target) -> Constants:
        return self.made


@dataclass(frozen=True, eq=False)
class Scaled(Lone):
    """A node of a program without parameters: its constants are made of the scales that the program holds."""

    def constants(self, target: Target) -> Constants:
        assert self.node is not None
        return lower_op(self.node.op, self.inputs, self.output, {}, target).constants


@dataclass(frozen=True, eq=False)
class Network:
    """A model or a program, and its real inputs where they are known, {graph input: float32}."""

    given: Model | Program
    inputs: Mapping[str, np.ndarray]

    @property
    def target(self) -> Target:
        return self.given.target if isinstance(self.given, Program) else self.given.plan.target

    @cached_property
    def expected(self) -> dict[str, Expected]:
        if isinstance(self.given, Program):
            return expected_of_program(self.given)
        found = expected_of(self.given, self.lones)
        return {name: value for name, value in found.items() if value.dtype not in _FLOATS}

    @cached_property
    def lones(self) -> dict[str, Lone]:
        if isinstance(self.given, Program):
            return _lones_of(self.given, self.expected)
        check_model(self.given)
        return lone_values(self.given)

    def questions(self, dumps: Dumps | Mapping[str, np.ndarray]) -> tuple[list[Question], list[str]]:
        """A question for each value that the dumps have with its operands; and in words what they lack."""
        inserted = [name for name in self.expected if name.endswith(_MOVED)]
        taken = take(dumps_of(dumps), self.expected, optional=inserted)
        values = with_moved(taken.values, {n: lone for n, lone in self.lones.items() if n in self.expected})
        found, problems = [], list(taken.problems)
        for name in taken.values:
            lone = self.lones[name]
            operands = self._operands(lone, values)
            if operands is None:
                continue
            if lone.node is not None and rule_of(lone.node.op) is None:
                problems.append(f"{name}: the reference has no rule for {lone.operator}")
                continue
            asks = self._asks(lone, operands)
            found.append(Question((name, lone.operator), Answers(lone, asks), Operands(operands), values[name]))
        return found, problems

    def _operands(self, lone: Lone, values: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...] | None:
        if lone.node is None:
            known = lone.name in self.inputs and lone.output.dtype in ("int8", "int16")
            return (np.asarray(self.inputs[lone.name], np.float32),) if known else None
        return None if any(v not in values for v in lone.operands) else tuple(values[v] for v in lone.operands)

    def _asks(self, lone: Lone, operands: tuple[np.ndarray, ...]) -> tuple[str, ...]:
        read = fields_read(lone, operands)
        return tuple(f for f in domains() if f in {*read, *(lone.held if isinstance(lone, Given) else ())})


def dumps_of(given: Dumps | Mapping[str, np.ndarray]) -> Dumps:
    """Dumps, or arrays of integers by the name of the value."""
    if isinstance(given, Dumps):
        return given
    return Dumps({name: Dump(np.asarray(array), Path(name), Declared()) for name, array in given.items()})


def network_of(given: Model | Program, inputs: Mapping[str, Any] | None) -> Network:
    """Raises InputError for inputs that the graph has not, LoweringError for a program that cannot run."""
    if isinstance(given, Program):
        given.check_target()
        given.check_single()
    graph = given.graph if isinstance(given, Program) else given.plan.graph
    names = [entry.name for entry in graph.inputs]
    if unknown := [name for name in inputs or {} if name not in names]:
        raise InputError(f"no graph input {unknown[0]!r}; there are {', '.join(names)}")
    return Network(given, dict(inputs or {}))


def _lones_of(program: Program, expected: Mapping[str, Expected]) -> dict[str, Lone]:
    def operand(name: str) -> Operand:
        scale = program.scales.get(name)
        return Operand(
            expected[name].dtype, real(1) if scale is None else to_host({name: scale})[name], expected[name].shape
        )

    nothing: Any = None  # the model: a program has none
    found: dict[str, Lone] = {i.name: Lone(i.name, nothing, None, (), operand(i.name)) for i in program.graph.inputs}
    for node in program.graph.nodes:
        inputs, output = tuple(operand(value) for value in node.inputs), operand(node.name)
        found[node.name] = _lone_of(program, node, Scaled(node.name, nothing, node, inputs, output))
    return found


def _lone_of(program: Program, node: Node, scaled: Scaled) -> Lone:
    """The node with constants that are made again, where that gives those of the program for its own march."""
    made = to_host(program.constants[node.name])
    try:
        again = None if node.params else scaled.constants(program.target)
    except JQuantError:
        again = None
    if again is not None and _same(again, made):
        return scaled
    held = {field: value_of(program.target, field) for field in _makers(made)}
    return Given(scaled.name, scaled.model, node, scaled.inputs, scaled.output, made, held)


def _same(a: Constants, b: Constants) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(np.asarray(a[role]), np.asarray(b[role])) for role in a)


def _makers(made: Constants) -> list[str]:
    """The fields that some constants may depend on: those of their roles, or all, of a role that is not known."""
    lowered = [f for f in domains() if f not in ONLY_EVALUATED]
    if any(role not in _MADE_BY for role in made):
        return lowered
    paths = {path for role in made for path in _MADE_BY[role]}
    return [f for f in lowered if f in paths or (f.split(".")[0] + "." in paths and f in ONLY_LOWERED)]
