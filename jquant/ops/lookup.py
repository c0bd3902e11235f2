"""How a function of one operand becomes a lookup table: section 6 of the specification.

A table function is an operator with a field `table: TableOptions` and an `eval_float`; `as_table` gives it the rest.
The functions themselves are in `jquant/ops/table.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, singledispatch
from itertools import pairwise
from math import inf, isfinite
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jquant.numerics import tables
from jquant.numerics.rounding import dequantize, quantize, widen
from jquant.numerics.tables import MAX_TABLES, Segments, Shape
from jquant.ops.base import Lowered, Operand, eval_float, eval_integer, lower_op
from jquant.types import Array, LoweringError, NodeFormat, Op, QConfigError, Target

_MIRROR = {"none": 0, "even": 1, "odd": -1}
FunctionClass = TypeVar("FunctionClass", bound=type[Op])


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """The segmented table of an int16 input. A table of an int8 input has all 256 entries, and nothing to choose.

    `num_tables`   a multiple of 6 up to 126, each with 64 entries
    `placement`    of the boundaries: "evenly", by "curvature" (equal sums of |f''|), "balanced" (equal sums of its
                   square root, which spreads the error of interpolation: best on smooth steep functions, not on poles),
                   or given: num_tables + 1 real numbers, strictly increasing; not negative for a mirrored function
    `input_range`  real; the boundaries stay within, and lines continue the function outside. None: its domain. Of a
                   mirrored function the end farther from 0 counts
    `symmetric`    use the symmetry of an odd or even function: its tables cover |x|, twice as densely
    `left_slope`   real slope of the line below the first boundary; None: it meets the function at both its ends
    `right_slope`  the same above the last boundary
    """

    num_tables: int = 6
    placement: Literal["evenly", "curvature", "balanced"] | tuple[float, ...] = "evenly"
    input_range: tuple[float, float] | None = None
    symmetric: bool = True
    left_slope: float | None = None
    right_slope: float | None = None

    def __post_init__(self) -> None:
        if self.num_tables % 6 or not 6 <= self.num_tables <= MAX_TABLES:
            raise QConfigError(f"num_tables must be a multiple of 6 from 6 to {MAX_TABLES}, not {self.num_tables}")
        if isinstance(self.placement, tuple):
            self._check_points(self.placement)
        elif self.placement not in ("evenly", "curvature", "balanced"):
            raise QConfigError(
                f"placement must be 'evenly', 'curvature', 'balanced' or a tuple of points, not {self.placement!r}"
            )
        if self.input_range is not None:
            low, high = self.input_range
            if not (isfinite(low) and isfinite(high) and low < high):
                raise QConfigError(f"input_range must be two finite numbers, low < high; got {self.input_range}")
        if not all(slope is None or isfinite(slope) for slope in (self.left_slope, self.right_slope)):
            raise QConfigError("left_slope and right_slope must be finite")

    def __str__(self) -> str:
        placement = self.placement if isinstance(self.placement, str) else "at given points"
        parts = [str(self.num_tables), placement]
        parts += [f"on [{self.input_range[0]:g}, {self.input_range[1]:g}]"] if self.input_range else []
        parts += [] if self.symmetric else ["not mirrored"]
        slopes = {"left": self.left_slope, "right": self.right_slope}
        parts += [f"{side} slope {slope:g}" for side, slope in slopes.items() if slope is not None]
        return " ".join(parts)

    def _check_points(self, points: tuple[float, ...]) -> None:
        if len(points) != self.num_tables + 1:
            raise QConfigError(
                f"{self.num_tables} tables have {self.num_tables + 1} boundaries; placement gives {len(points)} points"
            )
        if not all(isfinite(p) for p in points) or any(a >= b for a, b in pairwise(points)):
            raise QConfigError(f"the points of placement must be finite and strictly increasing; got {points}")


EVENLY = TableOptions()
CURVATURE = TableOptions(placement="curvature")


class Traits(NamedTuple):
    """What a table needs to know of a function (real).

    `low`, `high`  the domain, ends included: beyond it, where the function is NaN, the table takes its value at the end
    `symmetry`     f(-x) = f(x) is even, f(-x) = -f(x) odd
    `reduced`      the same function on an angle that lies within one period already; None where there is no period
    """

    low: float = -inf
    high: float = inf
    symmetry: Literal["none", "even", "odd"] = "none"
    reduced: Op | None = None


@singledispatch
def traits(op: Op) -> Traits:
    """Register a table function here if it has a domain, a symmetry or a period."""
    return Traits()


@partial(jax.jit, static_argnames=("op",))
def evaluate_function(op: Op, real: Array) -> Array:
    """The function as a table sees it: real to real, never NaN; what is left of NaN after cutting to the domain is 0.

    The barriers and the jit keep it a computation of its own, so that a table has the same bits inside any jit.
    """
    low, high, *_ = traits(op)
    real = jax.lax.optimization_barrier(jnp.clip(real, low, high))
    values = jax.lax.optimization_barrier(eval_float(op, real))
    return jnp.where(jnp.isnan(values), 0.0, values)


def _options(op: Op) -> TableOptions:
    options = getattr(op, "table", None)
    if not isinstance(options, TableOptions):
        raise LoweringError(f"{type(op).__name__} needs a field `table: TableOptions`; it has {options!r}")
    return options


def _shape(op: Op) -> Shape:
    options, function = _options(op), traits(op)
    mirror = _MIRROR[function.symmetry] if options.symmetric else 0
    low, high = (function.low, function.high) if options.input_range is None else options.input_range
    if mirror:
        low, high = max(low, 0.0), max(abs(low), abs(high))
        if isinstance(options.placement, tuple) and options.placement[0] < 0:
            raise LoweringError(
                f"the function is {function.symmetry}: its tables cover |x|, and the point {options.placement[0]:g} is "
                "below 0; give points from 0 on, or TableOptions(symmetric=False)"
            )
    slopes = options.left_slope, options.right_slope
    return Shape(options.num_tables, options.placement, mirror, low, high, slopes)


def table_constants(op: Op, x_scale: Array, x_dtype: str, y_scale: Array, y_dtype: str, rounding: str) -> dict:
    """The constants of a table function by role: `table` for int8; `Segments`, and `turn` with a period, for int16."""
    if x_dtype not in ("int8", "int16"):
        raise LoweringError(
            f"tables take int8 or int16, and the input is {x_dtype}; give the node before it such a format"
        )
    if y_dtype not in ("int8", "int16"):
        raise LoweringError(f"tables give int8 or int16, and the output is {y_dtype}; set the output to one of them")
    if x_dtype == "int8":
        return {"table": tables.direct_table(partial(evaluate_function, op), x_scale, y_scale, y_dtype, rounding)}
    reduced = traits(op).reduced
    if reduced is None:
        function = partial(evaluate_function, op)
        return tables.segment_table(function, x_scale, y_scale, y_dtype, rounding, _shape(op))._asdict()
    turn, angle_scale = tables.turn_constants(x_scale)
    function = partial(evaluate_function, reduced)
    made = tables.segment_table(function, angle_scale, y_scale, y_dtype, rounding, _shape(reduced))
    return {**made._asdict(), "turn": turn}


def table_integers(x: Array, y_dtype: str, **constants: Array) -> Array:
    """The output integers, stored as `y_dtype`, for int8 or int16 integers x."""
    if "table" in constants:
        return constants["table"][widen(x) + 128]
    x = widen(x)
    if (turn := constants.pop("turn", None)) is not None:
        x = tables.reduce_turns(x, turn)
    return tables.evaluate_segments(x, Segments(**constants), y_dtype)


def table_float(
    op: Op, x: Array, x_scale: Array, x_dtype: str, y_scale: Array, y_dtype: str, *, rounding: str = "half_even"
) -> Array:
    """What the table of `op` gives for real x, as real numbers: to find tables that cost accuracy, before lowering.

    It has no useful gradient (that of a table is zero): combine it with the one of `eval_float`.

    Args:
      op: a table function.
      x: real, any shape, float32; quantized here to `x_dtype` at `x_scale`.
      x_scale, y_scale: real per LSB, scalars; they may be traced.
      x_dtype, y_dtype: "int8" or "int16".
      rounding: the target's `quantize_rounding`.

    Returns:
      Real, the shape of x: integers of `y_dtype` times `y_scale`.
    """
    constants = table_constants(op, x_scale, x_dtype, y_scale, y_dtype, rounding)
    integers = table_integers(quantize(x, x_scale, x_dtype, rounding), y_dtype, **constants)
    return dequantize(integers, y_scale)


def _lower(op: Op, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    (x,) = inputs
    return Lowered(table_constants(op, x.scale, x.dtype, output.scale, output.dtype, target.quantize_rounding))


def is_table(op: Op) -> bool:
    """Whether `as_table` made the operator one that lowers to a table."""
    return lower_op.dispatch(type(op)) is _lower


def lower_tables_alike(sites: Mapping[str, tuple[Op, Operand, Operand]], target: Target) -> dict[str, Lowered]:
    """Tables of int16 inputs that differ in their scales alone, made by one loop: {site: what `lower_op` gives}.

    For use inside jit. A table takes thousands of operations to make; a recurrent network that is unrolled has hundreds
    of tables, and XLA would compile each of them apart.

    Args:
      sites: {any name: (table function, operand, output)}. What has no like, or cannot be a table, is left out of the
        result: `lower_op` makes the one, and has the words for the other.
    """
    groups: dict[tuple[Op, str, str], list[str]] = {}
    for name, (op, x, y) in sites.items():
        if x.dtype == "int16" and y.dtype in ("int8", "int16"):
            groups.setdefault((op, x.dtype, y.dtype), []).append(name)
    found: dict[str, Lowered] = {}
    for (op, x_dtype, y_dtype), names in groups.items():
        if len(names) > 1:
            pairs = [jnp.stack([jnp.float32(operand.scale) for operand in sites[name][1:]]) for name in names]
            made = jax.lax.map(partial(_table_of_scales, op, x_dtype, y_dtype, target), jnp.stack(pairs))
            found |= {name: Lowered({role: v[i] for role, v in made.items()}) for i, name in enumerate(names)}
    return found


def _table_of_scales(op: Op, x_dtype: str, y_dtype: str, target: Target, scales: Array) -> dict:
    x_scale, y_scale = scales
    return table_constants(op, x_scale, x_dtype, y_scale, y_dtype, target.quantize_rounding)


def _integers(op: Op, node_format: NodeFormat, target: Target, x: Array, **constants: Array) -> Array:
    return table_integers(x, node_format.output, **constants)


def as_table(cls: FunctionClass) -> FunctionClass:
    """Class decorator: the operator, with an `eval_float` and a field `table: TableOptions`, lowers to a table."""
    lower_op.register(cls)(_lower)
    eval_integer.register(cls)(_integers)
    return cls


def without_period(op: Any) -> Op:
    """The same operator with `single_period=False`."""
    return replace(op, single_period=False)
