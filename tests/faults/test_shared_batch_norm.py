"""One layer with one batch norm, called twice: one weight, one bias, one scale, in every mode, there and back."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jquant as jq
from jquant_converters import fake_quant_state_dict, from_torch, to_state_dict

QCONFIG = jq.QConfig({"*": jq.Policy(output=jq.int8(), weight=jq.int8(axis="out"))})


class TwoCameras(torch.nn.Module):
    """One backbone for two images."""

    def __init__(self, kind, bias):
        super().__init__()
        self.conv = kind(4, 4, 3, bias=bias)
        self.bn = torch.nn.BatchNorm2d(4)
        self.head = torch.nn.Conv2d(4, 2, 1)

    def encode(self, x):
        return torch.relu(self.bn(self.conv(x)))

    def forward(self, left, right):
        return self.head(self.encode(left) - 0.5 * self.encode(right))


def model(kind=torch.nn.Conv2d, bias=False):
    torch.manual_seed(0)
    net = TwoCameras(kind, bias)
    torch.nn.init.normal_(net.bn.running_mean)
    torch.nn.init.uniform_(net.bn.running_var, 0.5, 2.0)
    torch.nn.init.normal_(net.bn.weight)
    torch.nn.init.normal_(net.bn.bias)
    return net.eval()


def images():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(4, 4, 6, 6)).astype(np.float32) for _ in range(2)]


def prepared(net, mode):
    left, right = images()
    graph, params = from_torch(net, (torch.from_numpy(left), torch.from_numpy(right)))
    model = jq.prepare(graph, params, QCONFIG, target=jq.targets.NASH_E, batch_norm=mode)
    model = jq.calibrate(model, [tuple(map(jnp.asarray, images()))])
    return graph, params, model


@pytest.mark.parametrize("kind", [torch.nn.Conv2d, torch.nn.ConvTranspose2d])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", ["fold", "live", "frozen", "reverse_fold", {"bn": "live"}, {"bn_1": "reverse_fold"}])
def test_a_layer_that_is_called_twice_keeps_one_weight(mode, bias, kind):
    net = model(kind, bias)
    now = prepared(net, mode)[2]
    for at in (now, jq.training.fold_batch_norm(now)):
        first, second = (at.plan.graph.by_name[name] for name in ("conv", "conv_1"))
        assert first.params == second.params
        assert first.params["weight"] == "conv.weight"
        assert set(at.params) == set(at.plan.graph.param_names)
    arrays = images()
    want = net(*map(torch.from_numpy, arrays)).detach().numpy()
    got = jq.apply(now, *map(jnp.asarray, arrays), mode="float")
    np.testing.assert_allclose(got, want, atol=1e-5)
    integers = jq.run(jq.lower(now), *map(jnp.asarray, arrays))
    assert np.abs(np.asarray(integers) - want).max() < 0.1 * np.abs(want).max()


@pytest.mark.parametrize("mode", ["fold", "live"])
def test_what_is_trained_goes_back_to_the_module(mode):
    net = model()
    graph, params, now = prepared(net, mode)
    moved = {key: value * 1.25 if key.startswith(("conv", "head")) else value for key, value in now.params.items()}
    state = to_state_dict(now.replace(params=moved), graph=graph, original=params, module=net)
    other = copy.deepcopy(net)
    other.load_state_dict(state, strict=True)
    arrays = images()
    got = jq.apply(now.replace(params=moved), *map(jnp.asarray, arrays), mode="float")
    np.testing.assert_allclose(other(*map(torch.from_numpy, arrays)).detach().numpy(), got, atol=1e-5)
    keys = fake_quant_state_dict(jq.training.fold_batch_norm(now))
    modules = {name for name, _ in net.named_modules()}
    weights = {key.split(".weight_fake_quant")[0] for key in keys if ".weight_fake_quant" in key}
    assert weights == {"conv", "head"} <= modules


def test_training_moves_the_running_statistics_of_both_calls_as_torch_does():
    net = model()
    now = prepared(net, "live")[2]
    arrays = images()
    trained, stats = jq.training.split_batch_stats(now)
    floats = jax.tree.map(lambda x: x, stats)
    _, floats = jq.apply_train(trained, *map(jnp.asarray, arrays), batch_stats=floats)
    net.train()
    net(*map(torch.from_numpy, arrays))
    # The batches are those of a net with quantized weights and images: within a step of 8 bits of each.
    np.testing.assert_allclose(floats["bn.running_mean"], net.bn.running_mean.numpy(), atol=0.02)
    np.testing.assert_allclose(floats["bn.running_var"], net.bn.running_var.numpy(), rtol=0.02)


def test_one_layer_in_front_of_two_norms_is_two_weights():
    """What cannot be one weight is copied under a key of no module, and torch's module gets no fake-quant of it."""

    class TwoNorms(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(4, 4, 1)
            self.first, self.second = torch.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(4)

        def forward(self, x):
            return self.first(self.conv(x)) + self.second(self.conv(x + 1))

    net = TwoNorms()
    torch.nn.init.uniform_(net.second.weight, 1.0, 2.0)
    net.eval()
    x = images()[0]
    graph, params = from_torch(net, (torch.from_numpy(x),))
    model = jq.prepare(graph, params, QCONFIG, target=jq.targets.NASH_E)
    assert {model.plan.graph.by_name[n].params["weight"] for n in ("conv", "conv_1")} == {
        "conv.folded_weight",
        "conv_1.folded_weight",
    }
    model = jq.calibrate(model, [jnp.asarray(x)])
    want = net(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(jq.apply(model, jnp.asarray(x), mode="float"), want, atol=1e-5)
    assert not any(key.startswith("conv_1.weight") for key in fake_quant_state_dict(model))
