"""`demo`: a small trained network, data and a qconfig as files, and the whole way from float to integers on them."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

from jquant import ops, targets
from jquant.calibration.collection import calibrate
from jquant.cli.console import Console, Json, Quiet, Verbose, command, replacing
from jquant.cli.losses import cross_entropy
from jquant.cli.settings import read_settings
from jquant.cli.state import State, save_state
from jquant.graph.float import evaluate_float
from jquant.host.progress import track
from jquant.meanings.apply import apply
from jquant.program import integers
from jquant.program.files import save
from jquant.program.lower import lower
from jquant.types import Array, FrozenMap, Graph, Input, Node

CLASSES, SIDE = 6, 16

CONFIG = """\
[jquant]
schema = 1

[target]
march = "nash-e"

# Everything at 8 bits, weights with a scale for each output channel. Later rules override earlier ones.
[rules."*".output]
dtype = "int8"
observer = { name = "mse" }
quantizer = "lsq"

[rules."*".weight]
dtype = "int8"
axis = "out"
quantizer = "lsq"

[train]
epochs = 1
batch = 50
optimizer = "adamw"
learning_rate = 3e-4
"""


@command
def demo(
    folder: Annotated[Path, typer.Argument(help="Where to write the files.")] = Path("jquant-demo"),
    steps: Annotated[int, typer.Option(min=1, help="Of float training.")] = 150,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make a small network, data and a qconfig as files, quantize them, and say what to try next.

    The pictures are drawn here: bars in six directions with noise. The network is trained for some seconds.

    \b
    jquant demo
    jquant demo somewhere/else --steps 300
    """
    console = Console(json, quiet, verbose)
    graph, params = network()
    train_x, train_y = pictures(1, 1500)
    test_x, test_y = pictures(2, 600)
    params = train_float(graph, params, train_x, train_y, steps)
    folder.mkdir(parents=True, exist_ok=True)
    for name, arrays in (("train.npz", (train_x, train_y)), ("test.npz", (test_x, test_y))):
        with replacing(folder / name) as partial_path, partial_path.open("wb") as file:
            np.savez(file, x=arrays[0], y=arrays[1])
    with replacing(folder / "q.toml") as partial_path:
        partial_path.write_text(CONFIG)
    settings = read_settings(folder / "q.toml")
    state = State(graph, params, settings.qconfig, targets.NASH_E)
    model = calibrate(state.prepared(), [jnp.asarray(train_x[i : i + 100]) for i in range(0, 500, 100)])
    program = lower(model)
    save_state(folder / "float.jqs", State(graph, params))
    save_state(folder / "net.jqs", State(graph, params, settings.qconfig, targets.NASH_E, model.qparams))
    save(folder / "net.jq", program)
    x = jnp.asarray(test_x)
    outputs = {
        "float": apply(model, x, mode="float"),
        "int8 fake-quant": apply(model, x),
        "int8 integers": integers.run(program, x),
    }
    rows = [
        {"meaning": n, "top-1 %": 100 * float(np.mean(np.asarray(y).argmax(-1) == test_y))} for n, y in outputs.items()
    ]
    console.rows(rows)
    console.text(f"\nwrote {folder}/: float.jqs, net.jqs, net.jq, q.toml, train.npz, test.npz. Try:\n{_next(folder)}")
    console.value({"folder": folder, "top_1": {row["meaning"]: row["top-1 %"] for row in rows}})


def _next(folder: Path) -> str:
    lines = (
        "jquant inspect {0}/net.jqs",
        "jquant compare {0}/net.jqs --data {0}/test.npz --sort own_sqnr --top 5",
        "jquant sensitivity {0}/net.jqs --data {0}/test.npz --top 5",
        "jquant train {0}/net.jqs --config {0}/q.toml --data {0}/train.npz -o {0}/trained.jqs",
        "jquant report {0}/net.jqs --data {0}/test.npz -o {0}/report",
    )
    return "\n".join(f"  {line.format(folder)}" for line in lines)


def network() -> tuple[Graph, dict[str, Array]]:
    """conv, conv, pool, conv + residual, mean, linear: [N, 1, 16, 16] to [N, 6]; random parameters."""
    rng = np.random.default_rng(0)
    shapes = {"stem": (8, 1, 3, 3), "body": (16, 8, 3, 3), "side": (16, 16, 3, 3), "head": (CLASSES, 16)}
    params = {}
    for name, shape in shapes.items():
        fan = np.prod(shape[1:])
        params[f"{name}.weight"] = jnp.asarray(rng.normal(size=shape) * np.sqrt(2 / fan), jnp.float32)
        params[f"{name}.bias"] = jnp.zeros(shape[0], jnp.float32)

    def node(name: str, op: Any, *inputs: str) -> Node:
        roles = {"weight": f"{name}.weight", "bias": f"{name}.bias"} if name in shapes else {}
        return Node(name, op, inputs, FrozenMap(roles))

    conv = partial(ops.Conv, strides=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1))
    pool = ops.MaxPool(kernel=(2, 2), strides=(2, 2), padding=((0, 0), (0, 0)), dilation=(1, 1))
    nodes = (
        node("stem", conv(), "x"),
        node("stem.relu", ops.Relu(), "stem"),
        node("body", conv(), "stem.relu"),
        node("body.relu", ops.Relu(), "body"),
        node("pool", pool, "body.relu"),
        node("side", conv(), "pool"),
        node("add", ops.Add(), "side", "pool"),
        node("add.relu", ops.Relu(), "add"),
        node("mean", ops.Mean(axes=(2, 3)), "add.relu"),
        node("head", ops.Linear(), "mean"),
    )
    return Graph((Input("x", (None, 1, SIDE, SIDE)),), nodes, ("head",)), params


def pictures(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Bars in six directions with noise: [N, 1, 16, 16] float32 in [-1, 1), and their classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count).astype(np.int32)
    angle = (labels * np.pi / CLASSES + rng.normal(size=count) * 0.06)[:, None, None]
    row, column = np.meshgrid(np.linspace(-1, 1, SIDE), np.linspace(-1, 1, SIDE), indexing="ij")
    phase, width = rng.uniform(0, 2 * np.pi, (2, count, 1, 1))
    bars = np.cos((np.cos(angle) * column + np.sin(angle) * row) * (6 + width) + phase)
    noisy = 0.3 * bars + 0.45 * rng.normal(size=(count, SIDE, SIDE))
    return np.clip(noisy, -1, 127 / 128).astype(np.float32)[:, None], labels


def train_float(graph: Graph, params: dict, x: np.ndarray, y: np.ndarray, steps: int) -> dict[str, Array]:
    """Adam on the float graph."""
    import optax

    tx = optax.adam(optax.cosine_decay_schedule(5e-3, steps))

    @jax.jit
    def step(params: dict, state: Any, x: Array, y: Array) -> tuple[dict, Any]:
        gradient = jax.grad(lambda p: cross_entropy(evaluate_float(graph, p, x)[0], y)[0])(params)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integer counts with floats
            updates, state = tx.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

    state, rng = tx.init(params), np.random.default_rng(3)
    for _ in track(range(steps), "training in float"):
        index = rng.integers(0, len(x), 50)
        params, state = step(params, state, jnp.asarray(x[index]), jnp.asarray(y[index]))
    return params
