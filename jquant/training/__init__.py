"""Around the step of training: optimizers and rules of thumb, checks, a loop, checkpoints, curves. Nothing is required.

`jq.apply_train` and `jq.TrainState` are all that a training loop of one's own needs.
"""

from jquant.plan.batch_norm import fold_batch_norm, raise_collapsed_scales, set_batch_statistics, split_batch_stats
from jquant.training.checkpoint import Checkpoint, Checkpoints, open_checkpoints
from jquant.training.checks import (
    TrainingError,
    check_float_training,
    check_initial_loss,
    check_zero_learning_rate,
)
from jquant.training.curves import plot_curves
from jquant.training.distillation import distillation_loss, feature_loss, output_loss
from jquant.training.loop import History, fit, make_step
from jquant.training.migrate import migrate_optimizer_state, parameter_sources
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
from jquant.training.scale_states import States, check_states, find_states
from jquant.training.state import apply_train_with_taps
from jquant.training.switching import Switches, switches

__all__ = [
    "Checkpoint",
    "Checkpoints",
    "FloatTraining",
    "History",
    "NotFinite",
    "Recipe",
    "States",
    "Switches",
    "TrainingError",
    "apply_train_with_taps",
    "check_float_training",
    "check_initial_loss",
    "check_states",
    "check_zero_learning_rate",
    "cosine_decay",
    "distillation_loss",
    "feature_loss",
    "find_first_nan",
    "find_nan",
    "find_states",
    "fit",
    "fold_batch_norm",
    "make_optimizer",
    "make_step",
    "migrate_optimizer_state",
    "open_checkpoints",
    "output_loss",
    "parameter_sources",
    "plot_curves",
    "raise_collapsed_scales",
    "recommend",
    "scale_learning_rate",
    "set_batch_statistics",
    "split_batch_stats",
    "step_decay",
    "switches",
]
