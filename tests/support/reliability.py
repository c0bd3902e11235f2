"""docs/reliability.md: each section is made by the command that measured it."""

import datetime
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


def machine() -> str:
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, Python {sys.version.split()[0]}"


def write_section(name: str, command: str, lines: Sequence[str], page: Path = PAGE) -> None:
    """Replaces what stands between the marks of a section; `command` is that which gives the same figures."""
    today = datetime.date.today().isoformat()
    body = "\n".join([f"`{command}`, {today}, {machine()}.", "", *lines])
    start, end = f"<!-- made: {name} -->", f"<!-- end: {name} -->"
    place = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    text = page.read_text(encoding="utf-8")
    if not place.search(text):
        raise ValueError(f"{page} has no section {name!r}")
    page.write_text(place.sub(lambda _: f"{start}\n{body}\n{end}", text), encoding="utf-8")


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]
