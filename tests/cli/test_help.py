"""Help and version come at once: from pages that are what the application prints, without jax."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import jquant
from jquant import cli
from jquant.cli import help as pages_of_help
from jquant.cli.board import board

PAGES = Path(cli.__file__).with_name("help.json")
CODE = """
import sys
sys.argv = ["jquant", *{arguments}]
from jquant.cli import main
try:
    main()
except SystemExit as stop:
    print(stop.code, sorted({{"jax", "numpy", "typer"}} & {{*sys.modules}}), file=sys.stderr)
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {key: value for key, value in os.environ.items() if key != "COLUMNS"} | environment
    return subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=False)


def test_the_pages_are_those_of_the_application() -> None:
    """`make support` writes them."""
    assert json.loads(PAGES.read_text(encoding="utf-8")) == pages_of_help.pages()


def test_no_line_of_help_is_wider_than_a_terminal() -> None:
    """Of the pages, and of the commands of `jquant board`, which have none of their own there."""
    wide = [line for page in pages_of_help.pages().values() for line in page.splitlines() if len(line) > 80]
    group = typer.main.get_command(board)
    root = group.make_context("board", [], resilient_parsing=True, terminal_width=78)
    for name in group.list_commands(root):
        command = group.get_command(root, name)
        page = command.get_help(command.make_context(name, [], parent=root, resilient_parsing=True, terminal_width=78))
        wide += [line for line in page.splitlines() if len(line) > 80]
    assert wide == []


@pytest.mark.parametrize(
    ("arguments", "page", "code"), [(["--help"], "", 0), ([], "", 2), (["train", "--help"], "train", 0)]
)
def test_help_loads_nothing(arguments: list[str], page: str, code: int) -> None:
    found = run(CODE.format(arguments=arguments))
    assert found.stdout == json.loads(PAGES.read_text(encoding="utf-8"))[page]
    assert found.stderr == f"{code} []\n"


def test_the_version_loads_nothing() -> None:
    found = run(CODE.format(arguments=["--version"]))
    assert (found.stdout, found.stderr) == (f"jquant {jquant.__version__}\n", "0 []\n")


def test_a_page_is_what_the_application_prints(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")  # no page is wider than 80
    for command in ([], ["sensitivity"]):
        assert cli.answer([*command, "--help"]) == 0
        fast = capsys.readouterr().out
        with pytest.raises(SystemExit):
            cli.app([*command, "--help"], prog_name="jquant")
        assert capsys.readouterr().out == fast


@pytest.mark.parametrize(
    "arguments", [["trian", "--help"], ["train", "--help", "-v"], ["train", "net.jqs"], ["--no-cache"], ["-h"]]
)
def test_everything_else_is_for_the_application(arguments: list[str], monkeypatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert cli.answer(arguments) is None
    monkeypatch.setenv("COLUMNS", "60")
    assert cli.answer(["--help"]) is None  # wrapped for the terminal
    monkeypatch.setenv("_JQUANT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.answer(["train", "--help"]) is None


def test_a_reader_that_has_gone() -> None:
    code = CODE.format(arguments=["--help"])
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b"1 []\n"


def test_without_the_extra_one_line_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['typer'] = None; sys.argv = ['jquant', 'doctor']; from jquant.cli import main; main()"
    )
    found = run(code)
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr == "error: the command line needs typer and rich: pip install 'jquant[cli]'\n"
