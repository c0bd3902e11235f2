"""A comparison with a board as a PNG file."""

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jquant.board.comparison import BoardComparison, Difference

ROWS = 60  # a picture is for people: of more rows, the first ones that differ
_EQUAL, _ALONE, _ACCUMULATED = "#0b7285", "#d9480f", "#9fb3c8"


def comparison_picture(comparison: "BoardComparison") -> bytes:
    """By node the share of integers that differ, alone and accumulated; the signed differences of the first one."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    rows = [row for row in comparison.rows if row.alone is not None]
    rows = rows if len(rows) <= ROWS else [row for row in rows if not row.alone.is_equal][:ROWS]  # type: ignore[union-attr]
    first = comparison.first
    figure = Figure(figsize=(9.0, max(2.4, 0.26 * len(rows) + 1.2)), layout="constrained", facecolor="white")
    left, *right = figure.subplots(1, 2 if first else 1, squeeze=False)[0]
    _style(left)
    where = range(len(rows))
    left.barh(where, [_share(row.accumulated) for row in rows], color=_ACCUMULATED, height=0.8, label="accumulated")
    left.barh(where, [_share(row.alone) for row in rows], color=_ALONE, height=0.4, label="alone")
    left.plot([0] * len(rows), where, "|", color=_EQUAL)
    left.set_yticks(where, [f"{row.name} · {row.operator}" for row in rows])
    left.invert_yaxis()
    left.set_xlabel("integers that differ from the board's, %", fontsize=8)
    left.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)
    if first is not None and first.alone is not None:
        _style(right[0])
        values = sorted(first.alone.histogram)
        right[0].bar(values, [first.alone.histogram[v] for v in values], color=_ALONE)
        right[0].set_title(f"{first.name}, alone", fontsize=8)
        right[0].set_xlabel("program minus board, LSB", fontsize=8)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def _share(difference: "Difference | None") -> float:
    return 0.0 if difference is None else 100 * (1 - difference.equal / max(difference.size, 1))


def _style(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#d9e2ec", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
