"""Files of torch, read without running what is in them.

A torch file is an archive of pickles. State dicts are read with `weights_only`. `torch.export.load` would unpickle
whatever an archive calls a pickled weight, load its shared libraries and evaluate its expressions, so an archive is
looked through first, and refused for anything but plain tensors, plain operators and arithmetic on sizes.
"""

from __future__ import annotations

import ast
import json
import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from jquant.types import FormatError

_ENTRIES = (
    "archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id", ".format_version",
    ".storage_alignment", "models/*.json", "data/weights/*", "data/constants/*", "data/sample_inputs/*.pt",
)  # fmt: skip
_TARGET = re.compile(r"torch\.ops\.[a-z_]\w*\.\w+(\.\w+)?|torch\._ops\.[a-z_]\w*\.\w+(\.\w+)?|_operator\.\w+|math\.\w+")
_SYMBOLIC = {"sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not", "sym_sqrt", "sym_sum"}
_EXPRESSION = {  # what torch.export writes for sizes
    "Add", "And", "CeilDiv", "CleanDiv", "Equality", "FloorDiv", "Float", "GreaterThan", "Integer", "LessThan", "Max",
    "Min", "Mod", "ModularIndexing", "Mul", "Not", "Or", "Pow", "PythonMod", "Rational", "StrictGreaterThan",
    "StrictLessThan", "Symbol", "Unequality", "true", "false",
}  # fmt: skip
_SIZE = re.compile(r"[su]\d{1,6}")
_FOREIGN = r"\b(?:GLOBAL|unrecognized function|instance of type) <?(?:class |function )?'?([\w.]+)"  # as torch words it
# These keep the state dict beside settings of classes of their own. timm keeps its arguments as a Namespace.
_WITH_STATE_DICT = frozenset(
    ("argparse", "lightning", "lightning_fabric", "mmcv", "mmengine", "omegaconf", "pytorch_lightning", "timm")
)
_USUAL_KEYS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights")
_MAX_ENTRIES = 100_000
_MAX_PICKLE = 1 << 24
_MAX_EXPRESSION = 10_000


def read_state_dict(path: str | os.PathLike[str], entry: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """The tensors of a `.pt`, `.pth` or `.safetensors` file, by key.

    Of safetensors, int8 and FP8 weights are multiplied by the scale beside them (`layer.weight_scale`).

    Args:
      path: of the file.
      entry: the keys on the way to the state dict, in a checkpoint that holds more; such as ("ema", "module").

    Raises:
      FormatError: a file that is damaged, holds something else than tensors by name, or claims more than it holds.
      FileNotFoundError: no file.
    """
    path = _existing(path)
    if path.suffix == ".safetensors":
        if entry:
            raise FormatError(f"{path}: a safetensors file holds tensors alone; leave entry out")
        from .safetensors_files import read_safetensors

        return read_safetensors(path)
    if _is_archive(path):
        with _archive(path) as archive:
            _check_sizes(archive, path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler meets
        raise FormatError(f"{path}: not a readable state dict: {why_unreadable(error, path)}") from error
    state = inside(state, entry, path)
    if not isinstance(state, Mapping):
        raise FormatError(f"{path}: it holds a {type(state).__name__}, not tensors by name")
    size = path.stat().st_size
    for key, tensor in state.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise FormatError(
                f"{path}: the entry {str(key)[:80]!r} is a {type(tensor).__name__}, not a tensor{_where_weights(state)}"
            )
        if tensor.layout != torch.strided or tensor.numel() * tensor.element_size() > size:
            raise FormatError(f"{path}: {key[:80]!r} claims the shape {list(tensor.shape)}, more than the file holds")
    return dict(state)


def inside(state: Any, entry: Sequence[str], where: object) -> Any:
    """What lies in a checkpoint behind the keys of an entry.

    Raises:
      FormatError: a key that is not there, with those that are.
    """
    for i, key in enumerate(entry):
        if not isinstance(state, Mapping) or key not in state:
            keys = ", ".join(map(repr, list(state)[:10])) if isinstance(state, Mapping) else f"a {type(state).__name__}"
            raise FormatError(f"{where}: no entry {'.'.join(entry[: i + 1])!r}; there is {keys}")
        state = state[key]
    if entry and not isinstance(state, Mapping):
        raise FormatError(f"{where}: the entry {'.'.join(entry)!r} is a {type(state).__name__}, not tensors by name")
    return state


def _where_weights(state: Mapping[Any, Any]) -> str:
    """How to take the state dict out of a checkpoint that holds more."""
    from .torch_out.prefixes import as_entry, containers, indexed

    found = [way for way, _ in containers(state)]
    if not found:
        return f"; its entries are {', '.join(map(repr, list(state)[:5]))}, and none of them holds tensors by name"
    also = f" (or {', '.join(map(indexed, found[1:5]))})" if found[1:] else ""
    return f"; the weights are in {indexed(found[0])}{also}: load_state_dict(graph, params, path, {as_entry(found[0])})"


def why_unreadable(error: Exception, path: str | os.PathLike[str]) -> str:
    """What torch says, or the class that the file needs beside tensors: training scripts store more than weights."""
    found = re.search(_FOREIGN, str(error))
    if found is None:
        return _first_line(error) if str(error).count(" ") else f"torch cannot read it ({error!r})"
    name = found.group(1)
    return (
        f"it holds {name} beside tensors, and reading that could run code. If you trust the file, take the weights out "
        "where its framework is installed, with two lines:\n"
        f"  checkpoint = torch.load({os.fspath(path)!r}, map_location='cpu', weights_only=False)\n"
        f"  torch.save({_weights_of(name, _strings_of(path))}, 'weights.pth')"
    )


def _strings_of(path: str | os.PathLike[str]) -> set[str]:
    """The strings in the pickle of an archive, which is looked through and not run; none of another file."""
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (n for n in archive.namelist() if PurePosixPath(n).name == "data.pkl")
            if archive.getinfo(name).file_size > _MAX_PICKLE:
                return set()
            return {value for _, value, _ in pickletools.genops(archive.read(name)) if isinstance(value, str)}
    except Exception:  # a damaged file: what is said of it then is general
        return set()


def _weights_of(name: str, strings: Collection[str] = ()) -> str:
    """The weights in a checkpoint that holds a class, by the frameworks that write it, or by the usual keys in it."""
    framework = name.partition(".")[0]
    usual = next((key for key in _USUAL_KEYS if key in strings), None)
    if framework in _WITH_STATE_DICT or (framework == "numpy" and usual is not None):
        return f"checkpoint[{usual or 'state_dict'!r}]"
    if framework == "ultralytics":  # whole modules, in float16
        return "(checkpoint.get('ema') or checkpoint['model']).float().state_dict()"
    if framework in ("peft", "transformers"):
        return "checkpoint.merge_and_unload().state_dict() if hasattr(checkpoint, 'peft_config') else checkpoint"
    inside = f"checkpoint[{usual or 'state_dict'!r}]"
    return f"checkpoint.state_dict() if hasattr(checkpoint, 'state_dict') else {inside}"


def read_exported(path: str | os.PathLike[str]) -> Any:
    """The exported program of a `.pt2` file, as torch.export.save writes it from torch 2.8 on.

    Raises:
      FormatError: a file that is damaged, or holds what runs code when it is read: pickles, libraries, expressions.
      FileNotFoundError: no file.
    """
    path = _existing(path)
    if not _is_archive(path):
        raise FormatError(f"{path}: not an archive of torch.export.save")
    with _archive(path) as archive:
        _check_sizes(archive, path)
        try:
            _check_content(archive, path)
        except FormatError:
            raise
        except Exception as error:  # whatever a damaged archive makes zipfile and json raise
            raise FormatError(f"{path}: not a readable exported program: {_first_line(error)}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(path)
    except Exception as error:
        raise FormatError(f"{path}: not a readable exported program: {_first_line(error)}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Archives


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    return path


def _is_archive(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _archive(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise FormatError(f"{path}: a damaged archive: {error}") from error


def _check_sizes(archive: zipfile.ZipFile, path: Path) -> None:
    """Torch stores without compression, so what an archive claims to hold fits into the file; names stay inside."""
    entries = archive.infolist()
    if len(entries) > _MAX_ENTRIES or len({entry.filename for entry in entries}) < len(entries):
        raise FormatError(f"{path}: {len(entries)} entries, or two of one name")
    for entry in entries:
        name = entry.filename
        if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or ":" in name or "\0" in name:
            raise FormatError(f"{path}: the entry {name[:80]!r} leads out of the archive")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise FormatError(f"{path}: the entry {name[:80]!r} is compressed, which torch never does")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise FormatError(f"{path}: its entries claim more than the file holds")


def _check_content(archive: zipfile.ZipFile, path: Path) -> None:
    """Only tensors as bytes, and programs of plain operators."""
    models = 0
    for entry in archive.infolist():
        name = entry.filename.partition("/")[2]
        if name == "data.pkl":
            raise FormatError(
                f"{path}: torch.save wrote it, and it is no exported program. Load its weights into the module, with "
                "load_state_dict, and give from_torch the module"
            )
        if not any(PurePosixPath(name).match(pattern) and _depth(name) == _depth(pattern) for pattern in _ENTRIES):
            raise FormatError(f"{path}: {entry.filename[:80]!r} has no place in an exported program; save it again")
        if name.endswith("_config.json"):
            _check_config(json.loads(archive.read(entry)), archive, entry.filename, path)
        elif name.startswith("models/"):
            models += 1
            _check_model(json.loads(archive.read(entry)), path)
        elif name.startswith("data/sample_inputs/"):
            _check_inputs(archive.read(entry), path)
    if models != 1:
        raise FormatError(f"{path}: {models} programs, where one is expected; save it with torch 2.8 or later")


def _depth(name: str) -> int:
    return name.count("/")


def _check_config(config: Any, archive: zipfile.ZipFile, name: str, path: Path) -> None:
    """Weights and constants are raw bytes, of the size that their shape says."""
    folder = name.rpartition("/")[0]
    for key, entry in config["config"].items():
        file = entry["path_name"]
        plain = re.fullmatch(r"(weight|tensor)_\d{1,9}", str(file)) is not None
        if not plain or entry.get("use_pickle") is not False or not isinstance(entry.get("tensor_meta"), dict):
            raise FormatError(f"{path}: {str(key)[:80]!r} is pickled, or no plain tensor; such a file is not read")
        archive.getinfo(f"{folder}/{file}")
        for size in (*entry["tensor_meta"]["sizes"], *entry["tensor_meta"]["strides"]):
            if not isinstance(size.get("as_int"), int):
                raise FormatError(f"{path}: {str(key)[:80]!r} has no fixed shape")


def _check_inputs(data: bytes, path: Path) -> None:
    if not data:
        return
    try:
        torch.load(BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.export.load would unpickle it freely then
        raise FormatError(f"{path}: its example inputs are not plain tensors: {_first_line(error)}") from error


def _check_model(model: Any, path: Path) -> None:
    for key, value in _walk(model):
        if key == "target" and isinstance(value, str) and "." in value and not _is_operator(value):
            if value.startswith(("torch", "_", "math", "builtins", "operator")):
                raise FormatError(f"{path}: {value[:80]!r} is no operator of a model")
        elif key == "expr_str" and not _is_arithmetic(value):
            raise FormatError(f"{path}: {str(value)[:80]!r} is no arithmetic on sizes")


def _is_operator(target: str) -> bool:
    return _TARGET.fullmatch(target) is not None or target.removeprefix("torch.") in _SYMBOLIC


def _is_arithmetic(text: Any) -> bool:
    """Whether an expression is a size, or nested calls of the few functions of sizes. It is parsed, never evaluated."""
    if not isinstance(text, str) or len(text) > _MAX_EXPRESSION:
        return False
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    for node in ast.walk(tree.body):
        match node:
            case ast.Name(id=name):
                good = name in _EXPRESSION or _SIZE.fullmatch(name) is not None
            case ast.Call(func=ast.Name()) | ast.keyword(arg=str()) | ast.Load():
                good = True
            case ast.Constant(value=bool() | int() as value):
                good = abs(int(value)) < 2**63
            case ast.Constant(value=str() as value):
                good = re.fullmatch(r"[su]\d{1,6}|-?\d+(\.\d+)?", value) is not None
            case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult()) | ast.UnaryOp(op=ast.USub()):
                good = True
            case ast.Add() | ast.Sub() | ast.Mult() | ast.USub():
                good = True
            case _:
                good = False
        if not good:
            return False
    return True


def _walk(data: Any) -> Iterator[tuple[str, Any]]:
    """Every (key, value) of nested JSON."""
    waiting = [data]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield from item.items()
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0][:200]
