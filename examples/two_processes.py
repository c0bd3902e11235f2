"""Two processes on one machine calibrate, train and evaluate one model, over `jax.distributed` on the loopback device.

.venv/bin/python -m examples.two_processes

Each process has two host devices and half of the data. On a cluster the same code runs once a host: there
`jax.distributed.initialize()` finds the others by itself, and nothing else changes.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

PROCESSES, DEVICES = 2, 2


def work(rank: int, port: str) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    import jquant as jq

    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=PROCESSES, process_id=rank)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    spread = lambda tree, sharding: jax.tree.map(  # noqa: E731
        lambda v: jax.make_array_from_process_local_data(sharding, np.asarray(v)), tree
    )

    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 8)).astype(np.float32)
    labels = x[:, :3].argmax(-1).astype(np.int32)
    weights = {"w": (rng.normal(size=(8, 3)) / 3).astype(np.float32)}
    mine = slice(rank * 128, (rank + 1) * 128)

    graph, params = jq.trace(lambda p, x: x @ p["w"], weights, jnp.asarray(x[:4]))
    qconfig = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out", quantizer=jq.lsq), output=jq.int8())})
    model = jq.prepare(graph, params, qconfig, target="nash-e")
    # 1. Each process looks at its own data; merged statistics have the bits of one process.
    stats = jq.calibration.collect(model, [x[mine]], microbatch=32)
    model = jq.calibration.finalize_stats(model, jq.calibration.gather_stats(model, stats))

    # 2. Slices of each batch on all devices; their gradients are added in a fixed order, around the ring.
    def loss(logits, batch):
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch[1][:, None], axis=1).mean()

    state = jq.TrainState.create(model, tx=jq.training.make_optimizer(model, learning_rate=0.1, scale_rate=1e-3))
    state = spread(state, whole)
    step = jq.training.make_step(loss, slices=4, mesh=mesh)
    for _ in range(60):
        state, metrics = step(state, spread((x[mine], labels[mine]), split))
        jax.block_until_ready(metrics)  # host devices: steps in flight may wait for each other's threads

    # 3. Every mode in one pass; counts are those of one process.
    metrics = {"top-1": jq.evaluation.Accuracy()}
    data = [
        (x[i : min(i + 50, mine.stop)], labels[i : min(i + 50, mine.stop)]) for i in range(mine.start, mine.stop, 50)
    ]
    trained = jax.device_get(state.model)
    found = jq.evaluate(trained, data, metrics, modes=("float", "fake_quant", "integers"), mesh=mesh)
    if rank == 0:
        print(f"{found.samples} samples on {jax.device_count()} devices of {jax.process_count()} processes")
        for mode, figures in found.modes.items():
            print(f"{mode}: top-1 {figures['top-1']:.2f} %")


def main() -> int:
    """Starts the processes, and ends with their exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "examples.two_processes"]
    root = Path(__file__).parents[1]
    started = [subprocess.Popen([*command, str(rank), port], env=environment, cwd=root) for rank in range(PROCESSES)]
    try:
        return max(abs(process.wait(timeout=600)) for process in started)
    finally:
        for process in started:
            process.kill()


if __name__ == "__main__":
    if len(sys.argv) == 3:
        work(int(sys.argv[1]), sys.argv[2])
    else:
        sys.exit(main())
