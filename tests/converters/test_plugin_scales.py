"""Scales of FakeQuantize modules, as torch.ao has them, in and out; what does not match is named."""

import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import jquant as jq
from jquant.plan.scales import scale_of
from jquant_converters import from_plugin_state_dict, from_torch, to_plugin_state_dict
from jquant_converters.plugin_scales import read_mapping


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.head = nn.Conv2d(4, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.head(self.relu(self.bn(self.conv(x)))))


@pytest.fixture(scope="module")
def model() -> jq.Model:
    torch.manual_seed(0)
    graph, params = from_torch(Net().eval(), (torch.zeros(1, 3, 6, 6),))
    rules = {
        "*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int16()),
        "x": jq.Policy(output=jq.int8(scale=1 / 128)),
    }
    made = jq.prepare(graph, params, jq.QConfig(rules), target=jq.targets.NASH_E)
    return jq.calibrate(made, [jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 6, 6)), jnp.float32)])


def scales(model: jq.Model) -> dict[str, np.ndarray]:
    names = (*model.plan.owned, *model.plan.weights)
    return {name: np.asarray(scale_of(name, model.plan, model.qparams)) for name in names}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_there_and_back(model: jq.Model, prefix: str) -> None:
    state = to_plugin_state_dict(model, prefix=prefix)
    assert all(key.startswith(prefix) for key in state)
    bare = model.replace(qparams={})
    found = from_plugin_state_dict(bare, state, prefix=prefix)
    assert found.missing == {}
    assert set(found.matched) == {*model.plan.owned, *model.plan.weights}
    wanted = scales(model)
    for name, value in scales(found.model).items():
        np.testing.assert_array_equal(value, wanted[name], err_msg=name)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, 6, 6)), jnp.float32)
    np.testing.assert_array_equal(jq.run(jq.lower(found.model), x), jq.run(jq.lower(model), x))


def test_modules_of_torch_are_read(model: jq.Model) -> None:
    """Buffers that torch.ao's own FakeQuantize makes: a scale, and an observer whose scale was not computed yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

        quantizer = FakeQuantize(
            MovingAverageMinMaxObserver,
            quant_min=-32768,
            quant_max=32767,
            dtype=torch.int32,
            qscheme=torch.per_tensor_symmetric,
        )
        quantizer(torch.tensor([-1.5, 0.25, 3.0]))
    own = quantizer.state_dict()
    assert {"scale", "zero_point"} <= set(own)
    state = {f"relu.activation_post_process.{key}": value for key, value in own.items()}
    found = from_plugin_state_dict(model, state)
    name = model.plan.renamed.get("relu", "relu")
    assert found.matched == {name: "relu.activation_post_process.scale"}
    np.testing.assert_array_equal(scales(found.model)[name], own["scale"].numpy().reshape(()))
    del state["relu.activation_post_process.scale"]
    found = from_plugin_state_dict(model, state)
    assert found.matched[name].endswith("max_val")
    np.testing.assert_array_equal(scales(found.model)[name], np.float32(3.0) / np.float32(32767.5))


def test_what_does_not_match_is_named(model: jq.Model) -> None:
    state = to_plugin_state_dict(model)
    state["conv.weight_fake_quant.scale"] = torch.ones(7)
    state["x.activation_post_process.scale"] = torch.tensor([0.5])
    state["head.weight_fake_quant.zero_point"] = torch.full((5,), 3, dtype=torch.int32)
    state["other.activation_post_process.scale"] = torch.ones(1)
    found = from_plugin_state_dict(model, state)
    assert "the file has 7 scales" in found.missing["conv.weight"]
    assert "the qconfig fixes it at 0.0078125, and the file has 0.5" in found.missing["x"]
    assert "is not 0" in found.missing["head.weight"]
    assert "other.activation_post_process.scale" in found.unused
    np.testing.assert_array_equal(scales(found.model)["conv.weight"], scales(model)["conv.weight"])


def test_a_mapping_decides(model: jq.Model, tmp_path: Path) -> None:
    (tmp_path / "map.toml").write_text('"conv.weight" = "backbone.0.wq"\n')
    mapping = read_mapping(tmp_path / "map.toml")
    state = to_plugin_state_dict(model, mapping=mapping)
    assert "backbone.0.wq.scale" in state
    assert "conv.weight_fake_quant.scale" not in state
    found = from_plugin_state_dict(model.replace(qparams={}), state, mapping=mapping)
    assert found.matched["conv.weight"] == "backbone.0.wq.scale"
    assert "conv.weight" in from_plugin_state_dict(model, state).missing
    with pytest.raises(jq.FormatError, match=r"'conv\.wieght', which has no scale here; did you mean 'conv\.weight'"):
        from_plugin_state_dict(model, state, mapping={"conv.wieght": "a"})
    (tmp_path / "map.json").write_text("[1]")
    with pytest.raises(jq.FormatError, match="a mapping has a line for each name"):
        read_mapping(tmp_path / "map.json")
