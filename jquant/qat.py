"""Quantization-aware training as plain functions of pytrees; the optimizer is any optax chain."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jquant.apply import Mode, Outputs, check_mode, evaluate_mode, unpack
from jquant.ir.evaluate import bind_inputs
from jquant.ir.graph import check_params
from jquant.simulate import check_qparams
from jquant.text import did_you_mean
from jquant.types import Array, JQuantError, Params, Plan, QConfigError, QParams


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
) -> tuple[Outputs, dict[str, Array]]:
    """Evaluates a plan in training: stochastic operators are active where `rngs` is given.

    Args:
      plan, params, qparams, *inputs: as for `jq.apply`.
      batch_stats: running statistics. Batch norm is folded by `prepare`, so they are empty and returned as they came.
      rngs: a PRNG key for dropout; None leaves dropout inactive.
      mode: "qat", "bit_true" or "float".

    Returns:
      Outputs and new batch statistics.

    Raises:
      JQuantError: an unknown mode, or "bit_true" with active dropout (integers have no dropout).
    """
    check_mode(mode)
    if mode == "bit_true" and rngs is not None and any(node.op.stochastic for node in plan.graph.nodes):
        raise JQuantError(
            "mode 'bit_true' with dropout: the deployed integers have none. Leave rngs out, or use mode 'qat'"
        )
    check_params(plan.graph, params)
    if mode not in ("float", "calibration"):
        check_qparams(plan, qparams)
    values = evaluate_mode(plan, mode, dict(params), dict(qparams), bind_inputs(plan.graph, inputs), rngs)
    return unpack([values[name] for name in plan.graph.outputs]), dict(batch_stats or {})


def labels(plan: Plan, *, freeze: Sequence[str] = ()) -> Trainable:
    """Labels for `optax.multi_transform`: "weight" for params, "scale" for qparams, "frozen" for what `freeze` names.

    Args:
      plan: what `prepare` returned.
      freeze: globs on parameter and value names; both the parameters and the scales that match are frozen.

    Raises:
      QConfigError: a pattern that matches nothing.
    """
    names = [*plan.graph.param_names, *plan.trained]
    for pattern in freeze:
        if not any(fnmatch.fnmatchcase(n, pattern) for n in names):
            raise QConfigError(f"freeze pattern {pattern!r} matches nothing{did_you_mean(pattern, names)}")

    def label(name: str, kind: str) -> str:
        return "frozen" if any(fnmatch.fnmatchcase(name, p) for p in freeze) else kind

    return Trainable(
        {n: label(n, "weight") for n in plan.graph.param_names},  # type: ignore[misc]
        {n: label(n, "scale") for n in plan.trained},  # type: ignore[misc]
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a training step changes, as one pytree.

    Example:
      state = jq.TrainState.create(plan, params, qparams, tx=optax.adam(1e-4))
      grads = jax.grad(loss)(state.trainable, batch)
      state = state.update(grads)
    """

    step: Array
    trainable: Trainable
    batch_stats: dict[str, Array]
    opt_state: Any
    tx: Any = field(metadata={"static": True})

    @classmethod
    def create(cls, plan: Plan, params: Params, qparams: QParams, *, tx: Any) -> "TrainState":
        """Checks params and qparams against the plan and initialises the optimizer, `tx`, on both."""
        check_params(plan.graph, params)
        check_qparams(plan, qparams)
        trainable = Trainable(dict(params), dict(qparams))
        return cls(jnp.int32(0), trainable, {}, tx.init(trainable), tx)

    @property
    def params(self) -> dict[str, Array]:
        return self.trainable.params

    @property
    def qparams(self) -> dict[str, Array]:
        return self.trainable.qparams

    def update(self, grads: Trainable, batch_stats: dict[str, Array] | None = None) -> "TrainState":
        """One optimizer step."""
        # Optimizers mix integer counts with floats: a user's strict dtype promotion is not for their code.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = self.tx.update(grads, self.opt_state, self.trainable)
        trainable = jax.tree.map(lambda p, u: p + u.astype(p.dtype), self.trainable, updates)
        stats = self.batch_stats if batch_stats is None else batch_stats
        return TrainState(self.step + 1, trainable, stats, opt_state, self.tx)
