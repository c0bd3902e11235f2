"""`init`: a file of settings for a model, with every setting, its default and a line about it."""

import json as json_text
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from jquant.cli.arguments import check_file
from jquant.cli.console import Console, Json, Quiet, UsageError, Verbose, command, replacing
from jquant.cli.models import Checkpoint, Shape, load_model
from jquant.cli.next_steps import named
from jquant.cli.settings import ImageSettings, TrainSettings, march_of
from jquant.config.templates import int8_default
from jquant.targets.find import MARCHES
from jquant.types import FrozenMap, Graph, Input, Op, Policy, Program, Target

HEAD = """\
# Settings for the commands of jquant. A line that begins with "#" and no space is a setting that is switched off, with
# its default: take the "#" away and change it. An unknown table or key is an error.
"""
RULES = """\
# Formats: [rules."PATTERN".output] for values, [rules."PATTERN".weight] for weights. A pattern is a name, a name with
# *, or type:Operator. Later rules override earlier ones, field by field. A rule that matches nothing is an error.
#
#   dtype      int4, int8, int16; int2 and int3 for weights; int32 for an accumulator that is an output
#   axis       "out": one scale a channel, for weights
#   observer   how a scale follows from data: nmse, min_max, mean_of_maxima, mse, percentile, kl, norm, mix,
#              moving_average
#   quantizer  how it trains: fake_quant, lsq, lsq_plus, pact
#   float      true: the layer stays float (a table of its own, [rules."PATTERN"])
"""
LAYERS = """\
# The layers of this model, each with a rule that changes it alone.
"""
IMAGE = """\
# How a picture becomes an input, in this order: resize, crop, colour, divisor, mean and std, layout. For --data FOLDER:
# pictures in one folder a class, or pictures alone. A state and a program keep it; later commands need no [image].
"""
TRAIN = """\
# `jquant train`. Data are pictures in folders, or arrays x and y in an .npz file.
"""
SWITCHES = """\
# When values and weights are quantized, and scales follow the data, by pattern and step: true, false, a first step,
# or [first, last). Without these tables all of it is on, and the observers are off.
"""

ABOUT = {
    "resize": "the short side, or [height, width]",
    "crop": "the centre, or [height, width]",
    "color": "rgb, bgr, gray, yuv444 (centred, full swing), yuv444_studio",
    "divisor": "pixels / divisor",
    "mean": "then (x - mean) / std, a number or one a channel",
    "std": "",
    "layout": "nchw or nhwc",
    "labels": "folders: one a class, by name; stem: the file names are class numbers",
    "draft": "true: JPEGs are decoded at 1/2, 1/4 or 1/8 where resize leaves no more",
    "epochs": "",
    "batch": "samples a step",
    "loss": "cross_entropy, mse, l1, or module:function of (outputs, labels)",
    "ignore_label": "which cross_entropy leaves out; 255 where there are fewer classes",
    "optimizer": "sgd (Nesterov momentum) or adamw",
    "learning_rate": "of parameters",
    "scale_learning_rate": "of scales; for adamw relative to a scale",
    "momentum": "of sgd",
    "weight_decay": "of kernels",
    "schedule": "constant, cosine, or step: divided by 10 at 1/3 and 2/3",
    "mode": "fake_quant, or bit_true: the values of the integers",
    "clip": "the largest norm of all gradients; 0 for none",
    "seed": "of the order of data and of dropout",
    "averaging": "share of the newest batch in an observed scale",
}


@command
def init(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="As for the other commands; its layers are listed.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The TOML file to write.")] = Path("q.toml"),
    march: Annotated[str, typer.Option(help="The march, or a chip such as S100.")] = "nash-e",
    force: Annotated[bool, typer.Option(help="Replace a file that is there.")] = False,
    checkpoint: Checkpoint = None,
    shape: Shape = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a file of settings: every setting with its default and a line about it, and the layers of a model.

    \b
    jquant init net.py:make --shape 1,3,224,224 -o q.toml
    jquant init -o q.toml --march S100
    """
    console = Console(json, quiet, verbose)
    check_file(output, suffixes=(".toml",))
    if output.exists() and not force:
        raise UsageError(f"{output} is there; --force replaces it, --output names another file")
    target = march_of(march)
    found = None if model is None else load_model(model, checkpoint, shape)
    if isinstance(found, Program):
        raise UsageError(f"{model} is a program, whose formats are settled; give the model that it was made from")
    name = target.name if MARCHES.get(target.name) == target else march  # of one's own: the file that it was read from
    text = settings_text(target, None if found is None else found.graph, name)
    with replacing(output) as partial:
        partial.write_text(text, encoding="utf-8")
    console.wrote(output)
    if model is not None:
        console.next("calibrate", *named(model, output, checkpoint, shape), "--data", "DATA", "-o", "net.jqs")
    console.value({"output": output})


def settings_text(target: Target, graph: Graph | None, march: str | None = None) -> str:
    """The file for a march, under its own or another name, with the layers of a graph where there is one."""
    marches = ", ".join(sorted(MARCHES))
    parts = [
        HEAD,
        "[jquant]\nschema = 1\n",
        f"[target]\nmarch = {json_text.dumps(march or target.name)}  # {marches}\n",
        RULES,
        *_rules(int8_default()),
        *([] if graph is None else [LAYERS, *_layers(graph)]),
        IMAGE,
        _switched_off("image", ImageSettings, _size_of(graph)),
        TRAIN,
        _switched_off("train", TrainSettings, {}),
        SWITCHES,
        "\n".join(f'#[train.{name}]\n#"*" = true' for name, value in _switches()) + "\n",
    ]
    return "\n".join(parts)


def _rules(rules: Any) -> Iterator[str]:
    for pattern, policy in rules.items():
        assert isinstance(policy, Policy)
        for port in ("output", "weight"):
            spec = getattr(policy, port)
            axis = f'axis = "{spec.axis}"\n' if spec.axis else ""
            yield f'[rules."{pattern}".{port}]\ndtype = "{spec.dtype}"\n{axis}'


def _layers(graph: Graph) -> Iterator[str]:
    for entry in graph.inputs:
        yield f"# input {entry.name}: {entry.dtype} [{_shape(entry)}]\n{_rule(entry.name)}"
    for node in graph.nodes:
        weight = f'#[rules."{node.name}".weight]\n#dtype = "int8"\n#axis = "out"\n' if node.op.weight_roles else ""
        yield f"# {node.name}: {_kind(node.op)}\n{_rule(node.name)}{weight}"


def _rule(name: str) -> str:
    return f'#[rules.{json_text.dumps(name)}.output]\n#dtype = "int16"\n'


def _kind(op: Op) -> str:
    return type(op).__name__


def _shape(entry: Input) -> str:
    return ", ".join("batch" if n is None else str(n) for n in entry.shape)


def _switched_off(name: str, cls: type, known: dict[str, Any]) -> str:
    lines = [f"#[{name}]"]
    for field in fields(cls):
        value = known.get(field.name, field.default)
        if isinstance(value, FrozenMap):
            continue
        shown = value[0] if isinstance(value, tuple) and len(value) == 1 else 256 if value is None else value
        setting = f"#{field.name} = {json_text.dumps(shown)}"
        about = ABOUT[field.name]
        lines.append(f"{setting:<30} # {about}" if about else setting)
    return "\n".join(lines) + "\n"


def _switches() -> Iterator[tuple[str, Any]]:
    return ((f.name, f.default) for f in fields(TrainSettings) if isinstance(f.default, FrozenMap))


def _size_of(graph: Graph | None) -> dict[str, Any]:
    """The picture that the first input of a graph takes: height, width and layout, by its 1 or 3 channels."""
    shape = graph.inputs[0].shape if graph is not None else ()
    if len(shape) != 4:
        return {}
    first = shape[1] in (1, 3)
    height, width = shape[2:] if first else shape[1:3]
    color = "gray" if (shape[1] if first else shape[3]) == 1 else "rgb"
    found = {"resize": [height, width], "crop": [height, width], "color": color, "layout": "nchw" if first else "nhwc"}
    return found if None not in (height, width) else {}
