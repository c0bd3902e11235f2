"""Evaluation on eight devices and on two processes: the counts of one device. In processes of their own."""

from support.processes import finish, start, start_pair

COMMON = """
import sys, jax, jax.numpy as jnp, numpy as np
import jquant as jq
from jquant.evaluation import Accuracy, Agreement, Confusion, HostMean

rng = np.random.default_rng(0)
images, labels = rng.normal(size=(61, 6)).astype(np.float32), rng.integers(0, 4, 61).astype(np.int32)
metrics = {"top-1": Accuracy(), "agrees": Agreement(), "confusion": Confusion(classes=4)}

def made():
    weights = {"w": (np.random.default_rng(1).normal(size=(6, 4)) / 2).astype(np.float32)}
    graph, params = jq.trace(lambda p, x: x @ p["w"], weights, jnp.asarray(images[:8]))
    model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target="nash-e")
    return jq.calibrate(model, [images])

def cut(first, last, size):
    return [(images[i : min(i + size, last)], labels[i : min(i + size, last)]) for i in range(first, last, size)]

def counts(found):
    assert found.samples == 61
    return {m: (f["top-1"], f["agrees"], f["confusion"].tolist()) for m, f in found.modes.items()}
"""

EIGHT = """
mesh, model = jax.make_mesh((8,), ("data",)), made()
one = counts(jq.evaluate(model, cut(0, 61, 61), metrics, modes=("float", "integers")))
for size in (16, 10, 3):  # the last batches hold 13, 1 and 1 samples, for eight devices
    assert counts(jq.evaluate(model, cut(0, 61, size), metrics, modes=("float", "integers"), mesh=mesh)) == one
host = {"rows": HostMean(lambda outputs, labels: len(outputs))}
assert jq.evaluate(model, cut(0, 20, 10), host, mesh=mesh).figures == {"rows": 10.0}
print("equal")
"""

TWO = """
rank, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
mesh, model = jax.make_mesh((4,), ("data",)), made()
one = counts(jq.evaluate(model, cut(0, 61, 61), metrics, modes=("float", "integers")))
mine = [cut(0, 40, 8), cut(40, 61, 8)][rank]  # five batches and three
assert counts(jq.evaluate(model, mine, metrics, modes=("float", "integers"), mesh=mesh)) == one
try:
    jq.evaluate(model, mine, {"rows": HostMean(lambda outputs, labels: 0)}, mesh=mesh)
except jq.InputError as error:
    assert "rows need the outputs on one host" in str(error)
else:
    raise AssertionError("outputs of two processes were taken to one")
print("equal")
"""


def test_the_same_counts_on_eight_devices() -> None:
    finish(start(COMMON + EIGHT, 8))


def test_the_same_counts_on_two_processes() -> None:
    finish(*start_pair(COMMON + TWO, 2))
