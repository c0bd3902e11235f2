"""Arrays on the mesh that `jax.make_mesh` makes, whose axes are explicit: the same numbers as on one device.

Seen: `jq.run` raised "Resource axis: data of P('data', None, None, None) is not found in mesh: ()", and under
`jax.set_mesh` a ShardingTypeError.
"""

from support.processes import finish, start

SCRIPT = """
import contextlib, jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import jquant as jq
from jquant import analysis, ops, training

rng = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
params = {"w": draw(4, 2, 3, 3), "b": draw(4), "f": draw(5, 4)}
conv = ops.Conv(strides=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1))
nodes = (
    jq.Node("c", conv, ("x",), jq.FrozenMap({"weight": "w", "bias": "b"})),
    jq.Node("s", ops.Sigmoid(), ("c",)),
    jq.Node("p", ops.Mean(axes=(2, 3)), ("s",)),
    jq.Node("f", ops.Linear(), ("p",), jq.FrozenMap({"weight": "f"})),
)
graph = jq.Graph((jq.Input("x", (None, 2, 16, 16)),), nodes, ("f",))
x, labels = draw(8, 2, 16, 16), jnp.arange(8) % 5
mesh = jax.make_mesh((8,), ("data",))
assert mesh.axis_types == (AxisType.Explicit,)
TOP = {"top": jq.evaluation.Accuracy()}

def on(array, *spec):
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

def same(found, wanted, atol=0.0):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=atol)

def loss(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

def calibrated(dtype):
    spec = getattr(jq, dtype)(observer=jq.observers.min_max())
    config = jq.QConfig({"*": jq.Policy(output=spec, weight=jq.int8(axis="out"))})
    return jq.calibrate(jq.prepare(graph, params, config, target=jq.targets.NASH_E), [x])

CONTEXTS = (contextlib.nullcontext, lambda: jax.set_mesh(mesh))
model = calibrated("int16")
program = jq.lower(model)
alone, floats = jq.run_with_taps(program, x), jq.apply(model, x)
for context in CONTEXTS:
    for where in (("data",), (None, None, "data")):  # the batch, and the height of the images
        with context():
            spread = on(x, *where)
            taps = jq.run_with_taps(program, spread)
            same(taps, alone)
            assert taps["c"].sharding.spec[0] == where[0]
    with context():
        spread = on(x, "data")
        same(jax.jit(lambda p, v: jq.run_with_taps(p, v)["f"])(program, spread), alone["f"])
        # A value at a tie may round to the other side where sums of float32 have another order.
        same(jq.apply(model, spread), floats, atol=4 * float(program.scales["s"]))

model = calibrated("int8")
state = jq.TrainState.create(model, tx=optax.sgd(1e-2))
one, _ = training.make_step(loss, slices=8, donate=False)(state, (x, labels))
wanted = jq.evaluate(model, [(x, labels)], TOP, modes=("integers",)).figures
worst = analysis.find_bad_cases(model, [x], count=3).index.tolist()
seen = jq.calibration.collect(model, [x], microbatch=1)
for context in CONTEXTS[1:]:
    with context():
        batch = (on(x, "data"), on(labels, "data"))
        figures = jq.evaluate(model, [batch], TOP, modes=("integers",)).figures
        step = training.make_step(loss, slices=8, mesh=mesh, donate=False)
        # One program with collectives at a time: those of several in flight wait for each other's threads on a CPU.
        many, _ = jax.block_until_ready(step(jax.device_put(state, on(x).sharding), batch))
        other = training.make_step(loss, mode="bit_true", donate=False)
        whole, metrics = jax.block_until_ready(other(state, batch))
        rows = analysis.compare(model, batch[0], "float", "bit_true").rows
        names = analysis.sensitivity(model, [batch[0]]).names()
        cases = analysis.find_bad_cases(model, [batch[0]], count=3)
        stats = jq.calibration.collect(model, [x], mesh=mesh)
    assert figures == wanted
    same(many, one)  # the slices decide what is computed, not the devices
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(many))
    assert np.isfinite(float(metrics["loss"])) and int(whole.step) == 1
    assert {row.name for row in rows} >= {"x", "c", "s", "p", "f"} and "x" in names
    assert cases.index.tolist() == worst
    same(stats, seen)
print("equal")
"""


def test_explicit_axes_give_the_numbers_of_one_device() -> None:
    finish(start(SCRIPT, 8))
