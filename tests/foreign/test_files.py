"""Quantized files of every form: several inputs, free and static batch, branches, external data, size limits."""

import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support.foreign_files import FOLDER, outputs
from support.onnx_helpers import model_of, run_onnxruntime
from support.qdq_nets import Qdq, draw

import jquant as jq
from jquant_converters import from_onnx, model_from_onnx, onnx_export, to_onnx

TARGET = jq.targets.NASH_E
EXACT = TARGET.with_fields({"rescale.post_rounding": "half_even", "rescale.high_precision": True})
FORMS = {  # a file of each form, and how it is read
    "QDQ": ("onnxruntime/qdq_heads", {}),
    "QDQ of com.microsoft": ("onnxruntime/qdq_microsoft_heads", {}),
    "QOperator": ("onnxruntime/qoperator_heads", {}),
    "dynamic": ("onnxruntime/dynamic_residual", {}),
    "QCDQ": ("brevitas/qcdq_signed_4", {}),
    "QONNX": ("brevitas/qonnx_signed_8", {}),
}
QUICK = ["QOperator", "QONNX"]
EACH = pytest.mark.parametrize(
    "form", [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in FORMS], ids=str
)


def file_of(form):
    name, options = FORMS[form]
    return onnx.load(FOLDER / f"{name}.onnx"), options


def same_scales(a, b):
    assert a.qparams.keys() == b.qparams.keys()
    for key, scale in b.qparams.items():
        np.testing.assert_array_equal(a.qparams[key], scale)


@EACH
def test_external_data(form, tmp_path):
    file, options = file_of(form)
    expected = model_from_onnx(file, target=TARGET, **options)
    path = tmp_path / "net.onnx"
    onnx.save_model(file, path, save_as_external_data=True, location="net.data", size_threshold=0,
                    convert_attribute=True)  # fmt: skip
    assert (tmp_path / "net.data").stat().st_size > 300
    same_scales(model_from_onnx(path, target=TARGET, **options), expected)
    with pytest.raises(jq.ConversionError, match=r"lies in the file 'net\.data'; give the path of the model"):
        model_from_onnx(path.read_bytes(), target=TARGET, **options)
    (tmp_path / "net.data").write_bytes(b"short")
    with pytest.raises(jq.ConversionError, match=r"beyond the end of 'net\.data'"):
        model_from_onnx(path, target=TARGET, **options)


@EACH
def test_a_static_batch(form):
    """The batch of the file is that of the model, with the same scales and numbers as with a free one."""
    file, options = file_of(form)
    free = model_from_onnx(file, target=TARGET, shapes={file.graph.input[0].name: (None, 3, 8, 8)}, **options)
    for entry in (*file.graph.input, *file.graph.output):
        entry.type.tensor_type.shape.dim[0].dim_value = 3
    static = model_from_onnx(file, target=TARGET, **options)
    assert static.plan.graph.inputs[0].shape == (3, 3, 8, 8)
    assert free.plan.graph.inputs[0].shape == (None, 3, 8, 8)
    same_scales(static, free)
    if form not in ("dynamic", *QUICK):
        x = jnp.asarray(draw(3, 3, 8, 8))
        for a, b in zip(outputs(jq.apply(static, x)), outputs(jq.apply(free, x)), strict=True):
            np.testing.assert_array_equal(a, b)


def two_inputs(form):
    """y = a + b, at another scale each; b has a static batch of its own, 1."""
    numbers = {"s": np.float32(2**-5), "t": np.float32(2**-4), "u": np.float32(2**-4), "z": np.int8(0)}
    quantized = [
        helper.make_node("QuantizeLinear", [n, s, "z"], [f"{n}q"], f"{n}q") for n, s in (("a", "s"), ("b", "t"))
    ]
    if form == "QOperator":
        nodes = [helper.make_node("QLinearAdd", ["aq", "s", "z", "bq", "t", "z", "u", "z"], ["yq"], "sum",
                                  domain="com.microsoft")]  # fmt: skip
    else:
        nodes = [
            helper.make_node("DequantizeLinear", [f"{n}q", s, "z"], [f"{n}d"], f"{n}d")
            for n, s in (("a", "s"), ("b", "t"))
        ]
        nodes += [
            helper.make_node("Add", ["ad", "bd"], ["r"], "sum"),
            helper.make_node("QuantizeLinear", ["r", "u", "z"], ["yq"], "yq"),
        ]
    nodes.append(helper.make_node("DequantizeLinear", ["yq", "u", "z"], ["y"], "y"))
    operands = {"a": draw(2, 3), "b": draw(2, 3, seed=1)}
    file = model_of([*quantized, *nodes], operands, {"y": TensorProto.FLOAT}, initializers=numbers)
    file.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return file, operands


@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
def test_several_inputs(form):
    file, operands = two_inputs(form)
    model = model_from_onnx(file, target=EXACT)
    (expected,) = run_onnxruntime(file, *operands.values())
    given = [jnp.asarray(v) for v in operands.values()]
    np.testing.assert_array_equal(jq.apply(model, *given), expected)
    np.testing.assert_array_equal(jq.run(jq.lower(model), *given), expected)


@pytest.mark.parametrize("taken", [True, False])
def test_a_branch_of_integers_on_a_constant(taken):
    """Both branches are quantized; the one that is taken has its scale in the model."""
    made = Qdq()
    x = made.pair("x", 2**-5)
    y = made.conv(x, "conv", made.scales[x])
    constants = {"c": np.asarray(taken), "s": np.float32(2**-3), "t": np.float32(2**-2), "z": np.int8(0)}
    for name, array in constants.items():
        made.tensor(name, array)

    def branch(scale):
        nodes = [helper.make_node("QuantizeLinear", [y, scale, "z"], ["q"], "q"),
                 helper.make_node("DequantizeLinear", ["q", scale, "z"], ["d"], "d")]  # fmt: skip
        return helper.make_graph(nodes, "branch", [], [helper.make_tensor_value_info("d", TensorProto.FLOAT, None)])

    made.nodes.append(helper.make_node("If", ["c"], ["y"], "choice", then_branch=branch("s"), else_branch=branch("t")))
    file, x = made.model({"y": 4}), draw(2, 4, 5, 5)
    model = model_from_onnx(file, target=EXACT)
    assert float(model.qparams["conv"]) == (2**-3 if taken else 2**-2)
    np.testing.assert_array_equal(jq.run(jq.lower(model), jnp.asarray(x)), run_onnxruntime(file, x)[0])
    file.graph.initializer.remove(next(t for t in file.graph.initializer if t.name == "c"))
    file.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    with pytest.raises(jq.ConversionError, match="If 'choice'"):
        model_from_onnx(file, target=EXACT)


@pytest.mark.parametrize("form", ["qdq", "qonnx", "float"])
def test_a_file_beyond_what_protobuf_holds(form, tmp_path, monkeypatch):
    """With the limit lowered from 2 GiB; the way round that the error names works."""
    model = model_from_onnx(FOLDER / "onnxruntime" / "qdq_residual.onnx", target=TARGET)
    monkeypatch.setattr(onnx_export, "MAX_BYTES", 2000)
    path = tmp_path / "net.onnx"
    with pytest.raises(jq.ConversionError, match=r"bytes, and a protobuf holds 2000 .*save_as_external_data=True"):
        to_onnx(model, form=form, path=path)
    assert not path.exists()
    onnx.save_model(to_onnx(model, form=form), path, save_as_external_data=True, size_threshold=0)
    if form == "float":
        assert len(from_onnx(path)[0].nodes) >= len(model.plan.graph.nodes)
    else:
        same_scales(model_from_onnx(path, target=TARGET), model)
