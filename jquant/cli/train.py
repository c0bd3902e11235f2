"""`train`: quantization-aware training from a recipe file, on `jquant.training`."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import typer

from jquant.apply import apply
from jquant.cli.console import Console, Json, Quiet, UsageError, Verbose, command
from jquant.cli.data import Data, load_data
from jquant.cli.losses import Loss, check_labels, loss_of
from jquant.cli.models import Config, DataOption, Model, Output, load_state_of
from jquant.cli.settings import TrainSettings
from jquant.cli.state import save_state
from jquant.progress import track
from jquant.qat import TrainState
from jquant.training import (
    History,
    TrainingError,
    check_initial_loss,
    cosine_decay,
    find_first_nan,
    make_optimizer,
    make_step,
    open_checkpoints,
    plot_curves,
    step_decay,
)
from jquant.types import Array, InputError, Plan

Batch = tuple[tuple[Array, ...], Array]  # inputs, labels
LOOK_EVERY = 20  # steps between looks at the loss, which wait for the device


@command
def train(
    model: Model,
    data: DataOption,
    output: Output,
    config: Config = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's.")] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(help="A folder that is written to after every epoch; training goes on from what is in it."),
    ] = None,
    curves: Annotated[Path | None, typer.Option(help="A picture of the loss and metrics: PNG, SVG or PDF.")] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train a calibrated model with its quantizers on (QAT), by the [train] table of the TOML file.

    Labels are class numbers for the loss "cross_entropy", one a sample or one a pixel; arrays of the output's shape for
    "mse" and "l1"; anything for a loss of your own, module:function. The state that is written has the trained
    parameters and scales; interrupted, none is.

    \b
    jquant train net.jqs --config q.toml --data train.npz -o trained.jqs
    jquant train net.jqs -c q.toml -d train.npz -o trained.jqs --checkpoints run --curves run.png
    """
    console = Console(json, quiet, verbose)
    state, settings = load_state_of(model, config)
    plan, params, qparams = state.calibrated()
    loaded = load_data(data, state.graph, settings.image)
    if not loaded.labelled:
        raise UsageError("training needs labels: class folders, or an array 'y'")
    recipe = settings.train if epochs is None else replace(settings.train, epochs=epochs)
    run = Run(plan, loaded, recipe, loss_of(recipe.loss, recipe.ignore_label))
    before, in_float = run.measure(params, qparams), run.measure(params, qparams, mode="float")
    _alarm(console, before["loss"], in_float["loss"])
    trained, history = run.train(console, params, qparams, checkpoints)
    after = run.measure(trained.params, trained.qparams)
    save_state(output, replace(state, trained=trained.params, qparams=trained.qparams))
    console.rows([{"": name, **found} for name, found in (("float", in_float), ("before", before), ("after", after))])
    if curves is not None and history.metrics:
        plot_curves(curves, {name: {"QAT": points} for name, points in history.metrics.items()})
        console.wrote(curves)
    console.wrote(output)
    console.value({"output": output, "float": in_float, "before": before, "after": after, "steps": int(trained.step)})


def _alarm(console: Console, loss: float, float_loss: float) -> None:
    """A note where training would start far from the float model; calibration is then to be looked at first."""
    try:
        check_initial_loss(loss, float_loss=float_loss)
    except TrainingError as error:
        console.warn(str(error))


@dataclass(frozen=True)
class Run:
    """What a training is made of, before it has a state."""

    plan: Plan
    data: Data
    recipe: TrainSettings
    loss: Loss

    def train(self, console: Console, params: dict, qparams: dict, folder: Path | None) -> tuple[TrainState, History]:
        """The trained state, and the metrics of the steps that were looked at."""
        step = make_step(self.plan, self._objective, inputs=_inputs_of, mode=self.recipe.mode, donate=False)
        state, first, history = TrainState.create(self.plan, params, qparams, tx=self._optimizer()), 0, History()
        with nullcontext() if folder is None else closing(open_checkpoints(folder, self.plan)) as kept:
            if kept is not None and (found := kept.restore(state)) is not None:
                state, first = found.state, int(found.position["epoch"])
                console.note(f"going on after epoch {first}, from {folder}")
            for epoch in range(first, self.recipe.epochs):
                state = self._epoch(console, step, state, epoch, history)
                if kept is not None:
                    kept.save(state, position={"epoch": epoch + 1})
        return state, history

    def _epoch(
        self, console: Console, step: Callable[..., Any], start: TrainState, epoch: int, history: History
    ) -> TrainState:
        state, metrics, seen, clock = start, {}, 0, time.perf_counter()
        name = f"epoch {epoch + 1} of {self.recipe.epochs}"
        for count, batch in enumerate(track(self._batches(epoch), name, self._steps()), 1):
            state, metrics = step(state, batch)
            seen += len(batch[1])
            if count % LOOK_EVERY == 0:
                self._look(start, epoch, state, metrics, history)
        if seen:
            self._look(start, epoch, state, metrics, history)
            words = ", ".join(f"{key} {float(value):.4g}" for key, value in metrics.items())
            console.note(f"epoch {epoch + 1}: {words}, {seen / (time.perf_counter() - clock):.0f} samples a second")
        return state

    def _look(self, start: TrainState, epoch: int, state: TrainState, metrics: Any, history: History) -> None:
        """Records the metrics of the last step.

        Raises:
          TrainingError: a loss that is not finite, with the node where that began.
        """
        found = {name: float(value) for name, value in metrics.items()}
        if not math.isfinite(found["loss"]):
            raise TrainingError(f"the loss is {found['loss']} in epoch {epoch + 1}{self._cause(start, epoch)}")
        if not history.metrics or history.metrics["loss"][-1][0] != int(state.step):
            history.append(int(state.step), found)

    def _cause(self, start: TrainState, epoch: int) -> str:
        """The epoch once more, step by step, to the first value that is not finite."""
        step = make_step(self.plan, self._objective, inputs=_inputs_of, mode=self.recipe.mode, donate=False)

        def with_loss(state: TrainState, batch: Batch) -> tuple[TrainState, Array]:
            state, metrics = step(state, batch)
            return state, metrics["loss"]

        found = find_first_nan(
            self.plan,
            with_loss,
            start,
            self._batches(epoch),
            loss=lambda outputs, batch: self._objective(outputs, batch)[0],
            inputs=_inputs_of,
            mode=self.recipe.mode,
        )
        where = "" if found is None else f": {found}"
        return f"{where}. Lower learning_rate, or set clip = 1.0 in [train]"

    def measure(self, params: dict, qparams: dict, mode: Any = "validation") -> dict[str, float]:
        """The loss and metrics over all data, a mean over samples."""
        totals: dict[str, float] = {}
        count = 0
        for inputs, labels in self._checked(self.data.batches(self.recipe.batch)):
            outputs = apply(self.plan, params, qparams, *map(jnp.asarray, inputs), mode=mode)
            if count == 0:
                check_labels(self.recipe.loss, labels, outputs, self.recipe.ignore_label)
            loss, metrics = self.loss(outputs, _as_labels(labels))
            for name, value in {"loss": loss, **metrics}.items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(labels)
            count += len(labels)
        return {name: total / count for name, total in totals.items()}

    def _objective(self, outputs: Any, batch: Batch) -> tuple[Array, dict[str, Array]]:
        return self.loss(outputs, batch[1])

    def _optimizer(self) -> Any:
        recipe, steps = self.recipe, self.recipe.epochs * self._steps()

        def schedule(rate: float) -> Any:
            match recipe.schedule:
                case "cosine":
                    return cosine_decay(rate, steps=steps)
                case "step":
                    return step_decay(rate, steps=steps)
            return rate

        return make_optimizer(
            self.plan,
            optimizer=recipe.optimizer,
            learning_rate=schedule(recipe.learning_rate),
            scale_rate=schedule(recipe.scale_learning_rate),
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
            clip=recipe.clip or None,
        )

    def _steps(self) -> int:
        """Of an epoch."""
        count = self.data.count or sum(len(x[0]) for x, _ in self.data.batches(256))
        return max(1, math.ceil(count / self.recipe.batch))

    def _batches(self, epoch: int) -> Iterator[Batch]:
        """In another order every epoch; samples are shuffled within a window of 32 batches."""
        rng, size = np.random.default_rng([self.recipe.seed, epoch]), self.recipe.batch
        for inputs, labels in self._checked(self.data.batches(32 * size)):
            order = rng.permutation(len(labels))
            for i in range(0, len(order), size):
                part = order[i : i + size]
                yield tuple(jnp.asarray(x[part]) for x in inputs), _as_labels(labels[part])

    def _checked(self, batches: Any) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]:
        for inputs, labels in batches:
            if labels is None:
                raise InputError("a batch has no labels; training needs them with every batch")
            yield inputs, labels


def _inputs_of(batch: Batch) -> tuple[Array, ...]:
    return batch[0]


def _as_labels(labels: np.ndarray) -> Array:
    return jnp.asarray(labels, jnp.int32 if labels.dtype.kind in "iub" else jnp.float32)
