"""What a terminal sees and a pipe does not: progress; and the completion of a shell."""

import subprocess
import sys

import pytest
from support.terminal import ENVIRONMENT, on_terminal, shown_on_terminal

from jquant.text import fitted, format_table

TRACK = "from jquant.host.progress import track; print(sum(track(range(3), 'counting')))"


def test_progress_is_for_a_terminal_alone() -> None:
    out, seen = on_terminal(TRACK)
    assert out == b"3\n"
    assert b"counting" in seen
    assert b"100%" in seen
    hidden = subprocess.run([sys.executable, "-c", TRACK], env=ENVIRONMENT, capture_output=True, check=True)
    assert (hidden.stdout, hidden.stderr) == (b"3\n", b"")


def test_the_shell_completes_commands_and_options() -> None:
    def completed(words: str) -> list[str]:
        asked = {"_JQUANT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        command = [sys.executable, "-c", "from jquant.cli import main; main()"]
        done = subprocess.run(command, env=ENVIRONMENT | asked, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert completed("jquant qu") == ["quantize"]
    assert "--checkpoints" in completed("jquant train --c")


# ---------------------------------------------------------------------------------------------------------------------
# Tables

HEADER = ("name", "operator", "cosine", "scale", "state")
LONG, SCALES = "encoder.layers.0.self_attn.out_proj", "0.0005923 .. 0.001489 (32)"
TABLE = format_table(HEADER, [(LONG, "Linear", "0.9998", SCALES, "frozen"), ("x", "Input", "1", "0.5", "frozen")])


@pytest.mark.parametrize("width", [30, 40, 60, 80])
def test_a_table_is_cut_to_the_width_of_the_terminal(width: int) -> None:
    """What is left out stands below it; text around a table stays as it is."""
    behind = "outputs: a line behind the table, which is text and longer than the terminal is wide, and stays so"
    lines = fitted(f"{TABLE}\n{behind}", width).splitlines()
    header, rule, *rows, note, last = lines
    assert max(map(len, (header, rule, *rows))) <= width
    assert last == behind
    assert len(rows) == 2
    left_out = HEADER[len(header.split()) :]
    named = f"; left out: {', '.join(left_out)}" if left_out else ""
    assert note == f"(cut to {width} columns; a pipe has all{named})"
    assert header.split() == list(HEADER[: len(HEADER) - len(left_out)])


def test_a_column_that_is_asked_for_stays() -> None:
    """Such as the one that a table is sorted by."""
    header, *_, note = fitted(TABLE, 40, keep=("state",)).splitlines()
    assert "state" in header.split()
    assert len(header) <= 40
    assert "state" not in note


def test_names_lose_their_middle_and_numbers_their_end() -> None:
    row = fitted(TABLE, 60).splitlines()[2]
    name, scale = (next(cell for cell in row.split("  ") if cell.startswith(start)) for start in ("enc", "0.0005"))
    start, _, end = name.partition("~")
    assert LONG.startswith(start)
    assert LONG.endswith(end)
    assert end
    assert scale.endswith("~")
    assert SCALES.startswith(scale[:-1])


@pytest.mark.parametrize("text", [TABLE, "a\n---\nb", "", "one line of text that is longer than twenty characters"])
def test_what_fits_and_what_is_no_table_stays_as_it_is(text: str) -> None:
    assert fitted(text, max(map(len, TABLE.splitlines())) if text == TABLE else 20) == text


def test_a_terminal_sees_a_cut_table_and_a_pipe_all_of_it() -> None:
    code = f"from jquant.cli.console import Console; Console().text({TABLE!r})"
    narrow = ENVIRONMENT | {"COLUMNS": "60"}
    piped = subprocess.run([sys.executable, "-c", code], env=narrow, capture_output=True, text=True, check=True)
    assert piped.stdout == f"{TABLE}\n"
    assert shown_on_terminal(code, COLUMNS="60").splitlines() == fitted(TABLE, 60).splitlines()


SAID = {"": "warning: look\n", "quiet=True": "", "verbose=True": "<string>:3: UserWarning: look\n"}


@pytest.mark.parametrize("option", SAID)
def test_a_warning_is_one_line(option: str) -> None:
    code = (
        "import warnings\nfrom jquant.cli.console import command\n"
        f"command(lambda **options: warnings.warn('look', stacklevel=1))({option})"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[:1] == SAID[option].splitlines()
