"""The support table is that of the code."""

from pathlib import Path

import pytest
from support.onnx_helpers import CASES

from jquant import ops
from jquant_converters import support
from jquant_converters.onnx_out import emit
from jquant_converters.torch_out import torch_rule

PAGE = Path(__file__).parents[2] / "docs" / "operators.md"


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == support.page(), "run `make support`"


def test_every_operator_has_a_row():
    rows = [line.split("`")[1] for line in support.table().splitlines() if line.startswith("| `")]
    assert rows == sorted(rows)
    assert len(rows) >= 130
    assert {type(op).__name__ for op, *_ in CASES.values()} <= set(rows)


@pytest.mark.parametrize(("column", "rules"), [("ONNX out", emit), ("torch out", torch_rule)])
def test_what_is_said_of_an_export_is_what_is_registered(column, rules):
    said = {cls for cls in support.operators() if support.COLUMNS[column](cls) == "yes"}
    assert said == {cls for cls in support.operators() if cls in rules.registry}


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (ops.Conv, "int8, int16, int32 out"),
        (ops.Softmax, "chain of int16"),
        (ops.Sigmoid, "int8, int16 (table)"),
        (ops.Relu, "int8, int16"),
        (ops.BatchNorm, "-"),
    ],
)
def test_integers(cls, expected):
    assert support.integers(cls) == expected


def test_a_column_can_be_added():
    columns = {**support.COLUMNS, "letters": lambda cls: str(len(cls.__name__))}
    assert support.table(columns).splitlines()[0].endswith("| letters |")
