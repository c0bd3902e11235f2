"""Recurrences that have no operator of their own: unrolled at the import, against torch and onnxruntime."""

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from support.onnx_helpers import model_of
from torch import nn

import jquant as jq
from jquant_converters import from_onnx, from_torch

RNG = np.random.default_rng(0)
T, N, C, H = 3, 2, 4, 5


class Sequence(nn.Module):
    def __init__(self, layer, states=False):
        super().__init__()
        self.layer, self.states = layer, states

    def forward(self, x, *states):
        given = tuple(s.transpose(0, 1).contiguous() for s in states)
        y, last = self.layer(x, given) if states else self.layer(x)
        return y, *last


LAYERS = {
    "plain": (lambda: nn.LSTM(C, H, proj_size=2, batch_first=True), ()),
    "layers both ways, no bias": (
        lambda: nn.LSTM(C, H, 2, bias=False, proj_size=3, batch_first=True, bidirectional=True), ()),
    "state": (lambda: nn.LSTM(C, H, proj_size=2, batch_first=True), (2, H)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_a_projection_of_torch(name):
    torch.manual_seed(0)
    make, states = LAYERS[name]
    module = Sequence(make()).eval()
    inputs = (torch.randn(N, T, C), *(torch.randn(N, 1, n) for n in states))
    graph, params = from_torch(module, inputs)
    with torch.no_grad():
        wanted = module(*inputs)
    found = jq.graph.evaluate_float(graph, params, *(jnp.asarray(x.numpy()) for x in inputs))
    for y, expected in zip(found, wanted, strict=True):
        np.testing.assert_allclose(y, expected.numpy(), rtol=0, atol=2e-6)
    keys = {key for node in graph.nodes for key in node.params.values()}
    assert keys == {f"layer.{key}" for key in module.layer.state_dict()}


def test_integers_of_a_projection_equal_the_reference():
    torch.manual_seed(0)
    module, x = Sequence(nn.LSTM(C, H, proj_size=2, batch_first=True)).eval(), torch.randn(N, T, C)
    graph, params = from_torch(module, (x,))
    qconfig = jq.QConfig({"*": jq.Policy(output=jq.int16(), weight=jq.int8(axis="out"))})
    model = jq.prepare(graph, params, qconfig, target=jq.targets.NASH_E)
    program = jq.lower(jq.calibrate(model, [jnp.asarray(x.numpy())]))
    fast, slow = jq.run(program, jnp.asarray(x.numpy())), jq.reference.run(program, x.numpy())[0]
    for a, b, wanted in zip(jax.tree.leaves(fast), jax.tree.leaves(slow), module(x), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.abs(np.asarray(a) - wanted.detach().numpy()).max() < 0.02


def draw(*shape):
    return (RNG.normal(size=shape) * 0.5).astype(np.float32)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("kind", ["GRU", "RNN"])
@pytest.mark.parametrize("state", [False, True])
def test_onnx(kind, direction, state):
    count, gates = 1 + (direction == "bidirectional"), 3 if kind == "GRU" else 1
    weights = {"w": draw(count, gates * H, C), "r": draw(count, gates * H, H), "b": draw(count, 2 * gates * H)}
    inputs = {"x": draw(T, N, C)} | ({"h": draw(count, N, H)} if state else {})
    options = {"activations": ["Relu", "Tanh"][:count]} if kind == "RNN" else {"linear_before_reset": 0}
    names = ["x", "w", "r", "b", "", "h"] if state else ["x", "w", "r", "b"]
    node = helper.make_node(kind, names, ["y", "y_h"], "node", hidden_size=H, direction=direction, **options)
    outputs = {"y": TensorProto.FLOAT, "y_h": TensorProto.FLOAT}
    model = model_of([node], inputs, outputs, opset=14, initializers=weights)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    graph, params = from_onnx(model)
    found = jq.graph.evaluate_float(graph, params, *map(jnp.asarray, inputs.values()))
    for y, wanted in zip(found, session.run(None, inputs), strict=True):
        np.testing.assert_allclose(y, wanted, rtol=0, atol=2e-6)
    assert len(params) <= 2 * count * (2 + gates)  # the steps share them
