"""Small modules, imported at batch 1 and compared with torch at batch 7; names, keys and errors."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import jquant as jq
import jquant.ops as ops
from jquant.graph.float import evaluate_float
from jquant.types import ConversionError, Graph
from jquant_converters import from_torch, to_torch
from jquant_converters.drafts import Param
from jquant_converters.reader import Reader


def run_graph(graph: Graph, params: dict[str, jax.Array], *inputs: np.ndarray) -> list[np.ndarray]:
    return [np.asarray(y) for y in evaluate_float(graph, params, *map(jax.numpy.asarray, inputs))]


def randomized(module: nn.Module) -> nn.Module:
    """Statistics and affine parameters away from 0 and 1, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
                for tensor in (m.weight, m.running_var):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
                for tensor in (m.bias, m.running_mean):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
            elif isinstance(m, nn.PReLU):
                m.weight.copy_(torch.rand(m.weight.shape, generator=generator))
    return module.eval()


def check(
    module: nn.Module, *shapes: tuple[int, ...], dynamic_batch: bool = True
) -> tuple[Graph, dict[str, jax.Array]]:
    """Imports with batch 1, compares at batch 7 within 1e-5 of the largest output."""
    generator = torch.Generator().manual_seed(1)
    randomized(module)
    graph, params = from_torch(module, tuple(torch.randn(1, *s) for s in shapes), dynamic_batch=dynamic_batch)
    batch = 7 if dynamic_batch else 1
    inputs = [torch.randn(batch, *s, generator=generator) for s in shapes]
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(module(*(x.clone() for x in inputs)))
    actual = run_graph(graph, params, *(x.numpy() for x in inputs))
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == tuple(e.shape)
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, e.numpy(), rtol=0, atol=1e-5 * float(e.abs().max()))
    return graph, params


def names(graph: Graph) -> list[str]:
    return [node.name for node in graph.nodes]


def types(graph: Graph) -> list[str]:
    return [type(node.op).__name__ for node in graph.nodes]


class Lambda(nn.Module):
    """A module whose forward is a function of itself and its inputs."""

    def __init__(self, forward, **attributes) -> None:
        super().__init__()
        self.function = forward
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.function(self, x)


class Block(nn.Module):
    """The basic block of a ResNet: activations in place, one relu used twice."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += identity
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(Block(8, 8), Block(8, 16, 2))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.layer1(self.maxpool(self.conv1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def test_resnet():
    module = ResNet()
    graph, params = check(module, (3, 32, 32))
    assert names(graph) == [
        "conv1", "maxpool",
        "layer1.0.conv1", "layer1.0.bn1", "layer1.0.relu",
        "layer1.0.conv2", "layer1.0.bn2", "layer1.0.add", "layer1.0.relu_1",
        "layer1.1.downsample.0", "layer1.1.downsample.1",
        "layer1.1.conv1", "layer1.1.bn1", "layer1.1.relu",
        "layer1.1.conv2", "layer1.1.bn2", "layer1.1.add", "layer1.1.relu_1",
        "avgpool", "flatten", "fc",
    ]  # fmt: skip
    assert set(params) == {k for k in module.state_dict() if not k.endswith("num_batches_tracked")}
    assert graph.inputs[0].name == "x"
    assert graph.inputs[0].shape == (None, 3, 32, 32)
    assert graph.by_name["layer1.0.add"].inputs == ("layer1.0.bn2", "maxpool")
    assert dict(graph.by_name["layer1.0.bn1"].params) == {
        role: f"layer1.0.bn1.{role}" for role in ("running_mean", "running_var", "weight", "bias")
    }
    for key, value in params.items():
        np.testing.assert_array_equal(value, module.state_dict()[key].numpy())


def conv_bn(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


class Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [] if expansion == 1 else [conv_bn(inputs, hidden)]
        project = (nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.conv = nn.Sequential(*expand, conv_bn(hidden, hidden, 3, stride, hidden), *project)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x):
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        stages = (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        )
        features, channels = [conv_bn(3, 32, 3, 2)], 32
        for expansion, outputs, repeats, stride in stages:
            for i in range(repeats):
                features.append(Inverted(channels, outputs, stride if i == 0 else 1, expansion))
                channels = outputs
        self.features = nn.Sequential(*features, conv_bn(channels, 1280))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 10))

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.features(x), (1, 1))
        return self.classifier(torch.flatten(x, 1))


def test_mobilenet_v2():
    graph, params = check(MobileNetV2(), (3, 64, 64))
    assert len(params) == 262
    assert {"features.0.0", "features.1.conv.0.2", "features.3.add", "classifier.1"} <= set(names(graph))
    assert types(graph).count("Conv") == 52
    assert graph.by_name["classifier.0"].op == ops.Dropout(rate=0.2)
    assert graph.outputs == ("classifier.1",)


def test_conv1d_net():
    net = nn.Sequential(
        nn.Conv1d(2, 6, 5, stride=2, dilation=2, padding=3),
        nn.BatchNorm1d(6),
        nn.LeakyReLU(0.2, inplace=True),
        nn.MaxPool1d(3, 2, ceil_mode=True),
        nn.Conv1d(6, 6, 3, groups=3, padding="same"),
        nn.AvgPool1d(2, count_include_pad=False, padding=1),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
        nn.BatchNorm1d(4),
        nn.Sigmoid(),
    )
    graph, params = check(net, (2, 40))
    assert names(graph) == [str(i) for i in range(11)]
    assert graph.by_name["0"].op == ops.Conv(strides=(2,), padding=((3, 3),), dilation=(2,))
    assert graph.by_name["4"].op == ops.Conv(strides=(1,), padding=((1, 1),), dilation=(1,), groups=3)
    assert "9.running_var" in params


@pytest.mark.parametrize(
    ("layer", "shape", "op"),
    [
        (nn.Conv2d(3, 4, (2, 3), padding="same", dilation=(1, 2)), (3, 9, 9), ops.Conv),
        (nn.Conv2d(3, 4, 3, padding="valid", bias=False), (3, 9, 9), ops.Conv),
        (nn.Conv2d(4, 4, 3, stride=(1, 2), padding=(0, 1), groups=2), (4, 9, 9), ops.Conv),
        (nn.Linear(5, 4, bias=False), (3, 5), ops.Linear),
        (nn.BatchNorm1d(5), (5,), ops.BatchNorm),
        (nn.BatchNorm1d(5), (5, 6), ops.BatchNorm),
        (nn.BatchNorm2d(5, eps=1e-3, affine=True), (5, 6, 6), ops.BatchNorm),
        (nn.PReLU(), (4, 5, 5), ops.PRelu),
        (nn.PReLU(4), (4, 5, 5), ops.PRelu),
        (nn.PReLU(4), (4,), ops.PRelu),
        (nn.ReLU(), (4,), ops.Relu),
        (nn.ReLU6(), (4,), ops.Relu6),
        (nn.Hardtanh(0, 6, inplace=True), (4,), ops.Relu6),
        (nn.LeakyReLU(0.3), (4,), ops.LeakyRelu),
        (nn.Softmax(1), (4, 3), ops.Softmax),
        (nn.Dropout(0.3), (4, 3), ops.Dropout),
        (nn.MaxPool2d(3, 2, 1, dilation=2), (4, 13, 13), ops.MaxPool),
        (nn.MaxPool2d(2, ceil_mode=True), (4, 7, 7), ops.MaxPool),
        (nn.AvgPool2d(3, 2, 1), (4, 8, 8), ops.AvgPool),
        (nn.AvgPool2d((3, 2), 2, (1, 0), ceil_mode=True, count_include_pad=False), (4, 8, 9), ops.AvgPool),
        (nn.AvgPool2d(3, 2, 1, ceil_mode=True), (4, 8, 8), ops.AvgPool),
        (nn.AdaptiveAvgPool2d((3, 2)), (4, 6, 6), ops.AdaptiveAvgPool),
        (nn.AdaptiveAvgPool2d((None, 2)), (4, 7, 6), ops.AdaptiveAvgPool),
        (nn.ZeroPad2d((1, 2, 3, 4)), (4, 5, 5), ops.Pad),
        (nn.ConstantPad1d((1, 2), 0.5), (4, 5), ops.Pad),
        (nn.Flatten(2), (4, 5, 5), ops.Flatten),
        (nn.Unflatten(1, (2, 2)), (4, 5), ops.Reshape),
    ],
    ids=lambda v: repr(v) if isinstance(v, nn.Module) else "",
)
def test_layer(layer, shape, op):
    graph, _ = check(nn.Sequential(layer), shape)
    assert [(node.name, type(node.op)) for node in graph.nodes] == [("0", op)]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, x: F.relu(x), ["relu:Relu"]),
        (lambda m, x: F.relu6(x), ["relu6:Relu6"]),
        (lambda m, x: F.hardtanh(x, 0.0, 6.0), ["hardtanh:Relu6"]),
        (lambda m, x: x.clamp(0, 6), ["clamp:Relu6"]),
        (lambda m, x: x.clamp(min=0), ["clamp:Relu"]),
        (lambda m, x: torch.sigmoid(x), ["sigmoid:Sigmoid"]),
        (lambda m, x: F.softmax(x, -1), ["softmax:Softmax"]),
        (lambda m, x: F.dropout(x, 0.2, m.training), ["dropout:Dropout"]),
        (lambda m, x: x + x, ["add:Add"]),
        (lambda m, x: x * x, ["mul:Mul"]),
        (lambda m, x: x * 2, ["mul:Scale"]),
        (lambda m, x: -0.5 * x, ["mul:Scale"]),
        (lambda m, x: x / 255, ["div:Scale"]),
        (lambda m, x: -x, ["neg:Neg"]),
        (lambda m, x: x + 1.0, ["add.other:Constant", "add:Add"]),
        (lambda m, x: x - 1, ["sub.other:Constant", "sub:Sub"]),
        (lambda m, x: 1 - x, ["rsub.self:Constant", "rsub:Sub"]),
        (lambda m, x: x - x.relu(), ["relu:Relu", "sub:Sub"]),
        (lambda m, x: x * torch.tensor(3.0), ["mul.other:Constant", "mul:Mul"]),
        (lambda m, x: (x + 1) + 2, ["add.other:Constant", "add:Add", "add_1.other:Constant", "add_1:Add"]),
        (lambda m, x: torch.cat([x, x * 2], 1), ["mul:Scale", "cat:Cat"]),
        (lambda m, x: torch.cat([x, x], -1), ["cat:Cat"]),
        (lambda m, x: x.mean((-1, -2)), ["mean:Mean"]),
        (lambda m, x: x.mean(1, keepdim=True), ["mean:Mean"]),
        (lambda m, x: x.mean(), ["mean:Mean"]),
        (lambda m, x: x.flatten(1), ["flatten:Flatten"]),
        (lambda m, x: x.view(x.size(0), -1), ["view:Reshape"]),
        (lambda m, x: x.reshape(-1, 3), ["reshape:Reshape"]),
        (lambda m, x: x.reshape(x.shape[0] * 2, 2, 6), ["reshape:Reshape"]),
        (lambda m, x: x.permute(0, 2, -1, 1), ["permute:Permute"]),
        (lambda m, x: x.transpose(1, -1), ["transpose:Permute"]),
        (lambda m, x: x.flatten(1).t(), ["flatten:Flatten", "t:Permute"]),
        (lambda m, x: x.unsqueeze(1).squeeze(1), ["unsqueeze:Reshape", "squeeze:Reshape"]),
        (lambda m, x: F.pad(x, (1, 0, 2, 1), value=2.0), ["pad:Pad"]),
        (lambda m, x: F.max_pool2d(x, 2), ["max_pool2d:MaxPool"]),
        (lambda m, x: F.avg_pool2d(x, 2), ["avg_pool2d:AvgPool"]),
        (lambda m, x: F.leaky_relu(x), ["leaky_relu:LeakyRelu"]),
        (lambda m, x: x.clone().contiguous().detach().float().relu(), ["relu:Relu"]),
        (lambda m, x: F.dropout2d(x, 0.0, False).relu(), ["relu:Relu"]),
    ],
)
def test_functional(function, expected):
    graph, _ = check(Lambda(function), (4, 2, 3))
    assert [f"{node.name}:{type(node.op).__name__}" for node in graph.nodes] == expected


def test_constants_of_the_code_are_params():
    graph, params = check(Lambda(lambda m, x: x + 1.5), (4,))
    assert dict(graph.by_name["add.other"].params) == {"value": "add.other"}
    assert params["add.other"].shape == ()
    assert float(params["add.other"]) == 1.5


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pos = nn.Parameter(torch.randn(1, 4, 5))
        self.register_buffer("mean", torch.randn(4, 1))
        self.register_buffer("hidden", torch.randn(5), persistent=False)
        self.plain = torch.randn(5)
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        return self.fc((x + self.pos) * self.mean + self.hidden + self.plain + self.pos)


def test_every_constant_of_the_code_keeps_its_value():
    """Constants that live for one call only must not be found again under the place in memory that they left."""
    program = torch.export.export(nn.ReLU(), (torch.zeros(1),))
    reader = Reader(program, dynamic_batch=False)
    node = next(n for n in program.graph.nodes if n.op == "call_function")
    drafts = [reader.constant(node, None, Param(None, torch.tensor(float(i))), "value") for i in range(100)]
    assert [float(draft.constant.tensor) for draft in drafts] == list(range(100))


def test_parameters_and_buffers_as_operands():
    graph, params = check(Positions(), (4, 5))
    assert set(params) == {"pos", "mean", "hidden", "plain", "fc.weight", "fc.bias"}
    constants = [n for n in graph.nodes if isinstance(n.op, ops.Constant)]
    assert [n.name for n in constants] == ["pos", "mean", "hidden", "plain"]
    assert graph.by_name["add_3"].inputs == ("add_2", "pos")


def test_a_buffer_may_be_reshaped():
    graph, _ = check(Lambda(lambda m, x: x * m.gain.view(1, -1, 1), gain=nn.Parameter(torch.randn(4))), (4, 5))
    assert types(graph) == ["Constant", "Reshape", "Mul"]


def test_shared_module_and_shared_weight():
    def forward(m, x):
        return m.b(m.relu(m.a(m.relu(m.a(x)))))

    a, b = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
    b.weight = a.weight
    graph, params = check(Lambda(forward, a=a, b=b, relu=nn.ReLU()), (4,))
    assert names(graph) == ["a", "relu", "a_1", "relu_1", "b"]
    assert len({graph.by_name[n].params["weight"] for n in ("a", "a_1", "b")}) == 1
    assert len(params) == 2


def test_names_stay_apart():
    """Layers before functional calls, inputs last."""

    class Clash(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()
            self.x = nn.Linear(4, 4)

        def forward(self, x, add):
            return self.relu(self.x(F.relu(x) + add))

    graph, _ = check(Clash(), (4,), (4,))
    assert names(graph) == ["relu_1", "add", "x", "relu"]
    assert [i.name for i in graph.inputs] == ["x_1", "add_1"]


def test_keys_of_constants_stay_apart_from_the_state_dict():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return F.relu(F.linear(x, self.weight))

    module = Lambda(lambda m, x: F.linear(m.linear(x), torch.tensor([[1.0, 2.0, 3.0, 4.0]])), linear=Odd())
    graph, params = check(module, (4,))
    assert names(graph) == ["linear.linear", "linear.relu", "linear"]
    assert set(params) == {"linear.weight", "linear.weight_1"}


def test_layers_of_more_than_one_operator_and_derived_layers():
    class MyConv(nn.Conv2d):
        pass

    class Wide(nn.Linear):
        def forward(self, x):
            return F.relu(super().forward(x))

    graph, params = check(nn.Sequential(MyConv(3, 4, 3), nn.Flatten(), Wide(36, 2)), (3, 5, 5))
    assert names(graph) == ["0", "1", "2.linear", "2.relu"]
    assert set(params) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_module_that_is_one_layer():
    graph, params = check(nn.Conv2d(3, 4, 3), (3, 5, 5))
    assert graph.outputs == ("conv2d",)
    assert set(params) == {"weight", "bias"}


def test_outputs_are_flattened_in_order():
    graph, _ = check(Lambda(lambda m, x: {"b": x.relu(), "a": [x * 2, (x + x,)]}), (4,))
    assert graph.outputs == ("relu", "mul", "add")


def test_nested_inputs():
    class Pair(nn.Module):
        def forward(self, xs, *rest):
            return xs[0] + xs[1] * rest[0]

    x = torch.randn(1, 3)
    graph, params = from_torch(Pair(), ((x, x), x))
    assert [i.shape for i in graph.inputs] == [(None, 3)] * 3
    a, b, c = (np.random.default_rng(i).normal(size=(5, 3)).astype(np.float32) for i in range(3))
    np.testing.assert_allclose(run_graph(graph, params, a, b, c)[0], a + b * c, rtol=1e-5, atol=1e-6)


def test_unused_operators_and_params_are_dropped():
    def forward(m, x):
        m.unused(x)
        return m.used(x)

    graph, params = check(Lambda(forward, used=nn.Linear(3, 3), unused=nn.Linear(3, 3)), (3,))
    assert names(graph) == ["used"]
    assert set(params) == {"used.weight", "used.bias"}


def test_changes_in_place_are_followed():
    def forward(m, x):
        y = m.conv(x)
        z = y
        y.relu_()
        y += 1
        return z * y

    check(Lambda(forward, conv=nn.Conv2d(3, 3, 1)), (3, 4, 4))


def test_fixed_batch():
    module = Lambda(lambda m, x: x.view(1, -1) * 2)
    graph, _ = check(module, (4, 5), dynamic_batch=False)
    assert graph.inputs[0].shape == (1, 4, 5)
    assert graph.by_name["view"].op == ops.Reshape(shape=(1, 20))


def test_dropout_of_channels_drops_whole_channels():
    """As torch's Dropout2d: in training a channel of an example is zero or scaled up as a whole, as in torch."""
    module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Dropout2d(0.25)).eval()
    graph, params = check(module, (3, 4, 4))
    assert graph.by_name["1"].op == ops.Dropout(rate=0.25, shared_axes=(2, 3))
    back = to_torch(graph, params)
    assert "aten.feature_dropout.default" in {
        str(node.target) for node in torch.export.export(back, (torch.ones(2, 3, 4, 4),)).graph.nodes
    }
    model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target=jq.targets.NASH_E)
    x = torch.ones(64, 3, 4, 4)
    y, _ = jq.apply_train(model, jnp.asarray(x), rngs=jax.random.key(0), mode="float")
    ratio = np.asarray(y) / module(x).detach().numpy()
    assert (ratio == ratio[:, :, :1, :1]).all()
    drops = np.isclose(ratio[:, :, 0, 0], 0)
    np.testing.assert_allclose(ratio[:, :, 0, 0][~drops], 1 / 0.75, rtol=1e-4)
    assert abs(drops.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / drops.size)


def test_training_flags_are_restored_and_params_are_copies():
    module = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
    module[1].eval()
    _, params = from_torch(module, torch.randn(2, 3))
    assert [m.training for m in module.modules()] == [True, True, False]
    before = np.array(params["0.weight"])
    with torch.no_grad():
        module[0].weight.zero_()
    np.testing.assert_array_equal(params["0.weight"], before)


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def test_unknown_operators_are_listed_at_once():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardshrink(), nn.Sequential(nn.MaxPool2d(2), nn.RReLU()))
    with pytest.raises(ConversionError) as caught:
        from_torch(module, (torch.randn(1, 3, 8, 8),))
    message = str(caught.value)
    assert "aten.hardshrink.default at 1 on [batch, 4, 6, 6]" in message
    assert "aten.rrelu.default at 2.1 on [batch, 4, 3, 3]" in message
    assert "TABLE" in message
    assert message.count("aten.") == 3  # the two, and the table


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: F.max_pool2d(x, 2, return_indices=True)[1] + 1, "positions of a maximum"),
        (lambda m, x: x.double().float(), "float64"),
        (lambda m, x: torch.div(x, 0, rounding_mode="floor"), "the divisor is 0"),
        (lambda m, x: x.argmax(1) // x.argmin(1), "divided by a tensor"),
        (lambda m, x: F.gelu(x).prod(), "prod"),
        (lambda m, x: x[x > 0].sum(), "selection by a mask"),
        (lambda m, x: x.argmax(1) * 0.5, "int32"),
        (lambda m, x: x.argmax(1).float(), "conversion from torch.int64"),
        (lambda m, x: x.norm(3), "order 3"),
        (lambda m, x: x + torch.tensor([1.0, float("-inf")]).repeat(3), "minus infinity and numbers"),
        (lambda m, x: F.grid_sample(x, x.permute(0, 2, 3, 1)[..., :2], "bicubic", align_corners=False), "bicubic"),
        (lambda m, x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1), "eval mode"),
        (
            lambda m, x: F.scaled_dot_product_attention(x[:, 0], x[:, 0], x[:, 0], enable_gqa=True),
            "heads depend on the batch",
        ),
        (lambda m, x: torch.pow(x, x), "exponent"),
        (lambda m, x: x * x.shape[0], "batch size"),
        (lambda m, x: x * 0, "factor is 0"),
        (lambda m, x: F.conv2d(x, m.w * x.mean()), "weight is computed"),
        (lambda m, x: F.dropout(x, 0.5, True), "eval mode"),
        (lambda m, x: F.dropout2d(x, 0.5, True), "eval mode"),
        (lambda m, x: F.alpha_dropout(x, 0.5, False), "alpha dropout"),
        (lambda m, x: F.batch_norm(x, None, None, training=True), "statistics of the batch"),
        (lambda m, x: x.mean((0, 1)) * x[:1], "aten.slice.*examples of the batch"),
        (lambda m, x: m.w.relu_().sum() + x, "in place"),
    ],
)
def test_refused_with_a_reason(function, reason):
    module = Lambda(function, w=nn.Parameter(torch.randn(4, 4, 1, 1)))
    with pytest.raises(ConversionError, match=reason):
        from_torch(module, (torch.randn(1, 4, 6, 6),))


def test_a_change_through_a_view_reaches_what_it_views():
    def forward(m, x):
        y = x * 2
        y.view(-1).relu_()
        return y + 1, y

    x = torch.randn(3, 4)
    graph, params = from_torch(Lambda(forward), x)
    found = evaluate_float(graph, params, jax.numpy.asarray(x.numpy()))
    for y, wanted in zip(found, forward(None, x), strict=True):
        np.testing.assert_array_equal(y, wanted.numpy())


def test_specialised_batch_says_what_to_do():
    with pytest.raises(ConversionError, match=r"cannot stay symbolic.*dynamic_batch=False"):
        from_torch(Lambda(lambda m, x: x.view(2, -1) + torch.zeros(2, 1)), torch.randn(1, 4))


def test_two_axes_of_the_batch():
    def forward(m, x):
        return torch.cat([x.t(), x.t()]).view(8, 1, x.shape[0]) + x.unsqueeze(1).view(x.shape[0], 1, 4).mean()

    check(Lambda(forward), (4,))


def test_branch_on_values_names_the_line():
    def forward(m, x):
        if x.sum() > 0:
            return x * 2
        return x * 3

    with pytest.raises(ConversionError, match=r"test_from_torch\.py:\d+ `if x\.sum\(\) > 0:`.*torch\.where"):
        from_torch(Lambda(forward), torch.randn(1, 4))


def test_error_of_the_forward_names_the_line():
    with pytest.raises(ConversionError, match=r"cannot trace Sequential.*The forward must run"):
        from_torch(nn.Sequential(nn.Linear(3, 3)), torch.randn(1, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_float_dtype_is_read_as_float32(dtype):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5)).to(dtype)
    randomized(module)
    x = torch.randn(2, 3, 6, 6).to(dtype)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    graph, params = from_torch(module, (x,))
    assert {str(p.dtype) for p in params.values()} == {"float32"}
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())
    assert all(tensor.dtype == before[key].dtype for key, tensor in module.state_dict().items())
    (actual,) = run_graph(graph, params, x.float().numpy())
    with torch.no_grad():
        expected = copy.deepcopy(module).double()(x.double()).numpy()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_a_conversion_to_half_in_the_code_is_refused():
    with pytest.raises(ConversionError, match=r"conversion from torch\.float32 to torch\.float16"):
        from_torch(Lambda(lambda m, x: m.fc(x).half() * 2, fc=nn.Linear(3, 3).half()), torch.randn(2, 3).half())


def test_a_half_model_that_cannot_be_copied_is_named():
    class Alone(nn.Linear):
        def __deepcopy__(self, memo):
            raise TypeError("there is one of me")

    with pytest.raises(ConversionError, match=r"'weight' is torch\.float16.*one of me.*module\.float\(\)"):
        from_torch(Alone(3, 3).half(), torch.randn(1, 3))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (x * 2, None),
        lambda m, x: {"out": x * 2, "aux": None},
        lambda m, x: (None, [x * 2, None], {"a": None, "b": x + 1}),
    ],
)
def test_none_in_the_result_stays_where_it_is(function, tmp_path):
    x = torch.randn(2, 4)
    graph, params = from_torch(Lambda(function), x)
    expected, array = function(None, x), jax.numpy.asarray(x.numpy())
    qconfig = jq.QConfig({"*": jq.Policy(output=jq.int16())})
    model = jq.calibrate(jq.prepare(graph, params, qconfig, target=jq.targets.NASH_E), [array])
    jq.save(tmp_path / "p.safetensors", jq.lower(model))
    program = jq.load(tmp_path / "p.safetensors")
    for actual in (jq.apply(model, array, mode="float"), jq.run(program, array)):
        leaves, structure = torch.utils._pytree.tree_flatten(actual)
        wanted, nesting = torch.utils._pytree.tree_flatten(expected)
        assert structure == nesting
        for a, e in zip(leaves, wanted, strict=True):
            assert (a is None) == (e is None)
            if e is not None:
                np.testing.assert_allclose(np.asarray(a), e.numpy(), atol=1e-3)


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite values")])
def test_parameters_that_are_not_finite(value, word):
    module = nn.Sequential(nn.Linear(3, 3))
    with torch.no_grad():
        module[0].bias[1] = value
    with pytest.raises(ConversionError, match=rf"'0\.bias' contains {word}"):
        from_torch(module, torch.randn(1, 3))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: (x * 2, 3), "output 1 is 3, not a tensor"),
        (lambda m, x: (None, None), "no tensor"),
        (lambda m, x: (x * 2, x.shape[0]), "output 1 is .*, not a tensor"),
    ],
)
def test_bad_outputs(function, reason):
    with pytest.raises(ConversionError, match=reason):
        from_torch(Lambda(function), torch.randn(1, 4))


def test_inputs_that_are_outputs():
    x = torch.randn(2, 4)

    class Passing(nn.Module):
        def forward(self, x, at):
            return at, {"twice": x * 2, "x": x}

    graph, params = from_torch(Passing(), (x, torch.arange(2)))
    assert graph.outputs[0] == "at"
    assert graph.outputs[2] == "x"
    found = evaluate_float(graph, params, x.numpy(), np.int32([0, 1]))
    for a, b in zip(found, (np.int32([0, 1]), 2 * x.numpy(), x.numpy()), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_power_of_zero_is_one():
    x = torch.tensor([[-1.5, 0.0, 2.0]])
    graph, params = from_torch(Lambda(lambda m, x: (x**0, torch.pow(x, 0.0))), x)
    for found in evaluate_float(graph, params, x.numpy()):
        np.testing.assert_array_equal(found, np.ones(x.shape, np.float32))
    with pytest.raises(ConversionError, match="the exponent is inf"):
        from_torch(Lambda(lambda m, x: x ** float("inf")), x)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ((), "empty"),
        ((torch.ones(1, 4, dtype=torch.complex64),), "complex64"),
        ((torch.ones(1, 4), 3), "not a tensor"),
        ((torch.ones(1, 4), torch.ones(2, 4)), "equal batches"),
        ((torch.ones(()),), "dynamic_batch=False"),
    ],
)
def test_bad_example_inputs(inputs, reason):
    with pytest.raises(ConversionError, match=reason):
        from_torch(nn.Linear(4, 4), inputs)


def test_not_a_module():
    with pytest.raises(ConversionError, match="not function"):
        from_torch(lambda x: x, torch.ones(1))


# ---------------------------------------------------------------------------------------------------------------------
# Exact values, constants, several results


def test_exact_inputs():
    def forward(m, ids, mask, pixels):
        return torch.where(mask, ids, ids.clamp(max=9) + 1), pixels / 255

    class Exact(nn.Module):
        def forward(self, *inputs):
            return forward(self, *inputs)

    ones = torch.ones(2, 3)
    example = (ones.to(torch.int64), ones.to(torch.bool), ones.to(torch.uint8))
    graph, params = from_torch(Exact(), example)
    assert [i.dtype for i in graph.inputs] == ["int32", "bool", "uint8"]
    ids, mask = np.arange(6, dtype=np.int32).reshape(2, 3), np.eye(2, 3) > 0
    chosen, scaled = run_graph(graph, params, ids, mask, np.full((2, 3), 51, np.uint8))
    np.testing.assert_array_equal(chosen, np.where(mask, ids, ids + 1))
    np.testing.assert_allclose(scaled, np.full((2, 3), 0.2), rtol=1e-6)


def test_what_follows_from_buffers_is_computed_at_the_import():
    def forward(m, x):
        steps = torch.arange(x.shape[1])
        past = steps[:, None] >= steps[None, :]
        return (x[:, :, None] * m.gain).masked_fill(~past, float("-inf")).softmax(-1)

    graph, _ = check(Lambda(forward, gain=nn.Buffer(torch.randn(4))), (4,))
    assert types(graph) == ["Reshape", "Constant", "Mul", "IntegerConstant", "Softmax"]
    assert len(graph.by_name["softmax"].inputs) == 2  # the mask is an operand of the softmax


def test_a_change_in_place_of_a_constant():
    def forward(m, x):
        mask = torch.zeros(4)
        before = x * mask
        mask[1:] = 2
        return before + x * mask

    check(Lambda(forward), (4,))


def test_masked_fill_without_softmax_is_kept():
    graph, _ = check(Lambda(lambda m, x: x.masked_fill(x > 0, -1e9).amax(1)), (4,))
    assert types(graph) == ["Greater", "MaskedFill", "ReduceMax"]


def test_an_added_mask_of_infinities_becomes_a_mask():
    mask = torch.full((4, 4), float("-inf")).triu(1)
    graph, _ = check(Lambda(lambda m, x: (x + m.mask).softmax(-1), mask=nn.Buffer(mask)), (4, 4))
    assert types(graph) == ["IntegerConstant", "Softmax"]


def test_results_that_nobody_reads_need_no_operator():
    graph, _ = check(Lambda(lambda m, x: F.max_pool2d(x, 2, return_indices=True)[0]), (4, 6, 6))
    assert types(graph) == ["MaxPool"]


def test_parts_of_a_packed_weight_are_weights():
    def forward(m, x):
        query, rest = m.packed.split([4, 8])
        return F.linear(F.linear(x, query), rest)

    graph, params = check(Lambda(forward, packed=nn.Parameter(torch.randn(12, 4))), (5, 4))
    assert types(graph) == ["Linear", "Linear"]
    assert params[graph.by_name["linear"].params["weight"]].shape == (4, 4)


def test_transformer_encoder_is_imported_as_operators():
    assert torch.backends.mha.get_fastpath_enabled()
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    graph, _ = check(layer, (5, 8))
    assert {"Attention", "LayerNorm", "Linear"} <= set(types(graph))
    assert torch.backends.mha.get_fastpath_enabled()


def test_only_used_states_of_an_lstm_are_nodes():
    graph, _ = check(Lambda(lambda m, x: m.rnn(x)[0], rnn=nn.LSTM(3, 4, batch_first=True)), (5, 3))
    assert [(n.name, type(n.op)) for n in graph.nodes] == [("rnn", ops.Lstm)]


def test_other_names_of_torch():
    def forward(m, x):
        return torch.subtract(torch.clip(torch.absolute(x), 0.1, 0.9), torch.special.expit(x)), torch.greater(x, 0.2)

    graph, _ = from_torch(Lambda(forward), torch.randn(1, 4))
    assert types(graph) == ["Abs", "Clamp", "Sigmoid", "Sub", "Greater"]
