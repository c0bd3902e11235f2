"""Two meanings of one plan, value by value: possible because names and edges are the same in all of them."""

import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jquant.batch_norm import fold_kept
from jquant.integer import dequantize_values, quantize_inputs, run_integers
from jquant.ir.evaluate import bind_inputs
from jquant.ir.graph import check_params
from jquant.lower import lower
from jquant.simulate import check_qparams, evaluate_plan, value_scales, value_shapes
from jquant.text import did_you_mean, format_table
from jquant.types import Array, JQuantError, Params, Plan, Program, QParams, QuantSpec

Meaning = Literal["float", "qat", "integer"]
MEANINGS = ("float", "qat", "integer")


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """The error of one value: `b` against `a`, in real units unless named otherwise.

    `sqnr` in dB; `max_lsb` the largest error in LSB of the value's scale; `saturated` the share of values of `a` beyond
    the range that the scale covers; `differing` the share of elements more than half an LSB apart, of `size`. For a
    high-precision or float value `max_lsb` and `saturated` are None, and `differing` counts every difference.
    """

    name: str
    operator: str
    dtype: str
    scale: float | None
    minimum: float
    maximum: float
    cosine: float
    sqnr: float
    mse: float
    max_error: float
    max_lsb: float | None
    saturated: float | None
    differing: float
    size: int


@dataclass(frozen=True)
class Comparison:
    """Rows by value, in graph order, of meaning `b` against meaning `a`."""

    a: str
    b: str
    rows: tuple[LayerError, ...]

    def table(self) -> str:
        columns = ("name", "operator", "dtype", "scale", "cosine", "sqnr", "max_error", "max_lsb", "saturated")
        cells = [tuple(_show(getattr(row, c)) for c in columns) for row in self.rows]
        return format_table(columns, cells)

    def to_dict(self) -> dict:
        return {"a": self.a, "b": self.b, "rows": [asdict(row) for row in self.rows]}


def _show(cell: object) -> str:
    return "-" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def compare(
    plan: Plan, params: Params, qparams: QParams, inputs: Array | tuple[Array, ...], a: Meaning, b: Meaning
) -> Comparison:
    """Compares two meanings of a plan on a batch, in one jitted pass.

    Args:
      plan, params, qparams: as for `jq.apply`.
      inputs: a batch, or a tuple of batches where the graph has several inputs.
      a: the baseline: "float", "qat" (fake-quant) or "integer".
      b: what is measured against it.

    Returns:
      A `Comparison`, rows in graph order.

    Raises:
      JQuantError: an unknown meaning. LoweringError: "integer" for a plan that has none.
    """
    for meaning in (a, b):
        if meaning not in MEANINGS:
            raise JQuantError(
                f"unknown meaning {meaning!r}; known: {', '.join(MEANINGS)}{did_you_mean(meaning, MEANINGS)}"
            )
    bound = bind_inputs(plan.graph, inputs if isinstance(inputs, tuple) else (inputs,))
    check_params(plan.graph, params)
    check_qparams(plan, qparams)
    plan, params, qparams = fold_kept(plan, params, qparams)
    program = lower(plan, params, qparams) if "integer" in (a, b) else None
    metrics = jax.device_get(_metrics(plan, a, b, dict(params), dict(qparams), bound, program))
    operators = {n.name: type(n.op).__name__ for n in plan.graph.nodes}
    batch = next(iter(bound.values())).shape[0]
    sizes = {name: math.prod(shape) for name, shape in value_shapes(plan.graph, params, batch).items()}
    rows = [
        LayerError(
            name=name,
            operator=operators.get(name, "Input"),
            dtype=_dtype(plan.values[name]),
            size=sizes[name],
            **_as_floats(found),
        )
        for name, found in metrics.items()
        if name in plan.graph.values
    ]
    order = {name: i for i, name in enumerate(plan.graph.values)}
    return Comparison(a, b, tuple(sorted(rows, key=lambda row: order[row.name])))


def _dtype(spec: QuantSpec | None) -> str:
    return "float" if spec is None else spec.dtype


def _as_floats(found: dict) -> dict[str, Any]:
    return {key: None if value is None else float(value) for key, value in found.items()}


@partial(jax.jit, static_argnames=("plan", "a", "b"))
def _metrics(
    plan: Plan,
    a: Meaning,
    b: Meaning,
    params: Params,
    qparams: QParams,
    inputs: dict[str, Array],
    program: Program | None,
) -> dict:
    scales = value_scales(plan, qparams)
    first, second = (_values(plan, m, params, qparams, inputs, program) for m in (a, b))
    found = {}
    for name in plan.graph.values:
        if name in first and name in second and name not in plan.exact:
            found[name] = _errors(first[name], second[name], scales[name], plan.values[name])
    return found


def _values(
    plan: Plan, meaning: Meaning, params: Params, qparams: QParams, inputs: dict[str, Array], program: Program | None
) -> dict[str, Array]:
    if meaning == "integer":
        assert program is not None
        return dequantize_values(program, run_integers(program, quantize_inputs(program, inputs)))
    return evaluate_plan(plan, params, qparams, inputs, quantized=meaning == "qat")


def _errors(a: Array, b: Array, scale: Array | None, spec: QuantSpec | None) -> dict[str, Array | None]:
    error = b - a
    signal, noise = jnp.mean(a * a), jnp.mean(error * error)
    largest = jnp.max(jnp.abs(error))
    norms = jnp.sqrt(jnp.sum(a * a) * jnp.sum(b * b))
    on_grid = scale is not None and spec is not None and not spec.is_high_precision and not spec.is_float
    tolerance = jnp.max(scale) * 0.5 if scale is not None and on_grid else 0.0
    return {
        "scale": scale if on_grid else None,
        "minimum": jnp.min(a),
        "maximum": jnp.max(a),
        "cosine": jnp.where(norms > 0, jnp.sum(a * b) / jnp.where(norms > 0, norms, 1.0), 1.0),
        "sqnr": 10 * jnp.log10(jnp.maximum(signal, 1e-30) / jnp.maximum(noise, 1e-30)),
        "mse": noise,
        "max_error": largest,
        "max_lsb": largest / scale if scale is not None and on_grid else None,
        "saturated": _saturated(a, scale, spec) if scale is not None and spec is not None and on_grid else None,
        "differing": jnp.mean((jnp.abs(error) > tolerance).astype(jnp.float32)),
    }


def _saturated(a: Array, scale: Array, spec: QuantSpec) -> Array:
    low, high = spec.range
    return jnp.mean(((a < (low - 0.5) * scale) | (a > (high + 0.5) * scale)).astype(jnp.float32))
