"""Where the first NaN or infinity of a training run comes from: which step, forward or backward, which node."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jquant.apply import Mode, unpack
from jquant.ir.evaluate import bind_inputs, evaluate
from jquant.qat import Trainable, TrainState, training_rule
from jquant.types import Array, Params, Plan

Where = Literal["input", "parameter", "scale", "forward", "loss", "backward", "gradient", "update"]


@dataclass(frozen=True)
class NotFinite:
    """The first value that is not finite.

    `where`  input, parameter or scale: it was there before; forward: `name` made it; loss: the loss of finite outputs;
             backward: a reader of `name` sent it back; gradient: of a parameter or scale, all values before it fine;
             update: the optimizer made it of finite gradients
    """

    where: Where
    name: str
    operator: str = ""
    step: int | None = None

    def __str__(self) -> str:
        step = "" if self.step is None else f"step {self.step}: "
        operator = f" ({self.operator})" if self.operator else ""
        words = {
            "input": "the input {} is not finite",
            "parameter": "the parameter {} was not finite before the step",
            "scale": "the scale {} was not finite before the step",
            "forward": "node {} is the first whose value is not finite",
            "loss": "the loss is not finite, the outputs are: look at the loss function",
            "backward": "the gradient that comes back to {} is the first that is not finite",
            "gradient": "the gradient of {} is not finite, those of all values are",
            "update": "gradients are finite, and the optimizer made {} not finite: clip, or lower its rate",
        }
        return step + words[self.where].format(repr(self.name)) + operator


def find_nan(
    plan: Plan,
    loss: Callable[[Any], Array],
    trainable: Trainable,
    *inputs: Array,
    batch_stats: Params | None = None,
    rngs: Array | None = None,
    mode: Mode = "qat",
) -> NotFinite | None:
    """The first value of one step that is not finite, forward or backward; None where all are.

    Values are looked at before they are quantized, since an infinity that saturates is finite again.

    Args:
      plan, batch_stats, rngs, mode: as for `jq.apply_train`; "bit_true" looks at its fake-quant side.
      loss: `outputs -> scalar`.
      trainable: parameters and scales.
      *inputs: one batch for each graph input.

    Example:
      found = jq.training.find_nan(plan, lambda y: cross_entropy(y, labels), state.trainable, images)
    """
    params = {**trainable.params, **(batch_stats or {})}
    for where, leaves in (("parameter", params), ("scale", trainable.qparams)):
        for name, leaf in leaves.items():
            if not np.isfinite(np.asarray(leaf)).all():
                return NotFinite(where, name)  # type: ignore[arg-type]
    bound = {entry.name: jnp.asarray(x) for entry, x in zip(plan.graph.inputs, inputs, strict=True)}
    for name, x in bound.items():
        if jnp.issubdtype(x.dtype, jnp.floating) and not np.isfinite(np.asarray(x)).all():
            return NotFinite("input", name)
    bound = bind_inputs(plan.graph, inputs)
    found = _finite(plan, mode, loss, trainable, dict(batch_stats or {}), bound, rngs)
    return _first(plan, jax.device_get(found))


@partial(jax.jit, static_argnames=("plan", "mode", "loss"))
def _finite(
    plan: Plan,
    mode: Mode,
    loss: Callable[[Any], Array],
    trainable: Trainable,
    batch_stats: dict[str, Array],
    inputs: dict[str, Array],
    rng: Array | None,
) -> dict[str, Any]:
    """Whether values, loss, gradients by values and gradients by leaves are finite."""

    def forward(trainable: Trainable, noise: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        params = {**trainable.params, **batch_stats}
        graph, rule, base = training_rule(plan, mode, params, trainable.qparams, rng, {})
        seen: dict[str, Array] = {}

        def tap(name: str, value: Array) -> Array:
            seen[name] = value
            value = base(name, value)
            return value + noise[name] if name in noise else value

        values = evaluate(graph, inputs, rule, tap)
        return loss(unpack([values[name] for name in plan.graph.outputs])), seen

    shapes = jax.eval_shape(lambda t: forward(t, {})[1], trainable)
    noise = {name: jnp.zeros(v.shape, v.dtype) for name, v in shapes.items() if v.dtype == jnp.float32}
    (value, seen), (leaves, back) = jax.value_and_grad(forward, argnums=(0, 1), has_aux=True)(trainable, noise)

    def finite(v: Array) -> Array:
        return jnp.isfinite(v).all() if jnp.issubdtype(v.dtype, jnp.floating) else jnp.bool_(True)

    return jax.tree.map(finite, {"seen": seen, "loss": value, "back": back, "leaves": leaves})


def _first(plan: Plan, found: dict[str, Any]) -> NotFinite | None:
    operators = {node.name: type(node.op).__name__ for node in plan.graph.nodes}
    for name in plan.graph.values:
        if not found["seen"].get(name, True):
            return NotFinite("forward", name, operators.get(name, "Input"))
    if not found["loss"]:
        return NotFinite("loss", "loss")
    for name in reversed(plan.graph.values):
        if not found["back"].get(name, True):
            readers = ", ".join(f"{n.name}: {type(n.op).__name__}" for n in plan.graph.consumers[name])
            return NotFinite("backward", name, f"from {readers}" if readers else "from the loss")
    for leaves in (found["leaves"].params, found["leaves"].qparams):
        for name, fine in leaves.items():
            if not fine:
                return NotFinite("gradient", name)
    return None


def find_first_nan(
    plan: Plan,
    step: Callable[[TrainState, Any], tuple[TrainState, Any]],
    state: TrainState,
    batches: Iterable[Any],
    *,
    loss: Callable[..., Array],
    inputs: Callable[[Any], tuple[Array, ...]] = lambda batch: (batch[0],),
    mode: Mode = "qat",
) -> NotFinite | None:
    """Trains until something is not finite, and says where it came from; None where nothing is.

    Args:
      plan, mode: as for `jq.apply_train`.
      step: of training, `(state, batch) -> (state, loss)`; it must not donate its state, which is needed afterwards.
      state: where to begin, a checkpoint before the trouble for example.
      batches: of training.
      loss: `(outputs, batch=...) -> scalar`, that of the step; its second argument is named `batch`.
      inputs: what of a batch goes into the graph.
    """
    for batch in batches:
        new, value = step(state, batch)
        leaves = jax.tree.leaves((value, new.trainable, new.batch_stats))
        if all(np.isfinite(np.asarray(v)).all() for v in leaves):
            state = new
            continue
        at = int(state.step)
        found = find_nan(
            plan, partial(loss, batch=batch), state.trainable, *inputs(batch), batch_stats=state.batch_stats, mode=mode
        )
        return replace(found, step=at) if found else _by_update(new, at)
    return None


def _by_update(state: TrainState, step: int) -> NotFinite:
    leaves = {**state.params, **{f"scale of {k}": v for k, v in state.qparams.items()}}
    name = next((k for k, v in leaves.items() if not np.isfinite(np.asarray(v)).all()), "the loss")
    return NotFinite("update", name, step=step)
