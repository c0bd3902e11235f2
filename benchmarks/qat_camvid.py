"""ESPNet on CamVid, as integers: int8, mixed int8 and int16, after QAT. Writes docs/qat-camvid.md and its picture.

python benchmarks/qat_camvid.py --data DIR [--seeds 0 1 2] [--steps N] [--runs GLOB] [--no-write]

DIR holds `camvid_espnet.pth` and `camvid/test` with pictures SEQUENCE_NUMBER.jpg and labels SEQUENCE_NUMBER.png. Of
each sequence the first half calibrates and trains, the second half measures. Each run is kept as a file below
`out/qat_camvid/`, and a run that is there is not repeated. A seed decides which frames calibrate, and the order
of training.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

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
from espnet import load_espnet  # noqa: E402
from keeping import DOCS, ROOT, keep, markdown_table, read_kept, spread  # noqa: E402

KEPT = "qat_camvid"
NASH = jq.targets.NASH_E
MEAN, DEVIATION = np.float32([110.33, 108.41, 105.04]), np.float32([72.13, 72.69, 69.90])
CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "cyclist",
)  # fmt: skip
COLOURS = np.uint8(
    [
        (70, 130, 180), (128, 64, 64), (192, 192, 128), (128, 64, 128), (230, 140, 200), (107, 142, 35),
        (220, 190, 0), (64, 64, 128), (0, 0, 160), (220, 20, 60), (0, 170, 190), (0, 0, 0),
    ]
)  # fmt: skip
VOID = len(CLASSES)
CALIBRATION, BATCH = 16, 3
RATE = 2e-4
BUDGET = 1.2  # bytes of the values and weights of the mixed net, those of int8 being 1

Values = Literal["float", "int8", "mixed", "int16"]
Batch = tuple[jax.Array, jax.Array]


@dataclass(frozen=True, kw_only=True)
class Run:
    """`values` is the format of what layers make; weights are int8. `steps` of training follow calibration."""

    values: Values
    steps: int = 0
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.values}-{self.steps}steps-seed{self.seed}"


def all_runs(seeds: list[int], steps: int) -> list[Run]:
    formats: tuple[Values, ...] = ("float", "int8", "mixed", "int16")
    calibrated = [Run(values=v, seed=s) for s in seeds for v in formats]
    trained = [Run(values=v, steps=steps, seed=s) for s in seeds for v in ("float", "int8")]
    return calibrated + trained


class Frames(NamedTuple):
    images: np.ndarray  # [N, 3, 360, 480], as the checkpoint wants them
    labels: np.ndarray  # [N, 360, 480], uint8


class Outcome(NamedTuple):
    """In percent. `agree` is the share of pixels with the class of the float net, `int16` of values that are int16."""

    iou: list[float]
    agree: float
    int16: float

    @property
    def mean_iou(self) -> float:
        return float(np.mean(self.iou))


def halves(folder: Path) -> tuple[list[Path], list[Path]]:
    """The first and the second half of each sequence: no frame to be measured has a neighbour that trains, but one."""
    sequences: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.jpg")):
        sequences.setdefault(file.stem.rpartition("_")[0], []).append(file)
    if not sequences:
        raise SystemExit(f"{folder}: no pictures")
    first = [file for files in sequences.values() for file in files[: len(files) // 2]]
    return first, [file for files in sequences.values() for file in files[len(files) // 2 :]]


def load(files: list[Path]) -> Frames:
    from skimage.io import imread

    pixels = np.stack([imread(file)[..., ::-1] for file in files])  # the checkpoint was trained on BGR
    images = ((pixels - MEAN) / DEVIATION / 255).astype(np.float32).transpose(0, 3, 1, 2)
    return Frames(np.ascontiguousarray(images), np.stack([imread(file.with_suffix(".png")) for file in files]))


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def segment(run: Callable[[jax.Array], jax.Array], images: np.ndarray, size: int = 4) -> np.ndarray:
    """The class of every pixel, [N, H, W]. Void is never an answer."""
    best = jax.jit(lambda y: jnp.argmax(y[:, :VOID], 1).astype(jnp.uint8))
    padded = np.concatenate([images, np.repeat(images[-1:], -len(images) % size, 0)])
    parts = [np.asarray(best(run(jnp.asarray(padded[i : i + size])))) for i in range(0, len(padded), size)]
    return np.concatenate(parts)[: len(images)]


def intersection_over_union(found: np.ndarray, labels: np.ndarray) -> list[float]:
    """Of each class, in percent, over all pixels that have one."""
    known = labels < VOID
    counts = np.bincount(labels[known].astype(np.int64) * VOID + found[known], minlength=VOID**2).reshape(VOID, VOID)
    inside = np.diag(counts)
    return [100 * float(v) for v in inside / np.maximum(counts.sum(0) + counts.sum(1) - inside, 1)]


# ---------------------------------------------------------------------------------------------------------------------
# Quantizing and training


class Net(NamedTuple):
    graph: jq.Graph
    params: dict[str, jax.Array]


def rules(values: Values) -> dict[str, jq.Policy | None]:
    if values == "float":
        return {"*": None}
    spec = (jq.int16 if values == "int16" else jq.int8)(quantizer=jq.lsq, observer=jq.observers.histogram())
    return {"*": jq.Policy(weight=jq.int8(axis="out", quantizer=jq.lsq), output=spec)}


def mixed_rules(net: Net, frames: list[jax.Array]) -> dict[str, jq.Policy | None]:
    """int16 for the values that lose most at int8, within a budget of bytes; chosen once, and kept."""
    every = rules("int8")
    if (kept := read_kept(KEPT, "int16_values")) is None:
        model = jq.prepare(net.graph, net.params, jq.QConfig(every), target=NASH)
        model = calibrate(model, frames)
        ranking = jq.analysis.sensitivity(
            model, [frames[0][:1]], metric="mse", kinds=("activation",), activations=("int8", "int16")
        )
        choose = partial(jq.analysis.search_mixed_precision, model, ranking, cost="bytes")
        found = choose(budget=BUDGET * choose(budget=math.inf).lowest)
        kept = {"names": [name for name, rule in found.rules().items() if rule is not None]}
        keep(KEPT, "int16_values", kept)
    (everywhere,) = rules("int16").values()
    assert everywhere is not None
    return every | {name: jq.Policy(output=everywhere.output) for name in kept["names"]}


def calibrate(model: jq.Model, frames: list[jax.Array]) -> jq.Model:
    model = jq.calibration.reset_scale(model, jq.calibration.collect(model, frames), jq.observers.mse())
    return jq.ptq.search_weight_scales(model)


def batches(frames: Frames, steps: int, seed: int) -> Iterator[Batch]:
    """Whole frames in random order, mirrored by chance."""
    rng, count = np.random.default_rng(seed), len(frames.images)
    order = np.concatenate([rng.permutation(count) for _ in range(steps * BATCH // count + 1)])
    for chosen in order[: steps * BATCH].reshape(steps, BATCH):
        mirror = rng.integers(0, 2, BATCH).astype(bool)
        images, labels = frames.images[chosen], frames.labels[chosen].astype(np.int32)
        images[mirror], labels[mirror] = images[mirror, ..., ::-1], labels[mirror, ..., ::-1]
        yield jnp.asarray(images), jnp.asarray(labels)


def loss_of(labels: np.ndarray) -> Callable[[jax.Array, Batch], jax.Array]:
    """Cross-entropy of every pixel, rare classes weighted as in training: 1 / ln(1.1 + share); void counts nothing."""
    share = np.bincount(labels[labels < VOID], minlength=VOID) / (labels < VOID).sum()
    weights = jnp.asarray(np.append(1 / np.log(1.1 + share), 0.0), jnp.float32)

    def loss(logits: jax.Array, batch: Batch) -> jax.Array:
        counts = weights[jnp.minimum(batch[1], VOID)]
        each = optax.softmax_cross_entropy_with_integer_labels(jnp.moveaxis(logits, 1, -1), batch[1])
        return jnp.sum(each * counts) / jnp.sum(counts)

    return loss


def quantized(net: Net, train: Frames, run: Run, mixed: Callable[[], dict]) -> jq.Model:
    """A model with calibrated, and where the run says so trained, parameters."""
    frames = calibrating(train, run.seed)
    chosen = mixed() if run.values == "mixed" else rules(run.values)
    model = jq.prepare(net.graph, net.params, jq.QConfig(chosen), target=NASH)
    model = calibrate(model, frames) if run.values != "float" else model
    if not run.steps:
        return model
    rate = jq.training.cosine_decay(RATE, steps=run.steps)
    tx = jq.training.make_optimizer(model, optimizer="adamw", learning_rate=rate, scale_rate=rate, clip=1.0)
    state = jq.TrainState.create(model, tx=tx)
    step = jq.training.make_step(loss_of(train.labels), mode="float" if run.values == "float" else "fake_quant")
    state, _ = jq.training.fit(step, state, batches(train, run.steps, run.seed), total=run.steps, report_every=5)
    return jq.training.raise_collapsed_scales(state.model)


def calibrating(train: Frames, seed: int) -> list[jax.Array]:
    chosen = train.images[np.random.default_rng(seed).permutation(len(train.images))[:CALIBRATION]]
    return [jnp.asarray(chosen[i : i + 4]) for i in range(0, len(chosen), 4)]


def runner(model: jq.Model, values: Values) -> Callable[[jax.Array], jax.Array]:
    """The float net, or the integers."""
    if values == "float":
        return lambda x: jq.apply(model, x, mode="float")
    program = jq.lower(model)
    return lambda x: jq.run(program, x)


# ---------------------------------------------------------------------------------------------------------------------
# Showing

TITLES = {
    ("float", False): "float",
    ("float", True): "float, trained as long",
    ("int8", False): "int8",
    ("mixed", False): "int8, some values int16",
    ("int16", False): "int16 values, int8 weights",
    ("int8", True): "int8, after QAT",
}
COLUMNS = ("net", "mean IoU, %", "pixels as float, %", "values that are int16, %")
PAGE = """# ESPNet on CamVid, as integers

Written by `python benchmarks/qat_camvid.py --data DIR`. Mean over the seeds {seeds} (smallest to largest); a seed
decides which frames calibrate, and the order of training. Of each of the two sequences of the test set the
first half ({trains} frames) calibrates and trains, the second half ({tests} frames) measures: mean IoU over 11 classes,
void left out. {calibration} frames calibrate. Training takes {steps} steps of {batch} frames, mirrored by chance,
AdamW, {rate} falling along half a cosine, gradients clipped at 1, scales trained by LSQ. "float, trained as long" is
what QAT is to be compared with, since these frames are new to the checkpoint.

All rows but the float ones are integers of the simulated nash-e program; nothing here was compared with a board. The
values that are int16 were chosen by `sensitivity` and `search_mixed_precision`, within {budget} of the bytes
of values and weights at int8.

{table}

![segmentations side by side](pictures/qat-camvid.png)
"""


def cells(outcomes: dict[Run, Outcome]) -> list[list[str]]:
    found = []
    for (values, trained), title in TITLES.items():
        chosen = [o for run, o in outcomes.items() if (run.values, run.steps > 0) == (values, trained)]
        measured = [[o.mean_iou for o in chosen], [o.agree for o in chosen], [o.int16 for o in chosen]]
        found.append([title, *map(spread, measured)])
    return found


def draw(test: Frames, shown: dict[str, np.ndarray], chosen: list[int], path: Path) -> None:
    """Frames, labels and segmentations in rows; void is black."""
    import matplotlib.figure
    import matplotlib.patches

    pixels = test.images[chosen].transpose(0, 2, 3, 1) * 255 * DEVIATION + MEAN
    columns = {"picture": np.uint8(np.clip(np.rint(pixels), 0, 255))[..., ::-1], "labels": COLOURS[test.labels[chosen]]}
    columns |= {title: COLOURS[np.where(test.labels[chosen] < VOID, found, VOID)] for title, found in shown.items()}
    figure = matplotlib.figure.Figure(figsize=(2.6 * len(columns), 2.1 * len(chosen) + 0.6), layout="constrained")
    for j, (title, pictures) in enumerate(columns.items()):
        for i, picture in enumerate(pictures):
            axes = figure.add_subplot(len(chosen), len(columns), i * len(columns) + j + 1)
            axes.imshow(picture, interpolation="nearest")
            axes.set_axis_off()
            if i == 0:
                axes.set_title(title, fontsize=10)
    patches = [matplotlib.patches.Patch(color=c / 255, label=n) for c, n in zip(COLOURS, CLASSES, strict=False)]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(CLASSES), fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def measure(net: Net, train: Frames, test: Frames, wanted: list[Run], console: Console) -> dict[Run, Outcome]:
    """Runs what is not kept. Of each, the classes of the frames that are shown are kept beside it."""
    mixed = cache(lambda: mixed_rules(net, calibrating(train, wanted[0].seed)))
    plain = jq.prepare(net.graph, net.params, jq.QConfig({"*": None}), target=NASH)
    reference = segment(runner(plain, "float"), test.images)
    outcomes = {}
    for run in track(wanted, "ESPNet"):
        if (kept := read_kept(KEPT, run.name)) is not None:
            outcomes[run] = Outcome(**kept)
        else:
            model = quantized(net, train, run, mixed)
            found = segment(runner(model, run.values), test.images)
            wide = [
                spec is not None and spec.dtype == "int16"
                for name in model.plan.owned
                for spec in (model.plan.values[name],)
            ]
            outcomes[run] = Outcome(
                intersection_over_union(found, test.labels),
                100 * float((found == reference).mean()),
                100 * float(np.mean(wide)) if wide else 0.0,
            )
            keep(KEPT, run.name, outcomes[run]._asdict())
            np.savez_compressed(kept_classes(run), classes=found[shown_frames(test)])
            jax.clear_caches()  # no run uses what another one compiled
        console.print(f"{run.name}: IoU {outcomes[run].mean_iou:.2f}, {outcomes[run].agree:.2f} % as float")
    return outcomes


def shown_frames(test: Frames) -> list[int]:
    return [int(i) for i in np.linspace(0, len(test.images) - 1, 5)[1:4]]


def kept_classes(run: Run) -> Path:
    return ROOT / "out" / KEPT / f"{run.name}.npz"


def main(argv: list[str] | None = None) -> dict[Run, Outcome]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the checkpoint and camvid/")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100, help="of training")
    parser.add_argument("--runs", default="", help="only those whose name matches this glob, such as 'int8*seed0'")
    parser.add_argument("--no-write", action="store_true", help="do not write the page and the picture")
    options = parser.parse_args(argv)
    if not options.data.is_dir():
        parser.error(f"--data {options.data}: no such folder")
    wanted = [r for r in all_runs(options.seeds, options.steps) if fnmatch(r.name, options.runs or "*")]
    if not wanted:
        parser.error(f"--runs {options.runs}: no run has such a name, as {Run(values='int8').name} has")
    train, test = map(load, halves(options.data / "camvid" / "test"))
    net = Net(*from_torch(load_espnet(options.data / "camvid_espnet.pth"), (torch.zeros(1, 3, 360, 480),)))
    console = Console()
    outcomes = measure(net, train, test, wanted, console)
    if options.runs or options.no_write:
        return outcomes
    table = Table(*COLUMNS)
    for row in cells(outcomes):
        table.add_row(*row)
    console.print(table)
    shown = {}
    for values, steps in (("float", 0), ("int8", 0), ("mixed", 0), ("int8", options.steps)):
        with np.load(kept_classes(Run(values=values, steps=steps, seed=options.seeds[0]))) as file:
            shown[TITLES[values, steps > 0]] = file["classes"]
    draw(test, shown, shown_frames(test), DOCS / "pictures" / "qat-camvid.png")
    (DOCS / "qat-camvid.md").write_text(
        PAGE.format(
            seeds=", ".join(map(str, options.seeds)),
            tests=len(test.images),
            trains=len(train.images),
            calibration=CALIBRATION,
            steps=options.steps,
            batch=BATCH,
            rate=RATE,
            budget=BUDGET,
            table=markdown_table(COLUMNS, cells(outcomes)),
        )
    )
    return outcomes


if __name__ == "__main__":
    main()
