"""One self-contained HTML page that works offline, the same numbers as JSON, and pictures as PNG."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from jquant.analysis.comparison import Comparison, LayerError
from jquant.analysis.findings import Finding
from jquant.analysis.pictures import covered, error_picture, range_picture
from jquant.analysis.ranking import Ranking
from jquant.analysis.steps import NextStep
from jquant.host.whole_files import replacing
from jquant.types import Plan

SCHEMA = 2  # of report.json; jquant/analysis/report.schema.json describes it


@dataclass(frozen=True)
class Report:
    """Where a report was written."""

    html: Path
    json: Path
    pictures: tuple[Path, ...] = ()


def write_report(
    folder: str | os.PathLike[str],
    title: str,
    summary: Sequence[Mapping[str, Any]],
    comparisons: Mapping[str, Comparison],
    notes: Sequence[str] = (),
    *,
    plan: Plan | None = None,
    ranking: Ranking | None = None,
    findings: Sequence[Finding] = (),
    pictures: bool = True,
    about: Mapping[str, str] | None = None,
    steps: Sequence[NextStep] = (),
) -> Report:
    """Writes `report.html` and `report.json` into a folder, which is made if need be, and pictures beside them.

    Args:
      folder: where to write.
      title: the heading.
      summary: rows of the table on top; the keys of the first are its columns.
      comparisons: {title: comparison}: errors along depth, ranges, saturation, and a distribution for each row.
      notes: sentences above the table.
      plan: draws its graph, coloured by dtype.
      ranking: of `sensitivity`; findings: of `check_model`, `layer_advice` and others.
      pictures: also write ranges and errors of each comparison as PNG.
      about: lines of the head, such as {"model": "net.jqs"}; march, date and versions are added.
      steps: of `next_steps`: the changes to try first, above everything else.

    Raises:
      ImportError: matplotlib or jinja2 is missing; the message names the extra.
    """
    try:
        from jinja2 import Environment, PackageLoader, select_autoescape
    except ImportError as error:
        raise ImportError("reports need matplotlib and jinja2: pip install 'jquant[report]'") from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "schema": SCHEMA,
        "title": title,
        "about": {**_circumstances(plan), **(about or {})},
        "steps": [_plain(vars(step)) for step in steps],
        "notes": [*notes, *_islands(comparisons)],
        "summary": [_plain(row) for row in summary],
        "findings": [_plain(vars(finding)) for finding in findings],
        "comparisons": {name: _with_ranges(c) for name, c in comparisons.items()},
        "sensitivity": None if ranking is None else _plain(ranking.to_dict()),
        "graph": None if plan is None else graph_layout(plan),
    }
    environment = Environment(loader=PackageLoader("jquant.analysis", "."), autoescape=select_autoescape(default=True))
    page = environment.get_template("report.jinja").render(
        title=title,
        about=data["about"],
        notes=data["notes"],
        data=_inside_script(data),
        script=files("jquant.analysis").joinpath("report.js").read_text(encoding="utf-8"),
    )
    drawn = []
    for i, comparison in enumerate(comparisons.values() if pictures else ()):
        for name, picture in (("ranges", range_picture), ("errors", error_picture)):
            drawn.append(folder / f"{i + 1}-{name}.png")
            _replace(drawn[-1], picture(comparison))
    report = Report(folder / "report.html", folder / "report.json", tuple(drawn))
    _replace(report.html, page.encode())
    _replace(report.json, json.dumps(data, indent=1, allow_nan=False).encode())
    return report


def _circumstances(plan: Plan | None) -> dict[str, str]:
    """When and by which versions a report was made, and for which march."""
    march = {} if plan is None else {"march": plan.target.name}
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    versions = {"jquant": version("jquant"), "jax": version("jax"), "python": platform.python_version()}
    return {**march, "date": made, **versions}


def _inside_script(data: Any) -> str:
    """JSON that cannot end the script element it stands in, whatever its strings are."""
    text = json.dumps(data, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _islands(comparisons: Mapping[str, Comparison]) -> list[str]:
    """One sentence that names the float islands, if there are any."""
    names = dict.fromkeys(row.name for c in comparisons.values() for row in c.rows if row.dtype == "float16")
    return [f"Float islands, evaluated in float between quantized operators: {', '.join(names)}."] if names else []


def _with_ranges(comparison: Comparison) -> dict[str, Any]:
    """A comparison as data, each row with the real range that its scale covers."""
    data = comparison.to_dict()

    def reach(row: LayerError) -> list[float] | None:
        low, high = covered(row.scale, row.dtype)
        return [low, high] if low < high else None

    for kind, rows in (("rows", comparison.rows), ("weights", comparison.weights)):
        data[kind] = [found | {"covered": reach(row)} for found, row in zip(data[kind], rows, strict=True)]
    return data


def _plain(value: Any) -> Any:
    """Data without NaN, infinity and arrays, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def graph_layout(plan: Plan) -> list[dict[str, Any]]:
    """Every value of a plan with its place in a drawing: `depth`, the longest way from an input, and `column`.

    A value stays under its first operand where the place is free, so that a chain is a straight line.
    """
    depths: dict[str, int] = {}
    columns: dict[str, float] = {}
    taken: dict[int, set[float]] = {}
    rows: list[tuple[str, str, tuple[str, ...]]] = [(entry.name, "Input", ()) for entry in plan.graph.inputs]
    rows += [(node.name, type(node.op).__name__, node.inputs) for node in plan.graph.nodes]
    found = []
    for name, operator, operands in rows:
        depth = depths[name] = max((depths[v] + 1 for v in operands), default=0)
        used, wanted = taken.setdefault(depth, set()), columns[operands[0]] if operands else 0.0
        sides = (wanted + side * step for step in range(len(rows) + 1) for side in (1, -1))
        column = columns[name] = next(c for c in sides if c not in used)
        used.add(column)
        spec = plan.values[name]
        dtype = plan.exact.get(name) or (spec.dtype if spec else "float")
        place = {"depth": depth, "column": column}
        found.append({"name": name, "operator": operator, "dtype": dtype, "inputs": list(operands), **place})
    return found


def _replace(path: Path, content: bytes) -> None:
    with replacing(path) as partial:
        partial.write_bytes(content)
