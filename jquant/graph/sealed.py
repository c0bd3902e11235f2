"""Files that carry a digest of all that they hold: JSON text, and arrays as safetensors with JSON in their header.

The digest is the first entry of the file: BLAKE2b of 256 bits, in hex, of the file with zeros in its place. It finds
damage, wherever it is. It is no signature: who changes a file on purpose can make it again, so that readers check what
they find all the same.
"""

import json
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from jquant.text import cut as cut
from jquant.text import short as short
from jquant.types import FormatError, JQuantError

VERSION = 2
DIGEST = "digest"
_NONE = "0" * 64
_PLACE = re.compile(rb'(?:\{\n |.{8}\{"__metadata__":\{)"digest": ?"([0-9a-f]{64})"', re.DOTALL)
_LONGEST_HEADER = 100_000_000  # bytes; safetensors reads no longer one
_DTYPES = {"float32": "F32", "int8": "I8", "int16": "I16", "int32": "I32", "uint8": "U8", "bool": "BOOL"}

# What Python raises where content is not what its reader expects.
_BROKEN = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)


def sealed_text(kind: str, content: Any) -> str:
    """Versioned JSON text that holds `content` under `kind`."""
    text = json.dumps({DIGEST: _NONE, "jquant": VERSION, kind: content}, indent=1)
    return _sealed(text.encode()).decode()


def read_sealed_text(text: str, kind: str) -> Any:
    """What `sealed_text` was given.

    Raises:
      FormatError: another content than that of the digest, another version, or another kind.
    """
    if not isinstance(text, str):
        raise FormatError(f"{kind}: text is wanted, not {type(text).__name__}")
    content = text.rstrip("\n").encode("utf-8", "surrogatepass")
    with refusing(kind):
        _check_digest(content, lambda: _version_in(text))
        data = read_versioned(text)
        if kind not in data:
            raise FormatError(f"the text holds {short(next(iter(data.keys() - {DIGEST, 'jquant'}), None))}, no {kind}")
    return data[kind]


def sealed_arrays(arrays: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of some arrays; the same ones give the same bytes.

    Raises:
      FormatError: metadata that are not text, or have the key of the digest.
    """
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise FormatError(f"metadata are text by text; {short(key)} is {type(value).__name__}")
    for text in (*metadata, *metadata.values(), *arrays):
        if not _is_unicode(text):
            raise FormatError(f"{short(text)} is no Unicode text: half of a surrogate pair stands alone")
    if DIGEST in metadata:
        raise FormatError(f"the metadata key {DIGEST!r} is that of the digest of the file")
    header: dict[str, Any] = {"__metadata__": {DIGEST: _NONE, **metadata}}
    parts, end = [], 0
    for name, array in _by_alignment(arrays):
        start, end = end, end + array.nbytes
        header[name] = {"dtype": _DTYPES[str(array.dtype)], "shape": list(array.shape), "data_offsets": [start, end]}
        parts.append(array.tobytes())
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return _sealed(b"".join((struct.pack("<Q", len(encoded)), encoded, *parts)))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _by_alignment(arrays: Mapping[str, Any]) -> list[tuple[str, np.ndarray]]:
    """Arrays of wide numbers first, as safetensors has them, so that each lies at a multiple of its width."""
    found = {name: np.asarray(array) for name, array in arrays.items()}
    return sorted(found.items(), key=lambda item: (-item[1].itemsize, item[0]))


def read_sealed_arrays(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata and arrays of a file that `sealed_arrays` made.

    Raises:
      FormatError: another content than that of the digest, another version, or another kind of file. The message does
        not name the file. OSError: it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    with path.open("rb") as file:
        start = file.read(256)
        content = start + file.read() if _PLACE.match(start) else start
    _check_digest(content, lambda: _version_of(path))
    try:
        arrays = load(content)
        (size,) = struct.unpack_from("<Q", content)
        metadata = json.loads(content[8 : 8 + size])["__metadata__"]
    except (SafetensorError, *_BROKEN) as error:
        raise FormatError(f"no safetensors: {error}") from error
    # safetensors gives the arrays in another order each time; what is read of one file is printed in one order.
    return {key: value for key, value in metadata.items() if key != DIGEST}, dict(sorted(arrays.items()))


def read_sealed_kind(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The JSON that a file holds under `kind`, such as "program", and its arrays.

    Raises:
      FormatError: as `read_sealed_arrays`, or a file of another kind. FileNotFoundError: no file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {kind} at {path}")
    with refusing(path):
        metadata, arrays = read_sealed_arrays(path)
        if kind not in metadata:
            raise FormatError(f"no {kind}: the file holds {', '.join(map(short, metadata)) or 'arrays alone'}")
        return read_versioned(metadata[kind]), arrays


def _sealed(content: bytes) -> bytes:
    """The content with its digest in the place that it has for it."""
    place = _PLACE.match(content)
    assert place is not None
    return content[: place.start(1)] + _digest(content, place).encode() + content[place.end(1) :]


def _digest(content: bytes, place: re.Match[bytes]) -> str:
    found, view = blake2b(digest_size=32), memoryview(content)
    for part in (view[: place.start(1)], _NONE.encode(), view[place.end(1) :]):
        found.update(part)
    return found.hexdigest()


def _check_digest(content: bytes, version: Any) -> None:
    """Raises FormatError where the content is not that of its digest; `version()` says what an older file is of."""
    place = _PLACE.match(content)
    if place is None:
        found = version()
        if found is not None and found != VERSION:
            raise FormatError(_other_version(found))
        raise FormatError(
            "its content differs from its digest, for it has none where it should be: no file of jquant, or damaged"
        )
    if _digest(content, place) != place[1].decode():
        raise FormatError("its content differs from its digest: it was damaged, cut short or edited")


def read_versioned(text: str) -> dict[str, Any]:
    """A JSON object that carries this release's format version.

    Raises:
      FormatError: no JSON, or another version.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not JSON: {error}") from error
    version = data.get("jquant") if isinstance(data, dict) else None
    if type(version) is not int or version != VERSION:
        raise FormatError(_other_version(version))
    return data


def _other_version(version: Any) -> str:
    return f"format version {short(version)}; this release reads version {VERSION}. Write the file again with it"


def _version_in(text: str) -> int | None:
    """The version of JSON text without a digest; None where there is none to be read."""
    try:
        version = json.loads(text)["jquant"]
    except _BROKEN:
        return None
    return version if type(version) is int else None


def _version_of(path: Path) -> int | None:
    """The version of a safetensors file without a digest, from the JSON in its header."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            metadata = json.loads(file.read(size))["__metadata__"] if size <= _LONGEST_HEADER else {}
        texts = [metadata[key] for key in ("program", "state") if key in metadata]
    except (struct.error, *_BROKEN):
        return None
    return _version_in(texts[0]) if texts else None


@contextmanager
def refusing(where: Any) -> Iterator[None]:
    """Turns what is raised by content that is not as it should be into FormatError with the place in front.

    Raises:
      FormatError: with a message that is not longer than a few lines.
    """
    try:
        yield
    except JQuantError as error:
        raise FormatError(f"{where}: {cut(str(error))}") from error
    except _BROKEN as error:
        raise FormatError(f"{where}: not well formed: {cut(f'{type(error).__name__}: {error}')}") from error
