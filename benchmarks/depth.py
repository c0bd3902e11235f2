"""What each verb costs on residual chains of growing depth: processor seconds, and how they grow from one to the next.

.venv/bin/python benchmarks/depth.py [--depths 62,125,250,500]

Each depth has processes of its own, with compilation, and the least of their figures counts: other work on the machine
only adds. Python's garbage collector looks through all objects before each verb instead of at some moment within one.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from itertools import pairwise

import jax
import numpy as np
import optax
from keeping import markdown_table
from results import write_section

import jquant as jq

VERBS = ("trace", "prepare", "calibrate", "lower", "run", "apply", "training step", "compare")
GOAL = 2.2  # from one depth to its double


def chain(params, x):
    """x [N, 8] through layers x + relu(x w)."""
    for w in params:
        x = x + jax.nn.relu(x @ w)
    return x


def seconds(depth: int) -> dict[str, float]:
    """Of each verb, the first time that it is called."""
    rng = np.random.default_rng(0)
    weights = [jax.device_put((0.05 * rng.normal(size=(8, 8))).astype(np.float32)) for _ in range(depth)]
    x = jax.device_put(rng.normal(size=(4, 8)).astype(np.float32))
    qconfig = jq.QConfig(jq.templates.int8_default(observer=jq.observers.min_max()))
    made = {}

    def timed(verb, call):
        gc.collect()
        gc.freeze()
        start = time.process_time()
        made[verb] = (jax.block_until_ready(call()), time.process_time() - start)
        return made[verb][0]

    graph, params = timed("trace", lambda: jq.trace(chain, weights, x))
    model = timed("prepare", lambda: jq.prepare(graph, params, qconfig, target=jq.targets.NASH_E))
    model = timed("calibrate", lambda: jq.calibrate(model, [x]))
    program = timed("lower", lambda: jq.lower(model))
    timed("run", lambda: jq.run(program, x))
    timed("apply", lambda: jq.apply(model, x))
    state = jq.TrainState.create(model, tx=optax.sgd(1e-3))
    step = jq.training.make_step(lambda outputs, batch: (outputs**2).mean(), donate=False)
    timed("training step", lambda: step(state, (x,)))
    timed("compare", lambda: [row.sqnr for row in jq.analysis.compare(model, x).rows])
    return {verb: made[verb][1] for verb in VERBS}


def _in_a_process(depth: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", str(depth)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", default="62,125,250,500")
    parser.add_argument("--processes", type=int, default=2, help="of each depth")
    parser.add_argument("--one", type=int, help="print the seconds of one depth as JSON")
    given = parser.parse_args()
    if given.one is not None:
        print(json.dumps(seconds(given.one)))
        return
    depths, found = [int(d) for d in given.depths.split(",")], {}
    for depth in depths:
        each = [_in_a_process(depth) for _ in range(given.processes)]
        found[depth] = {verb: min(one[verb] for one in each) for verb in VERBS}
        print(depth, {verb: round(value, 1) for verb, value in found[depth].items()}, flush=True)
    rows = []
    for verb in VERBS:
        growth = [found[b][verb] / found[a][verb] for a, b in pairwise(depths)]
        rows.append([verb, *(f"{found[d][verb]:.1f}" for d in depths), ", ".join(f"{g:.2f}" for g in growth)])
    head = ["verb", *(f"{d} layers, s" for d in depths), f"growth, at most {GOAL}"]
    load = f"Least of {given.processes} processes; mean load of the last 15 minutes: {os.getloadavg()[2]:.1f} on"
    load += f" {os.cpu_count()} cores. Beside other work a large compilation loses more than a small one."
    text = f"## Depth\n\n{__doc__.splitlines()[0]}\n`benchmarks/depth.py`. {load}\n\n" + markdown_table(head, rows)
    write_section("depth", text)
    print(text)


if __name__ == "__main__":
    main()
