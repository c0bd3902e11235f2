"""Quantized functions as files: the plan, the scales and the variables, but no code, which is passed again."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from hashlib import blake2b
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.config.files import Own, qconfig_from_dict, qconfig_to_dict
from jquant.config.qconfig import QConfig
from jquant.drafts.values import Known
from jquant.functions.quantized import (
    Prepared,
    QuantizedFunction,
    Request,
    Variables,
    collections_of,
    quantized_function,
    read_function,
)
from jquant.functions.trace.function import Traced
from jquant.functions.trace.names import leaf_names
from jquant.graph.sealed import VERSION, cut, read_sealed_kind, refusing, sealed_arrays, short
from jquant.graph.serialize import encode, read_graph
from jquant.host.whole_files import replacing
from jquant.plan.batch_norm import kept_nodes, with_statistics
from jquant.plan.files import find_mismatch, plan_from_json, plan_to_json
from jquant.plan.scales import check_model
from jquant.targets import find_target
from jquant.types import FormatError, Graph, InputError, Plan, QuantSpec, Target

_HEADER = {"jquant", "graph", "plan", "qconfig", "batch_norm", "momentum", "dynamic_batch", "leaves", "fingerprints"}
_DTYPES = ("float32", "int8", "int16", "int32", "uint8", "bool")
_NEAR = 1e-4  # of the norm of an array: what another device may change in a parameter that is computed from leaves


def save(
    path: str | os.PathLike[str],
    function: QuantizedFunction,
    variables: Variables,
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a quantized function with its variables. An interrupted save leaves an existing file as it was.

    The file has the plan, the qconfig, the graph of the function, and params, qparams and batch_stats. It does not have
    the code of the function: `load` is given that again. The state of an optimizer is not in it either; a run that
    saves that in another way saves the variables there as well, and takes the function alone from here.

    Args:
      path: the file.
      function: what `quantize` returned; also with a plan of `jq.training.set_batch_statistics`.
      variables: those that `quantize` returned, or trained ones.
      metadata: further entries of the file's header, text by text; the digest covers them. "function" and "digest" are
        taken.

    Raises:
      InputError: no quantized function, variables of another one, or a plan that `prepare` does not make of it.
      FormatError: an operator that no file can hold, a leaf of a dtype that it cannot, or metadata that are not text.
      QConfigError: a quantizer or observer of one's own, without a `source` by which a file can name it.
      CalibrationError: scales missing or broken. OSError: what the system says.

    Example:
      >>> import pathlib, tempfile, jax.numpy as jnp, jquant as jq
      >>> def model(params, x):
      ...     return jnp.tanh(x @ params["dense"]["kernel"])
      >>> params = {"dense": {"kernel": jnp.array([[0.5, -1.0], [0.25, 2.0]])}}
      >>> x = jnp.array([[1.0, 0.5], [-0.5, 1.0]])
      >>> qfn, variables = jq.quantize(model, params, jq.QConfig(jq.templates.int8_default()), [x])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jq.functions.save(pathlib.Path(folder) / "net.jqf", qfn, variables)
      ...     again, same = jq.functions.load(pathlib.Path(folder) / "net.jqf", model, params, x)
      >>> bool((again(same, x) == qfn(variables, x)).all())
      True
    """
    if not isinstance(function, QuantizedFunction):
        raise InputError(f"save writes what jq.quantize returned, not {type(function).__name__}")
    if "function" in (metadata or {}):
        raise FormatError("the metadata key 'function' is that of the function itself")
    if unknown := sorted(map(str, set(variables) - {"params", "qparams", "batch_stats"})):
        raise InputError(f"variables have {unknown[0]!r}, which is none of the function's; save it apart")
    check_model(function.model(variables))
    traced, request = function.traced, function.params_of.request
    qconfig = qconfig_to_dict(request.qconfig)
    read_again = qconfig_from_dict(qconfig, _own(request.qconfig))
    _check_plan(function.plan, _replanned(function.params_of, read_again, variables))
    own = collections_of(variables["params"], variables.get("batch_stats"))
    header = {
        "jquant": VERSION,
        "graph": encode(traced.graph),
        "plan": plan_to_json(function.plan),
        "qconfig": qconfig,
        "batch_norm": request.batch_norm if isinstance(request.batch_norm, str) else dict(request.batch_norm),
        "momentum": request.momentum,
        "dynamic_batch": request.dynamic_batch,
        "leaves": list(traced.leaves),
        "fingerprints": _fingerprints(traced, own),
    }
    arrays = {f"leaf:{name}": v for name, v in zip(traced.leaves, jax.tree.leaves(own), strict=True)}
    arrays |= {f"scale:{name}": v for name, v in variables["qparams"].items()}
    for name, array in arrays.items():
        if str(array.dtype) not in _DTYPES:
            raise FormatError(f"{name} is {array.dtype}; a file holds {', '.join(_DTYPES)}")
    content = sealed_arrays(arrays, {"function": json.dumps(header), **(metadata or {})})
    with replacing(path) as partial:
        partial.write_bytes(content)


def load(
    path: str | os.PathLike[str],
    fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    batch_stats: Any = None,
    target: Target | str | None = None,
    own: Own = (),
) -> tuple[QuantizedFunction, dict[str, Any]]:
    """Reads what `save` wrote, for the function that was quantized: nothing is calibrated again.

    The function is traced, and compared with the one of the file: operators, names, constants of the code, and which
    elements of which leaves become a parameter.

    Args:
      path: the file.
      fn, *inputs: as for `jq.trace`: the function, and an example of each input.
      params, batch_stats: pytrees of the form that `quantize` was given; their numbers are not read, so that arrays of
        `jax.eval_shape` do.
      target: the march that the function has to be quantized for; None: any.
      own: quantizers and observers of your own that the file may name, by their `source`. No code is imported.

    Returns:
      The quantized function and its variables, as `quantize` returned them, with the numbers that were saved.

    Raises:
      FormatError: a file that is truncated, damaged, of another version, of another march or no function; or that
        belongs to another function, with the first difference.
      ConversionError: `fn` cannot be traced. FileNotFoundError: no file.

    Example:
      >>> import jquant as jq
      >>> jq.functions.load("no.jqf", lambda params, x: x, {})  # `save` has an example of both
      Traceback (most recent call last):
      FileNotFoundError: no function at no.jqf
    """
    path = Path(path)
    stored, arrays = read_sealed_kind(path, "function")
    with refusing(path):
        header = _checked(stored, arrays)
        plan, saved = plan_from_json(header["plan"], own=own), read_graph(header["graph"])
        request = _request(header, plan, own)
    if target is not None and find_target(target) != plan.target:
        raise FormatError(f"{path}: quantized for {plan.target}, not for {find_target(target)}; quantize it for that")
    likes = collections_of(params, batch_stats)
    leaves = _fitting(path, header["leaves"], arrays, likes)
    variables = jax.tree.unflatten(jax.tree.structure(likes), leaves)
    trained, stats = (variables, None) if batch_stats is None else (variables["params"], variables["batch_stats"])
    prepared = read_function(fn, trained, inputs, request, batch_stats=stats, check=False)
    differs = _difference(saved, prepared.traced.graph)
    differs = differs or _other_constant(header["fingerprints"], _fingerprints(prepared.traced, variables))
    if differs:
        raise FormatError(f"{path} belongs to another function: {cut(differs)}")
    collections = {"params": trained, **({} if stats is None else {"batch_stats": stats})}
    with refusing(path):
        replanned = _replanned(prepared, request.qconfig, collections)
    if mismatch := _mismatch(plan, replanned):
        raise FormatError(f"{path} has another plan than this release makes: {cut(mismatch)}; call jq.quantize again")
    scales = {name.removeprefix("scale:"): jnp.asarray(v) for name, v in arrays.items() if name.startswith("scale:")}
    found = {"params": trained, "qparams": scales, **collections}
    with refusing(path):
        function = quantized_function(prepared, plan)
        check_model(function.model(found))
    return function, found


def _checked(header: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The header, complete and with its arrays; what it holds is checked by its readers."""
    if wrong := sorted(set(header) ^ _HEADER):
        raise FormatError(f"the header {'lacks' if wrong[0] in _HEADER else 'has an unknown'} {short(wrong[0])}")
    leaves, marks = header["leaves"], header["fingerprints"]
    if not isinstance(leaves, list) or not all(isinstance(name, str) for name in leaves):
        raise FormatError("leaves: a list of names is wanted")
    if not isinstance(marks, dict) or not all(_is_fingerprint(mark) for mark in marks.values()):
        raise FormatError("fingerprints: a digest and two numbers for each parameter are wanted")
    kinds = {f"leaf:{name}" for name in leaves}
    if wrong := sorted(kinds - set(arrays)):
        raise FormatError(f"array {short(wrong[0])} is not there")
    if wrong := sorted(name for name in arrays if name not in kinds and not name.startswith("scale:")):
        raise FormatError(f"unexpected array {short(wrong[0])}")
    return header


def _is_fingerprint(mark: Any) -> bool:
    numbers = isinstance(mark, list) and len(mark) == 3 and isinstance(mark[0], str)
    return numbers and all(isinstance(n, float) for n in mark[1:])


def _request(header: Mapping[str, Any], plan: Plan, own: Own) -> Request:
    kinds: Any = header["batch_norm"]
    names = list(kinds.values()) if isinstance(kinds, dict) else [kinds]
    if not all(isinstance(kind, str) for kind in names):
        raise FormatError(f"batch_norm: names are wanted, not {short(kinds)}")
    momentum, dynamic = header["momentum"], header["dynamic_batch"]
    if isinstance(momentum, bool) or not isinstance(momentum, int | float) or not 0 <= momentum < 1:
        raise FormatError(f"momentum: a share is wanted, not {short(momentum)}")
    if type(dynamic) is not bool:
        raise FormatError(f"dynamic_batch: true or false is wanted, not {short(dynamic)}")
    return Request(
        qconfig=qconfig_from_dict(header["qconfig"], own),
        target=plan.target,
        batch_norm=kinds,
        momentum=momentum,
        dynamic_batch=dynamic,
    )


def _own(qconfig: QConfig) -> set[Any]:
    """The quantizers and observers of a qconfig."""
    policies = [policy for policy in qconfig.rules.values() if policy is not None]
    ports = [[p.output, p.weight, *(p.input.values() if isinstance(p.input, Mapping) else ())] for p in policies]
    specs = [spec for found in ports for spec in found if isinstance(spec, QuantSpec)]
    return {value for spec in specs for value in (spec.quantizer, spec.observer) if value is not None}


# ---------------------------------------------------------------------------------------------------------------------
# Whether it is the same function


def _fitting(path: Path, names: list[str], arrays: Mapping[str, np.ndarray], likes: Any) -> list[jax.Array]:
    """The saved leaves, in the order of the pytree that was passed.

    Raises:
      FormatError: other names, shapes or dtypes.
    """
    given = dict(zip(leaf_names(likes), jax.tree.leaves(likes), strict=True))
    if list(given) != names:
        name = next(name for name in (*given, *names) if name not in names or name not in given)
        which = "only in the file" if name in names else "not in the file"
        raise FormatError(f"{path} belongs to another function: leaf {name!r} of the params is {which}")
    for name, leaf in given.items():
        saved = arrays[f"leaf:{name}"]
        if (saved.shape, str(saved.dtype)) != (tuple(leaf.shape), str(leaf.dtype)):
            raise FormatError(
                f"{path} belongs to another function: leaf {name!r} was saved as {saved.dtype}{list(saved.shape)}, and "
                f"is {leaf.dtype}{list(leaf.shape)} in the params that were passed"
            )
    return [jnp.asarray(arrays[f"leaf:{name}"]) for name in names]


def _difference(saved: Graph, graph: Graph) -> str | None:
    """The first node, input or output by which two graphs differ."""
    for old, new in zip_longest(saved.inputs, graph.inputs):
        if old != new:
            return f"input {(old or new).name!r} was saved as {_shown(old)}, the function has {_shown(new)}"
    for before, after in zip_longest(saved.nodes, graph.nodes):
        if before != after:
            name = (before or after).name
            return f"node {name!r} was saved as {_shown(before)}, the function has {_shown(after)}"
    if saved != graph:
        was, now = ((found.outputs, found.takes, found.gives) for found in (saved, graph))
        return f"outputs, and how inputs and outputs nest, were saved as {was}; the function has {now}"
    return None


def _shown(part: Any) -> str:
    return "none" if part is None else cut(str(part), 200)


def _fingerprints(traced: Traced, own: Any) -> dict[str, list[Any]]:
    """What tells the parameters of two functions of one graph apart, beside the leaves themselves.

    A digest of the constants that a parameter is computed from, by which primitives of which leaves; then a random
    projection of the array and its norm, which find slices and orders of axes, and are the same within a tolerance on
    another device.
    """
    found: dict[str, list[Any]] = {}
    for key, array in traced.graph_params(own).items():
        numbers = np.asarray(array, np.float64).reshape(-1)
        weights = np.random.default_rng(0).standard_normal(numbers.size)
        digest = blake2b(b"".join(_parts(traced.params[key])), digest_size=32).hexdigest()
        found[key] = [digest, float(weights @ numbers), float(np.linalg.norm(numbers))]
    return found


def _parts(known: Known) -> Iterator[bytes]:
    """What a parameter is computed from, in order."""
    pending = [known]
    while pending:
        value = pending.pop()
        yield f"{value.primitive}{value.compact}{value.index}{value.axes}".encode()
        if value.path:
            yield value.path.encode()
        elif not value.is_trained:
            is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
            array = np.asarray(jax.random.key_data(value.array) if is_key else value.array)
            yield f"{array.dtype}{array.shape}".encode() + array.tobytes()
        else:
            pending += value.operands


def _other_constant(saved: Mapping[str, list[Any]], found: Mapping[str, list[Any]]) -> str | None:
    """The first parameter that another constant, or another part of its leaf, makes."""
    for key, (digest, projection, norm) in found.items():
        if key not in saved:
            return f"the file knows no parameter {key!r}"
        other, was, size = saved[key]
        if digest != other:
            return (
                f"parameter {key!r} is made of another constant of the code, such as running statistics that the "
                "function closes over, or in another way"
            )
        if not abs(projection - was) <= _NEAR * max(norm, size):
            return f"parameter {key!r} is made of other elements of its leaf"
    return None


def _replanned(prepared: Prepared, qconfig: Any, variables: Mapping[str, Any]) -> Plan:
    """The plan that `prepare` makes now, without computing a parameter."""
    again = replace(prepared, request=replace(prepared.request, qconfig=qconfig))
    return jax.eval_shape(again.model, variables["params"], variables.get("batch_stats")).plan


def _mismatch(saved: Plan, plan: Plan) -> str | None:
    """As `find_mismatch`, whatever statistics the batch norms normalize with, which may change in training."""
    saved, plan = (with_statistics(p, "running") if kept_nodes(p) else p for p in (saved, plan))
    return find_mismatch(saved, plan)


def _check_plan(own: Plan, plan: Plan) -> None:
    if mismatch := _mismatch(own, plan):
        raise InputError(
            "the function has another plan than prepare makes of its qconfig, which no file can tell: "
            f"{cut(mismatch)}; quantize it with a qconfig that says so"
        )
