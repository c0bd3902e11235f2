"""What post-training quantization loses and what wins it back, in integers: writes PTQ.md beside this file.

python benchmarks/ptq_accuracy.py --data DIR [--tasks resnet20] [--seeds 0 1 2] [--recipes TEXT] [--no-write]

DIR holds `imagenet_sample/NNNN.jpg` (the number being the class index), `cifar10_jpeg.npz` and `cifar10_resnet20.pth`.
A seed decides which images calibrate; the others measure, float and integers on the same ones.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import jquant as jq
from jquant.progress import track
from jquant_converters import from_torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))
from mobilenet_v2 import MEAN, STD, load_folder  # noqa: E402
from nets import load_cifar_resnet, load_mobilenet_v2  # noqa: E402

TARGET = jq.targets.NASH_E
MSE = jq.mse()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one row is made.

    `weight`   bits of the weights; the first and the last layer have 8
    `output`   bits of the values
    `axis`     "out": a scale for each output channel, None: one for the tensor
    `method`   how scales of values follow from the histograms of calibration
    `relu`     relu in the place of relu6, which no channel can be scaled through: another network, equal below 6
    `steps`    what comes between `prepare` and `lower`, in order: equalize, search, adaround, bias
    """

    name: str
    weight: int = 8
    output: int = 8
    axis: str | None = "out"
    method: jq.Observer = MSE
    relu: bool = False
    steps: tuple[str, ...] = ()


BEST = Recipe(name="mse, weight search, bias correction", steps=("search", "bias"))
MOBILENET = (
    Recipe(name="min-max", method=jq.min_max()),
    Recipe(name="percentile 99.99", method=jq.percentile(99.99)),
    Recipe(name="mse"),
    BEST,
    replace(BEST, name="the same, int16 values", output=16),
    Recipe(name="per tensor", axis=None),
    Recipe(name="per tensor, relu for relu6", axis=None, relu=True),
    Recipe(name="per tensor, relu for relu6, equalized", axis=None, relu=True, steps=("equalize",)),
    Recipe(
        name="per tensor, relu for relu6, equalized, bias correction",
        axis=None,
        relu=True,
        steps=("equalize", "bias"),
    ),
    Recipe(name="nearest", weight=4, steps=("search",)),
    Recipe(name="nearest, bias correction", weight=4, steps=("search", "bias")),
    Recipe(name="adaround", weight=4, steps=("search", "adaround")),
    Recipe(name="adaround, bias correction", weight=4, steps=("search", "adaround", "bias")),
)
RESNET = (
    Recipe(name="min-max", method=jq.min_max()),
    Recipe(name="mse"),
    BEST,
    Recipe(name="per tensor", axis=None),
    Recipe(name="per tensor, equalized", axis=None, steps=("equalize",)),
    *(
        Recipe(name=name, weight=4, output=output, steps=steps)
        for output in (8, 4)
        for name, steps in (
            ("nearest", ("search",)),
            ("nearest, bias correction", ("search", "bias")),
            ("adaround", ("search", "adaround")),
            ("adaround, bias correction", ("search", "adaround", "bias")),
        )
    ),
)


class Task(NamedTuple):
    title: str
    load: Callable[[Path], tuple[torch.nn.Module, np.ndarray, np.ndarray, int]]  # net, images, labels, free to measure
    recipes: tuple[Recipe, ...]
    calibration: int
    batch: int


def load_imagenet(data: Path) -> tuple[torch.nn.Module, np.ndarray, np.ndarray, int]:
    images, labels = load_folder(data / "imagenet_sample")
    return load_mobilenet_v2(), images, labels, len(images)


def load_cifar(data: Path) -> tuple[torch.nn.Module, np.ndarray, np.ndarray, int]:
    """The test images first, which all measure; calibration takes training images."""
    with np.load(data / "cifar10_jpeg.npz", allow_pickle=False) as file:
        images = np.concatenate([file["test_x"], file["train_x"]])
        labels = np.concatenate([file["test_y"], file["train_y"]]).astype(np.int32)
        tests = len(file["test_x"])
    pixels = ((images.astype(np.float32) / 255 - MEAN) / STD).transpose(0, 3, 1, 2)
    return load_cifar_resnet(data / "cifar10_resnet20.pth", 20), pixels, labels, tests


TASKS = {
    "mobilenet_v2": Task("MobileNetV2, 500 pictures of ImageNet", load_imagenet, MOBILENET, 100, 25),
    "resnet20": Task("ResNet-20, CIFAR-10 (JPEG)", load_cifar, RESNET, 256, 128),
}


def split(labels: np.ndarray, free: int, calibration: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices that calibrate and that measure, disjoint."""
    order = np.random.default_rng(seed).permutation(len(labels))
    if free == len(labels):
        return order[:calibration], np.sort(order[calibration:])
    return order[order >= free][:calibration], np.arange(free)


def in_batches(images: np.ndarray, size: int) -> list:
    return [jnp.asarray(images[i : i + size]) for i in range(0, len(images), size)]


def classes(run: Callable, images: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([np.asarray(run(batch)).argmax(-1) for batch in in_batches(images, size)])


def without_relu6(graph: jq.Graph) -> jq.Graph:
    nodes = (replace(n, op=jq.ops.Relu()) if isinstance(n.op, jq.ops.Relu6) else n for n in graph.nodes)
    return replace(graph, nodes=tuple(nodes))


def qconfig(graph: jq.Graph, recipe: Recipe) -> jq.QConfig:
    layers = [n.name for n in graph.nodes if n.op.weight_roles]
    output = {8: jq.int8, 16: jq.int16, 4: jq.int4}[recipe.output](observer=jq.histogram())
    rules = {"*": jq.Policy(weight=jq.QuantSpec(dtype=f"int{recipe.weight}", axis=recipe.axis), output=output)}
    ends = jq.Policy(weight=jq.int8(axis=recipe.axis))
    return jq.QConfig(rules | {layers[0]: ends, layers[-1]: ends})


def quantized(graph: jq.Graph, float_params: dict, recipe: Recipe, batches: list, steps: int) -> Callable:
    """A function from images to logits: the integers, or fake-quant for formats that the chip has not."""
    graph = without_relu6(graph) if recipe.relu else graph
    target = TARGET if recipe.output >= 8 else jq.targets.NASH_P  # for fake-quant alone
    plan, params = jq.prepare(graph, float_params, qconfig(graph, recipe), target=target)
    if "equalize" in recipe.steps:
        params = jq.ptq.equalize(plan, params)
    qparams = jq.reset_scale(plan, params, jq.collect(plan, params, batches), recipe.method)
    before = params
    for step in recipe.steps:
        match step:
            case "search":
                qparams = jq.ptq.search_weight_scales(plan, params, qparams)
            case "adaround":
                params = jq.ptq.adaround(plan, params, qparams, batches, steps=steps)
            case "bias":
                params = jq.ptq.correct_bias(plan, params, qparams, batches, reference=before)
    if recipe.output < 8:
        return lambda x: jq.apply(plan, params, qparams, x)
    program = jq.lower(plan, params, qparams)
    return lambda x: jq.run(program, x)


class Row(NamedTuple):
    task: str
    recipe: Recipe
    float_accuracy: tuple[float, ...]
    accuracy: tuple[float, ...]

    @property
    def cells(self) -> tuple[str, ...]:
        loss = np.subtract(self.float_accuracy, self.accuracy)
        what = f"W{self.recipe.weight}A{self.recipe.output}"
        runs = "integer" if self.recipe.output >= 8 else "fake-quant"
        return (what, self.recipe.name, runs, mean(self.float_accuracy), mean(self.accuracy), mean(loss))


def mean(values: np.ndarray | tuple[float, ...]) -> str:
    return f"{np.mean(values):.2f} ({np.min(values):.2f} to {np.max(values):.2f})"


COLUMNS = ("format", "recipe", "run as", "float, top-1 %", "quantized, top-1 %", "loss, points")


def measure(task: Task, data: Path, seeds: list[int], wanted: str, steps: int, console: Console) -> list[Row]:
    net, images, labels, free = task.load(data)
    graph, params = from_torch(net, (torch.zeros(1, *images.shape[1:]),))
    plain, folded = jq.prepare(graph, params, jq.QConfig({"*": None}), target=TARGET)
    baseline = classes(lambda x: jq.apply(plain, folded, {}, x, mode="float"), images[:free], task.batch)
    rows = []
    for recipe in track([r for r in task.recipes if wanted in f"W{r.weight}A{r.output} {r.name}"], task.title):
        found: list[tuple[float, float]] = []
        for seed in seeds:
            calibrating, measuring = split(labels, free, task.calibration, seed)
            run = quantized(graph, params, recipe, in_batches(images[calibrating], task.batch), steps)
            got = classes(run, images[measuring], task.batch)
            right = labels[measuring]
            found.append((100 * float((baseline[measuring] == right).mean()), 100 * float((got == right).mean())))
        rows.append(Row(task.title, recipe, *zip(*found, strict=True)))
        jax.clear_caches()  # no recipe runs what another one compiled
        console.print(*rows[-1].cells, sep=" | ")
    return rows


def markdown(rows: list[Row], seeds: list[int], steps: int) -> str:
    lines = [
        "# Post-training quantization, in integers",
        "",
        "Written by `python benchmarks/ptq_accuracy.py --data DIR`. Mean over the seeds",
        f"{', '.join(map(str, seeds))} (smallest to largest); a seed decides which images calibrate. Float is measured",
        "on the images of the quantized net. Weights have a scale per output channel where nothing else is said, the",
        "first and the last layer 8 bits; values take the scale of least squared error;",
        f"AdaRound takes {steps} steps. The chip has no 4-bit values: W4A4 is fake-quant, with signed values behind a",
        "relu as well.",
        "Integers are the simulated nash-e program; nothing here was compared with a board.",
    ]
    for title in dict.fromkeys(row.task for row in rows):
        task = next(t for t in TASKS.values() if t.title == title)
        lines += ["", f"## {title}", "", f"{task.calibration} images calibrate.", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", "|---|---|---|---:|---:|---:|"]
        lines += [f"| {' | '.join(row.cells)} |" for row in rows if row.task == title]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the images and the checkpoint")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--recipes", default="", help="only those whose format and name contain this")
    parser.add_argument("--steps", type=int, default=300, help="of AdaRound")
    parser.add_argument("--no-write", action="store_true", help="do not write PTQ.md")
    options = parser.parse_args(argv)
    if not options.data.is_dir():
        parser.error(f"--data {options.data}: no such folder")
    console = Console()
    rows = []
    for task in options.tasks:
        rows += measure(TASKS[task], options.data, options.seeds, options.recipes, options.steps, console)
    table = Table("network", *COLUMNS)
    for row in rows:
        table.add_row(row.task, *row.cells)
    console.print(table)
    if not options.no_write:
        (HERE / "PTQ.md").write_text(markdown(rows, options.seeds, options.steps))
    return rows


if __name__ == "__main__":
    main()
