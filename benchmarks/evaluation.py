"""`jq.evaluate` against a loop by hand over a compiled step, and the memory of the host over 2,000 batches.

python benchmarks/evaluation.py [--rounds 10] [--no-write]

A batch is 32 pictures of 32 x 32 through ResNet-20 as integers. The loop by hand dispatches a batch, counts the hits on
the device, and waits once at the end. Both read the same numpy arrays. Goal: at least 0.9 of its batches a second.
"""

import argparse
import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import torch

import jquant as jq
from jquant_converters import from_torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from nets import CifarResNet
from results import write_section
from timing import THREADS, Contender, measure, report

BATCHES, SIZE, MANY = 40, 32, 2000
GOAL = 1 / 0.9  # seconds over those of the loop


def program_of_resnet() -> jq.Program:
    net = CifarResNet(20).eval()
    x = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    graph, params = from_torch(net, (torch.from_numpy(x[:1]),))
    config = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8(observer=jq.observers.min_max()))})
    model = jq.prepare(graph, params, config, target=jq.targets.NASH_E)
    return jq.lower(jq.calibrate(model, [jnp.asarray(x)]))


def batches(count: int, shape: tuple[int, ...] = (SIZE, 3, 32, 32)) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pictures that are made as they are asked for, so that none is held."""
    rng = np.random.default_rng(1)
    pictures, labels = rng.normal(size=shape).astype(np.float32), rng.integers(0, 10, shape[0]).astype(np.int32)
    for i in range(count):
        yield np.roll(pictures, i, axis=0), np.roll(labels, i)


@jax.jit
def hits(program: jq.Program, x: jax.Array, labels: jax.Array) -> jax.Array:
    return (jq.run(program, x).argmax(-1) == labels).sum()


def by_hand(program: jq.Program) -> float:
    found = [hits(program, x, labels) for x, labels in batches(BATCHES)]
    return 100 * sum(map(int, found)) / (BATCHES * SIZE)


def evaluated(program: jq.Program) -> float:
    return jq.evaluate(program, batches(BATCHES), {"top": jq.evaluation.Accuracy()}, total=BATCHES).figures["top"]


def growth() -> float:
    """Megabytes that the host holds more after 2,000 batches than after 100, of one small layer."""
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(64, 10)), jnp.float32)}
    x = np.zeros((256, 64), np.float32)
    graph, params = jq.trace(lambda p, x: x @ p["w"], params, jnp.asarray(x))
    model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target="nash-e")
    program = jq.lower(jq.calibrate(model, [jnp.asarray(x + 1)]))
    process, held = psutil.Process(), []
    for count in (100, MANY):
        jq.evaluate(program, batches(count, (256, 64)), {"top": jq.evaluation.Accuracy()}, total=count)
        gc.collect()
        held.append(process.memory_info().rss / 1e6)
    return held[1] - held[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--no-write", action="store_true", help="do not write RESULTS.md")
    options = parser.parse_args()
    more = growth()
    program = program_of_resnet()
    assert evaluated(program) == by_hand(program)
    contenders = [
        Contender("a loop by hand", lambda: by_hand(program), "a loop by hand"),
        Contender("jq.evaluate", lambda: evaluated(program), "a loop by hand", GOAL),
    ]
    table = report(contenders, measure(contenders, options.rounds))
    memory = f"Over {MANY} batches the host held {max(more, 0):.1f} MB more than over 100 (at most 5 wanted)."
    print(memory)
    if not options.no_write:
        head = f"## Evaluation\n\n{BATCHES} batches of {SIZE} pictures, ResNet-20 as integers. {THREADS} threads, jax "
        head += f"{jax.__version__}.\n`benchmarks/evaluation.py`. {memory}\n\n"
        write_section("evaluation", head + table)


if __name__ == "__main__":
    main()
