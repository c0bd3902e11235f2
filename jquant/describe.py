"""A plan with its scales as a table: what quantizes every value and weight, and how."""

import numpy as np

from jquant.calibrate import observer_of
from jquant.simulate import quantizer_of, scale_of, value_scales
from jquant.text import format_table
from jquant.types import Array, Plan, QParams, QuantSpec


def describe(plan: Plan, qparams: QParams) -> str:
    """Every value and weight with its dtype, scale (real per LSB), quantizer, observer and state, as a table.

    The state says whether a scale is trained, frozen (its quantizer gives it no gradient), fixed by the qconfig, or
    follows from another value. "high precision" is an int32 accumulator, which nothing quantizes.

    Raises:
      CalibrationError: a scale is missing.
    """
    scales, operators = value_scales(plan, qparams), {n.name: type(n.op).__name__ for n in plan.graph.nodes}
    rows = [
        (name, operators.get(name, "Input"), *_cells(plan, name, plan.values[name], scales[name]))
        for name in plan.graph.values
    ]
    rows += [
        (key, "weight", *_cells(plan, key, spec, scale_of(key, plan, qparams))) for key, spec in plan.weights.items()
    ]
    return format_table(("name", "operator", "dtype", "scale", "quantizer", "observer", "state"), rows)


def _cells(plan: Plan, name: str, spec: QuantSpec | None, scale: Array | None) -> tuple[str, ...]:
    if name in plan.exact:
        return plan.exact[name], "-", "-", "-", "exact"
    if spec is None:
        return "float", "-", "-", "-", "not quantized"
    if spec.is_high_precision:
        return "int32", _scale(scale), "-", "-", "high precision"
    if spec.is_float:
        return spec.dtype, "-", "-", "-", "float island"
    if name not in plan.weights and name not in plan.owned:
        return spec.dtype, _scale(scale), "-", "-", "follows its operand"
    if spec.fixed_scale is not None:
        return spec.dtype, _scale(scale), quantizer_of(spec).name, "-", "fixed"
    quantizer = quantizer_of(spec).name
    return (
        spec.dtype,
        _scale(scale),
        quantizer,
        observer_of(spec).name,
        "frozen" if quantizer == "fake_quant" else "trained",
    )


def _scale(scale: Array | None) -> str:
    if scale is None:
        return "-"
    values = np.asarray(scale)
    low, high = f"{values.min():.4g}", f"{values.max():.4g}"
    return low if low == high else f"{low} .. {high} ({values.size})"
