"""A training step on eight devices and on two processes has the bits of the same slices on one device."""

from support.processes import finish, start, start_pair

SCRIPT = """
import math, re, sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
jax.config.update("jax_numpy_dtype_promotion", "strict")
rank = int(sys.argv[1]) if len(sys.argv) > 1 else 0
if len(sys.argv) > 1:
    jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", num_processes=2, process_id=rank)
import jquant as jq
from jquant import training
from training.test_training_checkpoints import batch, loss, prepared

count, processes = jax.device_count(), jax.process_count()
mesh = jax.make_mesh((count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
split, same = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())

def spread(values, sharding):
    return jax.tree.map(lambda v: jax.make_array_from_process_local_data(sharding, np.asarray(v)), values)

def leaves(state):
    return jax.tree_util.tree_leaves_with_path((state.trainable, state.batch_stats, state.opt_state))

def gathered(step, *args):  # elements of the largest all-gather
    text = step.lower(*args).compile().as_text()
    assert "collective-permute" in text
    shapes = re.findall(r"f32\\[([\\d,]*)\\]\\S* all-gather", text)
    return max(math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes)

model = prepared()  # LSQ scales, and batch norm with the statistics of the batch
for mode in ("fake_quant", "bit_true"):
    alone = jq.TrainState.create(model, tx=training.make_optimizer(model, learning_rate=0.05))
    together = spread(alone, same)
    one = training.make_step(loss, mode=mode, slices=count, donate=False)
    many = training.make_step(loss, mode=mode, slices=count, mesh=mesh, donate=False)
    if mode == "fake_quant" and processes == 1:
        whole = jax.tree.map(lambda *v: jnp.concatenate(v), batch(0, 0), batch(0, 1))
        weights = sum(v.size for v in jax.tree.leaves(model.params))
        assert gathered(many, together, spread(whole, split)) < weights / 2  # batch statistics, and no gradients
    for i in range(4):
        whole = jax.tree.map(lambda *v: jnp.concatenate(v), batch(i, 0), batch(i, 1))  # a slice has two images
        share = len(whole[1]) // processes
        mine = jax.tree.map(lambda v: v[rank * share : (rank + 1) * share], whole)
        alone, _ = one(alone, whole)
        together, _ = many(together, spread(mine, split))
    for (path, a), (_, b) in zip(leaves(alone), leaves(together), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=mode + jax.tree_util.keystr(path))
    start = leaves(jq.TrainState.create(model, tx=alone.tx))
    assert any((np.asarray(a) != np.asarray(b)).any() for (_, a), (_, b) in zip(leaves(alone), start, strict=True))
print("equal")
"""


def test_eight_devices_train_the_bits_of_one() -> None:
    finish(start(SCRIPT, 8))


def test_two_processes_train_the_bits_of_one() -> None:
    finish(*start_pair(SCRIPT, 2))
