"""Towards a program: `inspect`, `check`, `calibrate`, `quantize`."""

from pathlib import Path
from typing import Annotated, Any

import typer

import jquant as jq
from jquant.cli.arguments import check_choice, check_file, check_folder, check_packages
from jquant.cli.console import Console, Json, Quiet, UnmetError, UsageError, Verbose, command
from jquant.cli.data import are_pictures, check_data, load_data
from jquant.cli.models import (
    Batch,
    Checkpoint,
    Config,
    DataOption,
    Devices,
    Microbatch,
    ModelPath,
    Output,
    Samples,
    Shape,
    load_model,
    load_state_of,
    mesh_of,
    used_on,
)
from jquant.cli.next_steps import beside, towards_scales
from jquant.cli.settings import Settings, read_settings
from jquant.cli.state import State, image_metadata, save_state
from jquant.graph.serialize import encode
from jquant.plan.describe import describe, explain
from jquant.program.files import save
from jquant.program.lower import lower
from jquant.program.paths import node_paths, path_table
from jquant.types import JQuantError, Program


@command
def inspect(
    model: ModelPath,
    config: Config = None,
    checkpoint: Checkpoint = None,
    shape: Shape = None,
    platform: Annotated[
        str | None, typer.Option(help="Of a program: how each node computes on cpu, cuda, rocm or tpu; none is needed.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Print a model: its graph; with a qconfig what is asked for and applied; with scales these; a program as it is.

    \b
    jquant inspect net.py:make --shape 1,3,224,224
    jquant inspect net.jqs --config q.toml
    jquant inspect net.jq --json
    jquant inspect net.jq --platform cuda
    """
    console = Console(json, quiet, verbose)
    found = load_model(model, checkpoint, shape)
    if platform is not None:
        if not isinstance(found, Program):
            raise UsageError(f"{model} is no program, and --platform is for those; make one with jquant quantize")
        paths = node_paths(found, platform)
        console.text(f"{path_table(paths)}\n\njax.export lowers the program for {platform}.")
        console.next("run", model, "--data", "DATA", "-o", beside(model, ".npz"))
        console.value({"kind": "program", "platform": platform, "paths": [vars(path) for path in paths]})
        return
    if isinstance(found, Program):
        console.text(str(found))
        console.next("run", model, "--data", "DATA", "-o", beside(model, ".npz"))
        console.value({"kind": "program", "graph": encode(found.graph), "formats": encode(found.formats)})
        return
    state = found.under(read_settings(config), model)
    count = sum(value.size for value in state.params.values())
    result = {"kind": "state", "graph": encode(state.graph), "parameters": count}
    if not state.is_planned:
        console.text(f"{state.graph}\nparameters: {count}")
    else:
        prepared = state.prepared()
        console.text(describe(prepared) if state.qparams is not None else explain(prepared))
        result["resolutions"] = [vars(row) for row in prepared.plan.resolutions]
    console.next(*towards_scales(state, model, config, checkpoint, shape))
    console.value(result)


@command
def check(
    model: ModelPath,
    config: Config = None,
    checkpoint: Checkpoint = None,
    shape: Shape = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Say before anything is trained what cannot be deployed or looks wrong. Exit code 3 if there is such a thing.

    Lists too which operators the public documents of the march's compiler name, and which limits a node is beyond.

    \b
    jquant check net.py:make --shape 1,3,224,224 --config q.toml
    jquant check net.jqs --json
    """
    from jquant.analysis import check_model, operator_support, support_table

    console = Console(json, quiet, verbose)
    state, _ = load_state_of(model, config, checkpoint, shape)
    findings = check_model(state.graph, state.params, state.qconfig, target=state.target, qparams=state.qparams)
    rows = [vars(f) for f in findings]
    console.rows(rows)
    bad = sum(f.level == "error" for f in findings)
    support = operator_support(state.prepared()) if state.is_planned and not bad else []
    if support:
        console.text(support_table(support))
    console.value({"findings": rows, "operators": [vars(entry) for entry in support]})
    if bad:
        raise UnmetError(f"{bad} of {len(findings)} findings are errors: the model cannot be deployed as it is")
    console.text(f"{len(findings)} findings, none of them an error" if findings else "nothing found")
    console.next(*towards_scales(state, model, config, checkpoint, shape))


RecipeOption = Annotated[
    str | None,
    typer.Option(
        help="Also improve it, by steps that are kept where they help: fast, default or best (jq.ptq.recipe)."
    ),
]


@command
def calibrate(
    model: ModelPath,
    data: DataOption,
    output: Output,
    config: Config = None,
    checkpoint: Checkpoint = None,
    shape: Shape = None,
    batch: Batch = 16,
    samples: Samples = None,
    microbatch: Microbatch = None,
    devices: Devices = None,
    recipe: RecipeOption = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Find the scales of a model from data, and write both as a state.

    With --recipe the file holds the improved model as jq.plan.save writes it, which all commands take.

    \b
    jquant calibrate net.py:make --checkpoint net.pth --shape 1,3,224,224 \\
      --config q.toml --data images/ -o net.jqs
    jquant calibrate net.jqs -c other.toml -d arrays.npz --samples 100 -o new.jqs
    jquant calibrate net.jqs -d arrays.npz --recipe default -o better.jqm
    """
    console, mesh = Console(json, quiet, verbose), mesh_of(devices)
    _check_recipe(recipe, microbatch, devices)
    check_data(data)
    check_file(output)
    state, settings = load_state_of(model, config, checkpoint, shape, needs_qconfig=True)
    _say_defaults(console, settings, data)
    if recipe is None:
        state = _calibrated(state, settings, data, batch, samples, microbatch=microbatch, mesh=mesh)
    else:
        state = _tuned(console, state, settings, data, batch, samples, recipe)
    save_state(output, state)
    calibrated = state.calibrated()
    console.text(describe(calibrated))
    console.wrote(output)
    console.next("eval", output, "--data", data)
    console.value({"output": output, "scales": calibrated.qparams})


@command
def quantize(
    model: ModelPath,
    output: Output,
    data: Annotated[str | None, typer.Option("--data", "-d", help="Calibration data; not needed for a state.")] = None,
    config: Config = None,
    checkpoint: Checkpoint = None,
    shape: Shape = None,
    report: Annotated[Path | None, typer.Option(help="Also write a report into this folder.")] = None,
    batch: Batch = 16,
    samples: Samples = None,
    microbatch: Microbatch = None,
    devices: Devices = None,
    recipe: RecipeOption = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Turn a model into an integer program: calibrated on data, or as a calibrated or trained state has it.

    \b
    jquant quantize net.py:make --checkpoint net.pth --shape 1,3,224,224 \\
      --config q.toml --data images/ -o net.jq --report out/
    jquant quantize trained.jqs -o net.jq
    """
    console, mesh = Console(json, quiet, verbose), mesh_of(devices)
    _check_recipe(recipe, microbatch, devices)
    if data is not None:
        check_data(data)
    elif recipe is not None:
        raise UsageError("--recipe needs calibration data: give --data")
    check_file(output)
    if report is not None:
        if data is None:
            raise JQuantError("a report compares on data: give --data")
        check_folder(report, "--report")
        check_packages("--report", "jinja2", "matplotlib")
    state, settings = load_state_of(model, config, checkpoint, shape, needs_qconfig=True)
    if data is not None and state.trained is None:
        _say_defaults(console, settings, data)
        if recipe is None:
            state = _calibrated(state, settings, data, batch, samples, microbatch=microbatch, mesh=mesh)
        else:
            state = _tuned(console, state, settings, data, batch, samples, recipe)
    elif recipe is not None:
        raise UsageError(f"{model} was trained: --recipe would calibrate it again; leave it out")
    program = lower(state.calibrated())
    if report is not None and data is not None:
        from jquant.cli.measure import write_reports

        write_reports(console, state, load_data(data, state.graph, settings.image), report, batch, samples)
    save(output, program, metadata=image_metadata(state))
    console.text(str(program))
    console.wrote(output)
    console.next("run", output, "--data", "DATA" if data is None else data, "-o", output.with_suffix(".npz"))
    console.value({"output": output, "report": report, "march": program.target.name, "nodes": len(program.formats)})


def _say_defaults(console: Console, settings: Settings, data: str) -> None:
    """A note where nothing says how pictures become inputs: another preprocessing than that of training is no error."""
    if are_pictures(Path(data)) and not settings.has_image:
        console.warn(
            "no [image] in the settings: pictures are taken as RGB, divided by 255, without mean and std. Say there "
            "what the model was trained on"
        )


def _calibrated(state: State, settings: Settings, data: str, batch: int, samples: int | None, **options: Any) -> State:
    """`options` as for `jq.calibrate`."""
    found = load_data(data, state.graph, settings.image)
    calibrated = jq.calibrate(state.prepared(), found.inputs(batch, samples), **options)
    return used_on(state, settings, data).with_model(calibrated, trained=False)


def _check_recipe(recipe: str | None, microbatch: int | None, devices: int | None) -> None:
    if recipe is None:
        return
    check_choice("--recipe", recipe, jq.ptq.RECIPES)
    if microbatch is not None or devices is not None:
        raise UsageError("--recipe calibrates on one device and on whole batches: leave out --microbatch and --devices")


def _tuned(
    console: Console, state: State, settings: Settings, data: str, batch: int, samples: int | None, recipe: Any
) -> State:
    """The model as a recipe improves it, with the table of its steps."""
    found = load_data(data, state.graph, settings.image)
    tuned = jq.ptq.recipe(recipe, state.prepared(), found.inputs(batch, samples))
    console.text(str(tuned))
    return State.of_model(tuned.model, used_on(state, settings, data).image)
