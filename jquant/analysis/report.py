"""One self-contained HTML file with pictures, and the same numbers as JSON beside it."""

import base64
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jquant.analysis.compare import Comparison
from jquant.types import integer_range


@dataclass(frozen=True)
class Report:
    """Where a report was written."""

    html: Path
    json: Path


def write_report(
    folder: str | os.PathLike[str],
    title: str,
    summary: Sequence[Mapping[str, Any]],
    comparisons: Mapping[str, Comparison],
    notes: Sequence[str] = (),
) -> Report:
    """Writes `report.html` and `report.json` into a folder, which is made if need be.

    Args:
      folder: where to write.
      title: the heading.
      summary: rows of the table on top; the keys of the first are its columns.
      comparisons: {title: comparison}, each drawn as ranges and errors by layer.
      notes: sentences above the table.

    Raises:
      ImportError: matplotlib or jinja2 is missing; the message names the extra.
    """
    try:
        from jinja2 import Environment, PackageLoader, select_autoescape
    except ImportError as error:
        raise ImportError("reports need matplotlib and jinja2: pip install 'jquant[report]'") from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sections = [
        {"title": name, "rows": c.rows, "a": c.a, "b": c.b, "ranges": _ranges(c), "errors": _errors(c)}
        for name, c in comparisons.items()
    ]
    notes = [*notes, *_islands(comparisons)]
    environment = Environment(loader=PackageLoader("jquant.analysis", "."), autoescape=select_autoescape(default=True))
    environment.filters["number"] = format_number
    page = environment.get_template("report.jinja").render(
        title=title, summary=list(summary), sections=sections, notes=list(notes)
    )
    data = {
        "title": title,
        "notes": list(notes),
        "summary": [dict(row) for row in summary],
        "comparisons": {name: c.to_dict() for name, c in comparisons.items()},
    }
    report = Report(folder / "report.html", folder / "report.json")
    _replace(report.html, page)
    _replace(report.json, json.dumps(data, indent=1))
    return report


def _islands(comparisons: Mapping[str, Comparison]) -> list[str]:
    """One sentence that names the float islands, if there are any."""
    names = dict.fromkeys(row.name for c in comparisons.values() for row in c.rows if row.dtype == "float16")
    return [f"Float islands, evaluated in float between quantized operators: {', '.join(names)}."] if names else []


def format_number(value: Any) -> str:
    """A table cell: four significant digits for a float, a dash for nothing."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


_INK, _ACCENT = "#52606d", "#0b7285"


def _figure(count: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(9.0, max(2.2, 0.26 * count + 0.9)), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#d9e2ec", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    return figure, axes


def _image(figure: Any) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return base64.b64encode(stream.getvalue()).decode()


def _ranges(comparison: Comparison) -> str:
    """Bars from minimum to maximum of the baseline, with the range that the scale covers around them."""
    rows = comparison.rows
    figure, axes = _figure(len(rows))
    where = range(len(rows))
    covered = [_covered(row.scale, row.dtype) for row in rows]
    axes.barh(
        where,
        [high - low for low, high in covered],
        left=[low for low, _ in covered],
        color="#c3e6ec",
        height=0.8,
        label="covered by the scale",
    )
    widths = [row.maximum - row.minimum for row in rows]
    axes.barh(
        where, widths, left=[row.minimum for row in rows], color=_ACCENT, height=0.4, label=f"seen ({comparison.a})"
    )
    axes.set_yticks(where, [f"{row.name} · {row.dtype}" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("real value", fontsize=8)
    axes.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)
    return _image(figure)


def _covered(scale: float | None, dtype: str) -> tuple[float, float]:
    """The smallest and largest real value of a format; nothing for a float or high-precision value."""
    if scale is None or dtype in ("float", "int32"):
        return 0.0, 0.0
    low, high = integer_range(dtype)
    return low * scale, high * scale


def _errors(comparison: Comparison) -> str:
    """The signal-to-noise ratio of every value, in graph order."""
    rows = comparison.rows
    figure, axes = _figure(len(rows))
    capped = [min(row.sqnr, 120.0) if math.isfinite(row.sqnr) else 0.0 for row in rows]
    axes.hlines(range(len(rows)), 0, capped, color=_INK, linewidth=1)
    axes.plot(capped, range(len(rows)), "o", color=_ACCENT, markersize=4)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel(f"signal to noise of {comparison.b} against {comparison.a}, dB (120: equal)", fontsize=8)
    return _image(figure)
