"""Lookup tables: nash-arithmetic section 6, the evaluation from constants and the derivation of those constants.

The derivation is in exact rationals; a function enters it only as float32 values that the caller gives.
"""

from fractions import Fraction
from itertools import pairwise

import numpy as np

from jquant.reference.arithmetic import quantize, round_shift, saturate
from jquant.reference.call import Call
from jquant.types import GraphError

TOP = 63 * 256  # the index of the last entry, with 8 fraction bits


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
        x = within_period(x, c["turn"])
    mirror = int(c["mirror"])
    y = segmented(np.abs(x) if mirror else x, c["boundaries"], c["lines"], c["entries"], call.format.output)
    return saturate(np.where((mirror == -1) & (x < 0), -y, y), call.format.output)


def segmented(x: np.ndarray, boundaries: np.ndarray, lines: np.ndarray, entries: np.ndarray, dtype: str) -> np.ndarray:
    """A left line, N tables, a right line. A segment owns lower <= x < upper, the last one its end too.

    boundaries [N + 1], lines [N + 2, 4] of (alpha, beta, l, r), entries [N, 64].
    """
    count = len(entries)
    if boundaries.shape != (count + 1,) or lines.shape != (count + 2, 4) or entries.shape != (count, 64):
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
        line = round_shift(total, right)
        if segment in (0, count + 1):
            y[owned] = saturate(line, dtype)
        else:
            y[owned] = interpolated(np.clip(line, 0, TOP), entries[segment - 1])
    return y


def interpolated(t: np.ndarray, entries: np.ndarray) -> np.ndarray:
    """y = T[t >> 8] + rsh((T[(t >> 8) + 1] - T[t >> 8]) * (t & 255), 8); at entry 63 the fraction is 0."""
    low, fraction = t >> 8, t & 255
    extended = np.append(entries, entries[-1])
    return extended[low] + round_shift((extended[low + 1] - extended[low]) * fraction, 8)


def checked_int32(v: np.ndarray) -> np.ndarray:
    if np.any((v < -(2**31)) | (v >= 2**31)):
        raise GraphError("a line of the table leaves int32")
    return v


def within_period(x: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """x * turn / 2^48 turns without the whole ones, as an int16 angle: 2^16 is one turn, rounded half up, and wraps.

    `turn` is [high, low] of 32 and 16 bits. What low contributes is floored to 2^-32 turns.
    """
    high, low = (int(v) for v in turn)
    phase = x * high + (x * low) // 2**16  # in 2^-32 turns
    return (round_shift(phase, 16) + 2**15) % 2**16 - 2**15


# ---------------------------------------------------------------------------------------------------------------------
# Derivation


def line_constants(k: Fraction, d: Fraction, lower: int, upper: int) -> tuple[int, int, int, int]:
    """(alpha, beta, l, r) of the line k * x + d for x in [lower, upper].

    The largest r in [0, 30] for which |alpha| <= 32767 and the whole sum stays in int32; for it, the smallest l.
    """
    for r in range(30, -1, -1):
        alpha = round(k * 2**r)  # Python rounds a Fraction half to even
        if abs(alpha) > 32767:
            continue
        left, beta = next((n, b) for n in range(64) if abs(b := round(d * Fraction(2**r, 2**n))) <= 32767)
        sums = [beta << left, *(x * alpha + (beta << left) for x in (lower, upper))]
        if all(-(2**31) <= s < 2**31 for s in sums):
            return alpha, beta, left, r
    raise ValueError(f"the line {k} * x + {d} has no integer form on [{lower}, {upper}]")


def index_line(a: int, b: int) -> tuple[int, int, int, int]:
    """The line that maps a to 0 and b to 63 * 256."""
    k = Fraction(TOP, b - a)
    return line_constants(k, -k * a, a, b)


def outer_line(a: int, y_a: int, b: int, y_b: int, *, through: int) -> tuple[int, int, int, int]:
    """The line through (a, y_a) and (b, y_b), values in LSB; too steep a one is clamped and goes `through` a or b."""
    k = Fraction(y_b - y_a, b - a) if b > a else Fraction(0)
    k = max(Fraction(-32767), min(Fraction(32767), k))
    y = y_a if through == a else y_b
    return line_constants(k, y - k * through, a, b)


def evenly(low: int, high: int, count: int) -> list[int]:
    """count + 1 boundaries, low + j * (high - low) / count rounded half up."""
    return [low + (2 * j * (high - low) + count) // (2 * count) for j in range(count + 1)]


def entry_points(boundaries, scale) -> np.ndarray:
    """[N, 64] float32: (a + i * (b - a) / 63) * s_x, i = 0..63, with the quotient and the product in float32."""
    rows = pairwise(boundaries)
    numerators = np.array([[63 * int(a) + i * (int(b) - int(a)) for i in range(64)] for a, b in rows])
    return numerators.astype(np.float32) / np.float32(63) * np.float32(scale)


def entries(values, scale, dtype: str, rounding: str = "half_even") -> np.ndarray:
    """quantize(f(x), s_y) of the values of f at `entry_points`."""
    return quantize(values, scale, dtype, rounding)


def turn_constants(scale) -> tuple[int, int]:
    """[high, low] of s_x / (2 * pi) in 2^-48 turns, modulo 1; x itself where its whole axis lies within one period.

    2 * pi is taken as 843314857 / 2^27, 30 bits of it.
    """
    if np.float32(scale) <= np.float32(np.pi / 2**15):
        return 2**16, 0
    turns = int(Fraction(float(np.float32(scale))) * 2**27 / 843314857 * 2**48) % 2**48
    high, low = divmod(turns, 2**16)
    return high - 2**32 if high >= 2**31 else high, low
