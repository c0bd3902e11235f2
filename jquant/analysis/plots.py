"""Pictures of one thing: the graph with its formats, the ranges that observers choose, the error of a lookup table."""

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant import observers as known
from jquant.analysis.pictures import covered
from jquant.calibration.batches import bound_batches
from jquant.calibration.observe import updated
from jquant.calibration.samples import batch_axes, by_sample
from jquant.graph.evaluate import evaluate
from jquant.graph.float import float_rule
from jquant.host.whole_files import write_figure
from jquant.ops.lookup import eval_float64, evaluate_function, has_float64, is_table, table_constants, table_float
from jquant.plan.scales import check_model, value_scales
from jquant.text import near_or_known
from jquant.types import Graph, InputError, Model, Observer, Plan, Program, integer_range

MAX_NODES = 150
_DPI = 110
EDGE = 0.26  # from the middle of a box to its upper edge, in rows
BOX_COLOURS = {
    "int8": "#c3e6ec", "int16": "#ffe8cc", "int32": "#e5dbff", "float": "#ffffff", "float32": "#ffffff",
    "float16": "#ffffff",
}  # fmt: skip
_INK, _ACCENT, _WARM, _OTHER = "#52606d", "#0b7285", "#d9480f", "#e9ecef"


# ---------------------------------------------------------------------------------------------------------------------
# The graph


def plot_graph(path: str | os.PathLike[str], model: Model | Program) -> None:
    """Draws a network from top to bottom: each value with its operator, dtype and scale.

    Args:
      path: of a PNG, SVG or PDF file.
      model: what `prepare` or `calibrate` returned, or a program. A box of a model without scales has its dtype alone.

    Raises:
      InputError: more than 150 nodes, which no page holds; `jquant report` lists them.
      ImportError: matplotlib is missing; the message names the extra.

    Example:
      jq.analysis.plot_graph("out/graph.png", program)
    """
    graph, dtypes, scales = _formats(model)
    if len(graph.nodes) > MAX_NODES:
        raise InputError(
            f"the graph has {len(graph.nodes)} nodes, and a picture holds {MAX_NODES}; `jquant report` lists them all"
        )
    places = _places(graph)
    columns, rows = zip(*places.values(), strict=True)
    figure = _figure(width=max(3.4, 2.4 * (max(columns) - min(columns) + 1)), height=max(1.5, 0.66 * (max(rows) + 1)))
    axes = figure.add_subplot()
    axes.axis("off")
    _draw_edges(axes, graph, places)
    _draw_boxes(axes, graph, places, dtypes, scales)
    axes.set_xlim(min(columns) - 0.7, max(columns) + 0.7)
    axes.set_ylim(max(rows) + 0.6, -0.6)  # the first row above
    write_figure(path, figure, dpi=_DPI)


Place = tuple[float, int]  # column and row


def _formats(model: Model | Program) -> tuple[Graph, dict[str, str], dict[str, Any]]:
    """The graph, and the dtype and scale of its values; no scales before calibration."""
    if isinstance(model, Program):
        outputs = {name: form.output for name, form in model.formats.items()}
        return model.graph, {**dict(model.inputs), **outputs}, dict(model.scales)
    check_model(model, scales=False)
    plan = model.plan
    scales = value_scales(plan, model.qparams) if model.qparams else {}
    dtypes = {name: plan.exact.get(name, "float" if s is None else s.dtype) for name, s in plan.values.items()}
    return plan.graph, dtypes, {name: scale for name, scale in scales.items() if scale is not None}


def _draw_edges(axes: Any, graph: Graph, places: Mapping[str, Place]) -> None:
    for node in graph.nodes:
        for operand in node.inputs:
            start, end = places[operand], places[node.name]
            bend = 0.0 if end[1] - start[1] == 1 else -0.4 if start[0] > end[0] else 0.4  # around the boxes between
            how = {"arrowstyle": "-|>", "color": _INK, "linewidth": 0.8, "connectionstyle": f"arc3,rad={bend}",
                   "shrinkA": 0, "shrinkB": 0}  # fmt: skip
            axes.annotate("", (end[0], end[1] - EDGE), (start[0], start[1] + EDGE), arrowprops=how)


def _draw_boxes(
    axes: Any, graph: Graph, places: Mapping[str, Place], dtypes: Mapping[str, str], scales: Mapping[str, Any]
) -> None:
    operators = {node.name: type(node.op).__name__ for node in graph.nodes}
    for name, (column, row) in places.items():
        dtype = dtypes.get(name, "")
        form = f"{dtype} · {_scale_text(scales[name])}" if name in scales else dtype
        label = f"{_shortened(name)}\n{operators.get(name, 'Input')}, {form}"
        box = {"boxstyle": "round,pad=0.35", "facecolor": BOX_COLOURS.get(dtype, _OTHER), "edgecolor": _INK,
               "linewidth": 0.8}  # fmt: skip
        weight = "bold" if name in graph.outputs else "normal"
        axes.text(column, row, label, ha="center", va="center", fontsize=7, fontweight=weight, bbox=box)


def _places(graph: Graph) -> dict[str, Place]:
    """The row is the longest path from an input; a value stands below its operands."""
    rows = {entry.name: 0 for entry in graph.inputs}
    for node in graph.nodes:
        rows[node.name] = 1 + max((rows[v] for v in node.inputs), default=-1)
    by_row: dict[int, list[str]] = {}
    for name, row in rows.items():
        by_row.setdefault(row, []).append(name)
    places: dict[str, Place] = {}
    for row in sorted(by_row):
        names = by_row[row]
        wish = {name: _mean([places[v][0] for v in _operands(graph, name) if v in places]) for name in names}
        names.sort(key=lambda name: wish[name])
        columns = _apart([wish[name] for name in names])
        places |= {name: (column, row) for name, column in zip(names, columns, strict=True)}
    return places


def _apart(wishes: Sequence[float]) -> list[float]:
    """Columns at least 1 apart, in order, around the mean of the wishes."""
    columns: list[float] = []
    for wish in wishes:
        columns.append(wish if not columns else max(wish, columns[-1] + 1))
    shift = _mean(wishes) - _mean(columns)
    return [column + shift for column in columns]


def _operands(graph: Graph, name: str) -> tuple[str, ...]:
    node = graph.by_name.get(name)
    return node.inputs if node is not None else ()


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0


def _shortened(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:12]}…{name[-15:]}"


def _scale_text(scale: Any) -> str:
    steps = np.asarray(scale)
    if steps.size == 1:
        return f"{float(steps.reshape(())):.3g}"
    return f"{float(steps.min()):.3g} to {float(steps.max()):.3g}"


# ---------------------------------------------------------------------------------------------------------------------
# Observers


def plot_observers(
    path: str | os.PathLike[str],
    model: Model,
    value: str,
    batches: Iterable[Any],
    observers: Mapping[str, Observer] | None = None,
) -> dict[str, float]:
    """Draws the histogram of a value, and the range that each observer would give it.

    Args:
      path: of a PNG, SVG or PDF file.
      model: what `prepare` or `calibrate` returned.
      value: the name of a value that has a scale of its own.
      batches: as for `jq.calibrate`. All entries of the value are held at once.
      observers: {label: observer}; None takes the methods of `jq.observers` with their defaults.

    Returns:
      {label: scale}, real per LSB.

    Raises:
      InputError: no such value, or a batch that does not fit the graph.
      CalibrationError: no batches, or a batch with NaN or infinite values.
      ImportError: matplotlib is missing; the message names the extra.

    Example:
      scales = jq.analysis.plot_observers("out/conv1.png", model, "conv1", batches)
    """
    check_model(model, scales=False)
    plan = model.plan
    if value not in plan.owned:
        raise InputError(f"no value {value!r} has a scale of its own{near_or_known(value, plan.owned)}")
    chosen = dict(observers) if observers is not None else _default_observers()
    entries, scales = _observed(model, value, batches, chosen)
    dtype = plan.spec(value).dtype
    figure = _figure(width=8.0, height=2.6 + 0.22 * len(chosen))
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 0.25 * len(chosen) + 0.2))
    top.hist(entries, bins=200, color=_ACCENT, log=True)
    top.set_ylabel("entries", fontsize=8)
    top.set_title(f"{value}, {dtype}: from {entries.min():.4g} to {entries.max():.4g}", fontsize=9)
    _draw_ranges(bottom, entries, scales, dtype)
    _plain(top, bottom)
    write_figure(path, figure, dpi=_DPI)
    return scales


def _observed(
    model: Model, value: str, batches: Iterable[Any], observers: Mapping[str, Observer]
) -> tuple[np.ndarray, dict[str, float]]:
    """All entries of a value, and the scale of each observer."""
    plan, seen = model.plan, []
    states: dict[str, Any] = {label: one.init(1) for label, one in observers.items()}
    for inputs in bound_batches(plan, batches):
        data = _value_of(plan, value, model.params, inputs)
        axis = batch_axes(plan, model.params, inputs).get(value)
        for label, one in observers.items():
            given = by_sample(data, axis) if one.per_sample else data.reshape(1, -1)
            states[label] = updated(one, states[label], given)
        seen.append(np.asarray(data).reshape(-1))
    spec = plan.spec(value)
    scales = {label: float(np.asarray(one.finalize(states[label], spec))[0]) for label, one in observers.items()}
    return np.concatenate(seen), scales


def _draw_ranges(axes: Any, entries: np.ndarray, scales: Mapping[str, float], dtype: str) -> None:
    """A bar from the smallest to the largest value that each scale covers, the narrowest above."""
    order = sorted(scales, key=lambda label: scales[label])
    for row, label in enumerate(order):
        low, high = covered(scales[label], dtype)
        axes.barh(row, high - low, left=low, color="#c3e6ec", height=0.7)
        beyond = float(np.mean((entries < low) | (entries > high)))
        axes.annotate(f" {beyond:.2%} beyond", (high, row), va="center", fontsize=7, color=_WARM if beyond else _INK)
    axes.set_yticks(range(len(order)), order, fontsize=8)
    axes.invert_yaxis()
    reach = 1.25 * max(abs(entries).max(), 1e-30)
    axes.set_xlim(-reach if entries.min() < 0 else -0.1 * reach, reach)
    axes.set_xlabel("real value, with the range that each observer covers", fontsize=8)


def _default_observers() -> dict[str, Observer]:
    """{name: observer} of the methods of `jq.observers`, with their defaults."""
    makers = ("min_max", "moving_average", "mean_of_maxima", "percentile", "mse", "nmse", "norm", "kl", "clip_std")
    return {name: getattr(known, name)() for name in makers}


@partial(jax.jit, static_argnames=("plan", "value"))
def _value_of(plan: Plan, value: str, params: Any, inputs: Any) -> Any:
    found = {}

    def keep(name: str, array: Any) -> Any:
        if name == value:
            found[name] = array
        return array

    evaluate(plan.graph, inputs, float_rule(plan.graph, params), keep)
    return found[value]


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def plot_table(path: str | os.PathLike[str], model: Model, node: str) -> float:
    """Draws the integers of a lookup table beside its function, and the error over all integers of its operand.

    The dotted lines are the ends of the tables of an int16 operand. The march interpolates between the entries of each;
    what it does outside of them is a field of the target.
    What the output cannot hold is the fault of its scale and no error of the table.

    Args:
      path: of a PNG, SVG or PDF file.
      model: a calibrated model.
      node: the name of a node that is a lookup table: its operand and its output are int8 or int16.

    Returns:
      The largest error, LSB of the output.

    Raises:
      InputError: no such node, or one without a table.
      ImportError: matplotlib is missing; the message names the extra.

    Example:
      worst = jq.analysis.plot_table("out/gelu.png", model, "gelu")
    """
    check_model(model)
    plan, op = model.plan, _table_op(model.plan, node)
    operand = plan.graph.by_name[node].inputs[0]
    scales, x_dtype, y_dtype = value_scales(plan, model.qparams), plan.spec(operand).dtype, plan.spec(node).dtype
    x_scale, y_scale = (jnp.asarray(scales[name], jnp.float32) for name in (operand, node))
    low, high = integer_range(x_dtype)
    x = (np.arange(low, high + 1) * np.asarray(x_scale)).astype(np.float32)
    exact = eval_float64(op, x) if has_float64(op) else np.asarray(evaluate_function(op, jnp.asarray(x)), np.float64)
    ends = integer_range(y_dtype)
    wanted = np.clip(exact, ends[0] * float(y_scale), ends[1] * float(y_scale))
    found = np.asarray(table_float(op, jnp.asarray(x), x_scale, x_dtype, y_scale, y_dtype, target=plan.target))
    error = (found.astype(np.float64) - wanted) / float(y_scale)
    figure = _figure(width=8.0, height=4.0)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1.4, 1))
    top.plot(x, exact, color=_INK, linewidth=2.4, alpha=0.35, label=f"{type(op).__name__}, float")
    top.plot(x, found, color=_ACCENT, linewidth=0.9, label=f"integers, {y_dtype}")
    top.set_ylim(found.min() - 0.05 * np.ptp(found), found.max() + 0.05 * np.ptp(found))
    top.legend(fontsize=8, frameon=False)
    top.set_title(f"{node}: {x_dtype} with {float(x_scale):.3g} to {y_dtype} with {float(y_scale):.3g}", fontsize=9)
    bottom.plot(x, error, color=_WARM, linewidth=0.7)
    bottom.axhspan(-0.5, 0.5, color="#d9e2ec", alpha=0.6, linewidth=0)
    bottom.set_ylabel("error, LSB", fontsize=8)
    bottom.set_xlabel("real value of the operand; the band is rounding, half an LSB", fontsize=8)
    for edge in _boundaries(op, x_scale, x_dtype, y_scale, y_dtype, plan):
        for axes in (top, bottom):
            axes.axvline(edge, color=_INK, linewidth=0.6, linestyle=":")
    _plain(top, bottom)
    write_figure(path, figure, dpi=_DPI)
    return float(np.abs(error).max())


def _table_op(plan: Plan, node: str) -> Any:
    tables = [n.name for n in plan.graph.nodes if is_table(n.op) and not _is_float(plan, n.name, n.inputs[0])]
    if node not in tables:
        raise InputError(f"no node {node!r} is a table{near_or_known(node, tables)}")
    return plan.graph.by_name[node].op


def _is_float(plan: Plan, *names: str) -> bool:
    specs = [plan.values.get(name) for name in names]
    return any(spec is None or spec.is_float for spec in specs)


def _boundaries(op: Any, x_scale: Any, x_dtype: str, y_scale: Any, y_dtype: str, plan: Plan) -> list[float]:
    """Where the tables of an int16 operand end, in real; a table of a period repeats, and has none to mark."""
    constants = table_constants(op, x_scale, x_dtype, y_scale, y_dtype, plan.target.tables)
    if "boundaries" not in constants or "turn" in constants:
        return []
    edges = np.asarray(constants["boundaries"]).astype(np.float64) * float(x_scale)
    return sorted({*edges, *(-edges if int(constants["mirror"]) else ())})


def _figure(*, width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure  # without pyplot: no global state, no display
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'jquant[report]'") from error
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _plain(*each: Any) -> None:
    for axes in each:
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
