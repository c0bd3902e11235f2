"""Bad cases: the inputs of a dataset with the largest error, kept as a file to look at and to debug on."""

import heapq
import os
import struct
import tokenize
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np

from jquant.analysis.meanings import Side, values_of
from jquant.analysis.metrics import MetricFunction, badness, metric_of
from jquant.analysis.ranking import measured_outputs
from jquant.graph.axes import automatic, automatic_axes
from jquant.graph.evaluate import bind_inputs
from jquant.host.progress import track
from jquant.host.whole_files import replacing
from jquant.meanings.meaning import Mode, check_mode
from jquant.plan.batch_norm import fold_kept
from jquant.plan.scales import check_model
from jquant.text import cut, format_table
from jquant.types import Array, CalibrationError, FormatError, Model

# What zipfile, zlib and numpy raise for a damaged archive.
_BROKEN = (
    ArithmeticError, BadZipFile, EOFError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError,
    SyntaxError, struct.error, tokenize.TokenError, zlib.error,
)  # fmt: skip


@dataclass(frozen=True)
class BadCases:
    """The worst samples of a dataset, the worst first.

    `inputs`    {graph input: [cases, ...]}; `index` [cases] their places in the dataset; `error` [cases]
    `a`, `b`, `metric`, `output`  what was compared, how, at which output
    """

    inputs: dict[str, np.ndarray]
    index: np.ndarray
    error: np.ndarray
    a: str
    b: str
    metric: str
    output: str

    def batch(self, count: int | None = None) -> tuple[Array, ...]:
        """The first cases, as the inputs of `compare` or `jq.apply`."""
        return tuple(jnp.asarray(x[:count]) for x in self.inputs.values())

    def table(self) -> str:
        rows = [(int(i), f"{e:.4g}") for i, e in zip(self.index, self.error, strict=True)]
        return format_table(("sample", f"{self.metric} of {self.b} against {self.a} at {self.output}"), rows)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the cases as .npz, whole or not at all."""
        about = {"a": self.a, "b": self.b, "metric": self.metric, "output": self.output}
        arrays = {f"input:{name}": x for name, x in self.inputs.items()}
        arrays |= {f"about:{key}": np.array(value) for key, value in about.items()}
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez(file, index=self.index, error=self.error, **arrays)  # type: ignore[arg-type]


def load_bad_cases(path: str | os.PathLike[str]) -> BadCases:
    """Reads what `BadCases.save` wrote.

    Raises:
      FormatError: another kind of file. FileNotFoundError: none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no bad cases at {path}")
    try:
        with Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:  # np.load leaks its own
            found = {key: file[key] for key in file.files}
        about = {key.removeprefix("about:"): str(v) for key, v in found.items() if key.startswith("about:")}
        inputs = {key.removeprefix("input:"): v for key, v in found.items() if key.startswith("input:")}
        return BadCases(inputs, found["index"], found["error"], **about)
    except _BROKEN as error:
        raise FormatError(f"{path}: no bad cases: {cut(str(error))}") from error


@automatic_axes()
def find_bad_cases(
    model: Model,
    batches: Iterable[Any],
    a: Mode = "float",
    b: Mode = "bit_true",
    *,
    metric: str | MetricFunction = "l1",
    output: str | None = None,
    count: int = 8,
) -> BadCases:
    """Finds the samples whose output differs most between two modes.

    Args:
      model: calibrated or trained.
      batches: any iterable of arrays, or tuples of arrays; it is read once.
      a, b: as for `compare`.
      metric: as for `sensitivity`, of one sample.
      output: which output; None takes the first that is numbers.
      count: how many to keep.

    Returns:
      The cases, the worst first.

    Raises:
      JQuantError: an unknown mode or metric. CalibrationError: no batches.

    Example:
      cases = jq.analysis.find_bad_cases(model, batches)
      cases.save("bad.npz")
      print(jq.analysis.compare(model, cases.batch(), "float", "bit_true").table(sort="own_sqnr"))
    """
    for mode in (a, b):
        check_mode(mode)
    name, function = metric_of(metric)
    check_model(model)
    model = fold_kept(model)
    plan, side = model.plan, Side.of(model, "bit_true" if "bit_true" in (a, b) else "")
    where = output or measured_outputs(plan)[0]
    where = where if where in plan.graph.values else f"{where}.to_first"

    @jax.jit
    def errors(side: Side, inputs: dict[str, Array]) -> Array:
        first, second = (values_of(side, mode, inputs)[where] for mode in (a, b))
        return jax.vmap(function)(first, second)

    worst: list[tuple[float, int, dict[str, np.ndarray]]] = []
    start = 0
    for batch in track(batches, "looking for bad cases"):
        arrays = jax.tree.map(automatic, batch if isinstance(batch, tuple | list) else (batch,))
        inputs = bind_inputs(plan.graph, arrays)
        for i, value in enumerate(np.asarray(errors(side, inputs))):
            bad = badness(name, float(value))
            entry = (np.inf if np.isnan(bad) else bad, -(start + i), {k: np.asarray(x[i]) for k, x in inputs.items()})
            if len(worst) < count:
                heapq.heappush(worst, entry)
            elif entry[:2] > worst[0][:2]:
                heapq.heapreplace(worst, entry)
        start += len(next(iter(inputs.values())))
    if not worst:
        raise CalibrationError("no batches: the iterable was empty (or used up by an earlier pass)")
    worst.sort(key=lambda entry: entry[:2], reverse=True)
    arrays = {key: np.stack([case[key] for _, _, case in worst]) for key in worst[0][2]}
    index, error = np.array([-i for _, i, _ in worst]), np.array([e for e, _, _ in worst])
    return BadCases(arrays, index, error, a, b, name, where)
