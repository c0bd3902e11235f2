"""The application: its help, and its commands from the files of this package."""

from typing import Annotated

import typer

from jquant.cli import build, demo, doctor, export, measure, train

HELP = """Quantization for JAX, and an integer simulator of the Nash BPU.

\b
From a float model to integers:
  jquant quantize net.py:make --checkpoint net.pth --config q.toml --data images/ -o net.jq --report out/
\b
Step by step:
  jquant calibrate net.py:make --config q.toml --data images/ -o net.jqs
  jquant sensitivity net.jqs --data images/ --top 10
  jquant train net.jqs --config q.toml --data train.npz -o trained.jqs
  jquant eval trained.jqs --data test.npz --mode integer

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
) -> None:
    pass


for command in (
    demo.demo,
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


def main() -> None:
    """The entry point."""
    app(prog_name="jquant")
