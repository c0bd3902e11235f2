"""The losses of `jquant train`, with the labels that each takes and what it says beside itself."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.cli.data import load_object
from jquant.cli.settings import IGNORED, LOSSES
from jquant.types import Array, FormatError, InputError

Metrics = dict[str, Array]
Loss = Callable[[Any, Array], tuple[Array, Metrics]]  # (outputs, labels) to a mean over the batch, and others


def loss_of(name: str, ignore_label: int) -> Loss:
    """A loss by its name, or the user's own as `module:function`.

    Args:
      name: "cross_entropy", "mse", "l1", or `module:function` for `(outputs, labels) -> scalar`, or a pair of it and
        {metric: scalar}; outputs are an array, or nested as the model gives them where there are several.
      ignore_label: the class of `cross_entropy` that is left out; 255 is a class like others where there are so many.

    Raises:
      FormatError: no such loss.
    """
    if name == "cross_entropy":
        return partial(cross_entropy, ignore_label=ignore_label)
    if name in LOSSES:
        return partial(_distance, power=2 if name == "mse" else 1)
    own = load_object(name)
    if not callable(own):
        raise FormatError(f"{name} is {type(own).__name__}, not a function")
    return lambda outputs, labels: _with_metrics(own(outputs, labels))


def check_labels(name: str, labels: np.ndarray, outputs: Any, ignore_label: int) -> None:
    """Labels of the first batch against the outputs, an array or shapes of it.

    Raises:
      InputError: of another dtype, shape or range than the loss takes, with what is wanted.
    """
    if name not in LOSSES:
        return
    if not hasattr(outputs, "shape"):
        raise InputError(
            f"loss {name!r} is for one output, this model has {len(outputs)}; give your own, module:function, in "
            '[train] of the settings, such as loss = "file.py:loss": it takes (outputs, labels)'
        )
    found = f"labels are {labels.dtype}{list(labels.shape)}"
    if name != "cross_entropy":
        if labels.dtype.kind not in "fiu" or labels.shape != outputs.shape:
            raise InputError(f"{found}; loss {name!r} takes numbers of the shape of the output, {list(outputs.shape)}")
        return
    wanted = (outputs.shape[0], *outputs.shape[2:])
    if labels.dtype.kind not in "iu" or labels.shape != wanted:
        raise InputError(f"{found}; cross_entropy takes class numbers {list(wanted)} for outputs {list(outputs.shape)}")
    strange = labels[~_is_left_out(labels, outputs, ignore_label) & ((labels < 0) | (labels >= outputs.shape[1]))]
    if strange.size:
        raise InputError(f"a label is {strange.flat[0]}; the output has {outputs.shape[1]} classes, from 0")


def cross_entropy(logits: Array, labels: Array, ignore_label: int = 255) -> tuple[Array, Metrics]:
    """Mean in nats, and "top-1 %". `logits` [N, classes, ...], `labels` [N, ...] class numbers."""
    kept = ~_is_left_out(labels, logits, ignore_label)
    count = jnp.maximum(kept.sum(), 1).astype(jnp.float32)
    likely = jax.nn.log_softmax(logits, axis=1)
    chosen = jnp.take_along_axis(likely, jnp.where(kept, labels, 0)[:, None], axis=1)[:, 0]
    right = ((logits.argmax(1) == labels) & kept).sum().astype(jnp.float32)
    return -jnp.where(kept, chosen, 0.0).sum() / count, {"top-1 %": 100 * right / count}


def _is_left_out(labels: Any, outputs: Any, ignore_label: int) -> Any:
    """Where labels have the class that counts nowhere. The default, 255, is one of 256 classes and more."""
    return (labels == ignore_label) & (ignore_label != IGNORED or outputs.shape[1] <= IGNORED)


def _distance(outputs: Array, wanted: Array, *, power: int) -> tuple[Array, Metrics]:
    return (jnp.abs(outputs - wanted.astype(jnp.float32)) ** power).mean(), {}


def _with_metrics(found: Any) -> tuple[Array, Metrics]:
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping):
        return found[0], dict(found[1])
    return found, {}
