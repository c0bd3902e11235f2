"""Files of other tools: their scales, their numbers, and the table of docs/other-tools.md."""

import warnings

import jax
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support import foreign_files
from support.foreign_files import FOLDER, MARK, ROWS, Row

import jquant as jq
from jquant.plan.scales import value_scales

QUICK = [
    "onnxruntime/qdq_inverted",
    "onnxruntime/qoperator_heads",
    "brevitas/qonnx_unsigned_8",
    "aimet/qdq_symmetric_heads",
]
EACH = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
FEW = pytest.mark.parametrize("row", [r for r in ROWS if r.name in QUICK], ids=lambda row: row.key)


def read(row: Row, **options) -> jq.Model:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return foreign_files.read(row, **options)


def scales_of(path) -> dict[str, np.ndarray]:
    """{node and operand: its scales} of every QuantizeLinear, DequantizeLinear, QLinearConv and its like, and Quant."""
    model = onnx.load(path)
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    tensors |= {
        n.output[0]: numpy_helper.to_array(a.t)
        for n in model.graph.node
        if n.op_type == "Constant"
        for a in n.attribute
        if a.name == "value"
    }
    biases = {n.input[2] for n in model.graph.node if n.op_type in ("Conv", "Gemm") and len(n.input) > 2}
    made_from = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    found = {}
    for node in model.graph.node:
        single = node.op_type in ("QuantizeLinear", "DequantizeLinear", "Quant")
        places = (
            (1,)
            if single
            else {"QLinearConv": (1, 4, 6), "QLinearMatMul": (1, 4, 6), "QGemm": (1, 4, 7)}.get(node.op_type, ())
        )
        source = tensors.get(made_from.get(node.input[0], node.input[0]), np.zeros(2))
        if single and (node.output[0] in biases or source.size == 1 or source.dtype == np.int32):
            continue  # a bias has the scale of the product; a number is exact
        for i in places:
            found[f"{node.name} {i}"] = tensors[node.input[i]].astype(np.float32).reshape(-1)
    return found


def check_scales(row: Row, model: jq.Model) -> None:
    """Each scale of the file is one of the model's, or the report has it as what was there before."""
    followed = [
        v for v in value_scales(model.plan, model.qparams).values() if v is not None
    ]  # x * 0.5 has half the scale
    given = [np.asarray(v, np.float32).reshape(-1) for v in [*model.qparams.values(), *followed]]
    known = {v.tobytes() for v in given}
    before = " ".join(f"{r.requested} {r.reason}" for r in model.plan.resolutions)
    for name, scale in scales_of(FOLDER / f"{row.name}.onnx").items():
        told = all(f"{v:.6g}" in before for v in {float(scale.min()), float(scale.max())})
        assert scale.tobytes() in known or told, f"{name}: {scale[:4]}"


def check_numbers(row: Row, model: jq.Model) -> None:
    distance = foreign_files.fake_quant_apart(row, model)
    # Where the row says 0: float32 sums in another order, of values of a few hundred steps at most.
    assert distance <= row.lsb + 2e-3, distance


@FEW
def test_scales_of_a_file_are_kept_or_listed_and_its_numbers_come_out(row):
    model = read(row)
    check_scales(row, model)
    check_numbers(row, model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "row", [r for r in ROWS if not r.encodings and not r.name.startswith("torch")], ids=lambda r: r.key
)
def test_every_scale_of_every_file(row):
    if not row.batches:
        check_scales(row, read(row))


@pytest.mark.slow
@EACH
def test_fake_quant_of_every_file(row):
    check_numbers(row, read(row))


@pytest.mark.parametrize("name", ["onnxruntime/qdq_residual"])
def test_integers_are_onnxruntimes_where_scales_are_powers_of_two(name):
    assert foreign_files.equal_integers(next(r for r in ROWS if r.name == name)) == 0


@pytest.mark.slow
def test_a_file_trains_on_and_goes_back():
    row = next(r for r in ROWS if r.name == "brevitas/qonnx_signed_4")
    model = read(row)
    assert foreign_files.trains(row, model)
    assert foreign_files.goes_back(row, model)


def test_a_file_can_be_calibrated_again():
    row = next(r for r in ROWS if r.name == "onnxruntime/qdq_residual")
    model = read(row)
    x, _ = foreign_files.arrays(row)
    again = jq.calibrate(model, [x])
    assert again.qparams.keys() == model.qparams.keys()
    assert any(
        float(a.max()) != float(b.max())
        for a, b in zip(*map(jax.tree.leaves, (again.qparams, model.qparams)), strict=True)
    )


# ---------------------------------------------------------------------------------------------------------------------
# The table


def lines() -> list[list[str]]:
    text = (FOLDER.parents[1] / "docs" / "other-tools.md").read_text()
    rows = [line for line in text.partition(MARK)[2].splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in rows]


def test_the_table_has_a_line_for_every_file_and_no_empty_cell():
    head, _, *rows = lines()
    assert tuple(head) == foreign_files.HEAD
    assert [(r[0], r[1], r[2]) for r in rows] == [(r.tool, r.form, r.name.rpartition("/")[2]) for r in ROWS]
    for row, line in zip(ROWS, rows, strict=True):
        assert all(line), line
        assert line[3].startswith("yes"), line
        assert float(line[4]) <= row.lsb + 0.01, line
        assert line[6] == "yes", line
        assert line[7].endswith("scales equal"), line


def test_the_files_are_small_and_all_of_them_are_in_the_table():
    files = [p for p in FOLDER.rglob("*") if p.is_file() and p.suffix in (".onnx", ".npz", ".json", ".pt2")]
    assert sum(p.stat().st_size for p in files) <= 1_000_000
    named = {row.name for row in ROWS} | {"aimet/float_residual"}
    assert {str(p.relative_to(FOLDER).with_suffix("")) for p in files if p.suffix == ".npz"} <= named


@pytest.mark.slow
@EACH
def test_the_table_is_what_is_measured(row):
    """Distances to a tenth: the order of float32 sums differs between machines."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = foreign_files.measured(row)
    line = next(line for line in lines() if line[1:4] == list(found[1:4]))
    assert [*line[:4], *line[6:]] == [*found[:4], *found[6:]]
    assert abs(float(line[4]) - float(found[4])) <= 0.1 + 0.05 * float(line[4])
