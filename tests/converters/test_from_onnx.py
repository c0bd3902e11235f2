"""`from_onnx` and `model_from_onnx`: what to_onnx writes, the cases of the onnx package, old opsets, QDQ models."""

import json
import re
import warnings
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from support import architectures, onnx_cases
from support import onnx_helpers as helpers
from support.onnx_helpers import draw, model_of, quantized_conv

import jquant as jq
from jquant import ops
from jquant.graph.float import evaluate_float
from jquant_converters import from_onnx, from_torch, model_from_onnx, to_onnx
from jquant_converters.onnx_in import TABLE

QUICK = ("shufflenet", "video", "gru", "mobilenet_v3")


def assert_near(actual, expected):
    """As in test_to_onnx: 1e-5 of the largest value, and integers exactly."""
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        scale = max(1.0, float(np.abs(e).max())) if e.dtype == np.float32 else 0
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(e, np.float64), rtol=0, atol=1e-5 * scale)


# ---------------------------------------------------------------------------------------------------------------------
# What to_onnx writes


@pytest.mark.parametrize("name", helpers.CASES)
def test_an_operator_comes_back(name):
    case = helpers.CASES[name]
    graph, params = helpers.graph_of(case)
    again, kept = from_onnx(to_onnx(graph, params).SerializeToString())
    assert [i.shape for i in again.inputs] == [i.shape for i in graph.inputs]
    values = tuple(map(jnp.asarray, case[1]))
    assert_near(evaluate_float(again, kept, *values), [np.asarray(v) for v in evaluate_float(graph, params, *values)])


def to_jax(name, batch, seed):
    tensors = architectures.inputs(name, batch, seed=seed)
    return tuple(jnp.asarray(x.to(torch.int32).numpy() if x.dtype == torch.int64 else x.numpy()) for x in tensors)


def check_float_round_trip(name):
    graph, params = from_torch(architectures.build(name), architectures.inputs(name, 1, seed=0))
    again, kept = from_onnx(to_onnx(graph, params))
    for batch in (1, 3):
        x = to_jax(name, batch, batch)
        expected = [np.asarray(v) for v in jax.jit(lambda *x: evaluate_float(graph, params, *x))(*x)]
        assert_near(jax.jit(lambda *x: evaluate_float(again, kept, *x))(*x), expected)
    return graph, again


@pytest.mark.parametrize("name", QUICK)
def test_networks_come_back(name):
    graph, again = check_float_round_trip(name)
    layers = {n.name for n in graph.nodes if "weight" in n.op.weight_roles}
    assert layers == {n.name for n in again.nodes if "weight" in n.op.weight_roles}


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in architectures.ARCHITECTURES if n not in QUICK])
def test_other_networks_come_back(name):
    check_float_round_trip(name)


def test_outputs_that_are_exact_inputs():
    """Identities of masks and pixels have no node; one that is float keeps the name of its output."""
    nodes = [onnx.helper.make_node("Identity", [x], [f"{x}_out"]) for x in ("mask", "pixels", "real")]
    kinds = {"mask": onnx.TensorProto.BOOL, "pixels": onnx.TensorProto.UINT8, "real": onnx.TensorProto.FLOAT}
    entries = [
        [onnx.helper.make_tensor_value_info(f"{name}{end}", kind, ["batch", 3]) for name, kind in kinds.items()]
        for end in ("", "_out")
    ]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "net", *entries), opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9
    )
    graph, params = from_onnx(model)
    assert graph.outputs == ("mask", "pixels", "real_out")
    given = np.array([[True, False, True]]), np.uint8([[1, 2, 255]]), np.float32([[0.5, -1, 2]])
    for a, b in zip(evaluate_float(graph, params, *given), given, strict=True):
        np.testing.assert_array_equal(a, b)


def calibrated(name, dtype="int8"):
    graph, params = from_torch(architectures.build(name), architectures.inputs(name, 1, seed=0))
    qconfig = jq.QConfig({"*": jq.Policy(output=getattr(jq, dtype)(), weight=jq.int8(axis="out"))})
    model = jq.prepare(graph, params, qconfig, target=jq.targets.NASH_E)
    return jq.calibrate(model, [to_jax(name, 4, s) for s in range(2)])


def check_integer_round_trip(name, dtype):
    """torch -> jquant -> ONNX -> jquant: the same scales and the same integers out."""
    model = calibrated(name, dtype)
    again = model_from_onnx(to_onnx(model).SerializeToString(), target=model.plan.target)
    assert again.qparams.keys() == model.qparams.keys()
    for key, scale in model.qparams.items():
        np.testing.assert_array_equal(again.qparams[key], scale)
    assert {n: s and s.dtype for n, s in again.plan.values.items() if n in again.plan.owned} == {
        n: s and s.dtype for n, s in model.plan.values.items() if n in model.plan.owned
    }
    x = to_jax(name, 3, 9)
    first, second = (jax.tree.leaves(jq.run(jq.lower(p), *x)) for p in (model, again))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    return model.plan, again.plan


def test_a_plan_comes_back():
    plan, again = check_integer_round_trip("video", "int8")
    assert again.graph == plan.graph
    assert again.owned == plan.owned


def quantized_attention(output, quantizer=None):
    """Softmax and a norm, whose inner values are int16 with tables, and an addition behind a layer and a dropout."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer, self.norm = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6), torch.nn.LayerNorm(6)
            self.dropout = torch.nn.Dropout(0.5)

        def forward(self, x):
            y = torch.softmax(self.inner(x), -1) * x
            return self.norm(x + self.dropout(self.outer(y)))

    torch.manual_seed(0)
    graph, params = from_torch(Block().eval(), (torch.zeros(1, 4, 6),))
    policy = jq.Policy(output=output, weight=jq.int8(axis="out", quantizer=quantizer))
    model = jq.prepare(graph, params, jq.QConfig({"*": policy}), target=jq.targets.NASH_E)
    x = jnp.asarray(torch.randn(5, 4, 6).numpy())
    return jq.calibrate(model, [x]), x


@pytest.mark.parametrize("dtype", [jq.int8, jq.int16], ids=["int8", "int16"])
def test_chains_of_int16_come_back_with_their_tables_observers_and_quantizers(dtype):
    model, x = quantized_attention(dtype(observer=jq.observers.percentile(99.5)), jq.lsq)
    again = model_from_onnx(to_onnx(model), target=model.plan.target)
    expected = jq.run(jq.lower(model), x)
    np.testing.assert_array_equal(jq.run(jq.lower(again), x), expected)
    assert again.qparams.keys() == model.qparams.keys()
    tables = {n.name: n.op.table for n in model.plan.graph.nodes if getattr(n.op, "table", None)}
    assert len(tables) >= 3
    assert {n.name: n.op.table for n in again.plan.graph.nodes if getattr(n.op, "table", None)} == tables
    assert {n: again.plan.spec(n) for n in again.plan.owned} == {n: model.plan.spec(n) for n in model.plan.owned}
    assert again.plan.weights == model.plan.weights


def test_what_the_file_says_of_a_format_counts_more_than_its_notes():
    model, _ = quantized_attention(jq.int8())
    file = to_onnx(model)
    (entry,) = (e for e in file.metadata_props if e.key == "jquant.plan")
    notes = json.loads(entry.value)
    changed = next(name for name in model.plan.owned if model.plan.spec(name).dtype == "int8")
    notes["specs"][changed] = {"dtype": "int16", "fixed_scale": 1.0}
    fixed = next(name for name in model.plan.owned if model.plan.spec(name).fixed_scale)
    notes["specs"][fixed]["fixed_scale"] *= 2
    entry.value = json.dumps(notes)
    again = model_from_onnx(file, target=model.plan.target)
    assert again.plan.spec(changed).dtype == "int8"
    assert again.plan.spec(changed).fixed_scale is None
    assert float(again.qparams[changed]) == float(model.qparams[changed])
    assert again.plan.spec(fixed).fixed_scale is None
    assert float(again.qparams[fixed]) == np.float32(model.plan.spec(fixed).fixed_scale)


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "{}", '{"jquant": 2, "specs": {}, "tables": {}}', '{"jquant": 1, "specs": [], "tables": {}}',
     '{"jquant": 1, "specs": {"x": {"dtype": "int9"}}, "tables": {}}', '{"jquant": 1, "specs": {"x": 3}, "tables": {}}',
     '{"jquant": 1, "specs": {}, "tables": {"x": {"num_tables": 0}}}',
     '{"jquant": 1, "specs": {}, "tables": {"x": {"size": 7}}}', "[" * 100000],
)  # fmt: skip
def test_damaged_notes_are_refused(text):
    model, _ = quantized_attention(jq.int8())
    file = to_onnx(model)
    (entry,) = (e for e in file.metadata_props if e.key == "jquant.plan")
    entry.value = text
    with pytest.raises(jq.ConversionError, match=r"metadata 'jquant\.plan' of the model is damaged"):
        model_from_onnx(file, target=model.plan.target)


def test_an_addition_behind_a_rounded_layer_is_not_fused():
    """A foreign file: the layer's own pair says that it is rounded before the addition."""
    model, _ = quantized_attention(jq.int8())
    file = to_onnx(model)
    del file.metadata_props[:]
    again = model_from_onnx(file, target=model.plan.target)
    assert not any(getattr(node.op, "addend", False) for node in again.plan.graph.nodes)
    assert {"outer", "add"} <= set(again.plan.owned)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [("vit", "int8"), ("vit", "int16"), ("swin", "int8"), ("gru", "int16")])
def test_integers_of_networks_with_chains_come_back(name, dtype):
    """Constants of a GRU come back in parts, so that the scales have other names."""
    model = calibrated(name, dtype)
    again = model_from_onnx(to_onnx(model), target=model.plan.target)
    x = to_jax(name, 3, 9)
    first, second = (jax.tree.leaves(jq.run(jq.lower(p), *x)) for p in (model, again))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("name", ["resnet", "mobilenet_v3", "densenet", "unet", "shufflenet", "deeplab", "video"])
def test_plans_come_back(name, dtype):
    check_integer_round_trip(name, dtype)


def with_large_biases():
    """A linear layer of int16 values, most biases of which have more than 24 bits."""
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.normal(size=(64, 8)) * 0.003, jnp.float32),
        "b": jnp.asarray(rng.uniform(-0.1, 0.1, 64), jnp.float32),
    }
    node = jq.Node("y", ops.Linear(), ("x",), jq.FrozenMap({"weight": "w", "bias": "b"}))
    graph = jq.Graph((jq.Input("x", (None, 8)),), (node,), ("y",))
    qconfig = jq.QConfig({"*": jq.Policy(output=jq.int16(), weight=jq.int8(axis="out"))})
    model = jq.prepare(graph, params, qconfig, target=jq.targets.NASH_E)
    return jq.calibrate(model, [jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)])


def test_biases_beyond_24_bits_come_back():
    """A file has them as int32, at float32(s_x * s_w); float32 holds 24 bits, and the chip has the exact product."""
    model = with_large_biases()
    again = model_from_onnx(to_onnx(model), target=model.plan.target)
    first, second = (np.asarray(jq.lower(m).constants["y"]["bias"]) for m in (model, again))
    assert (np.abs(first) > 2**24).sum() > 20
    np.testing.assert_array_equal(second, first)


def test_qonnx_says_how_far_its_biases_are_off():
    """A Quant node rounds float32 numbers, of 24 bits. The figure is that of its own rounding, x / scale."""
    model = with_large_biases()
    integers = np.asarray(jq.lower(model).constants["y"]["bias"], np.int64)
    with pytest.warns(UserWarning, match=r"loses bits of '.*' \(up to (\d+) LSB\); form='qdq' keeps them") as caught:
        file = to_onnx(model, form="qonnx")
    (said,) = re.findall(r"up to (\d+) LSB", str(caught[0].message))
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in file.graph.initializer}
    quants = [node for node in file.graph.node if node.op_type == "Quant" and node.input[0] in constants]
    (bias,) = (node for node in quants if constants[node.input[0]].shape == (64,))
    read = np.rint(constants[bias.input[0]] / constants[bias.input[1]]).astype(np.int64)
    assert np.abs(read - integers).max() == int(said) > 0
    small = model.replace(params=model.params | {"b": model.params["b"] * 1e-3})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_onnx(small, form="qonnx")


def quantized_by_onnxruntime(name, folder):
    """A float model of ours, quantized by onnxruntime's own tool."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Batches(CalibrationDataReader):
        def __init__(self):
            self.left = [{"x": np.asarray(to_jax(name, 4, s)[0])} for s in range(2)]

        def get_next(self):
            return self.left.pop() if self.left else None

    graph, params = from_torch(architectures.build(name), architectures.inputs(name, 1, seed=0))
    model = jq.prepare(graph, params, jq.QConfig({"*": None}), target=jq.targets.NASH_E)  # folds batch norm
    to_onnx(model, form="float", path=folder / "float.onnx")
    quantize_static(
        folder / "float.onnx",
        folder / "qdq.onnx",
        Batches(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
    )
    return folder / "qdq.onnx"


def check_foreign(name, folder, steps):
    """Integers of a model that onnxruntime quantized, against its own run of it, in steps of the output."""
    path = quantized_by_onnxruntime(name, folder)
    model = model_from_onnx(path, target=jq.targets.NASH_E)
    program = jq.lower(model)
    (x,) = to_jax(name, 3, 9)
    (expected,) = helpers.run_onnxruntime(onnx.load(path), x)
    step = float(program.scales[program.graph.outputs[0]])
    assert np.abs(np.asarray(jq.run(program, x)) - expected).max() <= (steps + 0.01) * step


def test_a_model_that_onnxruntime_quantized(tmp_path):
    check_foreign("video", tmp_path, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "densenet"])
def test_larger_models_that_onnxruntime_quantized(name, tmp_path):
    """Differences of one step add up over the layers."""
    check_foreign(name, tmp_path, 4)


def test_a_table_shared_by_an_embedding_and_a_linear_layer():
    """The one is quantized as a value, the other as a weight."""
    graph = jq.Graph(
        (jq.Input("ids", (None, 5), "int32"),),
        (
            jq.Node("rows", ops.Embedding(), ("ids",), jq.FrozenMap({"weight": "table"})),
            jq.Node("head", ops.Linear(), ("rows",), jq.FrozenMap({"weight": "table"})),
        ),
        ("head",),
    )
    params = {"table": jnp.asarray(draw(7, 4))}
    ids = jnp.asarray(np.arange(10).reshape(2, 5) % 7, jnp.int32)
    qconfig = jq.QConfig({"*": jq.Policy(output=jq.int16(), weight=jq.int8(axis="out"))})
    model = jq.prepare(graph, params, qconfig, target=jq.targets.NASH_E)
    model = jq.calibrate(model, [ids])
    again = model_from_onnx(to_onnx(model), target=model.plan.target)
    np.testing.assert_array_equal(jq.run(jq.lower(again), ids), jq.run(jq.lower(model), ids))


# ---------------------------------------------------------------------------------------------------------------------
# The cases of the onnx package


def check_cases(cases):
    counts, wrong, unclear = Counter(), [], []
    for case in cases:
        found, why = onnx_cases.outcome(case)
        counts[found] += 1
        if found == "mismatch":
            wrong.append(f"{case.name}: {why}")
        if found == "refused" and len(why) < 20:
            unclear.append(case.name)
    assert not wrong, "\n".join(wrong)
    assert not unclear
    return counts


def test_a_sample_of_the_node_cases():
    """Every twelfth; the counts of all are in the slow test."""
    cases = [c for c in onnx_cases.node_cases() if c.model.graph.node[0].op_type not in onnx_cases.QUANTIZED]
    counts = check_cases(cases[::12])
    # A tenth of the cases are of Attention, most of them with a cache, a window or scores as outputs.
    assert counts["pass"] >= 0.55 * sum(counts.values()), counts


@pytest.mark.slow
def test_all_node_cases():
    counts, notes, by_operator = onnx_cases.sweep()
    assert not notes["mismatch"], "\n".join(notes["mismatch"])
    assert all(len(line) > 30 for line in notes["refused"])
    assert counts["pass"] >= 620, counts
    never = {kind for kind, found in by_operator.items() if not found["pass"]}
    assert never <= REFUSED, never - REFUSED


# Known by name, for a clear error. The cases of GRU, PRelu and Trilu have attributes, slopes and types that are not
# read.
REFUSED = {
    "BitShift", "CastLike", "ConvInteger", "DynamicQuantizeLinear", "GRU", "If", "IsInf", "IsNaN", "Loop",
    "MatMulInteger", "NonZero", "PRelu", "QLinearConv", "QLinearMatMul", "RoiAlign", "Scan", "Trilu", "Upsample",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Old opsets, compared with onnxruntime


I64 = np.int64
OLD = {
    "softmax over the rest": (10, "Softmax", {"axis": 1}, {}, (2, 3, 4)),
    "softmax of a matrix": (12, "Softmax", {}, {}, (2, 5)),
    "clip": (10, "Clip", {"min": -0.5, "max": 0.6}, {}, (2, 3)),
    "pad": (10, "Pad", {"pads": [0, 1, 0, 2], "value": 0.5}, {}, (2, 3)),
    "slice": (10, "Slice", {}, {"starts": [1], "ends": [-1], "axes": [1]}, (2, 5)),
    "squeeze": (11, "Squeeze", {"axes": [1]}, {}, (2, 1, 3)),
    "unsqueeze": (11, "Unsqueeze", {"axes": [1, -1]}, {}, (2, 3)),
    "sum": (11, "ReduceSum", {"axes": [1], "keepdims": 0}, {}, (2, 3)),
    "mean": (13, "ReduceMean", {"axes": [1]}, {}, (2, 3)),
    "dropout": (10, "Dropout", {"ratio": 0.5}, {}, (2, 3)),
    "nearest": (10, "Resize", {"mode": "nearest"}, {"scales": np.float32([1, 1, 2, 2])}, (1, 2, 3, 3)),
    "average pool": (10, "AveragePool", {"kernel_shape": [2, 2], "ceil_mode": 1}, {}, (1, 2, 5, 5)),
    "same pads": (
        11, "MaxPool", {"kernel_shape": [3, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"}, {}, (1, 2, 5, 6),
    ),
    "depth": (11, "DepthToSpace", {"blocksize": 2, "mode": "DCR"}, {}, (1, 8, 2, 3)),
    "flatten": (10, "Flatten", {"axis": 2}, {}, (2, 3, 4)),
    "top": (10, "TopK", {"axis": 1}, {"k": [2]}, (2, 5)),
    "resize by sizes": (
        13, "Resize", {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
        {"roi": np.float32([]), "scales": np.float32([]), "sizes": [1, 2, 7, 4]}, (1, 2, 3, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_old_opsets(name):
    opset, kind, attributes, constants, shape = OLD[name]
    stored = {k: v if isinstance(v, np.ndarray) else np.asarray(v, I64) for k, v in constants.items()}
    outputs = ["y"] + (["places"] if kind == "TopK" else [])
    node = helper.make_node(kind, ["x", *stored], outputs, "node", **attributes)
    x = draw(*shape)
    model = model_of([node], {"x": x}, {"y": TensorProto.FLOAT}, opset=opset, initializers=stored)
    graph, params = from_onnx(model)
    (expected,) = helpers.run_onnxruntime(model, x)
    assert_near(evaluate_float(graph, params, jnp.asarray(x)), [expected])


def test_a_shape_that_follows_from_the_batch():
    """Shape, Gather, Unsqueeze, Concat, Reshape: what exporters write for `x.view(x.size(0), -1)`."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["batch"], axis=0),
        helper.make_node("Unsqueeze", ["batch", "axes"], ["first"]),
        helper.make_node("Concat", ["first", "rest"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["x", "wanted"], ["y"], "view"),
    ]
    constants = {"zero": np.asarray(0, I64), "axes": np.asarray([0], I64), "rest": np.asarray([-1], I64)}
    model = model_of(nodes, {"x": draw(2, 3, 4)}, {"y": TensorProto.FLOAT}, initializers=constants)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    graph, _ = from_onnx(model)
    assert [(n.name, n.op) for n in graph.nodes] == [("view", ops.Reshape(shape=(-1, 12)))]
    assert graph.inputs[0].shape == (None, 3, 4)


def test_inputs_without_a_shape():
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": draw(2, 3)}, {"y": TensorProto.FLOAT})
    model.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(jq.ConversionError, match="has no shape in the file; give it: shapes="):
        from_onnx(model)
    assert from_onnx(model, shapes={"x": (None, 3)})[0].inputs[0].shape == (None, 3)
    del model.graph.input[0].type.tensor_type.shape.dim[:]
    model.graph.input[0].type.tensor_type.shape.dim.add(dim_value=2)
    model.graph.input[0].type.tensor_type.shape.dim.add(dim_param="width")
    with pytest.raises(jq.ConversionError, match="axis 1 of input 'x' is free"):
        from_onnx(model)


def test_everything_unknown_is_listed():
    nodes = [
        helper.make_node("Hardmax", ["x"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["b"], "behind"),
        helper.make_node("Mystery", ["b"], ["y"], "second", domain="somebody"),
        helper.make_node("NonZero", ["x"], ["z"], "third"),
    ]
    model = model_of(nodes, {"x": draw(2, 3)}, {"y": TensorProto.FLOAT, "z": TensorProto.INT64})
    with pytest.raises(jq.ConversionError) as error:
        from_onnx(model)
    lines = [line for line in str(error.value).splitlines() if line.startswith("  ")]
    assert [line.split("'")[1] for line in lines] == ["first", "second", "third"]


def test_patterns():
    """What exporters write in several nodes is one operator."""
    constants = {
        "half": np.float32(0.5), "root": np.float32(2**0.5), "one": np.float32(1), "eps": np.float32(1e-3),
    }  # fmt: skip
    nodes = [
        helper.make_node("Div", ["x", "root"], ["a"]),
        helper.make_node("Erf", ["a"], ["b"]),
        helper.make_node("Add", ["b", "one"], ["c"]),
        helper.make_node("Mul", ["x", "c"], ["d"]),
        helper.make_node("Mul", ["d", "half"], ["gelu"], "gelu"),
        helper.make_node("Sigmoid", ["x"], ["s"]),
        helper.make_node("Mul", ["s", "x"], ["silu"], "silu"),
        helper.make_node("Mul", ["x", "x"], ["square"]),
        helper.make_node("Add", ["square", "eps"], ["shifted"]),
        helper.make_node("Sqrt", ["shifted"], ["sqrt"]),
        helper.make_node("Reciprocal", ["sqrt"], ["rsqrt"], "rsqrt"),
    ]
    outputs = dict.fromkeys(("gelu", "silu", "rsqrt"), TensorProto.FLOAT)
    graph, _ = from_onnx(model_of(nodes, {"x": draw(2, 3)}, outputs, initializers=constants))
    assert {n.name: n.op for n in graph.nodes if n.name in outputs} == {
        "gelu": ops.Gelu(), "silu": ops.Silu(), "rsqrt": ops.Rsqrt(epsilon=1e-3),
    }  # fmt: skip
    assert len(graph.nodes) == 4  # and the square


# ---------------------------------------------------------------------------------------------------------------------
# QDQ models


def test_a_qdq_model_is_a_calibrated_plan():
    file, constants = quantized_conv()
    model = model_from_onnx(file, target=jq.targets.NASH_E.with_fields({"rescale.post_rounding": "half_even"}))
    assert {n.name: type(n.op).__name__ for n in model.plan.graph.nodes if n.op.weight_roles} == {"conv": "Conv"}
    assert model.plan.graph.by_name["conv"].op.activation == "relu"
    assert model.plan.weights["w"] == jq.int8(axis="out")
    assert set(model.qparams) == {"x", "conv", "w"}
    np.testing.assert_array_equal(model.qparams["w"], constants["s_w"])
    program = jq.lower(model)
    np.testing.assert_array_equal(
        np.moveaxis(np.asarray(program.constants["conv"]["weight"]), (-1, -2), (0, 1)), constants["w"]
    )
    np.testing.assert_array_equal(program.constants["conv"]["bias"], constants["b"])
    x = draw(2, 3, 5, 5)
    (expected,) = helpers.run_onnxruntime(file, x)
    apart = np.abs(np.asarray(jq.run(program, jnp.asarray(x))) - expected) / 0.25
    assert apart.max() <= 1.001
    assert (apart < 0.5).mean() > 0.98


def test_an_output_without_a_pair_keeps_its_accumulator():
    for relu in (False, True):
        file, _ = quantized_conv(outputs_on_grid=False, relu=relu)
        model = model_from_onnx(file, target=jq.targets.NASH_E)
        program = jq.lower(model)
        assert program.formats["conv"].output == "int32"
        x = draw(2, 3, 5, 5)
        (expected,) = helpers.run_onnxruntime(file, x)
        # float32 sums of up to 28 products in another order
        np.testing.assert_allclose(
            jq.run(program, jnp.asarray(x)), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
        )


def test_a_value_that_is_read_off_its_grid_too():
    """The convolution keeps its accumulator for the output, and is computed once more for the pair."""
    file, _ = quantized_conv(relu=False, raw=True)
    model = model_from_onnx(file, target=jq.targets.NASH_E)
    assert model.plan.values["conv"].dtype == "int32"
    assert type(model.plan.graph.by_name["y"].op).__name__ == "Conv"
    assert "read with two scales" in jq.explain(model)
    x = draw(2, 3, 5, 5)
    expected = helpers.run_onnxruntime(file, x)
    for found in (jq.apply(model, jnp.asarray(x)), jq.run(jq.lower(model), jnp.asarray(x))):
        for a, e in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=0, atol=0.2501)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x_zero": 3}, r"'x_q'.*zero point 3 of int8(.|\n)*'y_q'(.|\n)*Quantize symmetrically .*zero_point=\"widen\""),
        ({"w_zero": -90}, r"DequantizeLinear .*'w_d'.*zero point -90 of int8"),
        ({"x_dtype": np.uint8}, "zero point 0 of uint8"),
        ({"x_zero": 127, "x_dtype": np.uint8}, "zero point 127 of uint8"),
    ],
)
def test_what_is_not_symmetric_is_refused_by_name(options, message):
    with pytest.raises(jq.ConversionError, match=message):
        model_from_onnx(quantized_conv(**options)[0], target=jq.targets.NASH_E)


def test_each_kind_of_model_has_its_function():
    with pytest.raises(jq.ConversionError, match="model_from_onnx"):
        from_onnx(quantized_conv()[0])
    float_model = model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": draw(2, 3)}, {"y": TensorProto.FLOAT})
    with pytest.raises(jq.ConversionError, match="no QuantizeLinear"):
        model_from_onnx(float_model, target=jq.targets.NASH_E)


def test_scales_that_the_file_does_not_have():
    """A softmax is a chain of int16 values here, and a file has one scale for it: the others follow."""
    constants = {"s": np.float32(0.01), "t": np.float32(1 / 128), "z": np.asarray(0, np.int8)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["a"]),
        helper.make_node("DequantizeLinear", ["a", "s", "z"], ["b"]),
        helper.make_node("Softmax", ["b"], ["c"], "softmax"),
        helper.make_node("QuantizeLinear", ["c", "t", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["d", "t", "z"], ["y"]),
    ]
    file = model_of(nodes, {"x": draw(2, 3)}, {"y": TensorProto.FLOAT}, initializers=constants)
    model = model_from_onnx(file, target=jq.targets.NASH_E)
    x = draw(2, 3)
    (expected,) = helpers.run_onnxruntime(file, x)
    for found in (jq.apply(model, jnp.asarray(x)), jq.run(jq.lower(model), jnp.asarray(x))):
        assert np.abs(np.asarray(found) - expected).max() <= 1.001 / 128
    given = {"x": 0.01, "softmax": 1 / 128}
    assert {n: float(model.qparams[n]) for n in given} == {n: float(np.float32(v)) for n, v in given.items()}
    rows = {row.name: row for row in model.plan.resolutions}
    assert rows["softmax.sum"].requested == "float"
    assert "no pair in the file at" in rows["softmax.sum"].reason
    assert float(model.qparams["softmax.sum"]) == pytest.approx(3 / 32767)  # of three numbers in [0, 1]


def test_the_table_is_one_line_an_operator():
    assert len(TABLE) >= 100
    known = {s.name for s in onnx.defs.get_all_schemas()}
    assert set(TABLE) <= known | {"Upsample"}


@pytest.mark.parametrize("divisor", [2, 8, 3, 12, -4, -7])
def test_whole_numbers_divide_towards_zero(divisor):
    """onnxruntime divides as C does."""
    node = helper.make_node("Div", ["x", "d"], ["y"], "node")
    stored = {"d": np.asarray([divisor], np.int32)}
    model = model_of([node], {"x": np.zeros((2, 9), np.int32)}, {"y": TensorProto.INT32}, initializers=stored)
    graph, params = from_onnx(model)
    x = np.array(
        [[-17, -12, -8, -1, 0, 1, 7, 8, 2**30 + 5], [-(2**31) + 1, -9, 2**31 - 1, 3, 12, 13, -13, 4, -4]], np.int32
    )
    (expected,) = helpers.run_onnxruntime(model, x)
    np.testing.assert_array_equal(np.asarray(evaluate_float(graph, params, jnp.asarray(x))[0]), expected)
