"""`train`: quantization-aware training from a recipe file, on `jquant.training`."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

from jquant.cli.arguments import check_file, check_folder, check_picture, check_space
from jquant.cli.console import Console, Json, Quiet, UsageError, Verbose, command
from jquant.cli.data import Data, check_data, load_data
from jquant.cli.losses import Loss, check_labels, loss_of
from jquant.cli.models import Config, DataOption, ModelPath, Output, load_state_of, used_on
from jquant.cli.settings import TrainSettings
from jquant.cli.state import save_state
from jquant.host.progress import PATIENCE, stages, track
from jquant.meanings.apply import apply
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
from jquant.training.state import TrainState
from jquant.training.switching import Switches, check_switches, switches
from jquant.types import Array, InputError, Model

Batch = tuple[tuple[Array, ...], Array]  # inputs, labels
MOMENTS = 4  # times the parameters: a checkpoint with an optimizer's moments, and one more that is being written
DIVERGED = 1.5  # times the loss before training and 0.1; an epoch on the way may go further up
LOOK_EVERY = 20  # steps between looks at the loss, which wait for the device


@command
def train(
    model: ModelPath,
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
    parameters and scales; interrupted, none is. Each epoch prints its mean loss. Training that diverges is an error;
    the state of its best epoch is written, if one was better than the calibrated model. Tables [train.values],
    [train.weights] and [train.observers] say by pattern in which steps fake-quant and observers are on: "*" = 1000 from
    step 1000 on, [0, 500] before step 500, false never.

    \b
    jquant train net.jqs --config q.toml --data train.npz -o trained.jqs
    jquant train net.jqs -c q.toml -d train.npz -o trained.jqs --checkpoints run --curves run.png
    """
    console = Console(json, quiet, verbose)
    check_data(data)
    check_file(output)
    check_picture(curves, "--curves")
    check_folder(checkpoints, "--checkpoints")
    state, settings = load_state_of(model, config)
    calibrated = state.calibrated()
    size = sum(array.nbytes for array in (*state.params.values(), *calibrated.params.values()))
    check_space(output, "--output", size)
    check_space(checkpoints, "--checkpoints", MOMENTS * size)
    loaded = load_data(data, state.graph, settings.image)
    if not loaded.labelled:
        raise UsageError("training needs labels: class folders, or an array 'y'")
    recipe = settings.train if epochs is None else replace(settings.train, epochs=epochs)
    switched = _switches_of(calibrated, recipe)
    run = Run(calibrated, loaded, recipe, loss_of(recipe.loss, recipe.ignore_label), switched)
    before, in_float = run.measure(calibrated), run.measure(calibrated, mode="float")
    _alarm(console, before["loss"], in_float["loss"])
    best = Best(before["loss"])
    try:
        trained, history = run.train(console, checkpoints, best)
        after = run.measure(trained.model)
        run.check(after["loss"], best)
    except TrainingError as error:
        raise TrainingError(f"{error}. {_kept(best, state, output)}") from error
    save_state(output, used_on(state, settings, data).with_model(trained.model, trained=True))
    if run.switches is not None and (off := _not_quantized(run.switches, int(trained.step) - 1)):
        console.warn(
            f"in the last step {_few(off)} were not quantized: their error was not trained away, and the integers have "
            "it. Switch them on earlier, in [train.values] and [train.weights]"
        )
    console.rows([{"": name, **found} for name, found in (("float", in_float), ("before", before), ("after", after))])
    if curves is not None and history.metrics:
        plot_curves(curves, {name: {"QAT": points} for name, points in history.metrics.items()})
        console.wrote(curves)
    console.wrote(output)
    console.next("quantize", output, "-o", output.with_suffix(".jq"))
    console.value({"output": output, "float": in_float, "before": before, "after": after, "steps": int(trained.step)})


def _switches_of(model: Model, recipe: TrainSettings) -> Switches | None:
    """What the recipe switches, or None where it switches nothing.

    Raises:
      QConfigError: a pattern that matches nothing; or another mode than "fake_quant".
    """
    if not recipe.switched:
        return None
    asked = {"values": recipe.values, "weights": recipe.weights, "observers": recipe.observers}
    found = switches(model, **asked, averaging=recipe.averaging)
    check_switches(model.plan, found, recipe.mode)
    return found


def _not_quantized(given: Switches, step: int) -> list[str]:
    """The values and weights that are not quantized in a step."""
    times = {name: np.asarray(time) for name, time in given.fake_quant.items()}
    return [name for name, time in times.items() if not time[0] <= step < time[1]]


def _few(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more}"


@dataclass
class Best:
    """The state with the lowest mean loss of an epoch, and the loss before training."""

    start: float
    loss: float = math.inf
    epoch: int = 0
    state: TrainState | None = None

    def look(self, epoch: int, loss: float, state: TrainState) -> None:
        if loss < min(self.loss, self.start):
            self.loss, self.epoch, self.state = loss, epoch, state


def _kept(best: Best, state: Any, output: Path) -> str:
    """Writes the best state of a run that diverged, and says so."""
    if best.state is None:
        return f"No epoch was better than the calibrated model, so {output} was not written"
    save_state(output, state.with_model(best.state.model, trained=True))
    return f"{output} has the state of epoch {best.epoch}, whose mean loss was {best.loss:.4g}"


def _alarm(console: Console, loss: float, float_loss: float) -> None:
    """A note where training would start far from the float model; calibration is then to be looked at first."""
    try:
        check_initial_loss(loss, float_loss=float_loss)
    except TrainingError as error:
        console.warn(str(error))


@dataclass(frozen=True)
class Run:
    """What a training is made of, before it has a state."""

    model: Model
    data: Data
    recipe: TrainSettings
    loss: Loss
    switches: Switches | None = None

    def train(self, console: Console, folder: Path | None, best: Best) -> tuple[TrainState, History]:
        """The trained state, and the metrics of the steps that were looked at.

        Raises:
          TrainingError: a loss that is not finite, or far above that before training.
        """
        with stages("preparing", ("the optimizer",)) as begin:
            begin("the optimizer")
            step = self._make_step()
            state, first, history = TrainState.create(self.model, tx=self._optimizer()), 0, History()
        with nullcontext() if folder is None else closing(open_checkpoints(folder, self.model)) as kept:
            if kept is not None and (found := kept.restore(state)) is not None:
                state, first = found.state, int(found.position["epoch"])
                console.note(f"going on after epoch {first}, from {folder}")
            for epoch in range(first, self.recipe.epochs):
                state = self._epoch(console, step, state, epoch, history, best)
                if kept is not None:
                    kept.save(state, position={"epoch": epoch + 1})
        return state, history

    def _make_step(self) -> Callable[..., Any]:
        """`step(state, batch) -> (state, metrics)`."""
        step = make_step(self._objective, inputs=_inputs_of, mode=self.recipe.mode, donate=False)
        return step if self.switches is None else partial(step, switches=self.switches)

    def _epoch(
        self, console: Console, step: Callable[..., Any], start: TrainState, epoch: int, history: History, best: Best
    ) -> TrainState:
        state, metrics, seen, clock = start, {}, 0, time.perf_counter()
        totals: dict[str, Any] = {}
        name = f"epoch {epoch + 1} of {self.recipe.epochs}"
        for count, batch in enumerate(track(self._batches(epoch), name, self._steps), 1):
            state, metrics = step(state, batch)
            seen += len(batch[1])
            totals = {name: totals.get(name, 0.0) + value * len(batch[1]) for name, value in metrics.items()}
            if count % LOOK_EVERY == 0:
                self._look(start, epoch, state, metrics, history)
        if seen:
            self._look(start, epoch, state, metrics, history)
            means = {key: float(total) / seen for key, total in totals.items()}
            words = ", ".join(f"{key} {value:.4g}" for key, value in means.items())
            console.progress(f"epoch {epoch + 1}: {words}, {seen / (time.perf_counter() - clock):.0f} samples a second")
            if self.switches is None or not _not_quantized(self.switches, int(start.step)):
                best.look(epoch + 1, means["loss"], state)
            self.check(means["loss"], best, factor=10.0, where=f"in {name} ")
        return state

    def check(self, loss: float, best: Best, *, factor: float = DIVERGED, where: str = "after training ") -> None:
        """Raises TrainingError for a loss that is far above the one before training: it diverged."""
        limit = factor * (abs(best.start) + 0.1)
        if not loss <= limit:
            raise TrainingError(
                f"training diverged: the loss {where}is {loss:.4g}, and was {best.start:.4g} before. The learning rate "
                f"{self.recipe.learning_rate:g} may be too high for QAT: take 1/10 to 1/20 of the float one, set clip "
                "= 1.0, and take SGD with steps instead of OneCycle or warm-up (jq.analysis.nan_checklist)"
            )

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
        step = self._make_step()

        def with_loss(state: TrainState, batch: Batch) -> tuple[TrainState, Array]:
            state, metrics = step(state, batch)
            return state, metrics["loss"]

        found = find_first_nan(
            with_loss,
            start,
            self._batches(epoch),
            loss=lambda outputs, batch: self._objective(outputs, batch)[0],
            inputs=_inputs_of,
            mode=self.recipe.mode,
        )
        where = "" if found is None else f": {found}"
        return f"{where}. Lower learning_rate, or set clip = 1.0 in [train]"

    def measure(self, model: Model, mode: Any = "fake_quant") -> dict[str, float]:
        """The loss and metrics over all data, a mean over samples."""
        totals: dict[str, float] = {}
        count = 0
        batches = self._checked(self.data.batches(self.recipe.batch))
        for inputs, labels in track(batches, f"loss of {mode}", self.data.steps(self.recipe.batch), after=PATIENCE):
            outputs = apply(model, *map(jnp.asarray, inputs), mode=mode)
            if count == 0:
                check_labels(self.recipe.loss, labels, outputs, self.recipe.ignore_label)
            loss, metrics = self._measured(outputs, _as_labels(labels))
            for name, value in {"loss": loss, **metrics}.items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(labels)
            count += len(labels)
        return {name: total / count for name, total in totals.items()}

    @cached_property
    def _measured(self) -> Loss:
        """The loss, compiled as one program and not operation by operation; in a step it is compiled as well."""
        return jax.jit(self.loss)

    def _objective(self, outputs: Any, batch: Batch) -> tuple[Array, dict[str, Array]]:
        return self.loss(outputs, batch[1])

    def _optimizer(self) -> Any:
        recipe, steps = self.recipe, self.recipe.epochs * self._steps

        def schedule(rate: float) -> Any:
            match recipe.schedule:
                case "cosine":
                    return cosine_decay(rate, steps=steps)
                case "step":
                    return step_decay(rate, steps=steps)
            return rate

        return make_optimizer(
            self.model,
            optimizer=recipe.optimizer,
            learning_rate=schedule(recipe.learning_rate),
            scale_rate=schedule(recipe.scale_learning_rate),
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
            clip=recipe.clip or None,
        )

    @cached_property
    def _steps(self) -> int:
        """Of an epoch."""
        count = self.data.count
        if count is None:
            count = sum(len(x[0]) for x, _ in track(self.data.batches(256), "counting samples", after=PATIENCE))
        return max(1, math.ceil(count / self.recipe.batch))

    def _batches(self, epoch: int) -> Iterator[Batch]:
        """In another order every epoch; samples are shuffled within a window of 32 batches."""
        rng, size = np.random.default_rng([self.recipe.seed, epoch]), self.recipe.batch
        for inputs, labels in self._checked(self.data.read(32 * size)):
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
