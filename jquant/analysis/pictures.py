"""The pictures of a report as PNG files, for slides and issues; the page draws its own."""

import io
import math
from collections.abc import Mapping
from itertools import cycle
from typing import Any

from jquant.analysis.comparison import Comparison, LayerError
from jquant.types import integer_range

ROWS = 60  # a picture is for people: of more rows, those with the largest error


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


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def _chosen(comparison: Comparison) -> list[LayerError]:
    """All rows, or of many those with the largest error, in graph order."""
    worst = set(map(id, comparison.worst("sqnr", ROWS)))
    return [row for row in comparison.rows if id(row) in worst]


def range_picture(comparison: Comparison) -> bytes:
    """Bars from minimum to maximum of the baseline, with the range that the scale covers around them."""
    rows = _chosen(comparison)
    figure, axes = _figure(len(rows))
    where = range(len(rows))
    reaches = [covered(row.scale, row.dtype) for row in rows]
    axes.barh(
        where,
        [high - low for low, high in reaches],
        left=[low for low, _ in reaches],
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
    return _png(figure)


def covered(scale: float | None, dtype: str) -> tuple[float, float]:
    """The smallest and largest real value of a format; nothing for a float or high-precision value."""
    if scale is None or dtype in ("float", "float16", "int32"):
        return 0.0, 0.0
    low, high = integer_range(dtype)
    return low * scale, high * scale


def error_picture(comparison: Comparison) -> bytes:
    """The signal-to-noise ratio of every value, in graph order."""
    rows = _chosen(comparison)
    figure, axes = _figure(len(rows))
    capped = [min(row.sqnr, 120.0) if math.isfinite(row.sqnr) else 0.0 for row in rows]
    axes.hlines(range(len(rows)), 0, capped, color=_INK, linewidth=1)
    axes.plot(capped, range(len(rows)), "o", color=_ACCENT, markersize=4)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel(f"signal to noise of {comparison.b} against {comparison.a}, dB (120: equal)", fontsize=8)
    return _png(figure)


def depth_picture(comparisons: Mapping[str, Comparison]) -> bytes:
    """The signal-to-noise ratio along depth, a line a comparison: where it falls is where accuracy is lost."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.0), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#d9e2ec", linewidth=0.6)
    axes.tick_params(labelsize=8)
    for (name, comparison), color in zip(comparisons.items(), cycle((_ACCENT, "#d9480f", "#5f3dc4", _INK))):
        levels = [min(row.sqnr, 60.0) if math.isfinite(row.sqnr) else 0.0 for row in comparison.rows]
        axes.plot(levels, "-o", color=color, linewidth=1, markersize=2.5, label=name)
    axes.set_xlabel("values in graph order", fontsize=8)
    axes.set_ylabel("signal to noise, dB (cut at 60)", fontsize=8)
    axes.legend(fontsize=8, frameon=False, loc="upper right")
    return _png(figure)
