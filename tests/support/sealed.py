"""Files of jquant that were changed on purpose: the digest is made again, by its definition and not by jquant."""

import json
import struct
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

ZEROS = b"0" * 64


def resealed(content: bytes) -> bytes:
    """The content with the digest that belongs to it: BLAKE2b of 256 bits, with zeros where the digest is."""
    start = content.index(b'"', content.index(b'"digest":') + len('"digest":')) + 1
    digest = blake2b(content[:start] + ZEROS + content[start + 64 :], digest_size=32).hexdigest()
    return content[:start] + digest.encode() + content[start + 64 :]


def resealed_text(text: str) -> str:
    """Text of a graph or a plan that was changed on purpose."""
    return resealed(text.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogatepass")


def sealed_text(data: Mapping[str, Any]) -> str:
    """JSON text with a digest. `data` are all entries but the digest."""
    return resealed_text(json.dumps({"digest": ZEROS.decode(), **data}, indent=1))


def read_parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    (size,) = struct.unpack_from("<Q", content)
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def from_parts(header: Mapping[str, Any], data: bytes) -> bytes:
    """A safetensors file with a digest."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return resealed(struct.pack("<Q", len(text)) + text + data)


KINDS = {"F32": np.float32, "I8": np.int8, "I16": np.int16, "I32": np.int32, "U8": np.uint8, "BOOL": np.bool_}
NAMES = {np.dtype(kind): name for name, kind in KINDS.items()}


def arrays_of(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, as copies."""
    header, data = read_parts(content)
    return {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], KINDS[entry["dtype"]]).reshape(entry["shape"]).copy()
        for name, entry in header.items()
        if name != "__metadata__"
    }


def with_arrays(content: bytes, arrays: Mapping[str, np.ndarray]) -> bytes:
    """The file with other arrays and its own metadata."""
    header = {"__metadata__": read_parts(content)[0]["__metadata__"]}
    parts, end = [], 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        header[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]}
        parts.append(array.tobytes())
    return from_parts(header, b"".join(parts))


def change(path: Path, kind: str, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edits the static JSON of a program or a state in place. `kind` is "program" or "state"."""
    header, data = read_parts(path.read_bytes())
    static = json.loads(header["__metadata__"][kind])
    edit(static)
    header["__metadata__"][kind] = json.dumps(static)
    path.write_bytes(from_parts(header, data))


def change_arrays(path: Path, edit: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Edits the arrays of a program or a state in place."""
    content = path.read_bytes()
    arrays = arrays_of(content)
    edit(arrays)
    path.write_bytes(with_arrays(content, arrays))
