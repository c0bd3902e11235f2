"""Files of other opsets than jquant's own choice: valid, the same numbers, or a refusal that names what is too new."""

import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from support.onnx_helpers import CASES, graph_of, run_onnxruntime
from support.qdq_nets import Qdq, draw

import jquant as jq
from jquant_converters import from_onnx, model_from_onnx, to_onnx

TOO_NEW = {  # {operator: (the last opset without it, what stands in the error)}
    "HardSwish": (13, "HardSwish of 'layer' came with opset 14"),
    "BitwiseNot": (17, "BitwiseNot of 'layer' came with opset 18"),
    "LayerNorm": (16, "LayerNormalization of 'layer' came with opset 17"),
    "Scatter": (15, "reduces by 'add' needs opset 16"),
    "GridSample": (15, "GridSample of 'layer' came with opset 16"),
}
FEW = ["Mean", "Variance", "RmsNorm", "AdaptiveAvgPool, uneven", "Norm 2", "GridSample"]


def same_numbers(name, opset):
    """Against the file of the default opset, by onnxruntime without optimizations: float32 sums of another order."""
    graph, params = graph_of(CASES[name])
    operands = [np.asarray(x) for x in CASES[name][1]]
    made = to_onnx(graph, params, opset=opset)
    assert made.opset_import[0].version == opset
    for a, e in zip(run_onnxruntime(made, *operands), run_onnxruntime(to_onnx(graph, params), *operands), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)
    if opset >= 19:
        assert from_onnx(made)[0] == from_onnx(to_onnx(graph, params))[0]


@pytest.mark.parametrize("opset", [17, 28])
@pytest.mark.parametrize("name", FEW)
def test_operators_at_other_opsets(name, opset):
    same_numbers(name, opset)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [13, 15, 18, 22, 25, 28])
@pytest.mark.parametrize("name", CASES)
def test_every_operator_at_other_opsets(name, opset):
    try:
        same_numbers(name, opset)
    except jq.ConversionError as error:  # what is too new is refused
        if opset >= 18 or "opset" not in str(error):
            raise


@pytest.mark.parametrize("name", TOO_NEW)
def test_what_came_later_is_named(name):
    opset, message = TOO_NEW[name]
    graph, params = graph_of(CASES[name])
    with pytest.raises(jq.ConversionError, match=message):
        to_onnx(graph, params, opset=opset)
    to_onnx(graph, params, opset=opset + 1)


def qdq_file(opset, dtype=np.int8):
    made = Qdq(pow2=False)
    x = made.pair("x", 2**-5, dtype)
    y = made.op("Relu", made.conv(x, "conv", made.scales[x]), out="relu")
    y = made.op("GlobalAveragePool", made.pair(y, 2**-4, dtype), out="pool")
    return made.model({made.pair(y, 2**-6, dtype): 4}, opset=opset)


@pytest.mark.parametrize("opset", [17, 28, *(pytest.param(n, marks=pytest.mark.slow) for n in (13, 22, 25))])
def test_a_qdq_file_goes_out_at_its_own_opset(opset):
    model = model_from_onnx(qdq_file(opset), target=jq.targets.NASH_E)
    file = to_onnx(model, opset=opset)
    assert file.opset_import[0].version == opset
    assert file.ir_version == onnx.helper.OP_SET_ID_VERSION_MAP[("ai.onnx", opset)]
    again = model_from_onnx(file, target=jq.targets.NASH_E)
    assert again.qparams.keys() == model.qparams.keys()
    for key, scale in model.qparams.items():
        np.testing.assert_array_equal(again.qparams[key], scale)
    x = draw(2, 4, 5, 5)
    np.testing.assert_array_equal(jq.run(jq.lower(again), jnp.asarray(x)), jq.run(jq.lower(model), jnp.asarray(x)))
    if opset > 25:  # which onnxruntime 1.32 has no QuantizeLinear of
        return
    for a, e in zip(run_onnxruntime(file, x), run_onnxruntime(to_onnx(model), x), strict=True):
        np.testing.assert_array_equal(a, e)


def test_int16_needs_opset_21():
    model = model_from_onnx(qdq_file(21, np.int16), target=jq.targets.NASH_E)
    with pytest.raises(jq.ConversionError, match="opset 20 has no int16 and int4 in QuantizeLinear"):
        to_onnx(model, opset=20)
    assert to_onnx(model, opset=23).opset_import[0].version == 23
    assert to_onnx(model, form="float", opset=17).opset_import[0].version == 17
    for opset in (12, 29):
        with pytest.raises(jq.ConversionError, match=f"opset {opset}; 13 to 28 can be written"):
            to_onnx(model, opset=opset)
