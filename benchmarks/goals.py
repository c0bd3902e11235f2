"""Every goal of RESULTS.md with its ratio: met or not, as a table and a picture. `make bench` runs it last.

python benchmarks/goals.py [--no-write]
"""

import argparse
import re
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from keeping import markdown_table
from results import PATH, write_section

PICTURE = PATH.with_name("goals.png")
NUMBER = re.compile(r"\d+\.\d+")


class Goal(NamedTuple):
    """A ratio, its quarters (equal to it where a table has none), and the largest that we want."""

    section: str
    name: str
    ratio: float
    low: float
    high: float
    wanted: float

    @property
    def is_met(self) -> bool:
        return self.ratio <= self.wanted


def goals_of(page: str) -> list[Goal]:
    """The rows of all tables that have a ratio and a goal."""
    found, section, header = [], "", []
    for line in page.splitlines():
        if line.startswith("## "):
            section, header = line[3:], []
        if not line.startswith("|"):
            header = []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not header:
            header = cells
        elif not set(line) <= set("|-: "):
            found += _goal(section, dict(zip(header, cells, strict=True)))
    return [goal for goal in found if goal.section != "Goals"]


def _goal(section: str, row: dict[str, str]) -> list[Goal]:
    ratio = next((row[key] for key in ("ratio", "warm over cold") if row.get(key)), "")
    wanted = next((NUMBER.findall(v) for k, v in row.items() if k.startswith("goal")), [])
    if not NUMBER.fullmatch(ratio) or not wanted:
        return []
    spread = NUMBER.findall(row.get("quarter to three quarters", "")) or [ratio, ratio]
    first, second, *_ = row.values()
    name = f"{first} over {second}" if "ratio" in row else f"{first}: a warm process over a cold one"
    return [Goal(section, name, *map(float, (ratio, *spread, wanted[0])))]


def draw(goals: list[Goal], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 0.32 * len(goals) + 1.4), layout="constrained")
    for i, goal in enumerate(reversed(goals)):
        colour = "#2a7f4f" if goal.is_met else "#b5482a"
        axes.plot([goal.low, goal.high], [i, i], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
        axes.plot(goal.ratio, i, "o", color=colour, markersize=6)
        axes.plot([goal.wanted] * 2, [i - 0.36, i + 0.36], color="#333333", linewidth=1.5)
    axes.set_yticks(range(len(goals)), [goal.name for goal in reversed(goals)], fontsize=8)
    axes.set_xscale("log")
    ticks = (0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("ratio of seconds; line: the goal; bar: the middle half of the rounds")
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


COLUMNS = ("measurement", "of", "ratio", "goal, at most", "met")


def main(argv: list[str] | None = None) -> list[Goal]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-write", action="store_true", help="print, and write nothing")
    options = parser.parse_args(argv)
    goals = goals_of(PATH.read_text())
    rows = [[g.section, g.name, f"{g.ratio:.2f}", f"{g.wanted:.2f}", "yes" if g.is_met else "no"] for g in goals]
    print("\n".join(" | ".join(row) for row in rows))
    if not options.no_write:
        draw(goals, PICTURE)
        met = sum(goal.is_met for goal in goals)
        head = f"## Goals\n\n`benchmarks/goals.py`: {met} of {len(goals)} are met.\n\n"
        head += f"![ratios and goals]({PICTURE.name})\n\n"
        write_section("goals", head + markdown_table(COLUMNS, rows, left=2))
    return goals


if __name__ == "__main__":
    main()
