"""A plan as tables: its scales and quantizers, and what was asked for."""

from typing import Literal

from jquant.numerics.namespace import to_host
from jquant.plan.scales import check_qparams, observer_of, quantizer_of, scale_of, value_scales, weight_observer_of
from jquant.text import format_scale, format_table
from jquant.types import Array, Model, Plan, QuantSpec


def describe(model: Model) -> str:
    """Every value and weight with its dtype, scale (real per LSB), quantizer, observer and state, as a table.

    The state says whether a scale is trainable, frozen (its quantizer gives it no gradient), fixed by the qconfig, or
    follows from another value. Whether it was trained, `jq.training.find_states` says. "high precision" is an int32
    accumulator, which nothing quantizes.

    Raises:
      CalibrationError: a scale is missing, 0 or not finite; `jq.training.find_states` lists what is there.

    Example:
      >>> import jax.numpy as jnp, jquant as jq
      >>> x, weights = jnp.array([[1.0, 0.5], [-0.25, 0.75]]), {"w": jnp.array([[0.5, 1.0], [-1.0, 0.25]])}
      >>> graph, params = jq.trace(lambda p, x: x @ p["w"], weights, x)
      >>> model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target="nash-e")
      >>> model = jq.calibrate(model, [x])
      >>> print(jq.describe(model))
      name    operator  dtype  scale      quantizer   observer  state
      ---------------------------------------------------------------
      x       Input     int8   0.007843   fake_quant  nmse      frozen
      linear  Linear    int32  6.151e-05  -           -         high precision
      w       weight    int8   0.007843   fake_quant  min_max   frozen
    """
    plan, qparams = model.plan, to_host(model.qparams)
    check_qparams(plan, qparams)
    scales, operators = value_scales(plan, qparams), {n.name: type(n.op).__name__ for n in plan.graph.nodes}
    rows = [(name, operators.get(name, "Input"), *_cells(plan, name, scales[name])) for name in plan.graph.values]
    rows += [(key, "weight", *_cells(plan, key, scale_of(key, plan, qparams))) for key in plan.weights]
    return format_table(("name", "operator", "dtype", "scale", "quantizer", "observer", "state"), rows)


Kind = Literal["exact", "float", "float16", "high precision", "follows", "fixed", "own"]


def kind_of(plan: Plan, name: str) -> Kind:
    """Where the scale of a value or weight comes from.

    exact (a mask, index or pixel), float and float16 have none; high precision is the scale of an accumulator; follows
    is that of an operand; fixed is given by the spec; own is observed or trained.
    """
    spec = _spec(plan, name)
    if name in plan.exact:
        return "exact"
    if spec is None:
        return "float"
    if spec.is_float:
        return "float16"
    if spec.is_high_precision:
        return "high precision"
    if name not in plan.weights and name not in plan.owned:
        return "follows"
    return "own" if spec.fixed_scale is None else "fixed"


def format_of(plan: Plan, name: str) -> str:
    """The dtype of a value or weight, as tables show it."""
    spec = _spec(plan, name)
    return plan.exact.get(name) or ("float" if spec is None else spec.dtype)


def _spec(plan: Plan, name: str) -> QuantSpec | None:
    return plan.weights[name] if name in plan.weights else plan.values[name]


_STATES = {"float": "not quantized", "float16": "float island", "follows": "follows its operand"}


def _cells(plan: Plan, name: str, scale: Array | None) -> tuple[str, ...]:
    kind, spec = kind_of(plan, name), _spec(plan, name)
    observer, quantizer, state = "-", "-", _STATES.get(kind, kind)
    if spec is not None and kind in ("fixed", "own"):
        quantizer = quantizer_of(spec).name
    if spec is not None and kind == "own":
        observer = (weight_observer_of if name in plan.weights else observer_of)(spec).name
        state = "trainable" if quantizer_of(spec).trains_scale else "frozen"
    shown = "-" if kind in ("exact", "float", "float16") else _scale(scale)
    return format_of(plan, name), shown, quantizer, observer, state


def _scale(scale: Array | None) -> str:
    return "-" if scale is None else format_scale(scale)


def explain(model: Model) -> str:
    """Requested against applied for every value and weight, with the reason of each difference, as a table.

    Example:
      >>> import jax.numpy as jnp, jquant as jq
      >>> x, weights = jnp.array([[1.0, 0.5], [-0.25, 0.75]]), {"w": jnp.array([[0.5, 1.0], [-1.0, 0.25]])}
      >>> graph, params = jq.trace(lambda p, x: x @ p["w"], weights, x)
      >>> model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target="nash-e")
      >>> print(jq.explain(model))  # doctest: +ELLIPSIS, +NORMALIZE_WHITESPACE
      name    port    requested         applied                 reason
      ----------------------------------------------------------------
      x       output  int8              int8
      linear  output  int8              int32 (high precision)  feeds only graph outputs: the int32 accumulator is ...
      w       weight  int8 per channel  int8 per channel
    """
    return format_table(
        ("name", "port", "requested", "applied", "reason"),
        [(r.name, r.port, r.requested, r.applied, r.reason) for r in model.plan.resolutions],
    )
