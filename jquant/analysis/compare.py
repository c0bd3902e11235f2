"""Two meanings of one plan, value by value: possible because names and edges are the same in all of them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.analysis.meanings import Side, check_meaning, node_rule, values_of
from jquant.analysis.metrics import Histogram, cosine, difference, histogram, kl_of, l1, max_error, mse, sqnr
from jquant.batch_norm import fold_kept
from jquant.ir.evaluate import bind_inputs
from jquant.ir.graph import check_params, is_finite
from jquant.lower import lower
from jquant.numerics.rounding import dequantize, expand, quantize
from jquant.simulate import check_qparams, expand_weight, quantizer_of, scale_of, value_scales, value_shapes
from jquant.text import did_you_mean, format_table
from jquant.types import Array, InputError, JQuantError, Params, Plan, QParams, QuantSpec

Arrays = Mapping[str, Any]
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
        numbers = tuple(f for f, kind in LayerError.__annotations__.items() if kind in (float, int, float | None))
        if column not in numbers:
            raise JQuantError(f"no column {column!r} to sort by; known: {', '.join(numbers)}")
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


def compare(
    plan: Plan,
    params: Params,
    qparams: QParams,
    inputs: Array | tuple[Array, ...],
    a: str | Arrays,
    b: str | Arrays,
    *,
    state_b: tuple[Params, QParams] | None = None,
) -> Comparison:
    """Compares two meanings of a plan on a batch, in one jitted pass.

    Args:
      plan, params, qparams: as for `jq.apply`.
      inputs: a batch, or a tuple of batches where the graph has several inputs.
      a: the baseline: "float"; "calibrated", "validation" or "qat" (three names of fake-quant); "pre_export"
        (fake-quant with the real tables); "integer"; or {name: array}, real values and weights from elsewhere, by the
        names and in the layout of the plan (channels-last inside).
      b: what is measured against it.
      state_b: (params, qparams) of `b`, where they are not those of `a`: what training made of them.

    Returns:
      A `Comparison`, rows in graph order.

    Raises:
      JQuantError: an unknown meaning, or arrays without a name of the plan. InputError: arrays that do not fit it.
      LoweringError: "integer" for a plan that has none.

    Example:
      found = jq.analysis.compare(plan, params, qparams, x, "calibrated", "qat", state_b=(state.params, state.qparams))
      print(found.table(sort="own_sqnr"))
    """
    bound = bind_inputs(plan.graph, inputs if isinstance(inputs, tuple) else (inputs,))
    states = [(params, qparams), state_b or (params, qparams)]
    for of_params, of_qparams in states:
        check_params(plan.graph, of_params)
        check_qparams(plan, of_qparams)
    folded = [fold_kept(plan, *state) for state in states]
    plan, params, _ = folded[0]
    batch = next(iter(bound.values())).shape[0]
    shapes = value_shapes(plan.graph, params, batch)
    sides: list[Side] = []
    given: list[Any] = []
    for meaning, (_, *state) in zip((a, b), folded, strict=True):
        if isinstance(meaning, str):
            check_meaning(meaning)
        program = lower(plan, *state) if meaning == "integer" else None
        sides.append(Side(dict(state[0]), dict(state[1]), program))
        given.append(None if isinstance(meaning, str) else _checked(plan, meaning, shapes, state[0]))
    first, second = (meaning if isinstance(meaning, str) else GIVEN for meaning in (a, b))
    found = jax.device_get(_metrics(plan, first, second, *sides, bound, *given))
    rows = tuple(_row(plan, name, found[0][name]) for name in plan.graph.values if name in found[0])
    weights = tuple(_row(plan, name, found[1][name]) for name in plan.weights if name in found[1])
    present = {row.name for row in (*rows, *weights)}
    missing = tuple(
        name for name in (*plan.graph.values, *plan.weights) if name not in present and name not in plan.exact
    )
    return Comparison(first, second, rows, weights, missing)


def _checked(
    plan: Plan, given: Arrays, shapes: Mapping[str, tuple[int, ...]], params: Params
) -> dict[str, np.ndarray | Array]:
    """Arrays from elsewhere, with the shapes of the plan."""
    wanted = dict(shapes) | {key: params[key].shape for key in plan.weights}
    known = {name: jnp.asarray(value) for name, value in given.items() if name in wanted}
    if not known:
        hint = did_you_mean(next(iter(given), ""), wanted)
        raise JQuantError(f"none of the {len(given)} arrays has the name of a value or weight of the plan{hint}")
    for name, value in known.items():
        if value.shape != wanted[name]:
            raise InputError(
                f"the array for {name!r} is {list(value.shape)}, and the plan has {list(wanted[name])}; inside a plan "
                "values are channels-last: transpose what another framework made"
            )
        if jnp.issubdtype(value.dtype, jnp.floating) and not is_finite(value):
            raise InputError(f"the array for {name!r} contains NaN or infinite values")
    return {n: v if n in plan.exact else v.astype(jnp.float32) for n, v in known.items()}


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


@partial(jax.jit, static_argnames=("plan", "a", "b"))
def _metrics(
    plan: Plan,
    a: str,
    b: str,
    side_a: Side,
    side_b: Side,
    inputs: dict[str, Array],
    given_a: dict[str, Array] | None,
    given_b: dict[str, Array] | None,
) -> tuple[dict, dict]:
    scales = value_scales(plan, side_b.qparams)
    first = values_of(plan, a, side_a, inputs) if given_a is None else given_a
    second = values_of(plan, b, side_b, inputs) if given_b is None else given_b
    rule = node_rule(plan, a, side_a) if given_a is None else None
    found = {}
    for name in plan.graph.values:
        if name not in first or name not in second or name in plan.exact:
            continue
        node, alone = plan.graph.by_name.get(name), None
        if node is not None and rule is not None and all(v in second for v in node.inputs):
            alone = rule(node, *(second[v] for v in node.inputs))
        found[name] = _errors(first[name], second[name], alone, scales[name], plan.values[name])
    weights = {}
    for key, x, y in _weights(plan, (a, side_a, given_a), (b, side_b, given_b)):
        scale = expand(scale_of(key, plan, side_b.qparams), plan.weight_axis.get(key), x.ndim)
        weights[key] = _errors(x, y, None, scale, plan.weights[key])
    return found, weights


def _weights(plan: Plan, *sides: tuple[str, Side, Arrays | None]) -> Iterator[tuple[str, Array, Array]]:
    """Every quantized weight, as both sides have it."""

    def of(key: str, meaning: str, side: Side, given: Arrays | None) -> Array | None:
        if given is not None:
            return given.get(key)
        weight, spec = side.params[key], plan.weights[key]
        if meaning == "float":
            return weight
        if meaning != "integer":
            return quantizer_of(spec)(weight, expand_weight(key, plan, side.qparams, weight.ndim), spec)
        scale = expand(scale_of(key, plan, side.qparams), plan.weight_axis.get(key), weight.ndim)
        return dequantize(quantize(weight, scale, spec.dtype, spec.rounding), scale)

    for key in plan.weights:
        x, y = (of(key, *side) for side in sides)
        if x is not None and y is not None:
            yield key, x, y


def _errors(
    a: Array, b: Array, alone: Array | None, scale: Array | None, spec: QuantSpec | None
) -> dict[str, Array | Histogram | None]:
    """The numbers of a row. `alone` is what a's node makes of b's operands; `scale` broadcasts to the value."""
    error, counts = jnp.abs(difference(a, b)), histogram(a, b)
    on_grid = scale is not None and spec is not None and not spec.is_high_precision and not spec.is_float
    step = scale if on_grid else None
    tolerance = 0.0 if step is None else step * 0.5
    return {
        "scale": None if step is None else jnp.max(step),
        "minimum": jnp.min(a),
        "maximum": jnp.max(a),
        "b_minimum": jnp.min(b),
        "b_maximum": jnp.max(b),
        "cosine": cosine(a, b),
        "sqnr": sqnr(a, b),
        "mse": mse(a, b),
        "l1": l1(a, b),
        "kl": kl_of(counts),
        "max_error": jnp.max(error),
        "max_lsb": None if step is None else jnp.max(error / step),
        "saturated": None if step is None or spec is None else _saturated(a, step, spec),
        "differing": jnp.mean((error > tolerance).astype(jnp.float32)),
        "own_sqnr": None if alone is None else sqnr(alone, b),
        "own_max_error": None if alone is None else max_error(alone, b),
        "own_max_lsb": None if alone is None or step is None else jnp.max(jnp.abs(difference(alone, b)) / step),
        "histogram": counts,
    }


def _saturated(a: Array, scale: Array, spec: QuantSpec) -> Array:
    low, high = spec.range
    return jnp.mean(((a < (low - 0.5) * scale) | (a > (high + 0.5) * scale)).astype(jnp.float32))
