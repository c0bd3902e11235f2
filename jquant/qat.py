"""Quantization-aware training as plain functions of pytrees; the optimizer is any optax chain."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jquant.apply import Mode, Outputs, check_mode, evaluate_mode, table_rule, unpack
from jquant.batch_norm import (
    fold_kept,
    kept_batch_norm,
    kept_nodes,
    norm_params,
    split_batch_stats,
    statistics_rule,
    untrained,
)
from jquant.bit_true import replaced, select_nodes
from jquant.ir.evaluate import Rule, Tap, bind_inputs, evaluate
from jquant.ir.graph import check_params
from jquant.optimizer_state import check_optimizer_state
from jquant.simulate import check_qparams, fake_quant_rule, fake_quant_tap, float_rule
from jquant.text import did_you_mean
from jquant.types import Array, Graph, JQuantError, Params, Plan, QConfigError, QParams


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Trainable:
    """What gradients are taken of: the parameters, and the scales beside them."""

    params: dict[str, Array]
    qparams: dict[str, Array]


def apply_train(
    plan: Plan,
    params: Params,
    qparams: QParams,
    *inputs: Array,
    batch_stats: Params | None = None,
    rngs: Array | None = None,
    mode: Mode = "qat",
    bit_true: str | Sequence[str] = "*",
) -> tuple[Outputs, dict[str, Array]]:
    """Evaluates a plan in training: stochastic operators are active where `rngs` is given, live batch norm is live.

    In mode "bit_true" the value is that of the integer program, which has the running statistics folded in; gradient
    and new statistics are those of mode "qat", so with live batch norm those of the batch.

    Args:
      plan, params, qparams, *inputs, bit_true: as for `jq.apply`.
      batch_stats: running statistics of the batch norms that `prepare` kept, if they are not in `params`; other entries
        are returned as they came.
      rngs: a PRNG key for dropout; None leaves dropout inactive.
      mode: "qat", "bit_true" or "float".

    Returns:
      Outputs and new batch statistics.

    Raises:
      JQuantError: an unknown mode, or "bit_true" with active dropout (integers have no dropout).
    """
    check_mode(mode)
    selected = select_nodes(plan, mode, bit_true)
    if mode == "bit_true" and rngs is not None and any(node.op.stochastic for node in plan.graph.nodes):
        raise JQuantError(
            "mode 'bit_true' with dropout: the deployed integers have none. Leave rngs out, or use mode 'qat'"
        )
    params = {**params, **{key: v for key, v in (batch_stats or {}).items() if key in plan.graph.param_names}}
    check_params(plan.graph, params)
    if mode not in ("float", "calibration"):
        check_qparams(plan, qparams)
    bound = bind_inputs(plan.graph, inputs)
    if all(norm.statistics == "running" for node in kept_nodes(plan) if (norm := kept_batch_norm(node))):
        outputs = evaluate_mode(plan, mode, params, dict(qparams), bound, rngs, selected, outputs_alone=True)
        values, moved = outputs, dict[str, Array]()
    else:
        values, moved = evaluate_training(plan, mode, params, dict(qparams), bound, rngs, selected)
    held = {key: params[key] for key in untrained(plan)}
    return unpack([values[name] for name in plan.graph.outputs]), {**(batch_stats or {}), **held, **moved}


@partial(jax.jit, static_argnames=("plan", "mode", "selected"))
def evaluate_training(
    plan: Plan,
    mode: Mode,
    params: Params,
    qparams: QParams,
    inputs: dict[str, Array],
    rng: Array | None,
    selected: tuple[str, ...] | None,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """All values with live batch norm, and the moved running statistics."""
    new_stats: dict[str, Array] = {}
    graph, rule, tap = training_rule(plan, mode, params, qparams, rng, new_stats)
    values = evaluate(graph, inputs, rule, tap)
    if mode == "bit_true":
        exact = jax.lax.stop_gradient(evaluate_mode(plan, mode, params, qparams, inputs, None, selected))
        values = {name: replaced(value, exact[name]) for name, value in values.items()}
    return values, new_stats


def training_rule(
    plan: Plan, mode: Mode, params: Params, qparams: QParams, rng: Array | None, new_stats: dict[str, Array]
) -> tuple[Graph, Rule, Tap]:
    """Graph, rule and tap of training, for `evaluate`: of its gradient, in mode "bit_true".

    Frozen batch norm is folded, live one is at its node; `new_stats` gets the statistics that move.
    """
    if mode in ("float", "calibration"):
        rule = statistics_rule(plan, params, None, float_rule(plan.graph, params, rng), new_stats)
        return plan.graph, rule, lambda name, value: value
    plan, params, qparams = fold_kept(plan, params, qparams, only="running")
    base = (table_rule if mode == "pre_export" else fake_quant_rule)(plan, params, qparams, rng)
    return plan.graph, statistics_rule(plan, params, qparams, base, new_stats), fake_quant_tap(plan, qparams)


Freeze = Sequence[str] | Mapping[str, Sequence[str]]
KINDS = ("weight", "batch_norm", "scale")


def labels(plan: Plan, *, freeze: Freeze = ()) -> Trainable:
    """Labels for `optax.multi_transform`, of everything that is trained.

    "weight" for parameters, "batch_norm" for weight and bias of batch norms that `prepare` kept, "scale" for qparams,
    and "frozen" for what `freeze` names.

    Args:
      plan: what `prepare` returned.
      freeze: globs on parameter and value names; everything that matches is frozen. Or a mapping from "weight",
        "batch_norm" and "scale" to globs, to freeze that kind only: `{"scale": ["stem.*"], "batch_norm": ["*"]}`. The
        statistics of a batch norm are frozen in the plan: `jq.set_batch_statistics(plan, "running", ["stem.*"])`.

    Raises:
      QConfigError: an unknown kind, or a pattern that matches nothing of its kind.
    """
    apart, norms = set(untrained(plan)), set(norm_params(plan))
    kinds = {name: "batch_norm" if name in norms else "weight" for name in plan.graph.param_names if name not in apart}
    by_kind = freeze if isinstance(freeze, Mapping) else {"": freeze}
    for kind, patterns in by_kind.items():
        if kind not in ("", *KINDS):
            raise QConfigError(f"freeze kind {kind!r}; known: {', '.join(KINDS)}{did_you_mean(kind, KINDS)}")
        names = [n for n, own in kinds.items() if kind in ("", own)]
        names += plan.trained if kind in ("", "scale") else ()
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(n, pattern) for n in names):
                what = f"freeze pattern {pattern!r} matches no{f' {kind}' if kind else 'thing'}"
                raise QConfigError(f"{what}{did_you_mean(pattern, names)}")

    def label(name: str, kind: str) -> str:
        patterns = (*by_kind.get("", ()), *by_kind.get(kind, ()))
        return "frozen" if any(fnmatch.fnmatchcase(name, p) for p in patterns) else kind

    return Trainable(
        {n: label(n, kind) for n, kind in kinds.items()},  # type: ignore[misc]
        {n: label(n, "scale") for n in plan.trained},  # type: ignore[misc]
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a training step changes, as one pytree.

    `trainable` is what gradients are taken of; `batch_stats` holds the running statistics of the batch norms that
    `prepare` kept; `params` is both together, which is what `jq.apply` and `jq.lower` take.

    Example:
      state = jq.TrainState.create(plan, params, qparams, tx=optax.adam(1e-4))

      def loss(trainable, x):
          y, batch_stats = jq.apply_train(
              plan, trainable.params, trainable.qparams, x, batch_stats=state.batch_stats
          )
          return jnp.mean(y**2), batch_stats

      grads, batch_stats = jax.grad(loss, has_aux=True)(state.trainable, x)
      state = state.update(grads, batch_stats)
    """

    step: Array
    trainable: Trainable
    batch_stats: dict[str, Array]
    opt_state: Any
    tx: Any = field(metadata={"static": True})

    @classmethod
    def create(cls, plan: Plan, params: Params, qparams: QParams, *, tx: Any, opt_state: Any = None) -> "TrainState":
        """Checks params and qparams against the plan and initialises the optimizer, `tx`, on what is trained.

        Args:
          plan, params, qparams: as for `jq.apply`.
          tx: an optax chain.
          opt_state: a state of `tx` to go on with, such as `jq.migrate_optimizer_state` makes; None starts anew.

        Raises:
          CalibrationError: scales missing or broken. JQuantError: a state that was made for other parameters.
        """
        check_params(plan.graph, params)
        check_qparams(plan, qparams)
        trained, batch_stats = split_batch_stats(plan, params)
        # Copies, so that a step which gives the memory of its state away takes nothing from the caller.
        trainable, batch_stats = jax.tree.map(jnp.array, (Trainable(trained, dict(qparams)), batch_stats))
        if opt_state is None:
            opt_state = tx.init(trainable)
        else:
            check_optimizer_state(tx, opt_state, trainable)
        return cls(jnp.int32(0), trainable, batch_stats, opt_state, tx)

    @property
    def params(self) -> dict[str, Array]:
        return {**self.trainable.params, **self.batch_stats}

    @property
    def qparams(self) -> dict[str, Array]:
        return self.trainable.qparams

    def update(self, grads: Trainable, batch_stats: dict[str, Array] | None = None) -> "TrainState":
        """One optimizer step; `batch_stats` are what `apply_train` returned."""
        # Optimizers mix integer counts with floats: a user's strict dtype promotion is not for their code.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = self.tx.update(grads, self.opt_state, self.trainable)
        trainable = jax.tree.map(lambda p, u: p + u.astype(p.dtype), self.trainable, updates)
        stats = self.batch_stats if batch_stats is None else batch_stats
        return TrainState(self.step + 1, trainable, stats, opt_state, self.tx)
