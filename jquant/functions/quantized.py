"""The whole way in one call: a function of params and inputs to its quantized counterpart, of the same signature."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, wraps
from typing import Any

import jax
import jax.numpy as jnp

from jquant.calibration.collection import calibrate
from jquant.config.qconfig import QConfig
from jquant.drafts.names import leaves_of, only_moves, source_of
from jquant.drafts.values import Known
from jquant.functions.trace.build import evaluate_params
from jquant.functions.trace.function import Traced, read
from jquant.graph.evaluate import host_array
from jquant.meanings.meaning import Mode
from jquant.ops.batch_norm import STATISTICS, BatchNorm
from jquant.plan.batch_norm import (
    BatchNormHandling,
    kept_batch_norm,
    kept_nodes,
    weights_to_quantize,
    with_statistics,
)
from jquant.plan.prepare import prepare
from jquant.plan.scales import expand_weight, quantizer_of
from jquant.program.lower import lower
from jquant.targets import NASH_E, find_target
from jquant.training.state import apply_train
from jquant.training.switching import Moved, Switches
from jquant.types import (
    Array,
    ConversionError,
    FrozenMap,
    Graph,
    InputError,
    Model,
    Params,
    Plan,
    Program,
    QConfigError,
    Target,
)

# {"params": the function's own pytree, "qparams": {name: trained scale}}, and "batch_stats", its running statistics
Variables = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class QuantizedFunction:
    """A fake-quantized function, `qfn(variables, *inputs)`, with what it was made of. See `quantize`.

    `plan`       the formats of every value and weight: `print(jq.explain(qfn.model(variables)))`
    `params_of`  the plan's params for (params, batch_stats) like those that were traced; differentiable
    """

    plan: Plan
    params_of: "Prepared" = field(repr=False)
    traced: Traced = field(repr=False)

    def __call__(self, variables: Variables, *inputs: Any, mode: Mode = "fake_quant", rngs: Any = None) -> Any:
        """The function on fake-quantized weights and values; or in another `mode` of `jq.apply_train`.

        Batch norm has its running statistics, folded as they ship: `train` is what takes those of the batch. Dropout
        is off, unless `rngs` has a key, as for `train`. Works inside jit, grad, vmap over inputs, scan, remat and
        shard_map, as the function itself does.
        """
        return self._apply(self._inference, variables, inputs, mode=mode, rngs=rngs)[0]

    def train(
        self,
        variables: Variables,
        *inputs: Any,
        mode: Mode = "fake_quant",
        rngs: Any = None,
        switches: Switches | None = None,
        step: Array | int = 0,
    ) -> tuple[Any, Any]:
        """The function in training: live batch norm normalizes with the statistics of the batch.

        Args:
          variables, *inputs: as for a call; each batch norm needs two values a channel, or more.
          mode: of `jq.apply_train`: "fake_quant", "tables", "bit_true" or "float".
          rngs: a PRNG key for dropout and stochastic depth, another one in each step; {"dropout": key} too. They draw
            from it, whatever key the function closes over. None leaves them off, as integers have them.
          switches: what is quantized and observed in which step, of
            `jq.training.switches(qfn.model(variables), ...)`; traced.
          step: of training; read by `switches` alone.

        Returns:
          The outputs, and `variables["batch_stats"]` with the running statistics moved (None where there are none). No
          gradient passes through them. `fn`'s conventions hold: `momentum` of `quantize`, and the biased variance.
          With `switches`, the outputs and a `Moved`, which has the observed scales as well; `update` takes either.

        Raises:
          InputError: variables of another function, or a key where the function was traced without dropout.
          GraphError: a batch of one value. QConfigError: switches of another plan or mode.

        Example:
          def loss(variables, x, y):
              logits, batch_stats = qfn.train(variables, x)
              return optax.softmax_cross_entropy(logits, y).mean(), batch_stats

          grads, batch_stats = jax.grad(loss, has_aux=True)(variables, x, y)
          updates, opt_state = tx.update(grads, opt_state)
          variables = qfn.update(optax.apply_updates(variables, updates), batch_stats)
        """
        options = {"mode": mode, "rngs": rngs, "switches": switches, "step": step}
        outputs, found = self._apply(self.plan, variables, inputs, **options)
        batch_stats, new = variables.get("batch_stats"), found.batch_stats if isinstance(found, Moved) else found
        moved = {key: new[key] for key in self._moving}
        batch_stats = _written(self._statistics, batch_stats, moved) if moved else batch_stats
        return outputs, found._replace(batch_stats=batch_stats) if isinstance(found, Moved) else batch_stats

    def update(self, variables: Variables, moved: Any) -> dict[str, Any]:
        """The variables that an optimizer made, with what `train` moved: running statistics, and scales observed.

        Args:
          variables: after the optimizer's step.
          moved: what `train` returned beside the outputs; from inside a gradient it comes as the auxiliary value.

        Returns:
          New variables; a scale that was observed in this step is as observed, whatever the optimizer made of it.

        Example:
          on = jq.training.switches(qfn.model(variables), values={"*": 1000}, observers={"*": (0, 1500)})

          @jax.jit
          def train_step(variables, opt_state, i, x, y):
              def loss(variables):
                  logits, moved = qfn.train(variables, x, switches=on, step=i)
                  return optax.softmax_cross_entropy(logits, y).mean(), moved

              grads, moved = jax.grad(loss, has_aux=True)(variables)
              updates, opt_state = tx.update(grads, opt_state, variables)
              return qfn.update(optax.apply_updates(variables, updates), moved), opt_state
        """
        self._check(variables)
        if isinstance(moved, Moved):
            variables = {**variables, "qparams": moved.in_qparams(variables["qparams"])}
            moved = moved.batch_stats
        return {**variables} if moved is None else {**variables, "batch_stats": moved}

    def lower(self, variables: Variables, **options: Any) -> Program:
        """The integer program: `jq.lower` of the plan with these variables."""
        return lower(self.model(variables), **options)

    def model(self, variables: Variables) -> Model:
        """The model with these variables, for what takes one: `jq.analysis.compare(qfn.model(variables), ...)`."""
        return Model(self.plan, self._plan_params(variables), variables["qparams"])

    def fake_quantized(self, variables: Variables) -> Any:
        """The function's own params with every quantized weight on its grid: a drop-in for serving in float.

        Where batch norm is folded, the kernel is quantized as it is folded and the folding undone. The running
        statistics to serve with are `variables["batch_stats"]` as they are.

        Raises:
          ConversionError: a weight that the function computes from several leaves, so that no leaf can hold it.
        """
        self._check(variables)
        own, batch_stats = variables["params"], variables.get("batch_stats")
        weights = {key: self.traced.params[key] for key in self.traced.params if key in self.plan.weights}
        for key, known in weights.items():
            if not only_moves(known):
                raise ConversionError(
                    f"weight {key!r} is computed from {', '.join(sorted(set(leaves_of(known))))}; no leaf can hold it "
                    "quantized. Leave it float with a rule of value None, or keep the quantized function"
                )

        def graph_params(params: Any) -> dict[str, Array]:
            return self.traced.graph_params(collections_of(params, batch_stats))

        found = graph_params(own)
        scaled, factors = self._as_quantized(found, weights)
        moved = {}
        for key in weights:
            spec, factor = self.plan.weights[key], factors[key]
            parameter = expand_weight(key, self.plan, variables["qparams"], scaled[key].ndim)
            quantized = quantizer_of(spec)(scaled[key], parameter, spec)
            moved[key] = jnp.where(factor == 0, found[key], quantized / jnp.where(factor == 0, 1, factor))
        return _written(lambda params: {key: graph_params(params)[key] for key in weights}, own, moved)

    def _apply(self, plan: Plan, variables: Variables, inputs: Any, *, rngs: Any, **options: Any) -> Any:
        options["rngs"] = _dropout_key(self.plan, rngs)
        model = Model(plan, self._plan_params(variables), variables["qparams"])
        outputs, moved = apply_train(model, *jax.tree.leaves(inputs), **options)
        return jax.tree.unflatten(self.traced.outputs, jax.tree.leaves(outputs)), moved

    def _plan_params(self, variables: Variables) -> dict[str, Array]:
        self._check(variables)
        return self.params_of(variables["params"], variables.get("batch_stats"))

    def _check(self, variables: Any) -> None:
        wanted = ["params", "qparams", *(["batch_stats"] if self.params_of.statistics else [])]
        if not isinstance(variables, Mapping) or not set(wanted) <= set(variables):
            shown = ", ".join(f"{name!r}: ..." for name in wanted)
            raise InputError(f"variables must be the mapping that jq.quantize returned: {{{shown}}}")

    @cached_property
    def _inference(self) -> Plan:
        return with_statistics(self.plan, "running") if kept_nodes(self.plan) else self.plan

    @cached_property
    def _moving(self) -> dict[str, Known]:
        """{key: where it comes from} of the running statistics that training moves."""
        found: dict[str, Known] = {}
        for node in kept_nodes(self.plan):
            norm = kept_batch_norm(node)
            assert norm is not None
            for key in (node.params[role] for role in STATISTICS if norm.statistics == "batch"):
                source = source_of(self.traced.params[key])
                if source is None or source[0] not in self.params_of.statistics:
                    raise ConversionError(
                        f"{key!r}, a running statistic of node {node.name!r}, is not in batch_stats, so that "
                        "training cannot move it; give fn the keyword batch_stats and pass quantize its value, or keep "
                        "the batch norm 'frozen' or 'fold'"
                    )
                found[key] = self.traced.params[key]
        return found

    def _statistics(self, batch_stats: Any) -> dict[str, Array]:
        leaves = dict(zip(self.params_of.statistics, jax.tree.leaves(batch_stats), strict=True))
        return evaluate_params(self._moving, leaves)

    def _as_quantized(self, graph_params: Params, keys: Iterable[str]) -> tuple[dict[str, Array], dict[str, Array]]:
        """Weights as they are quantized, and what batch norm multiplies each by: the derivative of a product."""
        ones = {k: jnp.ones_like(v) if k in keys else jnp.zeros_like(v) for k, v in graph_params.items()}
        return jax.jvp(self.params_of.to_quantize, (graph_params,), (ones,))


def _dropout_key(plan: Plan, rngs: Any) -> Array | None:
    """The key for dropout.

    Raises:
      InputError: a key that nothing would draw from, or several.
    """
    if isinstance(rngs, Mapping):
        if len(rngs) != 1:
            raise InputError(f"rngs has {', '.join(map(repr, rngs)) or 'no key'}; one key for dropout is wanted")
        (rngs,) = rngs.values()
    if rngs is not None and not any(node.op.stochastic for node in plan.graph.nodes):
        raise InputError(
            "rngs are for dropout, and the function was traced without any. Trace a model with its dropout on, by "
            "jq.flax.from_linen(..., dropout=True) or jq.flax.from_nnx(model, dropout=True); or leave rngs out"
        )
    key: Array | None = rngs
    return key


def _written(read: Callable[[Any], dict[str, Array]], own: Any, values: Mapping[str, Array]) -> Any:
    """`own` with other values of the elements that `read` takes; of values that share one, all are the same.

    `read` only moves elements, so its transpose puts them back.
    """
    raw, pull = jax.vjp(read, own)
    (moved,), (counts,) = pull(dict(values)), pull(jax.tree.map(jnp.ones_like, raw))

    def chosen(leaf: Any, value: Any, count: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jnp.where(count > 0, value / jnp.maximum(count, 1), leaf)

    return jax.tree.map(chosen, own, moved, counts)


def collections_of(params: Any, batch_stats: Any) -> Any:
    """The pytree that is traced: params, beside running statistics if there are any, as flax.linen has them."""
    if batch_stats is None:
        return params
    return {"params": params, "batch_stats": jax.lax.stop_gradient(batch_stats)}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `quantize` was asked for, beside the function, its params and data."""

    qconfig: QConfig
    target: Target
    batch_norm: BatchNormHandling | Mapping[str, BatchNormHandling]
    momentum: float
    dynamic_batch: bool

    def prepare(self, graph: Graph, params: Params) -> Model:
        return prepare(graph, params, self.qconfig, target=self.target, batch_norm=self.batch_norm)


@dataclass(frozen=True, eq=False)
class Prepared:
    """From the function's params to the plan's: read, then folded by `prepare`; traced by JAX once for each shape."""

    traced: Traced
    statistics: tuple[str, ...]  # the names of the leaves of batch_stats
    request: Request

    def model(self, params: Any, batch_stats: Any) -> Model:
        return self.request.prepare(self.traced.graph, self.traced.graph_params(collections_of(params, batch_stats)))

    def to_quantize(self, graph_params: Params) -> dict[str, Array]:
        model = self.request.prepare(self.traced.graph, graph_params)
        return weights_to_quantize(model.plan, model.params)

    def __call__(self, params: Any, batch_stats: Any = None) -> dict[str, Array]:
        return _plan_params(self, params, batch_stats)


def read_function(
    fn: Callable[..., Any], params: Any, inputs: Any, request: Request, *, batch_stats: Any, check: bool = True
) -> Prepared:
    """The function as a graph, with the momentum that was asked for. Arguments as for `quantize` and `trace`."""
    if not 0 <= request.momentum < 1:
        raise QConfigError(
            f"momentum {request.momentum}: the share of running statistics to keep is at least 0 and less than 1"
        )
    own = collections_of(params, batch_stats)
    fn = fn if batch_stats is None else _of_collections(fn)
    traced = read(fn, own, inputs, dynamic_batch=request.dynamic_batch, check=check)
    traced = replace(traced, graph=_with_momentum(traced.graph, 1 - request.momentum))
    statistics = traced.leaves[: len(jax.tree.leaves(batch_stats))]  # "batch_stats" sorts before "params"
    return Prepared(traced, statistics, request)


def quantized_function(prepared: Prepared, plan: Plan) -> QuantizedFunction:
    """The function of a plan that `prepare` made of it.

    Raises:
      ConversionError: a live batch norm whose statistics are not those of batch_stats.
    """
    qfn = QuantizedFunction(replace(plan, turned=_turned(plan, prepared.traced)), prepared, prepared.traced)
    _ = qfn._moving
    return qfn


def quantize(
    fn: Callable[..., Any],
    params: Any,
    qconfig: QConfig,
    batches: Iterable[Any],
    *,
    target: Target = NASH_E,
    dynamic_batch: bool = True,
    batch_norm: BatchNormHandling | Mapping[str, BatchNormHandling] = "fold",
    batch_stats: Any = None,
    momentum: float = 0.99,
) -> tuple[QuantizedFunction, dict[str, Any]]:
    """Traces, prepares and calibrates a function of JAX.

    Args:
      fn: `fn(params, *inputs)`, as for `jq.trace`, with running statistics: `fn(params, *inputs, batch_stats=...)`
        where batch_stats is given.
      params: its params.
      qconfig: patterns on the names of nodes, which are the paths of their weights, to policies.
      batches: calibration batches: an array, or a tuple of one for each input; read more than once, so no generator.
      target, dynamic_batch: as for `jq.prepare` and `jq.trace`.
      batch_norm: "fold", "live", "frozen" or "reverse_fold", or a mapping from names of batch norms, as for
        `jq.prepare`: what `qfn.train` does with batch norm. A live one needs its statistics in batch_stats.
      batch_stats: running mean and variance [C] of batch norms, a pytree: linen's collection, or
        `nnx.state(model, nnx.BatchStat)`.
      momentum: the share of the running statistics that a training step keeps, as in flax. Inference does not use it,
        so it cannot be read from `fn`.

    Returns:
      `qfn` and its variables, `{"params": params as given, "qparams": scales}` and "batch_stats" where given, one
      pytree: `qfn(variables, *inputs)` takes the place of `fn(params, *inputs)`, in a loss, in a linen TrainState, or
      behind `jq.flax.module`; `qfn.train(variables, *inputs)` returns new batch_stats too. Then `qfn.lower(variables)`
      is the integer program, and `qfn.fake_quantized(variables)` params for `fn` itself.

    Raises:
      ConversionError: as `trace`; or a live batch norm whose statistics are not those of batch_stats.
      QConfigError, CalibrationError: as `prepare` and `calibrate`; or a momentum that keeps nothing or all.

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
    batches = [tuple(jax.tree.map(partial(host_array, where="a calibration batch"), batch)) for batch in batches]
    if not batches:
        raise InputError("quantize needs at least one calibration batch")
    request = Request(
        qconfig=qconfig,
        target=find_target(target),
        batch_norm=batch_norm,
        momentum=momentum,
        dynamic_batch=dynamic_batch,
    )
    prepared = read_function(fn, params, batches[0], request, batch_stats=batch_stats)
    model = prepared.model(params, batch_stats)
    qfn = quantized_function(prepared, model.plan)  # raises before calibration takes its time
    model = calibrate(model.replace(plan=qfn.plan), [tuple(jax.tree.leaves(tuple(batch))) for batch in batches])
    collections = {} if batch_stats is None else {"batch_stats": batch_stats}
    return qfn, {"params": params, "qparams": model.qparams, **collections}


def _turned(plan: Plan, traced: Traced) -> FrozenMap[tuple[int, ...]]:
    """The weights that the graph has transposed, with the axes of the transposition."""
    own = [key for key, spec in plan.weights.items() if key in traced.params and quantizer_of(spec).any_order]
    axes = {key: traced.params[key].axes for key in own}
    return FrozenMap({key: found for key, found in axes.items() if found})


def _of_collections(fn: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(fn)  # the names of the inputs are read from its signature
    def of_collections(own: Any, *inputs: Any) -> Any:
        return fn(own["params"], *inputs, batch_stats=own["batch_stats"])

    return of_collections


def _with_momentum(graph: Graph, momentum: float) -> Graph:
    nodes = (
        replace(node, op=replace(node.op, momentum=momentum)) if isinstance(node.op, BatchNorm) else node
        for node in graph.nodes
    )
    return replace(graph, nodes=tuple(nodes))


@partial(jax.jit, static_argnums=0)
def _plan_params(prepared: Prepared, params: Any, batch_stats: Any) -> dict[str, Array]:
    return dict(prepared.model(params, batch_stats).params)
