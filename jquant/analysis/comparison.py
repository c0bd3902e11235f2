"""Two meanings of one plan, value by value: possible because names and edges are the same in all of them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import numpy as np

from jquant.analysis.both_sides import Arrays, Values, evaluated
from jquant.analysis.meanings import Side
from jquant.analysis.metrics import Histogram
from jquant.analysis.statistics import Statistics, measured, numbers_of
from jquant.graph.axes import automatic, automatic_axes
from jquant.graph.checks import is_finite
from jquant.graph.evaluate import bind_inputs
from jquant.graph.float import value_shapes
from jquant.meanings.fake_quant import weight_on_grid
from jquant.meanings.meaning import Mode, check_mode
from jquant.numerics.namespace import to_host
from jquant.numerics.rounding import dequantize, expand, quantize
from jquant.ops.composite import MASKED
from jquant.ops.table import Exp
from jquant.plan.batch_norm import fold_kept
from jquant.plan.scales import check_model, scale_of, value_scales
from jquant.text import did_you_mean, format_table
from jquant.types import Array, InputError, JQuantError, Model, Node, Params, Plan, QuantSpec

GIVEN = "given"  # the name of a side that is arrays from elsewhere


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """The error of one value or weight: `b` against `a`, in real units unless named otherwise.

    `scale`      real per LSB; of a weight with a scale per channel, the largest
    `minimum`, `maximum`      of a; `b_minimum`, `b_maximum` of b
    `sqnr`       dB; `kl` nats, of the histograms; `l1` and `mse` are means, `max_error` is the largest
    `max_lsb`    the largest error in LSB of the value's scale
    `saturated`  the share of values of `a` beyond the range that the scale covers
    `differing`  the share of elements more than half an LSB apart, of `size`
    `own_sqnr`, `own_max_error`, `own_max_lsb`  the same of this node alone: `b` against the node of `a` on the operands
                 that it has in `b`. None for graph inputs and weights, and where a side is arrays that lack an operand
    For a high-precision or float value `max_lsb` and `saturated` are None, and `differing` counts every difference.
    Elements that a mask leaves out of a softmax count nowhere, not in `size` either: in float they are minus infinity.
    """

    name: str
    operator: str
    dtype: str
    scale: float | None
    minimum: float
    maximum: float
    b_minimum: float
    b_maximum: float
    cosine: float
    sqnr: float
    mse: float
    l1: float
    kl: float
    max_error: float
    max_lsb: float | None
    saturated: float | None
    differing: float
    own_sqnr: float | None
    own_max_error: float | None
    own_max_lsb: float | None
    size: int
    histogram: Histogram = field(repr=False)


def check_column(column: str) -> None:
    """Raises JQuantError for a column that there is not, or that is no number."""
    numbers = tuple(f for f, kind in LayerError.__annotations__.items() if kind in (float, int, float | None))
    if column not in numbers:
        raise JQuantError(f"no column {column!r} to sort by; known: {', '.join(numbers)}")


@dataclass(frozen=True)
class Comparison:
    """Rows by value, in graph order, of meaning `b` against meaning `a`; the weights have rows of their own.

    `missing`  names that only one side has, where a side is arrays from elsewhere
    """

    a: str
    b: str
    rows: tuple[LayerError, ...]
    weights: tuple[LayerError, ...] = ()
    missing: tuple[str, ...] = ()

    def table(self, *, sort: str | None = None, weights: bool = False) -> str:
        """The rows as text, in graph order, or by a column, the worst first.

        Raises:
          JQuantError: a column that there is not.
        """
        columns: tuple[str, ...] = ("name", "operator", "dtype", "scale", "cosine", "sqnr", "max_error", "max_lsb")
        columns = (*columns, "own_sqnr", "own_max_lsb", "saturated")
        rows = self.weights if weights else self.rows
        if sort is not None:
            rows = self.worst(sort, len(rows), weights=weights)
        return format_table(columns, [tuple(_show(getattr(row, c)) for c in columns) for row in rows])

    def worst(self, column: str, count: int = 10, *, weights: bool = False) -> tuple[LayerError, ...]:
        """The rows with the largest error by a column, NaN before all; rows without a number come last.

        Raises:
          JQuantError: a column that there is not, or that is no number.
        """
        rows = self.weights if weights else self.rows
        check_column(column)
        sign = 1 if column in ("cosine", "sqnr", "own_sqnr") else -1

        def key(row: LayerError) -> float:
            cell = getattr(row, column)
            return math.inf if cell is None else -math.inf if math.isnan(cell) else sign * cell

        return tuple(sorted(rows, key=key)[:count])

    def row(self, name: str) -> LayerError:
        """The row of a value or weight.

        Raises:
          JQuantError: no such name.
        """
        found = {row.name: row for row in (*self.rows, *self.weights)}
        if name not in found:
            raise JQuantError(f"no row {name!r}{did_you_mean(name, found)}")
        return found[name]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON. A number that is not finite becomes None, since JSON has none."""
        rows = {"rows": [_plain(row) for row in self.rows], "weights": [_plain(row) for row in self.weights]}
        return {"a": self.a, "b": self.b, **rows, "missing": list(self.missing)}


def _plain(row: LayerError) -> dict[str, Any]:
    data = asdict(row) | {"histogram": row.histogram._asdict()}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in data.items()}


def _show(cell: object) -> str:
    return "-" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)


@automatic_axes()
def compare(
    model: Model,
    inputs: Array | tuple[Array, ...],
    a: Mode | Arrays = "float",
    b: Mode | Arrays = "fake_quant",
    *,
    model_b: Model | None = None,
) -> Comparison:
    """Compares two modes of a model, or two models, on a batch: an evaluation of each, and one of its nodes apart.

    Args:
      model: calibrated or trained.
      inputs: a batch, or a tuple of batches where the graph has several inputs.
      a: the baseline: a mode of `jq.apply`; in "bit_true" it is the integer program. Or {name: array}, real values and
        weights from elsewhere, by the names and in the layout of the plan (channels-last inside).
      b: what is measured against it.
      model_b: the model of `b`, where it is not that of `a`: what training made of it. Its graph is the same.

    Returns:
      A `Comparison`, rows in graph order.

    Raises:
      JQuantError: an unknown mode, or arrays without a name of the plan. InputError: arrays that do not fit it.
      LoweringError: "bit_true" for a model that has no integers.

    Example:
      found = jq.analysis.compare(model, x, "fake_quant", "fake_quant", model_b=state.model)
      print(found.table(sort="own_sqnr"))
    """
    models = compared_models(model, model_b)
    plan = models[0].plan
    bound = bind_inputs(plan.graph, jax.tree.map(automatic, inputs if isinstance(inputs, tuple) else (inputs,)))
    shapes = value_shapes(plan.graph, models[0].params, next(iter(bound.values())).shape[0])
    sides: list[Side] = []
    given: list[Any] = []
    for mode, each in zip((a, b), models, strict=True):
        if isinstance(mode, str):
            check_mode(mode)
        sides.append(Side.of(each, mode if isinstance(mode, str) else ""))
        given.append(None if isinstance(mode, str) else _checked(plan, mode, shapes, each.params))
    modes = [mode if isinstance(mode, str) else GIVEN for mode in (a, b)]
    values = evaluated(modes, sides, bound, given)
    return _compared(plan, modes, sides, given, values)


def compared_models(model: Model, model_b: Model | None) -> list[Model]:
    """The models of both sides, checked, with what is compared."""
    models = [model, model if model_b is None else model_b]
    for each in models:
        check_model(each)
    return [fold_kept(each) for each in models]


def _checked(
    plan: Plan, given: Arrays, shapes: Mapping[str, tuple[int, ...]], params: Params
) -> dict[str, np.ndarray | Array]:
    """Arrays from elsewhere, with the shapes of the plan."""
    wanted = dict(shapes) | {key: params[key].shape for key in plan.weights}
    known = {name: np.asarray(value) for name, value in given.items() if name in wanted}
    if not known:
        hint = did_you_mean(next(iter(given), ""), wanted)
        raise JQuantError(f"none of the {len(given)} arrays has the name of a value or weight of the plan{hint}")
    for name, value in known.items():
        if value.shape != wanted[name]:
            raise InputError(
                f"the array for {name!r} is {list(value.shape)}, and the plan has {list(wanted[name])}; inside a plan "
                "values are channels-last: transpose what another framework made"
            )
        if np.issubdtype(value.dtype, np.floating) and not is_finite(value):
            raise InputError(f"the array for {name!r} contains NaN or infinite values")
    return {n: v if n in plan.exact else v.astype(np.float32) for n, v in known.items()}


def _row(plan: Plan, name: str, numbers: dict[str, Any]) -> LayerError:
    node = plan.graph.by_name.get(name)
    spec = plan.weights[name] if name in plan.weights else plan.values[name]
    counts: Histogram = numbers.pop("histogram")
    floats: dict[str, Any] = {key: None if value is None else float(value) for key, value in numbers.items()}
    return LayerError(
        name=name,
        operator="weight" if name in plan.weights else type(node.op).__name__ if node else "Input",
        dtype="float" if spec is None else spec.dtype,
        size=int(counts.a.sum()),
        histogram=Histogram(float(counts.low), float(counts.high), counts.a.tolist(), counts.b.tolist()),  # type: ignore[arg-type]
        **floats,
    )


def _compared(
    plan: Plan, modes: Sequence[Any], sides: Sequence[Side], given: Sequence[Arrays | None], values: Values
) -> Comparison:
    """The rows of one batch."""
    on_host = on_host_of(sides)
    steps = steps_of(plan, value_scales(plan, on_host[1].qparams))
    found: dict[str, Statistics] = {}
    counts: dict[str, Histogram] = {}
    with np.errstate(all="ignore"):
        for name, a, b, own, step, is_masked in _elements(plan, steps, values):
            found[name], counts[name] = measured(a, b, own, step, plan.values[name], is_masked)
    return comparison_of(plan, modes, on_host, given, steps, found, counts)


def on_host_of(sides: Sequence[Side]) -> list[Model]:
    """The models of both sides, their arrays on the host."""
    return [Model(side.model.plan, to_host(side.model.params), to_host(side.model.qparams)) for side in sides]


def comparison_of(
    plan: Plan,
    modes: Sequence[Any],
    on_host: Sequence[Model],
    given: Sequence[Arrays | None],
    steps: Mapping[str, Any],
    found: Mapping[str, Statistics],
    counts: Mapping[str, Histogram],
) -> Comparison:
    """The rows of `found` and `counts`, by name; `steps` real per LSB."""
    with np.errstate(all="ignore"):
        rows = [_row(plan, name, numbers_of(found[name], steps[name], counts[name])) for name in found]
        weights = []
        for key, x, y in _weights(plan, *zip(modes, on_host, given, strict=True)):
            scale = expand(scale_of(key, plan, on_host[1].qparams), plan.weight_axis.get(key), x.ndim)
            step = _step(scale, plan.weights[key])
            of, bins = measured(x, y, None, step, plan.weights[key])
            weights.append(_row(plan, key, numbers_of(of, step, bins)))
    present = {row.name for row in (*rows, *weights)}
    missing = tuple(
        name for name in (*plan.graph.values, *plan.weights) if name not in present and name not in plan.exact
    )
    return Comparison(modes[0], modes[1], tuple(rows), tuple(weights), missing)


def _elements(plan: Plan, steps: Mapping[str, Any], values: Values) -> Iterator[tuple[str, Any, Any, Any, Any, bool]]:
    """(name, a, b, alone, step, whether a mask leaves all out) of the values of both sides, without masked elements."""
    first, second, alone = values
    masked: dict[str, np.ndarray] = {}
    for name in plan.graph.values:
        if name in first and name in second and name not in plan.exact:
            masked[name] = _masked(plan.graph.by_name.get(name), first[name], second[name], masked)
            parts = _unmasked(masked[name], first[name], second[name], alone.get(name), steps[name])
            yield name, *parts, bool(masked[name].all())


def steps_of(plan: Plan, scales: Mapping[str, Any]) -> dict[str, Any]:
    """Real per LSB of every value that is a number; None of one that is not rounded."""
    return {name: _step(scales[name], plan.values[name]) for name in plan.graph.values if name not in plan.exact}


def _step(scale: Array | None, spec: QuantSpec | None) -> Array | None:
    """Real per LSB of a value that is rounded and saturated; None of others."""
    return scale if spec is not None and not spec.is_high_precision and not spec.is_float else None


def _weights(plan: Plan, *sides: tuple[str, Model, Arrays | None]) -> Iterator[tuple[str, Array, Array]]:
    """Every quantized weight, as both sides have it."""

    def of(key: str, mode: str, model: Model, given: Arrays | None) -> Any:
        if given is not None:
            return given.get(key)
        weight, spec = model.params[key], plan.weights[key]
        if mode == "float":
            return weight
        if mode != "bit_true":
            return np.asarray(weight_on_grid(key, model))
        scale = expand(scale_of(key, plan, model.qparams), plan.weight_axis.get(key), weight.ndim)
        return dequantize(quantize(weight, scale, spec.dtype, spec.rounding), scale)

    for key in plan.weights:
        x, y = (of(key, *side) for side in sides)
        if x is not None and y is not None:
            yield key, x, y


def _masked(node: Node | None, a: Array, b: Array, masked: Mapping[str, np.ndarray]) -> np.ndarray:
    """Where a value has no number: a mask filled it in for a softmax, or it is exp of such elements."""
    if node is not None and isinstance(node.op, Exp) and node.inputs[0] in masked:
        return masked[node.inputs[0]]
    return np.asarray((a <= MASKED / 2) | (b <= MASKED / 2))


def _unmasked(
    masked: np.ndarray, a: Array, b: Array, alone: Array | None, scale: Array | None
) -> tuple[Any, Any, Any, Any]:
    """The elements of a row that are numbers, and their scales; all where there are no others."""
    if not masked.any() or masked.all():
        return a, b, alone, scale
    scales = scale if scale is None or scale.size == 1 else np.broadcast_to(scale, masked.shape)[~masked]
    kept = [None if each is None else jax.block_until_ready(each[~masked]) for each in (a, b, alone)]
    return kept[0], kept[1], kept[2], scales
