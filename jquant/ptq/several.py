"""Several observers in one pass over the data."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from jquant.calibration.observe import Stats, finalize_with, observed_values
from jquant.plan.scales import observer_of
from jquant.types import Array, FrozenMap, Model, Observer, Plan, QuantSpec


def watched_by(plan: Plan, others: Sequence[Observer]) -> Plan:
    """The plan with its own observer and the others, side by side, on every value that is observed."""
    joint = {n: replace(s, observer=_side_by_side((observer_of(s), *others))) for n, s in _specs(plan).items()}
    return replace(plan, values=FrozenMap({**plan.values, **joint}))


def scales_by(model: Model, stats: Stats, index: int, method: Observer | None = None) -> Model:
    """The model with scales from the statistics of one observer, 0 being its own.

    `stats` are of the plan of `watched_by`. `method`, another observer that keeps the
    same statistics, finalizes them in its place.
    """
    states = {name: state[index] for name, state in stats.items()}
    methods = {n: method or observer_of(s) for n, s in _specs(model.plan).items()}
    return finalize_with(model, states, methods)


def _specs(plan: Plan) -> dict[str, QuantSpec]:
    return {name: plan.spec(name) for name in observed_values(plan)}


@cache
def _side_by_side(observers: tuple[Observer, ...]) -> Observer:
    def init(channels: int) -> tuple[Any, ...]:
        return tuple(observer.init(channels) for observer in observers)

    def update(states: tuple[Any, ...], x: Array) -> tuple[Any, ...]:
        flat = x.reshape(x.shape[0], -1)
        return tuple(o.update(s, x if o.per_sample else flat) for o, s in zip(observers, states, strict=True))

    def finalize(states: tuple[Any, ...], spec: QuantSpec) -> Array:
        return observers[0].finalize(states[0], spec)

    return Observer(init, update, None, finalize, name=" and ".join(o.name for o in observers), per_sample=True)
