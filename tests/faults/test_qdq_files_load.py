"""QDQ files load and run in onnxruntime at every optimization level, and no two of their nodes share a name."""

import collections
import dataclasses

import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F

import jquant as jq
from jquant_converters import from_torch, model_from_onnx, to_onnx

TARGET = jq.targets.NASH_E
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")


class Moves(torch.nn.Module):
    """Convolutions with slices, reshapes, transpositions and a concatenation between them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 4, 3, padding=1)
        self.head = torch.nn.Linear(16, 5)

    def forward(self, x):
        y = torch.relu(self.first(x))
        halves = torch.cat([y[:, 4:], y[:, :4]], 1).permute(0, 1, 3, 2)
        z = F.max_pool2d(self.second(halves[:, :, ::2]), 2)
        return self.head(z.reshape(z.shape[0], -1)[:, :16])


class Residual(torch.nn.Module):
    """A padding of channels and a strided slice beside a convolution, as the shortcut of a CIFAR ResNet."""

    def __init__(self):
        super().__init__()
        self.conv, self.next = torch.nn.Conv2d(4, 8, 3, 2, 1), torch.nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        y = torch.relu(self.conv(x) + short)
        return (self.next(y) + y).mean((2, 3))


class Tokens(torch.nn.Module):
    """Linear layers with bias on three axes, in front of additions and an activation."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6), torch.nn.Linear(6, 6, bias=False)

    def forward(self, x):
        y = F.relu(self.a(x) + x)
        return F.relu6(self.b(y) + self.c(y)).transpose(1, 2).reshape(x.shape[0], -1)


class Resized(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.up = torch.nn.Conv2d(4, 4, 1), torch.nn.ConvTranspose2d(4, 4, 2, 2)

    def forward(self, x):
        y = F.interpolate(self.conv(x), scale_factor=2.0)
        return torch.sigmoid(F.avg_pool2d(y, 2)) * self.up(x)[:, :, ::2, ::2]


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.norm = torch.nn.Linear(6, 12), torch.nn.LayerNorm(6)

    def forward(self, x):
        q, k = self.q(self.norm(x)).chunk(2, -1)
        return torch.softmax(q @ k.transpose(1, 2), -1) @ x


NETS = {
    "moves": (Moves, (2, 3, 8, 8)),
    "residual": (Residual, (2, 4, 8, 8)),
    "tokens": (Tokens, (2, 5, 6)),
    "resized": (Resized, (2, 4, 6, 6)),
    "attention": (Attention, (2, 5, 6)),
}
FORMATS = {"int8": ("int8", "int8"), "int16": ("int16", "int8"), "int4 weights": ("int8", "int4")}


def exported(name, formats, scale_form="real"):
    kind, shape = NETS[name]
    torch.manual_seed(0)
    x = torch.randn(shape)
    graph, params = from_torch(kind().eval(), (x,))
    value, weight = (jq.QuantSpec(dtype=dtype, scale_form=scale_form) for dtype in FORMATS[formats])
    model = jq.prepare(graph, params, jq.QConfig({"*": jq.Policy(output=value, weight=weight)}), target=TARGET)
    model = jq.calibrate(model, [jnp.asarray(x.numpy())])
    return x.numpy(), model, to_onnx(model)


def run(model, x, level):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("name", NETS)
def test_a_qdq_file_runs_at_every_optimization_level(name, formats):
    x, state, model = exported(name, formats)
    want = np.asarray(jq.apply(state, jnp.asarray(x), mode="fake_quant"))
    wide = np.abs(want).max()
    for level in LEVELS:
        got = run(model, x, level)
        assert got.shape == want.shape
        if level == "ORT_DISABLE_ALL":  # a value on a tie may round to the other side
            assert np.abs(got - want).max() <= 0.02 * wide
        # Where pair sums saturate, values differ; all the same they are those of this net.
        assert np.isfinite(got).all()
        assert np.abs(got).max() <= 3 * wide


@pytest.mark.parametrize("name", NETS)
def test_node_names_are_unique(name):
    _, _, model = exported(name, "int8")
    names = collections.Counter(node.name for node in model.graph.node)
    assert [n for n, count in names.items() if count > 1] == []
    assert "" not in names
    values = [v for node in model.graph.node for v in node.output] + [t.name for t in model.graph.initializer]
    assert len(set(values)) == len(values)


@pytest.mark.parametrize(("formats", "opset", "ir"), [("int8", 19, 9), ("int16", 21, 10), ("int4 weights", 21, 10)])
def test_the_opset_is_the_oldest_that_has_the_formats(formats, opset, ir):
    _, _, model = exported("moves", formats)
    assert (model.opset_import[0].version, model.ir_version) == (opset, ir)


@pytest.mark.parametrize("name", ["moves", "tokens"])
def test_integers_stay_with_optimizations_off(name):
    """With scales that are powers of two and ONNX's ties nothing is lost in float32: the integers to the last bit."""
    x, state, model = exported(name, "int8", "pow2")
    target = TARGET.with_fields({"rescale.post_rounding": "half_even", "rescale.high_precision": True})
    state = state.replace(plan=dataclasses.replace(state.plan, target=target))
    want = np.asarray(jq.run(jq.lower(state), jnp.asarray(x)))
    np.testing.assert_array_equal(run(model, x, "ORT_DISABLE_ALL"), want)


def test_two_layers_that_end_alike_come_back():
    _, state, model = exported("tokens", "int8")
    again = model_from_onnx(model, target=TARGET)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 6)).astype(np.float32))
    first, second = jq.lower(state), jq.lower(again)
    np.testing.assert_array_equal(jq.run(first, x), jq.run(second, x))


def test_the_transposed_keys_of_attention_have_a_pair():
    """Beside the int16 of its softmax, onnxruntime put one there at opset 21, and refused its own file: a ViT."""

    class Attend(torch.nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x)

    x = torch.randn(2, 1, 5, 6, generator=torch.Generator().manual_seed(0))
    graph, params = from_torch(Attend(), x)
    model = jq.prepare(graph, params, jq.QConfig({"*": jq.Policy(output=jq.int8())}), target=TARGET)
    given = jnp.asarray(x.numpy())
    model = jq.calibrate(model, [given])
    file = to_onnx(model)
    for level in LEVELS:
        assert np.isfinite(run(file, x.numpy(), level)).all()
    again = jq.lower(model_from_onnx(file, target=TARGET))
    np.testing.assert_array_equal(jq.run(jq.lower(model), given), jq.run(again, given))
