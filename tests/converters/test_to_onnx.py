"""`to_onnx` against onnxruntime with optimizations off and onnx.reference: float, and QDQ to the last bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import architectures, graphs
from support import onnx_helpers as helpers

import jquant as jq
from jquant import ops
from jquant.graph.float import evaluate_float, value_shapes
from jquant_converters import from_torch, to_onnx
from jquant_converters.onnx_export import METADATA, quantization_table
from jquant_converters.onnx_out import emit, framework_layout

# ONNX rounds the float quotient half to even, from the whole product.
EXACT = jq.targets.NASH_E.with_fields({"rescale.post_rounding": "half_even", "rescale.high_precision": True})
NOT_IN_REFERENCE = ("warping",)  # as in helpers.NOT_IN_REFERENCE
QUICK = ("shufflenet", "video", "warping", "vit", "gru")


def to_numpy(tensors):
    return [x.to(torch.int32).numpy() if x.dtype == torch.int64 else x.numpy() for x in tensors]


def imported(name):
    return from_torch(architectures.build(name), architectures.inputs(name, 1, seed=0))


def assert_near(actual, expected):
    """Float32 sums in another order, and functions that differ in their last bits: 1e-5 of the largest value."""
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        if e.dtype == np.float32:
            np.testing.assert_allclose(a, e, rtol=0, atol=1e-5 * max(1.0, float(np.abs(e).max())))
        else:
            np.testing.assert_array_equal(a, e)


# ---------------------------------------------------------------------------------------------------------------------
# Float


@pytest.mark.parametrize("name", helpers.CASES)
def test_one_operator(name):
    case = helpers.CASES[name]
    graph, params = helpers.graph_of(case)
    expected = [np.asarray(v) for v in evaluate_float(graph, params, *map(jnp.asarray, case[1]))]
    model = to_onnx(graph, params)
    assert_near(helpers.run_onnxruntime(model, *case[1]), expected)
    if name not in helpers.NOT_IN_REFERENCE:
        assert_near(helpers.run_reference(model, *case[1]), expected)
    assert model.graph.output[0].name == "layer"


def test_every_rule_has_a_case():
    """What `emit` knows, each class of it. A batch that a constant takes from an input is in the networks."""
    tested = {type(op) for op, *_ in helpers.CASES.values()}
    assert tested == {cls for cls in emit.registry if cls not in (object, jq.ops.Op)}


def check_float(name):
    graph, params = imported(name)
    model = to_onnx(graph, params)
    run, reference = helpers.session(model), onnx.reference.ReferenceEvaluator(model)
    for batch in (1, 3):
        x = to_numpy(architectures.inputs(name, batch, seed=batch))
        expected = [np.asarray(v) for v in jax.jit(lambda *x: evaluate_float(graph, params, *x))(*x)]
        assert_near(run.run(None, helpers.feeds(model, x)), expected)
        if name not in NOT_IN_REFERENCE:
            assert_near(reference.run(None, helpers.feeds(model, x)), expected)


@pytest.mark.parametrize("name", QUICK)
def test_float_networks(name):
    check_float(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in architectures.ARCHITECTURES if n not in QUICK])
def test_other_float_networks(name):
    check_float(name)


# ---------------------------------------------------------------------------------------------------------------------
# QDQ


def calibrated(graph, params, batches, *, dtype="int8", level=0, target=EXACT, weight=None, rules=None):
    policy = jq.Policy(output=getattr(jq, dtype)(), weight=weight or jq.int8(axis="out"))
    qconfig = jq.config.consistency(jq.QConfig({"*": policy, **(rules or {})}), level)
    model = jq.prepare(graph, params, qconfig, target=target)
    return jq.calibrate(model, batches)


def network(name, **options):
    batches = [tuple(map(jnp.asarray, to_numpy(architectures.inputs(name, 4, seed=s)))) for s in range(2)]
    return calibrated(*imported(name), batches, **options)


def assert_equal_to_integers(quantized, x):
    """Both runtimes against the integer program, every output bit."""
    program, model = jq.lower(quantized), to_onnx(quantized)
    expected = [np.asarray(v) for v in jax.tree.leaves(jq.run(program, *map(jnp.asarray, x)))]
    for actual in (helpers.run_onnxruntime(model, *x), helpers.run_reference(model, *x)):
        for a, e in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(a, e)


@pytest.mark.parametrize("name", ["shufflenet"])
def test_powers_of_two_are_exact(name):
    assert_equal_to_integers(network(name, level=2), to_numpy(architectures.inputs(name, 3, seed=9)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["video", "resnet", "mobilenet_v3", "densenet"])
def test_powers_of_two_are_exact_in_larger_networks(name):
    """DenseNet has averages over 16, MobileNet tables and averages over 64."""
    assert_equal_to_integers(network(name, level=2), to_numpy(architectures.inputs(name, 3, seed=9)))


def steps_apart(quantized, x):
    """{node: largest distance in LSB}, one node at a time."""
    return {name: int(d.max()) for name, d in helpers.apart(quantized, x).items()}


@pytest.mark.parametrize(
    ("name", "dtype", "level", "target"),
    [
        ("shufflenet", "int8", 0, jq.targets.NASH_E),
        ("video", "int16", 0, EXACT),
        pytest.param("video", "int16", 2, EXACT, marks=pytest.mark.slow),
        pytest.param("shufflenet", "int16", 0, EXACT, marks=pytest.mark.slow),
    ],
)
def test_every_node_is_within_one_step(name, dtype, level, target):
    """Real scales: int8 with the march as it is, int16 with a rescale of the whole accumulator."""
    quantized = network(name, dtype=dtype, level=level, target=target)
    found = steps_apart(quantized, to_numpy(architectures.inputs(name, 3, seed=9)))
    assert set(found) == set(quantized.plan.owned)
    assert max(found.values()) <= 1, found


def test_the_comparison_by_node_can_fail():
    """A scale that is off by a tenth shows."""
    model = network("video")
    wrong = model.qparams | {model.plan.owned[2]: model.qparams[model.plan.owned[2]] * 1.1}
    file = to_onnx(model.replace(qparams=wrong))
    x = to_numpy(architectures.inputs("video", 2, seed=9))
    assert not np.array_equal(
        helpers.integers(file, *x)[model.plan.owned[2]], helpers.integers(to_onnx(model), *x)[model.plan.owned[2]]
    )


def check_random(network, seed, level):
    graph, params = network
    x = graphs.images(seed, graph)
    quantized = calibrated(graph, params, [x], level=level)
    assert max(steps_apart(quantized, [np.asarray(x)]).values()) <= 1


@settings(max_examples=2)
@given(graphs.networks(), st.integers(0, 2**16), st.sampled_from([0, 2]))
def test_random_networks_are_within_one_step(network, seed, level):
    check_random(network, seed, level)


@pytest.mark.slow
@settings(max_examples=60)
@given(graphs.networks(), st.integers(0, 2**16), st.sampled_from([0, 2]))
def test_many_random_networks_are_within_one_step(network, seed, level):
    check_random(network, seed, level)


@settings(max_examples=20)
@given(graphs.networks())
def test_the_layout_is_undone(network):
    """Channels-last again is the plan's graph."""
    from jquant.plan.layout import channels_last

    graph, params = network
    model = jq.prepare(graph, params, jq.QConfig({"*": None}), target=EXACT)
    undone = framework_layout(model.plan.graph, value_shapes(model.plan.graph, model.params))
    assert not [n.name for n in undone.nodes if n.name.endswith((".to_last", ".to_first"))]
    assert channels_last(undone, value_shapes(undone, model.params)) == model.plan.graph


@pytest.mark.parametrize("weight", [jq.int4(axis="out"), jq.int8(), jq.int16(axis="out")], ids=str)
def test_formats_of_weights(weight):
    """The integers in the file are those of the program."""
    graph, params = small()
    model = calibrated(graph, params, [example()], weight=weight, level=2)
    assert_equal_to_integers(model, [np.asarray(example())])
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in to_onnx(model).graph.initializer}
    ours = np.asarray(jq.lower(model).constants["conv"]["weight"])
    np.testing.assert_array_equal(np.moveaxis(stored["conv.weight"].astype(np.int16), (0, 1), (-1, -2)), ours)


def small():
    """conv, relu, a float function, a linear layer."""
    rng = np.random.default_rng(0)
    params = {
        "conv.weight": rng.normal(size=(4, 3, 3, 3)),
        "conv.bias": rng.normal(size=4),
        "fc.weight": rng.normal(size=(5, 4)),
        "fc.bias": rng.normal(size=5),
    }
    conv = ops.Conv(strides=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1))
    nodes = (
        jq.Node("conv", conv, ("x",), jq.FrozenMap({"weight": "conv.weight", "bias": "conv.bias"})),
        jq.Node("relu", ops.Relu(), ("conv",)),
        jq.Node("mean", ops.Mean(axes=(2, 3)), ("relu",)),
        jq.Node("fc", ops.Linear(), ("mean",), jq.FrozenMap({"weight": "fc.weight", "bias": "fc.bias"})),
    )
    graph = jq.Graph((jq.Input("x", (None, 3, 4, 4)),), nodes, ("fc",))
    return graph, {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}


def example(batch=3):
    return jnp.asarray(np.random.default_rng(5).normal(size=(batch, 3, 4, 4)), jnp.float32)


def test_a_float16_island():
    """Its values are rounded to float16; within one step of the program, whose sums have another order."""
    graph, params = small()
    quantized = calibrated(graph, params, [example()], rules={"mean": jq.Policy(output=jq.float16())})
    model = to_onnx(quantized)
    assert [n.op_type for n in model.graph.node if n.name.startswith("mean")][:4] == [
        "ReduceMean", "Clip", "Cast", "Cast",
    ]  # fmt: skip
    expected = np.asarray(jq.run(jq.lower(quantized), example()))
    (actual,) = helpers.run_onnxruntime(model, example())
    step = float(np.abs(expected).max()) * 2e-2
    np.testing.assert_allclose(actual, expected, rtol=0, atol=step)


def test_names_and_structure():
    model = calibrated(*small(), [example()])
    file = to_onnx(model)
    assert (file.opset_import[0].version, file.ir_version) == (19, 9)
    assert [n.name for n in file.graph.node if n.op_type in ("Conv", "Relu", "ReduceMean", "Gemm")] == [
        "conv", "conv:relu", "mean", "fc",
    ]  # fmt: skip
    assert file.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [o.name for o in file.graph.output] == ["fc"]
    types = {t.name: t.data_type for t in file.graph.initializer}
    assert types["conv.weight"] == onnx.TensorProto.INT8
    assert types["conv.bias"] == onnx.TensorProto.INT32
    axis = next(n for n in file.graph.node if n.name == "conv.weight:dequantized").attribute[0]
    assert (axis.name, axis.i) == ("axis", 0)
    assert {o for n in file.graph.node for o in n.output} >= {"conv", "mean", "fc"}


# ---------------------------------------------------------------------------------------------------------------------
# Float for a PTQ tool


def test_float_form_has_weights_on_the_grid_and_a_table(tmp_path):
    model = calibrated(*small(), [example()])
    file = to_onnx(model, form="float", path=tmp_path / "net.onnx")
    assert (file.opset_import[0].version, file.ir_version) == (19, 9)
    assert not {n.op_type for n in file.graph.node} & {"QuantizeLinear", "DequantizeLinear"}
    table = json.loads((tmp_path / "net.json").read_text())
    assert table == json.loads({p.key: p.value for p in file.metadata_props}[METADATA])
    assert table == quantization_table(model)
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in file.graph.initializer}
    entry = table["nodes"]["conv"]["weight"]
    assert (entry["name"], entry["dtype"], entry["axis"], len(entry["scale"])) == ("conv.weight", "int8", 0, 4)
    steps = weights["conv.weight"] / np.float32(entry["scale"]).reshape(-1, 1, 1, 1)
    assert np.abs(steps - np.rint(steps)).max() < 1e-4
    assert np.abs(weights["conv.weight"] - model.params["conv.weight"]).max() <= 0.51 * max(entry["scale"])
    output = table["nodes"]["conv"]["output"]
    assert output["threshold"] == pytest.approx(128 * output["scale"])
    assert table["nodes"]["fc"]["output"] == {"dtype": "int32"}
    np.testing.assert_array_equal(
        helpers.run_onnxruntime(onnx.load(tmp_path / "net.onnx"), example())[0],
        helpers.run_onnxruntime(file, example())[0],
    )


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def test_what_has_no_form_is_listed_together():
    graph = jq.Graph(
        (
            jq.Input("y", (None, 4, 4, 1), "uint8"),
            jq.Input("uv", (None, 2, 2, 2), "uint8"),
            jq.Input("rgb", (None, 4, 4, 3), "uint8"),
        ),
        (
            jq.Node("camera", ops.Nv12ToCentredYuv444(), ("y", "uv")),
            jq.Node("color", ops.RgbToCentredYuv444(), ("rgb",)),
        ),
        ("camera", "color"),
    )
    with pytest.raises(
        jq.ConversionError, match=r"'camera' \(Nv12ToCentredYuv444\)(.|\n)*'color' \(RgbToCentredYuv444\)"
    ):
        to_onnx(graph, {})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: to_onnx(model.plan.graph, model.params, form="qdq"), "form 'qdq' of a Graph"),
        (lambda model: to_onnx(model, form="int"), "form 'int' of a Model"),
        (lambda model: to_onnx("net", model.params), "exports a Model, or a Graph with its params, not str"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(jq.ConversionError, match=message):
        call(calibrated(*small(), [example()]))


def test_missing_scales():
    model = calibrated(*small(), [example()])
    with pytest.raises(jq.CalibrationError, match="no scale for"):
        to_onnx(model.replace(qparams={}))


def test_a_format_without_an_onnx_one():
    model = calibrated(*small(), [example()], rules={"x": jq.Policy(output=jq.config.uint8())})
    with pytest.raises(jq.ConversionError, match="'x' is uint8"):
        to_onnx(model)


def test_a_kept_batch_norm_is_folded():
    graph, params = imported("video")
    policy = jq.Policy(output=jq.int8(), weight=jq.int8(axis="out"))
    model = jq.prepare(graph, params, jq.QConfig({"*": policy}), target=EXACT, batch_norm="live")
    x = to_numpy(architectures.inputs("video", 4, seed=0))
    model = jq.calibrate(model, [tuple(map(jnp.asarray, x))])
    folded = to_onnx(jq.training.fold_batch_norm(model))
    assert to_onnx(model).SerializeToString() == folded.SerializeToString()
    assert "BatchNormalization" not in {n.op_type for n in folded.graph.node}


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"
    model = calibrated(*small(), [example()])
    path.write_bytes(b"old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        to_onnx(model, path=path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
