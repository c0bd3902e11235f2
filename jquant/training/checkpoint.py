"""Checkpoints of training with orbax: everything that a run needs to go on as if it had never stopped."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jquant.graph.sealed import refusing
from jquant.plan.files import find_mismatch, plan_from_json, plan_to_json
from jquant.training.state import TrainState
from jquant.types import FormatError, Model, Observer, Plan, Quantizer

VERSION = 1
KEY = "PRNG key"


@dataclass(frozen=True)
class Checkpoint:
    """What `restore` found. `position` is what `save` was given: where the data go on, as JSON."""

    state: TrainState
    position: Any
    key: jax.Array | None
    step: int


@dataclass(frozen=True)
class Checkpoints:
    """A folder of checkpoints of one run; open it with `open_checkpoints`, close it in the end.

    A save is written beside the others and put in place by renaming, so a process that dies at any moment leaves the
    earlier ones whole: what is lost are the steps since the last save that returned.
    """

    directory: Path
    plan: Plan
    manager: Any = field(repr=False)

    def save(self, state: TrainState, *, position: Any, key: jax.Array | None = None) -> None:
        """Writes the state, and returns when it is on disk. A step that is there already is left as it is.

        Args:
          state: its `step` names the checkpoint.
          position: where the data go on, of what JSON can hold: `{"epoch": 3, "batch": 17}`.
          key: the PRNG key of the next step.
        """
        import orbax.checkpoint as ocp

        step = int(state.step)
        if step in self.manager.all_steps():
            return
        leaves = _leaves(state, key)
        shapes = {path: [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves.items()}
        meta = {"jquant": VERSION, "position": position, "plan": plan_to_json(self.plan), "leaves": shapes}
        meta["key"] = None if key is None else [_is_typed(key), _implementation(key)]
        arrays = {str(i): leaf for i, leaf in enumerate(leaves.values())}  # a name may hold what a path must not
        parts = {"arrays": ocp.args.StandardSave(arrays), "meta": ocp.args.JsonSave(meta)}
        self.manager.save(step, args=ocp.args.Composite(**parts))
        self.manager.wait_until_finished()

    def restore(self, state: TrainState, *, step: int | None = None) -> Checkpoint | None:
        """The latest checkpoint, or that of `step`; None where there is none yet.

        Args:
          state: a fresh state of this run, for the optimizer, the shapes and the shardings.

        Raises:
          FormatError: saved for another march or qconfig, with both named, or for another optimizer.
        """
        import orbax.checkpoint as ocp

        step = self.manager.latest_step() if step is None else step
        if step is None:
            return None
        meta = self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        self._check(step, meta, state)
        leaves = _leaves(state, None if meta["key"] is None else jax.random.key(0, impl=meta["key"][1]))
        template = {str(i): _abstract(leaf) for i, leaf in enumerate(leaves.values())}
        part = ocp.args.Composite(arrays=ocp.args.StandardRestore(template))
        arrays = self.manager.restore(step, args=part)["arrays"]
        found = [arrays[str(i)] for i in range(len(arrays))]
        key = None
        if meta["key"] is not None:
            typed, implementation = meta["key"]
            key = found.pop()
            key = jax.random.wrap_key_data(key, impl=implementation) if typed else key
        return Checkpoint(jax.tree.unflatten(jax.tree.structure(state), found), meta["position"], key, step)

    def close(self) -> None:
        self.manager.close()

    def _check(self, step: int, meta: Any, state: TrainState) -> None:
        where = f"checkpoint {step} in {self.directory}"
        if not isinstance(meta, dict) or meta.get("jquant") != VERSION:
            raise FormatError(f"{where} is not one of this release")
        if missing := {"position", "plan", "leaves", "key"} - meta.keys():
            raise FormatError(f"{where} lacks {', '.join(sorted(missing))}")
        with refusing(where):
            saved_plan = plan_from_json(meta["plan"], own=_values_of(self.plan))
        if mismatch := find_mismatch(saved_plan, self.plan):
            raise FormatError(f"{where} belongs to another plan: {mismatch}")
        wanted = {path: [list(leaf.shape), str(leaf.dtype)] for path, leaf in _leaves(state, None).items()}
        saved = {path: shape for path, shape in meta["leaves"].items() if path != KEY}
        if saved != wanted:
            name = next(p for p in dict.fromkeys((*wanted, *saved)) if saved.get(p) != wanted.get(p))
            raise FormatError(
                f"{where} was saved with another optimizer: {name} is {saved.get(name, 'missing')} there, and "
                f"{wanted.get(name, 'unknown')} here"
            )


def _values_of(plan: Plan) -> set[Quantizer | Observer]:
    """The quantizers and observers of a plan."""
    specs = [spec for spec in (*plan.values.values(), *plan.weights.values()) if spec is not None]
    return {value for spec in specs for value in (spec.quantizer, spec.observer) if value is not None}


def open_checkpoints(directory: str | os.PathLike[str], model: Model, *, max_to_keep: int | None = 3) -> Checkpoints:
    """Opens a folder of checkpoints, and makes it if needed.

    Args:
      directory: one run each.
      model: what is trained; its plan is recorded, march and formats included.
      max_to_keep: older ones are removed; None keeps all.

    Example:
      checkpoints = jq.training.open_checkpoints("run", model)
      state, start = TrainState.create(model, tx=tx), 0
      if found := checkpoints.restore(state):
          state, start, key = found.state, found.position["batch"], found.key
    """
    import orbax.checkpoint as ocp

    path = Path(directory).absolute()
    options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, create=True, enable_async_checkpointing=False)
    return Checkpoints(path, model.plan, ocp.CheckpointManager(path, options=options))


def _leaves(state: TrainState, key: jax.Array | None) -> dict[str, jax.Array]:
    """Arrays by their path in the state, and the key behind them."""
    paths = jax.tree_util.tree_leaves_with_path(state)
    found = {jax.tree_util.keystr(path): jnp.asarray(leaf) for path, leaf in paths}
    return found if key is None else found | {KEY: jax.random.key_data(key) if _is_typed(key) else key}


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _is_typed(key: jax.Array) -> bool:
    return bool(jnp.issubdtype(key.dtype, jax.dtypes.prng_key))


def _implementation(key: jax.Array) -> str:
    return str(jax.random.key_impl(key if _is_typed(key) else jax.random.wrap_key_data(key)))
