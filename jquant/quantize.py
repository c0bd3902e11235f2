"""The whole way in one call: a function of params and inputs to its quantized counterpart, of the same signature."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jquant.apply import Mode
from jquant.calibrate import calibrate
from jquant.lower import lower
from jquant.prepare import prepare
from jquant.qat import apply_train
from jquant.qconfig import QConfig
from jquant.simulate import expand_weight, quantizer_of
from jquant.targets import NASH_E
from jquant.trace.function import Traced, read
from jquant.trace.names import leaves_of, only_moves
from jquant.types import Array, ConversionError, InputError, Params, Plan, Program, Target

Variables = Mapping[str, Any]  # {"params": the function's own pytree, "qparams": {name: trained scale}}


@dataclass(frozen=True, eq=False)
class QuantizedFunction:
    """A fake-quantized function, `qfn(variables, *inputs)`, with what it was made of. See `quantize`.

    `plan`       the formats of every value and weight: `print(jq.explain(qfn.plan))`
    `params_of`  the plan's params for a pytree like the one that was traced; differentiable
    """

    plan: Plan
    params_of: Callable[[Any], dict[str, Array]] = field(repr=False)
    traced: Traced = field(repr=False)

    def __call__(self, variables: Variables, *inputs: Any, mode: Mode = "qat", rngs: Array | None = None) -> Any:
        """The function on fake-quantized weights and values; or in another `mode` of `jq.apply_train`.

        Works inside jit, grad, vmap over inputs, scan, remat and shard_map, as the function itself does.
        """
        _check(variables)
        params = self.params_of(variables["params"])
        flat = jax.tree.leaves(inputs)
        outputs, _ = apply_train(self.plan, params, variables["qparams"], *flat, mode=mode, rngs=rngs)
        return jax.tree.unflatten(self.traced.outputs, jax.tree.leaves(outputs))

    def lower(self, variables: Variables, **options: Any) -> Program:
        """The integer program: `jq.lower` of the plan with these variables."""
        _check(variables)
        return lower(self.plan, self.params_of(variables["params"]), variables["qparams"], **options)

    def fake_quantized(self, variables: Variables) -> Any:
        """The function's own params with every quantized weight on its grid: a drop-in for serving in float.

        Where batch norm is folded, the kernel is quantized as it is folded and the folding undone.

        Raises:
          ConversionError: a weight that the function computes from several leaves, so that no leaf can hold it.
        """
        _check(variables)
        own = variables["params"]
        weights = {key: self.traced.params[key] for key in self.traced.params if key in self.plan.weights}
        for key, known in weights.items():
            if not only_moves(known):
                raise ConversionError(
                    f"weight {key!r} is computed from {', '.join(sorted(set(leaves_of(known))))}; no leaf can hold it "
                    "quantized. Leave it float with a rule of value None, or keep the quantized function"
                )

        def read_weights(params: Any) -> dict[str, Array]:
            found = self.traced.graph_params(params)
            return {key: found[key] for key in weights}

        raw, pull = jax.vjp(read_weights, own)
        factor = self._folded_factors(own, raw)
        prepared = self.params_of(own)
        moved = {}
        for key in weights:
            spec = self.plan.weights[key]
            parameter = expand_weight(key, self.plan, variables["qparams"], prepared[key].ndim)
            quantized = quantizer_of(spec)(prepared[key], parameter, spec)
            moved[key] = jnp.where(factor[key] == 0, raw[key], quantized / jnp.where(factor[key] == 0, 1, factor[key]))
        (values,), (counts,) = pull(moved), pull(jax.tree.map(jnp.ones_like, raw))
        return jax.tree.map(_chosen, own, values, counts)

    def _folded_factors(self, own: Any, raw: Params) -> dict[str, Array]:
        """What folding multiplies each element of a weight by: the derivative of a product."""
        found = self.traced.graph_params(own)
        ones = {k: jnp.ones_like(v) if k in raw else jnp.zeros_like(v) for k, v in found.items()}
        _, factors = jax.jvp(self.params_of.of_graph, (found,), (ones,))  # type: ignore[attr-defined]
        return {key: factors[key] for key in raw}


def _chosen(leaf: Any, value: Any, count: Any) -> Any:
    """The quantized elements of a leaf; of weights that share some, all give the same."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    return jnp.where(count > 0, value / jnp.maximum(count, 1), leaf)


def _check(variables: Any) -> None:
    if not isinstance(variables, Mapping) or not {"params", "qparams"} <= set(variables):
        raise InputError("variables must be the mapping that jq.quantize returned: {'params': ..., 'qparams': ...}")


@dataclass(frozen=True, eq=False)
class _Prepared:
    """From the function's params to the plan's: read, then folded by `prepare`; traced by JAX once for each shape."""

    traced: Traced
    qconfig: QConfig
    target: Target

    def plan(self, params: Any) -> tuple[Plan, dict[str, Array]]:
        return prepare(self.traced.graph, self.traced.graph_params(params), self.qconfig, target=self.target)

    def of_graph(self, graph_params: Params) -> dict[str, Array]:
        return prepare(self.traced.graph, graph_params, self.qconfig, target=self.target)[1]

    def __call__(self, params: Any) -> dict[str, Array]:
        return _folded(self, params)


def quantize(
    fn: Callable[..., Any],
    params: Any,
    qconfig: QConfig,
    batches: Iterable[Any],
    *,
    target: Target = NASH_E,
    dynamic_batch: bool = True,
) -> tuple[QuantizedFunction, dict[str, Any]]:
    """Traces, prepares and calibrates a function of JAX.

    Args:
      fn: `fn(params, *inputs)`, as for `jq.trace`.
      params: its params.
      qconfig: patterns on the names of nodes, which are the paths of their weights, to policies.
      batches: calibration batches: an array, or a tuple of one for each input; read more than once, so no generator.
      target, dynamic_batch: as for `jq.prepare` and `jq.trace`.

    Returns:
      `qfn` and its variables, `{"params": params as given, "qparams": scales}`, one pytree: `qfn(variables, *inputs)`
      takes the place of `fn(params, *inputs)`, in a loss, in a linen TrainState, or behind `jq.flax.module`. Then
      `qfn.lower(variables)` is the integer program, and `qfn.fake_quantized(variables)` params for `fn` itself.

    Raises:
      ConversionError, QConfigError, CalibrationError: as `trace`, `prepare` and `calibrate`.

    Example:
      >>> import jax.numpy as jnp, jquant as jq
      >>> def model(params, x):
      ...     return jnp.tanh(x @ params["dense"]["kernel"])
      >>> params = {"dense": {"kernel": jnp.array([[0.5, -1.0], [0.25, 2.0]])}}
      >>> x = jnp.array([[1.0, 0.5], [-0.5, 1.0]])
      >>> qconfig = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8())})
      >>> qfn, variables = jq.quantize(model, params, qconfig, [x])
      >>> bool(jnp.abs(qfn(variables, x) - model(params, x)).max() < 0.02)
      True
      >>> jq.run(qfn.lower(variables), x).shape
      (2, 2)
    """
    batches = [batch if isinstance(batch, tuple | list) else (batch,) for batch in batches]
    if not batches:
        raise InputError("quantize needs at least one calibration batch")
    traced = read(fn, params, batches[0], dynamic_batch=dynamic_batch)
    prepared = _Prepared(traced, qconfig, target)
    plan, plan_params = prepared.plan(params)
    qparams = calibrate(plan, plan_params, [tuple(jax.tree.leaves(tuple(batch))) for batch in batches])
    return QuantizedFunction(plan, prepared, traced), {"params": params, "qparams": qparams}


def _fold(prepared: _Prepared, params: Any) -> dict[str, Array]:
    return prepared.plan(params)[1]


_folded = jax.jit(_fold, static_argnums=0)
