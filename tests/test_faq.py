"""The list of questions is complete, and everything that it names exists."""

import re
from pathlib import Path

import pytest

import jquant as jq
from jquant.cli.app import app

DOCS = Path(__file__).parents[1] / "docs"
ROWS = re.findall(r"^\| (\d+) \| (.+?) \| (.+) \|$", (DOCS / "faq.md").read_text(encoding="utf-8"), flags=re.M)

COMMANDS = {command.name for command in app.registered_commands}


def test_all_47_sentences_are_there_in_order() -> None:
    assert [int(number) for number, _, _ in ROWS] == list(range(1, 48))
    assert len({sentence for _, sentence, _ in ROWS}) == 47


@pytest.mark.parametrize(("number", "answer"), [(number, answer) for number, _, answer in ROWS])
def test_every_answer_names_what_exists(number: str, answer: str) -> None:
    names = re.findall(r"`jq\.([\w.]+)`", answer)
    for name in names:
        value = jq
        for part in name.split("."):
            value = getattr(value, part)
    commands = re.findall(r"`jquant (\w+)", answer)
    assert set(commands) <= COMMANDS
    links = re.findall(r"\]\(([^)#]+)", answer)
    assert all((DOCS / link).exists() for link in links)
    advice_only = number in ("27", "36")  # no flags to look at, and nothing that is forbidden
    assert names or commands or links or advice_only
