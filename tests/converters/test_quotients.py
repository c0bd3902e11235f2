"""Quotients of indices by whole numbers, against torch, in every meaning; and floats that are not finite."""

import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import jquant as jq
from jquant_converters import from_torch, to_onnx, to_torch

DIVISORS = (2, 64, 3, 7, 12, 80, 1000, -6, -7, 2**30, 2**31 - 1)
VALUES = torch.tensor([-(2**31), -(2**31) + 1, -1000, -81, -80, -7, -1, 0, 1, 6, 7, 80, 8399, 2**31 - 1])


class Quotients(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, x):
        return (*(torch.div(x, d, rounding_mode=self.mode) for d in DIVISORS), x // 5, x.clamp(-9999, 9999) // -8)


@pytest.mark.parametrize("mode", ["floor", "trunc"])
def test_quotients_of_indices_in_every_meaning(mode):
    module, x = Quotients(mode).eval(), torch.stack([VALUES, VALUES.flip(0)])
    graph, params = from_torch(module, (x,))
    expected = [y.numpy() for y in module(x)]
    array = jnp.asarray(x.numpy().astype(np.int32))
    program = jq.lower(jq.prepare(graph, params, jq.QConfig({"*": jq.Policy()}), target=jq.targets.NASH_E))
    session = onnxruntime.InferenceSession(to_onnx(graph, params).SerializeToString())
    with torch.no_grad():
        again = [y.numpy() for y in to_torch(graph, params)(x.int())]
    reference, _ = jq.reference.run(program, np.asarray(array))
    results = {
        "float": jq.graph.evaluate_float(graph, params, array),
        "integers": jq.run(program, array),
        "reference": reference,
        "onnx": session.run(None, {session.get_inputs()[0].name: np.asarray(array)}),
        "torch": again,
    }
    for found in results.values():
        for actual, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(actual), wanted)


def test_an_index_of_all_scores_is_taken_apart():
    """As detectors do: the best of anchors times classes, then // and % classes."""

    class Best(nn.Module):
        def forward(self, x):
            index = x.flatten(1).topk(5).indices
            return index // 80, index % 80, (index // 80).clamp(max=3)

    x = torch.randn(2, 40, 80)
    graph, params = from_torch(Best(), (x,))
    expected = Best()(x)
    actual = jq.graph.evaluate_float(graph, params, jnp.asarray(x.numpy()))
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a), e.numpy())


def test_a_quotient_of_what_may_leave_32_bits_is_refused():
    class Hash(nn.Module):
        def forward(self, x):
            return (x * 1_000_003) // 7

    with pytest.raises(jq.ConversionError, match="integers have 32 bits here"):
        from_torch(Hash(), (torch.zeros(2, 3, dtype=torch.int64),))


@pytest.mark.parametrize("divisor", [0.25, 2.0, -0.5, 0.3, 41.0, -3.0])
@pytest.mark.parametrize("mode", ["floor", "trunc"])
def test_quotients_of_floats(divisor, mode):
    class Grid(nn.Module):
        def forward(self, x):
            return torch.div(x, divisor, rounding_mode=mode)

    x = torch.cat([torch.linspace(-90, 90, 721), 41.0 * torch.arange(-50, 50)]).reshape(1, -1).repeat(2, 1)
    graph, params = from_torch(Grid(), (x,))
    (actual,) = jq.graph.evaluate_float(graph, params, jnp.asarray(x.numpy()))
    off = np.asarray(actual) != Grid()(x).numpy()
    quotient = x.double().numpy() / divisor
    assert not (off & (np.abs(quotient - np.round(quotient)) > 1e-4)).any()
    assert (mode == "trunc" and divisor == 0.3) or not off.any()  # whose reciprocal is not exact, where it divides


@pytest.mark.parametrize("given", [{}, {"nan": 2.0}, {"nan": 0.5, "posinf": 3.0, "neginf": -4.0}])
def test_nan_and_infinities_become_numbers(given):
    class Clean(nn.Module):
        def forward(self, x):
            return torch.nan_to_num(torch.log(x), **given), torch.nan_to_num(1 / x, **given)

    x = torch.tensor([[1.0, -1.0, 0.0, 1e-30, 100.0]]).repeat(2, 1)
    graph, params = from_torch(Clean(), (x,))
    actual = jq.graph.evaluate_float(graph, params, jnp.asarray(x.numpy()))
    for a, e in zip(actual, Clean()(x), strict=True):
        np.testing.assert_allclose(np.asarray(a), e.numpy(), rtol=1e-6)


def test_nan_to_num_is_nothing_in_integers():
    """No integer is NaN or infinite: a model with it has the integers of the model without."""

    class Clean(nn.Module):
        def __init__(self, clean: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc, self.clean = nn.Linear(6, 4), clean

        def forward(self, x):
            y = self.fc(x)
            return torch.nan_to_num(y) if self.clean else y

    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    qconfig = jq.QConfig({"*": jq.Policy(output=jq.int8(), weight=jq.int8(axis="out"))})
    found = []
    for clean in (True, False):
        graph, params = from_torch(Clean(clean).eval(), (x,))
        model = jq.prepare(graph, params, qconfig, target=jq.targets.NASH_E, high_precision_outputs=False)
        model = jq.calibrate(model, [jnp.asarray(x.numpy())])
        found.append(np.asarray(jq.run(jq.lower(model), jnp.asarray(x.numpy()))))
    np.testing.assert_array_equal(*found)
