"""Around the step of training: optimizers and rules of thumb, checks, a loop, checkpoints, curves. Nothing is required.

`jq.apply_train` and `jq.TrainState` are all that a training loop of one's own needs.
"""

from jquant.training.checkpoint import Checkpoint, Checkpoints, open_checkpoints
from jquant.training.checks import (
    TrainingError,
    check_float_training,
    check_initial_loss,
    check_zero_learning_rate,
)
from jquant.training.curves import plot_curves
from jquant.training.loop import History, fit, make_step
from jquant.training.nan import NotFinite, find_first_nan, find_nan
from jquant.training.recipes import (
    FloatTraining,
    Recipe,
    cosine_decay,
    make_optimizer,
    recommend,
    scale_learning_rate,
    step_decay,
)

__all__ = [
    "Checkpoint",
    "Checkpoints",
    "FloatTraining",
    "History",
    "NotFinite",
    "Recipe",
    "TrainingError",
    "check_float_training",
    "check_initial_loss",
    "check_zero_learning_rate",
    "cosine_decay",
    "find_first_nan",
    "find_nan",
    "fit",
    "make_optimizer",
    "make_step",
    "open_checkpoints",
    "plot_curves",
    "recommend",
    "scale_learning_rate",
    "step_decay",
]
