"""`export`: programs and plans for other tools."""

from typing import Annotated, Any

import jax
import typer

from jquant.cli.arguments import check_file
from jquant.cli.console import Console, Json, Quiet, UsageError, Verbose, command, replacing
from jquant.cli.models import Config, ModelPath, Output, load_model
from jquant.cli.next_steps import named
from jquant.cli.settings import read_settings
from jquant.cli.state import State
from jquant.host.progress import stages
from jquant.program import integers
from jquant.program.lower import lower
from jquant.types import Program

FORMATS = ("stablehlo", "onnx", "torch")


@command
def export(
    model: ModelPath,
    output: Output,
    to: Annotated[str, typer.Option("--to", help="stablehlo, onnx or torch.")] = "stablehlo",
    batch: Annotated[int, typer.Option(min=1, help="The batch size of a StableHLO file.")] = 1,
    config: Config = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a model for another tool: the program as StableHLO, or the quantized model as ONNX (QDQ) or torch (.pt2).

    \b
    jquant export net.jq --to stablehlo --batch 8 -o net.stablehlo
    jquant export net.jqs --to onnx -o net.onnx
    jquant export net.jqs --to torch -o net.pt2
    """
    console = Console(json, quiet, verbose)
    if to not in FORMATS:
        raise UsageError(f"unknown format {to!r}; known: {', '.join(FORMATS)}")
    check_file(output)
    found = load_model(model)
    state = found if isinstance(found, Program) else found.under(read_settings(config), model)
    with stages("exporting", (to,)) as begin:
        begin(to)
        if to in ("onnx", "torch"):
            data = _foreign(state, to)
        else:
            data = stablehlo(state if isinstance(state, Program) else lower(state.calibrated()), batch)
    with replacing(output) as partial:
        partial.write_bytes(data)
    console.wrote(output)
    if isinstance(state, Program) or state.qparams is not None:  # outputs to compare those of the file with
        console.next("run", *named(model, config), "--data", "DATA", "-o", "outputs.npz")
    console.value({"output": output, "format": to, "bytes": len(data)})


def stablehlo(program: Program, batch: int) -> bytes:
    """The program on real inputs as a serialized `jax.export`: its constants inside, for a batch of fixed size."""
    from jax import export as jax_export

    shapes = [
        jax.ShapeDtypeStruct(tuple(batch if n is None else n for n in entry.shape), entry.dtype)
        for entry in program.graph.inputs
    ]

    def run(*inputs: Any) -> Any:
        values = integers.quantize_inputs(program, dict(zip(program.inputs, inputs, strict=True)))
        values = integers.dequantize_values(program, integers.run_integers(program, values))
        return tuple(values[name] for name in program.graph.outputs)

    return bytes(jax_export.export(jax.jit(run))(*shapes).serialize())


def _foreign(state: State | Program, to: str) -> bytes:
    """The calibrated model as a QDQ model or a .pt2 archive; the float graph where there is no qconfig."""
    if isinstance(state, Program):
        raise UsageError(f"export to {to} needs the state that the program was made from")
    source = (state.graph, state.params) if not state.is_planned else (state.calibrated(),)
    if to == "torch":
        from jquant_converters.command_line import torch_archive

        return torch_archive(*source)
    from jquant_converters import to_onnx

    return bytes(to_onnx(*source).SerializeToString())
