"""State dicts out of plans and into graphs, and the buffers of fake-quantizers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import jquant as jq
from jquant.types import ConversionError, FormatError
from jquant_converters import fake_quant_state_dict, from_torch, load_state_dict, to_state_dict

QCONFIG = jq.QConfig({"*": jq.Policy(output=jq.int8(), weight=jq.int8(axis="out"))})


class Net(nn.Module):
    """Batch norm behind convolutions and a linear, on its own, and twice in a row; with and without gamma."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.grouped, self.bn2 = nn.Conv2d(8, 8, 3, groups=4), nn.BatchNorm2d(8, affine=False)
        self.up, self.bn3 = nn.ConvTranspose2d(8, 6, 2, 2, groups=2), nn.BatchNorm2d(6)
        self.alone = nn.BatchNorm2d(6)
        self.twice = nn.Sequential(nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.fc, self.bn4 = nn.Linear(4, 5), nn.BatchNorm1d(5)
        self.tied = nn.Linear(4, 5)
        self.tied.weight = self.fc.weight
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        x = torch.relu(self.bn1(self.first(x)))
        x = self.alone(torch.relu(self.bn3(self.up(torch.relu(self.bn2(self.grouped(x)))))))
        x = self.twice(x).flatten(2).transpose(1, 2)
        x = self.attention(x, x * 0.5, x * 0.5)[0].mean(1) + 0.5
        return self.bn4(self.fc(x))


def make(seed=0, zero=()):
    torch.manual_seed(seed)
    module = Net().eval()
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.normal_(0, 0.3)
                m.running_var.uniform_(0.5, 1.5)
                if m.affine:
                    m.weight.uniform_(0.5, 1.5).mul_(torch.where(torch.rand_like(m.weight) > 0.5, 1.0, -1.0))
                    m.bias.normal_(0, 0.3)
        for channel in zero:
            module.bn1.weight[channel] = 0.0
    return module


X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(5))


def prepared(module, **options):
    graph, original = from_torch(module, (X,))
    model = jq.prepare(graph, original, QCONFIG, target=jq.targets.NASH_E, **options)
    return graph, original, model


def trained(params, seed=0):
    """Every parameter moved, as training would, but for the constant of the code."""
    rng = np.random.default_rng(seed)
    noise = {k: jnp.asarray(rng.normal(size=v.shape) * 0.05, jnp.float32) for k, v in params.items()}
    return {k: v + noise[k] if k != "add.other" else v for k, v in params.items()}


def check_logits(module, model, state):
    other = make(seed=9)
    other.load_state_dict(state)
    with torch.no_grad():
        actual = other(X).numpy()
    expected = np.asarray(jq.apply(model, jnp.asarray(X.numpy()), mode="float"))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_what_training_left_alone_comes_back_bit_for_bit():
    module = make(zero=(1, 6))
    graph, original, model = prepared(module)
    state = to_state_dict(model, graph=graph, original=original, module=module)
    for key, tensor in module.state_dict().items():
        assert torch.equal(state[key], tensor), key


@pytest.mark.parametrize("zero", [(), (1, 6)], ids=["plain", "zero_gamma"])
def test_trained_weights_go_back_with_batch_norm_unfolded(zero):
    module = make(zero=zero)
    graph, original, model = prepared(module)
    params = trained(model.params)
    state = to_state_dict(model.replace(params=params), graph=graph, original=original, module=module)
    assert state.keys() == module.state_dict().keys()
    check_logits(module, model.replace(params=params), state)
    assert torch.equal(state["tied.weight"], state["fc.weight"])
    assert torch.equal(state["bn1.running_var"], module.bn1.running_var)
    kept = [c for c in range(8) if c not in zero]
    assert torch.equal(state["bn1.weight"][kept], module.bn1.weight[kept])
    assert torch.equal(state["unused.weight"], module.unused.weight)
    # and in again
    loaded = load_state_dict(graph, original, state, strict=False)
    assert loaded.missing_keys == ()
    np.testing.assert_allclose(
        np.asarray(jq.graph.evaluate_float(graph, loaded.params, jnp.asarray(X.numpy()))[0]),
        np.asarray(jq.apply(model.replace(params=params, qparams={}), jnp.asarray(X.numpy()), mode="float")),
        rtol=0,
        atol=1e-5,
    )


def test_batch_norm_that_was_kept_for_training_goes_back_as_it_is():
    module = make()
    graph, original, model = prepared(module, batch_norm={"bn1": "live", "bn3": "reverse_fold", "alone": "frozen"})
    params = trained({k: v for k, v in model.params.items() if "running_var" not in k and "folded" not in k}) | {
        k: v for k, v in model.params.items() if "running_var" in k or "folded" in k
    }
    state = to_state_dict(model.replace(params=params), graph=graph, original=original, module=module)
    np.testing.assert_array_equal(state["bn1.running_mean"].numpy(), np.asarray(params["bn1.running_mean"]))
    check_logits(module, model.replace(params=params), state)


def test_a_gamma_near_zero_does_not_overflow():
    module = make()
    with torch.no_grad():
        module.bn1.weight[2] = 1e-30
    graph, original, model = prepared(module)
    params = trained(model.params)
    state = to_state_dict(model.replace(params=params), graph=graph, original=original, module=module)
    assert all(bool(torch.isfinite(t.float()).all()) for t in state.values())
    check_logits(module, model.replace(params=params), state)


def test_without_a_module_the_state_is_what_the_graph_reads():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    graph, original = from_torch(module, (X,))
    model = jq.prepare(graph, original, QCONFIG, target=jq.targets.NASH_E)
    state = to_state_dict(model, graph=graph, original=original)
    assert not module.load_state_dict(state, strict=False).unexpected_keys
    graph, original, model = prepared(make())
    with pytest.raises(ConversionError, match="is a part of a parameter; pass module="):
        to_state_dict(model, graph=graph, original=original)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.b(self.conv(self.a(self.conv(x)))) * 2.0 + torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)


def test_shared_weights_that_training_moved_apart_are_refused_and_so_are_trained_constants():
    module = Shared().eval()
    graph, original = from_torch(module, (X,))
    model = jq.prepare(graph, original, QCONFIG, target=jq.targets.NASH_E)
    state = to_state_dict(model, graph=graph, original=original, module=module)
    assert all(torch.equal(state[k], v) for k, v in module.state_dict().items())
    with pytest.raises(ConversionError, match="is one tensor in the module, read at"):
        to_state_dict(model.replace(params=trained(model.params)), graph=graph, original=original, module=module)
    (constant,) = (k for k in original if k not in state)
    moved = {**model.params, constant: model.params[constant] + 1}
    with pytest.raises(ConversionError, match=f"'{constant}' was trained.*freeze"):
        to_state_dict(model.replace(params=moved), graph=graph, original=original, module=module)


# ---------------------------------------------------------------------------------------------------------------------
# In


def test_a_state_dict_is_loaded_like_torch_does(tmp_path):
    module, other = make(), make(seed=3)
    graph, params = from_torch(module, (X,))
    torch.save(other.state_dict(), tmp_path / "other.pt")
    unread = {"unused.weight", "unused.bias", "fc.weight", "tied.bias"}  # torch.export calls the tied weight so
    for state in (other.state_dict(), tmp_path / "other.pt"):
        loaded = load_state_dict(graph, params, state, strict=False)
        assert loaded.missing_keys == ()
        assert set(loaded.unexpected_keys) == unread
        with torch.no_grad():
            expected = other(X).numpy()
        actual = jq.graph.evaluate_float(graph, loaded.params, jnp.asarray(X.numpy()))[0]
        np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=1e-5)


def test_all_that_does_not_fit_is_in_one_error():
    module = make()
    graph, params = from_torch(module, (X,))
    state = {k: v for k, v in module.state_dict().items() if not k.startswith("unused")}
    del state["fc.weight"], state["tied.bias"]
    assert load_state_dict(graph, params, state).params.keys() == params.keys()
    del state["first.weight"]
    state |= {"stray": torch.zeros(1), "bn1.bias": torch.zeros(3), "attention.in_proj_weight": torch.zeros(3, 4)}
    state["fc.bias"] = torch.full((5,), float("nan"))
    with pytest.raises(ConversionError) as caught:
        load_state_dict(graph, params, state)
    text = str(caught.value)
    assert "Missing key(s) in state_dict: 'first.weight'" in text
    assert "Unexpected key(s) in state_dict: 'stray'" in text
    assert "size mismatch for bn1.bias: copying a param with shape torch.Size([3]) from checkpoint" in text
    assert "'attention.in_proj_weight' of shape [3, 4] has no rows" in text
    assert "'fc.bias' contains NaN" in text
    with pytest.raises(ConversionError, match="size mismatch"):
        load_state_dict(graph, params, state, strict=False)


def test_half_precision_is_widened_and_other_types_are_refused():
    graph, params = from_torch(nn.Linear(3, 2), (torch.zeros(1, 3),))
    state = {"weight": torch.ones(2, 3, dtype=torch.bfloat16), "bias": torch.ones(2, dtype=torch.float64)}
    assert load_state_dict(graph, params, state).params["weight"].dtype == jnp.float32
    with pytest.raises(ConversionError, match="no dense real tensor"):
        load_state_dict(graph, params, state | {"bias": [1.0, 2.0]})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "net.", "ema.", "module._orig_mod."])
def test_a_prefix_in_a_checkpoint_is_named_and_taken(prefix):
    module, other = make(), make(seed=3)
    graph, params = from_torch(module, (X,))
    state = {prefix + key: tensor for key, tensor in other.state_dict().items() if "unused" not in key}
    del state[f"{prefix}fc.weight"], state[f"{prefix}tied.bias"]  # nobody reads them
    with pytest.raises(ConversionError, match=rf"keys fit with prefix='{prefix}'") as caught:
        load_state_dict(graph, params, state)
    assert "Missing key(s)" in str(caught.value)
    stray = {"ema_decay": torch.ones(()), "loss.weight": torch.ones(3)}
    loaded = load_state_dict(graph, params, state | stray, prefix=prefix)
    with torch.no_grad():
        expected = other(X).numpy()
    actual = jq.graph.evaluate_float(graph, loaded.params, jnp.asarray(X.numpy()))[0]
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=1e-5)


def test_two_models_in_a_checkpoint_are_both_named():
    graph, params = from_torch(nn.Linear(3, 2), (torch.zeros(1, 3),))
    weights = nn.Linear(3, 2).state_dict()
    state = {f"{prefix}{key}": tensor for prefix in ("model.", "ema.") for key, tensor in weights.items()}
    for prefix in ("", "module."):
        with pytest.raises(ConversionError, match=r"2 of 2 keys fit with prefix='ema\.' or prefix='model\.'"):
            load_state_dict(graph, params, state, prefix=prefix)


def test_a_container_in_a_checkpoint_is_named_with_its_prefix():
    graph, params = from_torch(nn.Linear(3, 2), (torch.zeros(1, 3),))
    weights = nn.Linear(3, 2).state_dict()
    wrapped = {f"module.{key}": tensor for key, tensor in weights.items()}
    for state, step in (
        (
            {"state_dict": weights, "epoch": 3},
            r"2 of 2 keys fit with entry='state_dict'\.",
        ),
        (
            {"ema": {"net": weights}, "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}}},
            r"entry=\('ema', 'net'\)",
        ),
        ({"model": wrapped}, r"entry='model' and prefix='module\.'"),
    ):
        with pytest.raises(ConversionError, match=step):
            load_state_dict(graph, params, state)


def test_a_prefix_of_the_graph_is_named():
    graph, params = from_torch(nn.DataParallel(nn.Linear(3, 2)), (torch.zeros(1, 3),))
    with pytest.raises(ConversionError, match=r"with 'module\.' in front of those of the checkpoint"):
        load_state_dict(graph, params, nn.Linear(3, 2).state_dict())


def test_keys_that_nothing_makes_fit_get_no_advice():
    graph, params = from_torch(nn.Linear(3, 2), (torch.zeros(1, 3),))
    with pytest.raises(ConversionError) as caught:
        load_state_dict(graph, params, {"kernel": torch.ones(2, 3)})
    assert "fit with" not in str(caught.value)


def test_a_file_that_is_no_state_dict(tmp_path):
    graph, params = from_torch(nn.Linear(3, 2), (torch.zeros(1, 3),))
    torch.save(nn.Linear(3, 2), tmp_path / "module.pt")
    torch.save({"state_dict": nn.Linear(3, 2).state_dict(), "epoch": 3}, tmp_path / "checkpoint.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name, reason in (
        ("module.pt", "not a readable state dict"),
        (
            "checkpoint.pt",
            r"'state_dict' is a .*not a tensor; the weights are in .*entry='state_dict'",
        ),
        ("text.pt", "not a readable state dict"),
    ):
        with pytest.raises(FormatError, match=reason):
            load_state_dict(graph, params, tmp_path / name)


# ---------------------------------------------------------------------------------------------------------------------
# Fake-quantizers of torch.ao


class Stubbed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
        self.a = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.skip = torch.ao.nn.quantized.FloatFunctional()
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.a(self.quant(x))
        x = self.skip.add(x, self.b(x))
        return self.dequant(self.fc(x.mean((2, 3))))


@pytest.mark.filterwarnings("ignore")  # torch.ao says that it moves elsewhere
def test_scales_load_into_a_model_that_torch_ao_prepared_for_qat():
    tq = torch.ao.quantization
    torch.manual_seed(0)
    module = Stubbed().eval()
    with torch.no_grad():
        module.a[1].running_var.uniform_(0.5, 1.5)
        module.a[1].running_mean.normal_(0, 0.3)
    x = torch.randn(16, 3, 8, 8)
    graph, params = from_torch(module, (x[:1],))
    qconfig = jq.QConfig(dict(QCONFIG.rules) | {"mean": jq.Policy(output=jq.int16())})  # float in torch.ao: no module
    model = jq.prepare(graph, params, qconfig, target=jq.targets.NASH_E, high_precision_outputs=False)
    model = jq.calibrate(model, [jnp.asarray(x.numpy())])
    expected = np.asarray(jq.apply(model, jnp.asarray(x.numpy())))

    symmetric = {"quant_min": -128, "quant_max": 127, "dtype": torch.qint8}
    activation = tq.FakeQuantize.with_args(observer=tq.MinMaxObserver, **symmetric, qscheme=torch.per_tensor_symmetric)
    weight = tq.FakeQuantize.with_args(
        observer=tq.PerChannelMinMaxObserver, **symmetric, qscheme=torch.per_channel_symmetric, ch_axis=0
    )
    module.train()
    module.qconfig = tq.QConfig(activation=activation, weight=weight)
    module.dequant.qconfig = None
    theirs = tq.fuse_modules_qat(module, [["a.0", "a.1", "a.2"]])
    theirs = tq.prepare_qat(theirs).eval()
    state = fake_quant_state_dict(model)
    result = theirs.load_state_dict(state, strict=False)
    wanted = {k for k in theirs.state_dict() if k.endswith(("post_process.scale", "fake_quant.scale"))}
    # b's own output does not exist where the addition is fused into it
    assert wanted - state.keys() == {"b.activation_post_process.scale"}
    assert {k for k in state if k not in result.unexpected_keys} >= wanted - {"b.activation_post_process.scale"}
    theirs.apply(tq.disable_observer)
    theirs.b.activation_post_process.disable_fake_quant()
    with torch.no_grad():
        actual = theirs(x).numpy()
    # torch.ao does not quantize biases, and multiplies by reciprocals of scales
    steps = np.abs(actual - expected) / np.asarray(model.qparams["fc"])
    assert steps.max() < 1.5
    assert (steps < 0.5).mean() > 0.9


class WrittenOut(nn.Module):
    """Operators that the rules find in torch code, with parameters in the shapes of such code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4, bias=False)
        self.gamma, self.weight = nn.Parameter(torch.rand(1, 8, 1, 1) + 0.5), nn.Parameter(torch.rand(8, 1, 1))
        self.bias, self.scale, self.shift = (nn.Parameter(torch.rand(*shape)) for shape in ((8, 1, 1), (4,), (4,)))

    def forward(self, x):
        x = self.conv(x) * self.gamma
        grouped = x.reshape(x.shape[0], 2, -1)
        centred = grouped - grouped.mean(-1, keepdim=True)
        normal = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
        x = normal.reshape(x.shape) * self.weight + self.bias
        return self.fc(x.mean((2, 3))) * self.scale + self.shift


def test_parameters_of_operators_that_were_found_go_back_in_their_own_shapes():
    torch.manual_seed(0)
    module = WrittenOut().eval()
    x = torch.randn(3, 8, 6, 6)
    graph, params = from_torch(module, (x,))
    kinds = ["Conv", "BatchNorm", "GroupNorm", "Mean", "Linear", "BatchNorm"]
    assert [type(node.op).__name__ for node in graph.nodes] == kinds
    model = jq.prepare(graph, params, QCONFIG, target=jq.targets.NASH_E)
    trained = dataclasses.replace(model, params={key: value * 1.25 for key, value in model.params.items()})
    other = WrittenOut().eval()
    other.load_state_dict(to_state_dict(trained, graph=graph, original=params, module=module))
    expected = jq.apply(trained, x.numpy(), mode="float")
    np.testing.assert_allclose(other(x).detach().numpy(), expected, rtol=1e-5, atol=1e-6)  # float32, another order
    loaded = load_state_dict(graph, params, other.state_dict())
    np.testing.assert_array_equal(loaded.params["weight@0/8/1"], other.weight.detach().numpy().reshape(8))


class Scaled(nn.Module):
    """One trained number for all channels, behind a layer and as its addend."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1, bias=False)
        self.scale, self.shift = nn.Parameter(torch.tensor([0.5])), nn.Parameter(torch.tensor(0.25))

    def forward(self, x):
        return self.conv(x) * self.scale + self.shift


def test_one_trained_number_stays_one():
    module, x = Scaled().eval(), torch.randn(2, 2, 4, 4)
    graph, params = from_torch(module, (x,))
    assert {key: array.shape for key, array in params.items() if key != "conv.weight"} == {"scale": (1,), "shift": ()}
    model = jq.prepare(graph, params, QCONFIG, target=jq.targets.NASH_E)
    back = to_state_dict(model, graph=graph, original=params, module=module)
    assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())
