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
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import jquant as jq
from jquant.host.progress import track
from jquant_converters import from_torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))
from mobilenet_v2 import MEAN, STD, load_folder  # noqa: E402
from nets import load_cifar_resnet, load_mobilenet_v2  # noqa: E402

TARGET = jq.targets.NASH_E
MSE = jq.observers.mse()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one row is made.

    `weight`   bits of the weights; the first and the last layer have 8
    `output`   bits of the values
    `axis`     "out": a scale for each output channel, None: one for the tensor
    `method`   the observer of values; None: the default
    `recipe`   of `jq.ptq.recipe`, in the place of calibration and steps
    `relu`     relu in the place of relu6, which no channel can be scaled through: another network, equal below 6
    `picture`  bits of the picture; None: those of the other values
    `wide`     the share of the bytes that values at int16 may take, chosen by `jq.analysis.mix_precision`
    `steps`    what comes between `prepare` and `lower`, in order: equalize, search, adaround, blocks, bias
    """

    name: str
    weight: int = 8
    output: int = 8
    axis: str | None = "out"
    method: jq.observers.Observer | None = MSE
    recipe: Literal["default", "best", "fast"] | None = None
    relu: bool = False
    picture: int | None = None
    wide: float | None = None
    steps: tuple[str, ...] = ()


BEST = Recipe(name="nmse, weight search, bias correction", method=None, steps=("search", "bias"))
OBSERVERS = (
    Recipe(name="default (nmse)", method=None),
    Recipe(name="min-max", method=jq.observers.min_max()),
    Recipe(name="mean of maxima", method=jq.observers.mean_of_maxima()),
    Recipe(name="percentile 99.99", method=jq.observers.percentile(99.99)),
    Recipe(name="mse"),
)
RECIPES = tuple(Recipe(name=f'jq.ptq.recipe("{name}")', method=None, recipe=name) for name in jq.ptq.RECIPES)
MOBILENET = (
    *OBSERVERS,
    Recipe(name="mse, weight search, bias correction", steps=("search", "bias")),
    BEST,
    *RECIPES,
    replace(BEST, name="int16 values, nmse, weight search, bias correction", output=16),
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
    Recipe(name="block reconstruction, bias correction", weight=4, steps=("search", "blocks", "bias")),
    Recipe(name="int16 for 10 % of the bytes", method=None, wide=0.1, steps=("search", "bias")),
)
RESNET = (
    *OBSERVERS,
    BEST,
    *RECIPES,
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
            ("block reconstruction", ("search", "blocks")),
            ("block reconstruction, bias correction", ("search", "blocks", "bias")),
        )
    ),
    *(
        Recipe(name=f"picture int8, {name}", weight=4, output=4, picture=8, steps=steps)
        for name, steps in (
            ("nearest", ("search",)),
            ("adaround, bias correction", ("search", "adaround", "bias")),
            ("block reconstruction", ("search", "blocks")),
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


def logits(run: Callable, images: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([np.asarray(run(batch)) for batch in in_batches(images, size)])


def without_relu6(graph: jq.Graph) -> jq.Graph:
    nodes = (replace(n, op=jq.ops.Relu()) if isinstance(n.op, jq.ops.Relu6) else n for n in graph.nodes)
    return replace(graph, nodes=tuple(nodes))


def qconfig(graph: jq.Graph, recipe: Recipe) -> jq.QConfig:
    layers = [n.name for n in graph.nodes if n.op.weight_roles]
    values = {8: jq.int8, 16: jq.int16, 4: jq.int4}
    output = values[recipe.output](observer=recipe.method)
    rules = {"*": jq.Policy(weight=jq.QuantSpec(dtype=f"int{recipe.weight}", axis=recipe.axis), output=output)}
    ends = jq.Policy(weight=jq.int8(axis=recipe.axis))
    picture = {} if recipe.picture is None else {graph.inputs[0].name: jq.Policy(output=values[recipe.picture]())}
    return jq.QConfig(rules | picture | {layers[0]: ends, layers[-1]: ends})


def quantized(graph: jq.Graph, float_params: dict, recipe: Recipe, batches: list, steps: int) -> dict[str, Callable]:
    """{meaning: a function from images to logits}: fake-quant, and the integers where the chip has the formats."""
    graph = without_relu6(graph) if recipe.relu else graph
    target = TARGET if recipe.output >= 8 else jq.targets.NASH_P  # for fake-quant alone
    rules = qconfig(graph, recipe)
    if recipe.wide is not None:
        mixed = jq.analysis.mix_precision(graph, float_params, rules, batches, target=target, share=recipe.wide)
        print(mixed)
        rules = jq.QConfig({**rules.rules, **mixed.rules()})
    model = tuned(jq.prepare(graph, float_params, rules, target=target), recipe, batches, steps)
    found: dict[str, Callable] = {"fake-quant": lambda x: jq.apply(model, x)}
    if recipe.output >= 8:
        program = jq.lower(model)
        found["integer"] = lambda x: jq.run(program, x)
    return found


def tuned(model: jq.Model, recipe: Recipe, batches: list, steps: int) -> jq.Model:
    """The model calibrated by a recipe."""
    if recipe.recipe:
        found = jq.ptq.recipe(recipe.recipe, model, batches, steps=steps)
        print(found)
        return found.model
    if "equalize" in recipe.steps:
        model = jq.ptq.equalize(model)
    model = before = jq.calibrate(model, batches)
    for step in recipe.steps:
        match step:
            case "search":
                model = jq.ptq.search_weight_scales(model)
            case "adaround":
                model = jq.ptq.adaround(model, batches, steps=steps)
            case "blocks":
                model = jq.ptq.reconstruct_blocks(model, batches, steps=steps)
            case "bias":
                model = jq.ptq.correct_bias(model, batches, reference=before)
    return model


class Row(NamedTuple):
    """A recipe under a meaning; a figure for each seed."""

    task: str
    recipe: Recipe
    runs: str
    float_accuracy: tuple[float, ...]
    accuracy: tuple[float, ...]
    agreement: tuple[float, ...]  # %, of the classes of float and quantized
    sqnr: tuple[float, ...]  # dB, of the logits

    @property
    def cells(self) -> tuple[str, ...]:
        loss = np.subtract(self.float_accuracy, self.accuracy)
        what = f"W{self.recipe.weight}A{self.recipe.output}"
        figures = (self.float_accuracy, self.accuracy, loss, self.agreement, self.sqnr)
        return (what, self.recipe.name, self.runs, *map(mean, figures))


def figures(wanted: np.ndarray, got: np.ndarray, labels: np.ndarray) -> tuple[float, float, float, float]:
    """Accuracy of float and quantized, their agreement (%), and the SQNR of the logits (dB)."""
    classes, found = wanted.argmax(-1), got.argmax(-1)
    shares = (100 * float(np.mean(a == b)) for a, b in ((classes, labels), (found, labels), (found, classes)))
    noise = np.sum(np.square(np.float64(got) - wanted))
    return (*shares, float(10 * np.log10(np.sum(np.square(np.float64(wanted))) / max(noise, 1e-30))))


def mean(values: np.ndarray | tuple[float, ...]) -> str:
    return f"{np.mean(values):.2f} ({np.min(values):.2f} to {np.max(values):.2f})"


COLUMNS = (
    "format",
    "recipe",
    "run as",
    "float, top-1 %",
    "quantized, top-1 %",
    "loss, points",
    "agrees with float, %",
    "SQNR of the logits, dB",
)


def measure(task: Task, data: Path, seeds: list[int], wanted: str, steps: int, console: Console) -> list[Row]:
    net, images, labels, free = task.load(data)
    graph, params = from_torch(net, (torch.zeros(1, *images.shape[1:]),))
    plain = jq.prepare(graph, params, jq.QConfig({"*": None}), target=TARGET)
    baseline = logits(lambda x: jq.apply(plain, x, mode="float"), images[:free], task.batch)
    rows = []
    for recipe in track([r for r in task.recipes if wanted in f"W{r.weight}A{r.output} {r.name}"], task.title):
        found: dict[str, list[tuple[float, ...]]] = {}
        for seed in seeds:
            calibrating, measuring = split(labels, free, task.calibration, seed)
            for runs, run in quantized(
                graph, params, recipe, in_batches(images[calibrating], task.batch), steps
            ).items():
                got = logits(run, images[measuring], task.batch)
                found.setdefault(runs, []).append(figures(baseline[measuring], got, labels[measuring]))
        for runs, by_seed in found.items():
            rows.append(Row(task.title, recipe, runs, *zip(*by_seed, strict=True)))
            console.print(*rows[-1].cells, sep=" | ")
        jax.clear_caches()  # no recipe runs what another one compiled
    return rows


def markdown(rows: list[Row], seeds: list[int], steps: int) -> str:
    lines = [
        "# Post-training quantization, in integers",
        "",
        "Written by `python benchmarks/ptq_accuracy.py --data DIR`. Mean over the seeds",
        f"{', '.join(map(str, seeds))} (smallest to largest); a seed decides which images calibrate. Float is measured",
        "on the images of the quantized net. Weights have a scale per output channel where nothing else is said, the",
        "first and the last layer 8 bits. Values take the scale of least squared error where no observer is named.",
        f"AdaRound takes {steps} steps, and so does each block. The chip has no 4-bit values: W4A4 is fake-quant,",
        "with signed values behind a relu as well; the picture has 4 bits too unless the recipe says otherwise.",
        "Integers are the simulated nash-e program; nothing here was compared with a board.",
    ]
    for title in dict.fromkeys(row.task for row in rows):
        task = next(t for t in TASKS.values() if t.title == title)
        lines += ["", f"## {title}", "", f"{task.calibration} images calibrate.", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", "|---|---|---|---:|---:|---:|---:|---:|"]
        lines += [f"| {' | '.join(row.cells)} |" for row in rows if row.task == title]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the images and the checkpoint")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--recipes", default="", help="only those whose format and name contain this")
    parser.add_argument("--steps", type=int, default=300, help="of AdaRound, and of each block")
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
