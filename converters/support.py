"""The table of what is supported, from the code: `python -m jquant_converters.support` prints it.

A column is a function of an operator's class. Which classes a converter makes is read from its source, so that neither
torch nor onnx need be there.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import jquant.ops as ops
from jquant.graph.operator import decompose, eval_float, eval_integer, lower_op
from jquant.ops.names import FUNCTIONS
from jquant.types import Op

HERE = Path(__file__).parent
Column = Callable[[type[Op]], str]

HEAD = """# Operators

What each operator of `jquant.ops` can do. This page is written by `make support`, and a test fails where it is old.

- **scale**: `own` is calibrated; `kept` is that of the operand; `derived` follows from the operands.
- **fake-quant**: in calibration and training. A mask, an index or a pixel is exact, and never quantized.
- **integers**: the formats of values in an integer program. A `chain` is replaced by int16 operators in `jq.prepare`.
- **torch in**, **ONNX in**: `from_torch`, `from_onnx` and `model_from_onnx` make it. **torch out**,
  **ONNX out**: `to_torch` and `to_onnx` write it.

"""


@lru_cache
def named_in(folder: str) -> frozenset[str]:
    """The operators that the handlers or rules in a folder of this package name, as `ops.Conv`."""
    found: set[str] = set()
    for path in sorted((HERE / folder).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ops":
                found.add(node.attr)
    return frozenset(found)


def _yes(condition: bool) -> str:
    return "yes" if condition else "-"


def _known(function: object, cls: type[Op]) -> bool:
    return cls in function.registry  # type: ignore[attr-defined]


def scale(cls: type[Op]) -> str:
    return {"own": "own", "same_as_input": "kept", "derived": "derived"}[cls.scale_rule]


def integers(cls: type[Op]) -> str:
    """What `lower` makes of it."""
    if _known(decompose, cls):
        return "chain of int16"
    if not (_known(lower_op, cls) and _known(eval_integer, cls)):
        return "-"
    if cls is ops.Dequantize:
        return "float32 out, by `jq.program.insert_op_behind`"
    if cls in ops.TABLE_FUNCTIONS:
        return "int8, int16 (table)"
    return "int8, int16, int32 out" if cls.keeps_accumulator else "int8, int16"


def _named(folder: str, library: str) -> Column:
    """Whether a folder names an operator, or its row in the table of functions has a name in a library."""
    rows = frozenset(type(row.op).__name__ for row in FUNCTIONS if getattr(row, library))
    return lambda cls: _yes(cls.__name__ in named_in(folder) | rows)


COLUMNS: Mapping[str, Column] = {
    "scale": scale,
    "float": lambda cls: _yes(_known(eval_float, cls)),
    "fake-quant": lambda cls: _yes(_known(eval_float, cls)),
    "integers": integers,
    "torch in": _named("aten", "aten"),
    "ONNX in": _named("onnx_in", "onnx"),
    "torch out": _named("torch_out", "torch"),
    "ONNX out": _named("onnx_out", "onnx"),
}


def operators() -> list[type[Op]]:
    """The classes that `jquant.ops` exports, by name."""
    found = [v for n in ops.__all__ if isinstance(v := getattr(ops, n), type) and issubclass(v, Op) and v is not Op]
    return sorted(found, key=lambda cls: cls.__name__)


def table(columns: Mapping[str, Column] = COLUMNS) -> str:
    """The rows as a Markdown table."""
    names = ["operator", *columns]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for cls in operators():
        cells = [f"`{cls.__name__}`", *(column(cls) for column in columns.values())]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def page(columns: Mapping[str, Column] = COLUMNS) -> str:
    return HEAD + table(columns)


if __name__ == "__main__":
    sys.stdout.write(page())
