"""From a torch module to its first integer: seconds and compilations of each verb, in fresh processes.

python benchmarks/first_integer.py [--rounds 3] [--nets MobileNetV2 ResNet-18] [--no-write]

A cold process has an empty cache of compiled programs, a warm one the cache that the cold one filled
(`jq.use_compilation_cache`). Goal: behind the imports the warm one takes at most 0.3 of the time, and each verb
compiles no more than its limit.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

# The compilations that each verb may take.
LIMITS = {"from_torch": 2, "prepare": 2, "calibrate": 3, "lower": 6, "run": 1, "run again": 0}
GOAL = 0.3
COLUMNS = ("net", "verb", "cold, s", "warm, s", "compilations", "at most", "warm over cold", "goal, at most")


def one_process(name: str, cache: str) -> dict[str, tuple[float, int]]:
    """{verb: (seconds, compilations)} in this process."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch
    from nets import CifarResNet, MobileNetV2, ResNet

    import jquant as jq
    from jquant_converters import from_torch

    jq.use_compilation_cache(cache)
    compiled: list[float] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    nets = {"ResNet-20": (CifarResNet, 32), "MobileNetV2": (MobileNetV2, 224), "ResNet-18": (ResNet, 224)}
    make, size = nets[name]
    torch.manual_seed(0)
    net = make().eval()
    data = np.random.default_rng(0).normal(size=(1, 3, size, size)).astype(np.float32)
    x, found, held = jnp.asarray(data), {}, {}
    config = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8())})
    verbs = {
        "from_torch": lambda: from_torch(net, (torch.from_numpy(data),)),
        "prepare": lambda: jq.prepare(*held["from_torch"], config, target="nash-e"),
        "calibrate": lambda: jax.block_until_ready(jq.calibrate(held["prepare"], [x])),
        "lower": lambda: jax.block_until_ready(jq.lower(held["calibrate"])),
        "run": lambda: jax.block_until_ready(jq.run(held["lower"], x)),
        "run again": lambda: jax.block_until_ready(jq.run(held["lower"], x)),
    }
    for verb, call in verbs.items():
        before, start = len(compiled), time.perf_counter()
        held[verb] = call()
        found[verb] = time.perf_counter() - start, len(compiled) - before
    return found


def measured(name: str, cache: str) -> dict[str, tuple[float, int]]:
    command = [sys.executable, "-W", "ignore", __file__, "--one", name, cache]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def rows_of(name: str, rounds: int) -> list[list[str]]:
    import numpy as np

    cold, warm = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(measured(name, cache))
            warm.append(measured(name, cache))
    found, totals = [], []
    for verb, limit in LIMITS.items():
        times = [float(np.median([one[verb][0] for one in side])) for side in (cold, warm)]
        totals.append(times)
        count = max(one[verb][1] for one in cold)
        found.append([name, verb, *(f"{t:.2f}" for t in times), str(count), str(limit), "", ""])
    ratios = [sum(v[0] for v in w.values()) / sum(v[0] for v in c.values()) for w, c in zip(warm, cold, strict=True)]
    both = [f"{sum(t[i] for t in totals):.2f}" for i in range(2)]
    count = max(sum(v[1] for v in one.values()) for one in cold)
    total = [str(count), str(sum(LIMITS.values())), f"{np.median(ratios):.2f}", f"{GOAL:.2f}"]
    return [*found, [name, "all", *both, *total]]


def main(argv: list[str] | None = None) -> list[list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nets", nargs="+", default=["ResNet-20", "MobileNetV2", "ResNet-18"])
    parser.add_argument("--one", nargs=2, metavar=("NET", "CACHE"), help="measure in this process and print JSON")
    parser.add_argument("--no-write", action="store_true", help="do not write RESULTS.md")
    options = parser.parse_args(argv)
    if options.one:
        print(json.dumps(one_process(*options.one)))
        return []
    from keeping import markdown_table
    from results import write_section

    found = []
    for name in options.nets:
        found += rows_of(name, options.rounds)
        print(" | ".join(found[-1]), flush=True)
    if not options.no_write:
        head = "## To the first integer\n\n`benchmarks/first_integer.py`: fresh processes, batch 1, medians; rounds: "
        head += f"{options.rounds}. Compilations of a cold process.\n\n"
        write_section("first_integer", head + markdown_table(COLUMNS, found, left=2))
    return found


if __name__ == "__main__":
    main()
