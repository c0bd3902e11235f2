"""The command line, `jquant` or `python -m jquant`: one family of commands a file.

Exit codes: 0 done; 1 an error of the model, the data or a file, in one line on stderr; 2 wrong arguments; 3 a check
that did not pass; 130 interrupted. What a command prints goes to stdout, or with --json one JSON value; everything else
goes to stderr. Files appear whole or not at all.
"""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jquant.cli.application import app
else:

    def __getattr__(name: str) -> object:
        if name != "app":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
        from jquant.cli.application import app

        return app


__all__ = ["app", "main"]

_WIDTH = 80  # of the pages: a narrower terminal has pages of its own


def main() -> None:
    """The entry point: help and version at once, everything else by the application, which loads jax."""
    if (code := answer(sys.argv[1:])) is not None:
        raise SystemExit(code)
    from jquant.host.progress import stages

    try:
        with stages("starting", ("jax",)) as begin:
            begin("jax")
            from jquant.cli.application import main as run
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        raise SystemExit("error: the command line needs typer and rich: pip install 'jquant[cli]'") from None
    run()


def answer(arguments: Sequence[str]) -> int | None:
    """Prints the version or a page of help where that is all that is asked for; the exit code, or None.

    The pages lie in help.json, as `jquant.cli.help` writes them: making them takes all commands, and so jax.
    """
    *command, last = arguments or ["--help"]
    if "_JQUANT_COMPLETE" in os.environ or len(command) > 1:
        return None
    if (command, last) == ([], "--version"):
        from jquant import __version__

        return _print(f"jquant {__version__}\n")
    if last != "--help" or _columns() < _WIDTH:
        return None
    import json
    from importlib.resources import files

    pages = json.loads(files(__name__).joinpath("help.json").read_text(encoding="utf-8"))
    page = pages.get("".join(command))
    if page is None:
        return None
    return _print(page) or (0 if arguments else 2)  # without arguments, help says what is missing


def _columns() -> int:
    from shutil import get_terminal_size

    return get_terminal_size().columns


def _print(text: str) -> int:
    """1 where whoever reads has stopped to."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        return 1
    return 0
