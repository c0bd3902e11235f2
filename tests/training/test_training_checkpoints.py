"""Checkpoints of training: what was saved comes back, a killed run goes on as if nothing had happened."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import graphs, processes

import jquant as jq
from jquant import ops, training

STEPS, EVERY = 30, 3
SELF = Path(__file__)


def prepared(dtype: str = "int8", target: jq.Target = jq.targets.NASH_E, channels: int = 4) -> jq.Model:
    build = graphs.Builder(3)
    build.shapes["x"] = (2, 6, 6)
    x = build.add(ops.Relu(), (build.batch_norm(build.conv("x", channels, 3)),), (channels, 6, 6))
    x = build.add(ops.Mean(axes=(2, 3)), (x,), (channels,))
    head = {"weight": build.array("head.weight", 3, channels), "bias": build.array("head.bias", 3)}
    x = build.add(ops.Linear(), (x,), (3,), **head)
    spec = jq.QuantSpec(dtype=dtype, axis="out", quantizer=jq.lsq)
    config = jq.QConfig({"*": jq.Policy(weight=spec, output=jq.int8(quantizer=jq.lsq))})
    model = jq.prepare(build.graph(x, size=6), build.params, config, target=target, batch_norm="live")
    return jq.calibrate(model, [batch(0, 0)[0]])


def batch(step: int, seed: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng([step, seed])
    return jnp.asarray(rng.normal(size=(8, 2, 6, 6)), jnp.float32), jnp.asarray(rng.integers(0, 3, 8), jnp.int32)


def loss(logits: jax.Array, batch: tuple) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def fresh(model: jq.Model, **options: object) -> jq.TrainState:
    return jq.TrainState.create(model, tx=training.make_optimizer(model, learning_rate=0.05, **options))


def train(directory: Path) -> jq.TrainState:
    """A run of `STEPS` steps that saves every third; it goes on where an earlier one was stopped."""
    model = prepared()
    state, start, key = fresh(model), 0, jax.random.key(1)
    checkpoints = training.open_checkpoints(directory, model)
    if found := checkpoints.restore(state):
        assert found.key is not None
        state, start, key = found.state, found.position["batch"], found.key
    step = training.make_step(loss)
    for i in range(start, STEPS):
        key, drawn = jax.random.split(key)
        state, _ = step(state, batch(i, int(jax.random.randint(drawn, (), 0, 1000))))
        if (i + 1) % EVERY == 0:
            checkpoints.save(state, position={"batch": i + 1}, key=key)
            (directory / "progress").write_text(str(i + 1))
    checkpoints.close()
    return state


def assert_same(a: object, b: object) -> None:
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(path))


def saved(directory: Path) -> int:
    progress = directory / "progress"
    return int(progress.read_text() or 0) if progress.exists() else 0


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_run_equals_one_that_was_left_alone(tmp_path: Path, kills: int) -> None:
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    alone.mkdir()
    killed.mkdir()
    expected = train(alone)
    rng = np.random.default_rng(0)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(SELF.parents[1])}
    for _ in range(kills):
        before = saved(killed)
        process = subprocess.Popen([sys.executable, str(SELF), str(killed)], env=environment)
        waited = 0.0
        # Into the middle of it: steps, saves or the start, whatever comes. Without a save in sight, give it time.
        while saved(killed) == before and waited < 120 and process.poll() is None:
            time.sleep(0.02)
            waited += 0.02
        time.sleep(float(rng.uniform(0, 0.4)))
        process.send_signal(signal.SIGKILL)
        process.wait()
        now = saved(killed)
        assert now >= before
        if now:  # no more is lost than the steps since the last save that returned
            model = prepared()
            checkpoints = training.open_checkpoints(killed, model)
            found = checkpoints.restore(fresh(model))
            checkpoints.close()
            assert found is not None
            assert found.position["batch"] >= now
    assert_same(expected, train(killed))


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    model = prepared()
    state, key = fresh(model), jax.random.key(5)
    step = training.make_step(loss, donate=False)
    checkpoints = training.open_checkpoints(tmp_path, model)
    assert checkpoints.restore(state) is None
    later, _ = step(state, batch(0, 0))
    checkpoints.save(later, position={"epoch": 2, "batch": [3]}, key=key)
    found = checkpoints.restore(state)
    assert found is not None
    assert (found.position, found.step) == ({"epoch": 2, "batch": [3]}, 1)
    assert_same(found.state, later)
    np.testing.assert_array_equal(jax.random.key_data(found.key), jax.random.key_data(key))
    checkpoints.close()


def test_saves_beside_the_steps_hold_the_state_of_their_step(tmp_path: Path) -> None:
    """The steps write into the memory of the state before, which is donated; each checkpoint has a digest."""
    model = prepared()
    state, step = fresh(model), training.make_step(loss)
    checkpoints, wanted = training.open_checkpoints(tmp_path, model, max_to_keep=None), {}
    for i in range(6):
        state, _ = step(state, batch(i, 0))
        checkpoints.save(state, position=i, wait=False)
        wanted[i + 1] = jax.tree.map(np.array, jax.device_get(state))
    checkpoints.close()
    checkpoints = training.open_checkpoints(tmp_path, model)
    for number, leaves in wanted.items():
        found = checkpoints.restore(fresh(model), step=number)
        assert found is not None
        assert found.position == number - 1
        assert_same(found.state, leaves)
    checkpoints.close()


ON_OTHER_DEVICES = """
import sys, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jquant import training
from training.test_training_checkpoints import assert_same, batch, fresh, loss, prepared

def spread(state, count):  # every axis that eight devices divide is divided among the devices
    mesh = jax.sharding.Mesh(jax.devices()[:count], ("model",))
    def place(leaf):
        axes = [("model" if n % 8 == 0 and n else None) for n in leaf.shape]
        last = [i for i, name in enumerate(axes) if name][-1:]
        spec = PartitionSpec(*(name if i in last else None for i, name in enumerate(axes)))
        return jax.device_put(leaf, NamedSharding(mesh, spec))
    return jax.tree.map(place, state)

model = prepared(channels=8)
state, _ = training.make_step(loss, donate=False)(fresh(model), batch(0, 0))
divided = [leaf for leaf in jax.tree.leaves(spread(state, 4)) if not leaf.is_fully_replicated]
assert len(divided) >= 4, [leaf.shape for leaf in jax.tree.leaves(state)]
for count in (4, 8, 1, 2):
    checkpoints = training.open_checkpoints(sys.argv[1], model)
    if count == 4:
        checkpoints.save(spread(state, 4), position=7, key=jax.random.key(3), wait=False)
    like = spread(fresh(model), count)
    found = checkpoints.restore(like)
    checkpoints.close()
    assert found.position == 7
    assert_same(found.state, state)
    assert len(found.key.sharding.device_set) == count  # arrays of other devices cannot be computed with
    jax.jit(lambda key, state: jax.random.normal(key) + state.step)(found.key, found.state)
    for a, b in zip(jax.tree.leaves(found.state), jax.tree.leaves(like), strict=True):
        assert a.sharding == b.sharding, (count, a.sharding, b.sharding)
print("equal")
"""


def test_a_divided_state_comes_back_on_another_number_of_devices(tmp_path: Path) -> None:
    processes.finish(processes.start(ON_OTHER_DEVICES, 8, str(tmp_path)))


@pytest.mark.parametrize(
    ("dtype", "target", "message"),
    [("int4", jq.targets.NASH_E, "int4"), ("int8", jq.targets.NASH_M, "nash-m")],
)
def test_another_qconfig_or_march_is_refused(tmp_path: Path, dtype: str, target: jq.Target, message: str) -> None:
    model = prepared()
    checkpoints = training.open_checkpoints(tmp_path, model)
    checkpoints.save(fresh(model), position=0)
    checkpoints.close()
    other = prepared(dtype, target)
    checkpoints = training.open_checkpoints(tmp_path, other)
    with pytest.raises(jq.FormatError, match=message):
        checkpoints.restore(fresh(other))
    checkpoints.close()


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    model = prepared()
    checkpoints = training.open_checkpoints(tmp_path, model)
    checkpoints.save(jq.TrainState.create(model, tx=optax.sgd(0.1)), position=0)
    with pytest.raises(jq.FormatError, match="another optimizer"):
        checkpoints.restore(jq.TrainState.create(model, tx=optax.adam(0.1)))
    checkpoints.close()


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    train(Path(sys.argv[1]))


def test_a_damaged_checkpoint_names_the_step_before(tmp_path: Path) -> None:
    """A bit flipped in the largest file of each part; with the folder deleted the run goes on from the step before."""
    model = prepared()
    state = fresh(model)
    checkpoints = training.open_checkpoints(tmp_path / "run", model)
    checkpoints.save(state, position={"batch": 0})
    checkpoints.save(dataclasses.replace(state, step=state.step + 4), position={"batch": 4})
    checkpoints.close()
    for part in ("arrays", "meta"):
        files = [path for path in (tmp_path / "run" / "4" / part).rglob("*") if path.is_file()]
        flip(max(files, key=lambda path: path.stat().st_size))
        checkpoints = training.open_checkpoints(tmp_path / "run", model)
        with pytest.raises(jq.FormatError, match=r"checkpoint 4 in .* is damaged: .* to go on from step 0"):
            checkpoints.restore(state)
        found = checkpoints.restore(state, step=0)
        assert found is not None
        assert found.position == {"batch": 0}
        checkpoints.close()
    shutil.rmtree(tmp_path / "run" / "4")
    flip(tmp_path / "run" / "0" / "meta" / "metadata")
    checkpoints = training.open_checkpoints(tmp_path / "run", model)
    with pytest.raises(jq.FormatError, match=r"checkpoint 0 in .* from the beginning, for there is no step before"):
        checkpoints.restore(state)
    with pytest.raises(jq.FormatError, match=r"no checkpoint 4 in .* there are 0"):
        checkpoints.restore(state, step=4)
    checkpoints.close()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_another_position_is_seen(tmp_path: Path) -> None:
    """JSON that still reads, with another number in it."""
    model = prepared()
    checkpoints = training.open_checkpoints(tmp_path, model)
    checkpoints.save(fresh(model), position={"batch": 12})
    meta = tmp_path / "0" / "meta" / "metadata"
    assert meta.read_text().count('"batch": 12') == 1
    meta.write_text(meta.read_text().replace('"batch": 12', '"batch": 13'))
    with pytest.raises(jq.FormatError, match="its content differs from its digest"):
        checkpoints.restore(fresh(model))
    checkpoints.close()


def test_a_folder_has_one_run(tmp_path: Path) -> None:
    model = prepared()
    first = training.open_checkpoints(tmp_path, model)
    with pytest.raises(OSError, match="used already by this process; close"):
        training.open_checkpoints(tmp_path, model)
    take = f"take_lock(Path({str(tmp_path / '.lock')!r}))"
    script = f"from pathlib import Path; from jquant.host.locks import take_lock; {take}"
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (
        f"BlockingIOError: {tmp_path} is used already by the process {os.getpid()}; take another folder" in other.stderr
    )
    first.close()
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0  # it died with the lock
    training.open_checkpoints(tmp_path, model).close()
