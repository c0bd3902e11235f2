"""Reading ONNX files from unknown sources: every claimed size is checked before anything is allocated."""

from __future__ import annotations

import os
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from jquant.types import ConversionError

OPSETS = range(10, 29)
MAX_ELEMENTS = 2**31  # of one value
TYPES = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.BOOL: "bool",
    onnx.TensorProto.UINT8: "uint8",
    onnx.TensorProto.INT4: "int4",
    onnx.TensorProto.INT8: "int8",
    onnx.TensorProto.INT16: "int16",
    onnx.TensorProto.INT32: "int32",
    onnx.TensorProto.INT64: "int64",
}
INPUT_TYPES = {"float32": "float32", "bool": "bool", "uint8": "uint8", "int32": "int32", "int64": "int32"}


def load_model(source: Any) -> tuple[onnx.ModelProto, Path | None]:
    """The model of a path, of bytes or of itself, and the folder of its external data.

    Raises:
      ConversionError: no ONNX model, or an opset outside 10 to 28. FileNotFoundError: no file.
    """
    folder = None
    if isinstance(source, onnx.ModelProto):
        model = source
    elif isinstance(source, bytes):
        model = _parse(source, "these bytes are")
    elif isinstance(source, str | os.PathLike):
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"no ONNX file at {path}")
        folder = path.resolve().parent
        model = _parse(path.read_bytes(), f"{path} is")
    else:
        raise ConversionError(f"from_onnx reads a path, bytes or a ModelProto, not {type(source).__name__}")
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if len(versions) != 1 or versions[0] not in OPSETS:
        found = f"opset {versions[0]}" if len(versions) == 1 else f"{len(versions)} opsets of the ONNX domain"
        raise ConversionError(
            f"the model has {found}; opset {OPSETS[0]} to {OPSETS[-1]} can be read: onnx.version_converter changes it"
        )
    return model, folder


def _parse(content: bytes, what: str) -> onnx.ModelProto:
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except (DecodeError, ValueError) as error:
        raise ConversionError(f"{what} no ONNX model, or damaged: {error}") from error
    return model


def array_of(tensor: onnx.TensorProto, folder: Path | None) -> np.ndarray:
    """The array of a tensor whose dims and data agree."""
    name = tensor.name or "a constant"
    dtype = TYPES.get(tensor.data_type)
    if dtype is None:
        known = tensor.data_type in onnx.TensorProto.DataType.values()
        shown = onnx.TensorProto.DataType.Name(tensor.data_type) if known else str(tensor.data_type)
        raise ConversionError(f"tensor {name!r} is {shown}; {', '.join(TYPES.values())} can be read: convert the model")
    dims = tuple(tensor.dims)
    if any(n < 0 for n in dims):
        raise ConversionError(f"tensor {name!r} has the shape {list(dims)}")
    count = prod(dims)
    size = (count + 1) // 2 if dtype == "int4" else count * np.dtype(dtype).itemsize
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return _decoded(_external(tensor, folder, size), dtype, dims)
    if tensor.HasField("raw_data"):
        if len(tensor.raw_data) != size:
            raise ConversionError(
                f"tensor {name!r} claims {list(dims)} of {dtype}, {size} bytes, and has {len(tensor.raw_data)}"
            )
        return _decoded(tensor.raw_data, dtype, dims)
    field = {"float32": tensor.float_data, "int64": tensor.int64_data}.get(dtype, tensor.int32_data)
    if len(field) != ((count + 1) // 2 if dtype == "int4" else count):
        raise ConversionError(f"tensor {name!r} claims the shape {list(dims)} of {dtype} and has {len(field)} numbers")
    values = np.asarray(field, np.float32 if dtype == "float32" else np.int64)
    if dtype == "int4":
        return _decoded(values.astype(np.uint8).tobytes(), dtype, dims)
    return values.astype(dtype).reshape(dims)


def _decoded(content: bytes, dtype: str, dims: tuple[int, ...]) -> np.ndarray:
    if dtype != "int4":
        return np.frombuffer(content, np.dtype(dtype).newbyteorder("<")).astype(dtype).reshape(dims)
    packed = np.frombuffer(content, np.uint8)
    pairs = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)[: prod(dims)].astype(np.int8)
    return np.where(pairs > 7, pairs - 16, pairs).astype(np.int8).reshape(dims)


def _external(tensor: onnx.TensorProto, folder: Path | None, size: int) -> bytes:
    """The bytes of a tensor in a file beside the model. A path that leads elsewhere is refused."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if folder is None:
        raise ConversionError(
            f"tensor {tensor.name!r} lies in the file {location!r}; give the path of the model, so that it can be found"
        )
    path = (folder / location).resolve() if location and "\0" not in location else folder
    if path.parent != folder or not path.is_file():
        raise ConversionError(
            f"tensor {tensor.name!r} lies in {location!r}, which is no file in the folder of the model; save it in one "
            "file: onnx.save_model(model, path, save_as_external_data=False)"
        )
    offset, length = (entries.get(key, default) for key, default in (("offset", "0"), ("length", str(size))))
    if not (offset.isdecimal() and length.isdecimal()) or int(length) != size:
        raise ConversionError(
            f"tensor {tensor.name!r} needs {size} bytes, and its file entry says {length} at {offset}"
        )
    if int(offset) + size > path.stat().st_size:
        raise ConversionError(f"tensor {tensor.name!r} lies beyond the end of {location!r}")
    with path.open("rb") as file:
        file.seek(int(offset))
        return file.read(size)
