"""Recipes: steps of post-training quantization in order, each kept only where it lowers the error of the outputs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from math import prod
from time import perf_counter
from typing import Any, Literal

import jax
import numpy as np

from jquant.calibration.batches import bound_batches
from jquant.calibration.collection import calibrate, collect
from jquant.calibration.observe import checked_finite, observed_values
from jquant.graph.axes import automatic_axes
from jquant.graph.float import value_types
from jquant.graph.memory import free_memory
from jquant.meanings.apply import apply
from jquant.meanings.meaning import Mode
from jquant.observers import mean_of_maxima, mse, percentile
from jquant.plan.batch_norm import check_folded
from jquant.plan.scales import observer_of
from jquant.ptq.bias import correct_bias
from jquant.ptq.equalization import equalize, find_pairs
from jquant.ptq.reconstruction import reconstruct_blocks
from jquant.ptq.rounding import adaround
from jquant.ptq.scales import search_weight_scales
from jquant.ptq.several import scales_by, watched_by
from jquant.ptq.shifting import find_shifts, shift_relus
from jquant.ptq.values import search_value_scales
from jquant.text import did_you_mean, format_table
from jquant.types import Array, CalibrationError, Model, Observer, Plan, QConfigError

RecipeName = Literal["default", "best", "fast"]
RECIPES = ("default", "best", "fast")
Batch = tuple[Array, ...]
_COPIES = 8  # of all values, that a gradient by every one of them has in memory at the most


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One step that a recipe tried: the signal-to-noise ratio of the outputs with it, dB, and whether it was kept."""

    step: str
    sqnr: float
    seconds: float
    kept: bool


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What a recipe found. `print` shows every step that was tried, in order.

    `model`      for `jq.apply` and `jq.lower`
    `trials`     the steps; `sqnr` is that of all kept up to there and this one
    `held_back`  samples that judged, and that no step has seen; `used` samples that the steps have seen
    """

    model: Model = field(repr=False)
    trials: tuple[Trial, ...]
    used: int
    held_back: int

    @property
    def sqnr(self) -> float:
        """Of the outputs on what was held back, dB."""
        return max(trial.sqnr for trial in self.trials if trial.kept)

    def __str__(self) -> str:
        rows = [(t.step, f"{t.sqnr:.2f}", "yes" if t.kept else "no", f"{t.seconds:.1f}") for t in self.trials]
        table = format_table(("step", "SQNR of outputs, dB", "kept", "seconds"), rows)
        return f"{table}\n{self.used} samples used, {self.held_back} held back to judge"


@dataclass
class _Search:
    """What is kept so far, and how to try more."""

    judge: Callable[[Model], float]
    model: Model
    best: float
    trials: list[Trial]

    def attempt(self, step: str, make: Callable[[], Model]) -> None:
        start = perf_counter()
        made = make()
        found = self.judge(made)
        better = found > self.best
        if better:
            self.model, self.best = made, found
        self.trials.append(Trial(step=step, sqnr=found, seconds=perf_counter() - start, kept=better))


@automatic_axes()
def recipe(
    name: RecipeName,
    model: Model,
    batches: Iterable[Any],
    *,
    held_back: float = 0.25,
    steps: int = 300,
) -> Tuned:
    """Calibrates, and improves on it by steps that are each kept only if the outputs come closer to the float model.

    Closer means a larger signal-to-noise ratio of the outputs (the mean over them of noise / signal) of fake-quant on
    data held back, which no step has seen.

    "fast"     calibrate, search of weight scales
    "default"  also scales of values by gradient (`search_value_scales`) and bias correction, both on the first 24
               samples, and the shift of relus where no node has to pad for it (`shift_relus`)
    "best"     also the scales of other observers (percentile, mse, mean of maxima), found in the same pass over the
               data, equalization, AdaRound, block reconstruction where a weight has less than 8 bits, and the shift of
               relus with nodes that pad

    Args:
      name: which recipe.
      model: what `prepare` returned. The observers of its plan are the first that are tried.
      batches: calibration data, as for `jq.calibrate`, all of it in memory: it is read several times.
      held_back: the share that judges, at least one batch: the last ones, or the last samples of a single batch.
      steps: of AdaRound, and of each block.

    Returns:
      `Tuned`: the model, and the table of what was tried and kept.

    Raises:
      QConfigError: an unknown recipe, or a share out of range. CalibrationError: no batches, or too little to hold
        anything back. InputError: a batch that does not fit the graph.

    Example:
      tuned = jq.ptq.recipe("default", model, batches)
      print(tuned)
      program = jq.lower(tuned.model)
    """
    if name not in RECIPES:
        raise QConfigError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}{did_you_mean(str(name), RECIPES)}")
    if not 0 < held_back < 1:
        raise QConfigError(f"held_back must be more than 0 and less than 1, not {held_back!r}")
    plan = model.plan
    check_folded(plan, "recipe")
    seen, judged_by = split_batches(plan, batches, held_back)
    start = perf_counter()
    calibrated, alternatives = _calibrated(model, seen, others=name == "best")
    judge = judge_of(model, judged_by)
    found = judge(calibrated)
    first = Trial(step=f"calibrate: {_observers(plan)}", sqnr=found, seconds=perf_counter() - start, kept=True)
    search = _Search(judge, calibrated, found, [first])
    for other, make in alternatives:
        search.attempt(f"scales of values: {other}", make)
    _improve(name, search, seen, steps)
    used, kept_back = (sum(batch[0].shape[0] for batch in part) for part in (seen, judged_by))
    return Tuned(model=search.model, trials=tuple(search.trials), used=used, held_back=kept_back)


def _improve(name: RecipeName, search: _Search, seen: Sequence[Batch], steps: int) -> None:
    model = search.model
    few = _few(model, seen)
    if name == "best" and find_pairs(model).equalizable:
        search.attempt("equalization", lambda: calibrate(equalize(model), seen))
    if name != "fast":
        search.attempt("scales of values: by gradient", lambda: search_value_scales(search.model, few))
    search.attempt("weight search", lambda: search_weight_scales(search.model))
    unrounded = search.model
    if name == "best":
        search.attempt("adaround", lambda: adaround(unrounded, seen, steps=steps))
        if any(spec.bits < 8 for spec in unrounded.plan.weights.values()):
            search.attempt("block reconstruction", lambda: reconstruct_blocks(unrounded, seen, steps=steps))
    if name != "fast":
        search.attempt("bias correction", lambda: correct_bias(search.model, few, reference=unrounded))
        plain = search.model
        if find_shifts(plain).possible:
            search.attempt("shifted relus", lambda: shift_relus(plain))
        if name == "best" and find_shifts(plain, pads=True).padded:
            search.attempt("shifted relus, nodes that pad", lambda: shift_relus(plain, pads=True))


def _few(model: Model, seen: Sequence[Batch], samples: int = 8, most: int = 24) -> list[Batch]:
    """The first samples in small batches of one size, since each size is compiled.

    All values and their gradients are in memory at once.
    """
    graph, free = model.plan.graph, free_memory()
    if any(not entry.shape or entry.shape[0] is not None for entry in graph.inputs):
        return list(seen[: max(1, most // seen[0][0].shape[0])]) if seen[0][0].ndim else list(seen[:most])
    each = sum(prod(kind.shape) * kind.dtype.itemsize for kind in value_types(graph, model.params, 1).values())
    fit = samples if free is None else max(1, min(samples, free // (_COPIES * each)))
    size = min(fit, seen[0][0].shape[0])
    starts = ((batch, i) for batch in seen for i in range(0, batch[0].shape[0] - size + 1, size))
    return [tuple(array[i : i + size] for array in batch) for batch, i in islice(starts, max(1, most // size))]


def _observers(plan: Plan) -> str:
    return ", ".join(dict.fromkeys(observer_of(plan.spec(name)).name for name in observed_values(plan)))


def _calibrated(
    model: Model, seen: Sequence[Batch], others: bool
) -> tuple[Model, list[tuple[str, Callable[[], Model]]]]:
    """The model calibrated by its own observers, and a function for every other, from one pass over the data."""
    if not others:
        return calibrate(model, seen), []
    plan = model.plan
    stats = collect(model.replace(plan=watched_by(plan, (mse(), mean_of_maxima()))), seen)

    def by(index: int, method: Observer | None = None) -> Model:
        return checked_finite(scales_by(model, stats, index, method))

    methods = ((1, mse()), (1, percentile()), (2, mean_of_maxima()))  # percentile reads the histogram of mse
    own = {observer_of(plan.spec(name)) for name in observed_values(plan)}
    return by(0), [(m.name, partial(by, i, m)) for i, m in methods if own != {m}]


def split_batches(plan: Plan, batches: Iterable[Any], share: float) -> tuple[list[Batch], list[Batch]]:
    """Batches that the steps see and batches that judge: the last ones, or the last samples of a single one."""
    bound = [tuple(inputs.values()) for inputs in bound_batches(plan, batches)]
    if len(bound) > 1:
        last = max(1, int(len(bound) * share))
        return bound[:-last], bound[-last:]
    size, (whole,) = bound[0][0].shape[0] if bound[0][0].ndim else 1, bound
    if size < 2 or any(not entry.shape or entry.shape[0] is not None for entry in plan.graph.inputs):
        raise CalibrationError(
            "a recipe holds data back to judge its steps: give two batches at least, or one of two samples"
        )
    cut = size - max(1, int(size * share))
    return [tuple(array[:cut] for array in whole)], [tuple(array[cut:] for array in whole)]


def judge_of(reference: Model, batches: Sequence[Batch]) -> Callable[[Model], float]:
    """A function of a model: signal to noise of its outputs under fake-quant, dB, against `reference` in float.

    It is 10 log10 of 1 / the mean over outputs of noise / signal.
    """

    def outputs(model: Model, mode: Mode, batch: Batch) -> list[np.ndarray]:
        return [np.asarray(y, np.float64) for y in jax.tree.leaves(apply(model, *batch, mode=mode))]

    wanted = [outputs(reference, "float", batch) for batch in batches]
    signal = np.sum([[np.sum(y**2) for y in ys] for ys in wanted], axis=0)

    def sqnr(model: Model) -> float:
        found = (outputs(model, "fake_quant", batch) for batch in batches)
        pairs = (zip(*both, strict=True) for both in zip(wanted, found, strict=True))
        noise = np.sum([[np.sum((a - b) ** 2) for a, b in pair] for pair in pairs], axis=0)
        share = np.mean(noise / np.maximum(signal, np.finfo(np.float64).tiny))
        return float(-10 * np.log10(np.maximum(share, 1e-30)))

    return sqnr
