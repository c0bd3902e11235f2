"""Distillation: losses that measure a model in training against the float model, in any loop.

    wanted = jq.apply(teacher, x, mode="float")                       # once for each batch, or each step
    def loss(trainable, x, wanted):
        outputs, stats = jq.apply_train(trainable, x)
        return jq.training.distillation_loss(outputs, wanted), stats

No labels are read, so the pictures that calibrate can train.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jquant.text import did_you_mean
from jquant.types import Array, InputError


def distillation_loss(outputs: Any, wanted: Any, *, temperature: float = 1.0) -> Array:
    """T^2 times the Kullback-Leibler divergence of the classes of a teacher from those of a model, in nats.

    Args:
      outputs: logits [..., classes] of the model in training, or several of them, nested as the model nests them.
      wanted: the teacher's, of the same form. They get no gradient.
      temperature: T, by which both are divided. The larger, the more the small logits count; at 1 the gradient is that
        of cross-entropy with the teacher's probabilities as labels.

    Returns:
      The mean over everything but the classes, and over several outputs.

    Raises:
      InputError: other shapes, no outputs, or a temperature that is not positive.

    References:
      Hinton et al. 2015, Distilling the Knowledge in a Neural Network, section 2.

    Example:
      >>> import jax.numpy as jnp
      >>> from jquant.training import distillation_loss
      >>> logits = jnp.log(jnp.array([[0.5, 0.5]]))
      >>> round(float(distillation_loss(logits, jnp.log(jnp.array([[0.75, 0.25]])))), 4)  # 0.75 ln 1.5 + 0.25 ln 0.5
      0.1308
    """
    if not temperature > 0:
        raise InputError(f"temperature must be positive, not {temperature!r}")
    pairs = _pairs(outputs, wanted)
    if any(made.ndim == 0 for made, _ in pairs):
        raise InputError("an output is a single number: distillation_loss takes logits [..., classes]")
    return sum((_divergence(*pair, temperature) for pair in pairs), jnp.float32(0.0)) / len(pairs)


def _divergence(made: Array, wanted: Array, temperature: float) -> Array:
    ours, theirs = (jax.nn.log_softmax(logits / temperature) for logits in (made, wanted))
    return temperature**2 * jnp.mean(jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1))


def output_loss(outputs: Any, wanted: Any) -> Array:
    """Noise over signal of outputs that are no logits: sum (y - wanted)^2 / sum wanted^2, the mean over several.

    Args:
      outputs, wanted: real, of any shape, as for `distillation_loss`.

    Raises:
      InputError: other shapes, or no outputs.

    Example:
      >>> import jax.numpy as jnp
      >>> from jquant.training import output_loss
      >>> float(output_loss(jnp.array([3.0, 3.0]), jnp.array([3.0, 4.0])))
      0.03999999910593033
    """
    pairs = _pairs(outputs, wanted)
    return sum((_noise(*pair) for pair in pairs), jnp.float32(0.0)) / len(pairs)


def feature_loss(values: Mapping[str, Array], wanted: Mapping[str, Array]) -> Array:
    """Noise over signal of features, the mean over their names: what the teacher computes inside.

    Args:
      values: {name: feature} of the model in training, as `jq.training.apply_train_with_taps` or `jq.apply_with_taps`
        return them; others than those of `wanted` are not read.
      wanted: {name: feature} of the teacher, of the same shapes. They get no gradient.

    Raises:
      InputError: no names, a name that `values` lacks, or other shapes.

    References:
      Romero et al. 2015, FitNets: Hints for Thin Deep Nets.

    Example:
      _, wanted = jq.apply_with_taps(teacher, x, mode="float", taps="stage*.add")
      outputs, stats, values = jq.training.apply_train_with_taps(trainable, x, taps="stage*.add")
      loss = jq.training.feature_loss(values, wanted)
    """
    for name in wanted:
        if name not in values:
            raise InputError(f"no value {name!r} in the model in training{did_you_mean(name, list(values))}")
    return output_loss({name: values[name] for name in wanted}, dict(wanted))


def _pairs(outputs: Any, wanted: Any) -> list[tuple[Array, Array]]:
    made, theirs = jax.tree.leaves(outputs), jax.tree.leaves(wanted)
    shapes = [list(map(jnp.shape, leaves)) for leaves in (made, theirs)]
    if not made or shapes[0] != shapes[1]:
        raise InputError(f"outputs of shapes {shapes[0]} against a teacher's of shapes {shapes[1]}")
    return list(zip(made, jax.lax.stop_gradient(theirs), strict=True))


def _noise(made: Array, wanted: Array) -> Array:
    tiny = jnp.finfo(jnp.float32).tiny
    return jnp.sum(jnp.square(made - wanted)) / jnp.maximum(jnp.sum(jnp.square(wanted)), tiny)
