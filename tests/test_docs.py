"""The code in the documents runs as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)


def test_the_operator_of_ones_own_in_the_recipe_runs() -> None:
    """In a process of its own: an operator class stays registered for as long as a process lives."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", blocks("docs/adding-an-operator.md")[-1]],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["[[-2.", "1.984375", "0.", "-1.5", "]]"]


def test_every_link_between_documents_leads_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_walk_to_an_operator_quotes_the_source() -> None:
    """Every block but the last, which runs, stands in the source; one of several lines in one piece."""
    files = [path.read_text() for folder in ("jquant", "converters") for path in (ROOT / folder).rglob("*.py")]
    for block in blocks("docs/adding-an-operator.md")[:-1]:
        pieces = block.split("\n\n") if "def " in block or "class " in block else block.splitlines()
        for piece in pieces:
            assert any(piece.strip() in text for text in files), piece
