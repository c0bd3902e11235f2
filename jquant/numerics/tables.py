"""Lookup tables: section 6 of the specification. 256 entries for int8; tables and lines for int16, by a `TableFormat`.

Everything but the function itself is integer arithmetic: a line goes through two points with integer coordinates, and
its slope and offset are exact ratios of integers. The function is evaluated in float64 on the host, and its values are
rounded once, to the grid of the output: no compiler, platform or optimization level decides an entry. Given JAX arrays,
all of this runs in float32 under XLA; `jquant/ops/lookup.py` does so only for functions without a float64 form.
"""

import itertools
from collections.abc import Callable
from functools import partial
from math import inf, prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.numerics import placement
from jquant.numerics.namespace import array_namespace, bit_length, bits_of, repeat, traced_once
from jquant.numerics.rounding import divide, goes_up, negate, quantize, saturate, shift_right, to_int32
from jquant.types import Array, TableFormat, bit_width, integer_range

SAMPLES = 256  # of the curvature
NEAR = 2.0  # LSB: one of interpolation and two roundings of half a step; no other placement is looked for
_LINE_LIMIT = 2.0**23  # LSB; values at the ends of an outer line are clipped to it
_TWO_PI = 843314857  # 2 * pi * 2^27, to the nearest integer

Function = Callable[[Array], Array]  # real to real, without NaN


class Segments(NamedTuple):
    """The constants of a segmented table with N tables, all integers.

    `boundaries`  [N + 1] int32, strictly increasing: table j owns boundaries[j] <= x < boundaries[j + 1]
    `lines`       [N + 2, 4] int32 (alpha, beta, l, r): the left line, N index lines, the right line
    `entries`     [N, form.entries] in LSB of the output, of its dtype
    `mirror`      int32: 0 none; 1 even, -1 odd: the table is for |x|, in [0, 32768], and the sign is put back
    """

    boundaries: Array
    lines: Array
    entries: Array
    mirror: Array


class Shape(NamedTuple):
    """How a segmented table is laid out (static).

    `placement`  "evenly", "curvature", "balanced", "geometric", "least_error" (on the host), or the boundaries in real
                 units, num_tables + 1 of them
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
    xp = array_namespace(whole, part, divisor)
    length = bit_length(whole)
    cut = xp.maximum(length - 16, 0)
    bits, dropped = whole >> cut, whole & ((1 << cut) - 1)

    def step(_: int, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        bits, rest, count = state
        more, doubled = bits < 2**15, 2 * rest
        fits = doubled >= divisor
        longer = 2 * bits + fits.astype(xp.int32)
        rest = xp.where(more, xp.where(fits, doubled - divisor, doubled), rest)
        return xp.where(more, longer, bits), rest, count + more.astype(xp.int32)

    bits, rest, count = repeat(32, step, (bits, part, xp.zeros_like(bits)))
    exponent = xp.where(bits == 0, -99, 16 + cut - count)
    return Leading(bits, exponent, (rest == 0) & (dropped == 0))


def round_leading(value: Leading, shift: Array, negative: Array, rounding: str) -> Array:
    """The magnitude of +-value * 2^shift rounded; 2^16 stands for anything that leaves 15 bits before rounding."""
    xp = array_namespace(value.bits, shift)
    drop = xp.clip(16 - (value.exponent + shift), 1, 18)
    floor, half = value.bits >> drop, (value.bits >> (drop - 1)) & 1
    below = (value.bits & ((1 << (drop - 1)) - 1)) != 0
    up = goes_up(floor, half == 1, below | ~value.exact, negative, rounding)
    return xp.where(value.exponent + shift > 15, 2**16, floor + up)


@partial(traced_once, static_argnames=("form",))
def line_constants(ends: Array, values: Array, anchor: Array, *, form: TableFormat) -> Array:
    """(alpha, beta, l, r) of the lines through (ends[:, 0], values[:, 0]) and (ends[:, 1], values[:, 1]).

    r is the largest in [0, max_shift] for which |alpha| < 2^coefficient_bits and neither beta << l nor x * alpha +
    (beta << l) leaves int32 for any x of the line's own closed range, ends[:, 0] to ends[:, 1]. A slope of
    2^coefficient_bits or more is clamped, and such a line goes through the end that `anchor` names.

    Args:
      ends: [S, 2] int32, the first not above the second; equal ends make a constant.
      values: [S, 2] int32, |values| <= 2^23.
      anchor: [S] int32, 0 or 1.

    Returns:
      [S, 4] int32.
    """
    xp = array_namespace(ends, values, anchor)
    alpha, beta, left, fits = line_forms(ends, values, anchor, form=form)
    best = xp.max(xp.where(fits, xp.arange(fits.shape[1], dtype=xp.int32), 0), axis=1)  # r = 0 always fits
    chosen = [xp.take_along_axis(v, best[:, None], 1)[:, 0] for v in (alpha, beta, left)]
    return xp.stack([*chosen, best], axis=1)


def line_forms(ends: Array, values: Array, anchor: Array, *, form: TableFormat) -> tuple[Array, Array, Array, Array]:
    """The lines of `line_constants` for every r in [0, max_shift]: alpha, beta, l and whether they fit, [S, r] each."""
    xp = array_namespace(ends, values, anchor)
    run = ends[:, 1] - ends[:, 0]
    rise = xp.where(run > 0, values[:, 1] - values[:, 0], 0)
    bits, rounding = form.coefficient_bits, form.coefficient_rounding
    most = np.int32(2**bits - 1)
    steep = xp.abs(rise) > most * xp.maximum(run, 1)
    rise = xp.where(steep, most * xp.sign(rise), rise)
    run = xp.where(steep, 1, xp.maximum(run, 1))
    slope = leading(xp.abs(rise) // run, xp.abs(rise) % run, run)
    x0 = xp.take_along_axis(ends, anchor[:, None], 1)[:, 0]
    y0 = xp.take_along_axis(values, anchor[:, None], 1)[:, 0]
    negative, offset = _offset(x0, y0, rise, run)

    r = xp.arange(form.max_shift + 1, dtype=xp.int32)
    slope, offset = (Leading(*(v[:, None] for v in number)) for number in (slope, offset))
    falls, negative = (rise < 0)[:, None], negative[:, None]
    alpha = xp.sign(rise)[:, None] * round_leading(slope, r, falls, rounding)
    left = xp.maximum(offset.exponent + r - bits, 0)
    left = left + (round_leading(offset, r - left, negative, rounding) > most).astype(xp.int32)
    beta = xp.where(negative, np.int32(-1), np.int32(1)) * round_leading(offset, r - left, negative, rounding)
    # |beta| >= 2^(bits - 1) where left > 0, so with left = 32 - bits only the lowest int32 itself is reached.
    fits = (xp.abs(alpha) <= most) & ((left <= 31 - bits) | ((left == 32 - bits) & (beta == -(2 ** (bits - 1)))))
    for i in range(2):
        fits &= _sum_fits(xp.clip(alpha, -most, most) * ends[:, i : i + 1], beta << xp.minimum(left, 32 - bits))
    return alpha, beta, left, fits


def _offset(x0: Array, y0: Array, rise: Array, run: Array) -> tuple[Array, Leading]:
    """Sign and magnitude of y0 - x0 * rise / run, exactly: whole numbers and fractions apart, all within int32."""
    xp = array_namespace(x0, y0, rise, run)
    whole_slope = rise // run
    part = (rise - whole_slope * run) * x0
    whole = y0 - whole_slope * x0 - part // run
    part = part % run  # the offset is whole - part / run
    negative = (whole < 0) | ((whole == 0) & (part > 0))
    borrow = (~negative & (part > 0)).astype(xp.int32)
    return negative, leading(xp.abs(whole) - borrow, xp.where(borrow == 1, run - part, part), run)


def _sum_fits(a: Array, b: Array) -> Array:
    """The sum of two int32 does not wrap: it cannot where the signs differ."""
    return ((a < 0) != (b < 0)) | ((a + b < 0) == (a < 0))


# ---------------------------------------------------------------------------------------------------------------------
# Boundaries


def boundaries_of(function: Function, x_scale: Array, y_scale: Array, y_dtype: str, shape: Shape) -> Array:
    """[num_tables + 1] int32, strictly increasing on the axis."""
    xp = array_namespace(x_scale, y_scale)
    (first, last), n = shape.axis, shape.num_tables
    if isinstance(shape.placement, tuple):
        points = to_int32(xp.round(divide(xp.asarray(shape.placement, xp.float32), x_scale)))
        return _strictly_increasing(xp.clip(points, first, last), last)
    low = _on_axis(shape.low, x_scale, first, last)
    high = xp.maximum(_on_axis(shape.high, x_scale, first, last), low)
    if shape.placement == "evenly":
        steps = xp.arange(n + 1, dtype=xp.int32)
        return _strictly_increasing(low + (2 * steps * (high - low) + n) // (2 * n), last)
    if shape.placement == "geometric":
        return _strictly_increasing(_by_factor(function, x_scale, y_scale, y_dtype, high, n), last)
    # The numerators of the points low + i * (high - low) / 257 are below 2^24: exact in float32.
    numerators = (SAMPLES + 1) * low + xp.arange(SAMPLES + 2, dtype=xp.int32) * (high - low)
    values = function(_reals(numerators, SAMPLES + 1) * x_scale)
    root = shape.placement == "balanced"
    return _strictly_increasing(_by_curvature(values, y_scale, y_dtype, low, high, n=n, root=root), last)


def _by_factor(function: Function, x_scale: Array, y_scale: Array, y_dtype: str, high: Array, n: int) -> Array:
    """[n + 1], each a constant times the one before, from where the output leaves saturation (at least 1) to `high`.

    For functions of positive numbers with a pole at 0: their relative error is then the same in every table.
    """
    xp = array_namespace(x_scale, y_scale)
    x = xp.arange(1, 32768, dtype=xp.int32)
    most, size = integer_range(y_dtype)[1], xp.abs(divide(function(_reals(x) * x_scale), y_scale))
    first = xp.argmax((size <= most) & (x < high)).astype(xp.int32)
    # The line in front of the tables rises by at most 256 a step: further from saturation the tables begin one earlier.
    start = xp.where(size[first] < most - 200, xp.maximum(first, 1), first + 1)
    real = np.float64 if xp is np else np.float32
    share = xp.arange(n + 1).astype(real) / real(n)
    points = start.astype(real) * xp.power(xp.maximum(high, start).astype(real) / start.astype(real), share)
    return to_int32(xp.round(points))


def _reals(numerators: Array, denominator: int = 1) -> Array:
    """Quotients of integers: float64 on the host; inside jit float32, which holds all numerators exactly."""
    xp = array_namespace(numerators)
    if xp is np:
        return numerators.astype(np.float64) / denominator
    return divide(numerators.astype(jnp.float32), jnp.float32(denominator))


def _on_axis(bound: float, x_scale: Array, first: int, last: int) -> Array:
    xp = array_namespace(x_scale)
    if abs(bound) == float("inf"):
        return xp.int32(first if bound < 0 else last)
    return xp.clip(to_int32(xp.round(divide(xp.float32(bound), x_scale))), first, last)


def _running_maximum(v: Array) -> Array:
    xp = array_namespace(v)
    return jax.lax.cummax(v) if xp is jnp else xp.maximum.accumulate(v)


def _strictly_increasing(points: Array, last: int) -> Array:
    """The nearest such integers above the points, then below `last`."""
    xp = array_namespace(points)
    steps = xp.arange(points.size, dtype=xp.int32)
    return xp.minimum(_running_maximum(points - steps) + steps, last - steps[::-1])


@partial(traced_once, static_argnames=("y_dtype", "n", "root"))
def _by_curvature(values: Array, y_scale: Array, y_dtype: str, low: Array, high: Array, *, n: int, root: bool) -> Array:
    """Splits [low, high] where the sum of |f''| passes j / n of the whole, or that of its `root`, in integers.

    f is taken as the output will be: saturated, in 2^-12 LSB of int16 (2^-20 of int8). What a second difference has
    below 2^-21 of the output's range is noise of float32 and ignored. Every sample weighs at least 1 (of 2^14 at most),
    so that a straight line is split evenly.
    """
    xp = array_namespace(values, y_scale, low, high)
    ends = integer_range(y_dtype)
    fine = xp.clip(divide(values, y_scale), *ends) * 2.0 ** (28 - bit_width(y_dtype))
    y = to_int32(xp.round(fine))
    bend = xp.abs(y[:-2] - 2 * y[1:-1] + y[2:])  # [256], at most 2^29
    if root:
        weight = xp.floor(xp.sqrt((bend >> 6).astype(xp.float32))).astype(xp.int32) + 1  # of integers below 2^24
    else:
        weight = (bend >> xp.maximum(bit_length(xp.max(bend)) - 14, 6)) + 1
    reached = xp.cumsum(weight, dtype=xp.int32)
    wanted = xp.arange(1, n, dtype=xp.int32) * reached[-1]  # [n - 1], in 1 / n
    sample = xp.sum(n * reached[None, :] <= wanted[:, None], axis=1, dtype=xp.int32)
    # Sample i stands for the points from i + 1/2 to i + 3/2, of 257, the outermost for all up to the end; in 64ths.
    start = xp.where(sample == 0, 0, 64 * sample + 32)
    width = xp.where((sample == 0) | (sample == SAMPLES - 1), np.int32(96), np.int32(64))
    position = start + (wanted - n * (reached - weight)[sample]) * width // (n * weight[sample])
    inner = low + position * (high - low) // (64 * (SAMPLES + 1))
    return xp.concatenate([low[None], inner, high[None]])


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def direct_table(function: Function, x_scale: Array, y_scale: Array, y_dtype: str, rounding: str) -> Array:
    """T[i + 128] = quantize(f(i * s_x), s_y) for int8 input: [256] of the output's dtype."""
    xp = array_namespace(x_scale, y_scale)
    return quantize(function(_reals(xp.arange(-128, 128, dtype=xp.int32)) * x_scale), y_scale, y_dtype, rounding)


def segment_table(
    function: Function, x_scale: Array, y_scale: Array, y_dtype: str, form: TableFormat, shape: Shape
) -> Segments:
    """Every constant of a segmented table for int16 input."""
    given = function, x_scale, y_scale, y_dtype
    if shape.placement == "least_error":
        return table_between(*given, form, shape, nearest_boundaries(*given, form, shape))
    return table_between(*given, form, shape, boundaries_of(*given, shape))


def nearest_boundaries(function: Any, x_scale: Any, y_scale: Any, y_dtype: str, form: TableFormat, shape: Shape) -> Any:
    """[num_tables + 1] int32: the first placement whose table is at most `NEAR` from its function, else the nearest.

    For host arrays of numpy.
    """
    given, (first, last) = (function, x_scale, y_scale, y_dtype), shape.axis
    low, high = (int(_on_axis(bound, x_scale, first, last)) for bound in (shape.low, shape.high))
    # A bound that is rounded may lie inside the domain: the point before it belongs to the tables.
    low, high = max(low - (shape.low > -inf and low > 0), first), max(low, high)
    ends = integer_range(y_dtype)
    x, exact = placement.sampled(function, x_scale, y_scale, low, high, ends)
    integers: Any = x.astype(np.int32)
    rules = ("evenly", "balanced", "geometric", "curvature")
    best, least = None, inf
    boundaries: Any
    for boundaries in itertools.chain(
        (boundaries_of(*given, shape._replace(placement=rule)) for rule in rules),
        map(partial(_strictly_increasing, last=last), placement.equal_errors(x, exact, ends, shape.num_tables, form)),
    ):
        table = table_between(*given, form, shape, boundaries)
        found: Any = evaluate_segments(integers, table, y_dtype, form)
        distance = float(np.abs(found - exact).max())
        if distance < least:
            best, least = boundaries, distance
        if least <= NEAR:
            break
    assert best is not None
    return best


def table_between(
    function: Function,
    x_scale: Array,
    y_scale: Array,
    y_dtype: str,
    form: TableFormat,
    shape: Shape,
    boundaries: Array,
) -> Segments:
    """The constants for given boundaries."""
    xp = array_namespace(x_scale, y_scale)
    lower, width = boundaries[:-1, None], xp.diff(boundaries)[:, None]
    parts = form.entries - 1
    numerators = parts * lower + xp.arange(form.entries, dtype=xp.int32) * width  # exact in float32
    points = _reals(numerators, parts) * x_scale
    entries = quantize(function(points), y_scale, y_dtype, form.entry_rounding)

    ends, values, anchor = lines_between(function, x_scale, y_scale, form, shape, boundaries)
    return Segments(boundaries, line_constants(ends, values, anchor, form=form), entries, xp.int32(shape.mirror))


def lines_between(
    function: Function, x_scale: Array, y_scale: Array, form: TableFormat, shape: Shape, boundaries: Array
) -> tuple[Array, Array, Array]:
    """What `line_constants` is given for the lines of a table, left to right: ends, values, anchor."""
    xp = array_namespace(x_scale, y_scale)
    first, last = shape.axis
    corners = xp.stack([xp.int32(first), boundaries[0], boundaries[-1], xp.int32(last)])
    heights = _in_lsb(function(_reals(corners) * x_scale), y_scale)
    left, right = heights[:2], heights[2:]
    if shape.slopes[0] is not None:
        left = xp.stack([left[1] + _rise(shape.slopes[0], corners[0] - corners[1], x_scale, y_scale), left[1]])
    if shape.slopes[1] is not None:
        right = xp.stack([right[0], right[0] + _rise(shape.slopes[1], corners[3] - corners[2], x_scale, y_scale)])
    limit = int(_LINE_LIMIT)
    ends = xp.concatenate([corners[None, :2], xp.stack([boundaries[:-1], boundaries[1:]], 1), corners[None, 2:]])
    index = xp.broadcast_to(xp.asarray([[0, form.last_index]], xp.int32), (shape.num_tables, 2))
    values = xp.concatenate([xp.clip(left, -limit, limit)[None], index, xp.clip(right, -limit, limit)[None]])
    anchor = (xp.arange(shape.num_tables + 2) == 0).astype(xp.int32)  # the left line meets its table at its end
    return ends, values, anchor


def _in_lsb(values: Array, y_scale: Array) -> Array:
    xp = array_namespace(values, y_scale)
    return to_int32(xp.clip(xp.round(divide(values, y_scale)), -_LINE_LIMIT, _LINE_LIMIT))


def _rise(slope: float, run: Array, x_scale: Array, y_scale: Array) -> Array:
    """What a line of that real slope rises over `run` LSB of x, in LSB of y."""
    return _in_lsb(np.float32(slope) * (run.astype(np.float32) * x_scale), y_scale)


def evaluate_segments(x: Array, table: Segments, dtype: str, form: TableFormat) -> Array:
    """The output integers, of `dtype`, for x int32 in the int16 range, any shape."""
    xp = array_namespace(x, table.entries)
    known = prod(n for n in x.shape if isinstance(n, int))  # an open batch counts as one example
    if xp is jnp and known > 2**16:  # more elements than there are inputs: every input once, then one look-up
        return evaluate_segments(jnp.arange(-(2**15), 2**15, dtype=jnp.int32), table, dtype, form)[x + 2**15]
    count, bits = table.entries.shape[0], form.fraction_bits
    point = xp.where(table.mirror == 0, x, xp.abs(x))
    how = {"method": "compare_all"} if xp is jnp else {}
    segment = xp.searchsorted(table.boundaries, point, side="right", **how).astype(np.int32)
    alpha, beta, left, right = (table.lines[:, i][segment] for i in range(4))
    total = point * alpha + (beta << left)
    line = shift_right(total, right, form.index_rounding)
    t = xp.clip(line, 0, form.last_index)
    flat, row = table.entries.reshape(-1).astype(np.int32), form.entries * xp.clip(segment - 1, 0, count - 1)
    here, after = flat[row + (t >> bits)], flat[row + xp.minimum((t >> bits) + 1, form.entries - 1)]
    curve = here + shift_right((after - here) * (t & (2**bits - 1)), xp.int32(bits), form.interpolation_rounding)
    if form.outer == "constant":
        outer = xp.where(segment == 0, flat[0], flat[-1])
    else:
        line = line if form.line_rounding == form.index_rounding else shift_right(total, right, form.line_rounding)
        outer = xp.clip(line, *integer_range(dtype))
    y = xp.where((segment == 0) | (segment == count + 1), outer, curve)
    return xp.where((table.mirror < 0) & (x < 0), negate(y, dtype), saturate(y, dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Reducing an angle to one period


@traced_once
def turn_constants(x_scale: Array) -> tuple[Array, Array]:
    """(turn [2] int32, scale): x LSB of `x_scale` rad are (turn[0] * 2^16 + turn[1]) * x / 2^48 turns, modulo 1.

    The reduced angle has the scale that is returned: pi / 2^15, its int16 axis is one period; or `x_scale` itself
    where the whole axis lies within a period, and `reduce_turns` is then the identity. 2 * pi has 30 bits: the error
    stays below 2^-18 turns, a quarter LSB of the reduced angle, up to 4000 periods.
    """
    xp = array_namespace(x_scale)
    pattern = bits_of(x_scale)
    mantissa, exponent = (pattern & 0x7FFFFF) | 0x800000, ((pattern >> 23) & 0xFF) - 150
    steps = exponent + 27 + 48  # bits of the quotient after the point that mantissa / _TWO_PI starts from

    def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        high, low, rest = state
        active, fits = i < steps, 2 * rest >= _TWO_PI
        longer = 2 * low + fits.astype(xp.int32)
        rest = xp.where(active, xp.where(fits, 2 * rest - _TWO_PI, 2 * rest), rest)
        high = xp.where(active, (high << 1) | (longer >> 16), high)  # whole turns fall off at the top
        return high, xp.where(active, longer & 0xFFFF, low), rest

    zero = xp.zeros_like(mantissa)
    high, low, _ = repeat(128, step, (zero, zero, mantissa))
    period = xp.float32(xp.pi / 2**15)
    within = x_scale <= period
    return xp.where(within, xp.asarray([2**16, 0], xp.int32), xp.stack([high, low])), xp.where(within, x_scale, period)


def reduce_turns(x: Array, turn: Array, rounding: str) -> Array:
    """The angle x within its period, in [-2^15, 2^15): the products are modulo 2^32, which is a whole turn.

    What is rounded is the angle in [-1/2, 1/2) of a turn.
    """
    phase = x * turn[0] + ((x * turn[1]) >> 16)
    nearest = shift_right(phase, jnp.int32(16), rounding)
    return ((nearest + 2**15) & 0xFFFF) - 2**15
