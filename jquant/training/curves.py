"""Curves of training runs side by side, as a picture."""

import os
from collections.abc import Mapping, Sequence

import numpy as np

from jquant.host.whole_files import write_figure
from jquant.types import InputError

Curve = Sequence[float] | Sequence[tuple[float, float]]  # values, or pairs of step and value


def plot_curves(
    path: str | os.PathLike[str],
    metrics: Mapping[str, Mapping[str, Curve]],
    *,
    title: str = "",
    logarithmic: Sequence[str] = ("loss",),
) -> None:
    """Draws a panel for each metric, with a line for each run: float and QAT side by side.

    Args:
      path: of a PNG, SVG or PDF file.
      metrics: `{"loss": {"float": [...], "QAT": [...]}, "accuracy": {...}}`; a curve is a sequence of values, or of
        pairs (step, value). Values that are not finite leave a gap.
      title: above all.
      logarithmic: the metrics with a logarithmic axis, where all values are positive.

    Raises:
      InputError: nothing to draw, or curves that are no sequences of numbers.
      ImportError: matplotlib is missing; the message names the extra.

    Example:
      jq.training.plot_curves("out/curves.png", {"loss": {"float": float_losses, "QAT": qat_losses}})
    """
    panels = {name: {run: _points(name, run, curve) for run, curve in runs.items()} for name, runs in metrics.items()}
    if not panels or not all(panels.values()):
        raise InputError("plot_curves needs at least one metric, each with at least one curve")
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'jquant[report]'") from error

    figure = matplotlib.figure.Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    for axes, (name, runs) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for run, points in runs.items():
            axes.plot(points[:, 0], points[:, 1], label=run, linewidth=1.2, marker="." if len(points) == 1 else None)
        values = np.concatenate([points[:, 1] for points in runs.values()])
        if name in logarithmic and np.all(values[np.isfinite(values)] > 0):
            axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        axes.legend()
    if title:
        figure.suptitle(title)
    write_figure(path, figure, dpi=120)


def _points(metric: str, run: str, curve: Curve) -> np.ndarray:
    """[N, 2]: step and value."""
    try:
        values = np.asarray(curve, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"the curve {run!r} of {metric!r} is no sequence of numbers: {error}") from error
    if values.ndim == 1 and values.size:
        return np.stack([np.arange(values.size), values], 1)
    if values.ndim != 2 or values.shape[1] != 2 or not values.size:
        raise InputError(f"the curve {run!r} of {metric!r} has the shape {values.shape}; give values, or pairs")
    return values
