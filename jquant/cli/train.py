"""`train`: quantization-aware training of a classifier from a recipe file."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

from jquant.apply import apply
from jquant.cli.console import Console, Json, Quiet, UsageError, Verbose, command
from jquant.cli.data import Data, load_data
from jquant.cli.models import Config, DataOption, Model, Output, load_state_of
from jquant.cli.settings import TrainSettings
from jquant.cli.state import save_state
from jquant.progress import track
from jquant.qat import Trainable, TrainState, apply_train, labels
from jquant.types import Array, CalibrationError, InputError, Plan


@command
def train(
    model: Model,
    data: DataOption,
    output: Output,
    config: Config = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's.")] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train a calibrated classifier with its quantizers on (QAT), by the [train] table of the TOML file.

    Labels are class numbers. The state that is written has the trained parameters and scales; interrupted, none is.

    \b
    jquant train net.jqs --config q.toml --data train.npz -o trained.jqs
    """
    console = Console(json, quiet, verbose)
    state, settings = load_state_of(model, config)
    plan, params, qparams = state.calibrated()
    loaded = load_data(data, state.graph, settings.image)
    if not loaded.labelled:
        raise UsageError("training needs labels: class folders, or an array 'y'")
    if len(plan.graph.outputs) != 1:
        raise UsageError(f"jquant train is for one output of class scores; this model has {len(plan.graph.outputs)}")
    recipe = settings.train if epochs is None else replace(settings.train, epochs=epochs)
    before = _loss_and_accuracy(plan, params, qparams, loaded, recipe.batch)
    trained = _train(console, plan, params, qparams, loaded, recipe)
    after = _loss_and_accuracy(plan, trained.params, trained.qparams, loaded, recipe.batch)
    save_state(output, replace(state, trained=trained.params, qparams=trained.qparams))
    rows = [{"": name, "loss": loss, "top-1 %": top} for name, (loss, top) in (("before", before), ("after", after))]
    console.rows(rows)
    console.wrote(output)
    console.value({"output": output, "before": before, "after": after, "steps": int(trained.step)})


def _train(console: Console, plan: Plan, params: dict, qparams: dict, data: Data, recipe: TrainSettings) -> TrainState:
    steps = recipe.epochs * max(
        1, math.ceil((data.count or sum(len(x[0]) for x, _ in data.batches(256))) / recipe.batch)
    )
    state = TrainState.create(plan, params, qparams, tx=optimizer(plan, recipe, steps))
    step = jax.jit(partial(_step, plan, recipe.mode))
    for epoch in range(recipe.epochs):
        total, count = 0.0, 0
        batches = _shuffled(data, recipe, epoch)
        for inputs, wanted in track(batches, f"epoch {epoch + 1} of {recipe.epochs}", steps // recipe.epochs):
            state, loss = step(state, tuple(jnp.asarray(x) for x in inputs), jnp.asarray(wanted, jnp.int32))
            total, count = total + float(loss) * len(wanted), count + len(wanted)
            if not math.isfinite(total):
                raise CalibrationError(
                    f"the loss is {float(loss)} in epoch {epoch + 1}: lower learning_rate, or set clip = 1.0 in [train]"
                )
        console.note(f"epoch {epoch + 1}: loss {total / max(count, 1):.4g}")
    return state


def optimizer(plan: Plan, recipe: TrainSettings, steps: int) -> Any:
    """The optax chain of a recipe: scales have a rate of their own and no weight decay."""
    import optax

    def schedule(rate: float) -> Any:
        if recipe.schedule == "cosine":
            return optax.cosine_decay_schedule(rate, steps)
        return (
            rate
            if recipe.schedule == "constant"
            else optax.piecewise_constant_schedule(rate, {steps // 2: 0.1, steps * 3 // 4: 0.1})
        )

    clip = [optax.clip_by_global_norm(recipe.clip)] if recipe.clip else []
    decay = [optax.add_decayed_weights(recipe.weight_decay)] if recipe.weight_decay else []
    make: Callable[[float], Any] = (
        (lambda rate: optax.sgd(schedule(rate), momentum=recipe.momentum))
        if recipe.optimizer == "sgd"
        else (lambda rate: optax.adam(schedule(rate)))
    )
    chains = {
        "weight": optax.chain(*decay, make(recipe.learning_rate)),
        "scale": optax.adam(schedule(recipe.scale_learning_rate)),
    }
    kinds = {kind for part in vars(labels(plan)).values() for kind in part.values()}
    return optax.chain(*clip, optax.multi_transform({k: chains.get(k, chains["weight"]) for k in kinds}, labels(plan)))


def _step(
    plan: Plan, mode: Any, state: TrainState, inputs: tuple[Array, ...], wanted: Array
) -> tuple[TrainState, Array]:
    def loss(trainable: Trainable) -> Array:
        logits, _ = apply_train(plan, trainable.params, trainable.qparams, *inputs, mode=mode)
        return cross_entropy(logits, wanted)

    value, gradient = jax.value_and_grad(loss)(state.trainable)
    return state.update(gradient), value


def cross_entropy(logits: Array, wanted: Array) -> Array:
    """Mean over samples, nats. `logits` [N, classes], `wanted` [N] class numbers."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), wanted[:, None], axis=1)
    return -chosen.mean()


def _shuffled(data: Data, recipe: TrainSettings, epoch: int) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]:
    """Batches in another order every epoch; samples are shuffled within a window of 32 batches."""
    rng = np.random.default_rng([recipe.seed, epoch])
    for inputs, wanted in data.batches(32 * recipe.batch):
        assert wanted is not None
        if wanted.ndim != 1 or wanted.dtype.kind not in "iu":
            raise InputError(
                f"labels are {wanted.dtype}{list(wanted.shape)}; training takes class numbers, one a sample"
            )
        order = rng.permutation(len(wanted))
        for i in range(0, len(order), recipe.batch):
            part = order[i : i + recipe.batch]
            yield tuple(x[part] for x in inputs), wanted[part]


def _loss_and_accuracy(plan: Plan, params: dict, qparams: dict, data: Data, batch: int) -> tuple[float, float]:
    loss, right, count = 0.0, 0, 0
    for inputs, wanted in data.batches(batch):
        assert wanted is not None
        logits = apply(plan, params, qparams, *(jnp.asarray(x) for x in inputs))
        loss += float(cross_entropy(logits, jnp.asarray(wanted, jnp.int32))) * len(wanted)
        right += int(np.sum(np.asarray(logits).argmax(-1) == wanted))
        count += len(wanted)
    return loss / count, 100 * right / count
