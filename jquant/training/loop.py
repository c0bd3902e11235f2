"""The step of training and a thin loop over it: slices of a batch, a mesh of devices, donation, progress."""

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jquant.graph.axes import automatic_mesh, spec_of, with_automatic_axes
from jquant.graph.evaluate import host_array
from jquant.meanings.meaning import Mode
from jquant.text import did_you_mean
from jquant.training.slices import run_slices, spread_slices
from jquant.training.state import TrainState, apply_train
from jquant.training.switching import Switches
from jquant.types import Array, InputError, Model

Loss = Callable[[Any, Any], Any]  # (outputs, batch) -> scalar, or (scalar, {metric: scalar})
Step = Callable[..., tuple[TrainState, dict[str, Array]]]


def first_of(batch: Any) -> tuple[Array, ...]:
    """The graph's input in a batch of the form (x, ...)."""
    return (batch[0],)


def make_step(
    loss: Loss,
    *,
    inputs: Callable[[Any], tuple[Array, ...]] = first_of,
    mode: Mode = "fake_quant",
    slices: int = 1,
    mesh: Mesh | None = None,
    axis: str = "data",
    order: Literal["fixed", "any"] = "fixed",
    donate: bool = True,
) -> Step:
    """The jitted step of training, `step(state, batch, key=None, switches=None) -> (state, metrics)`.

    `switches` (`jq.training.switches`) say what is quantized and observed in which step; they are traced, and of a mesh
    or of slices the observed scales are averaged.

    A batch is cut into `slices`, whose gradients are averaged in a fixed order: gradient accumulation on one device,
    data parallelism on a mesh. The slices decide what is computed, not the devices: the same slices give the same sum
    in the same order on any number of devices, and the same bits wherever XLA compiles a slice alike: so it was on
    eight devices and on two processes, but for a slice of one image alone on its device (an ulp). Two things see a
    slice and not the batch: live batch norm, whose moved statistics are averaged, and the gradient factor
    1 / sqrt(elements) of LSQ scales. A batch norm over the whole batch is `slices=1` with a sharded batch.

    The sum runs: one device holds one sum and the gradients of one slice, whatever their number. On a mesh device d
    takes slices d, d + devices, and so on, and the sum goes around the ring of devices in parts, each device adding its
    slice; `order="any"` adds up on each device and reduces once, which sends less and whose bits depend on the number
    of devices.

    With `slices=1` and a batch that is sharded already, XLA divides the work and reduces in an order of its own.

    Args:
      mode: as for `jq.apply_train`.
      loss: `(outputs, batch) -> scalar`, or a pair of it and {metric: scalar}; a mean over the batch.
      inputs: what of a batch goes into the graph.
      slices: the batch size must be a multiple, and this one of the number of devices.
      mesh: devices to spread the slices over, of one process or of all.
      axis: the axis of the mesh.
      order: "fixed", as above, or "any".
      donate: give the memory of the old state to the new one; the old one cannot be read then.

    Returns:
      A step. Its metrics hold "loss".

    Raises:
      InputError: slices that do not fit the mesh; from the step, a batch that does not fit the slices.

    Example:
      step = jq.training.make_step(loss, slices=8, mesh=jax.make_mesh((8,), ("data",)))
      state, metrics = step(state, (images, labels), key)
    """
    if slices < 1:
        raise InputError(f"slices must be at least 1, not {slices!r}")
    if order not in ("fixed", "any"):
        raise InputError(f"order must be 'fixed' or 'any', not {order!r}")
    if mesh is not None:
        if axis not in mesh.shape:
            known = tuple(map(str, mesh.shape))
            raise InputError(f"the mesh has no axis {axis!r}, only {', '.join(known)}{did_you_mean(axis, known)}")
        if slices % mesh.shape[axis]:
            raise InputError(f"{slices} slices cannot be spread over {mesh.shape[axis]} devices; take a multiple")
        mesh = automatic_mesh(mesh)

    def one(trainable: Model, context: Context, batch: Any, key: Array | None) -> tuple[Any, ...]:
        def objective(trainable: Model) -> tuple[Array, tuple[Any, dict]]:
            y, moved = apply_train(
                trainable,
                *inputs(batch),
                batch_stats=context.batch_stats,
                rngs=key,
                mode=mode,
                switches=context.switches,
                step=context.step,
            )
            value, metrics = _with_metrics(loss(y, batch))
            return value, (moved, metrics)

        (value, (moved, metrics)), grads = jax.value_and_grad(objective, has_aux=True)(trainable)
        return grads, moved, {"loss": value, **metrics}

    def step(
        state: TrainState, batch: Any, key: Array | None = None, switches: Switches | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        context = Context(state.batch_stats, switches, state.step)
        if slices == 1 and mesh is None:
            grads, moved, metrics = one(state.trainable, context, batch, key)
        else:
            keys = None if key is None else jax.random.split(key, slices)
            given = (state.trainable, context, (_cut(batch, slices), keys))
            total, rest = run_slices(one, *given) if mesh is None else spread_slices(one, *given, mesh, axis, order)
            # Apart from the sum, so that the update compiles to the same fused arithmetic on one device and on many.
            total, rest = jax.lax.optimization_barrier((total, rest))
            grads = jax.tree.map(lambda v: v / slices, total)
            moved, metrics = jax.tree.map(partial(_ordered_mean, slices), rest)
        return state.update(grads, moved), metrics

    def on_any_axes(
        state: TrainState, batch: Any, key: Array | None = None, switches: Switches | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        def places(results: tuple[TrainState, dict[str, Array]]) -> Any:  # the state is divided as it was
            moved = jax.tree.unflatten(jax.tree.structure(results[0]), map(spec_of, jax.tree.leaves(state)))
            return moved, jax.tree.map(lambda _: PartitionSpec(), results[1])

        return with_automatic_axes(
            lambda given, batch: step(given[0], batch, *given[1:]), (state, key, switches), batch, places
        )

    on_any_axes.__name__ = "step"
    return jax.jit(on_any_axes, donate_argnums=(0,) if donate else ())


class Context(NamedTuple):
    """What a step reads beside what it trains."""

    batch_stats: dict[str, Array]
    switches: Switches | None
    step: Array


def _with_metrics(found: Any) -> tuple[Array, dict[str, Array]]:
    return found if isinstance(found, tuple) else (found, {})


def _cut(batch: Any, slices: int) -> Any:
    """Every array of a batch as [slices, N / slices, ...]."""

    def cut(v: Array) -> Array:
        if v.shape[0] % slices:
            raise InputError(f"a batch of {v.shape[0]} cannot be cut into {slices} equal slices")
        return v.reshape(slices, v.shape[0] // slices, *v.shape[1:])

    return jax.tree.map(cut, batch)


def _ordered_mean(count: int, parts: Array) -> Array:
    """The mean of [count, ...], summed from the first to the last."""
    total, _ = jax.lax.scan(lambda total, part: (total + part, None), jnp.zeros_like(parts[0]), parts)
    return total / count


# ---------------------------------------------------------------------------------------------------------------------
# The loop


@dataclass(frozen=True)
class History:
    """Metrics by step, on the host: {"loss": [(step, value), ...]}; `plot_curves` takes them."""

    metrics: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def append(self, step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            self.metrics.setdefault(name, []).append((step, float(value)))


def fit(
    step: Step,
    state: TrainState,
    batches: Iterable[Any],
    *,
    key: Array | None = None,
    switches: Switches | None = None,
    total: int | None = None,
    report_every: int = 20,
    on_report: Callable[[TrainState, dict[str, float]], None] | None = None,
) -> tuple[TrainState, History]:
    """Runs a step over batches: `for batch in batches: state, metrics = step(state, batch, key)`, and reports.

    Nothing is kept between calls: to go on, call it again with the state and the rest of the batches. The key of a step
    is `fold_in(key, state.step)`, so a run that is resumed draws what an uninterrupted one would have drawn.

    Args:
      step: of `make_step`, or any of that form.
      state: where to begin.
      batches: any iterable, such as a DataLoader of torch: tensors of the CPU become arrays.
      key: for dropout; None leaves it inactive.
      switches: of fake-quant and observers (`jq.training.switches`), if the step takes them.
      total: steps in all, for the progress line; the length of `batches` where it has one.
      report_every: steps between reports. Only then does the loop wait for the device.
      on_report: `(state, metrics) -> None`, with "images/s" among the metrics: to save a checkpoint, for example. It
        must not keep the state, whose memory the next step may take.

    Returns:
      The last state, and the history of all reports. Progress goes to stderr, if that is a terminal.
    """
    history, count, seen, start = History(), 0, 0, time.perf_counter()
    total = len(batches) if total is None and isinstance(batches, Sized) else total
    metrics: dict[str, Any] = {}
    for given in batches:
        batch = jax.tree.map(lambda x: host_array(x, "a batch"), given)
        own = None if key is None else jax.random.fold_in(key, state.step)
        state, metrics = step(state, batch, own) if switches is None else step(state, batch, own, switches)
        count, seen = count + 1, seen + jax.tree.leaves(batch)[0].shape[0]
        if count % report_every == 0:
            start, seen = _report(state, metrics, seen, start, history, total, on_report), 0
    if count % report_every:
        _report(state, metrics, seen, start, history, total, on_report)
    if count and sys.stderr.isatty():
        print(file=sys.stderr)
    return state, history


def _report(
    state: TrainState,
    metrics: Mapping[str, Array],
    seen: int,
    start: float,
    history: History,
    total: int | None,
    on_report: Callable[[TrainState, dict[str, float]], None] | None,
) -> float:
    """Waits for the device, records, shows; returns the time from which the next images count."""
    found = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
    found["images/s"] = seen / max(time.perf_counter() - start, 1e-9)
    at = int(state.step)
    history.append(at, found)
    if sys.stderr.isatty():
        shown = "  ".join(f"{name} {value:.4g}" for name, value in found.items())
        print(f"\rstep {at}{f'/{total}' if total else ''}  {shown}   ", end="", file=sys.stderr, flush=True)
    if on_report is not None:
        on_report(state, found)
    return time.perf_counter()
