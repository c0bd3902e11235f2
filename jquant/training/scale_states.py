"""Which value and weight of a plan is in which state, and a check that refuses states that make no sense.

There is no hidden state in jquant: mode and freezing are arguments. So a state is read from the values: the plan says
what has a scale, qparams whether it is there, calibrated qparams whether it was trained, labels whether it is frozen.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jquant.config.qconfig import matches
from jquant.meanings.meaning import Mode, check_mode
from jquant.plan.batch_norm import kept_batch_norm, kept_nodes
from jquant.plan.describe import format_of, kind_of
from jquant.plan.scales import check_qparams, quantizer_of
from jquant.text import format_table, near_or_known
from jquant.types import MIN_SCALE, CalibrationError, Model, Plan, QParams, QuantSpec

State = Literal[
    "float", "exact", "high precision", "float16", "follows", "fixed", "missing", "broken", "calibrated", "trained"
]


@dataclass(frozen=True, kw_only=True)
class ScaleState:
    """One value or weight.

    `state`   float; exact (a mask, index or pixel); high precision (an accumulator); float16 (an island); follows (the
              scale of its operand); fixed (by its spec); missing (not in qparams); broken (not finite, or a 0 that no
              calibration gives); calibrated (as observed, or as far as one can tell); trained (not as calibrated)
    `frozen`  labels keep the optimizer from its scale
    `note`    what else there is to say: a batch norm that is live or frozen, a scale that collapsed
    """

    name: str
    port: Literal["value", "weight"]
    format: str
    state: State
    frozen: bool = False
    note: str = ""


@dataclass(frozen=True)
class States:
    """The state of everything in a plan; `print` shows a table, `str(...)` the same."""

    rows: tuple[ScaleState, ...]

    def of(self, state: State) -> tuple[str, ...]:
        """The names in a state."""
        return tuple(row.name for row in self.rows if row.state == state)

    def counts(self) -> dict[str, int]:
        return dict(Counter(row.state for row in self.rows))

    def __str__(self) -> str:
        cells = [(r.name, r.port, r.format, r.state, "frozen" if r.frozen else "", r.note) for r in self.rows]
        return format_table(("name", "port", "format", "state", "optimizer", "note"), cells)


def find_states(model: Model, *, calibrated: Model | None = None, labels: Model | None = None) -> States:
    """Reads the state of every value and weight; changes and refuses nothing.

    Args:
      model: calibrated or not, or trained.
      calibrated: what `calibrate` returned, to tell trained scales from calibrated ones.
      labels: what `jq.labels` returned, to tell frozen ones.

    Example:
      print(jq.training.find_states(state.model, calibrated=model, labels=jq.labels(model, freeze=["stem.*"])))
    """
    plan, qparams, before = model.plan, model.qparams, None if calibrated is None else calibrated.qparams
    norms = {n.name: norm for n in kept_nodes(plan) if (norm := kept_batch_norm(n)) is not None}
    frozen = set() if labels is None else {n for n, label in labels.qparams.items() if label == "frozen"}
    rows = []
    for name, spec in [*plan.values.items(), *plan.weights.items()]:
        port: Literal["value", "weight"] = "weight" if name in plan.weights else "value"
        state, note = _state_of(name, spec, plan, qparams, before)
        if port == "value" and name in norms:
            norm = norms[name]
            kind = "frozen" if norm.statistics == "running" else "live"
            note = f"batch norm {kind}{', weight quantized scaled' if norm.scaled else ''}" + (note and f"; {note}")
        rows.append(
            ScaleState(
                name=name, port=port, format=format_of(plan, name), state=state, frozen=name in frozen, note=note
            )
        )
    return States(tuple(rows))


def _state_of(
    name: str, spec: QuantSpec | None, plan: Plan, qparams: QParams, calibrated: QParams | None
) -> tuple[State, str]:
    kind = kind_of(plan, name)
    if kind != "own":
        return kind, f"{plan.spec(name).fixed_scale:g}" if kind == "fixed" else ""
    assert spec is not None
    if name not in qparams:
        return "missing", ""
    return _found_state(name, spec, np.asarray(qparams[name]), None if calibrated is None else calibrated.get(name))


def _found_state(name: str, spec: QuantSpec, parameter: np.ndarray, calibrated: Any) -> tuple[State, str]:
    raw = parameter[0] if quantizer_of(spec).has_offset and parameter.ndim else parameter
    if not np.isfinite(parameter).all():
        return "broken", "not finite"
    if np.any(raw == 0):
        return "broken", "0: no calibration gives that"
    same = calibrated is None or np.array_equal(parameter, np.asarray(calibrated))
    scale = np.asarray(quantizer_of(spec).scale(jnp.asarray(parameter), spec))
    note = "collapsed: its data were 0" if scale.max() <= MIN_SCALE else ""
    return ("calibrated" if same else "trained"), note


def check_states(
    model: Model,
    mode: Mode,
    *,
    calibrated: Model | None = None,
    labels: Model | None = None,
    trained: Sequence[str] = (),
    collapsed: Sequence[str] = (),
) -> States:
    """The states, after a check that `mode` makes sense in them: call it before a run that takes hours.

    Args:
      model, calibrated, labels: as for `find_states`.
      mode: what is to be done: as for `jq.apply`.
      trained: patterns, as in a qconfig, of names whose scales training must have moved; needs `calibrated`.
      collapsed: patterns of values whose data are known to be 0 on the calibration batches.

    Raises:
      CalibrationError: a mode that quantizes, and a plan that does not; scales missing, never initialised, not finite,
        or of values that were 0 on all calibration data; scales named by `trained` that are as they were calibrated, or
        that are frozen, or whose quantizer gives them no gradient.

    Example:
      jq.training.check_states(state.model, "fake_quant", calibrated=model, trained=["*"])
    """
    check_mode(mode)
    states = find_states(model, calibrated=calibrated, labels=labels)
    if mode == "float":
        return states
    if not any(row.state not in ("float", "exact") for row in states.rows):
        raise CalibrationError(
            f"mode {mode!r} of a plan that quantizes nothing: every value and weight is float. Give the qconfig a rule "
            "such as {'*': jq.Policy(weight=jq.int8(axis='out'), output=jq.int8())}"
        )
    if missing := states.of("missing"):
        raise CalibrationError(
            f"mode {mode!r} before calibration: {_several(missing)} no scale yet. Call jq.calibrate(model, batches); "
            "mode 'float' needs none"
        )
    for row in states.rows:
        if row.state == "broken":
            raise CalibrationError(f"the scale of {row.name!r} is {row.note}; take the one that jq.calibrate made")
        known = any(matches(pattern, row.name) for pattern in collapsed)
        if row.note.endswith("were 0") and row.port == "value" and not known:
            raise CalibrationError(
                f"{row.name!r} was 0 on all calibration data, so its scale says nothing; calibrate with data that "
                f"reach it, give it a fixed scale, or pass collapsed=[{row.name!r}]"
            )
    check_qparams(model.plan, model.qparams)
    _check_trained(model.plan, states, calibrated, trained)
    return states


def _check_trained(plan: Plan, states: States, calibrated: Model | None, trained: Sequence[str]) -> None:
    if trained and calibrated is None:
        raise CalibrationError(
            "to tell trained scales from calibrated ones, pass calibrated=, what jq.calibrate returned"
        )
    named = [row for row in states.rows if row.state in ("calibrated", "trained")]
    fixed = {name for name in plan.trained if not quantizer_of(plan.spec(name)).trains_scale}
    for pattern in trained:
        found = [row for row in named if matches(pattern, row.name)]
        if not found:
            raise CalibrationError(f"{pattern!r} matches no scale{near_or_known(pattern, [r.name for r in named])}")
        still = [row.name for row in found if row.state == "calibrated"]
        if still and all(name in fixed for name in still):
            kind = quantizer_of(plan.spec(still[0])).name
            raise CalibrationError(
                f"not trained: {_several(tuple(still))} the calibrated scale; {kind} gives scales no gradient: take "
                "jq.lsq or jq.pact"
            )
        still = [name for name in still if name not in fixed]
        if still:
            frozen = any(row.frozen for row in found if row.name in still)
            why = "they are frozen by their labels" if frozen else "no step moved them: check the optimizer's labels"
            raise CalibrationError(f"not trained: {_several(tuple(still))} the calibrated scale; {why}")


def _several(names: tuple[str, ...]) -> str:
    shown = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} {'has' if len(names) == 1 else 'have'}"
