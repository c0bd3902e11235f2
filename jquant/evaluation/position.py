"""The sums of an evaluation so far, and the file that holds them.

The file is JSON with a digest. Floats are written as Python does, which reads back the same bits.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from jquant.evaluation.sources import Source
from jquant.host.whole_files import replacing
from jquant.types import FormatError

_FORMAT, _VERSION = "jquant evaluation", 1


@dataclass(frozen=True, kw_only=True)
class Position:
    """Sums of the batches counted.

    Attributes:
      of: digest of source, modes and metrics.
      size: samples of the first batch, padded; 0 before it.
      batches, samples: how many are counted.
      leaves: the sums [..] in the order of `jax.tree.leaves`: int64 or float64, or as a metric with `merge` gives them.
      structure: the tree of the sums, {mode: {metric: ...}}; None until a batch shows it.
    """

    of: str
    size: int = 0
    batches: int = 0
    samples: int = 0
    leaves: tuple[np.ndarray, ...] = ()
    structure: Any = None

    @classmethod
    def begin(cls, sources: Mapping[str, Source], metrics: Mapping[str, Any]) -> "Position":
        return cls(of=_digest_of(sources, metrics))

    @property
    def sums(self) -> Any:
        return jax.tree.unflatten(self.structure, self.leaves)

    def shaped(self, found: Any, size: int) -> "Position":
        """The sums of a file, with the structure that the first batch shows.

        Raises:
          FormatError: a file of other batches, or of metrics with other sums.
        """
        leaves, structure = jax.tree.flatten(found)
        if size != self.size:
            raise FormatError(
                f"the position counts batches of {self.size} samples, and the first one here has {size}; name another"
            )
        if [np.shape(v) for v in leaves] != [v.shape for v in self.leaves]:
            raise FormatError("the position holds the sums of other metrics; name another file")
        return replace(self, structure=structure)

    def plus(self, found: Any, samples: int, size: int, metrics: Mapping[str, Any]) -> "Position":
        """With the sums {mode: {metric: ...}} of one more batch."""
        before = self.sums if self.batches else {}
        sums = {
            mode: {name: _joined(metrics[name], before.get(mode, {}).get(name), part) for name, part in parts.items()}
            for mode, parts in found.items()
        }
        leaves, structure = jax.tree.flatten(sums)
        return replace(
            self,
            size=self.size or size,
            batches=self.batches + 1,
            samples=self.samples + samples,
            leaves=tuple(map(np.asarray, leaves)),
            structure=structure,
        )


def _joined(metric: Any, before: Any, part: Any) -> Any:
    """The sums of a metric before a batch (None: it is the first), and those of the batch, as one."""
    merge = getattr(metric, "merge", None)
    if merge is None:
        merge, part = partial(jax.tree.map, np.add), jax.tree.map(_wide, part)
    return part if before is None else merge(before, part)


def _wide(sums: Any) -> np.ndarray:
    array = np.asarray(sums)
    return array.astype(np.float64 if array.dtype.kind == "f" else np.int64)


def save_position(path: str | os.PathLike[str], position: Position) -> None:
    """Writes a position, whole or not at all. Of several processes the first one writes."""
    if jax.process_index():
        return
    body = {
        "format": _FORMAT,
        "version": _VERSION,
        "of": position.of,
        "size": position.size,
        "batches": position.batches,
        "samples": position.samples,
        "leaves": [
            {"dtype": str(v.dtype), "shape": list(v.shape), "values": v.ravel().tolist()} for v in position.leaves
        ],
    }
    with replacing(path) as partial:
        partial.write_text(json.dumps({**body, "digest": _digest(body)}))


def load_position(path: str | os.PathLike[str], sources: Mapping[str, Source], metrics: Mapping[str, Any]) -> Position:
    """The position in a file, or the beginning where there is none.

    Raises:
      FormatError: a damaged file, or one of another source, other modes or other metrics.
    """
    begin = Position.begin(sources, metrics)
    try:
        with open(path, encoding="utf-8") as file:
            body = json.load(file)
    except FileNotFoundError:
        return begin
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is no position of an evaluation: {error}") from error
    try:
        digest = body.pop("digest")
        if body["format"] != _FORMAT or body["version"] != _VERSION or digest != _digest(body):
            raise ValueError("another format or version, or damaged")
        leaves = tuple(np.array(v["values"], v["dtype"]).reshape(v["shape"]) for v in body["leaves"])
        size, counted, samples = (int(body[name]) for name in ("size", "batches", "samples"))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path} is no position of an evaluation: {error}; remove it to begin again") from error
    if body["of"] != begin.of:
        raise FormatError(f"{path} is the position of another model, other modes or other metrics; name another file")
    return replace(begin, leaves=leaves, size=size, batches=counted, samples=samples)


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=16).hexdigest()


def _digest_of(sources: Mapping[str, Source], metrics: Mapping[str, Any]) -> str:
    """A digest of the arrays of every source and of what is done with them."""
    found = hashlib.blake2b(digest_size=16)
    for name, source in sources.items():
        found.update(f"{name} {_named(source.call)}\n".encode())
        for leaf in jax.tree.leaves(source.value):
            if getattr(leaf, "is_fully_addressable", True):
                array = np.asarray(leaf)
                found.update(f"{array.dtype}{array.shape}".encode())
                found.update(np.ascontiguousarray(array).tobytes())
    for name, metric in metrics.items():
        found.update(f"{name} {_named(metric)}\n".encode())
    return found.hexdigest()


def _named(value: Any) -> str:
    """A text of a metric or function that another process gives, too."""
    if is_dataclass(value) and not isinstance(value, type):
        inner = ", ".join(f"{f.name}={_named(getattr(value, f.name))}" for f in fields(value))
        return f"{type(value).__module__}.{type(value).__qualname__}({inner})"
    if isinstance(value, Callable):  # type: ignore[arg-type]
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return repr(value)
