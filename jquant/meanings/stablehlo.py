"""Programs and fake-quant as StableHLO, by jax.export: for a runtime that knows neither jquant nor Python."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.export

from jquant.graph.evaluate import bind_inputs
from jquant.host.whole_files import replacing
from jquant.meanings.apply import mode_values
from jquant.numerics.platform import tracing_for
from jquant.plan.scales import check_model
from jquant.program.integers import dequantize_values, quantize_inputs, run_integers
from jquant.types import FormatError, Graph, Model, Program, storage_dtype


def to_stablehlo(
    path: str | os.PathLike[str],
    program: Program | Model,
    *,
    raw: bool = False,
    batch: int | None = None,
    platforms: Sequence[str] = ("cpu",),
) -> None:
    """Writes a program, or the fake-quant meaning of a model, as a serialized StableHLO module with its constants.

    The bytes follow from the program and the versions of jax; they name no file of the source code.

    Args:
      path: of the file.
      program: what `lower` returned; or a calibrated model.
      raw: of a program: integers in and out, as in `jq.run`.
      batch: its size; None leaves it open, so that the file serves any batch.
      platforms: what it shall run on, of "cpu", "cuda", "rocm", "tpu".

    Raises:
      FormatError: something else than a program or a model, or `raw` for a model.

    Example:
      >>> import jax.numpy as jnp, jquant as jq
      >>> x, weights = jnp.array([[1.0, 0.5], [-0.25, 0.75]]), {"w": jnp.array([[0.5, 1.0], [-1.0, 0.25]])}
      >>> graph, params = jq.trace(lambda p, x: x @ p["w"], weights, x)
      >>> model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target="nash-e")
      >>> model = jq.calibrate(model, [x])
      >>> program = jq.lower(model)
      >>> import pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jq.to_stablehlo(pathlib.Path(folder) / "net.stablehlo", program)
      ...     restored = jq.from_stablehlo(pathlib.Path(folder) / "net.stablehlo")
      >>> bool((restored(x) == jq.run(program, x)).all())
      True
    """
    function, graph, dtypes = _function(program, raw)
    symbol = jax.export.symbolic_shape("batch")[0] if batch is None else batch
    arguments = [
        jax.ShapeDtypeStruct(tuple(symbol if n is None else n for n in i.shape), dtypes.get(i.name, i.dtype))
        for i in graph.inputs
    ]
    with tracing_for(platforms), _without_source_lines():
        exported = jax.export.export(jax.jit(function), platforms=list(platforms))(*arguments)
    data = bytes(exported.serialize())
    with replacing(path) as partial:
        partial.write_bytes(data)


_alone = threading.Lock()


@contextmanager
def _without_source_lines() -> Iterator[None]:
    """Inside, jax writes no lines of Python files into a module: with them the bytes depend on who calls, and where."""
    with _alone:
        config: Any = jax.config  # its attributes are made when jax is imported
        before = config.jax_traceback_in_locations_limit
        config.update("jax_traceback_in_locations_limit", 0)
        try:
            yield
        finally:
            config.update("jax_traceback_in_locations_limit", before)


def _function(program: Program | Model, raw: bool) -> tuple[Callable[..., Any], Graph, dict[str, str]]:
    """The function of the graph's inputs, the graph, and the dtypes of inputs that are not as it says."""
    if isinstance(program, Program):
        real = {n: d for n, d in program.inputs.items() if n in program.scales or d == "float16"}
        dtypes = {n: storage_dtype(d) for n, d in real.items()} if raw else {}

        def run(*inputs: jax.Array) -> Any:
            values = bind_inputs(program.graph, inputs, dtypes)
            values = run_integers(program, values if raw else quantize_inputs(program, values))
            return _outputs(program.graph, values if raw else dequantize_values(program, values))

        return run, program.graph, dtypes
    if not isinstance(program, Model):
        raise FormatError(f"to_stablehlo takes a Program or a Model, not {type(program).__name__}")
    if raw:
        raise FormatError("raw is for programs; fake-quant has real numbers only")
    graph = program.plan.graph
    check_model(program)

    def apply(*inputs: jax.Array) -> Any:
        found = mode_values(program, "fake_quant", bind_inputs(graph, inputs), outputs_alone=True)
        return _outputs(graph, found)

    return apply, graph, {}


def _outputs(graph: Graph, values: dict[str, jax.Array]) -> Any:
    found = tuple(values[name] for name in graph.outputs)
    return found[0] if len(found) == 1 else found


def from_stablehlo(path: str | os.PathLike[str]) -> Callable[..., Any]:
    """The function that `to_stablehlo` wrote, jitted: arrays in, the output or a tuple of outputs.

    The file is compiled code in an intermediate language: read only files that you trust.

    Raises:
      FormatError: a file that jax.export did not write. FileNotFoundError: no file. ImportError: no flatbuffers.

    Example:
      >>> import jquant as jq
      >>> jq.from_stablehlo("no.stablehlo")  # `jq.to_stablehlo` has an example of both
      Traceback (most recent call last):
      FileNotFoundError: no file at no.stablehlo
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        exported = jax.export.deserialize(bytearray(path.read_bytes()))
    except ImportError:
        raise
    except Exception as error:  # flatbuffers raises whatever it meets
        raise FormatError(f"{path}: not a StableHLO module of jax.export: {error}") from error
    return jax.jit(exported.call)
