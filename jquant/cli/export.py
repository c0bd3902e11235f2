"""`export`: programs and plans for other tools."""

from typing import Annotated, Any

import jax
import typer

from jquant import integer
from jquant.cli.console import Console, Json, Quiet, UsageError, Verbose, command, replacing
from jquant.cli.models import Config, Model, Output, load_model
from jquant.cli.settings import read_settings
from jquant.cli.state import State
from jquant.lower import lower
from jquant.types import ConversionError, Program

FORMATS = ("stablehlo", "onnx", "torch")


@command
def export(
    model: Model,
    output: Output,
    to: Annotated[str, typer.Option("--to", help="stablehlo or onnx.")] = "stablehlo",
    batch: Annotated[int, typer.Option(min=1, help="The batch size of a StableHLO file.")] = 1,
    config: Config = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a model for another tool: the integer program as StableHLO, or the quantized model as ONNX (QDQ).

    \b
    jquant export net.jq --to stablehlo --batch 8 -o net.stablehlo
    jquant export net.jqs --to onnx -o net.onnx
    """
    console = Console(json, quiet, verbose)
    if to not in FORMATS:
        raise UsageError(f"unknown format {to!r}; known: {', '.join(FORMATS)}")
    found = load_model(model)
    state = found if isinstance(found, Program) else found.under(read_settings(config))
    if to == "torch":
        raise ConversionError("export to torch is not available from the command line in this release; use onnx")
    if to == "onnx":
        data = _onnx(state)
    else:
        data = stablehlo(state if isinstance(state, Program) else lower(*state.calibrated()), batch)
    with replacing(output) as partial:
        partial.write_bytes(data)
    console.wrote(output)
    console.value({"output": output, "format": to, "bytes": len(data)})


def stablehlo(program: Program, batch: int) -> bytes:
    """The program on real inputs as a serialized `jax.export`: its constants inside, for a batch of fixed size."""
    from jax import export as jax_export

    shapes = [
        jax.ShapeDtypeStruct(tuple(batch if n is None else n for n in entry.shape), entry.dtype)
        for entry in program.graph.inputs
    ]

    def run(*inputs: Any) -> Any:
        values = integer.quantize_inputs(program, dict(zip(program.inputs, inputs, strict=True)))
        values = integer.dequantize_values(program, integer.run_integers(program, values))
        return tuple(values[name] for name in program.graph.outputs)

    return bytes(jax_export.export(jax.jit(run))(*shapes).serialize())


def _onnx(state: State | Program) -> bytes:
    """The calibrated plan as a QDQ model; the float graph where there is no qconfig."""
    if isinstance(state, Program):
        raise UsageError("export to onnx needs the state that the program was made from")
    from jquant_converters import to_onnx

    model = to_onnx(state.graph, state.params) if state.qconfig is None else to_onnx(*state.calibrated())
    return bytes(model.SerializeToString())
