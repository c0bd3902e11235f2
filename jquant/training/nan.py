"""Where the first NaN or infinity of a training run comes from: which step, forward or backward, which node."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jquant.graph.axes import automatic, automatic_axes
from jquant.graph.evaluate import bind_inputs
from jquant.graph.structure import nested_outputs
from jquant.meanings.meaning import Meaning, Mode
from jquant.training.state import TrainState, training_meaning
from jquant.types import Array, Model, Params, Plan

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


@automatic_axes()
def find_nan(
    model: Model,
    *inputs: Array,
    loss: Callable[[Any], Array] | None = None,
    batch_stats: Params | None = None,
    rngs: Array | None = None,
    mode: Mode = "fake_quant",
) -> NotFinite | None:
    """The first value of one step that is not finite, forward or backward; None where all are.

    Values are looked at before they are quantized, since an infinity that saturates is finite again.

    Args:
      model: in mode "float", without scales too.
      *inputs: one batch for each graph input.
      loss: `outputs -> scalar`; None looks forward only.
      batch_stats, rngs, mode: as for `jq.apply_train`; "bit_true" looks at its fake-quant side.

    Example:
      found = jq.training.find_nan(state.model, images, loss=lambda y: cross_entropy(y, labels))
    """
    model = model.replace(params={**model.params, **(batch_stats or {})})
    model, inputs = jax.tree.map(automatic, (model, inputs))
    plan = model.plan
    for where, leaves in (("parameter", model.params), ("scale", model.qparams)):
        for name, leaf in leaves.items():
            if not np.isfinite(np.asarray(leaf)).all():
                return NotFinite(where, name)  # type: ignore[arg-type]
    bound = {entry.name: jnp.asarray(x) for entry, x in zip(plan.graph.inputs, inputs, strict=True)}
    for name, x in bound.items():
        if jnp.issubdtype(x.dtype, jnp.floating) and not np.isfinite(np.asarray(x)).all():
            return NotFinite("input", name)
    bound = bind_inputs(plan.graph, inputs)
    found = _finite(model, mode, loss, bound, rngs)
    return _first(plan, jax.device_get(found))


@partial(jax.jit, static_argnames=("mode", "loss"))
def _finite(
    model: Model,
    mode: Mode,
    loss: Callable[[Any], Array] | None,
    inputs: dict[str, Array],
    rng: Array | None,
) -> dict[str, Any]:
    """Whether values, loss, gradients by values and gradients by leaves are finite."""

    def forward(model: Model, noise: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        meaning = training_meaning(model, mode, rng, {})
        seen: dict[str, Array] = {}

        def tap(name: str, value: Array) -> Array:
            seen[name] = value
            value = value if meaning.tap is None else meaning.tap(name, value)
            return value + noise[name] if name in noise else value

        values = Meaning(meaning.graph, meaning.rule, tap).values(inputs)
        outputs = nested_outputs(model.plan.graph, [values[name] for name in model.plan.graph.outputs])
        return jnp.float32(0) if loss is None else loss(outputs), seen

    if loss is None:
        seen, rest = forward(model, {})[1], {"loss": jnp.float32(0), "back": {}, "leaves": Model(model.plan, {})}
    else:
        shapes = jax.eval_shape(lambda m: forward(m, {})[1], model)
        noise = {name: jnp.zeros(v.shape, v.dtype) for name, v in shapes.items() if v.dtype == jnp.float32}
        found, grads = jax.value_and_grad(forward, argnums=(0, 1), has_aux=True)(model, noise)
        seen, rest = found[1], {"loss": found[0], "back": grads[1], "leaves": grads[0]}

    def finite(v: Array) -> Array:
        return jnp.isfinite(v).all() if jnp.issubdtype(v.dtype, jnp.floating) else jnp.bool_(True)

    return jax.tree.map(finite, {"seen": seen, **rest})


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
    step: Callable[[TrainState, Any], tuple[TrainState, Any]],
    state: TrainState,
    batches: Iterable[Any],
    *,
    loss: Callable[..., Array],
    inputs: Callable[[Any], tuple[Array, ...]] = lambda batch: (batch[0],),
    mode: Mode = "fake_quant",
) -> NotFinite | None:
    """Trains until something is not finite, and says where it came from; None where nothing is.

    Args:
      mode: as for `jq.apply_train`.
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
        found = find_nan(state.model, *inputs(batch), loss=partial(loss, batch=batch), mode=mode)
        return replace(found, step=at) if found else _by_update(new, at)
    return None


def _by_update(state: TrainState, step: int) -> NotFinite:
    leaves = {**state.model.params, **{f"scale of {k}": v for k, v in state.model.qparams.items()}}
    name = next((k for k, v in leaves.items() if not np.isfinite(np.asarray(v)).all()), "the loss")
    return NotFinite("update", name, step=step)
