"""Evaluating a plan: one call, the meaning is an argument."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import jax

from jquant.batch_norm import fold_kept
from jquant.bit_true import bit_true_values, partly_bit_true, select_nodes
from jquant.ir.evaluate import bind_inputs, evaluate
from jquant.ir.graph import check_params
from jquant.lower import lower_traced
from jquant.ops.lookup import table_float
from jquant.rolled import evaluate_outputs
from jquant.simulate import (
    check_qparams,
    evaluate_plan,
    fake_quant_rule,
    fake_quant_tap,
    straight_through,
    value_scales,
)
from jquant.text import did_you_mean
from jquant.types import Array, JQuantError, Node, Params, Plan, QParams

Mode = Literal["float", "calibration", "qat", "validation", "pre_export", "bit_true"]
MODES = ("float", "calibration", "qat", "validation", "pre_export", "bit_true")
Outputs = Any  # one array, or a tuple of arrays where the graph has several outputs


@partial(jax.jit, static_argnames=("plan", "mode", "selected", "outputs_alone"))
def evaluate_mode(
    plan: Plan,
    mode: Mode,
    params: Params,
    qparams: QParams,
    inputs: dict[str, Array],
    rng: Array | None,
    selected: tuple[str, ...] | None = None,
    outputs_alone: bool = False,
) -> dict[str, Array]:
    """All values of the plan's graph by name, kept batch norms folded. `rng` activates stochastic operators.

    `selected` are the nodes that mode "bit_true" takes from the integer program; None for all. `outputs_alone` leaves
    other values out, as far as that saves time.
    """
    evaluate_values = evaluate_outputs if outputs_alone else evaluate_plan
    if mode in ("float", "calibration"):
        return evaluate_values(plan, params, qparams, inputs, quantized=False, rng=rng)
    plan, params, qparams = fold_kept(plan, params, qparams)
    if mode == "bit_true" and selected is not None:
        rule = fake_quant_rule(plan, params, qparams, rng)
        return evaluate(plan.graph, inputs, *partly_bit_true(plan, params, qparams, rule, selected))
    if mode == "pre_export":
        return evaluate(plan.graph, inputs, table_rule(plan, params, qparams, rng), fake_quant_tap(plan, qparams))
    if mode == "bit_true":
        values = evaluate_plan(plan, params, qparams, inputs, quantized=True, rng=rng)
        return bit_true_values(lower_traced(plan, params, qparams), inputs, values)
    return evaluate_values(plan, params, qparams, inputs, quantized=True, rng=rng)


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


def apply(
    plan: Plan,
    params: Params,
    qparams: QParams,
    *inputs: Array,
    mode: Mode = "validation",
    bit_true: str | Sequence[str] = "*",
) -> Outputs:
    """Evaluates a plan. A batch norm that `prepare` kept is folded, with its running statistics, into what ships.

    Args:
      plan: what `prepare` returned.
      params: the parameters that `prepare` returned, or trained ones (`state.params`).
      qparams: what `calibrate` returned, or trained ones; unused (may be {}) in the modes "float" and "calibration".
      *inputs: real float32, one for each graph input.
      mode: "float" and "calibration" (nothing quantized), "qat" and "validation" (fake-quant), "pre_export" (fake-quant
        with the real lookup tables, to find those that cost accuracy), "bit_true" (the value of the integer program,
        the gradient of fake-quant).
      bit_true: in mode "bit_true", which nodes are those of the integer program, by patterns as in a qconfig; the
        others are fake-quant. `bit_true="type:GridSample"` shows what the integers of grid_sample cost.

    Returns:
      The output, or a tuple where the graph has several.

    Raises:
      CalibrationError: scales missing or broken. InputError: inputs that do not fit. GraphError: missing params.
    """
    return apply_with_taps(plan, params, qparams, *inputs, mode=mode, bit_true=bit_true, taps=None)[0]


def apply_with_taps(
    plan: Plan,
    params: Params,
    qparams: QParams,
    *inputs: Array,
    mode: Mode = "validation",
    bit_true: str | Sequence[str] = "*",
    taps: str | None = "*",
) -> tuple[Outputs, dict[str, Array]]:
    """Like `apply`, and returns {name: value} for the values whose names match the glob `taps` (None: outputs only)."""
    check_mode(mode)
    selected = select_nodes(plan, mode, bit_true)
    check_params(plan.graph, params)
    if mode not in ("float", "calibration"):
        check_qparams(plan, qparams)
    bound = bind_inputs(plan.graph, inputs)
    values = evaluate_mode(plan, mode, dict(params), dict(qparams), bound, None, selected, outputs_alone=taps is None)
    outputs = unpack([values[name] for name in plan.graph.outputs])
    kept = {n: v for n, v in values.items() if (n in plan.graph.outputs if taps is None else fnmatchcase(n, taps))}
    return outputs, kept


def check_mode(mode: str) -> None:
    if mode not in MODES:
        raise JQuantError(f"unknown mode {mode!r}; known: {', '.join(MODES)}{did_you_mean(mode, MODES)}")


def unpack(outputs: list[Array]) -> Outputs:
    return outputs[0] if len(outputs) == 1 else tuple(outputs)
