"""Fake-quant in plain user code: any pytree of weights, no graph, no plan."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jquant.calibration.observe import weight_scale_from_data
from jquant.config.qconfig import QConfig, matches
from jquant.plan.scales import quantizer_of
from jquant.text import did_you_mean
from jquant.types import Array, InputError, QConfigError, QParams, QuantSpec


def quantize_params(
    params: Any,
    qconfig: QConfig,
    *,
    qparams: QParams | None = None,
    channel_axis: int = -1,
    min_rank: int = 2,
) -> Any:
    """Puts the weights of a pytree on their integer grids, differentiably.

    A leaf is named by its path: keys, attributes and indices joined with ".", as in "encoder.layers.0.kernel". The
    weight policies of the qconfig are matched against these names; outputs and inputs do not exist here. Leaves that
    are no floating-point arrays, or of a lower rank than `min_rank` (biases, norms), stay as they are.

    Scales come from the weights themselves, by the spec's observer (min-max: max |w| fills the range), and are
    constants to the gradient. With `qparams` they are trained leaves instead. Works inside jit, grad, vmap, scan.

    Args:
      params: a pytree: dictionaries, NamedTuples, modules registered with jax; of flax, equinox, or your own.
      qconfig: patterns on leaf names to policies.
      qparams: {leaf name: parameter of its quantizer}, from `weight_qparams`, to train them beside the weights.
      channel_axis: the axis of output channels for specs with axis="out". The last one, as in JAX kernels
        [*K, in, out]; torch's [out, in, *K] has 0.
      min_rank: the smallest rank that counts as a weight.

    Returns:
      The same pytree with fake-quantized weights, dtypes as they were.

    Raises:
      QConfigError: a rule that names no leaf, or an operator type. InputError: qparams that do not fit.

    Example:
      >>> import jax.numpy as jnp, jquant as jq
      >>> from jquant.functions.weights import quantize_params
      >>> params = {"dense": {"kernel": jnp.array([[-1.0, 0.2], [0.3, 1.5]]), "bias": jnp.array([0.1, 0.2])}}
      >>> qconfig = jq.QConfig({"dense.*": jq.Policy(weight=jq.int2(axis="out"))})
      >>> out = quantize_params(params, qconfig)
      >>> [[round(v, 4) for v in row] for row in out["dense"]["kernel"].tolist()]  # scales 1 / 1.5 and 1.5 / 1.5
      [[-1.3333, 0.0], [0.0, 1.0]]
      >>> out["dense"]["bias"].tolist() == params["dense"]["bias"].tolist()
      True
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    named = [(_name(path), leaf) for path, leaf in leaves]
    specs = _weight_specs(named, qconfig, min_rank)
    own = _observed(named, specs, channel_axis) if qparams is None else _checked(qparams, specs)

    def quantized(name: str, leaf: Any) -> Any:
        if name not in specs:
            return leaf
        spec, weight = specs[name], jnp.asarray(leaf)
        parameter = _along(own[name] if name in own else _fixed(spec), spec, channel_axis, weight.ndim)
        return quantizer_of(spec)(weight.astype(jnp.float32), parameter, spec).astype(weight.dtype)

    return jax.tree_util.tree_unflatten(structure, [quantized(name, leaf) for name, leaf in named])


def weight_qparams(params: Any, qconfig: QConfig, *, channel_axis: int = -1, min_rank: int = 2) -> dict[str, Array]:
    """The parameter of every weight's quantizer, {leaf name: float32 array}, initialised from the weights.

    Args as for `quantize_params`, which takes the result as `qparams`: a pytree to be trained with the weights.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    named = [(_name(path), leaf) for path, leaf in leaves]
    return _observed(named, _weight_specs(named, qconfig, min_rank), channel_axis)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _weight_specs(named: list[tuple[str, Any]], qconfig: QConfig, min_rank: int) -> dict[str, QuantSpec]:
    """The spec of every leaf that is to be quantized."""
    if not isinstance(qconfig, QConfig):
        raise QConfigError(
            f"quantize_params takes a jq.QConfig, not {type(qconfig).__name__}: jq.QConfig({{pattern: policy}})"
        )
    names = [name for name, _ in named]
    for pattern in qconfig.rules:
        if pattern.startswith("type:"):
            raise QConfigError(f"qconfig rule {pattern!r}: a leaf of a pytree has no operator type; use its name")
        if not any(matches(pattern, name, "") for name in names):
            raise QConfigError(f"qconfig rule {pattern!r} matches no leaf{did_you_mean(pattern, names)}")
    specs = {}
    for name, leaf in named:
        spec = qconfig.policy(name, "").weight
        floating = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
        if spec is not None and floating and jnp.ndim(leaf) >= min_rank:
            specs[name] = spec
    return specs


def _is_trained(spec: QuantSpec) -> bool:
    return spec.fixed_scale is None and not spec.is_float


def _observed(named: list[tuple[str, Any]], specs: Mapping[str, QuantSpec], channel_axis: int) -> dict[str, Array]:
    found = {}
    for name, leaf in named:
        if name in specs and _is_trained(specs[name]):
            spec, weight = specs[name], jax.lax.stop_gradient(jnp.asarray(leaf).astype(jnp.float32))
            scale = weight_scale_from_data(weight, spec, channel_axis if spec.axis == "out" else None)
            found[name] = quantizer_of(spec).init(scale, spec)
    return found


def _checked(qparams: QParams, specs: Mapping[str, QuantSpec]) -> dict[str, Array]:
    wanted = {name for name, spec in specs.items() if _is_trained(spec)}
    if wrong := sorted(wanted ^ set(qparams)):
        state = "lacks" if wrong[0] in wanted else "has a leaf of no quantized weight,"
        raise InputError(
            f"qparams {state} {wrong[0]!r}{did_you_mean(wrong[0], wanted ^ {wrong[0]})}; make them with "
            "jq.functions.weight_qparams(params, qconfig)"
        )
    return dict(qparams)


def _fixed(spec: QuantSpec) -> Array:
    return jnp.float32(spec.fixed_scale or 1.0)


def _along(parameter: Array, spec: QuantSpec, axis: int, rank: int) -> Array:
    """A parameter [..., channels] shaped to broadcast along an axis of the weight."""
    if spec.axis != "out" or parameter.ndim == 0:
        return parameter
    return parameter.reshape(*parameter.shape[:-1], *(-1 if i == axis % rank else 1 for i in range(rank)))
