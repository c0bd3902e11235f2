"""Arguments that are checked before any work begins: what is written at the end, and names of a fixed list."""

import os
import shutil
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from jquant.cli.console import UsageError
from jquant.text import did_you_mean
from jquant.types import JQuantError

PICTURES = (".png", ".svg", ".pdf")


def check_file(path: Path | None, option: str = "--output", suffixes: Iterable[str] = ()) -> None:
    """A file that will be written: no folder, with one of these suffixes, in a folder that can be written to.

    Raises:
      UsageError: another kind of name, or a folder. OSError: it cannot be written.
    """
    if path is None:
        return
    suffixes = tuple(suffixes)
    if suffixes and path.suffix.lower() not in suffixes:
        raise UsageError(f"{option} {path}: it is written as {' or '.join(suffixes)}")
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder; name a file")
    _check_writable(path.parent, option, path)


def check_folder(path: Path | None, option: str = "--output") -> None:
    """A folder that will be written into, and made where it is missing.

    Raises:
      UsageError: a file. OSError: it cannot be written.
    """
    if path is not None:
        _check_writable(path, option, path)


def check_picture(path: Path | None, option: str, suffixes: Iterable[str] = PICTURES) -> None:
    """A picture that will be drawn.

    Raises:
      ImportError: matplotlib is not there. And as for `check_file`.
    """
    if path is not None:
        check_file(path, option, suffixes)
        check_packages(option, "matplotlib")


def check_packages(option: str, *names: str) -> None:
    """Raises ImportError for packages that an option needs, with how to get them."""
    if missing := [name for name in names if find_spec(name) is None]:
        raise ImportError(f"{option} needs {' and '.join(missing)}: pip install 'jquant[report]'")


def check_choice(option: str, value: str, known: Iterable[str]) -> None:
    """Raises UsageError for a value that is none of these, with near ones."""
    known = tuple(known)
    if value not in known:
        raise UsageError(f"{option} {value!r}: it is one of {', '.join(known)}{did_you_mean(value, known)}")


def check_space(path: Path | None, option: str, needed: int) -> None:
    """Raises JQuantError where a file system has less space than what will be written."""
    if path is None:
        return
    free = shutil.disk_usage(_existing(path)).free
    if free < needed:
        raise JQuantError(f"{option} {path}: {needed / 1e6:.1f} MB will be written, and {free / 1e6:.1f} MB are free")


def _check_writable(folder: Path, option: str, path: Path) -> None:
    nearest = _existing(folder)
    if not nearest.is_dir():
        raise UsageError(f"{option} {path}: {nearest} is a file, not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"{option} {path}: the folder {nearest} cannot be written to")


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = Path(os.path.abspath(path))
    return next(found for found in (path, *path.parents) if os.path.lexists(found))
