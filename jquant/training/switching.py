"""Fake-quant and observers switched by pattern and step of training: data of a step, compiled once.

Without switches everything is quantized from the first step on, and calibration is the last that scales are observed.
With them a value or weight is quantized from some step on (delayed activation quantization), or never (partial freeze),
and scales follow the data of the quantized model until they are frozen.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.calibration.observe import observed_values
from jquant.calibration.samples import by_sample
from jquant.config.qconfig import matches
from jquant.graph.evaluate import Tap
from jquant.plan.scales import observer_of, parameter_of, quantizer_of
from jquant.text import near_or_known
from jquant.types import Array, Model, Plan, QConfigError, QParams, QuantSpec

NEVER, ALWAYS = (0, 0), (0, 2**31 - 1)
When = bool | int | tuple[int | None, int | None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Switches:
    """When what is on, as a pytree: make it by `switches`, and pass it to `apply_train` or the step of `make_step`.

    `fake_quant`  {value or weight: int32 [2]}: quantized in steps first <= step < last
    `observers`   {value: int32 [2]}: its scale follows the data in these steps
    `averaging`   float32 scalar: the share of the newest batch in a scale
    """

    fake_quant: dict[str, Array]
    observers: dict[str, Array]
    averaging: Array


class Moved(NamedTuple):
    """What a step with switches changes beside gradients; `TrainState.update` and `QuantizedFunction.update` take it.

    `batch_stats`  {name: running statistic of a batch norm}; of a quantized function, as in its variables
    `scales`       {value: its scale as observed, in the form of its quantizer}
    `observed`     {value: float32, 1 where the observer was on in this step}
    """

    batch_stats: Any
    scales: dict[str, Array]
    observed: dict[str, Array]

    def in_qparams(self, qparams: QParams) -> dict[str, Array]:
        """`qparams` with the scales that were observed in this step in the place of those that an optimizer made."""
        found = {name: jnp.where(self.observed[name] > 0.5, v, qparams[name]) for name, v in self.scales.items()}
        return {**qparams, **found}


def switches(
    model: Model,
    *,
    values: Mapping[str, When] | None = None,
    weights: Mapping[str, When] | None = None,
    observers: Mapping[str, When] | None = None,
    averaging: float = 0.01,
) -> Switches:
    """When fake-quant and observers of a model are on, by patterns as in a qconfig; later ones override earlier ones.

    What no pattern names is quantized in every step, and observed in none. `when` is True, False, a step from which on
    it is on, or a pair (first, last) of steps, last excluded, None for no end.

    An observed scale moves by `averaging` towards the one that its observer gives for the batch, which is computed with
    quantization before it: new = (1 - c) * old + c * batch, from the calibrated scale on. Meanwhile no gradient moves
    it. Scales of weights are not observed: a weight is known.

    Args:
      model: what `prepare` or `calibrate` returned.
      values: {pattern of values: when they are quantized}, by the names of a plan or of the float graph.
      weights: {pattern of parameters: when they, and the bias beside them, are on their grid}.
      observers: {pattern of values: when their scale follows the data}.
      averaging: c, in [0, 1]: 0 freezes, 1 takes the last batch alone.

    Raises:
      QConfigError: a pattern that matches nothing, with near names, or a `when` that is no time.

    Example:
      on = jq.training.switches(model, values={"*": 1000}, observers={"*": (0, 1500)})
      step = jq.training.make_step(loss)
      state, metrics = step(state, batch, switches=on)
    """
    if not 0 <= averaging <= 1:
        raise QConfigError(f"averaging must be in [0, 1], not {averaging!r}")
    plan = model.plan
    owned, weighted, observed = tuple(plan.owned), tuple(plan.weights), observed_values(plan)
    quantized = _times(plan, "values", values, owned, ALWAYS) | _times(plan, "weights", weights, weighted, ALWAYS)
    return Switches(
        {name: jnp.asarray(time, jnp.int32) for name, time in quantized.items()},
        {name: jnp.asarray(t, jnp.int32) for name, t in _times(plan, "observers", observers, observed, NEVER).items()},
        jnp.float32(averaging),
    )


def _times(
    plan: Plan, what: str, asked: Mapping[str, When] | None, names: Iterable[str], default: tuple[int, int]
) -> dict[str, tuple[int, int]]:
    found = dict.fromkeys(names, default)
    for pattern, when in (asked or {}).items():
        time = _time(what, pattern, when)
        chosen = [name for name in found if _is_named(plan, pattern, name)]
        if not chosen:
            near = near_or_known(pattern, [*found, *plan.renamed])
            kind = {"values": "quantized value", "weights": "quantized weight"}.get(what, "observed value")
            raise QConfigError(f"{what}: {pattern!r} matches no {kind}{near}")
        found |= dict.fromkeys(chosen, time)
    return found


def _is_named(plan: Plan, pattern: str, name: str) -> bool:
    """Whether a pattern selects a value or weight, by its name or by that of a node that was fused into it."""
    node = plan.graph.by_name.get(name)
    operator = "Input" if node is None else type(node.op).__name__
    call_of = "" if node is None else node.call_of
    older = (old for old, new in plan.renamed.items() if new == name)
    return matches(pattern, name, operator, call_of) or any(matches(pattern, old, "") for old in older)


def _time(what: str, pattern: str, when: When) -> tuple[int, int]:
    if isinstance(when, bool):
        return ALWAYS if when else NEVER
    first, last = (when, None) if isinstance(when, int | np.integer) else when if _is_pair(when) else (-1, None)
    first, last = 0 if first is None else int(first), ALWAYS[1] if last is None else int(last)
    if not 0 <= first <= last <= ALWAYS[1]:
        raise QConfigError(
            f"{what}: {pattern!r} is switched at {when!r}; give True, False, a first step, or (first step, last step)"
        )
    return first, last


def _is_pair(when: Any) -> bool:
    return (
        isinstance(when, tuple | list)
        and len(when) == 2
        and all(n is None or (isinstance(n, int | np.integer) and not isinstance(n, bool)) for n in when)
    )


# ---------------------------------------------------------------------------------------------------------------------
# In a step


def check_switches(plan: Plan, given: Any, mode: str) -> None:
    """Switches fit the plan and the mode.

    Raises:
      QConfigError: another mode than "fake_quant", no `Switches`, or switches of another plan.
    """
    if mode != "fake_quant":
        raise QConfigError(
            f"switches in mode {mode!r}: they are for mode 'fake_quant'. In 'float' nothing is quantized, and of the "
            "integer program nothing can be switched off"
        )
    if not isinstance(given, Switches):
        raise QConfigError(f"switches must be made by jq.training.switches(model, ...), not {type(given).__name__}")
    wanted = {*plan.owned, *plan.weights}
    if set(given.fake_quant) != wanted or set(given.observers) != set(observed_values(plan)):
        other = min(set(given.fake_quant) ^ wanted, default="an observer")
        raise QConfigError(
            f"switches of another plan: {other!r} is in one of the two; make them with jq.training.switches(model)"
        )


def on_at(times: Mapping[str, Array], step: Array) -> dict[str, Array]:
    """{name: bool scalar}: what is on in a step."""
    return {name: (time[0] <= step) & (step < time[1]) for name, time in times.items()}


def switched_tap(
    plan: Plan,
    scales: dict[str, Array],
    on: Mapping[str, Array],
    observing: Mapping[str, Array],
    averaging: Array,
    axes: Mapping[str, tuple[int, int]],
) -> Tap:
    """Observes and quantizes every value that has a scale of its own, where it is on.

    `scales` are the qparams of the step, `axes` those of the batch, from `batch_axes`. An observed one is replaced as
    soon as its value is there: everything behind it (its quantizer, the bias of the next layer) has the new one.
    """
    owned = set(plan.owned)

    def tap(name: str, value: Array) -> Array:
        if name not in owned:
            return value
        spec = plan.spec(name)
        if name in observing:
            new = observed_parameter(by_sample(value, axes.get(name)), scales[name], spec, averaging)
            scales[name] = jnp.where(observing[name], new, scales[name])
        quantized = quantizer_of(spec)(value, parameter_of(name, spec, scales), spec)
        return jnp.where(on[name], quantized, value) if name in on else quantized

    return tap


def observed_parameter(value: Array, old: Array, spec: QuantSpec, averaging: Array) -> Array:
    """A quantizer's parameter, moved towards that of the scale of a batch [1, samples, entries]. It has no gradient."""
    observer, quantizer = observer_of(spec), quantizer_of(spec)
    data = jax.lax.stop_gradient(value)
    data = data if observer.per_sample else data.reshape(1, -1)
    (scale,) = observer.finalize(observer.update(observer.init(1), data), spec)
    batch, old = quantizer.init(scale, spec), jax.lax.stop_gradient(old)
    mixed = (1 - averaging) * old + averaging * batch
    return mixed.at[1].set(old[1]) if quantizer.has_offset else mixed  # the offset is trained
