"""What a trainer should check before believing a curve, as pure functions; each names what is wrong.

In the order in which to use them: float training through the same pipeline without quantization, then a learning rate
of 0, then the first loss.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from jquant.training.state import TrainState
from jquant.types import JQuantError

Step = Callable[[Any, Any], tuple[Any, Any]]  # (state, batch) -> (state, loss or metrics)


class TrainingError(JQuantError):
    """A training run that cannot be right."""


def check_zero_learning_rate(
    step: Step, state: TrainState, batches: Iterable[Any], *, evaluate: Callable[[TrainState], Any]
) -> Any:
    """Steps with a learning rate of 0 leave the calibrated accuracy as it is, exactly.

    Args:
      step: the step of training, `(state, batch) -> (state, loss)`.
      state: made with the optimizer of training, its learning rates 0.
      batches: some of them.
      evaluate: `state -> accuracy`, or any tree of numbers.

    Returns:
      The accuracy.

    Raises:
      TrainingError: what moved first: a parameter (weight decay or a label without rate 0), or batch statistics.

    Example:
      tx = optax.multi_transform({"weight": optax.sgd(0.0), "scale": optax.sgd(0.0)}, jq.labels(model))
      state = jq.TrainState.create(model, tx=tx)
      jq.training.check_zero_learning_rate(step, state, batches[:3], evaluate=accuracy)
    """
    before, first = jax.device_get(evaluate(state)), state
    for batch in batches:
        state, _ = step(state, batch)
    for part, hint in (
        ("trainable", "something other than the learning rate moves it, such as weight decay after it"),
        ("batch_stats", "live batch norm follows the batches: use jq.training.set_batch_statistics(model, 'running')"),
    ):
        if name := first_difference(getattr(first, part), getattr(state, part)):
            raise TrainingError(f"a learning rate of 0 moved {part}{name}: {hint}")
    after = jax.device_get(evaluate(state))
    if name := first_difference(before, after):
        raise TrainingError(f"the same parameters were evaluated twice, {name} as {before} and {after}: is it random?")
    return after


def check_float_training(step: Step, reference: Step, state: Any, batches: Iterable[Any]) -> int:
    """Two ways of training give the same bits: with fake-quant off, that of QAT is that of float.

    Args:
      step: of QAT with `mode="float"`, `(state, batch) -> (state, loss)`.
      reference: of float training, on the same state.
      state: where both start.
      batches: some of them.

    Returns:
      The number of steps compared.

    Raises:
      TrainingError: the first step and the first leaf that differ, and by how much.
    """
    one, other, count = state, state, 0
    for count, batch in enumerate(batches, start=1):
        one, loss = step(one, batch)
        other, wanted = reference(other, batch)
        for what, a, b in (("loss", loss, wanted), ("state", one, other)):
            if name := first_difference(a, b):
                raise TrainingError(f"step {count}: {what}{name} differs from float training{_by_how_much(a, b, name)}")
    if count == 0:
        raise TrainingError("no batches: nothing was compared")
    return count


def check_initial_loss(qat: float, *, float_loss: float, factor: float = 1.5, margin: float = 0.1) -> None:
    """An alarm where the first QAT loss is far from that of the float model on the same batch.

    A calibrated 8-bit model begins near its float loss. Where it does not, training repairs what calibration broke:
    look at `jq.analysis.compare` first. For few bits, raise `factor`.

    Raises:
      TrainingError: a loss that is not finite, or above `factor * float_loss + margin`.
    """
    qat, float_loss = float(qat), float(float_loss)
    if not math.isfinite(qat) or not math.isfinite(float_loss):
        raise TrainingError(f"the first loss is {qat:g}, that of float {float_loss:g}: use jq.training.find_nan")
    limit = factor * abs(float_loss) + margin
    if qat > limit:
        raise TrainingError(
            f"the first QAT loss is {qat:.4g}, that of the float model {float_loss:.4g}: above {limit:.4g}. Calibrate "
            "again, or find the layer with jq.analysis.compare(model, x, 'float', 'fake_quant')"
        )


def first_difference(a: Any, b: Any) -> str | None:
    """The path of the first leaf that is not the same, bit for bit; None where all are."""
    if jax.tree.structure(a) != jax.tree.structure(b):  # type: ignore[operator]
        return " (another tree)"
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        if not _same_bits(np.asarray(x), np.asarray(y)):
            return jax.tree_util.keystr(path) or " "
    return None


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _by_how_much(a: Any, b: Any, name: str) -> str:
    pairs = zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True)
    for (path, x), y in pairs:
        if (jax.tree_util.keystr(path) or " ") == name and np.shape(x) == np.shape(y):
            apart = np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)).max()
            return f": up to {apart:.3g} apart"
    return ""
