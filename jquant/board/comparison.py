"""A program against the dumps of a board, node by node: each alone on the board's operands, and all in a row."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.board.dumps import Dumps
from jquant.board.values import Expected, channels_last, take
from jquant.program.integers import run_integers, run_node
from jquant.text import format_table
from jquant.types import InputError, JQuantError, Node, Program, storage_dtype

MOST_BARS = 21  # of a histogram: differences beyond are counted at its ends


@dataclass(frozen=True)
class Difference:
    """The program's integers against the board's, program minus board, in LSB.

    `equal` of `size`  how many are the same
    `largest`          of the absolute differences
    `histogram`        {difference: how many}, all of them but 0
    `first`            where the first one differs, with `program` and `board` there
    """

    equal: int
    size: int
    largest: int
    histogram: Mapping[int, int]
    first: tuple[int, ...] | None = None
    program: int | None = None
    board: int | None = None

    @property
    def is_equal(self) -> bool:
        return self.equal == self.size


@dataclass(frozen=True)
class ValueComparison:
    """One value: `alone` with the board's own operands, `accumulated` from the board's graph inputs on.

    None where the dumps lack what it takes; `note` says what.
    """

    name: str
    operator: str
    dtype: str
    alone: Difference | None
    accumulated: Difference | None
    note: str = ""


@dataclass(frozen=True)
class BoardComparison:
    """A row for each value of the program, in its order; `problems` are files that are missing, extra or unreadable."""

    target: str
    rows: tuple[ValueComparison, ...]
    problems: tuple[str, ...]

    @property
    def first(self) -> ValueComparison | None:
        """The first node that differs alone: where the arithmetic is another one."""
        return next((row for row in self.rows if row.alone is not None and not row.alone.is_equal), None)

    @property
    def is_equal(self) -> bool:
        """Whether something was compared, every node alone is equal, and no file had a problem."""
        compared = [row for row in self.rows if row.alone is not None]
        return bool(compared) and self.first is None and not self.problems

    def row(self, name: str) -> ValueComparison:
        """Raises JQuantError for a value that the program has not."""
        found = next((row for row in self.rows if row.name == name), None)
        if found is None:
            raise JQuantError(f"no value {name!r}; there are {', '.join(row.name for row in self.rows)}")
        return found

    def table(self) -> str:
        """The rows as text, and the problems below."""
        header = ("name", "operator", "dtype", "alone", "largest LSB", "accumulated", "largest LSB", "note")
        rows = [
            (row.name, row.operator, row.dtype, *_cells(row.alone), *_cells(row.accumulated), row.note)
            for row in self.rows
        ]
        lines = [format_table(header, rows), *(f"problem: {text}" for text in self.problems)]
        if (first := self.first) is not None and first.alone is not None:
            at, found = first.alone, dict(sorted(first.alone.histogram.items()))
            lines.append(
                f"first node that differs: {first.name} ({first.operator}): at {list(at.first or ())} the program has "
                f"{at.program}, the board {at.board}; differences {found}"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        rows = [asdict(row) for row in self.rows]
        return {"target": self.target, "equal": self.is_equal, "rows": rows, "problems": list(self.problems)}

    def picture(self) -> bytes:
        """A PNG: by node the share of integers that differ, and the signed differences of the first one that does."""
        from jquant.board.pictures import comparison_picture

        return comparison_picture(self)


def _cells(difference: Difference | None) -> tuple[str, str]:
    if difference is None:
        return "-", "-"
    share = "equal" if difference.is_equal else f"{difference.size - difference.equal} of {difference.size} differ"
    return share, str(difference.largest)


def difference(program: np.ndarray, board: np.ndarray) -> Difference:
    """Integers of one shape against each other."""
    gap = program.astype(np.int64) - board.astype(np.int64)
    wrong = np.argwhere(gap != 0)
    values, counts = np.unique(gap[gap != 0], return_counts=True)
    histogram = _ends({int(v): int(n) for v, n in zip(values, counts, strict=True)})
    equal, largest = gap.size - len(wrong), int(np.abs(gap).max(initial=0))
    if not len(wrong):
        return Difference(equal, gap.size, largest, histogram)
    at = tuple(int(i) for i in wrong[0])
    return Difference(equal, gap.size, largest, histogram, at, int(program[at]), int(board[at]))


def _ends(histogram: dict[int, int]) -> dict[int, int]:
    """At most `MOST_BARS` differences: the rarest beyond the middle are counted with the nearest end."""
    if len(histogram) <= MOST_BARS:
        return histogram
    most = MOST_BARS // 2
    found: dict[int, int] = {}
    for value, count in histogram.items():
        at = max(-most, min(most, value))
        found[at] = found.get(at, 0) + count
    return found


def compare(program: Program, dumps: Dumps) -> BoardComparison:
    """Compares a program with what a board dumped. A wrong node does not blame those behind it.

    Args:
      program: lowered for the march that is held to be the board's.
      dumps: as `read_dumps` gives them. A value that is missing, extra or of another shape is named, and the rest goes
        on. What only moves integers, such as a permutation that jquant inserted, need not be there.

    Returns:
      A `BoardComparison`: exact counts, in LSB.

    Raises:
      InputError: dumps of none of the program's values. LoweringError: a program that cannot run.
    """
    if not isinstance(program, Program):
        raise InputError(f"a jq.Program is compared, not {type(program).__name__}; make one with jq.lower")
    program.check_target()
    program.check_single()
    expected, moved = expected_of_program(program), _moved(program)
    taken = take(dumps, expected, optional=moved)
    if not taken.values:
        known = ", ".join(list(expected)[:6])
        raise InputError(f"the dumps have no value of the program, which has {known}; declare the names of the files")
    board = {name: _stored(value, expected[name].dtype) for name, value in taken.values.items()}
    for node in program.graph.nodes:
        if node.name in moved and node.name not in board and node.inputs[0] in board:
            board[node.name] = _run(program, node, board)
    inputs = {entry.name: board[entry.name] for entry in program.graph.inputs if entry.name in board}
    whole = run_integers(program, inputs) if len(inputs) == len(program.graph.inputs) else {}
    rows = [_row(program, node, taken.values, board, whole) for node in program.graph.nodes]
    return BoardComparison(str(program.target), tuple(rows), taken.problems)


def _row(program: Program, node: Node, dumped: Mapping, board: Mapping, whole: Mapping) -> ValueComparison:
    kind, dtype = type(node.op).__name__, program.formats[node.name].output
    if node.name not in dumped:
        return ValueComparison(node.name, kind, dtype, None, None, "not dumped")
    missing = [value for value in node.inputs if value not in board]
    alone = None if missing else difference(np.asarray(_run(program, node, board)), dumped[node.name])
    summed = difference(np.asarray(whole[node.name]), dumped[node.name]) if whole else None
    return ValueComparison(node.name, kind, dtype, alone, summed, f"no {', '.join(missing)}" if missing else "")


def _run(program: Program, node: Node, values: Mapping[str, Any]) -> Any:
    operands = [values[name] for name in node.inputs]
    return run_node(node, program.formats[node.name], program.target, operands, program.constants[node.name])


def _stored(value: np.ndarray, dtype: str) -> Any:
    return jnp.asarray(value.astype(_array_dtype(dtype)))


def _moved(program: Program) -> tuple[str, ...]:
    """Nodes that jquant inserted and that only move integers."""
    return tuple(node.name for node in program.graph.nodes if node.name.endswith((".to_last", ".to_first")))


def expected_of_program(program: Program) -> dict[str, Expected]:
    """The dtype, shape and order of axes of every value. Raises InputError for one that is float."""
    last, shapes = channels_last(program.graph), shapes_of(program)
    dtypes = {**program.inputs, **{name: entry.output for name, entry in program.formats.items()}}
    if floating := [name for name, dtype in dtypes.items() if dtype in ("float16", "float32")]:
        raise InputError(f"value {floating[0]!r} is {dtypes[floating[0]]}; a board's dumps are compared as integers")
    return {name: Expected(dtype, shapes[name], name in last) for name, dtype in dtypes.items()}


def shapes_of(program: Program) -> dict[str, tuple[int | None, ...]]:
    """The shape of every value, None for the batch, without computing anything."""

    def shapes(batch: int) -> dict[str, tuple[int, ...]]:
        inputs = {
            entry.name: jax.ShapeDtypeStruct(
                tuple(batch if n is None else n for n in entry.shape), _array_dtype(program.inputs[entry.name])
            )
            for entry in program.graph.inputs
        }
        made = jax.eval_shape(lambda values: run_integers(program, values), inputs)
        return {name: value.shape for name, value in made.items()}

    small, large = shapes(2), shapes(3)
    return {n: tuple(a if a == b else None for a, b in zip(s, large[n], strict=True)) for n, s in small.items()}


def _array_dtype(dtype: str) -> str:
    return dtype if dtype in ("uint8", "bool") else storage_dtype(dtype)
