"""Operators and attributes that came with opset 22 and later, against onnx.reference."""

import jax.numpy as jnp
import numpy as np
import pytest
from onnx import TensorProto, helper
from support import onnx_helpers as helpers
from support.onnx_helpers import draw, model_of

import jquant as jq
from jquant.graph.float import evaluate_float
from jquant_converters import from_onnx

CASES = {
    "rms norm": (23, "RMSNormalization", {"epsilon": 1e-3}, [(2, 3, 8)], {"w": draw(8)}),
    "rms norm of two axes": (23, "RMSNormalization", {"axis": 1}, [(2, 3, 8)], {"w": draw(3, 8)}),
    "swish": (24, "Swish", {}, [(2, 5)], {}),
    "swish with alpha": (24, "Swish", {"alpha": 1.5}, [(2, 5)], {}),
    "swiglu": (28, "SwiGLU", {}, [(2, 5), (2, 5)], {}),
    "attention": (23, "Attention", {}, [(2, 3, 4, 5)] * 3, {}),
    "causal attention": (24, "Attention", {"is_causal": 1, "scale": 0.3}, [(2, 3, 4, 5)] * 3, {}),
    "attention of three axes": (23, "Attention", {"q_num_heads": 2, "kv_num_heads": 2}, [(2, 4, 6)] * 3, {}),
    "attention with a mask": (23, "Attention", {}, [(2, 3, 4, 5)] * 3, {"m": draw(4, 4)}),
    "space to depth": (28, "SpaceToDepth", {"blocksize": 2, "mode": "CRD"}, [(1, 2, 4, 4)], {}),
    "mish": (22, "Mish", {}, [(2, 5)], {}),
    "transpose": (25, "Transpose", {"perm": [1, 0]}, [(2, 5)], {}),
}  # fmt: skip


def built(opset, kind, attributes, shapes, constants, x):
    names = [f"x{i}" for i in range(len(shapes))]
    node = helper.make_node(kind, [*names, *constants], ["y"], "node", **attributes)
    return model_of(
        [node], dict(zip(names, x, strict=True)), {"y": TensorProto.FLOAT}, opset=opset, initializers=constants
    )


@pytest.mark.parametrize("name", CASES)
def test_newer_operators(name):
    opset, kind, attributes, shapes, constants = CASES[name]
    x = [draw(*shape) * (1 + i) for i, shape in enumerate(shapes)]
    model = built(opset, kind, attributes, shapes, constants, x)
    graph, params = from_onnx(model)
    (expected,) = helpers.run_reference(model, *x)
    (found,) = evaluate_float(graph, params, *map(jnp.asarray, x))
    # float32 in another order of the sums: 1e-5 of the largest value
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1.0, float(np.abs(expected).max())))


@pytest.mark.parametrize(
    ("opset", "kind", "attributes", "shapes", "message"),
    [
        (23, "RotaryEmbedding", {}, [(2, 3, 4, 6), (2, 3), (2, 3)], "RotaryEmbedding 'node' .*no such operator"),
        (26, "CumProd", {}, [(2, 3), (1,)], "CumProd 'node' .*no such operator"),
        (24, "Attention", {"softcap": 2.0}, [(2, 3, 4, 5)] * 3, "Attention 'node' .*softcap"),
        (
            23,
            "Attention",
            {"q_num_heads": 4, "kv_num_heads": 2},
            [(2, 4, 8), (2, 4, 4), (2, 4, 4)],
            "4 heads of queries",
        ),
    ],
)
def test_what_has_no_meaning_here_is_refused_by_name(opset, kind, attributes, shapes, message):
    x = [draw(*shape) for shape in shapes]
    with pytest.raises(jq.ConversionError, match=message):
        from_onnx(built(opset, kind, attributes, shapes, {}, x))
