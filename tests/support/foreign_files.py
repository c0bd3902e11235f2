"""Quantized files of other tools: what is read of them, measured, and the table of docs/other-tools.md.

`python tests/support/foreign_files.py > docs/other-tools.md` writes the table from the files in tests/foreign.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from onnx import numpy_helper
from support import torch_rows

import jquant as jq
from jquant.host.progress import track
from jquant.plan.scales import value_scales
from jquant_converters import (
    model_from_encodings,
    model_from_onnx,
    model_from_torch,
    to_encodings,
    to_onnx,
)

FOLDER = Path(__file__).parents[1] / "foreign"
# Rescaled in high precision, ties to even, as ONNX rounds.
EXACT = jq.targets.NASH_E.with_fields({"rescale.post_rounding": "half_even", "rescale.high_precision": True})


@dataclass(frozen=True)
class Row:
    """One line of the table: a file of a tool and how it is read."""

    tool: str
    form: str
    name: str  # of the file in tests/foreign, without its suffix; "torch/...": made by `torch_rows`
    options: tuple[tuple[str, str], ...] = ()
    encodings: str = ""  # version of the JSON beside a float model
    batches: bool = False
    lsb: float = 1.0  # the largest difference of fake-quant that is allowed, in LSB
    back: str = "QDQ"
    exact: bool = True  # equal integers where scales are powers of two, see `equal_integers`

    @property
    def key(self) -> str:
        return " ".join([self.name, *(value for _, value in self.options), self.encodings])


def _rows() -> list[Row]:
    ort, nncf, aimet = "onnxruntime 1.32.0", "NNCF 3.4.0", "AIMET (aimet-onnx 2.42.0)"
    brevitas, ao, torch = "Brevitas 0.13.4", "torchao 0.18.0, torch 2.13.0", "torch 2.13.0"
    widen, again = (("zero_point", "widen"),), (("zero_point", "requantize"),)
    part = "onnxruntime/"
    rows = [
        Row(ort, "QDQ, int8", f"{part}qdq_residual", lsb=0),
        Row(ort, "QDQ, int8", f"{part}qdq_inverted", lsb=0),
        Row(ort, "QDQ, int8", f"{part}qdq_heads", lsb=0),
        Row(ort, "QDQ, int8", f"{part}qdq_transformer", lsb=4, exact=False),
        Row(ort, "QDQ, int16", f"{part}qdq_int16_residual", lsb=0),
        Row(ort, "QDQ, int16", f"{part}qdq_int16_transformer", lsb=400, exact=False),
        Row(ort, "QDQ, uint8 with zero point 128", f"{part}qdq_symmetric_uint8_residual", lsb=0),
        Row(ort, "QDQ, uint8", f"{part}qdq_uint8_residual", widen, lsb=0),
        Row(ort, "QDQ, uint8", f"{part}qdq_uint8_residual", again, lsb=4, exact=False),
        Row(ort, "QDQ of com.microsoft", f"{part}qdq_microsoft_heads", lsb=0),
        Row(ort, "QOperator, int8", f"{part}qoperator_residual", lsb=0),
        Row(ort, "QOperator, int8", f"{part}qoperator_inverted", lsb=0),
        Row(ort, "QOperator, int8", f"{part}qoperator_heads", lsb=0),
        Row(ort, "QOperator, int8", f"{part}qoperator_transformer", widen, lsb=4, exact=False),
        Row(ort, "QOperator, uint8", f"{part}qoperator_uint8_heads", widen, lsb=1),
        Row(ort, "dynamic, calibrated here", f"{part}dynamic_residual", batches=True, lsb=6, exact=False),
        Row(ort, "dynamic, calibrated here", f"{part}dynamic_transformer", batches=True, lsb=6, exact=False),
    ]
    rows += [Row(nncf, "QDQ, performance", f"nncf/performance_{n}", widen, lsb=1.5, exact=n == "residual")
             for n in ("residual", "inverted", "heads")]  # fmt: skip
    rows += [
        Row(nncf, "QDQ, performance", "nncf/performance_transformer", batches=True, lsb=6, exact=False),
        Row(nncf, "QDQ, mixed", "nncf/mixed_heads", widen, lsb=1.5, exact=False),
        Row(aimet, "QDQ of to_onnx_qdq, asymmetric", "aimet/qdq_residual", widen, lsb=1),
    ]
    for net in ("residual", "inverted", "heads"):
        rows.append(Row(aimet, "QDQ of to_onnx_qdq", f"aimet/qdq_symmetric_{net}", lsb=1))
    for version in ("0.6.1", "1.0.0", "2.0.0"):
        for net in ("symmetric_residual", "symmetric_inverted", "symmetric_heads", "symmetric_int4_residual"):
            rows.append(Row(aimet, f"encodings {version}", f"aimet/float_{net}", encodings=version, back="encodings"))
    rows += [
        Row(brevitas, "QCDQ, int8", "brevitas/qcdq_signed_8", lsb=0),
        Row(brevitas, "QCDQ, int4 weights", "brevitas/qcdq_signed_4", lsb=0),
        Row(brevitas, "QCDQ, uint8 behind ReLU", "brevitas/qcdq_unsigned_8", widen, lsb=0),
        Row(brevitas, "QONNX, int8", "brevitas/qonnx_signed_8", lsb=0, back="QONNX"),
        Row(brevitas, "QONNX, int4 weights", "brevitas/qonnx_signed_4", lsb=0, back="QONNX"),
        Row(brevitas, "QONNX, uint8 behind ReLU", "brevitas/qonnx_unsigned_8", widen, lsb=0, back="QONNX"),
        Row(ao, "PT2E, symmetric", "torchao/pt2e_symmetric_residual", lsb=1, exact=False),
        Row(ao, "PT2E, symmetric", "torchao/pt2e_symmetric_inverted", lsb=1, exact=False),
        Row(ao, "PT2E, symmetric", "torchao/pt2e_symmetric_heads", lsb=1.1, exact=False),
        Row(ao, "PT2E, XNNPACK", "torchao/pt2e_xnnpack_residual", widen, lsb=1.1, exact=False),
        Row(torch, "torch.ao, fx", "torch/fx", lsb=1.1, exact=False),
        Row(torch, "torch.ao, fx, reference", "torch/fx_reference", lsb=1.1, exact=False),
        Row(torch, "torch.ao, eager", "torch/eager", lsb=1.1, exact=False),
        Row(torch, "FakeQuantize, after QAT", "torch/fake_quant", widen, lsb=1.1, exact=False),
        Row(torch, "torch.onnx of FakeQuantize", "torch/fake_quant_exported", widen, lsb=1.1),
    ]
    return rows


ROWS = _rows()


def arrays(row: Row) -> tuple[jax.Array, list[np.ndarray]]:
    """The inputs of a file, and the tool's own outputs."""
    if row.name in torch_rows.SOURCES:
        _, x, expected = torch_rows.made(row.name)
        return jnp.asarray(x), expected
    with np.load(FOLDER / f"{row.name}.npz") as data:
        return jnp.asarray(data["x"]), [data[f"y{i}"] for i in range(len(data.files) - 1)]


def read(row: Row, target: Any = jq.targets.NASH_E, source: Any = None) -> jq.Model:
    options: dict[str, Any] = {**dict(row.options), "target": target}
    if row.batches:
        x, _ = arrays(row)
        options["batches"] = [x]
    if row.encodings:
        beside = FOLDER / f"{row.name}_{row.encodings}.json"
        return model_from_encodings(source or FOLDER / f"{row.name}.onnx", beside, **options)
    if row.name.startswith("torchao"):
        return model_from_torch(FOLDER / f"{row.name}.pt2", **options)
    if row.name in torch_rows.SOURCES:
        module, x, _ = torch_rows.made(row.name)
        if not isinstance(module, onnx.ModelProto):
            return model_from_torch(module, (torch_rows.tensor(x),), **options)
        return model_from_onnx(source or module, **options)
    return model_from_onnx(source or FOLDER / f"{row.name}.onnx", **options)


def file_of(row: Row) -> onnx.ModelProto:
    if row.name in torch_rows.SOURCES:
        return torch_rows.made(row.name)[0]
    return onnx.load(FOLDER / f"{row.name}.onnx")


def outputs(found: Any) -> list[np.ndarray]:
    return [np.asarray(y) for y in (found if isinstance(found, tuple) else (found,))]


def steps(model: jq.Model, expected: list[np.ndarray]) -> list[float]:
    """One LSB of each output; of one that the file leaves float or int32, 1/127 of its largest value."""
    scales = value_scales(model.plan, model.qparams)
    found = []
    for name, e in zip(model.plan.graph.outputs, expected, strict=True):
        maker = name
        while maker in model.plan.graph.by_name and maker not in model.plan.owned:
            maker = model.plan.graph.by_name[maker].inputs[0]
        row = next((r for r in model.plan.resolutions if r.name == maker and "no pair in the file" in r.reason), None)
        spec = model.plan.values[name]
        own = row is None and spec is not None and spec.dtype in ("int8", "int16")
        found.append(float(scales[name]) if own else float(np.abs(e).max()) / 127)
    return found


def apart(model: jq.Model, found: Any, expected: list[np.ndarray]) -> float:
    """The largest difference in LSB."""
    pairs = zip(outputs(found), expected, steps(model, expected), strict=True)
    return max(float(np.abs(a - e).max()) / step for a, e, step in pairs)


def fake_quant_apart(row: Row, model: jq.Model) -> float:
    x, expected = arrays(row)
    return apart(model, jq.apply(model, x), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Integers, where every scale is a power of two


def with_powers_of_two(model: onnx.ModelProto) -> onnx.ModelProto:
    """The file with every scale raised to a power of two, and biases that lie on the grid of the products."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensors = {t.name: t for t in copy.graph.initializer}
    tensors |= {
        n.output[0]: a.t for n in copy.graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"
    }
    scales, biases, integer_biases = set(), set(), set()
    added = {n.input[2] for n in copy.graph.node if n.op_type in ("Conv", "Gemm") and len(n.input) > 2}
    for node in copy.graph.node:
        names = list(node.input)
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Quant"):
            (integer_biases if node.output[0] in added else scales).add(names[1])
        elif node.op_type.startswith(("QLinear", "QGemm")):
            scales |= {n for n in names if n in tensors and tensors[n].data_type == onnx.TensorProto.FLOAT}
        elif node.op_type in ("Conv", "Gemm") and len(names) > 2 and names[2] in tensors:
            biases.add(names[2])
    for name in scales | biases | integer_biases:
        array = numpy_helper.to_array(tensors[name]).astype(np.float32)
        power = np.exp2(np.ceil(np.log2(np.maximum(np.abs(array), 2.0**-20)))).astype(np.float32)
        new = np.rint(array * 64) / 64 if name in biases else power * 16 if name in integer_biases else power
        tensors[name].CopyFrom(numpy_helper.from_array(np.asarray(new, np.float32), tensors[name].name))
    return copy


def run_float(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    """onnxruntime with its optimizations off."""
    from support.onnx_helpers import session

    made = session(model)
    return made.run(None, {made.get_inputs()[0].name: x})


def equal_integers(row: Row) -> float:
    """How far the integers are from onnxruntime, in LSB, on the file with scales that are powers of two: 0 is equal.

    float32 holds the sums of these nets exactly, so that onnxruntime's numbers are those of an int64 oracle. QONNX,
    which it does not run, is compared with the QDQ file that `to_onnx` makes of it.
    """
    if row.encodings:
        raise ValueError("the scales of an encodings file are those of its QDQ twin")
    model = with_powers_of_two(file_of(row))
    found = read(row, EXACT, model)
    runs = to_onnx(found) if row.form.startswith("QONNX") else model
    x, _ = arrays(row)
    expected = run_float(runs, np.asarray(x))
    return apart(found, jq.run(jq.lower(found), x), expected)


def tables_alone(row: Row) -> bool:
    """Whether it is the tables of functions that put the integers apart: fake-quant has the file's numbers without
    them, and with them those of the program, in every bit."""
    model = with_powers_of_two(file_of(row))
    found = read(row, EXACT, model)
    x, _ = arrays(row)
    plain = apart(found, jq.apply(found, x), run_float(model, np.asarray(x)))
    pairs = zip(outputs(jq.apply(found, x, mode="tables")), outputs(jq.run(jq.lower(found), x)), strict=True)
    return plain == 0 and all(np.array_equal(a, b) for a, b in pairs)


# ---------------------------------------------------------------------------------------------------------------------
# Training, and the way back


def trains(row: Row, model: jq.Model) -> bool:
    """Whether a loss has finite gradients for weights and scales, and a step lowers it."""
    x, expected = arrays(row)
    target = [jnp.asarray(e) * 0.9 for e in expected]

    def loss(m: jq.Model) -> jax.Array:
        found = jq.apply(m, x)
        return sum(
            jnp.mean((y - t) ** 2) for y, t in zip(found if isinstance(found, tuple) else (found,), target, strict=True)
        )

    before, gradient = jax.jit(jax.value_and_grad(loss))(model)
    leaves = jax.tree.leaves(gradient)
    size = float(jnp.sqrt(sum(jnp.sum(g**2) for g in leaves)))
    finite = all(bool(jnp.isfinite(g).all()) for g in leaves) and size > 0
    lower = any(
        float(loss(jax.tree.map(lambda p, g, r=rate: p - r * g, model, gradient))) < float(before)
        for rate in (0.1, 0.01, 0.001, 0.0001)
    )
    return finite and lower


def opset_back(row: Row, model: jq.Model) -> int:
    """The opset of the file; 21 where the model has integers that QuantizeLinear has from there on."""
    if row.name.startswith(("torchao", "torch/")):
        return 21
    file = next(e.version for e in file_of(row).opset_import if not e.domain)
    specs = [s for s in (*model.plan.values.values(), *model.plan.weights.values()) if s is not None]
    wide = row.back != "encodings" and any(s.dtype in ("int4", "int16") for s in specs)
    return max(file, 21) if wide else file


def goes_back(row: Row, model: jq.Model) -> bool:
    """Whether the model, written in the form that it came in, comes back with the same scales, bit for bit."""
    opset = opset_back(row, model)
    if row.back == "encodings":
        exported = to_encodings(model, version=row.encodings)  # type: ignore[arg-type]
        beside = to_onnx(model, form="float", opset=opset)
        again = model_from_encodings(beside, exported, target=model.plan.target)
    else:
        form = "qonnx" if row.back == "QONNX" else "qdq"
        written = to_onnx(model, form=form, opset=opset)
        if next(e.version for e in written.opset_import if not e.domain) != opset:
            return False
        again = model_from_onnx(written, target=model.plan.target)
    same = again.qparams.keys() == model.qparams.keys()
    return same and all(bool((again.qparams[k] == v).all()) for k, v in model.qparams.items())


# ---------------------------------------------------------------------------------------------------------------------
# The table


def measured(row: Row) -> tuple[str, ...]:
    """A line of the table."""
    model = read(row)
    options = ", ".join(f'{k}="{v}"' for k, v in row.options) + ("batches" if row.batches else "")
    apart_now = fake_quant_apart(row, model)
    if row.encodings:
        integers = "as its QDQ file"
    elif not row.exact:
        x, expected = arrays(row)
        exact = read(row, EXACT)
        integers = f"{apart(exact, jq.run(jq.lower(exact), x), expected):.2f} LSB, scales as they are"
    else:
        distance = equal_integers(row)
        integers = "yes" if distance < 1e-6 else f"{distance:.2f} LSB"
        if distance >= 1e-6 and tables_alone(row):
            integers += ", by a table of int16 values"
    return (
        row.tool, row.form, row.name.rpartition("/")[2], f"yes, {options}" if options else "yes",
        f"{apart_now:.2f}", integers, "yes" if trains(row, model) else "no",
        f"{row.back}, opset {opset_back(row, model)}: {'scales equal' if goes_back(row, model) else 'no'}",
    )  # fmt: skip


HEAD = ("tool", "form", "file", "reads", "fake-quant, LSB", "integers equal", "trains on", "goes back")


def table(rows: list[Row], measure: Callable[[Row], tuple[str, ...]] = measured) -> str:
    lines = [HEAD, tuple("---" for _ in HEAD)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lines += [measure(row) for row in track(rows, "measuring", len(rows))]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


MARK = "<!-- the table is written by tests/support/foreign_files.py -->"


def main() -> None:
    path = FOLDER.parents[1] / "docs" / "other-tools.md"
    head = path.read_text().partition(MARK)[0]
    sys.stdout.write(f"{head}{MARK}\n\n{table(ROWS)}\n")


if __name__ == "__main__":
    main()
