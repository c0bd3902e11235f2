"""What each verb costs on residual chains of growing depth: processor seconds, and how they grow from one to the next.

.venv/bin/python benchmarks/depth.py [--depths 62,125,250,500]

Each measurement is a process of its own, with compilation. Rounds go through all depths, and a growth is the median of
the rounds' own: the speed of a shared machine changes from minute to minute. Python's garbage collector looks through
all objects before each verb instead of at some moment within one.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from statistics import median

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
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", type=int, help="print the seconds of one depth as JSON")
    given = parser.parse_args()
    if given.one is not None:
        print(json.dumps(seconds(given.one)))
        return
    depths = [int(d) for d in given.depths.split(",")]
    rounds = []
    for _ in range(given.rounds):
        rounds.append({depth: _in_a_process(depth) for depth in depths})
        for depth, found in rounds[-1].items():
            print(depth, {verb: round(value, 1) for verb, value in found.items()}, flush=True)
    rows = []
    for verb in VERBS:
        seconds_of = [f"{median(one[depth][verb] for one in rounds):.1f}" for depth in depths]
        growth = [median(one[b][verb] / one[a][verb] for one in rounds) for a, b in pairwise(depths)]
        rows.append([verb, *seconds_of, ", ".join(f"{g:.2f}" for g in growth)])
    head = ["verb", *(f"{d} layers, s" for d in depths), f"growth, at most {GOAL}"]
    load = f"Medians of {given.rounds} rounds; mean load of the last 15 minutes: {os.getloadavg()[2]:.1f} on"
    load += f" {os.cpu_count()} cores.\nBeside other work a large compilation loses more than a small one."
    text = f"## Depth\n\n{__doc__.splitlines()[0]}\n`benchmarks/depth.py`. {load}\n\n" + markdown_table(head, rows)
    write_section("depth", text)
    print(text)


if __name__ == "__main__":
    main()
