"""`doctor`: what is installed, what it runs on, and whether the integers are exact here."""

import importlib.metadata
import platform
import time
from typing import Any

import jquant as jq
from jquant.cli.console import Console, Json, Quiet, UnmetError, Verbose, command

PACKAGES: tuple[str, ...] = ("jax", "jaxlib", "numpy", "chex", "optax", "orbax-checkpoint", "safetensors", "torch")
PACKAGES = (*PACKAGES, "onnx", "flax", "jinja2", "matplotlib", "rich", "typer", "pillow")


@command
def doctor(json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Print versions and devices, and compare the integers with the specification on this machine. Exit code 3 if not.

    \b
    jquant doctor
    jquant doctor --json
    """
    console = Console(json, quiet, verbose)
    found = report()
    console.rows([{"what": key, "found": str(value)} for key, value in found.items()])
    console.value(found)
    if not found["integers equal the reference"]:
        raise UnmetError("the integers on this machine differ from the reference: please report this output")
    console.next("demo")


def report() -> dict[str, Any]:
    """What `doctor` prints."""
    import jax

    devices = ", ".join(f"{d.device_kind} ({d.platform})" for d in jax.devices())
    exact, outputs, seconds = self_test()
    return {
        "jquant": jq.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}",
        "devices": devices,
        "fast int8 products": fast_int8(),
        "integers equal the reference": exact,
        "outputs compared": outputs,
        "seconds": round(seconds, 2),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def fast_int8() -> str:
    """Whether XLA sends an int8 convolution to its fast library, as the compiled program shows."""
    import jax
    import jax.numpy as jnp

    if jax.default_backend() != "cpu":
        return f"not looked for on {jax.default_backend()}: there the kernels are chosen by platform"
    from jquant.numerics.convolution import matmul

    text = str(jax.jit(matmul).lower(jnp.ones((64, 64), jnp.int8), jnp.ones((64, 64), jnp.int8)).compile().as_text())
    return "yes" if "__ynn_fusion" in text else "no: this jaxlib has none, integers are exact and slower"


def self_test() -> tuple[bool, int, float]:
    """A small network with every kind of rescale, run and by the reference: equal, outputs compared, seconds."""
    import jax.numpy as jnp
    import numpy as np

    from jquant import ops

    start, rng = time.perf_counter(), np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for name, shape in (
            ("a.weight", (8, 3, 3, 3)),
            ("a.bias", (8,)),
            ("b.weight", (8, 1, 3, 3)),
            ("c.weight", (5, 8)),
        )
    }
    conv = ops.Conv(strides=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1))
    wide = ops.Conv(strides=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1), groups=8)
    nodes = (
        jq.Node("a", conv, ("x",), jq.FrozenMap({"weight": "a.weight", "bias": "a.bias"})),
        jq.Node("b", wide, ("a",), jq.FrozenMap({"weight": "b.weight"})),
        jq.Node("s", ops.Sigmoid(), ("b",)),
        jq.Node("m", ops.Mul(), ("s", "a")),
        jq.Node("p", ops.Mean(axes=(2, 3)), ("m",)),
        jq.Node("c", ops.Linear(), ("p",), jq.FrozenMap({"weight": "c.weight"})),
    )
    graph = jq.Graph((jq.Input("x", (None, 3, 8, 8)),), nodes, ("c",))
    x = jnp.asarray(rng.normal(size=(4, 3, 8, 8)), jnp.float32)
    config = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8())})
    model = jq.prepare(graph, params, config, target=jq.targets.NASH_E)
    program = jq.lower(jq.calibrate(model, [x]))
    fast = jq.run_with_taps(program, x)
    _, slow = jq.reference.run(program, np.asarray(x))
    names = program.graph.values
    equal = all(np.array_equal(np.asarray(fast[name]), slow[name]) for name in names)
    return equal, sum(slow[name].size for name in names), time.perf_counter() - start
