"""Optimizers for QAT, and rules of thumb that say why."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax

from jquant.qat import Freeze, labels
from jquant.text import did_you_mean, format_table
from jquant.types import Plan, QConfigError

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
    if batch < 1 or base_batch < 1:
        raise QConfigError(f"batches must be at least 1, not {batch!r} and {base_batch!r}")
    if rule not in ("linear", "sqrt"):
        raise QConfigError(f"rule {rule!r}; known: linear, sqrt")
    return rate * (batch / base_batch) ** (1.0 if rule == "linear" else 0.5)


def step_decay(rate: float, *, steps: int, decays: int = 2, factor: float = 0.1) -> Schedule:
    """`rate`, multiplied by `factor` after each of `decays + 1` equal parts of the steps: what QAT usually takes.

    A pretrained model needs no warm-up.
    """
    import optax

    return optax.piecewise_constant_schedule(rate, {steps * (i + 1) // (decays + 1): factor for i in range(decays)})


def cosine_decay(rate: float, *, steps: int, final: float = 0.01) -> Schedule:
    """From `rate` to `final * rate` along half a cosine, without warm-up."""
    import optax

    return optax.cosine_decay_schedule(rate, steps, alpha=final)


def make_optimizer(
    plan: Plan,
    *,
    optimizer: Optimizer = "sgd",
    learning_rate: float | Schedule,
    scale_rate: float | Schedule | None = None,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    clip: float | None = None,
    freeze: Freeze = (),
) -> Any:
    """An optax chain for what a plan trains: kernels, biases and batch norms, scales, and what is frozen.

    Weight decay is for kernels alone: it would pull scales to 0, which is no simpler model but a coarser clip, and
    biases and batch norms with them. For AdamW the rate of scales is relative, |step| <= rate * scale: Adam's steps
    do not know how small a scale is. For SGD it is absolute: LSQ balances the gradient itself (Esser et al. 2020, 2.2).

    Args:
      plan: what `prepare` returned.
      optimizer: "sgd" with Nesterov momentum, or "adamw".
      learning_rate: of kernels, biases and batch norms; a number or a schedule.
      scale_rate: of scales; None takes `learning_rate`. 0 freezes them.
      weight_decay: as in float training.
      momentum: of SGD.
      clip: the largest norm of all gradients together; None does not clip.
      freeze: as for `jq.labels`.

    Returns:
      A transformation for `TrainState.create(..., tx=...)`.
    """
    import optax

    if optimizer not in ("sgd", "adamw"):
        raise QConfigError(
            f"optimizer {optimizer!r}; known: sgd, adamw{did_you_mean(str(optimizer), ('sgd', 'adamw'))}"
        )
    scale_rate = learning_rate if scale_rate is None else scale_rate

    def direction() -> Any:
        return optax.trace(momentum, nesterov=True) if optimizer == "sgd" else optax.scale_by_adam()

    def kernels(tree: Any) -> Any:
        return jax.tree.map(lambda v: hasattr(v, "ndim") and v.ndim > 1, tree)

    decay = optax.add_decayed_weights(weight_decay, mask=kernels)
    parts = [decay, direction()] if optimizer == "sgd" else [direction(), decay]
    weights = optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))
    relative = [optax.scale_by_param_block_rms(min_scale=1e-12)] if optimizer == "adamw" else []
    scales = optax.chain(direction(), *relative, optax.scale_by_learning_rate(scale_rate))
    rules = {"weight": weights, "batch_norm": weights, "scale": scales, "frozen": optax.set_to_zero()}
    by_label = optax.multi_transform(rules, labels(plan, freeze=freeze))
    return by_label if clip is None else optax.chain(optax.clip_by_global_norm(clip), by_label)


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

    def make_optimizer(self, plan: Plan, *, steps_per_epoch: int) -> Any:
        """The optax chain of these settings."""
        steps = max(1, round(self.epochs * steps_per_epoch))
        if self.schedule == "step":
            rate = step_decay(self.learning_rate, steps=steps, decays=self.decays)
        else:
            rate = cosine_decay(self.learning_rate, steps=steps)
        freeze = () if self.train_scales or not plan.trained else {"scale": ["*"]}
        return make_optimizer(
            plan,
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
      tx = recipe.make_optimizer(plan, steps_per_epoch=len(images) // 64)
    """
    rule: Literal["linear", "sqrt"] = "linear" if trained.optimizer == "sgd" else "sqrt"
    part = 1 / 10 if bits < 8 or calibration_drop > 0.05 else 1 / 20
    rate = scale_learning_rate(trained.learning_rate * part, batch=batch, base_batch=trained.batch, rule=rule)
    one_cycle = trained.schedule == "one_cycle"
    large = rate >= 5e-4
    train_scales = bits < 8 or calibration_drop > 0.01
    found: dict[str, tuple[Any, str]] = {
        "optimizer": (
            "sgd" if one_cycle else trained.optimizer,
            "one-cycle has no end to go on from: SGD is the safer one" if one_cycle else "as float",
        ),
        "learning_rate": (
            rate,
            f"1/{round(1 / part)} of the float rate, "
            + ("since there is much to repair" if part == 1 / 10 else "since calibration left little to do")
            + (f"; {rule} in the global batch, {trained.batch} -> {batch}" if batch != trained.batch else ""),
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
