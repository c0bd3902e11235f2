"""Where the time of a net's integers goes: its products alone in several ways, its nodes alone, and the whole.

python benchmarks/floors.py [--rounds 15] [--nets ResNet-18] [--no-write]

The products of a layer, int8 to int32 without a rescale, are timed as jquant runs them, as one matrix product of
patches, as a product for each position of the kernel, and in float32. The sum over all layers of the fastest exact way
is what these kernels of XLA leave possible: a goal below it wants other kernels. A call that computes nothing is taken
off each. The whole net and the peers of its goals alternate, and the products do among themselves.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from keeping import markdown_table
from results import write_section
from run_integers import THREADS, WORKLOADS, Workload, contenders_of, made_of
from timing import measure

import jquant as jq
from jquant.numerics.convolution import NO_WINDOW, Window, convolve, matmul, pad_spatial, taps
from jquant.ops.conv import Conv, Linear
from jquant.program.integers import run_node

CHOSEN, PATCHES, POSITIONS, FLOAT = "as jquant runs them", "patches", "positions", "float32"
Timed = Callable[[], Any]


class Layer(NamedTuple):
    """Layers of one shape: int8 operands, and how often the net has them."""

    x: jax.Array
    weight: jax.Array
    window: Window
    groups: int
    kernel: str
    count: int


def layers_of(program: jq.Program, values: Mapping[str, jax.Array]) -> dict[str, Layer]:
    """{name of the first: layer}."""
    found: dict[Any, tuple[str, Layer]] = {}
    for node in program.graph.nodes:
        if not isinstance(node.op, Conv | Linear):
            continue
        conv = isinstance(node.op, Conv)
        window = Window(node.op.strides, node.op.padding, node.op.dilation) if conv else NO_WINDOW
        x, weight = values[node.inputs[0]], program.constants[node.name]["weight"]
        groups, kernel = node.op.groups if conv else 1, program.formats[node.name].kernel
        key = x.shape, weight.shape, window, groups, kernel
        name, layer = found.get(key, (node.name, Layer(x, weight, window, groups, kernel, 0)))
        found[key] = name, layer._replace(count=layer.count + 1)
    return dict(found.values())


def ways_of(layer: Layer) -> dict[str, Timed]:
    """The sums of products of a layer: the same integers in every way but float32."""

    def positions(x: jax.Array, weight: jax.Array) -> jax.Array:
        kernel = weight.shape[:-2]
        shifted = taps(pad_spatial(x, layer.window.padding), kernel, layer.window)
        products = [matmul(tap, weight[place]) for place, tap in zip(np.ndindex(*kernel), shifted, strict=True)]
        return sum(products[1:], products[0])

    of = partial(convolve, window=layer.window, groups=layer.groups)
    ways: dict[str, Callable[..., jax.Array]] = {CHOSEN: partial(of, kernel=layer.kernel)}
    if layer.weight.ndim > 2:
        ways[PATCHES] = partial(of, kernel="patches")
        if layer.groups == 1 and np.prod(layer.weight.shape[:-2]) > 1:
            ways[POSITIONS] = positions
    made = {name: partial(jax.jit(way), layer.x, layer.weight) for name, way in ways.items()}
    expected = np.asarray(made[CHOSEN]())
    for name, call in made.items():
        np.testing.assert_array_equal(np.asarray(call()), expected, err_msg=name)
    floats = layer.x.astype(jnp.float32), layer.weight.astype(jnp.float32)
    made[FLOAT] = partial(jax.jit(ways[CHOSEN] if layer.weight.ndim == 2 else of), *floats)
    return made


def nodes_of(program: jq.Program, values: Mapping[str, jax.Array]) -> dict[str, Timed]:
    """Each node alone, on the operands that it has in the net."""

    def alone(node: jq.Node) -> Timed:
        entry = program.formats[node.name]
        run = jax.jit(lambda operands, constants: run_node(node, entry, program.target, operands, constants))
        return partial(run, [values[name] for name in node.inputs], program.constants[node.name])

    return {node.name: alone(node) for node in program.graph.nodes}


def medians(calls: Mapping[Any, Timed], rounds: int) -> dict[Any, float]:
    """Milliseconds by key, in alternating rounds, less those of a call that computes nothing."""
    nothing = partial(jax.jit(lambda x: x), jnp.zeros(1))
    calls = {**calls, None: nothing}
    for call in calls.values():
        jax.block_until_ready(call())
    times: dict[Any, list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[key].append(time.perf_counter() - start)
    idle = np.asarray(times.pop(None))
    return {key: 1000 * max(float(np.median(several - idle)), 0.0) for key, several in times.items()}


def rows_of(workload: Workload, rounds: int) -> list[list[str]]:
    made = made_of(workload)
    contenders = contenders_of(workload, made)
    ours = contenders[0]
    whole = {name: 1000 * float(np.median(t)) for name, t in measure(contenders, rounds).items()}
    program = made.program
    values = jq.run_with_taps(program, jnp.asarray(made.data))
    layers = layers_of(program, values)
    calls = {(name, way): call for name, layer in layers.items() for way, call in ways_of(layer).items()}
    found = medians(calls, rounds)
    nodes = medians(nodes_of(program, values), rounds)

    def total(pick: Callable[[dict[str, float]], float]) -> float:
        of_layer = {n: {way: found[n, way] for m, way in calls if m == n} for n in layers}
        return sum(layer.count * pick(of_layer[name]) for name, layer in layers.items())

    best = total(lambda ways: min(time for way, time in ways.items() if way != FLOAT))
    goals = [
        (name.partition(",")[0], contender.goal * whole[name])
        for name, contender in ((c.name, c) for c in contenders)
        if contender.goal is not None
    ]
    parts = [
        ("the whole net", whole[ours.name]),
        ("its nodes, each alone", sum(nodes.values())),
        ("products, as jquant runs them", total(lambda ways: ways[CHOSEN])),
        ("products, patches", total(lambda ways: ways.get(PATCHES, ways[CHOSEN]))),
        ("products, positions", total(lambda ways: ways.get(POSITIONS, ways[CHOSEN]))),
        ("products, float32 of XLA", total(lambda ways: ways[FLOAT])),
        ("products, the fastest exact way of each layer", best),
    ]
    rows = [[workload.name, part, f"{ms:.2f}", f"{ms / whole[ours.name]:.2f}", "-"] for part, ms in parts]
    for peer, ms in goals:
        below = "yes" if ms < best else "no"
        rows.append([workload.name, f"the goal against {peer}", f"{ms:.2f}", f"{ms / whole[ours.name]:.2f}", below])
    return rows


COLUMNS = ("net", "part", "ms", "of the whole", "goal below the fastest products")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--nets", default="", help="only workloads whose name begins so")
    parser.add_argument("--no-write", action="store_true", help="do not write RESULTS.md")
    options = parser.parse_args(argv)
    torch.set_num_threads(THREADS)
    found = []
    for workload in WORKLOADS:
        if workload.name.startswith(options.nets) and workload.goals:
            rows = rows_of(workload, options.rounds)
            print("\n".join(" | ".join(row) for row in rows), flush=True)
            found += rows
    if not options.no_write:
        text = "\n".join(__doc__.splitlines()[4:])
        nets = f" --nets {options.nets}" if options.nets else ""
        how = f"`python benchmarks/floors.py{nets}`: medians of {options.rounds} rounds, {THREADS} threads."
        head = f"## Floors\n\n{how}\n{text}\n\n"
        write_section("floors", head + markdown_table(COLUMNS, found, left=2))


if __name__ == "__main__":
    main()
