"""How much each quantizer costs: one on at a time, or one off at a time, many of them in one compiled pass.

The switches are data, so one compilation serves every batch of quantizers: a tap selects between a value and its
fake-quant for each lane of a `vmap`. A weight differs in one lane only, and is evaluated for that lane alone: under
`vmap` a convolution with weights of its own per lane would become a grouped one, which is slow.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jquant.analysis.cost import elements, macs
from jquant.analysis.metrics import MetricFunction, badness, metric_of
from jquant.graph.axes import automatic, automatic_axes
from jquant.graph.evaluate import bind_inputs, evaluate
from jquant.graph.float import float_rule
from jquant.host.progress import PATIENCE, track
from jquant.meanings.meaning import meaning_of
from jquant.numerics.rounding import expand
from jquant.ops.matmul import MatMul
from jquant.plan.batch_norm import fold_kept
from jquant.plan.scales import check_model, expand_weight, parameter_of, quantizer_of, scale_of
from jquant.quantizers import fake_quant
from jquant.text import did_you_mean, format_table
from jquant.types import (
    MIN_SCALE,
    Array,
    CalibrationError,
    JQuantError,
    Model,
    Node,
    Plan,
    QParams,
    bit_width,
)

Kind = Literal["activation", "weight"]
Mode = Literal["one_on", "one_off"]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One quantizer in one format: the value or weight `name` as `dtype`."""

    name: str
    kind: Kind
    dtype: str


@dataclass(frozen=True, kw_only=True)
class SensitivityRow:
    """What one quantizer costs.

    `rule`      the name that a qconfig rule for it has: that of the last node before fusion, or of the weight's node;
                None for a conversion that `prepare` put in, which no rule names
    `metric`    the metric at the outputs, against float, with this quantizer alone on (or alone off)
    `error`     the same as an error, larger being worse; with one off, how much the error sinks
    `macs`      share of the plan's multiply-accumulates that read the value or weight; `bytes` that it takes
    """

    name: str
    rule: str | None
    kind: Kind
    operator: str
    dtype: str
    metric: float
    error: float
    macs: float
    bytes: int


@dataclass(frozen=True)
class Ranking:
    """Rows, the most sensitive quantizer first.

    `metric`, `mode`  how it was measured; `baseline` the metric with all quantizers on
    """

    metric: str
    mode: Mode
    baseline: float
    rows: tuple[SensitivityRow, ...]

    def names(self, kind: Kind = "activation") -> list[str]:
        """Names for `jq.templates.sensitive`, most sensitive first, with port "output" or "weight"."""
        found = (row.rule for row in self.rows if row.kind == kind and row.rule is not None)
        return list(dict.fromkeys(found))

    def table(self, count: int | None = None) -> str:
        columns = ("name", "kind", "operator", "dtype", "metric", "error", "macs", "bytes")
        rows = [tuple(_show(getattr(row, c)) for c in columns) for row in self.rows[:count]]
        return format_table(columns, rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        rows = [asdict(row) for row in self.rows]
        return {"metric": self.metric, "mode": self.mode, "baseline": self.baseline, "rows": rows}


def _show(cell: object) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


@automatic_axes()
def sensitivity(
    model: Model,
    batches: Iterable[Any],
    *,
    metric: str | MetricFunction = "sqnr",
    mode: Mode = "one_on",
    kinds: Sequence[Kind] = ("activation", "weight"),
    activations: Sequence[str] = (),
    weights: Sequence[str] = (),
    lanes: int = 8,
) -> Ranking:
    """Measures every quantizer of a model by itself.

    Args:
      model: calibrated or trained.
      batches: an iterable of arrays (tuples of arrays for several inputs), all of one shape but the last; all are kept
        in memory.
      metric: "cosine", "sqnr", "mse", "l1", "kl", "max_error", or `f(float output, output) -> scalar`, larger being
        worse. Averaged over outputs and batches.
      mode: "one_on": one quantizer on, all others off. "one_off": one off, all others on.
      kinds: what to measure.
      activations, weights: dtypes to try for each value or weight, at the same range, in place of the plan's own.
      lanes: how many quantizers are evaluated at once; memory grows with it.

    Returns:
      A `Ranking`, the most sensitive first.

    Raises:
      JQuantError: an unknown metric, mode or kind. CalibrationError: no batches, or no scales.

    Example:
      ranking = jq.analysis.sensitivity(model, batches, metric="cosine")
      rules = {**jq.templates.int8_default(), **jq.templates.sensitive(ranking.names(), topk=5, spec=jq.int16())}
    """
    name, function = metric_of(metric)
    _check_choices(mode, kinds, lanes, bool(activations or weights))
    check_model(model)
    model = fold_kept(model)
    plan = model.plan
    given = (jax.tree.map(automatic, b if isinstance(b, tuple | list) else (b,)) for b in batches)
    bound = [bind_inputs(plan.graph, b) for b in given]
    if not bound:
        raise CalibrationError("no batches: the iterable was empty (or used up by an earlier pass)")
    candidates = candidates_of(plan, kinds, activations, weights)
    measured, everything = _measure(model, bound, candidates, mode, (name, function), lanes)
    rows = [_row(c, value, everything, mode, name) for c, value in zip(candidates, measured, strict=True)]
    details = _details(model)
    rows = [replace(row, **details(row.name, row.dtype)) for row in rows]
    rows.sort(key=lambda row: -math.inf if math.isnan(row.error) else -row.error)
    return Ranking(name, mode, everything, tuple(rows))


def _check_choices(mode: str, kinds: Sequence[str], lanes: int, other_dtypes: bool) -> None:
    if mode not in ("one_on", "one_off"):
        raise JQuantError(f"unknown mode {mode!r}; known: one_on, one_off{did_you_mean(mode, ('one_on', 'one_off'))}")
    for kind in kinds:
        if kind not in ("activation", "weight"):
            known = ("activation", "weight")
            raise JQuantError(f"unknown kind {kind!r}; known: {', '.join(known)}{did_you_mean(str(kind), known)}")
    if mode == "one_off" and other_dtypes:
        raise JQuantError("mode 'one_off' takes quantizers out as they are: leave activations and weights empty")
    if lanes < 1:
        raise JQuantError(f"lanes must be at least 1, not {lanes}")


def candidates_of(
    plan: Plan, kinds: Sequence[Kind], activations: Sequence[str] = (), weights: Sequence[str] = ()
) -> tuple[Candidate, ...]:
    """Every quantizer of a plan in every format to be tried, in graph order."""
    found: list[Candidate] = []
    if "activation" in kinds:
        found += [
            Candidate(name=name, kind="activation", dtype=dtype)
            for name in plan.owned
            if not plan.spec(name).is_float
            for dtype in activations or (plan.spec(name).dtype,)
        ]
    if "weight" in kinds:
        found += [
            Candidate(name=key, kind="weight", dtype=dtype)
            for key in plan.weights
            for dtype in weights or (plan.weights[key].dtype,)
        ]
    return tuple(found)


def _row(candidate: Candidate, value: float, everything: float, mode: Mode, metric: str) -> SensitivityRow:
    error = badness(metric, value)
    if mode == "one_off":
        error = badness(metric, everything) - error
    return SensitivityRow(**asdict(candidate), rule=None, operator="", metric=value, error=error, macs=0.0, bytes=0)


def _details(model: Model) -> Callable[[str, str], dict[str, Any]]:
    """What a row says about its value or weight beside the measurement."""
    plan = model.plan
    products, sizes, rules = macs(model), elements(model), rule_names(plan)
    users = weight_users(plan)
    total = max(1, sum(products.values()))

    def details(name: str, dtype: str) -> dict[str, Any]:
        work = products[users[name].name] if name in users else sum(products[n] for n in multiplied_by(plan, name))
        node = users.get(name) or plan.graph.by_name.get(name)
        return {
            "rule": users[name].name if name in users else rules.get(name),
            "operator": type(node.op).__name__ if node else "Input",
            "macs": work / total,
            "bytes": math.ceil(sizes[name] * bit_width(dtype) / 8),
        }

    return details


def multiplied_by(plan: Plan, value: str) -> list[str]:
    """The nodes that multiply a value, or one that has its format: what data movement made of it."""
    found: list[str] = []
    for reader in plan.graph.consumers[value]:
        if reader.op.scale_rule != "own" and reader.name not in plan.owned:  # it keeps the format
            found += multiplied_by(plan, reader.name)
        elif reader.inputs[0] == value or isinstance(reader.op, MatMul):  # an addend is not multiplied
            found.append(reader.name)
    return list(dict.fromkeys(found))


def rule_names(plan: Plan) -> dict[str, str]:
    """{value of the plan: the name that a qconfig rule for it has}: of a fused node, the one that decides."""
    found = {}
    for row in plan.resolutions:
        if row.port == "output" and row.applied != "-":
            found[plan.renamed.get(row.name, row.name)] = row.rule or row.name
    return found


def weight_users(plan: Plan) -> dict[str, Node]:
    """{weight: the first node that reads it}."""
    found: dict[str, Node] = {}
    for node in plan.graph.nodes:
        for role in node.op.weight_roles:
            if node.params[role] in plan.weights:
                found.setdefault(node.params[role], node)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The measurement


def _measure(
    model: Model,
    batches: Sequence[dict[str, Array]],
    candidates: tuple[Candidate, ...],
    mode: Mode,
    metric: tuple[str, MetricFunction],
    lanes: int,
) -> tuple[list[float], float]:
    """The metric of every candidate, and with all quantizers of the plan on, averaged over batches."""
    chunks = [list(range(i, min(i + lanes, len(candidates)))) for i in range(0, len(candidates), lanes)]
    sums, all_on = np.zeros(len(candidates)), 0.0
    float_values: list[Array] = []
    steps = [(inputs, chunk) for inputs in batches for chunk in (None, *chunks)]
    for inputs, chunk in track(steps, "ranking quantizers", after=PATIENCE):
        if chunk is None:
            float_values = _outputs(model, "float", inputs)
            all_on += float(_all_on(model, metric[1], inputs, float_values))
            continue
        # The last chunk is filled up with lanes that go unread, so that one compilation serves all.
        switches = np.zeros((lanes, len(candidates)), bool)
        switches[range(len(chunk)), chunk] = True
        found = _lanes(model, candidates, mode, metric[1], inputs, jnp.asarray(switches), float_values)
        sums[chunk] += np.asarray(found, np.float64)[: len(chunk)]
    return [float(s) for s in sums / len(batches)], all_on / len(batches)


def quantize_as(plan: Plan, qparams: QParams, candidate: Candidate, x: Array) -> Array:
    """A value or weight quantized as a candidate says: in another dtype, by plain fake-quant over the same range."""
    name, own = candidate.name, plan.spec(candidate.name)
    if candidate.dtype == own.dtype:
        weight = candidate.kind == "weight"
        parameter = expand_weight(name, plan, qparams, x.ndim) if weight else parameter_of(name, own, qparams)
        return quantizer_of(own)(x, parameter, own)
    scale = scale_of(name, plan, qparams) * 2.0 ** (own.bits - bit_width(candidate.dtype))
    scale = expand(jnp.maximum(scale, MIN_SCALE), plan.weight_axis.get(name), x.ndim)
    return fake_quant(x, scale, replace(own, dtype=candidate.dtype, quantizer=fake_quant, fixed_scale=None))


@partial(jax.jit, static_argnames=("mode",))
def _outputs(model: Model, mode: Literal["float", "fake_quant"], inputs: dict[str, Array]) -> list[Array]:
    values = meaning_of(model, mode).values(inputs)
    return [values[name] for name in measured_outputs(model.plan)]


def measured_outputs(plan: Plan) -> list[str]:
    """The outputs that a metric is taken of: those that are numbers."""
    found = [name for name in plan.graph.outputs if name not in plan.exact]
    if not found:
        raise JQuantError(
            "every output is a mask, an index or pixels: there is no error to measure; use `outputs` before"
        )
    return found


def _mean_metric(metric: MetricFunction, baseline: Sequence[Array], outputs: Sequence[Array]) -> Array:
    return sum(metric(a, b) for a, b in zip(baseline, outputs, strict=True)) / jnp.float32(len(baseline))


@partial(jax.jit, static_argnames=("metric",))
def _all_on(model: Model, metric: MetricFunction, inputs: dict, baseline: list) -> Array:
    return _mean_metric(metric, baseline, _outputs(model, "fake_quant", inputs))


@partial(jax.jit, static_argnames=("candidates", "mode", "metric"))
def _lanes(
    model: Model,
    candidates: tuple[Candidate, ...],
    mode: Mode,
    metric: MetricFunction,
    inputs: dict[str, Array],
    switches: Array,
    baseline: list[Array],
) -> Array:
    """The metric for each lane; `switches` [lanes, candidates] says which quantizer is on (or off) in which lane."""
    places: dict[str, list[int]] = {}
    for i, candidate in enumerate(candidates):
        places.setdefault(candidate.name, []).append(i)
    plan, qparams = model.plan, model.qparams
    base, changed = _rules(model, candidates, mode)
    count = switches.shape[0]

    def quantize(name: str, value: Array) -> Array:
        """A value in all lanes: quantized where its switch says so."""
        if name not in plan.owned:
            return value
        kept = value if mode == "one_on" else _own(plan, qparams, name, value)
        for i in places.get(name, ()):
            other = quantize_as(plan, qparams, candidates[i], value) if mode == "one_on" else value
            kept = jnp.where(switches[:, i].reshape(-1, *(1,) * (value.ndim - 1)), other, kept)
        return kept

    def rule(node: Node, *operands: Array) -> Array:
        value = jax.vmap(partial(base, node))(*operands) if operands else _repeat(base(node), count)
        for key in (node.params[role] for role in node.op.weight_roles):
            for i in places.get(key, ()):
                lane, active = jnp.argmax(switches[:, i]), switches[:, i].any()
                alone = changed[i](node, *(x[lane] for x in operands))
                value = value.at[lane].set(jnp.where(active, alone, value[lane]))
        return value

    values = evaluate(plan.graph, {n: _repeat(x, count) for n, x in inputs.items()}, rule, quantize)
    outputs = [values[name] for name in measured_outputs(plan)]
    return jax.vmap(lambda *lane: _mean_metric(metric, baseline, lane))(*outputs)


def _repeat(x: Array, count: int) -> Array:
    return jnp.broadcast_to(x, (count, *x.shape))


def _own(plan: Plan, qparams: QParams, name: str, value: Array) -> Array:
    spec = plan.spec(name)
    return quantizer_of(spec)(value, parameter_of(name, spec, qparams), spec)


def _rules(
    model: Model, candidates: tuple[Candidate, ...], mode: Mode
) -> tuple[Callable[..., Array], dict[int, Callable[..., Array]]]:
    """The rule of a lane that has nothing special, and for each weight candidate that of its own lane."""
    plan, params, qparams = model.plan, model.params, model.qparams
    plain = float_rule(plan.graph, params)
    base = plain if mode == "one_on" else meaning_of(model, "fake_quant").rule
    changed: dict[int, Callable[..., Array]] = {}
    for i, candidate in enumerate(candidates):
        if candidate.kind == "weight":
            quantized = quantize_as(plan, qparams, candidate, params[candidate.name])
            switched = plain if mode == "one_off" else float_rule(plan.graph, {**params, candidate.name: quantized})
            changed[i] = switched
    return base, changed
