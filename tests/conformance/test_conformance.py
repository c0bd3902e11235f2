"""The quick part of the conformance suite: the first case of each operator and format, a few thousand outputs each.

`make conformance` runs all of it, with at least 10^6 outputs an operator, and writes RESULTS.md.
"""

import importlib
from pathlib import Path

import pytest
from conformance import consistency
from conformance.harness import Case, check, deviation

FAMILIES = sorted(path.stem for path in Path(__file__).parent.glob("*_cases.py"))


def first_cases() -> list[Case]:
    """The first case of each operator, operand formats and output format."""
    found: dict[tuple[str, str], Case] = {}
    for family in FAMILIES:
        for case in importlib.import_module(f"conformance.{family}").CASES:
            found.setdefault((case.operator, case.formats), case)
    return list(found.values())


@pytest.mark.parametrize("case", first_cases(), ids=lambda case: f"{case.operator} {case.formats}")
def test_fast_equals_reference(case: Case) -> None:
    row = check(case, outputs=5_000)
    assert row.outputs >= 5_000 or not case.shapes  # a constant is what it is
    assert row.mismatches == 0


def int8_cases() -> list[Case]:
    plain = [case for case in first_cases() if set(case.operands) == {"int8"} and case.output == "int8"]
    return [case for case in plain if not case.calibrated]


@pytest.mark.parametrize("case", int8_cases(), ids=lambda case: f"{case.operator} {case.formats}")
def test_int8_follows_the_float_meaning_within_an_lsb(case: Case) -> None:
    """0.51 LSB of the rescale, and the rounding of fake-quant, whose float value is tested against torch elsewhere."""
    assert deviation(case) <= 1.001


def test_at_consistency_level_2_fake_quant_is_the_integers() -> None:
    level = consistency.measure(2, "int8", "half_up", batch=2)
    assert (level.first, level.middle, level.last, level.largest) == (0.0, 0.0, 0.0, 0.0)
    assert consistency.measure(0, "int8", "half_up", batch=2).last > 0.05
