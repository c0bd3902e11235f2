"""Fine-tuning: weights, biases and scales of a whole network are learned together, against the float network."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jquant.calibration.batches import Inputs, bound_batches
from jquant.graph.checks import check_params
from jquant.host.progress import track
from jquant.meanings.meaning import meaning_of
from jquant.plan.batch_norm import check_folded, raise_collapsed_scales
from jquant.plan.scales import check_model
from jquant.ptq.blocks import find_blocks
from jquant.types import Array, Model, Params, Plan, QConfigError

_FEATURES = 6.0  # the weight of all features together; that of all outputs is 1
_TINY = 1e-30


@dataclass(frozen=True)
class _Settings:
    steps: int
    learning_rate: float
    scale_rate: float
    features: tuple[str, ...]

    def check(self) -> None:
        if self.steps < 1:
            raise QConfigError(f"steps must be at least 1, not {self.steps!r}")
        for name in ("learning_rate", "scale_rate"):
            if not 0 <= getattr(self, name) < inf:
                raise QConfigError(f"{name} must be finite and at least 0, not {getattr(self, name)!r}")

    def optimizer(self) -> Any:
        import optax

        weights, scales = (optax.cosine_decay_schedule(r, self.steps) for r in (self.learning_rate, self.scale_rate))
        relative = optax.chain(optax.scale_by_adam(), optax.scale_by_param_block_rms(_TINY))
        rules = {
            "params": optax.adam(weights),
            "scales": optax.chain(relative, optax.scale_by_learning_rate(scales)),
        }
        labels: Any = _Learned._make(_Learned._fields)
        return optax.multi_transform(rules, labels)


class _Learned(NamedTuple):
    """What moves: `params` {name: real}, `scales` {value or weight: its parameter of scale}."""

    params: dict[str, Array]
    scales: dict[str, Array]


class _State(NamedTuple):
    learned: _Learned
    memory: Any  # of the optimizer


def finetune(
    model: Model,
    batches: Iterable[Any],
    *,
    reference: Model | None = None,
    steps: int = 200,
    learning_rate: float = 1e-4,
    scale_rate: float = 1e-3,
    layers: int = 3,
) -> Model:
    """Learns all weights, biases and scales together, so that every block comes closer to the float model.

    The loss is the noise of the outputs over their signal, sum (y - y_float)^2 / sum y_float^2, and 6 times the mean of
    that of the outputs of all blocks (`find_blocks`). The blocks hold back what would fit the outputs of a few pictures
    alone. Labels are not needed.

    Pictures that are moved, mirrored and cut at random help further: give a generator of such batches. A step takes one
    evaluation of the float model, and one evaluation and gradient of fake-quant. Weights stay real numbers that round
    to nearest, so `apply`, `lower` and training go on as ever.

    Args:
      model: calibrated. Begin with good scales and biases, as `recipe` finds them.
      batches: inputs, as for `jq.calibrate`, one batch a step. A list is read again until all steps are done.
      reference: the model whose float values are the goal; `model` if left out. After `correct_bias`, `adaround` or
        `shift_relus` it is the model from before them: they change the parameters.
      steps: of Adam, at least 1; the rates fall to 0 by a cosine.
      learning_rate: of weights and biases.
      scale_rate: of scales, relative to them.
      layers: as for `find_blocks`.

    Returns:
      The model with other parameters and scales.

    Raises:
      CalibrationError: fewer batches than steps from what cannot be read again, or scales that are missing.
      InputError: a batch that does not fit the graph. QConfigError: a setting out of range. GraphError: a reference
        with other parameters.

    References:
      Finkelstein et al. 2022, QFT: Post-training Quantization via Fast Joint Finetuning of All Degrees of Freedom.
      Romero et al. 2015, FitNets: Hints for Thin Deep Nets (features).

    Example:
      start = jq.ptq.search_weight_scales(jq.calibrate(model, batches))
      model = jq.ptq.finetune(jq.ptq.correct_bias(start, batches), batches, reference=start)
    """
    plan, goal = model.plan, model if reference is None else reference
    check_folded(plan, "finetune")
    check_model(model)
    check_params(plan.graph, goal.params)
    ends = dict.fromkeys(name for block in find_blocks(model, layers=layers).all for name in block.outputs)
    features = tuple(name for name in ends if name not in plan.graph.outputs)
    settings = _Settings(steps, learning_rate, scale_rate, features)
    settings.check()
    learned = _Learned(dict(model.params), {name: model.qparams[name] for name in plan.trained})
    learned = jax.tree.map(jnp.array, learned)  # copies: the memory of the state is given away
    state = _State(learned, settings.optimizer().init(learned))
    for inputs in track(_repeated(plan, batches, steps), "fine-tuning", total=steps):
        state = _update(state, model, goal.params, inputs, settings)
    return raise_collapsed_scales(_with(model, state.learned))


def _repeated(plan: Plan, batches: Iterable[Any], steps: int) -> Iterator[Inputs]:
    """As many batches as steps: those that there are, again and again."""
    left = steps
    while left:
        for inputs in bound_batches(plan, batches, label=None):
            yield inputs
            left -= 1
            if not left:
                return


@partial(jax.jit, static_argnames=("settings",), donate_argnums=0)
def _update(state: _State, model: Model, goal: Params, inputs: Inputs, settings: _Settings) -> _State:
    """A step of Adam on one batch."""
    wanted = meaning_of(model.replace(params=goal), "float").values(inputs)

    def loss(learned: _Learned) -> Array:
        made = meaning_of(_with(model, learned), "fake_quant").values(inputs)
        return _noise(made, wanted, model.plan.graph.outputs) + _FEATURES * _noise(made, wanted, settings.features)

    gradients = jax.grad(loss)(state.learned)
    # Optimizers mix integer counts with floats: a user's strict dtype promotion is not for their code.
    with jax.numpy_dtype_promotion("standard"):
        by, memory = settings.optimizer().update(gradients, state.memory, state.learned)
    return _State(jax.tree.map(jnp.add, state.learned, by), memory)


def _with(model: Model, learned: _Learned) -> Model:
    return model.replace(params={**model.params, **learned.params}, qparams={**model.qparams, **learned.scales})


def _noise(made: dict[str, Array], wanted: dict[str, Array], names: Iterable[str]) -> Array:
    """The mean, over values that are real numbers, of noise over signal."""
    numbers = [name for name in names if jnp.issubdtype(wanted[name].dtype, jnp.floating)]
    shares = [
        jnp.sum(jnp.square(made[name] - wanted[name])) / jnp.maximum(jnp.sum(jnp.square(wanted[name])), _TINY)
        for name in numbers
    ]
    return sum(shares, jnp.float32(0.0)) / max(len(shares), 1)
