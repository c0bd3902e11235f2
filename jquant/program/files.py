"""Programs as files: safetensors for the arrays, in its header versioned JSON for everything static, and a digest."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import jquant.ops  # noqa: F401  (the operators that a file names)
from jquant.graph.sealed import VERSION, read_sealed_kind, refusing, sealed_arrays, short
from jquant.graph.serialize import decode, encode, read_graph
from jquant.host.whole_files import replacing
from jquant.numerics.namespace import to_device
from jquant.targets import find_target
from jquant.types import (
    MIN_SCALE,
    Accumulator,
    FormatError,
    FrozenMap,
    Graph,
    LoweringError,
    NodeFormat,
    Program,
    Target,
)


def save(path: str | os.PathLike[str], program: Program, *, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a program. An interrupted save leaves an existing file as it was.

    Args:
      path: the file.
      program: what `lower` returned.
      metadata: further entries of the file's header, such as how pictures become inputs. `load` does not read them;
        "program" and "digest" are taken. The digest covers them.

    Raises:
      FormatError: not a Program, metadata that are not text, or a key that is taken.
      LoweringError: a stack of programs.

    Example:
      >>> import jax.numpy as jnp, jquant as jq
      >>> x, weights = jnp.array([[1.0, 0.5], [-0.25, 0.75]]), {"w": jnp.array([[0.5, 1.0], [-1.0, 0.25]])}
      >>> graph, params = jq.trace(lambda p, x: x @ p["w"], weights, x)
      >>> model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target="nash-e")
      >>> model = jq.calibrate(model, [x])
      >>> program = jq.lower(model)
      >>> import pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jq.save(pathlib.Path(folder) / "net.jq", program)
      ...     same = jq.load(pathlib.Path(folder) / "net.jq", target="nash-e")
      >>> str(same) == str(program)
      True
    """
    if not isinstance(program, Program):
        raise FormatError(
            f"save writes a Program, not {type(program).__name__}; call jq.lower first. What jq.quantize returned goes "
            "through jq.functions.save"
        )
    if "program" in (metadata or {}):
        raise FormatError("the metadata key 'program' is that of the program itself")
    program.check_single()
    arrays = {f"constant:{n}:{role}": v for n, roles in program.constants.items() for role, v in roles.items()}
    arrays |= {f"scale:{name}": v for name, v in program.scales.items()}
    arrays |= {f"worst_case:{name}": a.worst_case for name, a in program.accumulators.items()}
    arrays |= {f"saturating:{n}": a.saturating for n, a in program.accumulators.items() if a.saturating is not None}
    header = {
        "jquant": VERSION,
        "graph": encode(program.graph),
        "formats": encode(program.formats),
        "inputs": encode(program.inputs),
        "target": encode(program.target),
        "march": program.lowered_for,
    }
    content = sealed_arrays(arrays, {"program": json.dumps(header), **(metadata or {})})
    with replacing(path) as partial:
        partial.write_bytes(content)


def load(path: str | os.PathLike[str], *, target: Target | str | None = None) -> Program:
    """Reads a program that `save` wrote.

    Args:
      path: the file.
      target: the march that the program has to be lowered for; None: any.

    Raises:
      FormatError: a file that is truncated, damaged, of another version or no program.
      LoweringError: a program that was lowered for another march.
      FileNotFoundError: no file.

    Example:
      >>> import jquant as jq
      >>> jq.load("no.jq")  # `jq.save` has an example of both
      Traceback (most recent call last):
      FileNotFoundError: no program at no.jq
    """
    path = Path(path)
    header, arrays = read_sealed_kind(path, "program")
    with refusing(path):
        program = _assemble(header, arrays)
    if target is not None and str(wanted := find_target(target)) != program.lowered_for:
        raise LoweringError(
            f"{path}: the program was lowered for {program.lowered_for}, not for {wanted}; lower the model for it"
        )
    return program


def _assemble(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> Program:
    missing = {"graph", "formats", "inputs", "target", "march"} - header.keys()
    if missing:
        raise FormatError(f"the header lacks {', '.join(sorted(missing))}")
    if unknown := header.keys() - {"jquant", "graph", "formats", "inputs", "target", "march"}:
        raise FormatError(f"the header has an unknown {short(min(unknown))}")
    graph = read_graph(header["graph"])
    formats = decode(FrozenMap[NodeFormat], header["formats"], "formats")
    inputs = decode(FrozenMap[str], header["inputs"], "inputs")
    target = decode(Target, header["target"], "target")
    if header["march"] != str(target):
        raise FormatError(
            f"the program was lowered for {short(header['march'])}, and the target in the file is {target}"
        )
    constants, scales, accumulators = _arrays_of(graph, formats, arrays)
    _check_complete(graph, formats, inputs, scales)
    program = Program(constants, scales, accumulators, graph, formats, inputs, target, str(target))
    _check_evaluates(program)
    return program


def _arrays_of(
    graph: Graph, formats: FrozenMap[NodeFormat], arrays: dict[str, np.ndarray]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any], dict[str, Accumulator]]:
    """Constants, scales and accumulators of a program, by their names in its file."""
    constants: dict[str, dict[str, Any]] = {node.name: {} for node in graph.nodes}
    scales: dict[str, Any] = {}
    worst_cases: dict[str, Any] = {}
    saturating: dict[str, Any] = {}
    for key, array in arrays.items():
        kind, _, rest = key.partition(":")
        name, _, role = rest.rpartition(":")
        if kind == "scale" and rest in graph.values:
            scales[rest] = _checked_scale(key, array, _least_scale(rest, graph, formats))
        elif kind == "constant" and name in constants and _is_constant(array):
            constants[name][role] = array
        elif kind == "worst_case" and rest in constants and _is_bound(array):
            worst_cases[rest] = array
        elif kind == "saturating" and rest in constants and array.dtype == np.bool_ and array.ndim == 1:
            saturating[rest] = array
        else:
            raise FormatError(f"unexpected array {short(key)} of dtype {array.dtype}, shape {list(array.shape)}")
    if extra := saturating.keys() - worst_cases.keys():
        raise FormatError(f"node {short(min(extra))} has saturating channels without a worst case")
    accumulators = {n: Accumulator(bound, saturating.get(n)) for n, bound in worst_cases.items()}
    return to_device((constants, scales, accumulators))


def _least_scale(name: str, graph: Graph, formats: FrozenMap[NodeFormat]) -> float:
    """The smallest scale that a value can have. One that follows from others, as an accumulator's, is a product."""
    node = graph.by_name.get(name)
    own = node is None or (node.op.scale_rule == "own" and name in formats and formats[name].output != "int32")
    return MIN_SCALE if own else float(np.finfo(np.float32).smallest_subnormal)


def _checked_scale(key: str, array: np.ndarray, least: float) -> np.ndarray:
    """Raises FormatError for a scale that is no float32, not finite, or too small."""
    if array.dtype != np.float32:
        raise FormatError(f"array {short(key)} is {array.dtype}; a scale is float32")
    wrong = array[~(np.isfinite(array) & (array >= least))]
    if wrong.size:
        raise FormatError(f"array {short(key)} has the scale {wrong.flat[0]}; scales are finite, and at least {least}")
    return array


def _is_bound(array: np.ndarray) -> bool:
    """One number: several are those of stacked programs, and no file holds those."""
    return array.dtype == np.float32 and array.ndim == 0 and bool(array >= 0)


def _is_constant(array: np.ndarray) -> bool:
    """Integers, masks, and the finite float parameters of float islands."""
    if array.dtype == np.float32:
        return bool(np.isfinite(array).all())
    return array.dtype in (np.int8, np.int16, np.int32, np.uint8, np.bool_)


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

    from jquant.program.integers import run_integers
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
        if node_format.output == "float32" and not _has_scale_of_operand(program, name):
            raise FormatError(f"node {short(name)} makes real numbers by another scale than that of its operand")
        stored = "uint8" if node_format.output == "uint8" else storage_dtype(node_format.output)  # pixels are exact
        if values[name].dtype != stored:
            said = short(node_format.output)
            raise FormatError(f"node {short(name)} makes {values[name].dtype}, its format says {said}")


def _has_scale_of_operand(program: Program, name: str) -> bool:
    """Whether the scale that a `Dequantize` multiplies by is that of the value it reads."""
    scale = program.scales.get(program.graph.by_name[name].inputs[0])
    return scale is not None and np.array_equal(program.constants[name].get("scale", 0), scale)
