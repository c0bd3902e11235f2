"""`write_probes`: what a person at a board compiles, runs and dumps, as a folder."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jquant.board import Probe
from jquant.host.whole_files import replacing
from jquant.text import format_table
from jquant.types import ConversionError

from .command_line import torch_archive
from .onnx_export import quantization_table, to_onnx

README = """# Probes

Each folder has a small float net, as ONNX (opset 19, IR version 9) and as a torch module (`torch.export`, .pt2), its
inputs as .npy (float32), and the format of every value and weight. No net means anything: its integers show how the
arithmetic rounds, shifts and saturates.

For each folder:

1. Compile `model.onnx` or `model.pt2` with post-training quantization. Do not let it calibrate: give each value and
   weight the dtype and the scale of `formats.json` (real per LSB; "threshold" is what a tool may want in its place).
   An "int32" output is the sum as it is, with high precision.
2. Run it on `inputs/*.npy` in one batch, on the board or in the interpreter of compiled models.
3. Dump, as integers, the values of the table below, each as `NAME.npy` into a folder of the same name as the probe's.
   Raw files, padded channels and other orders of axes are fine: say so in a `dumps.toml` (see `jquant.board.dumps`).

Then `jquant board fit DUMPS -o mine.toml`. What cannot be compiled can be left out: the fields that only it asks about
stay undecided.

"""


def write_probes(folder: str | os.PathLike[str], probes: Sequence[Probe]) -> Path:
    """Writes probes for the person at a board: nets, inputs, formats, and a README that says what to dump.

    Args:
      folder: made where there is none.
      probes: as `jq.board.probe` made them.

    Returns:
      The README. A net that has no ONNX or torch form is named in it.

    Raises:
      OSError: a folder that cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    notes = [note for probe in probes for note in _write(folder / probe.name, probe)]
    text = README + "".join(_section(probe) for probe in probes)
    text += "\n## Without a file\n\n" + "".join(f"- {note}\n" for note in notes) if notes else ""
    return _put(folder / "README.md", text.encode())


def _write(folder: Path, probe: Probe) -> list[str]:
    """The files of one probe; in words what it has no file of."""
    (folder / "inputs").mkdir(parents=True, exist_ok=True)
    for name, array in probe.inputs.items():
        stream = io.BytesIO()
        np.save(stream, np.asarray(array))
        _put(folder / "inputs" / f"{name}.npy", stream.getvalue())
    _put(folder / "formats.json", json.dumps(quantization_table(probe.model), indent=1).encode())
    notes = []
    for file, make in (("model.onnx", _onnx), ("model.pt2", torch_archive)):
        try:
            _put(folder / file, make(probe.graph, probe.params))
        except ConversionError as error:
            notes.append(f"{probe.name}/{file}: {error}")
    return notes


def _onnx(graph: object, params: object) -> bytes:
    return bytes(to_onnx(graph, params).SerializeToString())  # type: ignore[arg-type]


def _put(path: Path, content: bytes) -> Path:
    with replacing(path) as partial:
        partial.write_bytes(content)
    return path


def _section(probe: Probe) -> str:
    plan = probe.model.plan
    wanted = dict.fromkeys(v for name in probe.asks for v in (*_operands(probe, name), name))
    shown = [name for name in wanted if not name.endswith((".to_last", ".to_first"))]
    rows = [
        (name, plan.exact.get(name) or plan.spec(name).dtype, ", ".join(probe.asks.get(name, ()))) for name in shown
    ]
    table = format_table(("value", "dtype", "what it tells"), rows)
    return f"## {probe.name}\n\n{probe.says}\n\n```\n{table}\n```\n\n"


def _operands(probe: Probe, name: str) -> tuple[str, ...]:
    nodes = probe.model.plan.graph.by_name
    found = nodes[name].inputs if name in nodes else ()
    return tuple(v.removesuffix(".to_last") for v in found)
