"""Quantized torch models: modules of torch.ao, fake-quantized modules, torchao's weights; encodings; checkpoints."""

import copy
import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.foreign_files import FOLDER
from torch import nn
from torch.ao.quantization import MinMaxObserver, QConfig, QConfigMapping, default_per_channel_weight_observer
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx, prepare_qat_fx

import jquant as jq
from jquant.types import FormatError
from jquant_converters import from_torch, model_from_encodings, model_from_torch, to_encodings, to_onnx
from jquant_converters.encodings import read_encodings
from jquant_converters.files import read_state_dict

pytestmark = pytest.mark.filterwarnings("ignore")
OBSERVER = MinMaxObserver.with_args(dtype=torch.quint8, qscheme=torch.per_tensor_symmetric)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.first, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Linear(64, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.head((torch.relu(self.first(x)) + x).flatten(1))


def prepared(prepare=prepare_fx, weight=default_per_channel_weight_observer):
    torch.manual_seed(0)
    net = Net().train() if prepare is prepare_qat_fx else Net().eval()
    qconfig = QConfig(activation=OBSERVER, weight=weight)
    made = prepare(net, QConfigMapping().set_global(qconfig), (torch.randn(1, 3, 4, 4),))
    made(torch.randn(8, 3, 4, 4))
    return made.eval(), torch.randn(2, 3, 4, 4)


def check(model, x, expected, steps=1):
    """`steps` of the output: torch multiplies by the reciprocal of a scale, so that a tie may go the other way."""
    step = float(model.qparams["head"])
    for found in (jq.apply(model, jnp.asarray(x.numpy())), jq.run(jq.lower(model), jnp.asarray(x.numpy()))):
        distance = np.abs(np.asarray(found) - expected.numpy()) / step
        assert distance.max() <= steps + 0.01
        assert (distance > 0.5).mean() <= 0.34


@pytest.mark.parametrize("convert", [convert_fx, pytest.param(convert_to_reference_fx, marks=pytest.mark.slow)])
def test_fx_modules(convert):
    """Against torch's reference form, in reals: the kernels of fbgemm saturate."""
    made, x = prepared()
    reference = convert_to_reference_fx(copy.deepcopy(made))
    with torch.no_grad():
        expected = reference(x)
    converted = convert(copy.deepcopy(made))
    model = model_from_torch(converted, (x,), target=jq.targets.NASH_E)
    check(model, x, expected)
    assert set(model.plan.weights) == {"stem.weight", "first.weight", "head.weight"}
    np.testing.assert_array_equal(model.qparams["stem.weight"], reference.stem.weight_scale.float().numpy())


def test_an_eager_module():
    class Eager(nn.Module):
        def __init__(self):
            super().__init__()
            self.quant, self.dequant = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
            self.net, self.sum = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.quantized.FloatFunctional()
            self.head = nn.Linear(64, 3)

        def forward(self, x):
            y = self.net(self.quant(x))
            return self.dequant(self.head(self.sum.add(y, y).flatten(1)))

    torch.manual_seed(0)
    net = Eager().eval()
    net.qconfig = QConfig(activation=OBSERVER, weight=default_per_channel_weight_observer)
    made = torch.ao.quantization.prepare(net)
    x = torch.randn(4, 3, 4, 4)
    made(x)
    converted = torch.ao.quantization.convert(made)
    model = model_from_torch(converted, (x,), target=jq.targets.NASH_E)
    assert float(model.qparams["head"]) == np.float32(converted.head.scale)
    assert float(model.qparams["sum"] if "sum" in model.qparams else model.qparams["add"]) == np.float32(
        converted.sum.scale
    )
    expected = net(x).detach()  # the float module: three roundings of int8 away
    found = np.asarray(jq.run(jq.lower(model), jnp.asarray(x.numpy())))
    assert np.abs(found - expected.numpy()).max() <= 0.05 * np.abs(expected.numpy()).max()


@pytest.mark.slow
def test_a_module_that_is_trained_with_fake_quant():
    observer = torch.ao.quantization.FakeQuantize.with_args(
        observer=MinMaxObserver, dtype=torch.quint8, qscheme=torch.per_tensor_symmetric, quant_min=0, quant_max=255
    )
    weight = torch.ao.quantization.FakeQuantize.with_args(
        observer=MinMaxObserver, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, quant_min=-8, quant_max=7
    )
    torch.manual_seed(0)
    qconfig = QConfig(activation=observer, weight=weight)
    made = prepare_qat_fx(Net().train(), QConfigMapping().set_global(qconfig), (torch.randn(1, 3, 4, 4),))
    made(torch.randn(8, 3, 4, 4))
    made.eval().apply(torch.ao.quantization.disable_observer)
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(jq.ConversionError, match="zero point 127 of uint8"):  # what torch gives a range that is set
        model_from_torch(made, (x,), target=jq.targets.NASH_E)
    wide = jq.targets.NASH_E.with_fields({"rescale.high_precision": True})  # int16 values, which the march truncates
    model = model_from_torch(made, (x,), target=wide, zero_point="widen")
    with torch.no_grad():
        check(model, x, made(x))
    integers = np.asarray(jq.lower(model).constants["stem"]["weight"])
    assert integers.min() >= -8
    assert integers.max() <= 7


def test_each_kind_of_torch_model_has_its_function():
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(jq.ConversionError, match="the model has no scales: from_torch reads float models"):
        model_from_torch(Net().eval(), (x,), target=jq.targets.NASH_E)
    with pytest.raises(jq.ConversionError, match="model_from_torch"):
        from_torch(FOLDER / "torchao" / "pt2e_symmetric_residual.pt2")


def test_weights_of_torchao():
    torchao = pytest.importorskip("torchao.quantization")
    net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    torchao.quantize_(net, torchao.Int8WeightOnlyConfig())
    x = torch.randn(8, 16)
    model = model_from_torch(net, (x,), target=jq.targets.NASH_E)
    assert set(model.qparams) == {"0.weight", "2.weight"}
    np.testing.assert_array_equal(model.qparams["0.weight"], net[0].weight.scale.reshape(-1).float().numpy())


# ---------------------------------------------------------------------------------------------------------------------
# Encodings


@pytest.mark.parametrize("version", ["0.6.1", "1.0.0", "2.0.0"])
def test_encodings_beside_a_torch_model_and_back(version):
    torch.manual_seed(0)
    graph, params = from_torch(Net().eval(), (torch.randn(2, 3, 4, 4),))
    policy = jq.Policy(output=jq.int8(), weight=jq.int8(axis="out"))
    model = jq.prepare(graph, params, jq.QConfig({"*": policy}), target="nash-e", high_precision_outputs=False)
    model = jq.calibrate(model, [jnp.asarray(torch.randn(4, 3, 4, 4).numpy())])
    again = model_from_encodings((graph, params), to_encodings(model, version=version), target=model.plan.target)
    assert again.qparams.keys() == model.qparams.keys()
    for key, scale in model.qparams.items():
        np.testing.assert_array_equal(again.qparams[key], scale)


def test_a_calibration_table_of_onnxruntime():
    def entry(low, high):
        ends = {"lowest": low, "highest": high}
        return {k: {"data": [v], "dtype": "float32", "CLS": "numpy.array"} for k, v in ends.items()} | {
            "CLS": "TensorData"
        }

    grids = read_encodings({"x": entry(-1.0, 0.5), "y": entry(0.0, 2.54)})
    assert {name: float(g.scale) for name, g in grids.items()} == {
        "x": float(np.float32(1) / np.float32(127)), "y": float(np.float32(2.54) / np.float32(127)),
    }  # fmt: skip
    assert all(g.bits == 8 and g.zero == 128 for g in grids.values())


PER_CHANNEL = {"name": "x", "dtype": "INT", "bw": 8, "scale": [1.0], "offset": [0], "enc_type": "PER_CHANNEL"}


@pytest.mark.parametrize("axis", [-3, 1, 2])
def test_an_axis_along_which_a_weight_has_no_such_channels(axis):
    graph = jq.Graph((jq.Input("x", (None, 3)),), (jq.Node("y", jq.ops.Linear(), ("x",), {"weight": "w"}),), ("y",))
    model = to_onnx(graph, {"w": jnp.ones((2, 3))})
    (weight,) = (entry.name for entry in model.graph.initializer if list(entry.dims) == [2, 3])
    content = {"encodings": [{"name": weight, "output_dtype": "int8", "y_scale": [1.0, 2.0], "axis": axis}]}
    with pytest.raises(jq.ConversionError, match=r"\[2, 3\] has 2 scales, along no axis of it"):
        model_from_encodings(model, content, target=jq.targets.NASH_E)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no encodings of version"),
        ({"version": "3"}, "no encodings of version"),
        ({"encodings": [{"name": "x"}]}, "damaged"),
        (
            {"encodings": [{"name": "x", "output_dtype": "int8", "y_scale": 0.0}]},
            "scale of 'x' is not finite and positive",
        ),
        ({"encodings": [{"name": "x", "output_dtype": "int8", "y_scale": 1.0, "block_size": 32}]}, "scales by block"),
        (
            {"encodings": [{"name": "stm", "output_dtype": "int8", "y_scale": 1.0}]},
            "names that the model does not have",
        ),
        (
            {"activation_encodings": [], "param_encodings": [PER_CHANNEL | {"enc_type": "x" * 4000}]},
            r": 'x' is 'x{10,200}\.\.\..*; per tensor and per channel",
        ),
    ],
)
def test_what_is_no_encodings_file(content, message, tmp_path):
    (tmp_path / "net.encodings").write_text(json.dumps(content))
    graph = jq.Graph((jq.Input("x", (None, 3)),), (jq.Node("y", jq.ops.Relu(), ("x",)),), ("y",))
    with pytest.raises(jq.ConversionError, match=message):
        model_from_encodings(to_onnx(graph, {}), tmp_path / "net.encodings", target=jq.targets.NASH_E)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_safetensors_with_narrow_weights(tmp_path):
    weight = torch.randn(4, 6)
    scale = weight.abs().amax(1, keepdim=True) / 127
    narrow = torch.round(weight / scale).to(torch.int8)
    eight = (weight / 2).to(torch.float8_e4m3fn)
    state = {
        "a.weight": narrow, "a.weight_scale": scale, "b.weight": weight.to(torch.bfloat16),
        "c.weight": eight, "c.weight_scale": torch.tensor([2.0]), "d.weight": weight.half(), "e": torch.arange(3),
    }  # fmt: skip
    save_file(state, tmp_path / "net.safetensors")
    found = read_state_dict(tmp_path / "net.safetensors")
    assert set(found) == {"a.weight", "b.weight", "c.weight", "d.weight", "e"}
    assert torch.equal(found["a.weight"], narrow.float() * scale)
    assert torch.equal(found["b.weight"], weight.to(torch.bfloat16).float())
    assert torch.equal(found["c.weight"], eight.float() * 2)
    assert torch.equal(found["d.weight"], weight.half().float())
    assert torch.equal(found["e"], torch.arange(3))


FP8 = {
    "'a.weight' is float8_e4m3fn and has no a.weight_scale": {},
    "scales by block": {"a.weight_scale_inv": torch.ones(1, 1)},
}


@pytest.mark.parametrize("message", FP8)
def test_fp8_without_a_scale_is_refused(message, tmp_path):
    save_file({"a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), **FP8[message]}, tmp_path / "net.safetensors")
    with pytest.raises(FormatError, match=message):
        read_state_dict(tmp_path / "net.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"12345678nothing")
    with pytest.raises(FormatError, match="not a readable safetensors file"):
        read_state_dict(tmp_path / "bad.safetensors")


def test_the_filter_of_warnings_is_of_torch_ao_alone():
    """Its modules warn that they are deprecated; ours say nothing."""
    made, x = prepared()
    converted = convert_to_reference_fx(made)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="torch")
        model_from_torch(converted, (x,), target=jq.targets.NASH_E)
