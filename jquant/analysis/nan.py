"""Where a NaN comes from, in the order of the guides."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.analysis.convergence import judge_losses
from jquant.analysis.findings import Finding
from jquant.graph.checks import is_finite
from jquant.graph.evaluate import host_array
from jquant.meanings.meaning import Mode
from jquant.plan.batch_norm import fold_kept
from jquant.training.nan import NotFinite, find_nan
from jquant.training.scale_states import find_states
from jquant.types import Array, InputError, Model, Params, Plan

CLIP = "clip gradients (optax.clip_by_global_norm)"


def nan_checklist(
    model: Model,
    *inputs: Array,
    losses: Sequence[float] = (),
    learning_rate: float | None = None,
    float_learning_rate: float | None = None,
    loss: Callable[[Any], Array] | None = None,
) -> list[Finding]:
    """Where a NaN comes from, in the order of the guides: data, float model, calibration, values, gradients, rate.

    Args:
      model: in whatever state its parameters and scales are.
      *inputs: the batch that gave it.
      losses: of the float training, to see whether it converged (`judge_losses`).
      learning_rate: of QAT; float_learning_rate: that float training ended with or started from.
      loss: `outputs -> scalar`, whose gradients are looked at; None takes the sum of all outputs.

    Returns:
      Findings, the most likely cause first; empty where nothing is wrong.

    Raises:
      InputError: a number of inputs other than that of the graph.

    Example:
      for finding in jq.analysis.nan_checklist(state.model, images, learning_rate=0.1):
          print(finding)
    """
    inputs = tuple(host_array(x, f"input {i}") for i, x in enumerate(inputs))
    plan = model.plan
    _check_count(plan, inputs)
    found = [*_inputs(plan, inputs), *_params(plan, model.params)]
    if len(losses):
        judged = judge_losses(losses)
        found += [] if judged.level == "note" and judged.numbers else [judged]
    usable = not any(finding.check == "NaN" for finding in found)
    scales = _scales(model)
    found += scales
    if usable and not scales:
        found += _step(model, inputs, loss or _sum)
    elif usable:
        found += _forward(model, inputs, "float")
    return found + _rate(learning_rate, float_learning_rate)


def _check_count(plan: Plan, inputs: Sequence[Any]) -> None:
    if len(inputs) != len(plan.graph.inputs):
        raise InputError(f"the graph has {len(plan.graph.inputs)} inputs, and {len(inputs)} were given")
    for entry, x in zip(plan.graph.inputs, inputs, strict=True):
        if not hasattr(x, "dtype"):
            raise InputError(
                f"input {entry.name!r} must be an array, not {type(x).__name__}: the one batch that gave NaN"
            )


def _inputs(plan: Plan, inputs: Sequence[Array]) -> list[Finding]:
    found = []
    for entry, x in zip(plan.graph.inputs, inputs, strict=True):
        if jnp.issubdtype(x.dtype, jnp.floating) and not is_finite(x):
            count = int(jnp.sum(~jnp.isfinite(x)))
            message = f"the input has {count} values that are not finite"
            found.append(_say(entry.name, message, "check the preprocessing", count=count))
    return found


def _params(plan: Plan, params: Params) -> list[Finding]:
    fix = "go back to the last checkpoint whose parameters are"
    return [
        _say(key, "the parameter is not finite", fix) for key in plan.graph.param_names if not is_finite(params[key])
    ]


def _scales(model: Model) -> list[Finding]:
    """What is wrong with the scales: none at all, some missing, not finite, 0, or all 1, as no data gave them."""
    plan, qparams = model.plan, model.qparams
    fix = "call jq.calibrate before training: it gives the first scales"
    if not plan.trained:
        return []
    missing = [name for name in plan.trained if name not in qparams]
    if not qparams or len(missing) == len(plan.trained):
        return [_say("", "the model is not calibrated: no value has a scale", fix)]
    found = [_say(name, "it has no scale", "call jq.calibrate(model, batches) with this model") for name in missing]
    for row in find_states(model).rows:
        if row.state == "broken":
            fix = "take the scale that jq.calibrate made; lower the learning rate of scales"
            found.append(_say(row.name, f"the scale of the {row.port} is {row.note}", fix))
    given = {name: np.asarray(qparams[name]) for name in plan.trained if name in qparams}
    if len(given) > 1 and all((value == 1).all() for value in given.values()):
        found.append(_say("", "all scales are 1: the default of a format, which no calibration gives", fix))
    return found


def _forward(model: Model, inputs: Sequence[Array], mode: Mode) -> list[Finding]:
    """The first value of the deployed forward pass that is not finite."""

    def first(mode: Mode) -> NotFinite | None:
        folded = fold_kept(model if mode != "float" else model.replace(qparams={}))
        return find_nan(folded, *inputs, mode=mode)

    found = first(mode)
    if found is None:
        return []
    name, spread = found.name, mode != "float" and first("float") is None
    cause = "only with quantizers on: look at its scale" if spread else "in float too: a division, log or exp"
    return [_say(name, f"the first value that is not finite, {cause}", "clamp its operand, or calibrate again")]


def _step(model: Model, inputs: Sequence[Array], loss: Callable[[Any], Array]) -> list[Finding]:
    """The first value of a step that is not finite, forward or backward."""
    if found := _forward(model, inputs, "fake_quant"):
        return found
    step = find_nan(model, *inputs, loss=loss)
    if step is None:
        return []
    fix = f"keep its operand away from where the slope has no end (sqrt, division and log at 0), or {CLIP}"
    return [_say(step.name, str(step), fix)]


def _sum(outputs: Any) -> Array:
    parts = [jnp.sum(y) for y in jax.tree.leaves(outputs) if jnp.issubdtype(y.dtype, jnp.floating)]
    return sum(parts, jnp.float32(0))


def _rate(learning_rate: float | None, float_learning_rate: float | None) -> list[Finding]:
    found = []
    for name, rate in (("learning rate", learning_rate), ("float learning rate", float_learning_rate)):
        if rate is not None and not (np.isfinite(rate) and rate >= 0):
            found.append(_say("", f"the {name} is {rate}", "give a number that is finite and not negative"))
    if not found and learning_rate and float_learning_rate and learning_rate > float_learning_rate / 5:
        fix = f"take 1/10 to 1/20 of the float one, {CLIP}, plain SGD with steps instead of OneCycle or warm-up"
        message = f"the learning rate {learning_rate:g} is high for QAT"
        found.append(_say("", message, fix, float=float_learning_rate))
    return found


def _say(where: str, message: str, fix: str, **numbers: Any) -> Finding:
    return Finding(level="error", check="NaN", where=where, message=message, fix=fix, numbers=numbers)
