"""Programs and fake-quant as StableHLO, by jax.export: for a runtime that knows neither jquant nor Python."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export

from jquant.integer import dequantize_values, quantize_inputs, run_integers
from jquant.ir.evaluate import bind_inputs
from jquant.numerics.platform import tracing_for
from jquant.simulate import check_qparams, evaluate_plan
from jquant.types import FormatError, Graph, Params, Plan, Program, QParams, storage_dtype


def to_stablehlo(
    path: str | os.PathLike[str],
    program: Program | Plan,
    params: Params | None = None,
    qparams: QParams | None = None,
    *,
    raw: bool = False,
    batch: int | None = None,
    platforms: Sequence[str] = ("cpu",),
) -> None:
    """Writes a program, or the fake-quant meaning of a plan, as a serialized StableHLO module with its constants.

    Args:
      path: of the file.
      program: what `lower` returned; or a plan, with its `params` and `qparams`.
      raw: of a program: integers in and out, as in `jq.run`.
      batch: its size; None leaves it open, so that the file serves any batch.
      platforms: what it shall run on, of "cpu", "cuda", "rocm", "tpu".

    Raises:
      FormatError: something else than a program or a plan, or `raw` for a plan.

    Example:
      >>> to_stablehlo("net.stablehlo", program)  # doctest: +SKIP
      >>> from_stablehlo("net.stablehlo")(x)  # doctest: +SKIP
    """
    function, graph, dtypes = _function(program, params, qparams, raw)
    symbol = jax.export.symbolic_shape("batch")[0] if batch is None else batch
    arguments = [
        jax.ShapeDtypeStruct(tuple(symbol if n is None else n for n in i.shape), dtypes.get(i.name, i.dtype))
        for i in graph.inputs
    ]
    with tracing_for(platforms):
        exported = jax.export.export(jax.jit(function), platforms=list(platforms))(*arguments)
    data = bytes(exported.serialize())
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _function(
    program: Program | Plan, params: Params | None, qparams: QParams | None, raw: bool
) -> tuple[Callable[..., Any], Graph, dict[str, str]]:
    """The function of the graph's inputs, the graph, and the dtypes of inputs that are not as it says."""
    if isinstance(program, Program):
        real = {n: d for n, d in program.inputs.items() if n in program.scales or d == "float16"}
        dtypes = {n: storage_dtype(d) for n, d in real.items()} if raw else {}

        def run(*inputs: jax.Array) -> Any:
            values = bind_inputs(program.graph, inputs, dtypes)
            values = run_integers(program, values if raw else quantize_inputs(program, values))
            return _outputs(program.graph, values if raw else dequantize_values(program, values))

        return run, program.graph, dtypes
    if not isinstance(program, Plan) or params is None or qparams is None:
        raise FormatError(
            f"to_stablehlo takes a Program, or a Plan with params and qparams, not {type(program).__name__}"
        )
    if raw:
        raise FormatError("raw is for programs; fake-quant has real numbers only")
    check_qparams(program, qparams)

    def apply(*inputs: jax.Array) -> Any:
        values = bind_inputs(program.graph, inputs)
        return _outputs(program.graph, evaluate_plan(program, params, qparams, values, quantized=True))

    return apply, program.graph, {}


def _outputs(graph: Graph, values: dict[str, jax.Array]) -> Any:
    found = tuple(values[name] for name in graph.outputs)
    return found[0] if len(found) == 1 else found


def from_stablehlo(path: str | os.PathLike[str]) -> Callable[..., Any]:
    """The function that `to_stablehlo` wrote, jitted: arrays in, the output or a tuple of outputs.

    The file is compiled code in an intermediate language: read only files that you trust.

    Raises:
      FormatError: a file that jax.export did not write. FileNotFoundError: no file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        exported = jax.export.deserialize(bytearray(path.read_bytes()))
    except Exception as error:  # flatbuffers raises whatever it meets
        raise FormatError(f"{path}: not a StableHLO module of jax.export: {error}") from error
    return jax.jit(exported.call)
