"""How a function of one operand becomes a lookup table: section 6 of the specification.

`table_function` declares one: an operator with a field `table: TableOptions`. `as_table` is its part for a class
that has an `eval_float` already.
The functions themselves are in `jquant/ops/table.py`. Numpy makes the tables of a function with a float64 form
(`eval_float64`), also inside jit, by a host callback: the same bytes at every optimization level and on every platform.
A function without is evaluated by its float rule, in the float32 of the compiler that runs it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial, singledispatch
from itertools import pairwise
from math import inf, isfinite
from typing import Any, Literal, NamedTuple, TypeVar, dataclass_transform, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jquant.graph.operator import Lowered, Operand, check_roles, constraints, eval_float, eval_integer, lower_op
from jquant.numerics import tables
from jquant.numerics.namespace import array_namespace
from jquant.numerics.rounding import dequantize, quantize, widen
from jquant.numerics.tables import Segments, Shape
from jquant.types import Array, LoweringError, NodeFormat, Op, QConfigError, TableFormat, Target

_MIRROR = {"none": 0, "even": 1, "odd": -1}
Placement = Literal["least_error", "evenly", "curvature", "balanced", "geometric"]
FunctionClass = TypeVar("FunctionClass", bound=type[Op])


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """The segmented table of an int16 input. A table of an int8 input has all 256 entries, and nothing to choose.

    `num_tables`   None: as many as the march has by default (`Target.tables`), or as `placement` gives points for
    `placement`    of the boundaries: "least_error", which depends on both scales: of the following and of segments as
                   wide as a small error of interpolation allows, the table that is nearest to the function over all
                   integers of the input (a function without a float64 form has "balanced" in its place); "evenly";
                   by "curvature" (equal sums of |f''|); "balanced" (equal sums of its square root, which spreads the
                   error of interpolation: best on smooth steep functions, not on poles); "geometric" (each a constant
                   times the one before, from where the output leaves saturation: for positive numbers and a pole at
                   0); or given: num_tables + 1 real numbers, strictly increasing; not negative for a mirrored function
    `input_range`  real; the boundaries stay within, and lines continue the function outside. None: its domain. Of a
                   mirrored function the end farther from 0 counts
    `symmetric`    use the symmetry of an odd or even function: its tables cover |x|, twice as densely
    `left_slope`   real slope of the line below the first boundary; None: it meets the function at both its ends
    `right_slope`  the same above the last boundary
    """

    num_tables: int | None = None
    placement: Placement | tuple[float, ...] = "least_error"
    input_range: tuple[float, float] | None = None
    symmetric: bool = True
    left_slope: float | None = None
    right_slope: float | None = None

    def __post_init__(self) -> None:
        if self.num_tables is not None and self.num_tables < 1:
            raise QConfigError(f"num_tables must be at least 1, not {self.num_tables}")
        if isinstance(self.placement, tuple):
            self._check_points(self.placement)
        elif self.placement not in get_args(Placement):
            known = ", ".join(map(repr, get_args(Placement)))
            raise QConfigError(f"placement must be one of {known}, or a tuple of points, not {self.placement!r}")
        if self.input_range is not None:
            low, high = self.input_range
            if not (isfinite(low) and isfinite(high) and low < high):
                raise QConfigError(f"input_range must be two finite numbers, low < high; got {self.input_range}")
        if not all(slope is None or isfinite(slope) for slope in (self.left_slope, self.right_slope)):
            raise QConfigError("left_slope and right_slope must be finite")

    def __str__(self) -> str:
        placement = self.placement if isinstance(self.placement, str) else "at given points"
        parts = [] if self.num_tables is None else [str(self.num_tables)]
        parts += [placement]
        parts += [f"on [{self.input_range[0]:g}, {self.input_range[1]:g}]"] if self.input_range else []
        parts += [] if self.symmetric else ["not mirrored"]
        slopes = {"left": self.left_slope, "right": self.right_slope}
        parts += [f"{side} slope {slope:g}" for side, slope in slopes.items() if slope is not None]
        return " ".join(parts)

    def count(self, form: TableFormat) -> int:
        """How many tables a march makes by these options."""
        if self.num_tables is not None:
            return self.num_tables
        return len(self.placement) - 1 if isinstance(self.placement, tuple) else form.count

    def _check_points(self, points: tuple[float, ...]) -> None:
        if len(points) < 2:
            raise QConfigError(f"placement gives {len(points)} points; a table lies between two")
        if self.num_tables is not None and len(points) != self.num_tables + 1:
            raise QConfigError(
                f"{self.num_tables} tables have {self.num_tables + 1} boundaries; placement gives {len(points)} points"
            )
        if not all(isfinite(p) for p in points) or any(a >= b for a, b in pairwise(points)):
            raise QConfigError(f"the points of placement must be finite and strictly increasing; got {points}")


LEAST_ERROR = TableOptions()


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


ORDINARY = Traits()


@singledispatch
def traits(op: Op) -> Traits:
    """Register a table function here if it has a domain, a symmetry or a period."""
    return Traits()


@singledispatch
def eval_float64(op: Op, x: np.ndarray) -> np.ndarray:
    """The function on float64 arrays, right to 40 bits or more: what its table entries are rounded from.

    Register a function here beside its `eval_float`. Warnings of numpy are off; NaN and infinity may come out.
    """
    raise LoweringError(f"{type(op).__name__} has no float64 form: register one with jquant.ops.lookup.eval_float64")


def has_float64(op: Op) -> bool:
    return eval_float64.dispatch(type(op)) is not eval_float64.dispatch(Op)


def evaluate_function(op: Op, real: Array) -> Array:
    """The function as a table sees it: real to real, never NaN; what is left of NaN after cutting to the domain is 0.

    In float64 for a numpy array, by `eval_float64`; else by `eval_float`.
    """
    low, high, *_ = traits(op)
    if array_namespace(real) is np:
        return np.nan_to_num(eval_float64(op, np.clip(real, low, high)), nan=0.0, posinf=np.inf, neginf=-np.inf)
    return _evaluate_compiled(op, real)


@partial(jax.jit, static_argnames=("op",))
def _evaluate_compiled(op: Op, real: Array) -> Array:
    """The barriers and the jit keep it a computation of its own, so that a table has the same bits inside any jit."""
    low, high, *_ = traits(op)
    real = jax.lax.optimization_barrier(jnp.clip(real, low, high))
    values = jax.lax.optimization_barrier(eval_float(op, real))
    return jnp.where(jnp.isnan(values), 0.0, values)


def _options(op: Op) -> TableOptions:
    options = getattr(op, "table", None)
    if not isinstance(options, TableOptions):
        raise LoweringError(f"{type(op).__name__} needs a field `table: TableOptions`; it has {options!r}")
    return options


def _shape(op: Op, form: TableFormat) -> Shape:
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
    placement = options.placement
    if placement == "least_error" and not has_float64(op):
        placement = "balanced"
    return Shape(options.count(form), placement, mirror, low, high, slopes)


def table_constants(op: Op, x_scale: Array, x_dtype: str, y_scale: Array, y_dtype: str, form: TableFormat) -> dict:
    """The constants of a table function by role: `table` for int8; `Segments`, and `turn` with a period, for int16."""
    if x_dtype not in ("int8", "int16"):
        raise LoweringError(
            f"tables take int8 or int16, and the input is {x_dtype}; give the node before it such a format"
        )
    if y_dtype not in ("int8", "int16"):
        raise LoweringError(f"tables give int8 or int16, and the output is {y_dtype}; set the output to one of them")
    if x_dtype == "int16" and (broken := _limits(_options(op), form)):
        raise LoweringError(broken[0])
    make = partial(_constants, op, x_dtype, y_dtype, form)
    if not has_float64(op):
        return make(jnp.asarray(x_scale), jnp.asarray(y_scale))
    if not any(isinstance(scale, jax.core.Tracer) for scale in (x_scale, y_scale)):
        return _on_host(make, x_scale, y_scale)
    kinds = _constant_kinds(op, x_dtype, y_dtype, form)
    scales = jax.lax.stop_gradient((x_scale, y_scale))
    return jax.pure_callback(partial(_on_host, make), kinds, *scales, vmap_method="sequential")


def _on_host(make: Callable[[np.ndarray, np.ndarray], dict[str, Any]], x_scale: Any, y_scale: Any) -> dict[str, Any]:
    with np.errstate(all="ignore"):
        return make(np.asarray(x_scale, np.float32), np.asarray(y_scale, np.float32))


def _constant_kinds(op: Op, x_dtype: str, y_dtype: str, form: TableFormat) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of what `table_constants` gives."""
    entries = np.dtype(y_dtype)
    if x_dtype == "int8":
        return {"table": jax.ShapeDtypeStruct((256,), entries)}
    n = _options(op).count(form)
    shapes = {"boundaries": (n + 1,), "lines": (n + 2, 4), "entries": (n, form.entries), "mirror": ()}
    shapes |= {} if traits(op).reduced is None else {"turn": (2,)}
    dtypes = dict.fromkeys(shapes, np.dtype(np.int32)) | {"entries": entries}
    return {role: jax.ShapeDtypeStruct(shape, dtypes[role]) for role, shape in shapes.items()}


def _limits(options: TableOptions, form: TableFormat) -> list[str]:
    """The limits of a march that the options break."""
    count = options.count(form)
    if count % form.multiple or count > form.max_count:
        return [
            f"num_tables must be a multiple of {form.multiple} from {form.multiple} to {form.max_count}, not {count}"
        ]
    return []


def _constants(op: Op, x_dtype: str, y_dtype: str, form: TableFormat, x_scale: Array, y_scale: Array) -> dict[str, Any]:
    if x_dtype == "int8":
        function = partial(evaluate_function, op)
        return {"table": tables.direct_table(function, x_scale, y_scale, y_dtype, form.entry_rounding)}
    reduced = traits(op).reduced
    if reduced is None:
        return _segments(op, x_scale, y_scale, y_dtype, form)._asdict()
    turn, angle_scale = tables.turn_constants(x_scale)
    return {**_segments(reduced, angle_scale, y_scale, y_dtype, form)._asdict(), "turn": turn}


def _segments(op: Op, x_scale: Array, y_scale: Array, y_dtype: str, form: TableFormat) -> Segments:
    function, shape = partial(evaluate_function, op), _shape(op, form)
    if shape.placement != "least_error":
        return tables.segment_table(function, x_scale, y_scale, y_dtype, form, shape)
    boundaries: Any = np.array(_nearest_boundaries(op, float(x_scale), float(y_scale), y_dtype, form), np.int32)
    return tables.table_between(function, x_scale, y_scale, y_dtype, form, shape, boundaries)


def segment_lines(op: Op, x_scale: Any, y_scale: Any, form: TableFormat, boundaries: Any) -> tuple[Any, Any, Any]:
    """What `line_constants` is given for the tables of a function of int16 with these boundaries, on the host."""
    reduced = traits(op).reduced
    own, scale = (op, x_scale) if reduced is None else (reduced, tables.turn_constants(x_scale)[1])
    with np.errstate(all="ignore"):
        return tables.lines_between(
            partial(evaluate_function, own), scale, y_scale, form, _shape(own, form), boundaries
        )


@lru_cache(maxsize=4096)
def _nearest_boundaries(op: Op, x_scale: float, y_scale: float, y_dtype: str, form: TableFormat) -> tuple[int, ...]:
    """Kept, since a step of bit-true training asks again for the scales that are not trained."""
    scales = np.float32(x_scale), np.float32(y_scale)
    with np.errstate(all="ignore"):
        found = tables.nearest_boundaries(partial(evaluate_function, op), *scales, y_dtype, form, _shape(op, form))
    return tuple(found.tolist())


def table_integers(x: Array, y_dtype: str, form: TableFormat, **constants: Array) -> Array:
    """The output integers, stored as `y_dtype`, for int8 or int16 integers x."""
    if "table" in constants:
        check_roles(constants, "table")
        return constants["table"][widen(x) + 128]
    x = widen(x)
    if (turn := constants.pop("turn", None)) is not None:
        x = tables.reduce_turns(x, turn, form.angle_rounding)
    return tables.evaluate_segments(x, Segments(**constants), y_dtype, form)


def table_float(
    op: Op, x: Array, x_scale: Array, x_dtype: str, y_scale: Array, y_dtype: str, *, target: Target
) -> Array:
    """What the table of `op` gives for real x, as real numbers: to find tables that cost accuracy, before lowering.

    It has no useful gradient (that of a table is zero): combine it with the one of `eval_float`.

    Args:
      op: a table function.
      x: real, any shape, float32; quantized here to `x_dtype` at `x_scale`.
      x_scale, y_scale: real per LSB, scalars; they may be traced.
      x_dtype, y_dtype: "int8" or "int16".
      target: the march.

    Returns:
      Real, the shape of x: integers of `y_dtype` times `y_scale`.
    """
    constants = table_constants(op, x_scale, x_dtype, y_scale, y_dtype, target.tables)
    x = quantize(x, x_scale, x_dtype, target.quantize_rounding)
    integers = table_integers(x, y_dtype, target.tables, **constants)
    return dequantize(integers, y_scale)


def _lower(op: Op, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    (x,) = inputs
    return Lowered(table_constants(op, x.scale, x.dtype, output.scale, output.dtype, target.tables))


def is_table(op: Op) -> bool:
    """Whether `as_table` made the operator one that lowers to a table."""
    return lower_op.dispatch(type(op)) is _lower


def _integers(op: Op, node_format: NodeFormat, target: Target, x: Array, **constants: Array) -> Array:
    return table_integers(x, node_format.output, target.tables, **constants)


def _constraints(
    op: Op, inputs: Sequence[Operand], output: Operand, weight_dtype: str | None, target: Target
) -> list[str]:
    return _limits(_options(op), target.tables) if inputs[0].dtype == "int16" else []


def as_table(cls: FunctionClass) -> FunctionClass:
    """Class decorator: the operator, with an `eval_float` and a field `table: TableOptions`, lowers to a table."""
    lower_op.register(cls)(_lower)
    eval_integer.register(cls)(_integers)
    constraints.register(cls)(_constraints)
    return cls


DECLARED: list[type[Op]] = []  # by `table_function`, in order


@dataclass_transform(frozen_default=True, kw_only_default=True)
def table_function(
    float32: Callable[..., Array],
    float64: Callable[..., np.ndarray],
    described: Traits | Callable[[Any], Traits] = ORDINARY,
) -> Callable[[FunctionClass], FunctionClass]:
    """Class decorator that declares a function of one operand: a frozen dataclass with a field `table: TableOptions`.

    Args:
      float32: its float rule, on JAX arrays, differentiable: `x -> y`, or `(op, x) -> y` where the class has other
        fields than `table`.
      float64: the same on numpy arrays, right to 40 bits or more.
      described: its domain, symmetry and period, or a function of the operator that gives them.
    """

    def declare(cls: FunctionClass) -> FunctionClass:
        cls.layout = "elementwise"
        made = dataclass(frozen=True, kw_only=True)(cls)
        has_attributes = len(fields(made)) > 1
        eval_float.register(made)(float32 if has_attributes else lambda op, x: float32(x))
        eval_float64.register(made)(float64 if has_attributes else lambda op, x: float64(x))
        traits.register(made)(described if callable(described) else lambda op: described)
        DECLARED.append(made)
        return as_table(made)  # type: ignore[return-value]  # the class, with dataclass methods

    return declare


def without_period(op: Any) -> Op:
    """The same operator with `single_period=False`."""
    return replace(op, single_period=False)
