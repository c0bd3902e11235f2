"""Forms of quantized files, one small net each: where pairs lie, zero points, integer operators, dead channels."""

import itertools
import warnings

import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.onnx_helpers import model_of, quantized_conv, run_onnxruntime
from support.qdq_nets import Qdq, draw

import jquant as jq
from jquant_converters import calibrate_missing, from_onnx, model_from_onnx
from jquant_converters.foreign.torch_ranges import RangeWarning
from jquant_converters.onnx_plan import ScaleWarning

QONNX = "qonnx.custom_op.general"
EXACT = jq.targets.NASH_E.with_fields({"rescale.post_rounding": "half_even", "rescale.high_precision": True})


def outputs(found):
    return [np.asarray(y) for y in (found if isinstance(found, tuple) else (found,))]


def both(model, x):
    """Fake-quant and integers."""
    x = jnp.asarray(x)
    return outputs(jq.apply(model, x)), outputs(jq.run(jq.lower(model), x))


# ---------------------------------------------------------------------------------------------------------------------
# Where pairs lie


def net(act, other, first, second, pow2=True):
    """conv [pair] act [pair] + other [pair] relu [pair]."""
    made = Qdq(pow2)
    x = made.pair("x", 2**-5)
    y = made.conv(x, "conv", made.scales[x])
    y = made.pair(y, 2**-4) if "c" in first else y
    y = made.op(act, y, out="act") if act else y
    y = made.pair(y, 2**-3) if "a" in first else y
    z = x if other == "x" else made.conv(x, "side", made.scales[x])
    z = made.pair(z, 2**-5) if other == "pair" else z
    y = made.op("Add", y, z, out="add")
    y = made.pair(y, 2**-2) if "s" in second else y
    y = made.op("Relu", y, out="last")
    y = made.pair(y, 2**-3) if "l" in second else y
    return made.model({y: 4})


PLACES = [
    p for p in itertools.product(("", "Relu", "LeakyRelu", "HardSwish"), ("x", "pair", "free"), ("", "c", "a", "ca"),
                                 ("s", "l", "sl", ""))
    if p[0] or "a" not in p[2]
]  # fmt: skip
FEW = [("Relu", "free", "", "l"), ("HardSwish", "pair", "ca", "s")]


def check_place(place):
    """A scale of the file that were lost would show as steps of half the values; a table is one step off at most."""
    act, second = place[0], place[-1]
    file, x = net(*place), draw(2, 4, 5, 5)
    (expected,) = run_onnxruntime(file, x)
    (fake,), (integers,) = both(model_from_onnx(file, target=EXACT), x)
    step = 2.0**-2 if "s" in second else 2.0**-3
    if not second:  # the file leaves the output float: int16, of which a table may be one int8 off
        assert np.abs(fake - expected).max() <= 1e-3
        assert np.abs(integers - expected).max() <= (1e-3 if act in ("", "Relu") else 0.126)
    elif act in ("", "Relu"):
        np.testing.assert_array_equal(fake, expected)
        np.testing.assert_array_equal(integers, expected)
    else:
        # A table of an int16 value is one step off at most. Ties to even make two of it: 0.5 is 0, and 1.5 is 2.
        for found, steps in ((fake, 1), (integers, 2)):
            assert np.abs(found - expected).max() <= steps * step
            assert (found != expected).mean() <= 0.05


@pytest.mark.parametrize("place", FEW)
def test_every_pair_counts_wherever_it_lies(place):
    check_place(place)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_every_pair_counts_at_all_places(place):
    check_place(place)


def test_a_convolution_that_nothing_takes_in_does_not_get_the_scale_of_the_addition():
    model = model_from_onnx(net("", "free", "", "s"), target=EXACT)
    rows = {r.name: r for r in model.plan.resolutions}
    alone = [name for name in ("conv", "side") if name in model.plan.owned and rows[name].requested == "float"]
    assert len(alone) == 1
    assert str(model.plan.values[alone[0]]) == "int16"
    assert "no pair in the file at" in rows[alone[0]].reason


def test_a_value_that_two_pairs_round_has_both_scales():
    made = Qdq(pow2=False)
    x = made.pair("x", 2**-5)
    y = made.op("Relu", made.conv(x, "conv", made.scales[x]), out="relu")
    fine, coarse = made.pair(y, 2**-5), made.pair(y, 2**-2)
    file = made.model({fine: 4, coarse: 4})
    model = model_from_onnx(file, target=EXACT)
    x = draw(2, 4, 5, 5)
    for found in both(model, x):
        for a, e, scale in zip(found, run_onnxruntime(file, x), (made.scales[fine], made.scales[coarse]), strict=True):
            assert np.abs(a - e).max() <= 1.001 * scale
            assert (np.abs(a - e) > scale / 2).mean() <= 0.01
    assert {float(v) for v in model.qparams.values() if v.ndim == 0} >= {made.scales[fine], made.scales[coarse]}
    assert "read with two scales: computed for each" in jq.explain(model)


# ---------------------------------------------------------------------------------------------------------------------
# Zero points


def relu_net(dtype, zero, scale=2**-5):
    made = Qdq()
    x = made.pair("x", 2**-5)
    y = made.pair(made.conv(x, "conv", made.scales[x]), scale, dtype, zero)
    return made.model({y: 4})


def test_uint8_with_zero_point_128_is_int8():
    x = draw(2, 4, 5, 5)
    signed, unsigned = (model_from_onnx(relu_net(d, z), target=EXACT) for d, z in ((np.int8, 0), (np.uint8, 128)))
    np.testing.assert_array_equal(both(signed, x)[1][0], both(unsigned, x)[1][0])
    assert unsigned.plan.values["conv"].dtype == "int8"


def test_uint16_with_zero_point_32768_is_int16():
    """onnxruntime's symmetric QUInt16."""
    x = draw(2, 4, 5, 5)
    signed, unsigned = (relu_net(d, z, 2**-11) for d, z in ((np.int16, 0), (np.uint16, 32768)))
    found, other = (model_from_onnx(file, target=EXACT) for file in (unsigned, signed))
    assert str(found.plan.values["conv"]) == "int16"
    for (a,), (b,) in zip(both(found, x), both(other, x), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, run_onnxruntime(unsigned, x)[0])


@pytest.mark.parametrize(("dtype", "zero"), [(np.uint8, 100), (np.int8, -128)])
def test_widened_values_are_exact(dtype, zero):
    file, x = relu_net(dtype, zero), draw(2, 4, 5, 5) * 4
    (expected,) = run_onnxruntime(file, x)
    model = model_from_onnx(file, target=EXACT, zero_point="widen")
    for (found,) in both(model, x):
        np.testing.assert_array_equal(found, expected)
    assert float(model.qparams["conv"]) == 2**-5


@pytest.mark.parametrize(
    ("dtype", "zero", "peak"), [(np.uint8, 0, 255 / 127), (np.uint8, 100, 155 / 127), (np.int8, 17, 145 / 128)]
)
def test_requantized_values_have_the_same_range(dtype, zero, peak):
    file, x = relu_net(dtype, zero), draw(2, 4, 5, 5) * 4
    (expected,) = run_onnxruntime(file, x)
    model = model_from_onnx(file, target=EXACT, zero_point="requantize")
    assert float(model.qparams["conv"]) == np.float32(peak * 2**-5)
    for (found,) in both(model, x):
        # Half a step of each of the two grids, and what the coarser one cuts at its ends.
        assert np.abs(found - expected).max() <= (peak + 0.5) * 2**-5
    row = next(r for r in model.plan.resolutions if "zero point" in r.requested)
    assert f"a step is {peak:.4g} of the file's" in row.reason


def test_all_zero_points_are_named():
    made = Qdq()
    x = made.pair("x", 2**-5, np.uint8, 3)
    y = made.pair(made.conv(x, "conv", made.scales[x]), 2**-4, np.int8, -5)
    with pytest.raises(jq.ConversionError) as error:
        model_from_onnx(made.model({y: 4}), target=EXACT)
    assert "2 zero points" in str(error.value)
    assert "zero point 3 of uint8" in str(error.value)
    assert "zero point -5 of int8" in str(error.value)
    with pytest.raises(jq.ConversionError, match="zero_point is 'shift'"):
        model_from_onnx(made.model({y: 4}), target=EXACT, zero_point="shift")


def twin(dtype, zero):
    made = Qdq()
    x = made.pair("x", 2**-5, dtype, zero)
    return made.model({made.pair(made.conv(x, "conv", 2**-5), 2**-4, dtype, zero): 4})


def test_constants_under_other_names():
    """torch's older exporter stores equal scales and zero points once, and names them again by Identity."""
    expected, file, x = model_from_onnx(twin(np.int8, 0), target=EXACT), twin(np.uint8, 128), draw(2, 4, 5, 5)
    nodes = list(file.graph.node)
    del file.graph.node[:]
    for node in nodes:
        for i in (1, 2) if node.op_type in ("QuantizeLinear", "DequantizeLinear") else ():
            if i < len(node.input):
                names = [node.input[i], f"{node.output[0]}:{i}:first", f"{node.output[0]}:{i}"]
                file.graph.node.extend(helper.make_node("Identity", [a], [b]) for a, b in itertools.pairwise(names))
                node.input[i] = names[-1]
        file.graph.node.append(node)
    model = model_from_onnx(file, target=EXACT)
    assert model.qparams.keys() == expected.qparams.keys()
    for key, scale in expected.qparams.items():
        np.testing.assert_array_equal(model.qparams[key], scale)
    np.testing.assert_array_equal(jq.run(jq.lower(model), jnp.asarray(x)), run_onnxruntime(file, x)[0])


# ---------------------------------------------------------------------------------------------------------------------
# Ranges

CALLS = {  # what torch.onnx 2.13 writes beside a node, under "pkg.torch.onnx.fx_node"; and what is lost
    "tensor.default](args = (%x, 0.05, 0, -127, 127, torch.int8), kwargs = {})": "-127 to 127",
    "channel.default](args = (%w, %s, %z, 0, -8, 7, torch.int8), kwargs = {})": "-8 to 7",
    "tensor.default](args = (%x, 0.05, 0, -128, 127, torch.int8), kwargs = {})": "",
    "channel.default](args = (%w, %s, %z, 0, 0, 255, torch.uint8), kwargs = {})": "",
}


@pytest.mark.parametrize("call", CALLS)
def test_ranges_that_torch_onnx_left_out(call):
    file = net("Relu", "x", "", "s")
    node = next(n for n in file.graph.node if n.op_type == "QuantizeLinear")
    text = f"%q : [num_users=1] = call_function[target=torch.ops.quantized_decomposed.quantize_per_{call}"
    node.metadata_props.add(key="pkg.torch.onnx.fx_node", value=text)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", RangeWarning)
        model_from_onnx(file, target=EXACT)
    expected = [f"quant_max of 1 values and weights: {node.output[0]!r} {CALLS[call]};"] if CALLS[call] else []
    assert len(found) == len(expected)
    assert all(
        e in str(f.message) and "model_from_torch" in str(f.message) for e, f in zip(expected, found, strict=True)
    )


@pytest.mark.slow
def test_torch_onnx_itself_leaves_ranges_out():
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    pytest.importorskip("torch.ao.quantization.fx._decomposed")  # which defines the operators

    class Rounded(torch.nn.Module):
        def forward(self, x):
            part = torch.ops.quantized_decomposed
            ends = (0.05, 0, -127, 127, torch.int8)
            return part.dequantize_per_tensor(part.quantize_per_tensor(x, *ends), *ends).relu()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = torch.onnx.export(Rounded(), (torch.randn(2, 3),), dynamo=True, verbose=False).model_proto
    with pytest.warns(RangeWarning, match="-127 to 127"):
        model_from_onnx(file, target=EXACT)


# ---------------------------------------------------------------------------------------------------------------------
# Weights


@pytest.mark.parametrize("bias", [3, 2**30])
def test_a_dead_channel_keeps_its_bias(bias):
    file, _ = quantized_conv(relu=False)
    for tensor in file.graph.initializer:
        if tensor.name in ("s_w", "s_b", "b"):
            array = numpy_helper.to_array(tensor).copy()
            array[1] = {"s_w": 1e-9, "s_b": 0.05 * 1e-9, "b": bias}[tensor.name]
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    with pytest.warns(ScaleWarning, match=r"1 scales of weights are below 2\^-23, of 'w'"):
        model = model_from_onnx(file, target=EXACT)
    assert float(model.qparams["w"].min()) >= 2**-23
    x = draw(2, 3, 5, 5)
    (expected,) = run_onnxruntime(file, x)
    for (found,) in both(model, x):
        assert np.abs(found - expected)[:, 1].max() == 0
        assert np.abs(found - expected).max() <= 0.2501


def test_a_bias_of_a_dead_channel_beyond_32_bits_at_the_smallest_scale():
    file, _ = quantized_conv(relu=False)
    for tensor in file.graph.initializer:
        if tensor.name in ("s_w", "s_b", "b"):
            array = numpy_helper.to_array(tensor).copy()
            array[1] = {"s_w": 2.0**-60, "s_b": 2.0**-10, "b": 20000}[tensor.name]  # 19.5, which 0.05 * 2^-23 cannot be
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    with pytest.warns(ScaleWarning):
        model = model_from_onnx(file, target=EXACT)
    x = draw(2, 3, 5, 5)
    (expected,) = run_onnxruntime(file, x)
    for (found,) in both(model, x):
        np.testing.assert_array_equal(found[:, 1], expected[:, 1])


def test_clipped_int8_weights_of_four_bits_are_int4():
    made = Qdq()
    x = made.pair("x", 2**-5)
    y = made.conv(x, "conv", made.scales[x])
    low, high = made.tensor("low", np.int8(-7)), made.tensor("high", np.int8(7))
    clip = helper.make_node("Clip", ["conv.w", low, high], ["conv.clipped"], "clip")
    for node in made.nodes:
        for i, name in enumerate(node.input):
            node.input[i] = "conv.clipped" if name == "conv.w" else name
    made.nodes.insert(0, clip)
    file = made.model({made.pair(y, 2**-4): 4})
    model = model_from_onnx(file, target=EXACT)
    assert [spec.dtype for spec in model.plan.weights.values()] == ["int4"]
    x = draw(2, 4, 5, 5)
    for (found,) in both(model, x):
        np.testing.assert_array_equal(found, run_onnxruntime(file, x)[0])


# ---------------------------------------------------------------------------------------------------------------------
# Operators on integers

SMALL = {"s": np.float32(2**-5), "z": np.int8(0), "t": np.float32(2**-6)}
WINDOW = {"kernel_shape": [2, 2], "strides": [2, 2]}
INTEGER = {  # (domain, kind, what is between the operands, attributes)
    "add": ("com.microsoft", "QLinearAdd", ["q", "s", "z", "q", "s", "z", "t", "z"], {}),
    "mul": ("com.microsoft", "QLinearMul", ["q", "s", "z", "q", "s", "z", "s", "z"], {}),
    "concat": ("com.microsoft", "QLinearConcat", ["t", "z", "q", "s", "z", "q", "s", "z"], {"axis": 1}),
    "leaky": ("com.microsoft", "QLinearLeakyRelu", ["q", "s", "z", "t", "z"], {"alpha": 0.25}),
    "sigmoid": ("com.microsoft", "QLinearSigmoid", ["q", "s", "z", "t", "z"], {}),
    "global pool": ("com.microsoft", "QLinearGlobalAveragePool", ["q", "s", "z", "t", "z"], {}),
    "pool": ("com.microsoft", "QLinearAveragePool", ["q", "s", "z", "t", "z"], WINDOW),
    "transpose": ("", "Transpose", ["q"], {"perm": [0, 1, 3, 2]}),
    "max pool": ("", "MaxPool", ["q"], {"kernel_shape": [2, 2]}),
}  # fmt: skip


SELDOM = [
    pytest.param(name, marks=pytest.mark.slow) for name in INTEGER if name not in ("concat", "sigmoid", "transpose")
]


@pytest.mark.parametrize("name", ["concat", "sigmoid", "transpose", *SELDOM])
def test_operators_on_integers(name):
    domain, kind, operands, attributes = INTEGER[name]
    scale = "s" if len(operands) == 1 else operands[0] if kind == "QLinearConcat" else operands[-2]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "first"),
        helper.make_node(kind, operands, ["r"], "node", domain=domain, **attributes),
        helper.make_node("DequantizeLinear", ["r", scale, "z"], ["y"], "last"),
    ]
    x = draw(2, 3, 4, 4)
    file = model_of(nodes, {"x": x}, {"y": TensorProto.FLOAT}, initializers=SMALL)
    file.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    (expected,) = run_onnxruntime(file, x)
    model = model_from_onnx(file, target=EXACT)
    step = float(SMALL[scale])
    for (found,) in both(model, x):
        # A mean of 4 or 16 integers may be a tie, which onnxruntime's kernels round by another rule than ONNX has it.
        assert np.abs(found - expected).max() <= (step if "pool" in name and kind != "MaxPool" else 0)


def test_dynamic_quantization_gives_weights_and_is_calibrated():
    weight = np.random.default_rng(0).integers(-100, 100, (6, 4)).astype(np.int8)
    constants = {"w": weight, "s": np.float32([0.01, 0.02, 0.03, 0.04]), "z": np.zeros(4, np.int8)}
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "xs", "xz"], "quantize"),
        helper.make_node("MatMulInteger", ["q", "w", "xz", "z"], ["i"], "product"),
        helper.make_node("Cast", ["i"], ["f"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["xs", "s"], ["both"], "scales"),
        helper.make_node("Mul", ["f", "both"], ["y"], "scaled"),
    ]
    x = draw(16, 6)
    file = model_of(nodes, {"x": x}, {"y": TensorProto.FLOAT}, initializers=constants)
    model = model_from_onnx(file, target=EXACT)
    assert set(model.qparams) == {"product.weight"}
    np.testing.assert_array_equal(model.qparams["product.weight"], constants["s"])
    assert "calibrate it with the model's own batches" in jq.explain(model)
    with pytest.raises(jq.CalibrationError, match="no scale for 'x'"):
        jq.apply(model, jnp.asarray(x))
    whole = calibrate_missing(model, [jnp.asarray(x)])
    np.testing.assert_array_equal(whole.qparams["product.weight"], constants["s"])
    (expected,) = run_onnxruntime(file, x)
    (fake,), _ = both(whole, x)
    assert (
        np.abs(fake - expected).max() <= 0.03 * np.abs(expected).max()
    )  # int8 for uint8 by its own range: two roundings


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (helper.make_node("QAttention", ["x"], ["y"], "node", domain="com.microsoft"), "QAttention 'node'.*domain"),
        (helper.make_node("BipolarQuant", ["x", "s"], ["y"], "node", domain=QONNX), "BipolarQuant 'node'"),
        (helper.make_node("Quant", ["x", "s", "t", "eight"], ["y"], "node", domain=QONNX,
                          rounding_mode="FLOOR"), "Quant 'node' rounds by FLOOR"),
        (helper.make_node("MatMulInteger", ["x", "w"], ["y"], "node"), "no DynamicQuantizeLinear makes"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_named(node, message):
    constants = {**SMALL, "eight": np.float32(8), "w": np.ones((4, 4), np.int8)}
    file = model_of([node], {"x": draw(2, 4)}, {"y": TensorProto.FLOAT}, initializers=constants)
    with pytest.raises(jq.ConversionError, match=message):
        model_from_onnx(file, target=EXACT)


# ---------------------------------------------------------------------------------------------------------------------
# Branches


@pytest.mark.parametrize("taken", [True, False])
def test_a_branch_on_a_constant_is_the_branch_that_is_taken(taken):
    def branch(kind):
        return helper.make_graph([helper.make_node(kind, ["x"], ["b"], "inner")], kind, [],
                                 [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)])  # fmt: skip

    node = helper.make_node("If", ["c"], ["y"], "choice", then_branch=branch("Relu"), else_branch=branch("Neg"))
    x = draw(2, 5)
    file = model_of([node], {"x": x}, {"y": TensorProto.FLOAT}, initializers={"c": np.asarray(taken)})
    graph, _ = from_onnx(file)
    assert [type(n.op).__name__ for n in graph.nodes] == ["Relu" if taken else "Neg"]
    file.graph.initializer.pop()
    file.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    with pytest.raises(jq.ConversionError, match="If 'choice'"):
        from_onnx(onnx.load_from_string(file.SerializeToString()))


def test_a_shift_gives_the_steps_of_unsigned_values_back():
    """uint8 behind a relu, at half of the steps as int8: `shift_relus` restores the file's, and its integers."""
    made = Qdq()
    x = made.pair("x", 2**-5)
    y = made.op("Relu", made.conv(x, "first", made.scales[x]), out="relu")
    y = made.pair(y, 2**-5, np.uint8, 0)
    file = made.model({made.pair(made.conv(y, "second", 2**-5), 2**-3): 4})
    x = draw(2, 4, 5, 5) * 2
    (expected,) = run_onnxruntime(file, x)
    coarse = model_from_onnx(file, target=EXACT, zero_point="requantize")
    fine = jq.ptq.shift_relus(coarse)
    assert fine.plan.values["first"].fixed_scale == pytest.approx(2**-5, rel=2**-23)
    assert all(np.abs(found - expected).max() > 0 for (found,) in both(coarse, x))
    for (found,) in both(fine, x):
        np.testing.assert_array_equal(found, expected)
