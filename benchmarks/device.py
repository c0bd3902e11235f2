"""Pictures a second on a GPU or TPU: integers, with and without the fused kernel, against the same net in bfloat16.

python benchmarks/device.py [--batches 1 64 1024] [--nets ResNet-18 MobileNetV2] [--rounds 10] [--no-write]

`benchmarks/device.sh` runs it after the tests of exactness. On a CPU it refuses, since its figures would mean nothing.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jquant as jq
from jquant.graph.evaluate import evaluate
from jquant.graph.operator import eval_float
from jquant.numerics import fused_convolution
from jquant_converters import from_torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from keeping import markdown_table
from nets import MobileNetV2, ResNet
from results import write_section
from timing import Contender, Step, measure

COLUMNS = ("net", "batch", "bfloat16", "integers by XLA", "integers, kernels chosen", "layers by the kernel", "ratio")
NETS = {"ResNet-18": ResNet, "MobileNetV2": MobileNetV2}


def in_bfloat16(model: jq.Model, x: jax.Array) -> Step:
    """Values and weights in bfloat16, sums in float32."""
    kept = {"weight": jnp.bfloat16}
    graph, params = model.plan.graph, dict(model.params)
    owned = {
        node.name: {role: params[name].astype(kept.get(role, jnp.float32)) for role, name in node.params.items()}
        for node in graph.nodes
    }

    @jax.jit
    def run(owned: Any, x: jax.Array) -> Any:
        def rule(node: jq.Node, *operands: jax.Array) -> jax.Array:
            return eval_float(node.op, *operands, **owned[node.name]).astype(jnp.bfloat16)

        values = evaluate(graph, {graph.inputs[0].name: x}, rule)
        return [values[name] for name in graph.outputs]

    x = x.astype(jnp.bfloat16)
    return lambda: jax.block_until_ready(run(owned, x))


def integers(program: jq.Program, x: jax.Array, *, chosen: bool) -> tuple[Step, int]:
    """A compiled run on integers, and how many layers the kernel computes."""
    jax.clear_caches()  # `jq.run` is jitted: its trace of the other choice would be taken again
    used = 0
    choose = fused_convolution.pays

    def counted(layer: fused_convolution.Layer) -> bool:
        nonlocal used
        found = chosen and choose(layer)
        used += found
        return found

    fused_convolution.pays = counted  # type: ignore[assignment]
    try:
        run = jax.jit(lambda program, x: jq.run(program, x, raw=True)).lower(program, x).compile()
    finally:
        fused_convolution.pays = choose
    return lambda: jax.block_until_ready(run(program, x)), used


def measured(name: str, batch: int, rounds: int, size: int) -> list[str]:
    """A row of the table."""
    rng = np.random.default_rng(0)
    picture = rng.normal(size=(1, 3, size, size)).astype(np.float32)
    torch.manual_seed(0)
    graph, raw = from_torch(NETS[name]().eval(), (torch.from_numpy(picture),))
    config = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8(observer=jq.observers.min_max()))})
    model = jq.calibrate(jq.prepare(graph, raw, config, target="nash-e"), [jnp.asarray(picture)])
    program = jq.lower(model)
    x = jnp.asarray(rng.integers(-128, 128, (batch, 3, size, size), np.int8))
    plain, _ = integers(program, x, chosen=False)
    best, used = integers(program, x, chosen=True)
    base = in_bfloat16(model, x)
    names = ("bfloat16", "XLA", "chosen")
    contenders = [Contender(n, step, "bfloat16") for n, step in zip(names, (base, plain, best), strict=True)]
    times = measure(contenders, rounds)
    speeds = {n: batch / float(np.median(times[n])) for n in names}
    ratio = float(np.median(np.divide(times["chosen"], times["bfloat16"])))
    return [name, str(batch), *(f"{speeds[n]:,.0f}" for n in names), str(used), f"{ratio:.2f}"]


def main(argv: list[str] | None = None) -> list[list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64, 1024])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--on-cpu", action="store_true", help="try the script itself; writes nothing")
    parser.add_argument("--no-write", action="store_true", help="do not write RESULTS.md")
    options = parser.parse_args(argv)
    device = jax.devices()[0]
    if device.platform == "cpu" and not options.on_cpu:
        parser.error("no GPU or TPU is here")
    found = []
    for name in options.nets:
        for batch in options.batches:
            found.append(measured(name, batch, options.rounds, options.size))
            print(" | ".join(found[-1]), flush=True)
    if not options.no_write and not options.on_cpu:
        head = (
            f"## Integers on a device\n\n`benchmarks/device.sh`: pictures a second on one {device.device_kind}, "
            f"{options.rounds} rounds; jax {jax.__version__}. Integers in and out; ratio: seconds over those of "
            "bfloat16.\n\n"
        )
        write_section(f"device {device.platform}", head + markdown_table(COLUMNS, found, left=1))
    return found


if __name__ == "__main__":
    main()
