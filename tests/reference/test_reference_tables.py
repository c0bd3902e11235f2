"""The reference of tables by hand."""

from fractions import Fraction

import numpy as np
import pytest

from jquant.reference import tables
from jquant.targets import NASH_E
from jquant.types import GraphError

FORM = NASH_E.tables


def test_lines_by_hand() -> None:
    assert tables.line_constants(Fraction(1), Fraction(0), 0, 16128, FORM) == (16384, 0, 0, 14)  # 2^15 leaves alpha
    assert tables.line_constants(Fraction(0), Fraction(100), -9, 9, FORM) == (
        0,
        25600,
        16,
        24,
    )  # 100 * 2^25 leaves int32
    assert tables.line_constants(Fraction(0), Fraction(0), -9, 9, FORM) == (0, 0, 0, 30)
    assert tables.line_constants(Fraction(-1, 2**20), Fraction(1), -4, 4, FORM) == (-1024, 16384, 16, 30)
    assert tables.index_line(0, 63 * 256, FORM) == (16384, 0, 0, 14)
    assert tables.outer_line(7, 5, 7, 5, through=7, form=FORM) == tables.line_constants(
        Fraction(0), Fraction(5), 7, 7, FORM
    )


def test_a_steep_line_is_clamped_and_goes_through_its_anchor() -> None:
    alpha, beta, left, right = tables.outer_line(10, 0, 11, 2**23, through=10, form=FORM)
    assert (alpha, right) == (32767, 0)
    assert abs(10 * alpha + (beta << left)) <= 2**left


def test_interpolation_by_hand() -> None:
    entries = np.arange(64) * 10
    t = np.array([0, 128, 255, 256, 300, 63 * 256])
    np.testing.assert_array_equal(tables.interpolated(t, entries, FORM), [0, 5, 10, 10, 12, 630])
    np.testing.assert_array_equal(
        tables.interpolated(t, -entries, FORM), [0, -5, -10, -10, -12, -630]
    )  # -1.71875 of 10


def test_segments_own_their_lower_end() -> None:
    lines = np.array([(0, -7, 0, 0), tables.index_line(0, 63, FORM), tables.index_line(63, 126, FORM), (0, 9, 0, 0)])
    entries = np.stack([np.arange(64), 100 + np.arange(64)])
    x = np.array([-32768, -1, 0, 1, 62, 63, 64, 125, 126, 32767])
    y = tables.segmented(x, np.array([0, 63, 126]), lines, entries, "int16", FORM)
    np.testing.assert_array_equal(y, [-7, -7, 0, 1, 62, 100, 101, 162, 9, 9])


def test_angles_by_hand() -> None:
    quarter = np.array([2**30, 0])  # one LSB is a quarter turn
    np.testing.assert_array_equal(
        tables.within_period(np.array([0, 1, 2, 3, 4, -1]), quarter, "half_up"), [0, 16384, -32768, -16384, 0, -16384]
    )
    assert tables.turn_constants(1e-5) == (65536, 0)
    np.testing.assert_array_equal(
        tables.within_period(np.array([-32768, 5]), np.array([65536, 0]), "half_up"), [-32768, 5]
    )


def test_a_line_that_leaves_int32_is_named() -> None:
    lines = np.array([(0, 32767, 17, 0), *[tables.index_line(0, 63, FORM)] * 2, (0, 0, 0, 0)])
    with pytest.raises(GraphError, match="leaves int32"):
        tables.segmented(np.array([-1]), np.array([0, 63, 126]), lines, np.zeros((2, 64), int), "int16", FORM)
