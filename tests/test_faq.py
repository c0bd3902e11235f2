"""The list of questions is complete, everything that it names exists, and each row is played by a test."""

import ast
import re
from pathlib import Path

import pytest

import jquant as jq
import jquant_converters
from jquant.cli.application import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TEXT = (DOCS / "faq.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\d+) \| (.+?) \| (.+) \| (.+?) \|$", TEXT, flags=re.M)
ABLE = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", TEXT.partition("## What the guides say")[2], flags=re.M)[1:]

COMMANDS = {command.name for command in app.registered_commands}
TESTS = {
    node.name: path.name
    for path in (ROOT / "tests" / "faq").glob("test_*.py")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_row_")
}


def test_all_47_sentences_are_there_in_order() -> None:
    assert [int(number) for number, *_ in ROWS] == list(range(1, 48))
    assert len({sentence for _, sentence, *_ in ROWS}) == 47


def check_names(text: str) -> bool:
    """Everything that a cell names exists; whether it names anything."""
    names = re.findall(r"`jq\.([\w.]+)", text)
    for name in names:
        value = jq
        for part in name.rstrip(".").split("."):
            value = getattr(value, part)
    for name in re.findall(r"`jquant_converters\.(\w+)(?![\w.])", text):
        assert name in jquant_converters.__all__
    commands = re.findall(r"`jquant (\w+)", text)
    assert set(commands) <= COMMANDS
    links = re.findall(r"\]\(([^)#]+)", text)
    assert all((DOCS / link).exists() for link in links)
    files = re.findall(r"`(tests/[\w./]+)`", text)
    assert all((ROOT / file).exists() for file in files)
    return bool(names or commands or links or files)


@pytest.mark.parametrize(("number", "answer"), [(number, answer) for number, _, answer, _ in ROWS])
def test_every_answer_names_what_exists(number: str, answer: str) -> None:
    assert check_names(answer) or number == "36"  # nothing that is forbidden


@pytest.mark.parametrize("row", ROWS, ids=[number for number, *_ in ROWS])
def test_every_row_says_what_differs_and_is_played(row: tuple[str, str, str, str]) -> None:
    number, _, _, differs = row
    assert differs.strip()
    check_names(differs)
    rows = {name: [int(n) for n in re.findall(r"(?:_|^)(\d+)(?=_)", name)] for name in TESTS}
    assert any(int(number) in numbers for numbers in rows.values())


def test_what_the_plugin_can_do_is_answered_and_shown() -> None:
    assert len(ABLE) >= 12
    for _, here, shown in ABLE:
        check_names(here)
        assert check_names(shown)
        assert re.search(r"rows? \d+", shown)
    text = " ".join(able for able, *_ in ABLE)
    for wanted in ("docker", "observers that go on in QAT", "per module", "marches P, H and B"):
        assert wanted in text
