"""Lookup tables: nash-arithmetic section 6, the evaluation from constants and the derivation of those constants.

The derivation is in exact rationals; a function enters it only as float64 values that the caller gives.
"""

from fractions import Fraction
from itertools import pairwise

import numpy as np

from jquant.reference.arithmetic import round_shift, rounded, saturate
from jquant.reference.call import Call
from jquant.types import GraphError, TableFormat, integer_range

# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def table(call: Call) -> np.ndarray:
    """Section 6. int8: T[x + 128]. int16: segments, see `segmented`; an angle is brought into one period first."""
    (x,), c = call.operands, call.constants
    operand = call.format.inputs[0]
    if operand == "int8" and c.get("table", np.empty(0)).shape == (256,):
        return c["table"][x + 128]
    if operand != "int16" or "entries" not in c:
        raise GraphError(f"a table of 256 entries and int8, or segments and int16, are needed; the input is {operand}")
    if "turn" in c:
        x = within_period(x, c["turn"], call.target.tables.angle_rounding)
    mirror, constants = int(c["mirror"]), (c["boundaries"], c["lines"], c["entries"])
    y = segmented(np.abs(x) if mirror else x, *constants, call.format.output, call.target.tables)
    return saturate(np.where((mirror == -1) & (x < 0), -y, y), call.format.output)


def segmented(
    x: np.ndarray, boundaries: np.ndarray, lines: np.ndarray, entries: np.ndarray, dtype: str, form: TableFormat
) -> np.ndarray:
    """A left line, N tables, a right line. A segment owns lower <= x < upper, the last one its end too.

    boundaries [N + 1], lines [N + 2, 4] of (alpha, beta, l, r), entries [N, E].
    """
    count, each = len(entries), form.entries
    if boundaries.shape != (count + 1,) or lines.shape != (count + 2, 4) or entries.shape != (count, each):
        raise GraphError(f"segments do not fit: {boundaries.shape}, {lines.shape}, {entries.shape}")
    y = np.zeros_like(x)
    for segment in range(count + 2):
        owned = np.ones(x.shape, bool)
        if segment > 0:
            owned &= x >= boundaries[segment - 1]
        if segment <= count:
            owned &= x < boundaries[segment]
        alpha, beta, left, right = lines[segment]
        at = x[owned]
        total = checked_int32(at * alpha + checked_int32(beta << left))
        if segment in (0, count + 1):
            constant = entries[0, 0] if segment == 0 else entries[-1, -1]
            line = saturate(round_shift(total, right, form.line_rounding), dtype)
            y[owned] = constant if form.outer == "constant" else line
        else:
            index = np.clip(round_shift(total, right, form.index_rounding), 0, (each - 1) * 2**form.fraction_bits)
            y[owned] = interpolated(index, entries[segment - 1], form)
    return y


def interpolated(t: np.ndarray, entries: np.ndarray, form: TableFormat) -> np.ndarray:
    """y = T[i] + rsh((T[i + 1] - T[i]) * f, F) with t = i * 2^F + f; at the last entry f is 0."""
    low, fraction = np.divmod(t, 2**form.fraction_bits)
    extended = np.append(entries, entries[-1])
    rise = (extended[low + 1] - extended[low]) * fraction
    return extended[low] + round_shift(rise, form.fraction_bits, form.interpolation_rounding)


def checked_int32(v: np.ndarray) -> np.ndarray:
    if np.any((v < -(2**31)) | (v >= 2**31)):
        raise GraphError("a line of the table leaves int32")
    return v


def within_period(x: np.ndarray, turn: np.ndarray, rounding: str) -> np.ndarray:
    """x * turn / 2^48 turns without the whole ones, as an int16 angle: 2^16 is one turn, rounded, and wraps.

    `turn` is [high, low] of 32 and 16 bits. What low contributes is floored to 2^-32 turns.
    """
    high, low = (int(v) for v in turn)
    phase = x * high + (x * low) // 2**16  # in 2^-32 turns
    phase = (phase + 2**31) % 2**32 - 2**31  # from -1/2 turn to 1/2
    return (round_shift(phase, 16, rounding) + 2**15) % 2**16 - 2**15


# ---------------------------------------------------------------------------------------------------------------------
# Derivation


def line_constants(k: Fraction, d: Fraction, lower: int, upper: int, form: TableFormat) -> tuple[int, int, int, int]:
    """(alpha, beta, l, r) of the line k * x + d for x in [lower, upper].

    The largest r for which |alpha| < 2^coefficient_bits and the whole sum stays in int32; for it, the smallest l.
    """
    limit, rounding = 2**form.coefficient_bits, form.coefficient_rounding
    for r in range(form.max_shift, -1, -1):
        alpha = rounded(k * 2**r, rounding)
        if abs(alpha) >= limit:
            continue
        betas = ((n, rounded(d * Fraction(2**r, 2**n), rounding)) for n in range(64))
        left, beta = next((n, b) for n, b in betas if abs(b) < limit)
        sums = [beta << left, *(x * alpha + (beta << left) for x in (lower, upper))]
        if all(-(2**31) <= s < 2**31 for s in sums):
            return alpha, beta, left, r
    raise ValueError(f"the line {k} * x + {d} has no integer form on [{lower}, {upper}]")


def index_line(a: int, b: int, form: TableFormat) -> tuple[int, int, int, int]:
    """The line that maps a to 0 and b to the index of the last entry."""
    k = Fraction((form.entries - 1) * 2**form.fraction_bits, b - a)
    return line_constants(k, -k * a, a, b, form)


def outer_line(a: int, y_a: int, b: int, y_b: int, *, through: int, form: TableFormat) -> tuple[int, int, int, int]:
    """The line through (a, y_a) and (b, y_b), values in LSB; too steep a one is clamped and goes `through` a or b."""
    k = Fraction(y_b - y_a, b - a) if b > a else Fraction(0)
    steepest = Fraction(2**form.coefficient_bits - 1)
    k = max(-steepest, min(steepest, k))
    y = y_a if through == a else y_b
    return line_constants(k, y - k * through, a, b, form)


def evenly(low: int, high: int, count: int) -> list[int]:
    """count + 1 boundaries, low + j * (high - low) / count rounded half up."""
    return [low + (2 * j * (high - low) + count) // (2 * count) for j in range(count + 1)]


def entry_points(boundaries, scale, form: TableFormat) -> np.ndarray:
    """[N, E] float64: (a + i * (b - a) / (E - 1)) * s_x, i = 0..E-1, the exact rational rounded once."""
    rows, s_x, parts = pairwise(boundaries), Fraction(float(np.float32(scale))), form.entries - 1
    points = ([(parts * int(a) + i * (int(b) - int(a))) * s_x / parts for i in range(parts + 1)] for a, b in rows)
    return np.array([[float(p) for p in row] for row in points])


def entries(values, scale, dtype: str, form: TableFormat) -> np.ndarray:
    """sat(round(f(x) / s_y)) of float64 values of f at `entry_points`, rounded from their exact quotients."""
    low, high = integer_range(dtype)
    s_y = Fraction(float(np.float32(scale)))

    def entry(value: float) -> int:
        if not np.isfinite(value):
            return 0 if np.isnan(value) else high if value > 0 else low
        return max(low, min(high, rounded(Fraction(float(value)) / s_y, form.entry_rounding)))

    return np.array([entry(value) for value in np.ravel(values)]).reshape(np.shape(values))


def turn_constants(scale) -> tuple[int, int]:
    """[high, low] of s_x / (2 * pi) in 2^-48 turns, modulo 1; x itself where its whole axis lies within one period.

    2 * pi is taken as 843314857 / 2^27, 30 bits of it.
    """
    if np.float32(scale) <= np.float32(np.pi / 2**15):
        return 2**16, 0
    turns = int(Fraction(float(np.float32(scale))) * 2**27 / 843314857 * 2**48) % 2**48
    high, low = divmod(turns, 2**16)
    return high - 2**32 if high >= 2**31 else high, low
