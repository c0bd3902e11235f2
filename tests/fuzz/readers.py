"""Every reader of files, with whole files to damage."""

import functools
import io
import random
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from support.mutants import damaged, in_archive, in_json, in_onnx

import jquant as jq

TESTS = Path(__file__).resolve().parents[1]
GOLDEN = TESTS / "golden" / "2"
FOREIGN = TESTS / "foreign"

Mutation = Callable[[bytes, random.Random], bytes]
TEXT = (damaged, in_json)


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A reader of files.

    `suffix`     of the file that it is given
    `whole`      the contents of whole files
    `read`       reads a path
    `mutations`  kinds of damage, of which one is drawn for each mutant
    `sealed`     whether the file carries a digest, or what is read can be told from it: a mutant that reads as
                 something else is a finding
    `content`    what was read, in a form that can be compared
    """

    suffix: str
    whole: Callable[[], list[bytes]]
    read: Callable[[Path], Any]
    mutations: tuple[Mutation, ...] = (damaged,)
    sealed: bool = False
    content: Callable[[Any], Any] = repr


def golden(name: str) -> Callable[[], list[bytes]]:
    return lambda: [(GOLDEN / name).read_bytes()]


def foreign(pattern: str) -> Callable[[], list[bytes]]:
    return lambda: [path.read_bytes() for path in sorted(FOREIGN.glob(pattern))[:4]]


def _named(read: Callable[[str], Any]) -> Callable[[Path], Any]:
    """A reader of text, which has no file to name: its errors get the path, as a caller would put it there."""

    def call(path: Path) -> Any:
        try:
            return read(path.read_bytes().decode("utf-8", "surrogateescape"))
        except jq.FormatError as error:
            raise jq.FormatError(f"{path}: {error}") from error

    return call


def leaves(value: Any) -> Any:
    return str(value), [(np.asarray(leaf).dtype.name, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(value)]


def _state(path: Path) -> Any:
    from jquant.cli.state import load_state

    return load_state(path)


def _state_content(state: Any) -> bytes:
    from jquant.cli.state import save_state

    with tempfile.TemporaryDirectory() as folder:
        save_state(Path(folder) / "again.jqs", state)
        return (Path(folder) / "again.jqs").read_bytes()


def _cases(path: Path) -> Any:
    return jq.analysis.load_bad_cases(path)


def _function(path: Path) -> Any:
    sys.path.insert(0, str(TESTS / "golden"))
    import make

    return jq.functions.load(path, make.function, make.function_params(), make.rows())[1]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: a folder, which is carried as an archive


def _checkpoint() -> list[bytes]:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for path in sorted((GOLDEN / "checkpoint").rglob("*")):
            if path.is_file():
                archive.writestr(str(path.relative_to(GOLDEN)), path.read_bytes())
    return [made.getvalue()]


@functools.cache
def _trained() -> Any:
    sys.path.insert(0, str(TESTS / "golden"))
    import make

    model = _state(GOLDEN / "state.jqs").calibrated()
    return model, make.fresh_state(model)


def _read_checkpoint(path: Path) -> Any:
    folder = path.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    model, state = _trained()
    try:
        with closing(jq.training.open_checkpoints(folder / "checkpoint", model)) as checkpoints:
            return checkpoints.restore(state)
    except jq.FormatError as error:
        raise jq.FormatError(str(error).replace(str(folder / "checkpoint"), str(path))) from error


def _checkpoint_content(found: Any) -> Any:
    return (
        None if found is None else (found.step, found.position, leaves((found.state, jax.random.key_data(found.key))))
    )


# ---------------------------------------------------------------------------------------------------------------------
# Files of other tools


@functools.cache
def _net() -> Any:
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
    return nn.Sequential(*layers).eval(), torch.zeros(2, 3, 6, 6)


@functools.cache
def _imported() -> Any:
    from jquant_converters import from_torch

    net, x = _net()
    return from_torch(net, (x,))


def _torch_files(kind: str) -> Callable[[], list[bytes]]:
    def make() -> list[bytes]:
        import torch
        from safetensors.torch import save

        (net, x), made = _net(), io.BytesIO()
        match kind:
            case "pt2":
                batch = ({0: torch.export.Dim("batch")},)
                torch.export.save(torch.export.export(net, (x,), dynamic_shapes=batch), made)
            case "safetensors":
                return [save(net.state_dict())]
            case _:
                torch.save(net.state_dict(), made, _use_new_zipfile_serialization=kind == "zip")
        return [made.getvalue()]

    return make


def _read_weights(path: Path) -> Any:
    from jquant_converters import load_state_dict

    return load_state_dict(*_imported(), path, strict=False).params


def _read_pt2(path: Path) -> Any:
    from jquant_converters import from_torch

    return from_torch(path)


def _float_onnx() -> list[bytes]:
    from support import architectures

    from jquant_converters import from_torch, to_onnx

    nets = [from_torch(architectures.build(n), architectures.inputs(n, 1, seed=0)) for n in ("gru", "shufflenet")]
    return [to_onnx(*net).SerializeToString() for net in nets]


def _read_onnx(path: Path) -> Any:
    from jquant_converters import from_onnx

    return from_onnx(path)


def _read_quantized(path: Path) -> Any:
    from jquant_converters import model_from_onnx

    return model_from_onnx(path, target=jq.targets.NASH_E, zero_point="widen")


def _read_encodings(path: Path) -> Any:
    from jquant_converters import model_from_encodings

    net = FOREIGN / "aimet" / "float_symmetric_residual.onnx"
    return model_from_encodings(net, path, target=jq.targets.NASH_E, zero_point="widen")


ONNX = (damaged, in_onnx, in_onnx)

READERS = {
    "program": Reader(suffix=".jq", whole=golden("program.jq"), read=jq.load, sealed=True, content=leaves),
    "state": Reader(suffix=".jqs", whole=golden("state.jqs"), read=_state, sealed=True, content=_state_content),
    "model": Reader(suffix=".jqm", whole=golden("model.jqm"), read=jq.plan.load, sealed=True, content=leaves),
    "function": Reader(suffix=".jqf", whole=golden("function.jqf"), read=_function, sealed=True, content=leaves),
    "plan": Reader(
        suffix=".json", whole=golden("plan.json"), read=_named(jq.plan.plan_from_json), mutations=TEXT, sealed=True
    ),
    "graph": Reader(
        suffix=".json", whole=golden("graph.json"), read=_named(jq.graph.graph_from_json), mutations=TEXT, sealed=True
    ),
    "checkpoint": Reader(
        suffix=".zip", whole=_checkpoint, read=_read_checkpoint, mutations=(in_archive,), sealed=True,
        content=_checkpoint_content,
    ),
    "cases": Reader(suffix=".npz", whole=golden("cases.npz"), read=_cases, mutations=(damaged, in_archive)),
    "march.toml": Reader(suffix=".toml", whole=golden("march.toml"), read=jq.targets.load),
    "march.json": Reader(suffix=".json", whole=golden("march.json"), read=jq.targets.load, mutations=TEXT),
    "qconfig.toml": Reader(suffix=".toml", whole=golden("qconfig.toml"), read=jq.config.qconfig_from_toml),
    "qconfig.json": Reader(
        suffix=".json", whole=golden("qconfig.json"), read=jq.config.qconfig_from_json, mutations=TEXT
    ),
    "onnx": Reader(suffix=".onnx", whole=_float_onnx, read=_read_onnx, mutations=ONNX),
    "onnx, QDQ": Reader(
        suffix=".onnx", whole=foreign("onnxruntime/q*_heads.onnx"), read=_read_quantized, mutations=ONNX
    ),
    "onnx, QONNX": Reader(suffix=".onnx", whole=foreign("brevitas/*.onnx"), read=_read_quantized, mutations=ONNX),
    "encodings": Reader(
        suffix=".json", whole=foreign("aimet/float_symmetric_residual*.json"), read=_read_encodings, mutations=TEXT
    ),
    "torch, zip": Reader(
        suffix=".pt", whole=_torch_files("zip"), read=_read_weights, mutations=(damaged, in_archive)
    ),
    "torch, legacy": Reader(suffix=".pt", whole=_torch_files("legacy"), read=_read_weights),
    "safetensors": Reader(suffix=".safetensors", whole=_torch_files("safetensors"), read=_read_weights),
    "pt2": Reader(suffix=".pt2", whole=_torch_files("pt2"), read=_read_pt2, mutations=(damaged, in_archive)),
}  # fmt: skip


def mutant(reader: Reader, whole: list[bytes], name: str, seed: int) -> tuple[int, bytes]:
    """The whole file that is damaged, by its number, and the damaged one. The same name and seed give the same."""
    rng = random.Random(f"{name} {seed}")
    chosen = rng.randrange(len(whole))
    return chosen, rng.choice(reader.mutations)(whole[chosen], rng)
