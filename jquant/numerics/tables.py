"""Lookup tables: section 6 of the specification. 256 entries for int8; segments of 64 entries and lines for int16.

Everything but the function itself is integer arithmetic, so the constants have the same bits inside jit and outside: a
line goes through two points with integer coordinates, and its slope and offset are exact ratios of integers.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jquant.numerics.rounding import divide, negate, quantize, saturate, shift_right, to_int32
from jquant.types import Array, bit_width, integer_range

ENTRIES = 64  # of a table
LAST = (ENTRIES - 1) * 256  # the largest index, with 8 fraction bits
SAMPLES = 256  # of the curvature
MAX_TABLES = 126  # more bring nothing, by the vendor's documents
_LINE_LIMIT = 2.0**23  # LSB; values at the ends of an outer line are clipped to it
_TWO_PI = 843314857  # 2 * pi * 2^27, to the nearest integer

Function = Callable[[Array], Array]  # real to real, float32, without NaN


class Segments(NamedTuple):
    """The constants of a segmented table with N tables, all integers.

    `boundaries`  [N + 1] int32, strictly increasing: table j owns boundaries[j] <= x < boundaries[j + 1]
    `lines`       [N + 2, 4] int32 (alpha, beta, l, r): the left line, N index lines, the right line
    `entries`     [N, 64] in LSB of the output, of its dtype
    `mirror`      int32: 0 none; 1 even, -1 odd: the table is for |x|, in [0, 32768], and the sign is put back
    """

    boundaries: Array
    lines: Array
    entries: Array
    mirror: Array


class Shape(NamedTuple):
    """How a segmented table is laid out (static).

    `placement`  "evenly", "curvature", "balanced", or the boundaries in real units, num_tables + 1 of them
    `low`, `high` the range of the boundaries, real; infinite for the whole axis
    `slopes`     real slopes of the left and the right line; None: through the function at both ends of the line
    """

    num_tables: int
    placement: str | tuple[float, ...]
    mirror: int
    low: float
    high: float
    slopes: tuple[float | None, float | None]

    @property
    def axis(self) -> tuple[int, int]:
        return (0, 32768) if self.mirror else (-32768, 32767)


# ---------------------------------------------------------------------------------------------------------------------
# Lines


class Leading(NamedTuple):
    """A number v >= 0 as its 16 leading bits: floor(v / 2^exponent * 2^16) in [2^15, 2^16), or 0 for zero."""

    bits: Array
    exponent: Array
    exact: Array  # nothing was cut off


def leading(whole: Array, part: Array, divisor: Array) -> Leading:
    """The leading bits of whole + part / divisor, for 0 <= whole < 2^31 and 0 <= part < divisor <= 2^16."""
    length = 32 - jax.lax.clz(whole)
    cut = jnp.maximum(length - 16, 0)
    bits, dropped = whole >> cut, whole & ((1 << cut) - 1)

    def step(_: int, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        bits, rest, count = state
        more, doubled = bits < 2**15, 2 * rest
        fits = doubled >= divisor
        longer = 2 * bits + fits.astype(jnp.int32)
        rest = jnp.where(more, jnp.where(fits, doubled - divisor, doubled), rest)
        return jnp.where(more, longer, bits), rest, count + more.astype(jnp.int32)

    bits, rest, count = jax.lax.fori_loop(0, 32, step, (bits, part, jnp.zeros_like(bits)))
    exponent = jnp.where(bits == 0, -99, 16 + cut - count)
    return Leading(bits, exponent, (rest == 0) & (dropped == 0))


def round_even(value: Leading, shift: Array) -> Array:
    """rhe(value * 2^shift); 2^16 stands for anything that leaves 15 bits before rounding."""
    drop = jnp.clip(16 - (value.exponent + shift), 1, 18)
    floor, half = value.bits >> drop, (value.bits >> (drop - 1)) & 1
    below = (value.bits & ((1 << (drop - 1)) - 1)) != 0
    up = (half == 1) & (below | ~value.exact | ((floor & 1) == 1))
    return jnp.where(value.exponent + shift > 15, 2**16, floor + up.astype(jnp.int32))


@jax.jit
def line_constants(ends: Array, values: Array, anchor: Array) -> Array:
    """(alpha, beta, l, r) of the lines through (ends[:, 0], values[:, 0]) and (ends[:, 1], values[:, 1]).

    r is the largest in [0, 30] for which |alpha| <= 32767 and neither beta << l nor x * alpha + (beta << l) leaves
    int32 for any x of the line's own closed range, ends[:, 0] to ends[:, 1]. A slope beyond +-32767 is clamped, and
    such a line goes through the end that `anchor` names.

    Args:
      ends: [S, 2] int32, the first not above the second; equal ends make a constant.
      values: [S, 2] int32, |values| <= 2^23.
      anchor: [S] int32, 0 or 1.

    Returns:
      [S, 4] int32.
    """
    run = ends[:, 1] - ends[:, 0]
    rise = jnp.where(run > 0, values[:, 1] - values[:, 0], 0)
    steep = jnp.abs(rise) > 32767 * jnp.maximum(run, 1)
    rise = jnp.where(steep, 32767 * jnp.sign(rise), rise)
    run = jnp.where(steep, 1, jnp.maximum(run, 1))
    slope = leading(jnp.abs(rise) // run, jnp.abs(rise) % run, run)
    x0 = jnp.take_along_axis(ends, anchor[:, None], 1)[:, 0]
    y0 = jnp.take_along_axis(values, anchor[:, None], 1)[:, 0]
    negative, offset = _offset(x0, y0, rise, run)

    r = jnp.arange(31, dtype=jnp.int32)
    slope, offset = (Leading(*(v[:, None] for v in number)) for number in (slope, offset))
    alpha = jnp.sign(rise)[:, None] * round_even(slope, r)
    left = jnp.maximum(offset.exponent + r - 15, 0)
    left = left + (round_even(offset, r - left) > 32767).astype(jnp.int32)
    beta = jnp.where(negative[:, None], -1, 1) * round_even(offset, r - left)
    # |beta| >= 2^14 where left > 0, so with left = 17 only the lowest int32 itself is reached.
    fits = (jnp.abs(alpha) <= 32767) & ((left <= 16) | ((left == 17) & (beta == -(2**14))))
    for i in range(2):
        fits &= _sum_fits(jnp.clip(alpha, -32767, 32767) * ends[:, i : i + 1], beta << jnp.minimum(left, 17))
    best = jnp.max(jnp.where(fits, r, 0), axis=1)  # r = 0 always fits
    chosen = [jnp.take_along_axis(v, best[:, None], 1)[:, 0] for v in (alpha, beta, left)]
    return jnp.stack([*chosen, best], axis=1)


def _offset(x0: Array, y0: Array, rise: Array, run: Array) -> tuple[Array, Leading]:
    """Sign and magnitude of y0 - x0 * rise / run, exactly: whole numbers and fractions apart, all within int32."""
    whole_slope = rise // run
    part = (rise - whole_slope * run) * x0
    whole = y0 - whole_slope * x0 - part // run
    part = part % run  # the offset is whole - part / run
    negative = (whole < 0) | ((whole == 0) & (part > 0))
    borrow = (~negative & (part > 0)).astype(jnp.int32)
    return negative, leading(jnp.abs(whole) - borrow, jnp.where(borrow == 1, run - part, part), run)


def _sum_fits(a: Array, b: Array) -> Array:
    """The sum of two int32 does not wrap: it cannot where the signs differ."""
    return ((a < 0) != (b < 0)) | ((a + b < 0) == (a < 0))


# ---------------------------------------------------------------------------------------------------------------------
# Boundaries


def boundaries_of(function: Function, x_scale: Array, y_scale: Array, y_dtype: str, shape: Shape) -> Array:
    """[num_tables + 1] int32, strictly increasing on the axis."""
    (first, last), n = shape.axis, shape.num_tables
    if isinstance(shape.placement, tuple):
        points = to_int32(jnp.round(divide(jnp.asarray(shape.placement, jnp.float32), x_scale)))
        return _strictly_increasing(jnp.clip(points, first, last), last)
    low = _on_axis(shape.low, x_scale, first, last)
    high = jnp.maximum(_on_axis(shape.high, x_scale, first, last), low)
    if shape.placement == "evenly":
        steps = jnp.arange(n + 1, dtype=jnp.int32)
        return _strictly_increasing(low + (2 * steps * (high - low) + n) // (2 * n), last)
    # The numerators of the points low + i * (high - low) / 257 are below 2^24: exact in float32.
    numerators = (SAMPLES + 1) * low + jnp.arange(SAMPLES + 2, dtype=jnp.int32) * (high - low)
    values = function(divide(numerators.astype(jnp.float32), jnp.float32(SAMPLES + 1)) * x_scale)
    root = shape.placement == "balanced"
    return _strictly_increasing(_by_curvature(values, y_scale, y_dtype, low, high, n=n, root=root), last)


def _on_axis(bound: float, x_scale: Array, first: int, last: int) -> Array:
    if abs(bound) == float("inf"):
        return jnp.int32(first if bound < 0 else last)
    return jnp.clip(to_int32(jnp.round(divide(jnp.float32(bound), x_scale))), first, last)


def _strictly_increasing(points: Array, last: int) -> Array:
    """The nearest such integers above the points, then below `last`."""
    steps = jnp.arange(points.size, dtype=jnp.int32)
    return jnp.minimum(jax.lax.cummax(points - steps) + steps, last - steps[::-1])


@partial(jax.jit, static_argnames=("y_dtype", "n", "root"))
def _by_curvature(values: Array, y_scale: Array, y_dtype: str, low: Array, high: Array, *, n: int, root: bool) -> Array:
    """Splits [low, high] where the sum of |f''| passes j / n of the whole, or that of its `root`, in integers.

    f is taken as the output will be: saturated, in 2^-12 LSB of int16 (2^-20 of int8). What a second difference has
    below 2^-21 of the output's range is noise of float32 and ignored. Every sample weighs at least 1 (of 2^14 at most),
    so that a straight line is split evenly.
    """
    ends = integer_range(y_dtype)
    fine = jnp.clip(divide(values, y_scale), *ends) * 2.0 ** (28 - bit_width(y_dtype))
    y = to_int32(jnp.round(fine))
    bend = jnp.abs(y[:-2] - 2 * y[1:-1] + y[2:])  # [256], at most 2^29
    if root:
        weight = jnp.floor(jnp.sqrt((bend >> 6).astype(jnp.float32))).astype(jnp.int32) + 1  # of integers below 2^24
    else:
        weight = (bend >> jnp.maximum(32 - jax.lax.clz(jnp.max(bend)) - 14, 6)) + 1
    reached = jnp.cumsum(weight)
    wanted = jnp.arange(1, n, dtype=jnp.int32) * reached[-1]  # [n - 1], in 1 / n
    sample = jnp.sum((n * reached[None, :] <= wanted[:, None]).astype(jnp.int32), axis=1)
    # Sample i stands for the points from i + 1/2 to i + 3/2, of 257, the outermost for all up to the end; in 64ths.
    start = jnp.where(sample == 0, 0, 64 * sample + 32)
    width = jnp.where((sample == 0) | (sample == SAMPLES - 1), 96, 64)
    position = start + (wanted - n * (reached - weight)[sample]) * width // (n * weight[sample])
    inner = low + position * (high - low) // (64 * (SAMPLES + 1))
    return jnp.concatenate([low[None], inner, high[None]])


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def direct_table(function: Function, x_scale: Array, y_scale: Array, y_dtype: str, rounding: str) -> Array:
    """T[i + 128] = quantize(f(i * s_x), s_y) for int8 input: [256] of the output's dtype."""
    return quantize(function(jnp.arange(-128, 128, dtype=jnp.float32) * x_scale), y_scale, y_dtype, rounding)


def segment_table(
    function: Function, x_scale: Array, y_scale: Array, y_dtype: str, rounding: str, shape: Shape
) -> Segments:
    """Every constant of a segmented table for int16 input."""
    boundaries = boundaries_of(function, x_scale, y_scale, y_dtype, shape)
    lower, width = boundaries[:-1, None], jnp.diff(boundaries)[:, None]
    numerators = (ENTRIES - 1) * lower + jnp.arange(ENTRIES, dtype=jnp.int32) * width  # exact in float32
    points = divide(numerators.astype(jnp.float32), jnp.float32(ENTRIES - 1)) * x_scale
    entries = quantize(function(points), y_scale, y_dtype, rounding)

    first, last = shape.axis
    corners = jnp.stack([jnp.int32(first), boundaries[0], boundaries[-1], jnp.int32(last)])
    heights = _in_lsb(function(corners.astype(jnp.float32) * x_scale), y_scale)
    left, right = heights[:2], heights[2:]
    if shape.slopes[0] is not None:
        left = jnp.stack([left[1] + _rise(shape.slopes[0], corners[0] - corners[1], x_scale, y_scale), left[1]])
    if shape.slopes[1] is not None:
        right = jnp.stack([right[0], right[0] + _rise(shape.slopes[1], corners[3] - corners[2], x_scale, y_scale)])
    limit = int(_LINE_LIMIT)
    ends = jnp.concatenate([corners[None, :2], jnp.stack([boundaries[:-1], boundaries[1:]], 1), corners[None, 2:]])
    index = jnp.broadcast_to(jnp.asarray([[0, LAST]], jnp.int32), (shape.num_tables, 2))
    values = jnp.concatenate([jnp.clip(left, -limit, limit)[None], index, jnp.clip(right, -limit, limit)[None]])
    anchor = (jnp.arange(shape.num_tables + 2) == 0).astype(jnp.int32)  # the left line meets its table at its end
    return Segments(boundaries, line_constants(ends, values, anchor), entries, jnp.int32(shape.mirror))


def _in_lsb(values: Array, y_scale: Array) -> Array:
    return to_int32(jnp.clip(jnp.round(divide(values, y_scale)), -_LINE_LIMIT, _LINE_LIMIT))


def _rise(slope: float, run: Array, x_scale: Array, y_scale: Array) -> Array:
    """What a line of that real slope rises over `run` LSB of x, in LSB of y."""
    return _in_lsb(jnp.float32(slope) * (run.astype(jnp.float32) * x_scale), y_scale)


def evaluate_segments(x: Array, table: Segments, dtype: str) -> Array:
    """The output integers, of `dtype`, for x int32 in the int16 range, any shape."""
    if x.size > 2**16:  # more elements than there are inputs: the function of every input once, then one look-up
        return evaluate_segments(jnp.arange(-(2**15), 2**15, dtype=jnp.int32), table, dtype)[x + 2**15]
    count = table.entries.shape[0]
    point = jnp.where(table.mirror == 0, x, jnp.abs(x))
    segment = jnp.searchsorted(table.boundaries, point, side="right", method="compare_all").astype(jnp.int32)
    alpha, beta, left, right = (table.lines[:, i][segment] for i in range(4))
    line = shift_right(point * alpha + (beta << left), right, "half_up")
    t = jnp.clip(line, 0, LAST)
    flat, row = table.entries.reshape(-1).astype(jnp.int32), ENTRIES * jnp.clip(segment - 1, 0, count - 1)
    here, after = flat[row + (t >> 8)], flat[row + jnp.minimum((t >> 8) + 1, ENTRIES - 1)]
    curve = here + shift_right((after - here) * (t & 255), jnp.int32(8), "half_up")
    y = jnp.where((segment == 0) | (segment == count + 1), jnp.clip(line, *integer_range(dtype)), curve)
    return jnp.where((table.mirror < 0) & (x < 0), negate(y, dtype), saturate(y, dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Reducing an angle to one period


@jax.jit
def turn_constants(x_scale: Array) -> tuple[Array, Array]:
    """(turn [2] int32, scale): x LSB of `x_scale` rad are (turn[0] * 2^16 + turn[1]) * x / 2^48 turns, modulo 1.

    The reduced angle has the scale that is returned: pi / 2^15, its int16 axis is one period; or `x_scale` itself
    where the whole axis lies within a period, and `reduce_turns` is then the identity. 2 * pi has 30 bits: the error
    stays below 2^-18 turns, a quarter LSB of the reduced angle, up to 4000 periods.
    """
    pattern = jax.lax.bitcast_convert_type(jnp.asarray(x_scale, jnp.float32), jnp.int32)
    mantissa, exponent = (pattern & 0x7FFFFF) | 0x800000, ((pattern >> 23) & 0xFF) - 150
    steps = exponent + 27 + 48  # bits of the quotient after the point that mantissa / _TWO_PI starts from

    def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        high, low, rest = state
        active, fits = i < steps, 2 * rest >= _TWO_PI
        longer = 2 * low + fits.astype(jnp.int32)
        rest = jnp.where(active, jnp.where(fits, 2 * rest - _TWO_PI, 2 * rest), rest)
        high = jnp.where(active, (high << 1) | (longer >> 16), high)  # whole turns fall off at the top
        return high, jnp.where(active, longer & 0xFFFF, low), rest

    zero = jnp.zeros_like(mantissa)
    high, low, _ = jax.lax.fori_loop(0, 128, step, (zero, zero, mantissa))
    period = jnp.float32(jnp.pi / 2**15)
    within = x_scale <= period
    return jnp.where(within, jnp.asarray([2**16, 0], jnp.int32), jnp.stack([high, low])), jnp.where(
        within, x_scale, period
    )


def reduce_turns(x: Array, turn: Array) -> Array:
    """The angle x within its period, in [-2^15, 2^15): the products are modulo 2^32, which is a whole turn."""
    phase = x * turn[0] + ((x * turn[1]) >> 16)
    nearest = shift_right(phase, jnp.int32(16), "half_up")
    return ((nearest + 2**15) & 0xFFFF) - 2**15
