"""Evaluating a plan: one call, the meaning is an argument."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jquant.integer import dequantize_values, quantize_inputs, run_integers
from jquant.ir.evaluate import bind_inputs, evaluate
from jquant.ir.graph import check_params
from jquant.lower import lower_traced
from jquant.ops.lookup import table_float
from jquant.simulate import check_qparams, evaluate_plan, fake_quant_rule, fake_quant_tap, value_scales
from jquant.text import did_you_mean
from jquant.types import Array, JQuantError, Node, Params, Plan, Program, QParams

Mode = Literal["float", "calibration", "qat", "validation", "pre_export", "bit_true"]
MODES = ("float", "calibration", "qat", "validation", "pre_export", "bit_true")
Outputs = Any  # one array, or a tuple of arrays where the graph has several outputs


@partial(jax.jit, static_argnames=("plan", "mode"))
def evaluate_mode(
    plan: Plan, mode: Mode, params: Params, qparams: QParams, inputs: dict[str, Array], rng: Array | None
) -> dict[str, Array]:
    """All values of the plan's graph by name. `rng` activates stochastic operators."""
    if mode == "bit_true":
        values = evaluate_plan(plan, params, qparams, inputs, quantized=True, rng=rng)
        return bit_true_values(lower_traced(plan, params, qparams), inputs, values)
    if mode == "pre_export":
        return evaluate(plan.graph, inputs, table_rule(plan, params, qparams, rng), fake_quant_tap(plan, qparams))
    return evaluate_plan(plan, params, qparams, inputs, quantized=mode in ("qat", "validation"), rng=rng)


def table_rule(plan: Plan, params: Params, qparams: QParams, rng: Array | None) -> Callable[..., Array]:
    """Fake-quant in which table functions are their tables, with the gradient of the function."""
    rule, scales = fake_quant_rule(plan, params, qparams, rng), value_scales(plan, qparams)

    def with_tables(node: Node, *operands: Array) -> Array:
        value = rule(node, *operands)
        source, spec = plan.values.get(node.inputs[0]) if node.inputs else None, plan.values[node.name]
        if not hasattr(node.op, "table") or source is None or spec is None or "float16" in (source.dtype, spec.dtype):
            return value
        x_scale, y_scale = scales[node.inputs[0]], scales[node.name]
        assert x_scale is not None
        assert y_scale is not None
        rounding = plan.target.quantize_rounding
        table = table_float(node.op, operands[0], x_scale, source.dtype, y_scale, spec.dtype, rounding=rounding)
        return straight_through(value, jax.lax.stop_gradient(table))

    return with_tables


def bit_true_values(program: Program, inputs: Mapping[str, Array], values: Mapping[str, Array]) -> dict[str, Array]:
    """Fake-quant values replaced by those of the integer program, with the gradient left as it was."""
    integers = run_integers(program, quantize_inputs(program, inputs))
    exact = dequantize_values(program, integers)
    return {name: _replaced(value, exact.get(name)) for name, value in values.items()}


def _replaced(value: Array, replacement: Array | None) -> Array:
    if replacement is None:
        return value
    return straight_through(value, replacement) if value.dtype == jnp.float32 else replacement


@jax.custom_vjp
def straight_through(value: Array, replacement: Array) -> Array:
    """`replacement` in the forward pass, the gradient of `value` in the backward pass."""
    return replacement


straight_through.defvjp(lambda value, replacement: (replacement, None), lambda _, g: (g, jnp.zeros_like(g)))


def apply(plan: Plan, params: Params, qparams: QParams, *inputs: Array, mode: Mode = "validation") -> Outputs:
    """Evaluates a plan.

    Args:
      plan: what `prepare` returned.
      params: the parameters that `prepare` returned, or trained ones.
      qparams: what `calibrate` returned, or trained ones; unused (may be {}) in the modes "float" and "calibration".
      *inputs: real float32, one for each graph input.
      mode: "float" and "calibration" (nothing quantized), "qat" and "validation" (fake-quant), "pre_export" (fake-quant
        with the real lookup tables, to find those that cost accuracy), "bit_true" (the value of the integer program,
        the gradient of fake-quant).

    Returns:
      The output, or a tuple where the graph has several.

    Raises:
      CalibrationError: scales missing or broken. InputError: inputs that do not fit. GraphError: missing params.
    """
    values = apply_with_taps(plan, params, qparams, *inputs, mode=mode, taps=None)[1]
    return unpack([values[name] for name in plan.graph.outputs])


def apply_with_taps(
    plan: Plan, params: Params, qparams: QParams, *inputs: Array, mode: Mode = "validation", taps: str | None = "*"
) -> tuple[Outputs, dict[str, Array]]:
    """Like `apply`, and returns {name: value} for the values whose names match the glob `taps` (None: outputs only)."""
    check_mode(mode)
    check_params(plan.graph, params)
    if mode not in ("float", "calibration"):
        check_qparams(plan, qparams)
    values = evaluate_mode(plan, mode, dict(params), dict(qparams), bind_inputs(plan.graph, inputs), None)
    outputs = unpack([values[name] for name in plan.graph.outputs])
    kept = {n: v for n, v in values.items() if (n in plan.graph.outputs if taps is None else fnmatchcase(n, taps))}
    return outputs, kept


def check_mode(mode: str) -> None:
    if mode not in MODES:
        raise JQuantError(f"unknown mode {mode!r}; known: {', '.join(MODES)}{did_you_mean(mode, MODES)}")


def unpack(outputs: list[Array]) -> Outputs:
    return outputs[0] if len(outputs) == 1 else tuple(outputs)
