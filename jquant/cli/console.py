"""What every command shares: output for people or programs, one line for an error, exit codes, whole files."""

import functools
import json
import math
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import get_terminal_size
from typing import Annotated, Any, TypeVar

import typer

from jquant.host import whole_files
from jquant.host.interrupts import INTERRUPTED, TEXT, ignore, restore
from jquant.text import fitted, format_table
from jquant.types import JQuantError

FAILED, USAGE, UNMET = 1, 2, 3
INTERRUPTED_TEXT = TEXT

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors and --json.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print more, and a traceback with an error.")]

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class Console:
    """Where a command writes.

    `json`     one JSON value on stdout, no text
    `quiet`    no text and no progress
    `verbose`  notes on stderr about what is done
    """

    json: bool = False
    quiet: bool = False
    verbose: bool = False

    def text(self, text: str, keep: Collection[str] = ()) -> None:
        """The result, for people. Tables fit a terminal, columns to `keep` to the last; a pipe gets all of them."""
        if not (self.json or self.quiet):
            print(fitted(text, get_terminal_size().columns, keep) if sys.stdout.isatty() else text)

    def rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table of rows with the same keys."""
        if rows:
            header = tuple(rows[0])
            self.text(format_table(header, [tuple(cell(row[key]) for key in header) for row in rows]))

    def value(self, value: Any) -> None:
        """The result, for programs."""
        if self.json:
            print(json.dumps(plain(value), indent=1))

    def note(self, text: str) -> None:
        """What happens on the way."""
        if self.verbose and not self.quiet:
            print(text, file=sys.stderr)

    def warn(self, text: str) -> None:
        """What should be looked at, and stops nothing."""
        if not self.quiet:
            print(f"warning: {text}", file=sys.stderr)

    def progress(self, text: str) -> None:
        """A line on stderr for each part of a long run, such as an epoch."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def wrote(self, path: Path) -> None:
        if not (self.json or self.quiet):
            print(f"wrote {path}")

    def next(self, *words: object) -> None:
        """The last line: a command to type now. A word in capitals is for the reader to replace."""
        self.text(f"next: jquant {shlex.join(map(str, words))}")


def cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def plain(value: Any) -> Any:
    """JSON without NaN and infinity, which it does not have; arrays as lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


class UsageError(JQuantError):
    """Arguments that do not go together: exit code 2."""


class UnmetError(JQuantError):
    """A check that did not pass: exit code 3."""


def command(function: Command) -> Command:
    """Turns errors into one line on stderr and an exit code; with --verbose the traceback comes first."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        verbose, quiet = bool(kwargs.get("verbose")), bool(kwargs.get("quiet"))
        if quiet:
            os.environ["JQUANT_PROGRESS"] = "off"
        try:
            is_answered = restore()  # up to here a command ends at once
            with warnings.catch_warnings():
                if not verbose:
                    warnings.showwarning = partial(_show_warning, quiet)
                found = function(*args, **kwargs)
            if is_answered:
                ignore()
            return found
        except KeyboardInterrupt:
            raise _exit(INTERRUPTED_TEXT, INTERRUPTED, False) from None
        except UsageError as error:
            raise _exit(str(error), USAGE, verbose) from None
        except UnmetError as error:
            raise _exit(str(error), UNMET, verbose) from None
        except (JQuantError, OSError, ImportError) as error:
            raise _exit(str(error), FAILED, verbose) from None

    return guarded  # type: ignore[return-value]


def _show_warning(quiet: bool, message: Warning | str, *_: Any) -> None:
    """One line, in the place of two with a line of code of jquant."""
    if not quiet:
        print(f"warning: {message}", file=sys.stderr)


def _exit(message: str, code: int, verbose: bool) -> typer.Exit:
    if verbose:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    return typer.Exit(code)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """`whole_files.replacing`, in a folder that is made where there is none."""
    with suppress(FileExistsError):  # a file where the folder should be: the error below names both
        path.parent.mkdir(parents=True, exist_ok=True)
    with whole_files.replacing(path) as partial:
        yield partial
