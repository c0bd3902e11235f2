"""Before and during training: signs of overfitting, where a NaN comes from, and settings from those of float."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.analysis.findings import Finding
from jquant.apply import apply_with_taps
from jquant.batch_norm import fold_kept
from jquant.ir.evaluate import evaluate
from jquant.ir.graph import is_finite
from jquant.simulate import fake_quant_rule, fake_quant_tap, float_rule
from jquant.types import Array, Params, Plan, QConfigError, QParams


def overfitting_signs(
    plan: Plan, params: Params, *inputs: Array, noise: float = 0.02, amplification: float = 10.0, peak: float = 100.0
) -> list[Finding]:
    """Signs that the float model overfits, which makes it hostile to quantization.

    The three that the guides name: the output changes much under a slight change of the input (noise of a share of its
    standard deviation, a shift of one pixel, brightness), parameters are large, activations are large.

    Args:
      plan, params, *inputs: as for `jq.apply`.
      noise: standard deviation of the noise, and change of brightness, as a share of the input's.
      amplification: relative change of an output over relative change of the input that is remarked on.
      peak: largest absolute weight or activation that is not.

    Returns:
      Findings. Weight decay, normalization or a clamp in the float training help; quantization cannot.
    """
    found = []
    base, values = apply_with_taps(plan, params, {}, *inputs, mode="float", taps="*")
    for name, changed in _disturbed(inputs, noise).items():
        moved = apply_with_taps(plan, params, {}, *changed, mode="float", taps=None)[0]
        ratio = _relative(base, moved) / max(_relative(inputs, changed), 1e-12)
        if ratio > amplification:
            message = f"{name} of the input changes the output {ratio:.3g} times as much, relatively"
            found.append(_overfit("", message, {"amplification": ratio}))
    for key in plan.weights:
        largest = float(jnp.max(jnp.abs(params[key])))
        if largest > peak:
            found.append(_overfit(key, f"weights up to {largest:.3g}", {"largest": largest}))
    for name, value in values.items():
        if name not in plan.exact and (largest := float(jnp.max(jnp.abs(value)))) > peak:
            found.append(_overfit(name, f"activations up to {largest:.3g}", {"largest": largest}))
    return found


def _disturbed(inputs: Sequence[Array], noise: float) -> dict[str, tuple[Array, ...]]:
    key = jax.random.key(0)

    def each(change: Any) -> tuple[Array, ...]:
        return tuple(change(x) if x.dtype == jnp.float32 else x for x in inputs)

    found = {
        "noise": each(lambda x: x + noise * jnp.std(x) * jax.random.normal(key, x.shape)),
        "brightness": each(lambda x: x * (1 + jnp.float32(noise))),
    }
    if all(x.ndim >= 3 for x in inputs):
        found["a shift by one pixel"] = each(lambda x: jnp.roll(x, 1, axis=-1))
    return found


def _relative(a: Any, b: Any) -> float:
    pairs = [
        (np.asarray(x, np.float64), np.asarray(y, np.float64))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]
    size = sum(float((x**2).sum()) for x, _ in pairs)
    return float(np.sqrt(sum(float(((x - y) ** 2).sum()) for x, y in pairs) / max(size, 1e-30)))


def _overfit(where: str, message: str, numbers: Mapping[str, float]) -> Finding:
    fix = "weight decay, normalization or a clamp in the float training; quantization cannot mend it"
    return Finding(level="warning", check="overfitting", where=where, message=message, fix=fix, numbers=numbers)


def find_nan(plan: Plan, params: Params, qparams: QParams, *inputs: Array, quantized: bool = True) -> str | None:
    """The first value of the forward pass that is not finite, in graph order; None where all are."""
    plan, params, qparams = fold_kept(plan, params, qparams)
    bound = {entry.name: x for entry, x in zip(plan.graph.inputs, inputs, strict=True)}
    rule = fake_quant_rule(plan, params, qparams) if quantized else float_rule(plan.graph, params)
    values = evaluate(plan.graph, bound, rule, fake_quant_tap(plan, qparams) if quantized else None)
    numbers = (n for n in plan.graph.values if jnp.issubdtype(values[n].dtype, jnp.floating))
    return next((name for name in numbers if not is_finite(values[name])), None)


def nan_checklist(
    plan: Plan,
    params: Params,
    qparams: QParams | None,
    *inputs: Array,
    losses: Sequence[float] = (),
    learning_rate: float | None = None,
    float_learning_rate: float | None = None,
) -> list[Finding]:
    """Where a NaN comes from, in the order of the guides: data, float model, calibration, first value, learning rate.

    Args:
      plan, params, qparams: as for `jq.apply`; qparams None: not calibrated.
      *inputs: the batch that gave it.
      losses: of the float training, to see whether it converged.
      learning_rate: of QAT; float_learning_rate: that float training ended with or started from.

    Returns:
      Findings, the most likely cause first; empty where nothing is wrong.
    """
    found = []

    def say(where: str, message: str, fix: str, **numbers: Any) -> None:
        found.append(Finding(level="error", check="NaN", where=where, message=message, fix=fix, numbers=numbers))

    for entry, x in zip(plan.graph.inputs, inputs, strict=True):
        if jnp.issubdtype(x.dtype, jnp.floating) and not is_finite(x):
            count = int(jnp.sum(~jnp.isfinite(x)))
            say(entry.name, f"the input has {count} values that are not finite", "check the preprocessing", count=count)
    for key in plan.graph.param_names:
        if not is_finite(params[key]):
            say(key, "the parameter is not finite", "go back to the last checkpoint whose parameters are")
    if len(losses) >= 4:
        early, late = np.mean(losses[-len(losses) // 2 : -len(losses) // 4]), np.mean(losses[-len(losses) // 4 :])
        if not np.isfinite(late) or late > 1.02 * early or late > 0.9 * losses[0]:
            say(
                "",
                "the float training has not converged",
                "train it longer: observers are unstable on it",
                loss=float(late),
            )
    if qparams is None:
        say("", "the model is not calibrated", "call jq.calibrate before training: it gives the first scales")
    elif not found:
        name = find_nan(plan, params, qparams, *inputs)
        if name is not None:
            spread = find_nan(plan, params, qparams, *inputs, quantized=False) is None
            cause = "only with quantizers on: look at its scale" if spread else "in float too: a division, log or exp"
            say(name, f"the first value that is not finite, {cause}", "clamp its operand, or calibrate again")
    if learning_rate and float_learning_rate and learning_rate > float_learning_rate / 5:
        say(
            "",
            f"the learning rate {learning_rate:g} is high for QAT",
            "take 1/10 to 1/20 of the float one, clip gradients (optax.clip_by_global_norm), plain SGD with steps "
            "instead of OneCycle or warm-up",
            float=float_learning_rate,
        )
    return found


def training_advice(
    float_learning_rate: float,
    float_epochs: int,
    *,
    float_batch: int,
    batch: int,
    schedule: str = "step",
    devices: int = 1,
) -> list[Finding]:
    """Settings of QAT from those of the float training, as the guides give them.

    Args:
      float_learning_rate: that the float training converged with; float_epochs: how many.
      float_batch: its samples a step, over all devices.
      batch: samples a step on one device of the QAT; devices: how many.
      schedule: of the float training; "onecycle" and "warmup" are remarked on.

    Returns:
      Findings; `numbers` has the settings.

    Raises:
      QConfigError: settings that are not positive.

    Example:
      >>> from jquant.analysis import training_advice
      >>> training_advice(0.1, 100, float_batch=256, batch=64, devices=8)[0].numbers["learning_rate"]
      0.02
    """
    if min(float_learning_rate, float_epochs, float_batch, batch, devices) <= 0:
        raise QConfigError("learning rate, epochs, batches and devices must be positive")
    whole = batch * devices
    rate = float_learning_rate / 10 * whole / float_batch
    said = [
        Finding(
            level="note" if whole == float_batch else "warning",
            check="learning rate",
            where="",
            message=f"start with {rate:g}: a tenth of float, times {whole} / {float_batch} for the global batch",
            fix="two decays by 10, no warm-up; weight decay, loss and the rest as in float, augmentation weaker",
            numbers={"learning_rate": rate, "global_batch": whole},
        ),
        Finding(
            level="note",
            check="epochs",
            where="",
            message="10 to 20 % of the float epochs",
            fix="start from the calibrated state, never from an uncalibrated one",
            numbers={"epochs": max(1, round(0.15 * float_epochs))},
        ),
    ]
    if schedule.lower() in ("onecycle", "warmup", "one_cycle", "warm-up"):
        fix = "take SGD with step decay: the high rates of that schedule throw the calibrated scales away"
        said.append(Finding(level="warning", check="schedule", where="", message=f"float used {schedule}", fix=fix))
    return said
