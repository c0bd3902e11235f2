"""Memory of running integers, and what it costs in time: products in parts against products as a whole.

python benchmarks/memory.py [--rounds 20] [--no-write]

`peak` is the memory that XLA plans beside weights and inputs (`memory_analysis`). `bound` is 1.5 times the two largest
neighbouring activations and the weights, less the weights: what peak should stay below.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jquant as jq
from jquant.ops import conv
from jquant_converters import from_torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from keeping import markdown_table
from nets import CifarResNet, MobileNetV2, ResNet
from results import write_section
from timing import THREADS, Contender, measure

COLUMNS = ("net", "batch", "peak, MB", "as a whole, MB", "bound, MB", "met", "time over the whole", "quarters")
WORKLOADS = (("ResNet-20", 32, 1), ("ResNet-20", 32, 64), ("ResNet-18", 224, 1), ("ResNet-18", 224, 8))
WORKLOADS = (*WORKLOADS, ("MobileNetV2", 224, 1), ("MobileNetV2", 224, 8))
NETS = {"ResNet-20": CifarResNet, "ResNet-18": ResNet, "MobileNetV2": MobileNetV2}


class Compiled(NamedTuple):
    run: jax.stages.Compiled
    peak: int


def program_of(name: str, size: int) -> jq.Program:
    torch.manual_seed(0)
    picture = np.random.default_rng(0).normal(size=(1, 3, size, size)).astype(np.float32)
    graph, raw = from_torch(NETS[name]().eval(), (torch.from_numpy(picture),))
    config = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8(observer=jq.observers.min_max()))})
    return jq.lower(jq.calibrate(jq.prepare(graph, raw, config, target="nash-e"), [jnp.asarray(picture)]))


def compiled(program: jq.Program, x: jax.Array, *, in_parts: bool) -> Compiled:
    jax.clear_caches()
    with mock.patch.object(conv, "are_parts_of_use", return_value=in_parts):
        run = jax.jit(lambda program, x: jq.run(program, x, raw=True)).lower(program, x).compile()
    return Compiled(run, run.memory_analysis().temp_size_in_bytes)


def bound(program: jq.Program, x: jax.Array) -> float:
    types = jax.eval_shape(lambda program, x: jq.run_with_taps(program, x, raw=True), program, x)
    size = {name: v.size * v.dtype.itemsize for name, v in types.items()}
    neighbours = max(size[n.name] + max(size[i] for i in n.inputs) for n in program.graph.nodes if n.inputs)
    weights = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(program))
    return 1.5 * (neighbours + weights) - weights


def row(name: str, size: int, batch: int, rounds: int) -> list[str]:
    program = program_of(name, size)
    x = jnp.asarray(np.random.default_rng(0).integers(-128, 128, (batch, 3, size, size), np.int8))
    parts, whole = (compiled(program, x, in_parts=flag) for flag in (True, False))
    np.testing.assert_array_equal(parts.run(program, x), whole.run(program, x))
    contenders = [
        Contender(key, lambda one=one: jax.block_until_ready(one.run(program, x)), "whole")
        for key, one in (("parts", parts), ("whole", whole))
    ]
    times = measure(contenders, rounds)
    low, middle, high = np.quantile(np.divide(times["parts"], times["whole"]), (0.25, 0.5, 0.75))
    most = bound(program, x)
    figures = [f"{v / 1e6:.2f}" for v in (parts.peak, whole.peak, most)]
    met = "yes" if parts.peak <= most else "no"
    return [name, str(batch), *figures, met, f"{middle:.2f}", f"{low:.2f} to {high:.2f}"]


def main(argv: list[str] | None = None) -> list[list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--no-write", action="store_true", help="do not write RESULTS.md")
    options = parser.parse_args(argv)
    found = []
    for name, size, batch in WORKLOADS:
        if name in options.nets:
            found.append(row(name, size, batch, options.rounds))
            print(" | ".join(found[-1]), flush=True)
    if not options.no_write:
        head = f"## Memory of a run\n\n`benchmarks/memory.py`: {options.rounds} rounds, {THREADS} threads, jax "
        head += f"{jax.__version__}. Peak beside weights and inputs.\n\n"
        write_section("memory", head + markdown_table(COLUMNS, found, left=1))
    return found


if __name__ == "__main__":
    main()
