"""Dumps of a board: a folder with a file for each value, and a declaration of how the files hold them.

A declaration is TOML or JSON. `[default]` says how all files are, `[values.NAME]` what is different for one; NAME may
be a pattern. Without one, every `NAME.npy` holds the integers of the value NAME as the program has them.

    [default]
    file = "{name}.npy"         # or "{name}.bin": raw, little-endian, with shape and dtype
    layout = "NHWC"             # or "NCHW": the order of the axes of images in the files
    dtype = "int8"              # of raw files: int8, int16, int32, uint8, float32
    shape = [1, 8, 8, 16]       # of raw files
    padded = true               # each axis may be longer than the value's: its end is cut off
    scale = 0.05                # real per LSB, of files with real numbers
    blocks = [2, 4, 8, 16]      # the native order: the file in this shape,
    order = [0, 2, 1, 3]        # its axes in this order, and then in `shape`

    [values."conv1"]
    file = "layer_0_output.npy"
"""

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jquant.text import did_you_mean
from jquant.types import FormatError

DTYPES = ("int8", "int16", "int32", "uint8", "float32")
Layout = Literal["", "NCHW", "NHWC"]


@dataclass(frozen=True, kw_only=True)
class Declared:
    """How a file holds a value; the module says what each entry means."""

    file: str = "{name}.npy"
    layout: Layout = ""
    dtype: str = ""
    shape: tuple[int, ...] = ()
    padded: bool = False
    scale: float | None = None
    blocks: tuple[int, ...] = ()
    order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.layout not in ("", "NCHW", "NHWC"):
            raise FormatError(f"layout is {self.layout!r}; it can be 'NCHW' or 'NHWC'")
        if self.dtype and self.dtype not in DTYPES:
            raise FormatError(f"dtype is {self.dtype!r}; it can be {', '.join(DTYPES)}")
        if self.scale is not None and not 0 < self.scale < float("inf"):
            raise FormatError(f"scale is {self.scale!r}; it is positive and finite, real per LSB")
        if sorted(self.order) != list(range(len(self.blocks))):
            raise FormatError(f"order {list(self.order)} is no order of the {len(self.blocks)} axes of blocks")
        if self.blocks and (not self.shape or prod(self.blocks) != prod(self.shape)):
            raise FormatError(f"blocks {list(self.blocks)} do not hold a shape of {list(self.shape)}; give both")


@dataclass(frozen=True)
class Declaration:
    """How the files of a folder hold values: `default`, and what `values` changes by name or pattern."""

    default: Declared = field(default_factory=Declared)
    values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def of(self, name: str) -> Declared:
        changes: dict[str, Any] = {}
        for pattern, given in self.values.items():
            if pattern == name or fnmatchcase(name, pattern):
                changes |= given
        return replace(self.default, **changes)


@dataclass(frozen=True, eq=False)
class Dump:
    """The array of a file, and how it was declared."""

    array: np.ndarray
    source: Path
    declared: Declared


@dataclass(frozen=True)
class Dumps:
    """What a folder holds: {value: dump}, and in words what of it could not be read."""

    values: Mapping[str, Dump]
    problems: tuple[str, ...] = ()


def read_declaration(source: str | os.PathLike[str] | Mapping[str, Any] | Declaration | None) -> Declaration:
    """A declaration in TOML or JSON (its file ends in ".json"), or as a mapping of the same form.

    Raises:
      FormatError: no such form, with the entry. FileNotFoundError: no file.
    """
    if source is None or isinstance(source, Declaration):
        return source or Declaration()
    if isinstance(source, Mapping):
        return _declaration(source)
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no declaration at {path}")
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        return _declaration(data)
    except (ValueError, FormatError) as error:
        raise FormatError(f"{path}: {error}") from error


def _declaration(data: Any) -> Declaration:
    if not isinstance(data, Mapping) or set(data) - {"default", "values"}:
        raise FormatError("a declaration has the tables [default] and [values.NAME]")
    values = data.get("values", {})
    if not isinstance(values, Mapping):
        raise FormatError("values is a table of tables, one for each value or pattern")
    return Declaration(
        Declared(**_entries(data.get("default", {}), "default")),
        {name: _entries(given, f"values.{name}") for name, given in values.items()},
    )


def _entries(given: Any, where: str) -> dict[str, Any]:
    known = [entry.name for entry in fields(Declared)]
    if not isinstance(given, Mapping):
        raise FormatError(f"{where} is {given!r}; it should be a table")
    for key in given:
        if key not in known:
            raise FormatError(f"{where} has no entry {key!r}{did_you_mean(str(key), known)}; known: {', '.join(known)}")
    made: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    Declared(**{key: value for key, value in made.items() if key not in ("blocks", "order")})
    return made


def read_dumps(
    folder: str | os.PathLike[str],
    declaration: str | os.PathLike[str] | Mapping[str, Any] | Declaration | None = None,
    *,
    names: Sequence[str] = (),
) -> Dumps:
    """Reads a folder of dumps. A file that cannot be read is a problem that is named; the rest goes on.

    Args:
      folder: with a file for each value; sub-folders are not looked at.
      declaration: how the files hold the values; a file "dumps.toml" or "dumps.json" in the folder is taken where
        there is none.
      names: values to look for, beside those that the declaration names and those that files are named for.

    Raises:
      FormatError: a declaration that is none. FileNotFoundError: no folder.

    Example:
      >>> import jquant as jq, numpy as np, pathlib, tempfile
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> np.save(folder / "conv1.npy", np.zeros((1, 4), np.int8))
      >>> list(jq.board.read_dumps(folder).values)
      ['conv1']
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of dumps at {folder}")
    beside = [path for name in ("dumps.toml", "dumps.json") if (path := folder / name).is_file()]
    declared = read_declaration(beside[0] if declaration is None and beside else declaration)
    values, problems = {}, []
    for name in dict.fromkeys((*names, *_named(folder, declared))):
        how = declared.of(name)
        path = folder / how.file.replace("{name}", name)
        try:
            if path.is_file():
                values[name] = Dump(_array(path, how), path, how)
        except (ValueError, OSError, EOFError) as error:
            problems.append(f"{name}: {path.name} cannot be read: {error}")
    return Dumps(values, tuple(problems))


def _named(folder: Path, declared: Declaration) -> list[str]:
    """Values that the declaration gives by name, and that files are named for."""
    plain = [name for name in declared.values if not set("*?[") & set(name)]
    before, _, after = declared.default.file.partition("{name}")
    taken = {declared.of(name).file.replace("{name}", name) for name in plain}
    found = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name not in taken)
    fitting = [n for n in found if n.startswith(before) and n.endswith(after) and len(n) > len(before + after)]
    return plain + [name[len(before) : len(name) - len(after)] for name in fitting]


def _array(path: Path, how: Declared) -> np.ndarray:
    if path.suffix == ".npy":
        array = np.load(path, allow_pickle=False)
    else:
        if not how.dtype or not how.shape:
            raise ValueError("a raw file needs shape and dtype in the declaration")
        array = np.fromfile(path, np.dtype(how.dtype).newbyteorder("<"))
        if array.size != prod(how.shape):
            raise ValueError(
                f"it has {array.size} numbers of {how.dtype}, and shape {list(how.shape)} has {prod(how.shape)}"
            )
    if how.blocks:
        if array.size != prod(how.blocks):
            raise ValueError(f"it has {array.size} numbers, and blocks {list(how.blocks)} have {prod(how.blocks)}")
        array = array.reshape(how.blocks).transpose(how.order)
    return array.reshape(how.shape) if how.shape else array
