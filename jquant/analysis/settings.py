"""Settings of QAT from those of the float training."""

import math
import re
from typing import Literal

from jquant.analysis.findings import Finding
from jquant.text import did_you_mean
from jquant.training.recipes import Optimizer, check_optimizer, scale_learning_rate
from jquant.types import QConfigError

# Names of schedules as people and frameworks write them, without "LR" and "schedule": torch, keras, optax.
_PLAIN = {
    "step", "multistep", "constant", "exponential", "exponentialdecay", "polynomial", "linear", "reduceonplateau",
    "plateau", "cosine", "cosineannealing", "cosineannealingwarmrestarts",
    "cosinedecay", "piecewiseconstant", "lambda", "none",
}  # fmt: skip
_HIGH = {
    "onecycle", "cosineonecycle", "linearonecycle", "cyclic", "warmup", "linearwarmup", "gradualwarmup", "warmupcosine",
    "cosinewarmup", "warmupcosinedecay", "cosinewithwarmup", "linearwithwarmup", "constantwithwarmup",
}  # fmt: skip
SGD_RATE = 1e-3  # of the guides, where the float training tells no rate for SGD


def training_advice(
    float_learning_rate: float,
    float_epochs: float,
    *,
    float_batch: int,
    batch: int,
    schedule: str = "step",
    optimizer: Optimizer = "sgd",
    devices: int = 1,
) -> list[Finding]:
    """Settings of QAT from those of the float training, as the guides give them.

    Args:
      float_learning_rate: that the float training converged with; float_epochs: how many.
      float_batch: its samples a step, over all devices.
      batch: samples a step on one device of the QAT; devices: how many.
      schedule: of the float training, as its framework names it ("OneCycleLR", "cosine"); one-cycle, cyclic and warm-up
        ones are remarked on.
      optimizer: of the float training, "sgd" or "adamw". A rate grows with the batch for SGD, with its square root for
        Adam. Where SGD is to take the place of Adam, its rate is that of the guides: Adam's says nothing about it.

    Returns:
      Findings; `numbers` has the settings.

    Raises:
      QConfigError: settings that are not positive and finite, an unknown schedule or optimizer.

    Example:
      >>> from jquant.analysis import training_advice
      >>> training_advice(0.1, 100, float_batch=256, batch=64, devices=8)[0].numbers["learning_rate"]
      0.02
    """
    numbers = {
        "float_learning_rate": float_learning_rate,
        "float_epochs": float_epochs,
        "float_batch": float_batch,
        "batch": batch,
        "devices": devices,
    }
    for name, value in numbers.items():
        if not (math.isfinite(value) and value > 0):
            raise QConfigError(
                f"{name} must be positive and finite, not {value!r}: learning rate, epochs, batches, devices"
            )
    check_optimizer(optimizer)
    high, whole = is_high_schedule(schedule), batch * devices
    found = [_rate(float_learning_rate, float_batch, whole, optimizer, replaced=high and optimizer != "sgd")]
    found.append(
        Finding(
            level="note",
            check="epochs",
            where="",
            message="10 to 20 % of the float epochs",
            fix="start from the calibrated state, never from an uncalibrated one",
            numbers={"epochs": max(1, round(0.15 * float_epochs))},
        )
    )
    if high:
        fix = "take SGD with step decay: the high rates of that schedule throw the calibrated scales away"
        found.append(Finding(level="warning", check="schedule", where="", message=f"float used {schedule}", fix=fix))
    return found


def _rate(float_rate: float, float_batch: int, whole: int, optimizer: Optimizer, *, replaced: bool) -> Finding:
    if replaced:
        rate = SGD_RATE
        message = (
            f"start with {rate:g} of SGD, as the guides do: the rate of {optimizer} says nothing about that of SGD"
        )
    else:
        rule: Literal["linear", "sqrt"] = "linear" if optimizer == "sgd" else "sqrt"
        rate = scale_learning_rate(float_rate / 10, batch=whole, base_batch=float_batch, rule=rule)
        root = "" if rule == "linear" else "the square root of "
        message = f"start with {rate:g}: a tenth of float, times {root}{whole} / {float_batch} for the global batch"
    return Finding(
        level="note" if whole == float_batch and not replaced else "warning",
        check="learning rate",
        where="",
        message=message,
        fix="two decays by 10, no warm-up; weight decay, loss and the rest as in float, augmentation weaker",
        numbers={"learning_rate": rate, "global_batch": whole},
    )


def is_high_schedule(schedule: str) -> bool:
    """Whether a schedule goes up to a high rate, which a calibrated model should not see.

    Raises:
      QConfigError: an unknown schedule, with near names.
    """
    name = re.sub(r"[^a-z]", "", str(schedule).lower())
    name = re.sub(r"(lr)?(scheduler|schedule)?$", "", name)
    if name in _HIGH:
        return True
    if name not in _PLAIN:
        known = sorted(_PLAIN | _HIGH)
        raise QConfigError(f"unknown schedule {schedule!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    return False
