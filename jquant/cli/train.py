"""`train`: quantization-aware training from a recipe file, on `jquant.training`."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jax.sharding import Mesh

from jquant.cli.arguments import check_file, check_folder, check_picture, check_space
from jquant.cli.console import Console, Json, Quiet, UsageError, Verbose, command
from jquant.cli.data import Data, check_data, load_data
from jquant.cli.losses import Loss, check_labels, loss_of
from jquant.cli.models import Config, DataOption, Devices, ModelPath, Output, load_state_of, mesh_of, used_on
from jquant.cli.settings import TrainSettings
from jquant.cli.state import save_state
from jquant.host.progress import PATIENCE, stages, track
from jquant.host.termination import TERMINATED, noting_termination
from jquant.meanings.apply import apply
from jquant.meanings.meaning import Mode
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
from jquant.training.checkpoint import Checkpoints
from jquant.training.state import TrainState
from jquant.training.switching import Switches, check_switches, switches
from jquant.types import Array, InputError, JQuantError, Model

Batch = tuple[tuple[Array, ...], Array]  # inputs, labels
MOMENTS = 4  # times the parameters: a checkpoint with an optimizer's moments, and one more that is being written
DIVERGED = 1.5  # times the loss before training and 0.1; an epoch on the way may go further up
WINDOW = 32  # batches that are shuffled together, of data that have no end to see
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
    checkpoint_every: Annotated[
        int | None, typer.Option(min=1, help="Also write to --checkpoints after this many steps of an epoch.")
    ] = None,
    devices: Devices = None,
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
    step 1000 on, [0, 500] before step 500, false never. With --checkpoints, SIGTERM ends training after the step that
    runs, with a checkpoint of it (exit code 143), and the same command goes on behind it.

    \b
    jquant train net.jqs --config q.toml --data train.npz -o trained.jqs
    jquant train net.jqs -c q.toml -d train.npz -o trained.jqs \\
      --checkpoints run --curves run.png
    """
    console, mesh = Console(json, quiet, verbose), mesh_of(devices)
    check_data(data)
    check_file(output)
    check_picture(curves, "--curves")
    check_folder(checkpoints, "--checkpoints")
    if checkpoint_every is not None and checkpoints is None:
        raise UsageError("--checkpoint-every needs --checkpoints")
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
    if mesh is not None and recipe.batch % mesh.size:
        raise UsageError(f"train.batch is {recipe.batch}; with --devices {mesh.size} it must be a multiple")
    run = Run(calibrated, loaded, recipe, loss_of(recipe.loss, recipe.ignore_label), switched, mesh)
    before, in_float = run.measure(calibrated, ("fake_quant", "float"))
    _alarm(console, before["loss"], in_float["loss"])
    best = Best(before["loss"])
    try:
        trained, history = run.train(console, checkpoints, best, checkpoint_every)
        (after,) = run.measure(trained.model, ("fake_quant",))
        run.check(after["loss"], best)
    except TrainingError as error:
        raise TrainingError(f"{error}. {_kept(best, state, output)}") from error
    except StoppedError as stopped:
        console.warn(str(stopped))
        raise typer.Exit(TERMINATED) from None
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


class StoppedError(JQuantError):
    """Training was asked to stop, and what it had reached is on disk."""


@dataclass(frozen=True)
class Saves:
    """When a checkpoint is written: after an epoch, every so many steps of it, and where the process is to end."""

    kept: Checkpoints
    every: int | None
    is_asked: Callable[[], bool]

    def after_step(self, state: TrainState, epoch: int, batch: int) -> None:
        """Of the steps of an epoch, counted from 1.

        Raises:
          StoppedError: SIGTERM came.
        """
        stops = self.is_asked()
        if stops or (self.every is not None and batch % self.every == 0):
            self.kept.save(state, position={"epoch": epoch, "batch": batch}, wait=stops)
        if stops:
            raise StoppedError(
                f"stopped by SIGTERM after step {int(state.step)}, which is in {self.kept.directory}; the same command "
                "goes on behind it"
            )

    def after_epoch(self, state: TrainState, epoch: int) -> None:
        self.kept.save(state, position={"epoch": epoch + 1, "batch": 0}, wait=False)


@dataclass(frozen=True)
class Run:
    """What a training is made of, before it has a state."""

    model: Model
    data: Data
    recipe: TrainSettings
    loss: Loss
    switches: Switches | None = None
    mesh: Mesh | None = None

    def train(
        self, console: Console, folder: Path | None, best: Best, every: int | None = None
    ) -> tuple[TrainState, History]:
        """The trained state, and the metrics of the steps that were looked at.

        Raises:
          TrainingError: a loss that is not finite, or far above that before training.
          StoppedError: SIGTERM came, and a checkpoint was written.
        """
        with stages("preparing", ("the optimizer",)) as begin:
            begin("the optimizer")
            step = self._make_step()
            state, epoch, behind, history = TrainState.create(self.model, tx=self._optimizer()), 0, 0, History()
        with nullcontext() if folder is None else closing(open_checkpoints(folder, self.model)) as kept:
            if kept is None:
                for epoch in range(self.recipe.epochs):
                    state = self._epoch(console, step, state, epoch, history, best)
                return state, history
            if (found := kept.restore(state)) is not None:
                state, epoch, behind = found.state, found.position["epoch"], found.position.get("batch", 0)
                where = f"batch {behind} of epoch {epoch + 1}" if behind else f"epoch {epoch}"
                console.note(f"going on after {where}, from {folder}")
            with noting_termination() as is_asked:
                saves = Saves(kept, every, is_asked)
                for number in range(epoch, self.recipe.epochs):
                    state = self._epoch(console, step, state, number, history, best, saves, behind)
                    behind = 0
                    saves.after_epoch(state, number)
        return state, history

    def _make_step(self) -> Callable[..., Any]:
        """`step(state, batch) -> (state, metrics)`."""
        slices = 1 if self.mesh is None else self.mesh.size
        options: dict[str, Any] = {"inputs": _inputs_of, "mode": self.recipe.mode, "donate": False}
        step = make_step(self._objective, slices=slices, mesh=self.mesh, **options)
        return step if self.switches is None else partial(step, switches=self.switches)

    def _epoch(
        self,
        console: Console,
        step: Callable[..., Any],
        start: TrainState,
        epoch: int,
        history: History,
        best: Best,
        saves: Saves | None = None,
        behind: int = 0,
    ) -> TrainState:
        """The batches of an epoch that come after `behind` others."""
        state, metrics, seen, clock = start, {}, 0, time.perf_counter()
        totals: dict[str, Any] = {}
        name = f"epoch {epoch + 1} of {self.recipe.epochs}"
        batches = track(self._batches(epoch, behind), name, max(self._steps - behind, 0))
        for count, batch in enumerate(batches, behind + 1):
            state, metrics = step(state, batch)
            if saves is not None:
                saves.after_step(state, epoch, count)
            seen += len(batch[1])
            totals = {name: totals.get(name, 0.0) + value * len(batch[1]) for name, value in metrics.items()}
            if count % LOOK_EVERY == 0:
                self._look(start, (epoch, behind), state, metrics, history)
        if seen:
            self._look(start, (epoch, behind), state, metrics, history)
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

    def _look(
        self, start: TrainState, place: tuple[int, int], state: TrainState, metrics: Any, history: History
    ) -> None:
        """Records the metrics of the last step; `start` stood at a batch of an epoch.

        Raises:
          TrainingError: a loss that is not finite, with the node where that began.
        """
        found = {name: float(value) for name, value in metrics.items()}
        if not math.isfinite(found["loss"]):
            raise TrainingError(f"the loss is {found['loss']} in epoch {place[0] + 1}{self._cause(start, *place)}")
        if not history.metrics or history.metrics["loss"][-1][0] != int(state.step):
            history.append(int(state.step), found)

    def _cause(self, start: TrainState, epoch: int, behind: int) -> str:
        """These steps once more, one by one, to the first value that is not finite."""
        step = self._make_step()

        def with_loss(state: TrainState, batch: Batch) -> tuple[TrainState, Array]:
            state, metrics = step(state, batch)
            return state, metrics["loss"]

        found = find_first_nan(
            with_loss,
            start,
            self._batches(epoch, behind),
            loss=lambda outputs, batch: self._objective(outputs, batch)[0],
            inputs=_inputs_of,
            mode=self.recipe.mode,
        )
        where = "" if found is None else f": {found}"
        return f"{where}. Lower learning_rate, or set clip = 1.0 in [train]"

    def measure(self, model: Model, modes: Sequence[Mode]) -> list[dict[str, float]]:
        """Of each mode the loss and metrics over all data, a mean over samples. The data are read once."""
        totals: list[dict[str, float]] = [{} for _ in modes]
        samples = 0
        batches = self._checked(self.data.batches(self.recipe.batch))
        shown = f"loss of {' and '.join(modes)}"
        for inputs, labels in track(batches, shown, self.data.steps(self.recipe.batch), after=PATIENCE):
            arrays, wanted = [jnp.asarray(x) for x in inputs], _as_labels(labels)
            for mode, total in zip(modes, totals, strict=True):
                outputs = apply(model, *arrays, mode=mode)
                if samples == 0:
                    check_labels(self.recipe.loss, labels, outputs, self.recipe.ignore_label)
                loss, metrics = self._measured(outputs, wanted)
                for name, value in {"loss": loss, **metrics}.items():
                    total[name] = total.get(name, 0.0) + float(value) * len(labels)
            samples += len(labels)
        return [{name: value / samples for name, value in total.items()} for total in totals]

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
        """Of an epoch. Where only reading tells, all data are read once for it."""
        count = self.data.count
        if count is None:
            count = sum(len(x[0]) for x, _ in track(self.data.batches(256), "counting samples", after=PATIENCE))
        return max(1, count // self.recipe.batch if self.mesh is not None else math.ceil(count / self.recipe.batch))

    def _batches(self, epoch: int, behind: int = 0) -> Iterator[Batch]:
        """The batches of an epoch without the first ones, in another order every epoch.

        All samples are shuffled. Of data that are read from the front only, they are so within a window of 32 batches.
        On several devices a smaller batch at the end is left out: it cannot be spread evenly.
        """
        size = self.recipe.batch
        for inputs, labels in self._shuffled(epoch, behind):
            if self.mesh is None or len(labels) == size:
                yield tuple(map(jnp.asarray, inputs)), _as_labels(labels)

    def _shuffled(self, epoch: int, behind: int) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]:
        rng, size = np.random.default_rng([self.recipe.seed, epoch]), self.recipe.batch
        if self.data.take is not None and self.data.count is not None:
            order = rng.permutation(self.data.count)[behind * size :]
            yield from self._checked(self.data.take(order, size))
            return
        for inputs, labels in self._checked(self.data.read(WINDOW * size)):
            order = rng.permutation(len(labels))
            for i in range(0, len(order), size):
                part = order[i : i + size]
                if behind > 0:
                    behind -= 1
                    continue
                yield tuple(x[part] for x in inputs), labels[part]

    def _checked(self, batches: Any) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]:
        for inputs, labels in batches:
            if labels is None:
                raise InputError("a batch has no labels; training needs them with every batch")
            yield inputs, labels


def _inputs_of(batch: Batch) -> tuple[Array, ...]:
    return batch[0]


def _as_labels(labels: np.ndarray) -> Array:
    return jnp.asarray(labels, jnp.int32 if labels.dtype.kind in "iub" else jnp.float32)
