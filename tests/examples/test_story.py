"""The worked story of docs/finding-lost-accuracy.md: its commands run, in order, and find the faults put in."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "finding-lost-accuracy.md").read_text(encoding="utf-8")


def run(line: str, folder: Path) -> str:
    """A line of the page, with this interpreter, in a folder of its own."""
    name, *arguments = line.split()
    start = {"python": [sys.executable, str(ROOT / arguments.pop(0))] if name == "python" else []}
    command = start.get(name) or [sys.executable, "-m", "jquant"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
def test_the_story_finds_and_mends_the_three_faults(tmp_path: Path) -> None:
    lines = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.S) for line in block.splitlines()]
    assert len(lines) == 4
    story, ranking, layers, report = (run(line, tmp_path) for line in lines)
    found = json.loads((tmp_path / "out" / "lost_accuracy" / "numbers.json").read_text())
    assert found["most sensitive"] == "features.1.conv.1"  # the convolution that the rescaled batch norm is folded into
    assert found["clamped"] == "features.6.conv.2"
    assert found["table"] == "log"
    assert found["table dB"][1] > found["table dB"][0] + 10
    levels = [row["logits dB"] for row in found["rows"]]
    assert levels == sorted(levels)  # each repair helps
    assert levels[-1] > levels[0] + 8
    assert "features.1.conv.1 int16" in story
    assert ranking.splitlines()[2].split()[0] == "features.1.conv.1"
    assert "features.6.conv.2" in layers
    assert (tmp_path / "out" / "lost_accuracy" / "faulty" / "report.html").is_file()
    assert "report.html" in report


def test_the_numbers_of_the_page_are_there() -> None:
    """Filled in from a run, not left as places to fill."""
    assert not re.search(r"^(NUMBERS|RANKING|CLAMP|TABLES)$", PAGE, flags=re.M)
    assert (ROOT / "docs" / "pictures" / "lost-accuracy.png").read_bytes().startswith(b"\x89PNG")
