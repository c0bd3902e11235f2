"""Checkpoints of training with orbax: everything that a run needs to go on as if it had never stopped."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jquant.graph.sealed import DIGEST, cut
from jquant.host.locks import Lock, take_lock
from jquant.plan.files import find_mismatch, plan_from_json, plan_to_json
from jquant.training.state import TrainState
from jquant.types import FormatError, Model, Observer, Plan, Quantizer

VERSION = 2
KEY = "PRNG key"
LOCK = ".lock"


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
    earlier ones whole: what is lost are the steps since the last save that was on disk. The folder is locked until
    `close`, or until the process ends. A checkpoint carries a digest of all that it holds.
    """

    directory: Path
    plan: Plan
    manager: Any = field(repr=False)
    lock: Lock = field(repr=False)

    def save(self, state: TrainState, *, position: Any, key: jax.Array | None = None, wait: bool = True) -> None:
        """Writes the state, and returns when it is on disk. A step that is there already is left as it is.

        Args:
          state: its `step` names the checkpoint.
          position: where the data go on, of what JSON can hold: `{"epoch": 3, "batch": 17}`.
          key: the PRNG key of the next step.
          wait: False returns when the arrays are copied to the host, and writes them while the next steps run; the next
            `save`, `restore`, `finish` or `close` waits for that, and raises what went wrong. A process that dies
            before loses this checkpoint, and none of the earlier ones.
        """
        import orbax.checkpoint as ocp

        self.finish()
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        leaves = _leaves(state, key)
        shapes = {path: [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves.items()}
        meta = {"jquant": VERSION, "position": position, "plan": plan_to_json(self.plan), "leaves": shapes}
        meta["key"] = None if key is None else [_is_typed(key), _implementation(key)]
        meta[DIGEST] = _digest(meta, leaves.values())
        arrays = {str(i): leaf for i, leaf in enumerate(leaves.values())}  # a name may hold what a path must not
        arrays = arrays if wait else _copied(arrays)  # the next step may write into the memory of donated ones
        parts = {"arrays": ocp.args.StandardSave(arrays), "meta": ocp.args.JsonSave(meta)}
        self.manager.save(step, args=ocp.args.Composite(**parts))
        if wait:
            self.finish()

    def finish(self) -> None:
        """Waits until every checkpoint is on disk."""
        self.manager.wait_until_finished()

    def restore(self, state: TrainState, *, step: int | None = None) -> Checkpoint | None:
        """The latest checkpoint, or that of `step`; None where there is none yet.

        Args:
          state: a fresh state of this run, for the optimizer, the shapes and the shardings. These may be those of
            another number of devices than the run had before.

        Raises:
          FormatError: damaged, with the folder to delete and the step before; saved for another march or qconfig, with
            both named, or for another optimizer.
        """
        import orbax.checkpoint as ocp

        self.finish()
        step = self.manager.latest_step() if step is None else step
        if step is None:
            return None
        if step not in self.manager.all_steps():
            raise FormatError(f"no checkpoint {step} in {self.directory}; there are {self._steps()}")
        meta = self._read(step, meta=ocp.args.JsonRestore())
        self._check(step, meta, state)
        leaves = _leaves(state, None if meta["key"] is None else jax.random.key(0, impl=meta["key"][1]))
        template = {str(i): _abstract(leaf) for i, leaf in enumerate(leaves.values())}
        arrays = self._read(step, arrays=ocp.args.StandardRestore(template))
        found = [arrays[str(i)] for i in range(len(arrays))]
        if meta[DIGEST] != _digest(meta, found):
            raise FormatError(self._damaged(step, "its content differs from its digest"))
        key = None
        if meta["key"] is not None:
            typed, implementation = meta["key"]
            key = _beside(found.pop(), state)
            key = jax.random.wrap_key_data(key, impl=implementation) if typed else key
        return Checkpoint(jax.tree.unflatten(jax.tree.structure(state), found), meta["position"], key, step)

    def close(self) -> None:
        """Ends the work on the folder, and gives it free."""
        try:
            self.manager.close()
        finally:
            self.lock.release()

    def _read(self, step: int, **part: Any) -> Any:
        """One part of a checkpoint, by its name."""
        import orbax.checkpoint as ocp

        try:
            return self.manager.restore(step, args=ocp.args.Composite(**part))[next(iter(part))]
        except Exception as error:  # of orbax and all that it stands on
            raise FormatError(self._damaged(step, cut(f"{type(error).__name__}: {error}", 300))) from error

    def _damaged(self, step: int, reason: str) -> str:
        """What is wrong with a checkpoint, and how to go on without it."""
        before = [other for other in self.manager.all_steps() if other < step]
        way = f"from step {max(before)}" if before else "from the beginning, for there is no step before it"
        where = f"checkpoint {step} in {self.directory}"
        return f"{where} is damaged: {reason}. Delete the folder {self.directory / str(step)} to go on {way}"

    def _steps(self) -> str:
        return ", ".join(map(str, sorted(self.manager.all_steps()))) or "none"

    def _check(self, step: int, meta: Any, state: TrainState) -> None:
        where = f"checkpoint {step} in {self.directory}"
        if not isinstance(meta, dict) or meta.get("jquant") != VERSION:
            raise FormatError(f"{where} is not one of this release")
        if missing := {"position", "plan", "leaves", "key", DIGEST} - meta.keys():
            raise FormatError(self._damaged(step, f"it lacks {', '.join(sorted(missing))}"))
        if not _is_key(meta["key"]) or not isinstance(meta["leaves"], dict):
            raise FormatError(self._damaged(step, "its PRNG key or its list of arrays is none"))
        try:
            saved_plan = plan_from_json(meta["plan"], own=_values_of(self.plan))
        except FormatError as error:
            raise FormatError(self._damaged(step, cut(str(error)))) from error
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


def _beside(key: jax.Array, state: TrainState) -> jax.Array:
    """The key on all devices of the state: jax computes with arrays of the same devices alone."""
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(state)]
    mesh = next((s.mesh for s in shardings if isinstance(s, NamedSharding)), None)
    return key if mesh is None else jax.device_put(key, NamedSharding(mesh, PartitionSpec()))


_copied = jax.jit(lambda arrays: jax.tree.map(jnp.copy, arrays))


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

    Raises:
      FormatError: a damaged checkpoint that hides the others.
      OSError: the folder is used already, by this process or another.

    Example:
      checkpoints = jq.training.open_checkpoints("run", model)
      state, start = TrainState.create(model, tx=tx), 0
      if found := checkpoints.restore(state):
          state, start, key = found.state, found.position["batch"], found.key
    """
    import orbax.checkpoint as ocp

    path = Path(directory).absolute()
    path.mkdir(parents=True, exist_ok=True)
    lock = take_lock(path / LOCK) if jax.process_index() == 0 else Lock(path / LOCK, None)  # one run, many processes
    try:
        options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, create=True)
        return Checkpoints(path, model.plan, ocp.CheckpointManager(path, options=options), lock)
    except OSError:
        lock.release()
        raise
    except Exception as error:  # of orbax, which looks into every checkpoint
        lock.release()
        raise FormatError(_damaged_one(path, error)) from error


def _damaged_one(path: Path, error: Exception) -> str:
    """One of the checkpoints in a folder is damaged, and orbax does not say which."""
    steps = sorted(int(found.name) for found in path.iterdir() if found.name.isdecimal())
    which = f"checkpoint {steps[0]}" if len(steps) == 1 else f"one of the checkpoints {', '.join(map(str, steps))}"
    reason = cut(f"{type(error).__name__}: {error}", 300)
    way = f"; delete the folder {path / str(steps[-1])} to go on from the step before" if steps else ""
    return f"{which} in {path} is damaged: {reason}{way}"


def _leaves(state: TrainState, key: jax.Array | None) -> dict[str, jax.Array]:
    """Arrays by their path in the state, and the key behind them."""
    paths = jax.tree_util.tree_leaves_with_path(state)
    found = {jax.tree_util.keystr(path): jnp.asarray(leaf) for path, leaf in paths}
    return found if key is None else found | {KEY: jax.random.key_data(key) if _is_typed(key) else key}


def _digest(meta: Mapping[str, Any], leaves: Any) -> str:
    """BLAKE2b of 256 bits, in hex, of the JSON of a checkpoint and of the arrays that this process holds."""
    rest = {key: value for key, value in meta.items() if key != DIGEST}
    found = blake2b(json.dumps(rest, sort_keys=True).encode(), digest_size=32)
    for leaf in leaves:
        if leaf.is_fully_addressable:
            found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def _is_key(data: Any) -> bool:
    """Whether the JSON of a PRNG key is that: None, or whether it has a type, and its implementation."""
    if data is None:
        return True
    return isinstance(data, list) and len(data) == 2 and type(data[0]) is bool and isinstance(data[1], str)


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _is_typed(key: jax.Array) -> bool:
    return bool(jnp.issubdtype(key.dtype, jax.dtypes.prng_key))


def _implementation(key: jax.Array) -> str:
    return str(jax.random.key_impl(key if _is_typed(key) else jax.random.wrap_key_data(key)))
