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
from jquant_converters import from_onnx, from_torch, model_from_onnx

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


# ---------------------------------------------------------------------------------------------------------------------
# Time first, with a batch of any size


TIME_FIRST = {
    "lstm": (lambda: nn.LSTM(C, H, 2, bidirectional=True), 2),
    "gru": (lambda: nn.GRU(C, H), 1),
    "rnn": (lambda: nn.RNN(C, H), 1),
}


class Stepwise(nn.Module):
    """A model that takes [T, N, C], and states [L, N, H]."""

    def __init__(self, layer, width):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 3)

    def forward(self, x, *states):
        y, last = self.layer(x, *((states,) if len(states) > 1 else states))
        return self.head(y), last


def batch_in_front(tensors):
    return [y.movedim(1, 0).numpy() for y in tensors]


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("name", TIME_FIRST)
def test_the_batch_on_axis_1(name, states):
    torch.manual_seed(0)
    make, count = TIME_FIRST[name]
    layer = make()
    width, rows = H * (1 + layer.bidirectional), layer.num_layers * (1 + layer.bidirectional)
    module = Stepwise(layer, width).eval()
    given = tuple(torch.randn(rows, N, H) for _ in range(count)) if states else ()
    graph, params = from_torch(module, (torch.randn(T, N, C), *given), batch_axis=1)
    assert all(entry.shape[0] is None for entry in graph.inputs)
    inputs = (torch.randn(T, 5, C), *(torch.randn(rows, 5, H) for _ in given))
    with torch.no_grad():
        wanted = torch.utils._pytree.tree_leaves(module(*inputs))
    found = jq.graph.evaluate_float(graph, params, *map(jnp.asarray, batch_in_front(inputs)))
    for y, expected in zip(jax.tree.leaves(found), batch_in_front(wanted), strict=True):
        np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6)


def test_attention_and_a_file_with_the_batch_on_axis_1(tmp_path):
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(C, 2)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    torch.manual_seed(0)
    module, x = Attends().eval(), torch.randn(T, N, C)
    batch = torch.export.Dim("batch")
    torch.export.save(torch.export.export(module, (x,), dynamic_shapes=({1: batch},)), tmp_path / "net.pt2")
    for source, arguments in ((module, (x,)), (tmp_path / "net.pt2", None)):
        graph, params = from_torch(source, arguments, batch_axis=1)
        found = jq.graph.evaluate_float(graph, params, jnp.asarray(x.movedim(1, 0).numpy()))
        np.testing.assert_allclose(found[0], module(x).detach().movedim(1, 0), rtol=0, atol=2e-6)


@pytest.mark.slow
def test_integers_with_the_batch_on_axis_1_equal_the_reference():
    torch.manual_seed(0)
    module, x = Stepwise(nn.GRU(C, H), H).eval(), torch.randn(T, N, C)
    graph, params = from_torch(module, (x,), batch_axis=1)
    array = x.movedim(1, 0).numpy()
    qconfig = jq.QConfig({"*": jq.Policy(output=jq.int16(), weight=jq.int8(axis="out"))})
    model = jq.prepare(graph, params, qconfig, target=jq.targets.NASH_E)
    program = jq.lower(jq.calibrate(model, [jnp.asarray(array)]))
    fast, slow = jq.run(program, jnp.asarray(array)), jq.reference.run(program, array)[0]
    for a, b, wanted in zip(jax.tree.leaves(fast), jax.tree.leaves(slow), module(x), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.abs(np.asarray(a) - wanted.detach().movedim(1, 0).numpy()).max() < 0.02


def test_the_way_to_a_free_batch_of_a_time_first_model_is_named():
    module, x = Stepwise(nn.GRU(C, H), H).eval(), torch.randn(T, N, C)
    with pytest.raises(jq.ConversionError, match=r"batch_axis=1 for inputs \[T, N, \.\.\.\]"):
        from_torch(module, (x,))
    with pytest.raises(jq.ConversionError, match="axis 3 of every input must be one batch"):
        from_torch(module, (x,), batch_axis=3)
    with pytest.raises(jq.ConversionError, match="dynamic_batch=False fixes all"):
        from_torch(module, (x,), batch_axis=1, dynamic_batch=False)


# ---------------------------------------------------------------------------------------------------------------------
# ONNX with a batch of any size, whose states are made from its shape


def zeros(states):
    """As torch.onnx writes torch.zeros(layers, x.shape[0], H)."""
    shape = [helper.make_node("Concat", ["count", "batch", "hidden"], ["shape"], axis=0)]
    return shape, [helper.make_node("ConstantOfShape", ["shape"], [s]) for s in states]


def expanded_zero(states):
    shape, _ = zeros(states)
    return shape, [helper.make_node("Expand", ["zero", "shape"], [s]) for s in states]


def expanded(states):
    """A trained state, repeated."""
    shape, _ = zeros(states)
    return shape, [helper.make_node("Expand", ["first", "shape"], [s]) for s in states]


def tiled(states):
    shape = [helper.make_node("Concat", ["one", "batch", "one"], ["repeats"], axis=0)]
    return shape, [helper.make_node("Tile", ["first", "repeats"], [s]) for s in states]


@pytest.mark.parametrize("form", [zeros, expanded_zero, expanded, tiled])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_states_made_of_the_batch(kind, form):
    gates, states = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind], ["h", "c"][: 1 + (kind == "LSTM")]
    shape, made = form(states)
    nodes = [
        helper.make_node("Shape", ["x"], ["sizes"]),
        helper.make_node("Gather", ["sizes", "zero_index"], ["batch"]),
        *shape,
        *made,
        helper.make_node("Transpose", ["x"], ["time_first"], perm=[1, 0, 2]),
        helper.make_node(kind, ["time_first", "w", "r", "b", "", *states], ["y4", "last"], "net", hidden_size=H,
                         **({"linear_before_reset": 1} if kind == "GRU" else {})),
        helper.make_node("Squeeze", ["y4", "one"], ["y3"]),
        helper.make_node("Transpose", ["y3"], ["y"], perm=[1, 0, 2]),
    ]  # fmt: skip
    constants = {
        "w": draw(1, gates * H, C), "r": draw(1, gates * H, H), "b": draw(1, 2 * gates * H), "first": draw(1, 1, H),
        "zero_index": np.array([0]), "one": np.array([1]), "count": np.array([1]), "hidden": np.array([H]),
        "zero": np.float32(0),
    }  # fmt: skip
    outputs = {"y": TensorProto.FLOAT, "last": TensorProto.FLOAT}
    model = model_of(nodes, {"x": draw(N, T, C)}, outputs, opset=14, initializers=constants)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    graph, params = from_onnx(model)
    assert graph.inputs[0].shape == (None, T, C)
    x = draw(6, T, C)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = jq.graph.evaluate_float(graph, params, jnp.asarray(x))
    for y, wanted in zip(found, session.run(None, {"x": x}), strict=True):
        np.testing.assert_allclose(y, wanted, rtol=0, atol=2e-6)
    if form in (zeros, expanded_zero) and kind != "RNN":
        sequence = next(node for node in graph.nodes if node.name == graph.outputs[0])
        assert (type(sequence.op).__name__.upper(), sequence.inputs) == (kind, ("x",))


# ---------------------------------------------------------------------------------------------------------------------
# ONNX with the batch on axis 1


def time_first_file(kind, states):
    """x [T, batch, C], and the states [1, batch, H] if wanted, to y [T, 1, batch, H] and the last state."""
    gates, names = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind], ["h", "c"][: 1 + (kind == "LSTM")] if states else []
    options = {"linear_before_reset": 1} if kind == "GRU" else {}
    node = helper.make_node(kind, ["x", "w", "r", "b", "", *names], ["y", "last"], "net", hidden_size=H, **options)
    constants = {"w": draw(1, gates * H, C), "r": draw(1, gates * H, H), "b": draw(1, 2 * gates * H)}
    inputs = {"x": draw(T, N, C), **{name: draw(1, N, H) for name in names}}
    outputs = {"y": TensorProto.FLOAT, "last": TensorProto.FLOAT}
    model = model_of([node], inputs, outputs, opset=14, initializers=constants)
    for entry in model.graph.input:
        entry.type.tensor_type.shape.dim[1].dim_param = "batch"
    return model


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_file_with_the_batch_on_axis_1(kind, states):
    model = time_first_file(kind, states)
    graph, params = from_onnx(model, batch_axis=1)
    assert [entry.name for entry in graph.inputs] == [entry.name for entry in model.graph.input]
    assert {entry.shape[0] for entry in graph.inputs} == {None}
    inputs = {entry.name: draw(T if entry.name == "x" else 1, 6, *entry.shape[2:]) for entry in graph.inputs}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    y, last = session.run(None, inputs)
    in_front = [jnp.asarray(np.moveaxis(x, 1, 0)) for x in inputs.values()]
    found = jq.graph.evaluate_float(graph, params, *in_front)
    np.testing.assert_allclose(found[0], np.moveaxis(y, 2, 0), rtol=0, atol=2e-6)
    np.testing.assert_allclose(found[1], np.moveaxis(last, 1, 0), rtol=0, atol=2e-6)


def test_shapes_are_those_of_the_file_and_the_other_axis_is_named():
    model = time_first_file("GRU", False)
    with pytest.raises(jq.ConversionError, match=r"axis 1 of input .x. is free.* give batch_axis=1 if"):
        from_onnx(model)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    graph, _ = from_onnx(model, shapes={"x": (T, None, C)}, batch_axis=1)
    assert graph.inputs[0].shape == (None, T, C)
    with pytest.raises(jq.ConversionError, match=r"axis 0 of input 'x' is free, and only axis 1"):
        from_onnx(model, shapes={"x": (None, N, C)}, batch_axis=1)
    with pytest.raises(jq.ConversionError, match="batch_axis=-1; count the axes"):
        from_onnx(model, batch_axis=-1)


def test_a_quantized_file_with_the_batch_on_axis_1():
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "step", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "small", "zero"], ["wd"]),
        helper.make_node("MatMul", ["xd", "wd"], ["z"], "product"),
        helper.make_node("QuantizeLinear", ["z", "step", "zero"], ["zq"]),
        helper.make_node("DequantizeLinear", ["zq", "step", "zero"], ["y"]),
    ]
    weight = RNG.integers(-127, 128, (C, H)).astype(np.int8)
    constants = {"step": np.float32(2**-5), "small": np.float32(2**-8), "zero": np.int8(0), "w": weight}
    model = model_of(nodes, {"x": draw(T, N, C)}, {"y": TensorProto.FLOAT}, opset=14, initializers=constants)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "batch"
    read = model_from_onnx(model, target=jq.targets.NASH_E, batch_axis=1)
    x = draw(T, 5, C)
    xq = np.clip(np.rint(x * 32), -128, 127)  # powers of two: by hand, half to even as in float32 on the host
    wanted = np.clip(np.rint(xq @ weight.astype(np.float64) / 256), -128, 127) / 32
    found = np.asarray(jq.apply(read, jnp.asarray(np.moveaxis(x, 1, 0))))
    assert found.shape == (5, T, H)
    assert np.abs(found - np.moveaxis(wanted, 1, 0)).max() <= 2**-5  # a tie may be rounded to either side
