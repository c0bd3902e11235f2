"""Which quantizer, observer and scale every value and weight of a plan has."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.graph.checks import check_params, is_finite
from jquant.graph.operator import derived_scale
from jquant.numerics.namespace import real
from jquant.observers import min_max, nmse, percentile
from jquant.ops.movement import moved_scale
from jquant.quantizers import fake_quant, float16_cast, forward_mode
from jquant.text import did_you_mean
from jquant.types import (
    Array,
    CalibrationError,
    JQuantError,
    Model,
    Node,
    Observer,
    Plan,
    QParams,
    Quantizer,
    QuantSpec,
)


def quantizer_of(spec: QuantSpec) -> Quantizer:
    """The quantizer of a spec; a fixed scale is never trained, so it takes plain fake-quant.

    Where the spec cannot choose, it is the forward-mode twin, which serves both directions.
    """
    if spec.is_float:
        return forward_mode(float16_cast)
    if spec.fixed_scale is not None:
        return forward_mode(fake_quant)
    return spec.quantizer or fake_quant


def parameter_of(name: str, spec: QuantSpec, qparams: QParams) -> Array:
    if spec.fixed_scale is not None or spec.is_float:
        return real(spec.fixed_scale or 1.0)
    return qparams[name]


class Scales(Mapping[str, Array | None]):
    """The scale (real per LSB) of every value: scalar, per channel for an accumulator, None for float and exact.

    Each is computed when it is asked for, since a trace of hundreds that go unread takes seconds. `given` replaces
    some.
    """

    def __init__(self, plan: Plan, qparams: QParams, given: Mapping[str, Array | None] | None = None) -> None:
        self._plan, self._qparams, self._given = plan, qparams, {} if given is None else given
        self._owned = {name for name in plan.owned if not plan.spec(name).is_float}
        self._inputs = {entry.name for entry in plan.graph.inputs}

    def __getitem__(self, name: str) -> Array | None:
        if name in self._given:
            return self._given[name]
        if name in self._owned:
            return scale_of(name, self._plan, self._qparams)
        return None if name in self._inputs else self._follow(self._plan.graph.by_name[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._plan.graph.values)

    def __len__(self) -> int:
        return len(self._plan.graph.values)

    def _follow(self, node: Node) -> Array | None:
        """The scale of a value that has none of its own."""
        plan = self._plan
        spec = plan.values[node.name]
        if spec is None or spec.is_float:
            return None
        numbers = [v for v in node.inputs if v not in plan.exact]
        operands = [scale for v in numbers if (scale := self[v]) is not None]
        weights = {r: scale_of(k, plan, self._qparams) for r, k in node.params.items() if k in plan.weights}
        if len(operands) < len(numbers) or not all(r in weights for r in node.op.weight_roles):
            return None
        if node.name in plan.moved:
            return moved_scale(node.op, operands[0], plan.moved[node.name])
        if node.op.scale_rule == "same_as_input":
            return operands[0]
        return derived_scale(node.op, *operands, **weights)


def value_scales(plan: Plan, qparams: QParams) -> dict[str, Array | None]:
    """`Scales`, all computed."""
    found: dict[str, Array | None] = {}
    scales = Scales(plan, qparams, given=found)
    for name in plan.graph.values:
        found[name] = scales[name]
    return found


def scale_of(name: str, plan: Plan, qparams: QParams) -> Array:
    """The scale of a value or weight that owns one, as the integer program will use it."""
    spec = plan.spec(name)
    return quantizer_of(spec).scale(parameter_of(name, spec, qparams), spec)


def check_model(model: Any, *, scales: bool = True) -> None:
    """A model has every parameter and, with `scales`, every scale of its plan.

    Raises:
      JQuantError: something else than a model. GraphError: parameters missing or not float32.
      CalibrationError: values that are not finite, or scales missing or broken.
    """
    check_is_model(model)
    check_params(model.plan.graph, model.params)
    if scales:
        check_qparams(model.plan, model.qparams)


def check_is_model(model: Any) -> None:
    """Raises JQuantError for something else than a model."""
    if not isinstance(model, Model):
        raise JQuantError(f"a jq.Model is wanted, as jq.prepare returns it, not {type(model).__name__}")


def check_qparams(plan: Plan, qparams: QParams) -> None:
    """Every scale is there, float32 and finite; its quantizer makes it positive.

    Raises:
      CalibrationError: what is missing or wrong, and how to get it.
    """
    if not isinstance(qparams, Mapping):
        raise CalibrationError(
            f"qparams must be a mapping of name to scale, not {type(qparams).__name__}; call jq.calibrate"
        )
    wanted = plan.trained
    missing = [n for n in wanted if n not in qparams]
    if missing:
        shown = ", ".join(map(repr, missing[:3])) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise CalibrationError(f"no scale for {shown}; call jq.calibrate(model, batches) first")
    extra = [n for n in qparams if n not in wanted]
    if extra:
        raise CalibrationError(
            f"qparams has {extra[0]!r}, which the plan does not{did_you_mean(extra[0], wanted)}; calibrate this plan"
        )
    for name in wanted:
        if getattr(qparams[name], "dtype", None) != jnp.float32:
            raise CalibrationError(f"the scale of {name!r} is not a float32 array")
        if not is_finite(qparams[name]):
            raise CalibrationError(
                f"the scale of {name!r} is not finite; lower the learning rate of the scales, or calibrate again"
            )
        if not isinstance(qparams[name], jax.core.Tracer) and _unset(plan.spec(name), np.asarray(qparams[name])):
            raise CalibrationError(f"the scale of {name!r} is 0: it was never set; call jq.calibrate")


def _unset(spec: QuantSpec, parameter: np.ndarray) -> bool:
    """Whether a scale is 0, which no calibration gives; an offset beside it may be."""
    raw = parameter[:1] if quantizer_of(spec).has_offset and parameter.ndim else parameter
    return bool((raw == 0).any())


def expand_weight(key: str, plan: Plan, qparams: QParams, rank: int) -> Array:
    """The quantizer parameter of a weight, shaped to broadcast against it."""
    parameter = parameter_of(key, plan.weights[key], qparams)
    if parameter.ndim == 0 or key not in plan.weight_axis:
        return parameter
    axis, leading = plan.weight_axis[key], parameter.shape[:-1]  # LSQ+ has [2, channels]
    return parameter.reshape(*leading, *(-1 if i == axis else 1 for i in range(rank)))


PACT_SHARE = 99.9  # percent of the samples that PACT's first threshold lies above


def observer_of(spec: QuantSpec) -> Observer:
    """The observer of a value."""
    return _observer(spec, nmse())


def weight_observer_of(spec: QuantSpec) -> Observer:
    """The observer of a weight."""
    return _observer(spec, min_max())


def _observer(spec: QuantSpec, default: Observer) -> Observer:
    """PACT starts below the peak: where nothing is clipped, its threshold has no gradient."""
    if spec.observer is None and spec.quantizer is not None and spec.quantizer.name == "pact":
        return percentile(PACT_SHARE)
    return spec.observer or default
