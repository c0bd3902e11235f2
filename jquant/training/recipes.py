"""Optimizers for QAT, and rules of thumb that say why."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from jquant.plan.scales import quantizer_of
from jquant.text import did_you_mean, format_table
from jquant.training.state import Freeze, labels
from jquant.types import Model, QConfigError

Schedule = Callable[[Any], Any]
Optimizer = Literal["sgd", "adamw"]


def scale_learning_rate(
    rate: float, *, batch: int, base_batch: int, rule: Literal["linear", "sqrt"] = "linear"
) -> float:
    """A learning rate for another global batch: all devices, processes and accumulated slices together.

    Args:
      rate: found for `base_batch`.
      batch: images that go into one step of the optimizer.
      rule: "linear" for SGD; "sqrt" for Adam, whose steps do not grow with the gradient.

    References:
      Goyal et al. 2017, Accurate, Large Minibatch SGD (linear); Malladi et al. 2022, On the SDEs and Scaling Rules for
      Adaptive Gradient Algorithms (square root).

    Example:
      >>> from jquant.training import scale_learning_rate
      >>> scale_learning_rate(0.01, batch=8 * 64, base_batch=256)
      0.02
    """
    check_number("rate", rate)
    if not (batch >= 1 and base_batch >= 1):
        raise QConfigError(f"batches must be at least 1, not {batch!r} and {base_batch!r}")
    if rule not in ("linear", "sqrt"):
        raise QConfigError(f"rule {rule!r}; known: linear, sqrt")
    return rate * (batch / base_batch) ** (1.0 if rule == "linear" else 0.5)


def check_number(name: str, value: Any) -> None:
    """Refuses a setting that is no number, NaN, infinite or negative; None and schedules pass.

    Raises:
      QConfigError: the name and the value.
    """
    if value is None or callable(value):
        return
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float | np.number)
        or not math.isfinite(value)
        or value < 0
    ):
        raise QConfigError(f"{name} must be a finite number that is not negative, not {value!r}")


def check_optimizer(optimizer: str) -> None:
    """Raises QConfigError for an optimizer that has no recipe, with near names."""
    known = ("sgd", "adamw")
    if optimizer not in known:
        raise QConfigError(f"optimizer {optimizer!r}; known: sgd, adamw{did_you_mean(str(optimizer), known)}")


def step_decay(rate: float, *, steps: int, decays: int = 2, factor: float = 0.1) -> Schedule:
    """`rate`, multiplied by `factor` after each of `decays + 1` equal parts of the steps: what QAT usually takes.

    A pretrained model needs no warm-up.
    """
    import optax

    check_number("rate", rate)
    return optax.piecewise_constant_schedule(rate, {steps * (i + 1) // (decays + 1): factor for i in range(decays)})


def cosine_decay(rate: float, *, steps: int, final: float = 0.01) -> Schedule:
    """From `rate` to `final * rate` along half a cosine, without warm-up."""
    import optax

    check_number("rate", rate)
    return optax.cosine_decay_schedule(rate, steps, alpha=final)


def make_optimizer(
    model: Model,
    *,
    optimizer: Optimizer = "sgd",
    learning_rate: float | Schedule,
    scale_rate: float | Schedule | None = None,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    clip: float | None = None,
    threshold_decay: float | None = None,
    freeze: Freeze = (),
) -> Any:
    """An optax chain for what a model trains: kernels, biases and batch norms, scales, and what is frozen.

    Weight decay is for kernels and the thresholds of PACT. It would pull other scales to 0, which is no simpler model
    but a coarser clip, and biases and batch norms with them. For AdamW the rate of scales is relative,
    |step| <= rate * scale: Adam's steps do not know how small a scale is. For SGD it is absolute: LSQ balances the
    gradient itself (Esser et al. 2020, 2.2).

    Args:
      model: what `prepare` or `calibrate` returned.
      optimizer: "sgd" with Nesterov momentum, or "adamw".
      learning_rate: of kernels, biases and batch norms; a number or a schedule.
      scale_rate: of scales; None takes `learning_rate`. 0 freezes them.
      weight_decay: as in float training.
      momentum: of SGD.
      clip: the largest norm of all gradients together; None does not clip.
      threshold_decay: of the thresholds of `jq.pact`, whose loss has threshold_decay / 2 * alpha^2 added, so that they
        come down from the largest value; None takes `weight_decay`, as the paper does (Choi et al. 2018, section 3.2).
      freeze: as for `jq.labels`.

    Returns:
      A transformation for `TrainState.create(..., tx=...)`.
    """
    import optax

    check_optimizer(optimizer)
    for name, value in {
        "learning_rate": learning_rate,
        "scale_rate": scale_rate,
        "weight_decay": weight_decay,
        "momentum": momentum,
        "clip": clip,
        "threshold_decay": threshold_decay,
    }.items():
        check_number(name, value)
    scale_rate = learning_rate if scale_rate is None else scale_rate

    def direction() -> Any:
        return optax.trace(momentum, nesterov=True) if optimizer == "sgd" else optax.scale_by_adam()

    def kernels(tree: Any) -> Any:
        return jax.tree.map(lambda v: hasattr(v, "ndim") and v.ndim > 1, tree)

    decay = optax.add_decayed_weights(weight_decay, mask=kernels)
    weight_parts = [decay, direction()] if optimizer == "sgd" else [direction(), decay]
    weights = optax.chain(*weight_parts, optax.scale_by_learning_rate(learning_rate))
    relative = [optax.scale_by_param_block_rms(min_scale=1e-12)] if optimizer == "adamw" else []
    own = weight_decay if threshold_decay is None else threshold_decay
    lower = optax.add_decayed_weights(own, mask=partial(_only, _thresholds(model)))
    parts = [lower, direction()] if optimizer == "sgd" else [direction(), *relative, lower]
    scales = optax.chain(*parts, optax.scale_by_learning_rate(scale_rate))
    rules = {"weight": weights, "batch_norm": weights, "scale": scales, "frozen": optax.set_to_zero()}
    by_label = optax.multi_transform(rules, labels(model, freeze=freeze))
    return by_label if clip is None else optax.chain(optax.clip_by_global_norm(clip), by_label)


def _thresholds(model: Model) -> frozenset[str]:
    """The scales that `pact` trains as a threshold."""
    return frozenset(n for n in model.plan.trained if quantizer_of(model.plan.spec(n)).name == "pact")


def _only(names: frozenset[str], tree: Any) -> Any:
    """A mask: True for the leaves of some qparams."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: hasattr(leaf, "ndim") and str(getattr(path[-1], "key", "")) in names, tree
    )


@dataclass(frozen=True, kw_only=True)
class FloatTraining:
    """How the float model was trained.

    `learning_rate`  the largest one at which it converged
    `batch`          images a step, over all devices
    `batch_norm`     "live", or "frozen" where its statistics were fixed
    """

    learning_rate: float
    epochs: float
    batch: int
    optimizer: Optimizer = "sgd"
    schedule: Literal["step", "cosine", "one_cycle"] = "step"
    weight_decay: float = 0.0
    batch_norm: Literal["live", "frozen"] = "live"

    def __post_init__(self) -> None:
        check_optimizer(self.optimizer)
        for name in ("learning_rate", "epochs", "batch", "weight_decay"):
            check_number(name, getattr(self, name))
        if self.schedule not in ("step", "cosine", "one_cycle"):
            known = ("step", "cosine", "one_cycle")
            near = did_you_mean(str(self.schedule), known)
            raise QConfigError(f"schedule {self.schedule!r}; known: {', '.join(known)}{near}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of QAT; `why` has a reason for each, `print` shows both."""

    optimizer: Optimizer
    learning_rate: float
    schedule: Literal["step", "cosine"]
    decays: int
    epochs: float
    weight_decay: float
    clip: float | None
    batch_norm: Literal["fold", "frozen"]
    train_scales: bool
    why: Mapping[str, str]

    def __str__(self) -> str:
        return format_table(
            ("setting", "value", "why"), [(k, getattr(self, k), reason) for k, reason in self.why.items()]
        )

    def make_optimizer(self, model: Model, *, steps_per_epoch: int) -> Any:
        """The optax chain of these settings."""
        steps = max(1, round(self.epochs * steps_per_epoch))
        if self.schedule == "step":
            rate = step_decay(self.learning_rate, steps=steps, decays=self.decays)
        else:
            rate = cosine_decay(self.learning_rate, steps=steps)
        freeze = () if self.train_scales or not model.plan.trained else {"scale": ["*"]}
        return make_optimizer(
            model,
            optimizer=self.optimizer,
            learning_rate=rate,
            weight_decay=self.weight_decay,
            clip=self.clip,
            freeze=freeze,
        )


def recommend(
    trained: FloatTraining, *, batch: int, calibration_drop: float, bits: int = 8, saw_nan: bool = False
) -> Recipe:
    """Rules of thumb for QAT after a float training: where to begin a search, not where to end it.

    Args:
      trained: the float training.
      batch: images a step of QAT, over all devices.
      calibration_drop: what calibration alone lost, in the metric, as a share of the float value: 0.01 for 1 %.
      bits: the fewest of weights and activations.
      saw_nan: training ran into NaN before.

    Example:
      trained = jq.training.FloatTraining(learning_rate=0.1, epochs=90, batch=256)
      recipe = jq.training.recommend(trained, batch=64, calibration_drop=0.02)
      print(recipe)
      tx = recipe.make_optimizer(model, steps_per_epoch=len(images) // 64)
    """
    rule: Literal["linear", "sqrt"] = "linear" if trained.optimizer == "sgd" else "sqrt"
    part = 1 / 10 if bits < 8 or calibration_drop > 0.05 else 1 / 20
    check_number("calibration_drop", max(calibration_drop, 0))
    one_cycle = trained.schedule == "one_cycle"
    other = one_cycle and trained.optimizer != "sgd"  # SGD instead of Adam, whose rate says nothing about it
    if other:
        rate, why_rate = 1e-3, f"that of the guides for SGD: the rate of {trained.optimizer} says nothing about it"
    else:
        rate = scale_learning_rate(trained.learning_rate * part, batch=batch, base_batch=trained.batch, rule=rule)
        repair = "since there is much to repair" if part == 1 / 10 else "since calibration left little to do"
        global_batch = f"; {rule} in the global batch, {trained.batch} -> {batch}" if batch != trained.batch else ""
        why_rate = f"1/{round(1 / part)} of the float rate, {repair}{global_batch}"
    large = rate >= 5e-4
    train_scales = bits < 8 or calibration_drop > 0.01
    found: dict[str, tuple[Any, str]] = {
        "optimizer": (
            "sgd" if one_cycle else trained.optimizer,
            "one-cycle has no end to go on from: SGD is the safer one" if one_cycle else "as float",
        ),
        "learning_rate": (
            rate,
            why_rate,
        ),
        "schedule": (
            "cosine" if trained.schedule == "cosine" else "step",
            "as float, without warm-up" if trained.schedule == "cosine" else "step decay, no warm-up: it is converged",
        ),
        "decays": (2 if large else 1, "two decays by 10 for a rate near 1e-3, one near 1e-4"),
        "epochs": (
            max(1.0, trained.epochs * (0.2 if bits < 8 else 0.1)),
            f"{20 if bits < 8 else 10} % of the float training",
        ),
        "weight_decay": (trained.weight_decay, "as float, on kernels alone"),
        "clip": (1.0 if saw_nan else None, "NaN was seen" if saw_nan else "only where NaN shows up"),
        "batch_norm": (
            "frozen" if trained.batch_norm == "frozen" else "fold",
            "float was trained with frozen statistics" if trained.batch_norm == "frozen" else "the default: what ships",
        ),
        "train_scales": (
            train_scales,
            "calibration lost something, or bits are few" if train_scales else "calibration is good: keep its scales",
        ),
    }
    return Recipe(**{k: v for k, (v, _) in found.items()}, why={k: reason for k, (_, reason) in found.items()})
