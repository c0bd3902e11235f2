"""A transformer whose equal blocks run as one loop, against the same block by block: first calls, and later ones.

.venv/bin/python benchmarks/equal_blocks.py [--layers 24] [--width 192] [--batch 8] [--rounds 10]

Both are in one process. A first call compiles, with nothing compiled before; later ones alternate.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from keeping import markdown_table
from results import write_section

import jquant as jq
from jquant.calibration import observe
from jquant.meanings import rolled
from jquant.program import integers
from jquant.training import state as of_training

TOKENS, HEAD = 64, 32
COLUMNS = ("verb", "first call as a loop, s", "block by block, s", "ratio", "later calls, ratio", "quarters")


def transformer(params: Any, x: jax.Array) -> jax.Array:
    """x [N, TOKENS, width] through layers of attention and a perceptron, each behind a norm."""
    batch, tokens, width = x.shape

    def normed(x: jax.Array, weight: jax.Array) -> jax.Array:
        mean = x.mean(-1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-5) * weight

    def heads(x: jax.Array) -> jax.Array:
        return x.reshape(batch, tokens, width // HEAD, HEAD).transpose(0, 2, 1, 3)

    for layer in params:
        q, k, v = map(heads, jnp.split(normed(x, layer["first"]) @ layer["qkv"], 3, -1))
        attention = jax.nn.softmax(q @ k.transpose(0, 1, 3, 2) * np.float32(HEAD**-0.5), -1) @ v
        x = x + attention.transpose(0, 2, 1, 3).reshape(batch, tokens, width) @ layer["out"]
        x = x + jax.nn.gelu(normed(x, layer["second"]) @ layer["up"], approximate=False) @ layer["down"]
    return x


def drawn(layers: int, width: int) -> list[dict[str, jax.Array]]:
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> jax.Array:
        return jax.device_put((rng.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32))

    shapes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
    norms = {"first": jnp.ones(width), "second": jnp.ones(width)}
    return [{name: weight(*shape) for name, shape in shapes.items()} | norms for _ in range(layers)]


@contextmanager
def meaning_of(loop: bool) -> Iterator[None]:
    """Inside, blocks run as a loop in training as elsewhere, or none do."""
    with ExitStack() as patches:
        if loop:
            patches.enter_context(mock.patch.object(of_training, "MANY_BLOCKS", 8))
        else:
            for module in (rolled, integers, observe):
                patches.enter_context(mock.patch.object(module, "find_loops", return_value=[]))
        yield


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("layers", 24), ("width", 192), ("batch", 8), ("rounds", 10)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    rng = np.random.default_rng(1)
    x = jax.device_put(rng.normal(size=(given.batch, TOKENS, given.width)).astype(np.float32))
    graph, params = jq.trace(transformer, drawn(given.layers, given.width), x)
    model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target="nash-e")
    calibrated = jq.calibrate(model, [x])
    program = jq.lower(calibrated)
    state = jq.TrainState.create(calibrated, tx=optax.sgd(1e-3))

    step = jq.training.make_step(lambda outputs, _: (outputs**2).mean(), donate=False)
    compiled_verbs = {
        "run": (jq.run, program, x),
        "apply": (jq.apply, calibrated, x),
        "training step": (step, state, (x,)),
    }
    first: dict[str, list[float]] = {}
    later: dict[str, list[Callable[[], Any]]] = {name: [] for name in compiled_verbs}
    for loop in (True, False):
        with meaning_of(loop):
            calls: dict[str, Callable[[], Any]] = {
                name: lambda verb=verb, operands=operands: jax.jit(lambda *o: verb(*o)).lower(*operands).compile()
                for name, (verb, *operands) in compiled_verbs.items()
            }
            calls["calibrate"] = lambda: jq.calibrate(model, [x])
            calls["compare"] = lambda: jq.analysis.compare(calibrated, x)
            for name, call in calls.items():
                jax.clear_caches()
                start = time.perf_counter()
                made = call()
                first.setdefault(name, []).append(time.perf_counter() - start)
                print(name, "as a loop" if loop else "block by block", f"{first[name][-1]:.1f} s", flush=True)
                if name in later:
                    later[name].append(partial(made, *compiled_verbs[name][1:]))
    rows = []
    for name, (as_loop, plain) in first.items():
        row = [name, f"{as_loop:.1f}", f"{plain:.1f}", f"{as_loop / plain:.2f}", "-", "-"]
        if name in later:
            ratios = [seconds(later[name][0]) / seconds(later[name][1]) for _ in range(given.rounds)]
            low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
            row[-2:] = [f"{middle:.2f}", f"{low:.2f} to {high:.2f}"]
        rows.append(row)
    size = f"{given.layers} layers of width {given.width}, batches of {given.batch} x {TOKENS} tokens"
    head = (
        f"## Equal blocks\n\n{__doc__.splitlines()[0]}\n`benchmarks/equal_blocks.py`: {size}, {given.rounds} rounds.\n"
    )
    head += f"A training step has a loop from {of_training.MANY_BLOCKS} blocks on; here it is made to have one.\n\n"
    write_section("equal_blocks", head + markdown_table(COLUMNS, rows))


if __name__ == "__main__":
    main()
