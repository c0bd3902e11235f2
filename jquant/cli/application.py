"""The application: its help, and its commands from the files of this package."""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Annotated

import typer

from jquant.cli import board, build, demo, doctor, export, init, measure, train
from jquant.cli.console import INTERRUPTED_TEXT
from jquant.host.interrupts import INTERRUPTED
from jquant.host.whole_files import remove_unfinished
from jquant.program.cache import use_compilation_cache

HELP = """Quantization for JAX, and an integer simulator of the Nash BPU.

\b
From a float model to integers:
  jquant quantize net.py:make --checkpoint net.pth --config q.toml \\
      --data images/ -o net.jq --report out/
\b
Step by step:
  jquant calibrate net.py:make --config q.toml --data images/ -o net.jqs
  jquant sensitivity net.jqs --data images/ --top 10
  jquant train net.jqs --config q.toml --data train.npz -o trained.jqs
  jquant eval trained.jqs --data test.npz --mode bit_true

Exit codes: 0 done, 1 an error of the model, the data or a file, 2 wrong arguments, 3 a check that did not pass,
130 interrupted. `jquant demo` makes files to try all of this on.
"""

app = typer.Typer(name="jquant", help=HELP, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


def _version(asked: bool) -> None:
    if asked:
        from jquant import __version__

        print(f"jquant {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    cache: Annotated[
        bool, typer.Option(help="Keep compiled programs in the user's cache folder, for the next command.")
    ] = True,
) -> None:
    if cache and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # a folder of the user's own choice
        try:
            use_compilation_cache()
        except OSError as error:
            print(f"warning: compiled programs are not kept: {error}", file=sys.stderr)


for command in (
    demo.demo,
    init.init,
    build.inspect,
    build.check,
    build.calibrate,
    build.quantize,
    train.train,
    measure.evaluate,
    measure.compare,
    measure.sensitivity,
    measure.report,
    export.export,
    measure.run,
    doctor.doctor,
):
    app.command("eval" if command is measure.evaluate else command.__name__)(command)
app.add_typer(board.board)


_GRACE = 3.0  # seconds after Ctrl-C in which Python is to come to it; XLA compiles for longer


def _end_on_interrupt() -> None:
    """Ends the process where Ctrl-C reaches no Python code, since XLA compiles, or is lost in a callback of it."""
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    signal.set_wakeup_fd(sink, warn_on_full_buffer=False)

    def watch() -> None:
        while (number := os.read(source, 1)) and number[0] != signal.SIGINT:
            pass
        time.sleep(_GRACE)
        remove_unfinished()
        print(f"error: {INTERRUPTED_TEXT}", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)

    threading.Thread(target=watch, name="interrupt", daemon=True).start()


def main() -> None:
    """The entry point. An interrupted command ends at once: XLA may be compiling in a thread, which a Python that takes
    itself down under it does not survive (a segmentation fault, some seconds later). A finished command keeps its exit
    code: Ctrl-C is ignored while Python takes itself down, where it would otherwise end the process by a signal."""
    _end_on_interrupt()
    try:
        app(prog_name="jquant")
    except KeyboardInterrupt:  # outside of a command: `guarded` answers it inside
        print(f"error: {INTERRUPTED_TEXT}", file=sys.stderr)
    except SystemExit as error:
        if error.code != INTERRUPTED:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            raise
    else:
        return
    remove_unfinished()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(INTERRUPTED)
