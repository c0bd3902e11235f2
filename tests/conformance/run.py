"""Runs the whole conformance suite, prints its table and writes RESULTS.md: `make conformance`.

python tests/conformance/run.py [--outputs 1000000] [--only Conv] [--family gemm] [--no-write]
"""

import argparse
import collections
import importlib
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import numpy as np  # noqa: E402
from conformance import consistency  # noqa: E402
from conformance.harness import Row, check  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402


def families(only: str | None) -> Iterator[object]:
    for path in sorted(HERE.glob("*_cases.py")):
        if only is None or only in path.stem:
            yield importlib.import_module(f"conformance.{path.stem}")


def sampled(modules: Iterable[object], outputs: int, operator: str | None, console: Console) -> list[Row]:
    """Every case, with the outputs of an operator shared among its cases. An error counts as a mismatch."""
    cases = [case for module in modules for case in module.CASES if operator in (None, case.operator)]
    count = collections.Counter(case.operator for case in cases)
    rows: dict[tuple[str, str], Row] = {}
    for case in track(cases, "operators", console=console, disable=not console.is_terminal):
        key = (case.operator, case.formats)
        try:
            row = check(case, outputs=-(-outputs // count[case.operator]))
        except Exception as error:
            console.print(f"[red]{case}[/red]: {type(error).__name__}: {error}")
            row = Row(*key, 0, 1)
        before = rows.get(key, Row(*key, 0, 0))
        rows[key] = Row(*key, before.outputs + row.outputs, before.mismatches + row.mismatches)
        if before.outputs == 0:
            jax.clear_caches()  # no case compiles what another one needs
        if row.mismatches:
            console.print(f"[red]{row.mismatches} of {row.outputs} differ:[/red] {case}")
    return [rows[key] for key in sorted(rows)]


def exhaustive(modules: Iterable[object], operator: str | None, console: Console) -> list[Row]:
    enumerations = [run for module in modules for run in getattr(module, "EXHAUSTIVE", ())]
    if operator is not None:
        return []
    found = []
    for run in track(enumerations, "exhaustive", console=console, disable=not console.is_terminal):
        found += list(run())
    return found


def table(title: str, rows: list[Row]) -> Table:
    shown = Table("operator", "formats", "outputs", "mismatches", "note", title=title)
    for row in rows:
        shown.add_row(row.operator, row.formats, f"{row.outputs:,}", str(row.mismatches), row.note)
    return shown


def markdown(sections: dict[str, list[Row]], levels: list[str]) -> str:
    lines = [
        "# Conformance",
        "",
        "The jitted integer interpreter against `jquant.reference`, which shares no code with it; written by",
        "`make conformance`. Nothing here was compared with a board.",
        "",
        f"jax {jax.__version__}, numpy {np.__version__}, {platform.machine()}.",
    ]
    for title, rows in sections.items():
        total, wrong = sum(row.outputs for row in rows), sum(row.mismatches for row in rows)
        lines += ["", f"## {title}", "", f"{total:,} outputs, {wrong} mismatches.", ""]
        lines += ["| operator | formats | outputs | mismatches | note |", "|---|---|---:|---:|---|"]
        lines += [f"| {r.operator} | {r.formats} | {r.outputs:,} | {r.mismatches} | {r.note} |" for r in rows]
    return "\n".join([*lines, "", "## Consistency levels", "", *levels]) + "\n"


def written(path: Path) -> dict[str, list[Row]]:
    """The rows of an earlier run, by section, without the consistency levels."""
    found: dict[str, list[Row]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith("## "):
            found[line[3:]] = []
        elif line.startswith("| ") and not line.startswith("| operator") and found:
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if len(cells) == 5:
                operator, formats, outputs, mismatches, note = cells
                rows = found[list(found)[-1]]
                rows.append(Row(operator, formats, int(outputs.replace(",", "")), int(mismatches), note))
    return {title: rows for title, rows in found.items() if rows}


def merged(old: dict[str, list[Row]], new: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """The old rows, those of operators that were run again replaced."""
    found = {}
    for title, rows in new.items():
        again = {row.operator for row in rows}
        kept = [row for row in old.get(title, []) if row.operator not in again]
        found[title] = sorted([*kept, *rows])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outputs", type=int, default=1_000_000, help="at least so many an operator")
    parser.add_argument("--only", help="one operator, by its class name")
    parser.add_argument("--family", help="one family, by its file name")
    parser.add_argument("--no-write", action="store_true", help="do not write RESULTS.md")
    options = parser.parse_args()
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    console = Console()
    modules = list(families(options.family))
    sections = {
        "Operators on random and extreme integers": sampled(modules, options.outputs, options.only, console),
        "Finite domains, exhaustively": exhaustive(modules, options.only, console),
    }
    for title, rows in sections.items():
        console.print(table(title, rows))
    if not options.no_write:
        path, levels = HERE / "RESULTS.md", consistency.markdown(consistency.levels())
        sections = merged(written(path) if options.only or options.family else {}, sections)
        path.write_text(markdown(sections, levels))
    return 1 if any(row.mismatches for rows in sections.values() for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
