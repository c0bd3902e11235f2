"""Quantization-aware training as plain functions of pytrees; the optimizer is any optax chain."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jquant.calibration.samples import batch_axes
from jquant.config.qconfig import matches
from jquant.graph.evaluate import bind_inputs
from jquant.graph.float import float_rule
from jquant.graph.loops import MANY_BLOCKS
from jquant.graph.structure import nested_outputs
from jquant.meanings.apply import Outputs, evaluate_mode, selected_values
from jquant.meanings.bit_true import replaced, select_nodes
from jquant.meanings.fake_quant import fake_quant_rule, fake_quant_tap
from jquant.meanings.meaning import Meaning, Mode, check_mode, with_tables
from jquant.plan.batch_norm import (
    fold_kept,
    kept_batch_norm,
    kept_nodes,
    norm_params,
    split_batch_stats,
    statistics_rule,
    untrained,
)
from jquant.plan.scales import check_is_model, check_model
from jquant.text import did_you_mean, near_or_known
from jquant.training.optimizer_state import check_optimizer_state
from jquant.training.switching import Moved, Switches, check_switches, on_at, switched_tap
from jquant.types import Array, FrozenMap, Graph, JQuantError, Model, Params, QConfigError


def apply_train(
    model: Model,
    *inputs: Array,
    batch_stats: Params | None = None,
    rngs: Array | None = None,
    mode: Mode = "fake_quant",
    bit_true: str | Sequence[str] = "*",
    switches: Switches | None = None,
    step: Array | int = 0,
) -> tuple[Outputs, Any]:
    """Evaluates a model in training: stochastic operators are active where `rngs` is given, live batch norm is live.

    In mode "bit_true" the value is that of the integer program, which has the running statistics folded in; gradient
    and new statistics are those of mode "fake_quant", so with live batch norm those of the batch.

    Args:
      model: what `calibrate` returned, or `state.trainable`.
      *inputs, bit_true: as for `jq.apply`.
      batch_stats: running statistics of the batch norms that `prepare` kept, if they are not among the model's params;
        other entries are returned as they came.
      rngs: a PRNG key for dropout; None leaves dropout inactive.
      mode: "fake_quant", "tables", "bit_true" or "float".
      switches: what is quantized and observed in which step, made by `jq.training.switches`; traced, so that other
        switches need no other compilation. For mode "fake_quant".
      step: of training, `state.step`; read by `switches` alone.

    Returns:
      Outputs and new batch statistics. With `switches`, outputs and `Moved`, which has the observed scales as well;
      `TrainState.update` takes either.

    Raises:
      QConfigError: switches of another plan or mode.
      JQuantError: an unknown mode, or "bit_true" with active dropout (integers have no dropout).

    Example:
      >>> import jax.numpy as jnp, jquant as jq
      >>> x, weights = jnp.array([[1.0, 0.5], [-0.25, 0.75]]), {"w": jnp.array([[0.5, 1.0], [-1.0, 0.25]])}
      >>> graph, params = jq.trace(lambda p, x: x @ p["w"], weights, x)
      >>> model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target="nash-e")
      >>> model = jq.calibrate(model, [x])
      >>> output, statistics = jq.apply_train(model, x)
      >>> output.shape, statistics  # no batch norm was kept
      ((2, 2), {})
    """
    return apply_train_with_taps(
        model,
        *inputs,
        batch_stats=batch_stats,
        rngs=rngs,
        mode=mode,
        bit_true=bit_true,
        switches=switches,
        step=step,
        taps=None,
    )[:2]


def apply_train_with_taps(
    model: Model,
    *inputs: Array,
    batch_stats: Params | None = None,
    rngs: Array | None = None,
    mode: Mode = "fake_quant",
    bit_true: str | Sequence[str] = "*",
    switches: Switches | None = None,
    step: Array | int = 0,
    taps: str | None = "*",
) -> tuple[Outputs, Any, dict[str, Array]]:
    """Like `jq.apply_train`, with {name: value} as a third result, for the values whose names match the glob `taps`.

    `taps=None` gives the outputs alone. Gradients pass through what is returned.

    Example:
      outputs, stats, values = jq.training.apply_train_with_taps(state.trainable, x, taps="stage*.add")
    """
    check_mode(mode)
    check_is_model(model)
    stats = {key: v for key, v in (batch_stats or {}).items() if key in model.plan.graph.param_names}
    model = model.replace(params={**model.params, **stats})
    check_model(model, scales=mode != "float")
    plan, params = model.plan, model.params
    selected = select_nodes(plan, mode, bit_true)
    if mode == "bit_true" and rngs is not None and any(node.op.stochastic for node in plan.graph.nodes):
        raise JQuantError(
            "mode 'bit_true' with dropout: the deployed integers have none. Leave rngs out, or use mode 'fake_quant'"
        )
    bound = bind_inputs(plan.graph, inputs)
    held = {key: params[key] for key in untrained(plan)}
    if switches is not None:
        check_switches(plan, switches, mode)
        values, changed = evaluate_switched(model, bound, rngs, switches, jnp.asarray(step))
        batch_stats = {**(batch_stats or {}), **held, **changed.batch_stats}
        return (
            _outputs(plan.graph, values),
            changed._replace(batch_stats=batch_stats),
            selected_values(plan.graph, values, taps),
        )
    if all(norm.statistics == "running" for node in kept_nodes(plan) if (norm := kept_batch_norm(node))):
        values = evaluate_mode(model, mode, bound, rngs, selected, outputs_alone=taps is None, blocks=MANY_BLOCKS)
        moved = dict[str, Array]()
    else:
        values, moved = evaluate_training(model, mode, bound, rngs, selected)
    stats = {**(batch_stats or {}), **held, **moved}
    return _outputs(plan.graph, values), stats, selected_values(plan.graph, values, taps)


def _outputs(graph: Graph, values: Mapping[str, Array]) -> Outputs:
    return nested_outputs(graph, [values[name] for name in graph.outputs])


@partial(jax.jit, static_argnames=("mode", "selected"))
def evaluate_training(
    model: Model,
    mode: Mode,
    inputs: dict[str, Array],
    rng: Array | None,
    selected: tuple[str, ...] | None,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """All values with live batch norm, and the moved running statistics."""
    new_stats: dict[str, Array] = {}
    values = training_meaning(model, mode, rng, new_stats).values(inputs)
    if mode == "bit_true":
        exact = jax.lax.stop_gradient(evaluate_mode(model, mode, inputs, None, selected))
        values = {name: replaced(value, exact[name]) for name, value in values.items()}
    return values, new_stats


@jax.jit
def evaluate_switched(
    model: Model,
    inputs: dict[str, Array],
    rng: Array | None,
    given: Switches,
    step: Array,
) -> tuple[dict[str, Array], Moved]:
    """All values of mode "fake_quant" where fake-quant and observers are on in this step, and what moves."""
    new_stats: dict[str, Array] = {}
    on, observing = on_at(given.fake_quant, step), on_at(given.observers, step)
    plan, kept = model.plan, fold_kept(model, only="running")
    folded, params, scales = kept.plan, kept.params, dict(kept.qparams)
    for old, new in zip(plan.graph.nodes, folded.graph.nodes, strict=True):  # a folded weight may have another key
        on |= {new.params[role]: on[old.params[role]] for role in new.op.weight_roles if old.params[role] in on}
    if folded is not plan:  # folding puts a few weights on their grid, as the integers round them
        bare = replace(plan, weights=FrozenMap(), weight_axis=FrozenMap())
        plain = fold_kept(Model(bare, model.params), only="running").params
        params = {key: jnp.where(on[key], v, plain[key]) if key in on else v for key, v in params.items()}
    base = fake_quant_rule(folded, params, scales, rng, on=on)
    rule = statistics_rule(folded, params, scales, base, new_stats, on)
    axes = batch_axes(folded, params, inputs)
    tap = switched_tap(folded, scales, on, observing, given.averaging, axes)
    values = Meaning(folded.graph, rule, tap).values(inputs)
    moved = {name: jax.lax.stop_gradient(scales[name]) for name in observing}
    return values, Moved(new_stats, moved, {name: active.astype(jnp.float32) for name, active in observing.items()})


def training_meaning(model: Model, mode: Mode, rng: Array | None, new_stats: dict[str, Array]) -> Meaning:
    """The meaning of a model in training: of its gradient, in mode "bit_true".

    Frozen batch norm is folded, live one is at its node; `new_stats` gets the statistics that move.
    """
    if mode == "float":
        plan, params = model.plan, model.params
        rule = statistics_rule(plan, params, None, float_rule(plan.graph, params, rng), new_stats)
        return Meaning(plan.graph, rule)
    model = fold_kept(model, only="running")
    plan, params, qparams = model.plan, model.params, model.qparams
    base = fake_quant_rule(plan, params, qparams, rng)
    base = with_tables(model, base) if mode == "tables" else base
    rule = statistics_rule(plan, params, qparams, base, new_stats)
    return Meaning(plan.graph, rule, fake_quant_tap(plan, qparams))


Freeze = Sequence[str] | Mapping[str, Sequence[str]]
KINDS = ("weight", "batch_norm", "scale")


def labels(model: Model, *, freeze: Freeze = ()) -> Model:
    """Labels for `optax.multi_transform`, of everything that is trained.

    "weight" for parameters, "batch_norm" for weight and bias of batch norms that `prepare` kept, "scale" for qparams,
    and "frozen" for what `freeze` names.

    Args:
      model: what `prepare` or `calibrate` returned.
      freeze: patterns, as in a qconfig, on names of parameters and values; all that match are frozen. Or a mapping from
        "weight", "batch_norm" and "scale" to patterns, to freeze that kind only: `{"scale": ["stem.*"],
        "batch_norm": ["*"]}`. The statistics of a batch norm are frozen in the plan, by
        `jq.training.set_batch_statistics`.

    Returns:
      A tree of the form of `state.trainable`: a `Model` with labels in the place of arrays.

    Raises:
      QConfigError: an unknown kind, or a pattern that matches nothing of its kind.

    Example:
      >>> import jax.numpy as jnp, jquant as jq
      >>> x, weights = jnp.array([[1.0, 0.5], [-0.25, 0.75]]), {"w": jnp.array([[0.5, 1.0], [-1.0, 0.25]])}
      >>> graph, params = jq.trace(lambda p, x: x @ p["w"], weights, x)
      >>> model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target="nash-e")
      >>> model = jq.calibrate(model, [x])
      >>> jq.labels(model, freeze={"scale": ["x"]}).qparams
      {'x': 'frozen', 'w': 'scale'}
    """
    plan = model.plan
    apart, norms = set(untrained(plan)), set(norm_params(plan))
    kinds = {name: "batch_norm" if name in norms else "weight" for name in plan.graph.param_names if name not in apart}
    params, scales = [*kinds.items()], [(name, "scale") for name in plan.trained]
    found = frozen_labels([*params, *scales], freeze, KINDS)
    return Model(
        plan,
        {name: found[name, kind] for name, kind in params},  # type: ignore[misc]
        {name: found[name, kind] for name, kind in scales},  # type: ignore[misc]
    )


def frozen_labels(named: Sequence[tuple[str, str]], freeze: Freeze, known: Sequence[str]) -> dict[tuple[str, str], str]:
    """{(name, kind): label} of names with their kinds: the kind, or "frozen" where `freeze` names it.

    Raises:
      QConfigError: a kind that is not `known`, or a pattern that matches nothing of its kind.
    """
    by_kind = freeze if isinstance(freeze, Mapping) else {"": freeze}
    for kind, patterns in by_kind.items():
        if kind not in ("", *known):
            raise QConfigError(f"freeze kind {kind!r}; known: {', '.join(known)}{did_you_mean(kind, known)}")
        names = [name for name, own in named if kind in ("", own)]
        for pattern in patterns:
            if not any(matches(pattern, n) for n in names):
                what = f"freeze pattern {pattern!r} matches no{f' {kind}' if kind else 'thing'}"
                raise QConfigError(f"{what}{near_or_known(pattern, names)}")

    def label(name: str, kind: str) -> str:
        patterns = (*by_kind.get("", ()), *by_kind.get(kind, ()))
        return "frozen" if any(matches(p, name) for p in patterns) else kind

    return {(name, kind): label(name, kind) for name, kind in named}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a training step changes, as one pytree.

    `trainable` is what gradients are taken of: the model without the running statistics of the batch norms that
    `prepare` kept, which `batch_stats` holds. `model` is both together, which is what `jq.apply` and `jq.lower` take.

    Example:
      state = jq.TrainState.create(model, tx=optax.adam(1e-4))

      def loss(trainable, x):
          y, batch_stats = jq.apply_train(trainable, x, batch_stats=state.batch_stats)
          return jnp.mean(y**2), batch_stats

      grads, batch_stats = jax.grad(loss, has_aux=True)(state.trainable, x)
      state = state.update(grads, batch_stats)
    """

    step: Array
    trainable: Model
    batch_stats: dict[str, Array]
    opt_state: Any
    tx: Any = field(metadata={"static": True})

    @classmethod
    def create(cls, model: Model, *, tx: Any, opt_state: Any = None) -> "TrainState":
        """Checks the model and initialises the optimizer, `tx`, on what is trained.

        Args:
          model: calibrated.
          tx: an optax chain.
          opt_state: a state of `tx` to go on with, as `jq.training.migrate_optimizer_state` makes one.

        Raises:
          CalibrationError: scales missing or broken. JQuantError: a state that was made for other parameters.
        """
        check_model(model)
        # Copies, so that a step which gives the memory of its state away takes nothing from the caller.
        trainable, batch_stats = jax.tree.map(jnp.array, split_batch_stats(model))
        if opt_state is None:
            opt_state = tx.init(trainable)
        else:
            check_optimizer_state(tx, opt_state, trainable)
        return cls(jnp.int32(0), trainable, batch_stats, opt_state, tx)

    @property
    def model(self) -> Model:
        """The whole model, running statistics included."""
        return self.trainable.replace(params={**self.trainable.params, **self.batch_stats})

    def update(self, grads: Model, batch_stats: dict[str, Array] | Moved | None = None) -> "TrainState":
        """One optimizer step; `batch_stats` are what `apply_train` returned. Observed scales are as observed."""
        # Optimizers mix integer counts with floats: a user's strict dtype promotion is not for their code.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = self.tx.update(grads, self.opt_state, self.trainable)
        trainable = jax.tree.map(lambda p, u: p + u.astype(p.dtype), self.trainable, updates)
        if isinstance(batch_stats, Moved):
            trainable = trainable.replace(qparams=batch_stats.in_qparams(trainable.qparams))
        found = batch_stats.batch_stats if isinstance(batch_stats, Moved) else batch_stats
        stats = self.batch_stats if found is None else found
        return TrainState(self.step + 1, trainable, stats, opt_state, self.tx)
