"""Weights that follow from parameters alone are computed at the import: against torch, whose weight they have."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import jquant as jq
from jquant_converters import from_torch

PICTURE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
parametrizations = nn.utils.parametrizations


class StandardizedByBatchNorm(nn.Conv2d):
    """As timm has it."""

    def forward(self, x):
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0, eps=1e-6
        ).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class StandardizedScaled(nn.Conv2d):
    """As timm's ScaledStdConv2d has it, with a gain that is trained."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), 1.5))

    def forward(self, x):
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, weight=(self.gain * 0.3).view(-1), training=True,
            momentum=0.0, eps=1e-6,
        ).reshape_as(self.weight)  # fmt: skip
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class StandardizedByHand(nn.Conv2d):
    def forward(self, x):
        deviation, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True, unbiased=False)
        return F.conv2d(x, (self.weight - mean) / (deviation + 1e-5), self.bias)


class Cosine(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.weight))


CASES = {
    "weight norm": (lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), PICTURE),
    "weight norm of a linear layer": (lambda: parametrizations.weight_norm(nn.Linear(6, 4), dim=None), ROWS),
    "weight norm, transposed": (lambda: parametrizations.weight_norm(nn.ConvTranspose2d(3, 4, 3)), PICTURE),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), PICTURE),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(6, 6)), ROWS),
    "old weight norm": (lambda: nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), PICTURE),
    "old spectral norm": (lambda: nn.utils.spectral_norm(nn.Linear(6, 4)), ROWS),
    "standardized by batch norm": (lambda: StandardizedByBatchNorm(3, 4, 3), PICTURE),
    "standardized and scaled": (lambda: StandardizedScaled(3, 4, 3), PICTURE),
    "standardized by hand": (lambda: StandardizedByHand(3, 4, 3), PICTURE),
    "cosine": (lambda: Cosine(6, 4), ROWS),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("case", CASES)
def test_a_computed_weight_is_a_plain_one(case: str):
    torch.manual_seed(0)
    make, x = CASES[case]
    module = nn.Sequential(nn.Identity(), make()).eval()
    graph, params = from_torch(module, (x,))
    layers = [n for n in graph.nodes if type(n.op).__name__ in ("Conv", "ConvTranspose", "Linear")]
    assert [n.params["weight"].startswith("1.") for n in layers] == [True]
    with torch.no_grad():
        expected = module(x).numpy()
    (actual,) = jq.graph.evaluate_float(graph, params, jnp.asarray(x.numpy()))
    # A sum of at most 27 products, and a weight that is computed first: some 32 roundings of the largest value.
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=2e-6 + 2**-20 * np.abs(expected).max())


def test_a_weight_changed_through_a_view_is_the_changed_one():
    torch.manual_seed(0)
    module = ChangedLater().eval()
    graph, params = from_torch(module, (PICTURE,))
    with torch.no_grad():
        expected = module(PICTURE).numpy()
    assert (module.w < 0).any()
    (actual,) = jq.graph.evaluate_float(graph, params, jnp.asarray(PICTURE.numpy()))
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=2**-20 * np.abs(expected).max())


def test_it_has_the_name_and_key_of_the_layer_without_the_norm():
    torch.manual_seed(0)
    module = nn.Sequential(nn.ReLU(), parametrizations.weight_norm(nn.Conv2d(3, 4, 3))).eval()
    graph, params = from_torch(module, (PICTURE,))
    nn.utils.parametrize.remove_parametrizations(module[1], "weight")
    wanted, plain = from_torch(module, (PICTURE,))
    assert graph.nodes == wanted.nodes
    assert params.keys() == plain.keys() == {"1.weight", "1.bias"}
    np.testing.assert_allclose(params["1.weight"], plain["1.weight"], rtol=1e-6)


def test_a_computed_value_without_an_operator_is_a_constant():
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))

        def forward(self, x):
            return x + torch.linalg.det(self.a) + torch.matrix_exp(self.a * 0.1)[0]

    graph, params = from_torch(Shift().eval(), (ROWS,))
    (actual,) = jq.graph.evaluate_float(graph, params, jnp.asarray(ROWS.numpy()))
    np.testing.assert_allclose(np.asarray(actual), Shift()(ROWS).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_what_has_operators_and_is_no_weight_stays_trained():
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_gain = nn.Parameter(torch.ones(6))

        def forward(self, x):
            return x * self.log_gain.exp()

    graph, params = from_torch(Gain().eval(), (ROWS,))
    assert list(params) == ["log_gain"]
    assert [type(n.op).__name__ for n in graph.nodes] == ["Constant", "Exp", "Mul"]


class OfInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3, 1, 1))

    def forward(self, x):
        return F.conv2d(x, self.w * x.mean())


class ChangedLater(OfInputs):
    def forward(self, x):
        weight = self.w * 2
        weight.view(-1).clamp_(min=0)
        return F.conv2d(x, weight)


class Noisy(nn.Module):
    def forward(self, weight):
        return weight * torch.bernoulli(weight.abs().clamp(max=1))


def noisy() -> nn.Module:
    layer = nn.Linear(6, 4)
    nn.utils.parametrize.register_parametrization(layer, "weight", Noisy())
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    ("module", "x", "reason"),
    [
        (
            OfInputs(),
            PICTURE,
            r"aten\.conv2d.*on \[batch, 3, 8, 8\], \[4, 3, 1, 1\]: its weight is computed from the inp",
        ),
        (noisy(), ROWS, r"aten\.bernoulli.*remove_parametrizations\(model\.0, 'weight'\)"),
    ],
)
def test_what_does_not_follow_from_parameters_alone_is_refused(module: nn.Module, x: torch.Tensor, reason: str):
    with pytest.raises(jq.ConversionError, match=reason):
        from_torch(module.eval(), (x,))
