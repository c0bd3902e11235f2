"""What long measurements share: finished runs kept as files, spreads over seeds, tables of a page."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def read_kept(folder: str, name: str) -> dict[str, Any] | None:
    """What `keep` wrote, or None where the run is not finished."""
    path = ROOT / "out" / folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def keep(folder: str, name: str, values: dict[str, Any]) -> None:
    """Writes a finished run as a whole or not at all."""
    path = ROOT / "out" / folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(values))
    part.replace(path)


def spread(values: Sequence[float]) -> str:
    """The mean, with the smallest and the largest; "-" where there is nothing."""
    return f"{np.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})" if len(values) else "-"


def markdown_table(columns: Sequence[str], cells: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A table of Markdown; the first `left` columns are words, the others numbers."""
    rule = "|".join("---" if i < left else "---:" for i in range(len(columns)))
    return "\n".join([f"| {' | '.join(columns)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in cells)])
