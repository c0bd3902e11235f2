"""Programs as files: safetensors for the arrays, versioned JSON in its header for everything static. No pickle."""

import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jquant.ir.graph import validate
from jquant.ir.serialize import VERSION, decode, encode, read_versioned
from jquant.types import FormatError, FrozenMap, Graph, NodeFormat, Program, Target


def save(path: str | os.PathLike[str], program: Program) -> None:
    """Writes a program. An interrupted save leaves an existing file as it was.

    Raises:
      FormatError: not a Program.
    """
    from safetensors.numpy import save_file

    if not isinstance(program, Program):
        raise FormatError(f"save writes a Program, not {type(program).__name__}; call jq.lower first")
    arrays = {f"constant:{n}:{role}": v for n, roles in program.constants.items() for role, v in roles.items()}
    arrays |= {f"scale:{name}": v for name, v in program.scales.items()}
    header = {
        "jquant": VERSION,
        "graph": encode(program.graph),
        "formats": encode(program.formats),
        "inputs": encode(program.inputs),
        "target": encode(program.target),
    }
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        # ascontiguousarray makes a scalar a vector; reshape brings its rank back
        contiguous = {k: np.ascontiguousarray(v).reshape(np.shape(v)) for k, v in arrays.items()}
        save_file(contiguous, partial, {"program": json.dumps(header)})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> Program:
    """Reads a program that `save` wrote.

    Raises:
      FormatError: a file that is truncated, damaged, of another version or no program.
      FileNotFoundError: no file.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no program at {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise FormatError(f"{path}: not a readable program file: {error}") from error
    try:
        return _assemble(read_versioned(metadata.get("program", "")), arrays)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error


def _assemble(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> Program:
    missing = {"graph", "formats", "inputs", "target"} - header.keys()
    if missing:
        raise FormatError(f"the header lacks {', '.join(sorted(missing))}")
    try:
        graph = validate(decode(Graph, header["graph"], "graph"))
    except Exception as error:
        raise FormatError(f"the graph is not well formed: {error}") from error
    formats = decode(FrozenMap[NodeFormat], header["formats"], "formats")
    inputs = decode(FrozenMap[str], header["inputs"], "inputs")
    target = decode(Target, header["target"], "target")
    constants: dict[str, dict[str, Any]] = {node.name: {} for node in graph.nodes}
    scales: dict[str, Any] = {}
    for key, array in arrays.items():
        kind, _, rest = key.partition(":")
        name, _, role = rest.rpartition(":")
        if kind == "scale" and array.dtype == np.float32 and np.isfinite(array).all() and (array > 0).all():
            scales[rest] = jnp.asarray(array)
        elif kind == "constant" and name in constants and _is_constant(array):
            constants[name][role] = jnp.asarray(array)
        else:
            raise FormatError(f"unexpected array {key!r} of dtype {array.dtype}")
    _check_complete(graph, formats, inputs, scales)
    program = Program(constants, scales, graph, formats, inputs, target)
    _check_evaluates(program)
    return program


def _is_constant(array: np.ndarray) -> bool:
    """Integers, masks, and the finite float parameters of float islands."""
    if array.dtype == np.float32:
        return bool(np.isfinite(array).all())
    return array.dtype in (np.int8, np.int16, np.int32, np.bool_)


def _check_complete(graph: Graph, formats: Any, inputs: Any, scales: dict[str, Any]) -> None:
    if set(formats) != {n.name for n in graph.nodes} or set(inputs) != {i.name for i in graph.inputs}:
        raise FormatError("formats and inputs do not belong to the graph")
    dtypes = dict(inputs) | {name: node_format.output for name, node_format in formats.items()}
    exact = {i.name for i in graph.inputs if i.dtype != "float32"}
    # A scale for every integer that stands for a real number. An int32 node is an accumulator, or an index.
    needed = {n for n, dtype in dtypes.items() if dtype in ("int8", "int16") and n not in exact}
    possible = needed | {n for n, dtype in dtypes.items() if dtype == "int32" and n not in exact}
    if not needed <= set(scales) <= possible:
        raise FormatError("scales do not belong to the graph")


def _check_evaluates(program: Program) -> None:
    """Shapes and dtypes of all constants fit: an abstract evaluation goes through, and keeps to the formats."""
    import jax

    from jquant.integer import run_integers
    from jquant.types import storage_dtype

    inputs = {
        i.name: jax.ShapeDtypeStruct(
            tuple(2 if n is None else n for n in i.shape),
            storage_dtype(program.inputs[i.name]) if i.dtype == "float32" else i.dtype,
        )
        for i in program.graph.inputs
    }
    try:
        values = jax.eval_shape(run_integers, program, inputs)
    except Exception as error:
        raise FormatError(f"the constants do not fit the graph: {error}") from error
    for name, node_format in program.formats.items():
        if values[name].dtype != storage_dtype(node_format.output):
            raise FormatError(f"node {name!r} makes {values[name].dtype}, its format says {node_format.output}")
