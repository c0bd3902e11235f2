"""What each tool's calls keep of a network's accuracy, side by side: writes ACCURACY.md and accuracy.png.

python benchmarks/accuracy.py --data DIR [--tasks resnet20] [--seeds 0] [--count 400] [--peers onnxruntime nncf]

Each measurement is kept as a file below `out/accuracy/`, and one that is there is not repeated.

Networks and pictures are those of `networks.py`; a seed decides which pictures calibrate. A peer is installed into an
environment of its own (`--envs`) at its first use. It gets the float network as ONNX and the pictures that calibrate.
Its file runs in onnxruntime, optimizations off, on the pictures that measure jquant too.
"""

import argparse
import copy
import inspect
import json
import math
import re
import shlex
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from rich.console import Console

import jquant as jq
from jquant_converters import from_torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from keeping import keep, markdown_table, read_kept  # noqa: E402
from networks import NETWORKS, Network, Outputs  # noqa: E402
from ptq_accuracy import TARGET, in_batches, split  # noqa: E402

Run = Callable[[np.ndarray], Any]  # an output, or a tuple or list of several


class Peer(NamedTuple):
    """A tool: what pip installs for it, its script in `peers/`, and the grids that it is asked for."""

    requirements: tuple[str, ...]
    script: str
    grids: tuple[str, ...] = ("symmetric", "default")


NNCF = ("nncf==3.4.0", "onnx==1.22.0", "onnxruntime==1.32.0")
PEERS = {
    "onnxruntime": Peer(("onnxruntime==1.32.0", "onnx==1.22.0"), "onnxruntime_static.py"),
    # Unsigned behind ReLU, and a scale for each channel of what a depthwise convolution reads.
    "nncf": Peer(NNCF, "nncf_onnx.py", ("default",)),
    # It refuses signed values behind ReLU (`signedness_to_force=True`) by its tables of devices: the script opens them.
    "nncf_signed": Peer(NNCF, "nncf_signed.py", ("symmetric",)),
    # It rounds what a depthwise convolution writes, ahead of the ReLU6 behind it as well.
    "aimet": Peer(("aimet-onnx==2.42.0", "onnx==1.22.0", "onnxruntime==1.32.0", "torch==2.13.0"), "aimet_quantsim.py"),
    # It reads the module of torch, of which the export leaves a file beside the ONNX.
    "brevitas": Peer(
        ("brevitas==0.13.4", "onnx==1.23.2", "onnxscript==0.7.2", "onnxoptimizer==0.4.2", "torch==2.13.0"),
        "brevitas_graph.py",
    ),
}


class Case(NamedTuple):
    """A network, the pictures that calibrate and those that measure."""

    task: Network
    net: torch.nn.Module
    calibrating: np.ndarray
    measuring: np.ndarray
    labels: np.ndarray

    def float_outputs(self, x: Any) -> Any:
        with torch.no_grad():
            return self.net(torch.tensor(np.asarray(x)))

    def outputs(self, run: Run) -> Outputs:
        """What `run` answers to the pictures that measure, one array for each output."""
        parts = [jax.tree.leaves(run(batch)) for batch in in_batches(self.measuring, self.task.batch)]
        return [np.concatenate([np.asarray(y) for y in ys]) for ys in zip(*parts, strict=True)]


class Measured(NamedTuple):
    """How something runs, what it took, and a function of pictures."""

    runs: str
    seconds: float
    lines: int
    run: Run


class Row(NamedTuple):
    task: str
    tool: str
    recipe: str
    runs: str
    loss: float  # points of the quality of the network
    agreement: float  # %
    sqnr: float  # dB, of the outputs
    seconds: float  # of quantizing, imports and compilation included
    lines: int  # of user code
    seeds: int = 1
    failure: str = ""  # what a peer said that found no answer: there are no figures then

    @property
    def cells(self) -> tuple[str, ...]:
        if self.failure:
            return (self.tool, self.recipe, f"fails: {self.failure}", *["-"] * 5, str(self.seeds))
        numbers = (f"{self.loss:.2f}", f"{self.agreement:.1f}", f"{self.sqnr:.1f}", f"{self.seconds:.0f}")
        return (self.tool, self.recipe, self.runs, *numbers, str(self.lines), str(self.seeds))


COLUMNS = ("tool", "recipe", "run as", "loss, points", "agrees, %", "SQNR, dB", "seconds", "lines", "seeds")
KEPT = "accuracy"

# ---------------------------------------------------------------------------------------------------------------------
# jquant: every recipe is a function whose body is the user's code


def by_calibration(graph: jq.Graph, params: dict, batches: list) -> jq.Model:
    model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target=TARGET)
    return jq.calibrate(model, batches)


def by_recipe(graph: jq.Graph, params: dict, batches: list) -> jq.Model:
    model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target=TARGET)
    return jq.ptq.recipe("default", model, batches).model


def by_best(graph: jq.Graph, params: dict, batches: list) -> jq.Model:
    model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target=TARGET)
    return jq.ptq.recipe("best", model, batches).model


def by_sixteen_bits(graph: jq.Graph, params: dict, batches: list) -> jq.Model:
    model = jq.prepare(graph, params, jq.QConfig(jq.templates.weight8_activation16()), target=TARGET)
    return jq.ptq.recipe("default", model, batches).model


def by_mixing(graph: jq.Graph, params: dict, batches: list) -> jq.Model:
    rules = jq.QConfig(jq.templates.int8_default())
    found = jq.analysis.mix_precision(graph, params, rules, batches, target=TARGET, share=0.1).model
    return jq.ptq.shift_relus(jq.ptq.correct_bias(jq.ptq.search_weight_scales(found), batches))


def four_bits(graph: jq.Graph, params: dict, batches: list) -> jq.Model:
    """Calibrated: 4 bits for every weight, but 8 in the first and the last layer."""
    layers = [node.name for node in graph.nodes if node.op.weight_roles]
    rules = {"*": jq.Policy(weight=jq.int4(axis="out"), output=jq.int8())}
    rules |= dict.fromkeys((layers[0], layers[-1]), jq.Policy(weight=jq.int8(axis="out")))
    return jq.calibrate(jq.prepare(graph, params, jq.QConfig(rules), target=TARGET), batches)


def by_four_bits(graph: jq.Graph, params: dict, batches: list) -> jq.Model:
    before = jq.ptq.search_weight_scales(four_bits(graph, params, batches))
    model = jq.ptq.reconstruct_blocks(before, batches, steps=300)
    return jq.ptq.shift_relus(jq.ptq.correct_bias(model, batches, reference=before))


def by_four_bits_finetuned(graph: jq.Graph, params: dict, batches: list) -> jq.Model:
    images, rng, steps = np.concatenate(batches), np.random.default_rng(0), 400
    height, width = images.shape[2:]

    def cut_and_mirrored() -> Iterator[np.ndarray]:
        for _ in range(steps):
            share = rng.uniform(0.55, 1.0, 2)
            high, wide = int(share[0] * height), int(share[1] * width)
            top, left = rng.integers(0, height - high + 1), rng.integers(0, width - wide + 1)
            x = images[rng.permutation(len(images))[:16], :, top : top + high, left : left + wide]
            x = jax.image.resize(x, (*x.shape[:2], height, width), "linear", antialias=False)
            yield x[..., :: int(rng.choice((-1, 1)))]

    model = jq.ptq.search_value_scales(four_bits(graph, params, batches), [x[:8] for x in batches[:3]])
    before = jq.ptq.search_weight_scales(model)
    model = jq.ptq.correct_bias(jq.ptq.adaround(before, batches, steps=300), batches, reference=before)
    model = jq.ptq.finetune(model, cut_and_mirrored(), reference=before, steps=steps)
    return jq.ptq.shift_relus(model)


def by_four_bits_everywhere(graph: jq.Graph, params: dict, batches: list) -> jq.Model:
    layers = [node.name for node in graph.nodes if node.op.weight_roles]
    relus = [node.name for node in graph.nodes if isinstance(node.op, jq.ops.Relu)]
    rules = {"*": jq.Policy(weight=jq.int4(axis="out"), output=jq.int4())}
    rules |= dict.fromkeys(relus, jq.Policy(output=jq.config.uint4()))
    rules |= dict.fromkeys((layers[0], layers[-1]), jq.Policy(weight=jq.int8(axis="out")))
    rules[graph.inputs[0].name] = jq.Policy(output=jq.int8())
    model = jq.calibrate(jq.prepare(graph, params, jq.QConfig(rules), target=jq.targets.NASH_P), batches)
    return jq.ptq.reconstruct_blocks(jq.ptq.search_weight_scales(model), batches, steps=300)


def by_distilling(graph: jq.Graph, params: dict, batches: list) -> jq.Model:
    model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target=TARGET)
    best = jq.ptq.recipe("best", model, batches).model
    images, rng, steps = np.concatenate(batches), np.random.default_rng(0), 100
    height, width = images.shape[2:]
    wide = np.pad(images, ((0, 0), (0, 0), (height // 14,) * 2, (width // 14,) * 2), "reflect")

    def moved_and_mirrored() -> Iterator[tuple[np.ndarray, Any]]:
        for _ in range(steps):
            top, left = rng.integers(0, height // 7 + 1), rng.integers(0, width // 7 + 1)
            x = wide[rng.permutation(len(wide))[:10], :, top : top + height, left : left + width]
            x = x[..., :: rng.choice((-1, 1))]
            yield x, jq.apply(model, x, mode="float")

    def loss(outputs: Any, batch: Any) -> jax.Array:
        noise = jq.training.output_loss(outputs, batch[1])
        return jq.training.distillation_loss(outputs, batch[1]) + 10 * noise

    weights, scales = (jq.training.cosine_decay(rate, steps=steps) for rate in (3e-5, 1e-3))
    tx = jq.training.make_optimizer(best, optimizer="adamw", learning_rate=weights, scale_rate=scales)
    state = jq.TrainState.create(best, tx=tx)
    state, _ = jq.training.fit(jq.training.make_step(loss), state, moved_and_mirrored(), total=steps)
    return jq.training.raise_collapsed_scales(state.model)


OWN = {
    "jq.calibrate": by_calibration,
    'jq.ptq.recipe("default")': by_recipe,
    'jq.ptq.recipe("best")': by_best,
    "int16 values": by_sixteen_bits,
    "int16 for 10 % of the bytes": by_mixing,
    "W4A8, blocks": by_four_bits,
    "W4A8, fine-tuned": by_four_bits_finetuned,
    "W4A4, blocks": by_four_bits_everywhere,
    "QAT, distilled": by_distilling,
}


SLOW = ('jq.ptq.recipe("best")', "int16 values", "int16 for 10 % of the bytes")  # with the first seed alone
# With the first seed and these networks.
CHOSEN = {
    "W4A8, blocks": tuple(name for name in NETWORKS if name not in ("efficientnet_lite0", "espnet", "xfeat")),
    "W4A8, fine-tuned": ("mobilenet_v2", "efficientnet_lite0", "resnet20"),
    "W4A4, blocks": ("resnet20",),
    "QAT, distilled": ("mobilenet_v2", "resnet20"),
}


def recipes_of(network: str, first_seed: bool) -> Iterator[str]:
    for recipe in OWN:
        if (first_seed or recipe not in (*SLOW, *CHOSEN)) and network in CHOSEN.get(recipe, (network,)):
            yield recipe


def of_ours(case: Case, recipe: str) -> Iterator[Measured]:
    graph, params = from_torch(case.net, (torch.zeros(1, *case.calibrating.shape[1:]),))
    batches, make = in_batches(case.calibrating, case.task.batch), OWN[recipe]
    start = time.perf_counter()
    model = make(graph, params, batches)
    seconds, lines = time.perf_counter() - start, len(inspect.getsource(make).splitlines()) - 1
    yield Measured("fake-quant", seconds, lines, lambda x: jq.apply(model, x))
    if not model.plan.target.integer:
        return
    program = jq.lower(model)
    yield Measured("integer", seconds, lines, lambda x: jq.run(program, x))
    jax.clear_caches()  # no recipe runs what another one compiled


# ---------------------------------------------------------------------------------------------------------------------
# Peers


class PeerError(Exception):
    """A peer refuses a network or falls over it; the first line of what it said."""


def python_of(name: str, envs: Path) -> Path:
    """The interpreter of a peer's environment, made and filled at its first use."""
    folder, wanted = envs / name, "\n".join(PEERS[name].requirements)
    python, installed = folder / "bin" / "python", folder / "installed.txt"
    if not installed.exists() or installed.read_text() != wanted:
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS[name].requirements], check=True)
        installed.write_text(wanted)  # last: an environment that was left half made is made again
    return python


def export(net: torch.nn.Module, pictures: np.ndarray, path: Path) -> None:
    example, batch = torch.from_numpy(pictures[:2]), torch.export.Dim("n", min=1)
    program = torch.onnx.export(net, (example,), dynamo=True, dynamic_shapes=({0: batch},), input_names=["x"])
    program.save(path)


def write_module(net: torch.nn.Module, path: Path) -> None:
    """The network as the source of a class `Net` of modules of torch.nn, PATH.py, and its weights, PATH.pt."""
    graph, made = traced(net), dict[str, str]()
    weights, tensors = graph.state_dict(), list[str]()
    for node in graph.graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        outer = [node.target.rsplit(".", i)[0] for i in range(node.target.count("."), 0, -1)]
        made |= {name: "Module()" for name in outer if name not in made}
        if node.op == "call_module":
            made[node.target] = repr(graph.get_submodule(node.target))
        elif node.target in weights:
            (owner, _, name), like = node.target.rpartition("."), weights[node.target]
            empty = f"torch.empty({tuple(like.shape)}, dtype={like.dtype})"
            tensors.append(f"        self.get_submodule({owner!r}).register_buffer({name!r}, {empty})")
        else:
            raise PeerError(f"{node.target} is neither a module, nor a parameter, nor a buffer")
    body = [f"        self.set_submodule({name!r}, nn.{module}, strict=False)" for name, module in made.items()]
    body += dict.fromkeys(tensors)
    source = ["import torch", "from torch import nn", "", "", "class Net(nn.Module):", "    def __init__(self):"]
    source += ["        super().__init__()", *body, *(f"    {line}" for line in graph.code.splitlines())]
    path.with_suffix(".py").write_text("\n".join(source) + "\n")
    torch.save(weights, path.with_suffix(".pt"))


def traced(net: torch.nn.Module) -> torch.fx.GraphModule:
    """The network made of modules of torch.nn alone, so that its file needs no code of where it comes from."""
    found = copy.deepcopy(net)
    for name, module in list(found.named_modules()):
        if type(module) is not torch.nn.Conv2d and isinstance(module, torch.nn.Conv2d):  # EfficientNet's pads by itself
            module.__class__ = torch.nn.Conv2d
            found.set_submodule(name, torch.nn.Sequential(module._modules.pop("static_padding"), module))
    graph = torch.fx.symbolic_trace(found)
    for node in graph.graph.nodes:
        if node.target is torch.relu:  # Brevitas knows the other name alone
            node.target = torch.nn.functional.relu
    graph.recompile()
    return graph


def of_peer(case: Case, name: str, grid: str, envs: Path | None) -> Iterator[Measured]:
    python = Path(sys.executable) if envs is None else python_of(name, envs)
    script = HERE / "peers" / PEERS[name].script
    lines = len(script.read_text().partition("# begin\n")[2].partition("# end")[0].strip().splitlines())
    with tempfile.TemporaryDirectory() as folder:
        path, pictures, out = (Path(folder) / each for each in ("float.onnx", "pictures.npy", "out.onnx"))
        export(case.net, case.calibrating, path)
        if name == "brevitas":
            write_module(case.net, path)
        np.save(pictures, case.calibrating)
        done = subprocess.run([python, script, path, pictures, out, grid], capture_output=True, text=True)
        if done.returncode:
            raise PeerError(error_of(done.stderr) or f"exit status {done.returncode}")
        seconds = json.loads(done.stdout.splitlines()[-1])["seconds"]
        yield Measured("onnxruntime", seconds, lines, session(out))


def session(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        found = onnxruntime.InferenceSession(path, options)
    except Exception as error:  # the file is the peer's: onnxruntime has no class of its own errors
        raise PeerError(first_line(str(error))) from error

    def run(x: np.ndarray) -> list[np.ndarray]:
        try:
            return found.run(None, {"x": np.asarray(x)})
        except Exception as error:
            raise PeerError(first_line(str(error))) from error

    return run


def error_of(stderr: str) -> str:
    """The first line of the error behind the last traceback of a process."""
    behind = stderr.rpartition("Traceback (most recent call last):\n")[2].splitlines()
    return first_line(next((line for line in behind if not line.startswith(" ")), ""))


def first_line(text: str, most: int = 100) -> str:
    """For a cell of a table."""
    line = text.strip().partition("\n")[0].replace("|", "/")
    return line if len(line) <= most else f"{line[:most]}..."


# ---------------------------------------------------------------------------------------------------------------------
# The page


def cases(task: Network, data: Path, seeds: list[int], count: int) -> Iterator[Case]:
    net, images, labels, free = task.load(data)
    for seed in seeds:
        calibrating, measuring = split(labels, free, task.calibration, seed)
        measuring = measuring[:count]
        yield Case(task, net, images[calibrating], images[measuring], labels[measuring])


def measurements(
    case: Case, peers: list[str], envs: Path | None, recipes: list[str]
) -> Iterator[tuple[str, str, Callable[[], Iterator[Measured]]]]:
    """(tool, recipe, what measures it) of everything that is asked for."""
    for recipe in recipes:
        yield "jquant", recipe, partial(of_ours, case, recipe)
    for name in peers:
        for grid in PEERS[name].grids:
            yield name, f"{grid} grid", partial(of_peer, case, name, grid, envs)


def measure(
    case: Case,
    name: str,
    found: Iterator[tuple[str, str, Callable[[], Iterator[Measured]]]],
    console: Console,
    kept_alone: bool = False,
) -> Iterator[Row]:
    """The rows of a case; `name` is part of the files of what is finished. `kept_alone`: measures nothing."""
    baseline = cache(lambda: case.outputs(case.float_outputs))
    for tool, recipe, make in found:
        place = re.sub(r"[^a-z0-9]+", "-", f"{name} {tool} {recipe}".lower()).strip("-")
        kept = read_kept(KEPT, place)
        if kept is None and kept_alone:
            continue
        if kept is None:
            rows = []
            try:
                for each in make():
                    numbers = figures(case, baseline(), case.outputs(each.run))
                    rows.append(Row(case.task.title, tool, recipe, each.runs, *numbers, each.seconds, each.lines))
            except PeerError as error:
                rows = [Row(case.task.title, tool, recipe, "onnxruntime", *[math.nan] * 4, 0, failure=str(error))]
            kept = {"rows": rows}
            keep(KEPT, place, kept)
        for row in (Row(*values) for values in kept["rows"]):
            console.print(row.task, *row.cells, sep=" | ")
            yield row


def figures(case: Case, wanted: Outputs, got: Outputs) -> tuple[float, float, float]:
    """The quality that is lost (points), the agreement of classes (%), and the SQNR of the outputs (dB).

    The SQNR of several outputs is that of the mean of noise / signal over them, as in `jq.ptq.recipe`.
    """
    lost = case.task.quality(wanted, wanted, case.labels) - case.task.quality(got, wanted, case.labels)
    kinds = (each[case.task.classes].argmax(1) for each in (wanted, got))
    agreement = 100 * float(np.mean(np.equal(*kinds)))
    shares = [
        np.sum(np.square(np.float64(a) - b)) / np.sum(np.square(np.float64(a)))
        for a, b in zip(wanted, got, strict=True)
    ]
    return lost, agreement, float(-10 * np.log10(max(np.mean(shares), 1e-30)))


def mean_rows(rows: list[Row]) -> list[Row]:
    """The mean over seeds of what else is equal."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(row[:4], []).append(row)
    means = ((key, np.mean([row[4:8] for row in of], axis=0), of) for key, of in found.items())
    return [
        Row(*key, *mean, of[0].lines, len(of), next((r.failure for r in of if r.failure), ""))
        for key, mean, of in means
    ]


def markdown(rows: list[Row], command: str, counts: dict[str, tuple[int, int]]) -> str:
    lines = [
        "# Accuracy beside other tools",
        "",
        f"Written by `{command}`.",
        "int8 where nothing else is said, a scale for each output channel of a weight. A loss is that of top-1, mean",
        "IoU or of match rate against the float network on the same pictures, or a box error. Agreement is of classes,",
        "and in XFeat of the best place in each cell. SQNR is of the outputs, by the mean of noise / signal.",
        "A symmetric grid is what the chip has; the default of a peer may be asymmetric, unsigned behind ReLU or, in",
        "NNCF, have a scale for each channel of a value. nncf_signed is NNCF with two entries of its device tables",
        "changed, and with PReLU as an operator that reads 8 bits, as on the chip: NNCF's default fuses it with the",
        "convolution. Brevitas makes a ReLU of ReLU6, as it does by default. NNCF leaves an LSTM in float, onnxruntime",
        "the state of one. Seconds hold imports and compilation, and depend on the machine and on what else it does.",
        "Lines are those of user code behind the float network. Figures are means over the seeds; slow recipes",
        "ran with the first seed alone.",
        "",
        "A box error is the mean distance of the sides of boxes, and of landmarks, from the float network's where",
        "it sees a face, in percent of the side of a box. A match rate is the share of mutual neighbours, among",
        "500 points of two views each, that is right within 3 pixels.",
        "",
        "W4A8 and W4A4 keep 8 bits in the first and the last layer, and W4A4 for the picture. The chip has no 4-bit",
        "values: W4A4 is fake-quant, with unsigned values behind a relu.",
    ]
    lines += ["", "![SQNR of the outputs by network, tool and recipe](accuracy.png)"]
    for title, (calibrating, measuring) in counts.items():
        lines += ["", f"## {title}", "", f"{calibrating} pictures calibrate, {measuring} measure.", ""]
        lines.append(markdown_table(COLUMNS, [row.cells for row in rows if row.task == title], left=3))
    return "\n".join(lines) + "\n"


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else shlex.quote(str(value))


COLOURS = {"ours": "#1f6f8b", "symmetric": "#d98e04", "default": "#b8b8b8"}


def draw(rows: list[Row], path: Path) -> None:
    """The SQNR of the outputs, a panel for each network; of ours what runs as integers."""
    import matplotlib.figure
    import matplotlib.patches

    titles = list(dict.fromkeys(row.task for row in rows))
    good = [row for row in rows if not row.failure and row.runs != "fake-quant"]
    shown = {title: [row for row in good if row.task == title] for title in titles}
    heights = [len(of) + 1.6 for of in shown.values()]
    figure = matplotlib.figure.Figure(figsize=(8, 0.26 * sum(heights) + 0.8), layout="constrained")
    panels = figure.subplots(len(titles), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, of) in zip(panels, shown.items(), strict=True):
        of = sorted(of, key=lambda row: row.sqnr)
        kinds = ["ours" if row.tool == "jquant" else row.recipe.removesuffix(" grid") for row in of]
        names = [f"{row.tool}, {row.recipe}" for row in of]
        bars = axes.barh(names, [max(row.sqnr, 0.0) for row in of], color=[COLOURS[kind] for kind in kinds])
        axes.bar_label(bars, [f"{row.sqnr:.1f}" for row in of], padding=3, fontsize=8)
        axes.set_title(title, fontsize=10, loc="left")
        axes.tick_params(labelsize=8)
        axes.set_xlim(0, max(row.sqnr for row in of) * 1.1)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("SQNR of the outputs, dB", fontsize=9)
    said = {"ours": "jquant, integers", "symmetric": "a peer, symmetric grid", "default": "a peer, its own grid"}
    patches = [matplotlib.patches.Patch(color=COLOURS[kind], label=text) for kind, text in said.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.savefig(path, dpi=90)


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the pictures and the checkpoints")
    parser.add_argument("--tasks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--count", type=int, default=2000, help="pictures that measure, at most")
    parser.add_argument("--recipes", default="", help="only those of ours whose name contains this")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--envs", type=Path, default=Path("build/peers"), help="where environments of peers are made")
    parser.add_argument("--here", action="store_true", help="run peers in this environment, installing nothing")
    parser.add_argument("--kept", action="store_true", help="measure nothing: the page from what is finished")
    parser.add_argument("--no-write", action="store_true", help="do not write ACCURACY.md")
    options = parser.parse_args(argv)
    if not options.data.is_dir():
        parser.error(f"--data {options.data}: no such folder")
    rows, counts, console = list[Row](), dict[str, tuple[int, int]](), Console()
    for name in options.tasks:
        every = cases(NETWORKS[name], options.data, options.seeds, options.count)
        for seed, case in zip(options.seeds, every, strict=True):
            counts[case.task.title] = (len(case.calibrating), len(case.measuring))
            first = seed == options.seeds[0]
            recipes = [recipe for recipe in recipes_of(name, first) if options.recipes in recipe]
            found = measurements(case, options.peers, None if options.here else options.envs, recipes)
            rows += measure(case, f"{name} {seed} {options.count}", found, console, options.kept)
    rows = mean_rows(rows)
    if not options.no_write:
        given = {key: getattr(options, key) for key in ("tasks", "seeds", "count", "recipes")}
        shown = [f"--{key} {_words(value)}" for key, value in given.items() if value != parser.get_default(key)]
        command = " ".join(["python benchmarks/accuracy.py --data DIR", *shown, *(["--kept"] if options.kept else [])])
        text = markdown(rows, command, counts)
        (HERE / "ACCURACY.md").write_text(text)
        draw(rows, HERE / "accuracy.png")
    return rows


if __name__ == "__main__":
    main()
