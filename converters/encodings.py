"""AIMET's encodings JSON, and onnxruntime's calibration table, beside a float model: in and out.

Versions 0.6.1 and 1.0.0 have, for each tensor by its ONNX name, bits, scale and offset: an integer q in [0, 2^bits - 1]
stands for (q + offset) * scale. Version 2.0.0 has what QuantizeLinear has.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from jquant.host.whole_files import replacing
from jquant.numerics.namespace import to_host
from jquant.plan.scales import scale_of, value_scales
from jquant.text import cut, short
from jquant.types import Array, ConversionError, Model, QuantSpec, Target

from .file_names import naming
from .foreign import ZeroPoint
from .foreign.pairs import Encoding, with_pairs
from .onnx_in import load_model
from .onnx_plan import model_from_onnx

Version = Literal["0.6.1", "1.0.0", "2.0.0"]
VERSIONS = ("0.6.1", "1.0.0", "2.0.0")


def model_from_encodings(
    source: Any,
    encodings: Mapping[str, Any] | str | os.PathLike[str],
    *,
    target: Target,
    shapes: Mapping[str, Sequence[int | None]] | None = None,
    zero_point: ZeroPoint = "refuse",
    batches: Iterable[Any] | None = None,
) -> Model:
    """A float model with the scales of an encodings file, as a calibrated model.

    Args:
      source: the ONNX model that AIMET wrote beside the file (a path, bytes or a ModelProto), or (graph, params) of
        `from_torch`, whose values have the names of torch's modules.
      encodings: AIMET's JSON of version 0.6.1, 1.0.0 or 2.0.0, or the calibration.json of onnxruntime (ranges, from
        which symmetric int8 scales are made as onnxruntime does: max / 127): a path, or the content.
      target, shapes, zero_point, batches: as for `model_from_onnx`.

    Raises:
      ConversionError: what is no encodings file, names that the model does not have, or forms that are not read.

    Example:
      model = model_from_encodings("net.onnx", "net.encodings", target=jq.targets.NASH_E)
    """
    with naming(encodings):
        grids = read_encodings(_content(encodings))
    if isinstance(source, tuple):
        from .onnx_export import to_onnx

        source = to_onnx(*source)
    with naming(source):
        loaded, folder = load_model(source)
    if folder is not None and any(t.data_location == onnx.TensorProto.EXTERNAL for t in loaded.graph.initializer):
        onnx.load_external_data_for_model(loaded, str(folder))
    with naming(encodings):
        paired = with_pairs(loaded, grids, "the encodings file")
        return model_from_onnx(paired, target=target, shapes=shapes, zero_point=zero_point, batches=batches)


def _content(encodings: Any) -> Mapping[str, Any]:
    if isinstance(encodings, Mapping):
        return encodings
    path = Path(encodings)
    if not path.is_file():
        raise FileNotFoundError(f"no encodings file at {path}")
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConversionError(f"{path}: no object of encodings")
    return found


def read_encodings(content: Mapping[str, Any]) -> dict[str, Encoding]:
    """{tensor: its grid}, from any of the forms; int32 biases and floats are left out.

    Raises:
      ConversionError: another form.
    """
    try:
        found = _read_form(content)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConversionError(f"the encodings are damaged: {cut(f'{type(error).__name__}: {error}')}") from error
    for name, grid in found.items():
        if not isinstance(name, str) or not (grid.axis is None or type(grid.axis) is int):
            raise ConversionError(
                f"the encodings are damaged: the tensor {short(name)} has the axis {short(grid.axis)}"
            )
    return found


def _read_form(content: Mapping[str, Any]) -> dict[str, Encoding]:
    """The same; raises whatever content of another form brings up."""
    if "encodings" in content:
        return {e["name"]: _of_onnx(e) for e in content["encodings"] if _is_integer(e.get("output_dtype", "uint8"))}
    if "activation_encodings" in content:
        both = (content["activation_encodings"], content.get("param_encodings", {}))
        return {name: grid for part in both for name, grid in _of_bits(part)}
    if content and all(isinstance(v, dict) and v.get("CLS") == "TensorData" for v in content.values()):
        return {name: _of_range(name, entry) for name, entry in content.items()}
    raise ConversionError(
        f"no encodings of version {', '.join(VERSIONS)} and no calibration table; its entries are "
        f"{', '.join(map(short, list(content)[:5]))}"
    )


_BITS = {"int4": 4, "uint4": 4, "int8": 8, "uint8": 8, "int16": 16, "uint16": 16}


def _is_integer(dtype: str) -> bool:
    if dtype not in (*_BITS, "int32", "float16", "bfloat16", "float32"):
        raise ValueError(f"a dtype {dtype!r}")
    return dtype in _BITS


def _of_onnx(entry: Mapping[str, Any]) -> Encoding:
    """Version 2.0.0."""
    dtype = entry.get("output_dtype", "uint8")
    if entry.get("block_size"):
        raise ConversionError(f"{short(entry['name'])} has scales by block; quantize it by channel")
    scale = _positive(entry["name"], entry["y_scale"])
    point = np.broadcast_to(np.asarray(entry.get("y_zero_point", 0) or 0, np.int64), scale.shape)
    lowest = 0 if dtype.startswith("u") else -(2 ** (_BITS[dtype] - 1))
    return Encoding(scale, point - lowest, _BITS[dtype], entry.get("axis"))


def _of_bits(part: Any) -> list[tuple[str, Encoding]]:
    """Versions 0.6.1, a list of encodings for each name, and 1.0.0, a list of names."""
    if isinstance(part, dict):
        rows = [(name, found) for name, found in part.items()]
        return [(name, _of_list(name, found)) for name, found in rows if found[0]["dtype"].lower() == "int" and
                int(found[0]["bitwidth"]) < 32]  # fmt: skip
    found = []
    for entry in part:
        if entry["dtype"].lower() != "int" or int(entry["bw"]) >= 32:
            continue
        if entry["enc_type"] not in ("PER_TENSOR", "PER_CHANNEL"):
            raise ConversionError(
                f"{short(entry['name'])} is {short(entry['enc_type'])}; per tensor and per channel can be read"
            )
        scale = _positive(entry["name"], entry["scale"])
        scale = scale.reshape(()) if entry["enc_type"] == "PER_TENSOR" else scale
        offset = _offset(entry["offset"]).reshape(scale.shape)
        found.append((entry["name"], Encoding(scale, -offset, int(entry["bw"]))))
    return found


def _of_list(name: str, rows: Sequence[Mapping[str, Any]]) -> Encoding:
    scale = _positive(name, [row["scale"] for row in rows])
    offset = _offset([row["offset"] for row in rows])
    if len(rows) == 1:
        scale, offset = scale.reshape(()), offset.reshape(())
    return Encoding(scale, -offset, int(rows[0]["bitwidth"]))


def _of_range(name: str, entry: Mapping[str, Any]) -> Encoding:
    """onnxruntime's range of a tensor: symmetric int8, from -127 to 127."""
    ends = [np.asarray(entry[key]["data"], np.float32).reshape(-1) for key in ("lowest", "highest")]
    if any(end.size != 1 for end in ends):
        raise ConversionError(f"{short(name)} has ranges by channel; one for the tensor is read")
    largest = max(abs(float(end[0])) for end in ends)
    return Encoding(_positive(name, np.float32(largest) / np.float32(127.0)), np.asarray(128), 8)


def _offset(data: Any) -> np.ndarray:
    found = np.asarray(data, np.float64)
    if not (np.abs(found) < 2**31).all():
        raise ValueError("an offset beyond 31 bits")
    return found.astype(np.int64)


def _positive(name: str, scale: Any) -> np.ndarray:
    with np.errstate(over="ignore"):
        found = np.asarray(scale, np.float64).astype(np.float32)
    if not found.size or not (np.isfinite(found) & (found > 0)).all():
        raise ConversionError(f"the scale of {short(name)} is not finite and positive")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The way back


def to_encodings(
    model: Model, *, version: Version = "1.0.0", path: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """The scales of a model as AIMET's encodings, for the float ONNX model that `to_onnx(form="float")` writes.

    Names are those of that file. Values whose operators keep the scale of their operand have no entry, nor have biases:
    theirs follows from input and weight.

    Args:
      model: a calibrated model.
      version: of the format.
      path: where to write the JSON.

    Raises:
      ConversionError: a version that is not known.

    Example:
      to_onnx(model, form="float", path="net.onnx")
      to_encodings(model, version="1.0.0", path="net.encodings")
    """
    if version not in VERSIONS:
        raise ConversionError(f"version {version!r}; it is one of {', '.join(VERSIONS)}")
    plan, qparams = model.plan, to_host(model.qparams)
    scales = value_scales(plan, qparams)
    values = {n: (plan.spec(n), scales[n]) for n in plan.owned if not plan.spec(n).is_float}
    constants = {n.params["value"]: n.name for n in plan.graph.nodes if "value" in n.params and n.name in values}
    weights = {key: (spec, scale_of(key, plan, qparams)) for key, spec in plan.weights.items()}
    for key, name in constants.items():
        weights.setdefault(key, values.pop(name))  # type: ignore[arg-type]
    axes = dict(plan.weight_axis)
    if version == "2.0.0":
        rows = [_row_onnx(n, spec, s, axes.get(n)) for part in (weights, values) for n, (spec, s) in part.items()]
        found: dict[str, Any] = {"version": version, "encodings": rows}
    else:
        make = _rows_061 if version == "0.6.1" else _rows_100
        found = {"version": version, "activation_encodings": make(values), "param_encodings": make(weights)}
    if path is not None:
        with replacing(Path(path)) as partial:
            partial.write_text(json.dumps(found, indent=1))
    return found


Scaled = Mapping[str, tuple[QuantSpec, Array | None]]


def _steps(scale: Array | None) -> np.ndarray:
    return np.asarray(scale, np.float32).astype(np.float64)


def _rows_061(part: Any) -> dict[str, Any]:
    found = {}
    for name, (spec, scale) in part.items():
        low, high = spec.range
        found[name] = [
            {"bitwidth": spec.bits, "dtype": "int", "is_symmetric": "True",
             "max": high * float(s), "min": low * float(s), "offset": float(low), "scale": float(s)}
            for s in _steps(scale).reshape(-1)
        ]  # fmt: skip
    return found


def _rows_100(part: Any) -> list[Any]:
    found = []
    for name, (spec, scale) in part.items():
        steps = _steps(scale)
        offset = [float(spec.range[0])] * steps.size
        kind = "PER_CHANNEL" if steps.ndim else "PER_TENSOR"
        found.append({"bw": spec.bits, "dtype": "INT", "enc_type": kind, "is_sym": True, "name": name,
                      "offset": offset, "scale": steps.reshape(-1).tolist()})  # fmt: skip
    return found


def _row_onnx(name: str, spec: QuantSpec, scale: Array | None, axis: int | None) -> dict[str, Any]:
    steps = _steps(scale)
    row = {"name": name, "output_dtype": spec.dtype, "y_scale": steps.tolist()}
    return row | ({"axis": axis} if steps.ndim and axis is not None else {})


__all__ = ["VERSIONS", "model_from_encodings", "read_encodings", "to_encodings"]
