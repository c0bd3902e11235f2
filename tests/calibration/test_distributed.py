"""Calibration on eight devices and on two processes: the same bits as on one device. In processes of their own."""

from support.processes import finish, start, start_pair

COMMON = """
import sys, jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_numpy_dtype_promotion", "strict")
from support import graphs
import jquant as jq
from jquant import observers, ops
from jquant.calibration.collection import calibrate, collect
from jquant.calibration.devices import gather_stats

KINDS = (observers.min_max(), observers.histogram(), observers.clip_std())  # one of each kind of state
EVERY = jq.observers.Observer(
    init=lambda channels: tuple(o.init(channels) for o in KINDS),
    update=lambda state, x: tuple(o.update(s, x) for o, s in zip(KINDS, state, strict=True)),
    merge=lambda a, b: tuple(o.merge(s, t) for o, s, t in zip(KINDS, a, b, strict=True)),
    finalize=lambda state, spec: KINDS[0].finalize(state[0], spec),
)
MIXED = {"x": observers.percentile(99.9), "n2.*": observers.mse(64, 10), "n5.*": observers.clip_std()}

def planned(rules):
    build = graphs.Builder(11)
    build.shapes["x"] = (3, 16, 16)
    x = build.add(ops.Relu(), (build.batch_norm(build.conv("x", 8, 3)),), (8, 16, 16))
    x = build.add(ops.Relu(), (build.batch_norm(build.conv(x, 12, 3)),), (12, 16, 16))
    x = build.add(ops.Mean(axes=(2, 3)), (x,), (12,))
    linear = {"weight": build.array("head.weight", 5, 12), "bias": build.array("head.bias", 5)}
    x = build.add(ops.Linear(), (x,), (5,), **linear)
    config = {"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8())}
    config |= {name: jq.Policy(output=jq.int8(observer=observer)) for name, observer in rules.items()}
    return jq.prepare(build.graph(x, size=16), build.params, jq.QConfig(config), target=jq.targets.NASH_E)

def data(plan):
    sizes = (16, 32, 16, 21)  # the last neither fills a round of devices nor a slice
    return [np.asarray(graphs.images(i, plan.graph, batch=n)) * np.float32(i + 1) for i, n in enumerate(sizes)]

def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        x, y = (np.asarray(v).view(np.uint32) for v in (x, y))
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))
"""

EIGHT = """
assert len(jax.devices()) == 8
mesh = jax.make_mesh((8,), ("data",))
square = jax.make_mesh((2, 4), ("model", "batch"))
model = planned({"*": EVERY})
batches = data(model.plan)
one = collect(model, batches, microbatch=2)
assert len(one) == 4  # the last layer keeps its accumulator
assert_same(one, collect(model, batches, microbatch=2, mesh=mesh))
split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
sharded = [jax.device_put(batch, split) if len(batch) % 8 == 0 else batch for batch in batches]
assert_same(one, collect(model, sharded, microbatch=2, mesh=mesh))
model = planned({})
automatic, whole = (calibrate(model, b).qparams for b in (sharded, batches))
for name in whole:  # equal but for the rounding of the float model, which sees other batches
    np.testing.assert_allclose(automatic[name], whole[name], rtol=2e-6)
model = planned(MIXED)
one = calibrate(model, batches, microbatch=4)
together = calibrate(model, map(jnp.asarray, batches), mesh=square, axis="batch")
assert_same(one, together)  # without microbatch, 4: the first batch, of 16, on 4 devices
print("equal")
"""

TWO = """
rank, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 4, 2)
model = planned({"*": EVERY})
batches = data(model.plan)
one = collect(model, batches, microbatch=4)
mine = [batches[:1], batches[1:]][rank]
assert_same(one, gather_stats(model, collect(model, mine, microbatch=4)))
local = jax.sharding.Mesh(np.asarray(jax.local_devices()), ("data",))
assert_same(one, gather_stats(model, collect(model, mine, microbatch=4, mesh=local)))
try:
    collect(model, mine, mesh=jax.make_mesh((4,), ("data",)))
except jq.InputError as error:
    assert "gather_stats" in str(error)
else:
    raise AssertionError("a mesh of two processes was accepted")
print("equal")
"""


def test_the_same_bits_on_eight_devices() -> None:
    finish(start(COMMON + EIGHT, 8))


def test_the_same_bits_on_two_processes() -> None:
    finish(*start_pair(COMMON + TWO, 2))
