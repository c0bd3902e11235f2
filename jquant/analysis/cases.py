"""Bad cases: the inputs of a dataset with the largest error, kept as a file to look at and to debug on."""

import os
import struct
import tokenize
import zlib
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jquant.analysis.meanings import Side, values_of
from jquant.analysis.metrics import HIGHER_IS_BETTER, MetricFunction, badness, metric_of
from jquant.analysis.ranking import measured_outputs
from jquant.evaluation.batches import processes_of
from jquant.evaluation.extremes import Worst
from jquant.evaluation.loop import evaluate
from jquant.evaluation.sources import Source
from jquant.graph.axes import automatic, automatic_axes
from jquant.graph.evaluate import bind_inputs
from jquant.host.whole_files import replacing
from jquant.meanings.meaning import Mode, check_mode
from jquant.plan.batch_norm import fold_kept
from jquant.plan.scales import check_model
from jquant.text import cut, format_table
from jquant.types import Array, FormatError, Graph, InputError, Model

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
    mesh: Mesh | None = None,
    axis: str = "data",
    total: int | None = None,
    position: str | os.PathLike[str] | None = None,
    save_every: int = 100,
) -> BadCases:
    """Finds the samples whose output differs most between two modes, in one pass of `jq.evaluate`.

    Args:
      model: calibrated or trained.
      batches: any iterable of arrays, or tuples of arrays; it is read once. Of several processes each gives its share.
      a, b: as for `compare`.
      metric: as for `sensitivity`, of one sample.
      output: which output; None takes the first that is numbers.
      count: how many to keep.
      mesh, axis, total, position, save_every: as for `jq.evaluate`. The file holds the inputs of the cases so far.

    Returns:
      The cases, the worst first; of equal errors that of the smaller place. Over processes places count through the
      share of the first, then through that of the second, and so on.

    Raises:
      JQuantError: an unknown mode or metric. CalibrationError: no scales. InputError: no batches, a count below 1, or
      an axis that the mesh lacks. FormatError: a position of something else, or damaged.

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
    graph = model.plan.graph
    where = output or measured_outputs(model.plan)[0]
    where = where if where in graph.values else f"{where}.to_first"
    source = Source(_Both(a, b, where), Side.of(model, "bit_true" if "bit_true" in (a, b) else ""))
    worst = Worst(error=_Difference(name, function), count=count, kept=_inputs_of)
    numbered = _Numbered(graph, batches, processes_of(mesh))
    found = evaluate(
        {f"{b} against {a}": source},
        numbered,
        {"bad cases": worst},
        inputs=_arguments_of,
        mesh=mesh,
        axis=axis,
        total=len(batches) if total is None and isinstance(batches, Sized) else total,
        position=position,
        save_every=save_every,
    )
    place, difference, inputs = found.figures["bad cases"]
    error = np.array([badness(name, _signed(name, float(value))) for value in difference])
    return BadCases({i.name: inputs[i.name] for i in graph.inputs}, numbered.index(place), error, a, b, name, where)


@dataclass(frozen=True)
class _Both:
    """A value in two modes: `(side, inputs) -> (value, value)`."""

    a: Mode
    b: Mode
    where: str

    def __call__(self, side: Side, inputs: dict[str, Array]) -> tuple[Array, Array]:
        first, second = (values_of(side, mode, inputs)[self.where] for mode in (self.a, self.b))
        return first, second


@dataclass(frozen=True)
class _Difference:
    """A metric of each sample, the larger the worse."""

    name: str
    function: MetricFunction

    def __call__(self, outputs: tuple[Array, Array], batch: Any) -> Array:
        return _signed(self.name, jax.vmap(self.function)(*outputs))


def _signed(name: str, value: Any) -> Any:
    return -value if name in HIGHER_IS_BETTER else value


class _Numbered:
    """Batches as (inputs by name, places): a place is that in the share of this process, behind all earlier shares."""

    def __init__(self, graph: Graph, batches: Iterable[Any], processes: int) -> None:
        self._graph, self._batches, self._processes = graph, batches, processes
        self._room = 2**31 // processes  # places of a process, all of them in int32
        self._samples = 0

    def __iter__(self) -> Iterator[tuple[dict[str, Array], np.ndarray]]:
        first = jax.process_index() * self._room if self._processes > 1 else 0
        for batch in self._batches:
            arrays = jax.tree.map(automatic, batch if isinstance(batch, tuple | list) else (batch,))
            inputs = bind_inputs(self._graph, arrays)
            start, self._samples = self._samples, self._samples + len(next(iter(inputs.values())))
            if self._samples > self._room:
                raise InputError(f"more than {self._room} samples of a process; look for bad cases in a part of them")
            yield inputs, np.arange(first + start, first + self._samples).astype(np.int32)

    def index(self, places: np.ndarray) -> np.ndarray:
        """Places in the whole dataset, int64."""
        share, place = np.divmod(places.astype(np.int64), self._room)
        return self._first_of_shares()[share] + place

    def _first_of_shares(self) -> np.ndarray:
        if self._processes == 1:
            return np.zeros(1, np.int64)
        from jax.experimental import multihost_utils

        samples = multihost_utils.process_allgather(np.int32(self._samples)).astype(np.int64)
        return np.cumsum(samples) - samples


def _inputs_of(batch: Any) -> dict[str, Array]:
    return batch[0]


def _arguments_of(batch: Any) -> tuple[Any, ...]:
    return (batch[0],)
