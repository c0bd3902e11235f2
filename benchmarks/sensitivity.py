"""Sensitivity in lanes of one compiled pass, against one evaluation a quantizer: `--net small` or `--net mobilenet`.

Two loops to compare with, each over the same quantizers of values: one that compiles for each of them, as switching
quantizers off and on in a plan does, and one that compiles once and runs them one by one (a single lane). Process time
of all threads and wall time, each from a cold start of its own jit cache; medians of alternating rounds.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jquant as jq
from jquant import analysis
from jquant.analysis.metrics import sqnr
from jquant.graph.evaluate import evaluate
from jquant.graph.float import float_rule
from jquant.meanings.fake_quant import fake_quant_tap


def small() -> tuple[jq.Graph, dict, tuple[int, ...]]:
    from jquant.cli.demo import network

    return *network(), (1, 16, 16)


def mobilenet() -> tuple[jq.Graph, dict, tuple[int, ...]]:
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import torch
    from nets import load_mobilenet_v2

    from jquant_converters import from_torch

    return *from_torch(load_mobilenet_v2(), (torch.zeros(1, 3, 64, 64),)), (3, 64, 64)


def compiling_loop(model: jq.Model, x: jax.Array) -> None:
    """A compilation and an evaluation for each quantizer."""
    (output,) = model.plan.graph.outputs
    tap = fake_quant_tap(model.plan, model.qparams)
    baseline = jq.apply(model, x, mode="float")
    for name in model.plan.owned:

        @jax.jit
        def run(x: jax.Array, on: str = name) -> jax.Array:
            inputs = {model.plan.graph.inputs[0].name: x}
            rule = float_rule(model.plan.graph, model.params)
            return evaluate(model.plan.graph, inputs, rule, lambda n, v: tap(n, v) if n == on else v)[output]

        float(sqnr(baseline, run(x)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", choices=("small", "mobilenet"), default="small")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lanes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    graph, params, shape = {"small": small, "mobilenet": mobilenet}[options.net]()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(options.batch, *shape)), jnp.float32)
    config = jq.QConfig(jq.templates.int8_default())
    model = jq.prepare(graph, params, config, target=jq.targets.NASH_E)
    model = jq.calibrate(model, [x])

    def lanes(count: int) -> None:
        analysis.sensitivity(model, [x], kinds=["activation"], lanes=count)

    runs: dict[str, Callable[[], None]] = {
        "lanes": lambda: lanes(options.lanes),
        "loop, compiled once": lambda: lanes(1),
        "loop, compiled each": lambda: compiling_loop(model, x),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            jax.clear_caches()
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {f"lanes / {name}": medians["lanes"] / m for name, m in medians.items() if name != "lanes"}
    print(json.dumps({"quantizers": len(model.plan.owned), "cpu seconds": medians, "ratios": ratios}, indent=1))


if __name__ == "__main__":
    main()
