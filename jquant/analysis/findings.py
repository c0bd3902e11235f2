"""What a check says: one finding, with the numbers behind it and what to do."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jquant.text import format_table

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that a check found.

    `level`    "error": it cannot be deployed, or the numbers are broken; "warning": it may cost accuracy; "note"
    `check`    which check it is, in a word or two
    `where`    the value, node or parameter; "" for the model as a whole
    `message`  what is so; `fix` what to do about it; `numbers` what it was concluded from
    """

    level: Level
    check: str
    where: str
    message: str
    fix: str
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.numbers.items())
        place = f" {self.where}:" if self.where else ""
        return f"{self.level} ({self.check}){place} {self.message}{f' [{shown}]' if shown else ''}. {self.fix}."


def findings_table(findings: Iterable[Finding]) -> str:
    """Findings as text, errors first, in the order in which they were found."""
    order = {"error": 0, "warning": 1, "note": 2}
    rows = sorted(findings, key=lambda f: order[f.level])
    return format_table(
        ("level", "check", "where", "message", "fix"), [(f.level, f.check, f.where, f.message, f.fix) for f in rows]
    )
