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
    "rotary": (23, "RotaryEmbedding", {}, [(2, 3, 4, 6)], {"c": draw(2, 4, 3)[:1], "s": draw(2, 4, 3)[1:]}),
    "rotary, interleaved": (23, "RotaryEmbedding", {"interleaved": 1}, [(2, 3, 4, 6)],
                            {"c": draw(2, 4, 3)[:1], "s": draw(2, 4, 3)[1:]}),
    "rotary of some features": (23, "RotaryEmbedding", {"rotary_embedding_dim": 4, "interleaved": 1}, [(2, 3, 4, 6)],
                                {"c": draw(2, 4, 2)[:1], "s": draw(2, 4, 2)[1:]}),
    "rotary of three axes": (23, "RotaryEmbedding", {"num_heads": 3}, [(2, 4, 18)],
                             {"c": draw(2, 4, 3)[:1], "s": draw(2, 4, 3)[1:]}),
    "rotary at positions": (23, "RotaryEmbedding", {}, [(2, 3, 4, 6)],
                            {"c": draw(9, 3), "s": draw(9, 3)[::-1].copy(), "p": np.int64([[8, 0, 3, 3]] * 2)}),
    "rotary by values": (23, "RotaryEmbedding", {}, [(2, 3, 4, 6), (2, 4, 3), (2, 4, 3)], {}),
    "causal conv": (27, "CausalConvWithState", {}, [(2, 3, 7)], {"w": draw(3, 1, 4), "b": draw(3)}),
    "causal conv with silu": (27, "CausalConvWithState", {"activation": "silu"}, [(2, 3, 2)], {"w": draw(3, 1, 4)}),
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


def test_the_state_of_a_causal_convolution():
    """Two halves of a sequence, the state of the first given to the second, are the whole."""
    weight, x = draw(3, 1, 4), draw(2, 3, 8)
    whole = helpers.run_reference(built(27, "CausalConvWithState", {}, [x.shape], {"w": weight}, [x]), x)[0]
    found, states = [], [np.zeros((2, 3, 3), np.float32)]
    for part in (x[..., :2], x[..., 2:]):
        node = helper.make_node("CausalConvWithState", ["x0", "w", "", "past"], ["y", "state"], "node")
        outputs = {"y": TensorProto.FLOAT, "state": TensorProto.FLOAT}
        model = model_of([node], {"x0": part, "past": states[-1]}, outputs, opset=27, initializers={"w": weight})
        graph, params = from_onnx(model)
        y, state = evaluate_float(graph, params, jnp.asarray(part), jnp.asarray(states[-1]))
        found.append(np.asarray(y))
        states.append(np.asarray(state))
    np.testing.assert_allclose(np.concatenate(found, -1), whole, rtol=0, atol=1e-5 * np.abs(whole).max())
    np.testing.assert_array_equal(states[1], np.concatenate([np.zeros((2, 3, 1)), x[..., :2]], -1))
    np.testing.assert_array_equal(states[2], x[..., -3:])


@pytest.mark.parametrize(
    ("opset", "kind", "attributes", "shapes", "message"),
    [
        (23, "RotaryEmbedding", {}, [(2, 3, 4, 6), (2, 3), (2, 3)], "RotaryEmbedding 'node' .*a cache of shape"),
        (23, "RotaryEmbedding", {}, [(2, 4, 6), (2, 4, 3), (2, 4, 3)], "RotaryEmbedding 'node' .*num_heads"),
        (24, "TensorScatter", {}, [(2, 3, 4), (2, 1, 4)], "TensorScatter 'node' .*no such operator"),
        (26, "BitCast", {"to": 6}, [(2, 3)], "BitCast 'node' .*no such operator"),
        (26, "CumProd", {}, [(2, 3), (1,)], "CumProd 'node' .*no such operator"),
        (27, "LinearAttention", {}, [(2, 3, 4)] * 3, "LinearAttention 'node' .*no such operator"),
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
