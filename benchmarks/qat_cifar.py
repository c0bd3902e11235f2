"""QAT of a CIFAR-10 ResNet-20 at few bits, by quantizer and by batch norm: writes docs/qat-cifar.md.

python benchmarks/qat_cifar.py --data DIR [--seeds 0 1 2] [--epochs N] [--runs GLOB] [--no-write]

DIR holds `cifar10_jpeg.npz` and `cifar10_resnet20.pth`. Each run is kept as a file below `out/qat_cifar/`, and a run
that is there is not repeated: an interrupted command goes on, and several may share the work, by --runs.
A seed decides which images calibrate, the order of the batches, and how they are augmented.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from rich.console import Console
from rich.table import Table

import jquant as jq
from jquant.host.progress import track
from jquant_converters import from_torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))
from keeping import DOCS, keep, markdown_table, read_kept, spread  # noqa: E402
from mobilenet_v2 import MEAN, STD  # noqa: E402
from nets import load_cifar_resnet  # noqa: E402

BATCH, CALIBRATION = 64, 256
RATE = 0.01  # a tenth of the rate of float training
RATES = (RATE, 0.001)  # of the table of batch norms
BATCH_NORMS = ("fold", "live", "frozen", "reverse_fold")
QUANTIZERS = {
    "fake_quant": jq.fake_quant,
    "pact": jq.pact,
    "lsq": jq.lsq,
    "lsq_plus": jq.lsq_plus,
}
TITLES = {"fake_quant": "fake-quant", "pact": "PACT", "lsq": "LSQ", "lsq_plus": "LSQ+"}
WIDTHS = (8, 4, 3, 2)
KEPT = "qat_cifar"

BatchNorm = Literal["fold", "live", "frozen", "reverse_fold"]
Batch = tuple[jax.Array, jax.Array]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training.

    `bits`        of weights and values; the input, and the weights of the first and last layer, have 8. 0 is float
    `quantizer`   of the values. Weights take LSQ where values take LSQ or LSQ+, else fake-quant
    `batch_norm`  as for `jq.prepare`
    """

    bits: int
    quantizer: str = "lsq"
    batch_norm: BatchNorm = "live"
    seed: int = 0
    epochs: int
    rate: float = RATE

    @property
    def name(self) -> str:
        what = f"w{self.bits}a{self.bits}-{self.quantizer}" if self.bits else "float"
        rate = "" if self.rate == RATE else f"-rate{self.rate:g}"
        return f"{what}-{self.batch_norm}-{self.epochs}epochs{rate}-seed{self.seed}"


def all_runs(seeds: list[int], epochs: int) -> list[Run]:
    """The longest rows of the tables last, so that an interrupted command has whole seeds."""
    found = []
    for seed in seeds:
        every = partial(Run, seed=seed, epochs=epochs)
        found.append(every(bits=0))
        found += [every(bits=bits, quantizer=name) for bits in WIDTHS for name in QUANTIZERS]
        found += [every(bits=4, batch_norm=kept, rate=rate) for kept in BATCH_NORMS for rate in RATES]
    return list(dict.fromkeys(found))  # live batch norm stands in both tables


class Data(NamedTuple):
    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray


class Outcome(NamedTuple):
    """Accuracies in percent; `integer` is None where the chip has no such format."""

    calibrated: float
    trained: float
    integer: float | None
    losses: list[tuple[int, float]]


# ---------------------------------------------------------------------------------------------------------------------
# Training


def load(data: Path) -> Data:
    def pixels(images: np.ndarray) -> np.ndarray:
        return np.asarray(((images.astype(np.float32) / 255 - MEAN) / STD).transpose(0, 3, 1, 2), np.float32)

    with np.load(data / "cifar10_jpeg.npz", allow_pickle=False) as file:
        labels = [file[key].astype(np.int32) for key in ("train_y", "test_y")]
        return Data(pixels(file["train_x"]), labels[0], pixels(file["test_x"]), labels[1])


def augmented(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrored by chance and moved by up to two pixels: less than float training takes."""
    padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)))
    moved = np.empty_like(images)
    for i, (down, right, mirror) in enumerate(zip(*rng.integers(0, (5, 5, 2), (len(images), 3)).T, strict=True)):
        part = padded[i, :, down : down + 32, right : right + 32]
        moved[i] = part[:, :, ::-1] if mirror else part
    return moved


def batches(data: Data, run: Run) -> Iterator[Batch]:
    for epoch in range(run.epochs):
        rng = np.random.default_rng([run.seed, epoch])
        order = rng.permutation(len(data.train))
        for i in range(0, len(order) - BATCH + 1, BATCH):
            chosen = order[i : i + BATCH]
            yield jnp.asarray(augmented(data.train[chosen], rng)), jnp.asarray(data.train_labels[chosen])


def qconfig(graph: jq.Graph, run: Run) -> jq.QConfig:
    """Values behind a relu are unsigned below 8 bits; at 8 bits they are int8, which the chip has."""
    if not run.bits:
        return jq.QConfig({"*": None})
    of_values = {"quantizer": QUANTIZERS[run.quantizer], "observer": jq.observers.histogram()}
    of_weights = {
        "quantizer": jq.lsq if run.quantizer.startswith("lsq") else jq.fake_quant,
        "axis": "out",
    }
    value = jq.QuantSpec(dtype="int8" if run.bits == 8 else f"uint{run.bits}", **of_values)
    layers = [n.name for n in graph.nodes if n.op.weight_roles]
    ends = jq.Policy(weight=jq.int8(**of_weights))
    return jq.QConfig(
        {
            "*": jq.Policy(weight=jq.QuantSpec(dtype=f"int{run.bits}", **of_weights), output=value),
            graph.inputs[0].name: jq.Policy(output=jq.int8(**of_values)),
            layers[0]: ends,
            layers[-1]: ends,
        }
    )


def calibrated(model: jq.Model, data: Data, seed: int) -> jq.Model:
    """With scales of least squared error, of values and of weights."""
    chosen = data.train[np.random.default_rng(seed).permutation(len(data.train))[:CALIBRATION]]
    stats = jq.calibration.collect(model, [jnp.asarray(chosen[i : i + BATCH]) for i in range(0, len(chosen), BATCH)])
    return jq.ptq.search_weight_scales(jq.calibration.reset_scale(model, stats, jq.observers.mse()))


def accuracy(run: Callable[[jax.Array], jax.Array], data: Data, size: int = 250) -> float:
    parts = range(0, len(data.test), size)
    found = np.concatenate([np.asarray(run(jnp.asarray(data.test[i : i + size]))).argmax(-1) for i in parts])
    return 100 * float((found == data.test_labels).mean())


def cross_entropy(logits: jax.Array, batch: Batch) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def train(graph: jq.Graph, float_params: dict, data: Data, run: Run) -> Outcome:
    target = jq.targets.NASH_E if run.bits in (0, 8) else jq.targets.NASH_P  # the latter for fake-quant alone
    model = jq.prepare(graph, float_params, qconfig(graph, run), target=target, batch_norm=run.batch_norm)
    model = calibrated(model, data, run.seed) if run.bits else model
    mode: Any = "fake_quant" if run.bits else "float"
    before = accuracy(lambda x: jq.apply(model, x, mode=mode), data)

    steps = run.epochs * (len(data.train) // BATCH)
    rate = jq.training.cosine_decay(run.rate, steps=steps)
    tx = jq.training.make_optimizer(model, learning_rate=rate, weight_decay=1e-4)
    state = jq.TrainState.create(model, tx=tx)
    step = jq.training.make_step(cross_entropy, mode="fake_quant" if run.bits else "float")
    state, history = jq.training.fit(step, state, batches(data, run), total=steps, report_every=10)

    after = accuracy(lambda x: jq.apply(state.model, x, mode=mode), data)
    integer = None
    if run.bits == 8 and run.quantizer != "lsq_plus":  # no march has a zero point
        program = jq.lower(state.model)
        integer = accuracy(lambda x: jq.run(program, x), data)
    return Outcome(before, after, integer, history.metrics["loss"])


# ---------------------------------------------------------------------------------------------------------------------
# Keeping and showing


MEASURED = ("calibrated", "trained", "integer")


class Tables(NamedTuple):
    float_before: float
    float_after: str
    widths: list[list[str]]
    batch_norms: list[list[str]]


def tables(outcomes: dict[Run, Outcome]) -> Tables:
    def of(what: str, **wanted: object) -> list[float]:
        found = [o for run, o in outcomes.items() if all(getattr(run, k) == v for k, v in wanted.items())]
        return [v for o in found if (v := getattr(o, what)) is not None]

    widths = [
        [
            f"W{bits}A{bits}",
            TITLES[name],
            *(spread(of(what, bits=bits, quantizer=name, batch_norm="live", rate=RATE)) for what in MEASURED),
        ]
        for bits in WIDTHS
        for name in QUANTIZERS
    ]
    batch_norms = [
        [name, *(spread(of("trained", bits=4, quantizer="lsq", batch_norm=name, rate=rate)) for rate in RATES)]
        for name in BATCH_NORMS
    ]
    return Tables(of("calibrated", bits=0)[0], spread(of("trained", bits=0)), widths, batch_norms)


WIDTH_COLUMNS = ("format", "quantizer", "calibrated, top-1 %", "after QAT, top-1 %", "as integers, top-1 %")
BATCH_NORM_COLUMNS = ("batch norm", *(f"rate {rate}, top-1 %" for rate in RATES))


PAGE = """# QAT of a ResNet-20 on CIFAR-10

Written by `python benchmarks/qat_cifar.py --data DIR`. Mean over the seeds {seeds} (smallest to largest); a seed
decides which images calibrate, the order of the batches, and how they are augmented. {epochs} epochs of 6,000 JPEG
images, batches of {batch}, SGD with Nesterov momentum, {rate} falling along half a cosine, weight decay 1e-4 on kernels
alone. 2,000 images measure.

The float checkpoint, trained on the images before JPEG, has {before:.1f} %. After the same epochs of float training on
these images it has {after} %: what QAT is to be compared with.

The input, and the weights of the first and the last layer, have 8 bits. Weights have a scale per output channel; scales
start at the least squared error. Weights take LSQ where values take LSQ or LSQ+, and fake-quant beside fake-quant and
PACT. fake-quant keeps the scales of calibration. Values behind a relu are unsigned below 8 bits, which the chip has
not: those rows are fake-quant. Integers are the simulated nash-e program; nothing here was compared with a board.

{widths}

![accuracy by bits and quantizer, and losses](pictures/qat-cifar.png)

## Batch norm

The same at W4A4 with LSQ, by what `prepare(..., batch_norm=)` does with batch norm, and by the learning rate. All are
validated with batch norm folded, as it ships. 10 % is a guess: training diverged. Nothing normalizes a folded net, nor
one with frozen statistics, so they want a smaller rate.

{batch_norms}
"""


def markdown(found: Tables, seeds: list[int], epochs: int) -> str:
    return PAGE.format(
        seeds=", ".join(map(str, seeds)),
        epochs=epochs,
        batch=BATCH,
        rate=RATE,
        before=found.float_before,
        after=found.float_after,
        widths=markdown_table(WIDTH_COLUMNS, found.widths, left=2),
        batch_norms=markdown_table(BATCH_NORM_COLUMNS, found.batch_norms),
    )


def draw(outcomes: dict[Run, Outcome], path: Path) -> None:
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    main = [run for run in outcomes if run.batch_norm == "live" and run.rate == RATE]
    for i, name in enumerate(QUANTIZERS):
        for j, bits in enumerate(WIDTHS):
            values = [outcomes[run].trained for run in main if (run.bits, run.quantizer) == (bits, name)]
            if values:
                error = [[np.mean(values) - min(values)], [max(values) - np.mean(values)]]
                left.bar(
                    j + 0.2 * (i - 1.5), np.mean(values), 0.18, yerr=error, color=f"C{i}", capsize=2,
                    label=TITLES[name] if j == 0 else None,
                )  # fmt: skip
    floats = [outcomes[run].trained for run in main if run.bits == 0]
    left.axhline(np.mean(floats), color="0.3", linestyle="--", label="float, trained as long")
    left.set_xticks(range(len(WIDTHS)), [f"W{bits}A{bits}" for bits in WIDTHS])
    left.set(ylabel="top-1 %", title="after QAT: mean, smallest and largest", ylim=(50, None))
    left.legend(loc="upper right", fontsize=8)
    for bits in (0, *WIDTHS):
        chosen = [outcomes[r].losses for r in main if r.bits == bits and r.quantizer == "lsq"]
        if chosen:
            losses = np.mean(np.asarray(chosen)[:, :, 1], 0)
            smooth = np.convolve(losses, np.ones(5) / 5, "valid")
            at = np.asarray(chosen[0])[2 : 2 + len(smooth), 0]
            right.plot(at, smooth, label=f"W{bits}A{bits}, LSQ" if bits else "float")
    right.set(xlabel="step", ylabel="loss, mean of the seeds and of 5 reports", title="training")
    right.set_yscale("log")
    right.grid(alpha=0.3)
    right.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> dict[Run, Outcome]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the images and the checkpoint")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--runs", default="", help="only those whose name matches this glob, such as 'w2*seed0'")
    parser.add_argument("--no-write", action="store_true", help="do not write the page and the picture")
    options = parser.parse_args(argv)
    if not options.data.is_dir():
        parser.error(f"--data {options.data}: no such folder")
    wanted = [r for r in all_runs(options.seeds, options.epochs) if fnmatch(r.name, options.runs or "*")]
    if not wanted:
        parser.error(f"--runs {options.runs}: no run has such a name, as {Run(bits=2, epochs=options.epochs).name} has")
    data = load(options.data)
    net = load_cifar_resnet(options.data / "cifar10_resnet20.pth", 20)
    graph, params = from_torch(net, (torch.zeros(1, *data.test.shape[1:]),))
    outcomes: dict[Run, Outcome] = {}
    console = Console()
    for run in track(wanted, "QAT"):
        if (found := read_kept(KEPT, run.name)) is not None:
            outcome = Outcome(**found)
        else:
            outcome = train(graph, params, data, run)
            keep(KEPT, run.name, outcome._asdict())
            jax.clear_caches()  # no run uses what another one compiled
        outcomes[run] = outcome
        console.print(f"{run.name}: {outcome.calibrated:.2f} -> {outcome.trained:.2f}, integers {outcome.integer}")
    if options.runs or options.no_write:
        return outcomes
    both = tables(outcomes)
    for columns, cells in ((WIDTH_COLUMNS, both.widths), (BATCH_NORM_COLUMNS, both.batch_norms)):
        table = Table(*columns)
        for row in cells:
            table.add_row(*row)
        console.print(table)
    draw(outcomes, DOCS / "pictures" / "qat-cifar.png")
    (DOCS / "qat-cifar.md").write_text(markdown(both, options.seeds, options.epochs))
    return outcomes


if __name__ == "__main__":
    main()
