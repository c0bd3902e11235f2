"""What a curve of losses says: has the training converged?"""

from collections.abc import Sequence

import numpy as np

from jquant.analysis.findings import Finding, Level
from jquant.types import InputError

FEWEST = 4  # values; three lie on a line too easily
STEP = 0.01  # of the level, an epoch: a slope below is flat
SURE = 2.0  # standard errors that a slope has to be away from 0
APART = 3.0  # standard errors of a difference that the last third has to be above the lowest stretch of its length


def judge_losses(losses: Sequence[float]) -> Finding:
    """Whether a training has converged, from its losses: one judgement for every curve.

    The last third of the curve decides, three values at least: a line through it falls or rises if its slope is more
    than 1 % of the level an epoch, and more than two standard errors. A loss that was clearly lower before has risen
    again. So noise around a level is flat.

    Args:
      losses: one an epoch (or one a report), from the first to the last.

    Returns:
      A `Finding` whose `numbers` have the level of the last third ("loss") and the change an epoch ("per_epoch"), where
      there are enough values. Its level: "note" for a curve that fell and is flat, or that is too short to judge;
      "warning" for one that still falls, or never fell; "error" for one that rises or is not finite.

    Raises:
      InputError: no values, or no sequence of numbers.

    Example:
      >>> from jquant.analysis import judge_losses
      >>> judge_losses([1.0, 0.8, 0.6, 0.4, 0.2]).message
      'the loss still falls, by 0.2 an epoch'
      >>> judge_losses([2.0, 0.9, 0.5, 0.31, 0.30, 0.31, 0.30]).message
      'the loss is flat: the training has converged'
    """
    try:
        values = np.asarray(losses, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"losses must be numbers, one an epoch: {error}") from error
    if values.ndim != 1 or not values.size:
        raise InputError(f"losses must be a sequence of numbers, one an epoch, not of shape {list(values.shape)}")
    if not np.isfinite(values).all():
        first = int(np.flatnonzero(~np.isfinite(values))[0])
        fix = "go back to the last checkpoint before; lower the learning rate, clip gradients, and look at the data"
        return _say("error", f"the loss is {values[first]} from value {first + 1} of {values.size} on", fix)
    if values.size < FEWEST:
        fix = f"give the losses of at least {FEWEST} epochs"
        count = f"{values.size} losses are" if values.size > 1 else "one loss is"
        return _say("note", f"{count} too few to see whether the training has converged", fix)
    return _judge(values)


def _judge(values: np.ndarray) -> Finding:
    tail = values[-max(3, len(values) // 3) :]
    slope, error = _line(tail)
    level = float(np.abs(tail).mean())
    size = max(level, STEP * float(np.ptp(values)), 1e-30)
    numbers = {"loss": float(tail.mean()), "per_epoch": slope}
    moves = abs(slope) > STEP * size and abs(slope) > SURE * error
    if moves and slope > 0:
        fix = "take the checkpoint with the lowest loss; lower the learning rate, and look for overfitting"
        return _say("error", f"the loss rises, by {slope:.3g} an epoch", fix, **numbers)
    if moves:
        return _say(
            "warning", f"the loss still falls, by {-slope:.3g} an epoch", "train it longer, then quantize", **numbers
        )
    # The lowest stretch, not the lowest value: of much noise some value is always far below.
    lowest = np.convolve(values, np.full(len(tail), 1 / len(tail)), "valid").min()
    if tail.mean() > lowest + 0.02 * np.ptp(values) + APART * tail.std() * np.sqrt(2 / len(tail)):
        fix = "take the checkpoint with the lowest loss; lower the learning rate, and look for overfitting"
        return _say("error", f"the loss has risen again from {values.min():.4g}, and stays", fix, **numbers)
    if tail.mean() > 0.9 * values[0] and values[0] > 0:
        fix = "if it began from a trained model, this is converged; else raise the learning rate, and check the labels"
        return _say("warning", "the loss is flat, and has hardly fallen since the first epoch", fix, **numbers)
    return _say("note", "the loss is flat: the training has converged", "nothing to do", **numbers)


def _line(tail: np.ndarray) -> tuple[float, float]:
    """The slope of the least-squares line, and its standard error."""
    x = np.arange(len(tail)) - (len(tail) - 1) / 2
    slope = float(x @ tail / (x @ x))
    rest = tail - tail.mean() - slope * x
    return slope, float(np.sqrt((rest @ rest) / max(len(tail) - 2, 1) / (x @ x)))


def _say(level: Level, message: str, fix: str, **numbers: float) -> Finding:
    return Finding(level=level, check="convergence", where="", message=message, fix=fix, numbers=numbers)
