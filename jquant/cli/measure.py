"""On data: `eval`, `run`, `compare`, `sensitivity`, `report`."""

import json as json_text
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jquant import targets
from jquant.cli.accuracy import first_name, usual_metric
from jquant.cli.arguments import check_choice, check_file, check_folder, check_packages
from jquant.cli.console import Console, Json, Quiet, UnmetError, UsageError, Verbose, command, plain, replacing
from jquant.cli.data import Data, check_data, load_data, load_object, read_arrays
from jquant.cli.models import (
    Batch,
    Config,
    DataOption,
    Devices,
    ModelPath,
    Output,
    Samples,
    load_state_of,
    load_with_settings,
    mesh_of,
)
from jquant.cli.next_steps import (
    BUDGET,
    after_accuracy,
    after_report,
    beside,
    named,
    search,
    to_integers,
)
from jquant.cli.settings import image_to_toml, joined_image
from jquant.cli.state import State
from jquant.evaluation.loop import Evaluation
from jquant.evaluation.loop import evaluate as evaluate_on
from jquant.evaluation.metrics import HostMean
from jquant.evaluation.sources import Source, sources_of
from jquant.graph.float import evaluate_float
from jquant.graph.structure import nested_outputs, output_names
from jquant.host.growing import GrowingArray
from jquant.host.progress import PATIENCE, stages, track
from jquant.meanings.meaning import Mode, check_mode
from jquant.numerics.namespace import to_host
from jquant.program import integers
from jquant.program.lower import lower
from jquant.types import Graph, JQuantError, Plan, Program

Run = Callable[..., Any]


@command
def evaluate(
    model: ModelPath,
    data: DataOption,
    mode: Annotated[
        list[str] | None,
        typer.Option(help="float, fake_quant, tables or bit_true; repeat it for several. A program is bit_true."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="module:function of (outputs, labels), a number a batch; default: top-1, or agreement with float."
        ),
    ] = None,
    at_least: Annotated[float | None, typer.Option(help="Exit with 3 if the last mode is below this.")] = None,
    config: Config = None,
    batch: Batch = 32,
    samples: Samples = None,
    position: Annotated[
        Path | None,
        typer.Option(help="A file for the counts so far: a command that was stopped goes on behind them."),
    ] = None,
    devices: Devices = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure accuracy on labelled data, or without labels how often the answers agree with float.

    \b
    jquant eval net.jqs --data test.npz --mode float --mode bit_true
    jquant eval net.jq --data images/ --config q.toml --at-least 71.5
    jquant eval seg.jqs --data loader.py:batches --metric metrics.py:mean_iou
    """
    console, mesh = Console(json, quiet, verbose), mesh_of(devices)
    check_data(data)
    for name in mode or ():
        check_mode(name)
    source, settings = load_with_settings(model, config)
    loaded = load_data(data, source.graph, settings.image)
    if metric is not None and not loaded.labelled:
        raise UsageError("--metric needs labels, and the data has none")
    what, found = _evaluated(source, mode, loaded, batch, samples, metric=metric, position=position, mesh=mesh)
    figures = {name: float(each[what]) for name, each in found.modes.items()}
    rows = [{"mode": name, what: figure, "samples": found.samples} for name, figure in figures.items()]
    console.rows(rows)
    if metric is None and len(source.graph.outputs) > 1:
        count = len(source.graph.outputs)
        console.text(f"of {first_name(source.graph)}, the first of {count} outputs; --metric measures others")
    console.value({"metric": what, "samples": found.samples, "modes": figures})
    last = list(figures.values())[-1]
    if at_least is not None and not last >= at_least:
        raise UnmetError(f"{what} is {last:.4g}, below {at_least:g}")
    console.next(*after_accuracy(source, what, figures, model, config, data))


def _evaluated(
    source: State | Program,
    modes: Sequence[str] | None,
    data: Data,
    batch: int,
    samples: int | None,
    *,
    metric: str | None = None,
    position: Path | None = None,
    mesh: Mesh | None = None,
) -> tuple[str, Evaluation]:
    """The metric (`module:function`, top-1, or agreement where labels are missing) and its figures."""
    if isinstance(source, Program) and not data.labelled:
        raise UsageError("without labels, and with a program only, there is nothing to compare with; give the state")
    params = None if isinstance(source, Program) else source.params
    if metric is None:
        what, measure = usual_metric(data.labelled, source.graph, params)
    else:
        what, measure = metric, HostMean(load_object(metric))
    return what, evaluate_on(
        _sources(source, modes, against_float=getattr(measure, "against", None) == "float"),
        data.batches(batch, samples),
        {what: measure},
        inputs=_inputs_of,
        total=data.steps(batch, samples),
        position=position,
        mesh=mesh,
    )


def _sources(source: State | Program, modes: Sequence[str] | None, *, against_float: bool) -> dict[str, Source]:
    """{mode: what to evaluate}, and float beside them where a metric compares with it."""
    if isinstance(source, Program):
        if modes and set(modes) != {"bit_true"}:
            raise UsageError("a program has one mode, bit_true; give the state it was made from for others")
        return sources_of({"bit_true": source}, (), ())
    for name in modes or ():
        check_mode(name)
    wanted = list(
        dict.fromkeys(modes or (["float"] if source.qparams is None else ["float", "fake_quant", "bit_true"]))
    )
    found = {name: _source(source, name) for name in wanted}
    if against_float and "float" not in found:
        found["float"] = replace(_source(source, "float"), is_shown=False)
    return found


def _source(source: State, mode: str) -> Source:
    if mode == "float" and not source.is_planned:
        return Source(partial(_float_of, source.graph), source.params)
    if mode == "bit_true":  # the program itself: its integers run faster than the forward pass of training
        return sources_of({mode: lower(source.calibrated())}, (), ())[mode]
    return sources_of(source.prepared() if mode == "float" else source.calibrated(), (mode,), ())[mode]


def _float_of(graph: Graph, params: Any, *inputs: Any) -> Any:
    return nested_outputs(graph, evaluate_float(graph, params, *inputs))


def _inputs_of(batch: Any) -> Any:
    return batch[0]


@command
def run(
    model: ModelPath,
    data: DataOption,
    output: Output,
    raw: Annotated[bool, typer.Option(help="Write integers (LSB; acc of an accumulator), not real numbers.")] = False,
    taps: Annotated[bool, typer.Option(help="Write every value, not the outputs only.")] = False,
    config: Config = None,
    batch: Batch = 32,
    samples: Samples = None,
    devices: Devices = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run a program on data and write its outputs as .npz, by name.

    \b
    jquant run net.jq --data test.npz -o outputs.npz
    jquant run net.jq --data images/ --config q.toml --raw --taps -o values.npz
    """
    console, mesh = Console(json, quiet, verbose), mesh_of(devices)
    check_data(data)
    check_file(output, suffixes=(".npz",))
    found, settings = load_with_settings(model, config)
    program = found if isinstance(found, Program) else lower(found.calibrated())
    loaded = load_data(data, program.graph, settings.image)
    host = replace(program, scales=to_host(program.scales))  # real values are made here, without compiling a product
    names = program.graph.values if taps else program.graph.outputs
    with replacing(output) as path, path.open("wb") as file, ExitStack() as stack:
        growing = {name: stack.enter_context(GrowingArray(path.parent)) for name in names}
        for inputs, _ in track(loaded.batches(batch, samples), "running", loaded.steps(batch, samples)):
            count = len(inputs[0])
            found_here = integers.run_with_taps(program, *(_spread(x, mesh) for x in inputs))
            values = {name: value[:count] for name, value in to_host(found_here).items() if name in names}
            for name, value in (values if raw else integers.dequantize_values(host, values)).items():
                growing[name].append(np.asarray(value))
        arrays = {name: each.array() for name, each in growing.items()}
        np.savez(file, **arrays)  # type: ignore[arg-type]
    called = {value: name for name, value in output_names(program.graph).items()}  # as the model calls its outputs
    rows = [{"name": n, "shape": list(a.shape), "dtype": str(a.dtype)} for n, a in arrays.items()]
    console.rows([row | {"output": called.get(str(row["name"]), "")} for row in rows] if called else rows)
    console.wrote(output)
    console.value(
        {"output": output, "values": {n: {"shape": a.shape, "dtype": str(a.dtype)} for n, a in arrays.items()}}
    )
    if isinstance(found, Program):
        console.next("export", model, "-o", beside(model, ".stablehlo"))
    else:
        console.next(*to_integers(model, config))


def _spread(array: np.ndarray, mesh: Mesh | None) -> Any:
    """A batch on the devices, its last sample repeated until they have equally many."""
    if mesh is None:
        return jnp.asarray(array)
    missing = -len(array) % mesh.size
    whole = np.concatenate((array, np.repeat(array[-1:], missing, axis=0))) if missing else array
    return jax.device_put(whole, NamedSharding(mesh, PartitionSpec("data")))


@command
def compare(
    model: ModelPath,
    data: DataOption,
    a: Annotated[
        str, typer.Option("-a", help="The baseline: float, fake_quant, tables, bit_true, or a .npz of values.")
    ] = "float",
    b: Annotated[str, typer.Option("-b", help="What is measured against it.")] = "bit_true",
    other: Annotated[
        Path | None, typer.Option(help="A state of the same model that -b is taken from, after training.")
    ] = None,
    sort: Annotated[str | None, typer.Option(help="Sort by a column, the worst first, such as own_sqnr.")] = None,
    top: Annotated[int | None, typer.Option(min=1, help="Print this many rows.")] = None,
    weights: Annotated[bool, typer.Option(help="Print the weights, not the values.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write all numbers as JSON.")] = None,
    config: Config = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples to compare on.")] = 8,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples at once; default all of them.")] = None,
    position: Annotated[
        Path | None,
        typer.Option(help="A file for the sums so far: a command that was stopped goes on behind them."),
    ] = None,
    devices: Devices = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compare two modes of a model layer by layer: which one loses accuracy, and where.

    \b
    jquant compare net.jqs --data test.npz --sort own_sqnr --top 10
    jquant compare net.jqs --data test.npz -a fake_quant -b tables
    jquant compare net.jqs --other trained.jqs --data test.npz \\
      -a fake_quant -b fake_quant
    jquant compare net.jqs --data images/ --samples 5000 --batch 32 \\
      --position sums.json
    jquant compare net.jqs --data test.npz -a board_values.npz -b bit_true
    """
    from jquant import analysis
    from jquant.analysis.comparison import check_column

    console, mesh = Console(json, quiet, verbose), mesh_of(devices)
    check_data(data)
    check_file(output)
    from_elsewhere = any(side.endswith(".npz") for side in (a, b))
    if from_elsewhere and (batch is not None or mesh is not None or position is not None):
        raise UsageError("values of a .npz are compared in one batch; leave --batch, --devices and --position out")
    for side in (a, b):
        if not side.endswith(".npz"):
            check_mode(side)
        elif not Path(side).is_file():
            raise FileNotFoundError(f"no values at {side}")
    if sort is not None:
        check_column(sort)
    state, settings = load_state_of(model, config)
    second = None
    if other is not None:
        after, _ = load_state_of(str(other))
        joined_image(after.image, replace(settings, has_image=state.image is not None), str(other))
        plans = [one.model and one.model.plan for one in (state, after)]
        if after.graph != state.graph or after.qconfig != state.qconfig or plans[0] != plans[1]:
            raise UsageError(f"{other} is a state of another model or qconfig than {model}")
        second = after.calibrated()
    loaded, calibrated = load_data(data, state.graph, settings.image), state.calibrated()
    if from_elsewhere:
        found = analysis.compare(calibrated, _one_batch(loaded, samples), _side(a), _side(b), model_b=second)
    else:
        read = [_one_batch(loaded, samples)] if batch is None else _Inputs(loaded, batch, samples)
        modes: Any = (a, b)
        options: Any = {"total": None if batch is None else loaded.steps(batch, samples), "position": position}
        found = analysis.compare_batches(calibrated, read, *modes, model_b=second, mesh=mesh, **options)
    rows = found.weights if weights else found.rows
    table = found.table(sort=sort, weights=weights) if top is None else _top(found, rows, sort, weights, top)
    console.text(table, keep=() if sort is None else (sort,))
    if found.missing and verbose:
        console.note(f"only one side has: {', '.join(found.missing)}")
    if output is not None:
        with replacing(output) as path:
            path.write_text(json_text.dumps(plain(found.to_dict()), indent=1))
        console.wrote(output)
    console.value(found.to_dict())
    if other is not None:
        console.next(*to_integers(str(other)))
    elif not from_elsewhere:
        console.next("sensitivity", *named(model, config), "--data", data, "--top", 10)


def _top(found: Any, rows: Sequence[Any], sort: str | None, weights: bool, top: int) -> str:
    lines = found.table(sort=sort, weights=weights).splitlines()
    more = f"\n... {len(rows) - top} more" if len(rows) > top else ""
    return "\n".join(lines[: top + 2]) + more


def _side(name: str) -> Any:
    return read_arrays(Path(name)) if name.endswith(".npz") else name


@dataclass(frozen=True)
class _Inputs:
    """The batches of some data without their labels, read again at every pass."""

    data: Data
    batch: int
    samples: int

    def __iter__(self) -> Iterator[tuple[np.ndarray, ...]]:
        return (inputs for inputs, _ in self.data.batches(self.batch, self.samples))


def _one_batch(data: Data, samples: int) -> tuple[Any, ...]:
    for inputs in data.inputs(samples, samples):
        return inputs
    raise JQuantError("no samples")


@command
def sensitivity(
    model: ModelPath,
    data: DataOption,
    metric: Annotated[
        str, typer.Option(help="cosine, sqnr, mse, l1, kl, max_error, or module:function of two arrays.")
    ] = "sqnr",
    mode: Annotated[str, typer.Option(help="one_on: one quantizer on at a time; one_off: one off.")] = "one_on",
    kind: Annotated[list[str] | None, typer.Option(help="activation or weight; default both.")] = None,
    top: Annotated[int | None, typer.Option(min=1, help="Print this many rows.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="Also search int8/int16 values and int4/int8 weights with this cost at most.")
    ] = None,
    cost: Annotated[str, typer.Option(help="Of the budget: macs (1.0 is everything at 8 bits) or bytes.")] = "macs",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the ranking as JSON, or with --budget the qconfig as TOML."),
    ] = None,
    config: Config = None,
    batch: Batch = 8,
    samples: Annotated[int, typer.Option(min=1, help="Samples to measure on.")] = 16,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Rank every quantizer by what it costs, one at a time; with a budget, choose the number of bits of each.

    \b
    jquant sensitivity net.jqs --data calibration.npz --top 10
    jquant sensitivity net.jqs --data calibration.npz --budget 1.2 -o mixed.toml
    """
    from jquant import analysis
    from jquant.analysis.metrics import metric_of

    console = Console(json, quiet, verbose)
    check_data(data)
    if budget is not None and mode != "one_on":
        raise UsageError("--budget needs --mode one_on")
    check_file(output)
    check_choice("--mode", mode, ("one_on", "one_off"))
    check_choice("--cost", cost, ("macs", "bytes"))
    for name in kind or ():
        check_choice("--kind", name, ("activation", "weight"))
    chosen: Any = load_object(metric) if ":" in metric else metric
    metric_of(chosen)
    state, settings = load_state_of(model, config)
    if budget is not None and output is not None and state.qconfig is None and state.is_planned:
        raise UsageError(
            f"{model} was prepared in Python: give its qconfig the rules there (jq.analysis.search_mixed_precision); "
            "without -o they are printed here"
        )
    calibrated = state.calibrated()
    read = load_data(data, state.graph, settings.image).inputs(batch, samples)
    batches = list(track(read, "reading data", after=PATIENCE))
    formats: dict[str, Any] = {}
    if budget is not None:
        formats = {"activations": ("int8", "int16"), "weights": ("int4", "int8")}
        chosen = "mse" if metric == "sqnr" else chosen
    formats |= {"kinds": tuple(kind) if kind else ("activation", "weight"), "mode": mode}
    ranking = analysis.sensitivity(calibrated, batches, metric=chosen, **formats)
    console.text(ranking.table(top))
    result: dict[str, Any] = {"ranking": ranking.to_dict()}
    text = json_text.dumps(plain(ranking.to_dict()), indent=1)
    if budget is not None:
        found = analysis.search_mixed_precision(calibrated, ranking, budget=budget, cost=cost)  # type: ignore[arg-type]
        console.text(found.table())
        result |= {"choices": dict(found.choices), "error": found.error, "cost": found.cost, "exact": found.exact}
        text = text if output is None else _mixed_toml(state, found.rules())
    if output is not None:
        with replacing(output) as path:
            path.write_text(text)
        console.wrote(output)
    if budget is not None and output is not None:
        console.next("calibrate", model, "--config", output, "--data", data, "-o", "mixed.jqs")
    elif budget is not None and state.model is not None:
        console.next(*to_integers(model, config))
    else:
        chosen_budget = BUDGET if budget is None else budget
        console.next(*search(model, config, data, chosen_budget, cost, writes=state.model is None))
    console.value(result)


def _mixed_toml(state: State, rules: dict) -> str:
    from jquant.config.files import qconfig_to_toml
    from jquant.config.qconfig import QConfig

    assert state.qconfig is not None
    assert state.target is not None
    text = qconfig_to_toml(QConfig({**state.qconfig.rules, **rules}))
    image = "" if state.image is None else "\n" + image_to_toml(state.image)
    known = targets.MARCHES.get(state.target.name) == state.target
    march = f'[target]\nmarch = "{state.target.name}"\n' if known else targets.to_toml(state.target, "target")
    return f"{text}\n{march}{image}"


@command
def report(
    model: ModelPath,
    data: DataOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write into.")],
    config: Config = None,
    batch: Batch = 8,
    samples: Annotated[int, typer.Option(min=1, help="Samples to compare on.")] = 8,
    accuracy: Annotated[
        bool, typer.Option(help="Measure accuracy on all of the data too; without labels, agreement with float.")
    ] = True,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a report of where accuracy goes: one HTML page that works offline, and its numbers as JSON.

    \b
    jquant report net.jqs --data test.npz -o out/
    jquant report net.jqs --data images/ -o out/ --samples 32 --no-accuracy
    """
    console = Console(json, quiet, verbose)
    check_data(data)
    check_folder(output)
    check_packages("a report", "jinja2", "matplotlib")
    state, settings = load_state_of(model, config)
    loaded = load_data(data, state.graph, settings.image)
    about = {"model": str(model), "data": str(data), "samples compared": str(samples)}
    measured = _accuracies(state, loaded, batch) if accuracy else {}
    written = write_reports(console, state, loaded, output, batch, samples, measured=measured, about=about)
    console.next(*after_report(measured, model, config, data, writes=state.model is None))
    console.value(written)


def _accuracies(state: State, data: Data, batch: int) -> dict[str, dict[str, Any]]:
    """{mode: {metric: figure, "samples": count}} on all of some data."""
    try:
        what, found = _evaluated(state, None, data, batch, None)
    except JQuantError as error:
        raise type(error)(f"{error}. --no-accuracy writes the report without top-1") from error
    return {mode: {what: float(each[what]), "samples": found.samples} for mode, each in found.modes.items()}


def write_reports(
    console: Console,
    state: State,
    data: Data,
    folder: Path,
    batch: int,
    samples: int | None,
    *,
    measured: Mapping[str, Mapping[str, Any]] | None = None,
    about: Mapping[str, str] | None = None,
) -> dict[str, Path]:
    """The report of a calibrated state on the first samples of some data, with accuracies that were measured."""
    from jquant import analysis

    calibrated = state.calibrated()
    plan = calibrated.plan
    x = next(islice(data.inputs(min(batch, samples or batch), samples), 1), None)
    if x is None:
        raise JQuantError("no samples")
    sides: dict[str, Mode] = {"Quantization": "fake_quant", "All of it": "bit_true"}
    found = {}
    with stages("report", (*sides, "checks", "ranking", "page")) as begin:
        for title, mode in sides.items():
            begin(title)
            found[title] = analysis.compare(calibrated, x, "float", mode)
        begin("checks")
        checks = analysis.check_model(
            state.graph, state.params, state.qconfig, target=state.target, qparams=calibrated.qparams
        )
        advice = analysis.layer_advice(found["Quantization"])
        notes = [f"{plan.target.name}; {len(x[0])} samples. The integers follow a specification, not a board."]
        begin("ranking")
        ranking = analysis.sensitivity(calibrated, [x])
        begin("page")
        written = analysis.write_report(
            folder,
            "jquant report",
            _summary(plan, found, measured or {}),
            found,
            notes,
            plan=plan,
            ranking=ranking,
            findings=[*checks, *advice],
            about=about,
            steps=analysis.next_steps(found["Quantization"], plan),
        )
    console.wrote(written.html)
    return {"html": written.html, "json": written.json}


def _summary(plan: Plan, found: Mapping[str, Any], measured: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a mode: what was measured of it, and the noise of the worst output against float."""
    noise = {c.b: min(row.sqnr for row in c.rows if row.name in plan.graph.outputs) for c in found.values()}
    modes = list(dict.fromkeys((*measured, *noise)))
    columns = list(dict.fromkeys(key for row in measured.values() for key in row))
    return [
        {"mode": mode, **{key: measured.get(mode, {}).get(key) for key in columns}, "worst output, dB": noise.get(mode)}
        for mode in modes
    ]
