"""Ctrl-C while the command line is being imported, which takes seconds: one line and exit code 130, as later on.

`jquant/__init__.py` imports this first. It acts in a process that was started as the command `jquant` or as
`python -m jquant` alone: a library leaves signals to the program that uses it. It imports nothing that takes time:
`_signal` is built into Python, and `signal` is a module of enumerations around it.
"""

import _signal
import os
import sys

INTERRUPTED = 130
TEXT = "interrupted; no file was left half-written"


def is_command(arguments: list[str], original: list[str]) -> bool:
    """Whether a process is a command of jquant, by `sys.argv` and `sys.orig_argv`; for `-m` before the module runs."""
    if arguments[:1] == ["-m"]:
        return "-m" in original and original[original.index("-m") + 1 :][:1] == ["jquant"]
    return bool(arguments) and os.path.basename(arguments[0]) == "jquant"


def _end(number: int, frame: object) -> None:
    os.write(2, f"error: {TEXT}\n".encode())
    os._exit(INTERRUPTED)


def end() -> None:
    """Ends a command at once; a program that uses the library is left alone."""
    if is_command(sys.argv, sys.orig_argv):
        _end(_signal.SIGINT, None)


def restore() -> bool:
    """Gives Ctrl-C back to Python, when everything is imported. Whether it was answered here before."""
    if _signal.getsignal(_signal.SIGINT) is not _end:
        return False
    _signal.signal(_signal.SIGINT, _signal.default_int_handler)
    return True


def ignore() -> None:
    """From now on Ctrl-C does nothing: the work is done, and Python takes itself down."""
    _signal.signal(_signal.SIGINT, _signal.SIG_IGN)


if is_command(sys.argv, sys.orig_argv) and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _end)
