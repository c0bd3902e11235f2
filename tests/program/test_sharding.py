"""The same bits on eight devices as on one: a batch sharded over a mesh of host devices, in a process of its own."""

from support.processes import finish, start

SCRIPT = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from support import graphs
import jquant as jq
from conformance.consistency import network

assert len(jax.devices()) == 8
mesh = Mesh(np.asarray(jax.devices()), ("batch",))
for output in (jq.int8(), jq.int16()):
    graph, params = network(size=8)
    config = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=output)})
    model = jq.prepare(graph, params, config, target=jq.targets.NASH_E)
    program = jq.lower(jq.calibrate(model, [graphs.images(0, graph)]))
    x = 2 * graphs.images(1, graph, batch=16)
    alone = {name: np.asarray(v) for name, v in jq.run_with_taps(program, x).items()}
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("batch")))
    together = jq.run_with_taps(program, sharded)
    assert len(together[program.graph.outputs[0]].sharding.device_set) == 8
    for name, value in alone.items():
        np.testing.assert_array_equal(np.asarray(together[name]), value, err_msg=name)
    mapped = jax.shard_map(lambda v: jq.run(program, v), mesh=mesh, in_specs=PartitionSpec("batch"),
                           out_specs=PartitionSpec("batch"))
    np.testing.assert_array_equal(np.asarray(jax.jit(mapped)(sharded)), np.asarray(jq.run(program, x)))
print("equal")
"""


def test_the_same_bits_on_eight_devices() -> None:
    finish(start(SCRIPT, 8))
