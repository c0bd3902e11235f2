"""What a model computes from the number of examples alone: positions, masks, and how such values meet the inputs."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import jquant.ops as ops
from jquant.simulate import evaluate_float
from jquant.types import ConversionError
from jquant_converters import from_torch


class Model(nn.Module):
    """Of x [N, 4, 6] and a table of 4 rows."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.table = nn.Parameter(torch.arange(24.0).reshape(4, 6) / 10)

    def forward(self, x):
        return self.function(self, x)


def sequences(x):
    """Which of four places lie in one sequence, found from positions as language models do for packed ones."""
    positions = torch.arange(4).expand(x.shape[0], -1)
    return (torch.diff(positions, prepend=positions[:, :1] - 1) != 1).cumsum(-1)


def packed(m, x):
    """A causal mask [N, 1, 4, 4] whose values are gathered for each example."""
    examples = torch.arange(x.shape[0])[:, None, None, None]
    rows, columns = torch.arange(4)[None, None, :, None], torch.arange(4)[None, None, None]
    found = sequences(x)
    allowed = (found[examples, rows] == found[examples, columns]) & (columns <= rows)
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], allowed)


def additive(m, x):
    mask = torch.zeros(x.shape[0], 4, 4)
    mask.masked_fill_(torch.ones(4, 4, dtype=torch.bool).triu(1), float("-inf"))
    return F.scaled_dot_product_attention(x, x, x, mask)


def all_allowed(m, x):
    mask = (torch.arange(4)[:, None] >= 0).expand(x.shape[0], 4, 4)
    return F.scaled_dot_product_attention(x, x, x, mask)


def written(m, x):
    z = torch.zeros(x.shape[0], 4, 6)
    z[:, 1:3] += 2.0
    return x * z


def written_by_an_input(m, x):
    z = torch.ones(x.shape[0], 4, 6)
    z.add_(x)
    return z * 2


def positions(m, x):
    return x + F.embedding(torch.arange(4).repeat(x.shape[0], 1), m.table)


def halves(m, x):
    early, late = torch.arange(8.0).expand(x.shape[0], 8).chunk(2, 1)
    return x * (early + late)[..., None]


def check(function):
    """Imported at two examples, compared with torch at seven."""
    module = Model(function).eval()
    graph, params = from_torch(module, (torch.randn(2, 4, 6),))
    x = torch.randn(7, 4, 6, generator=torch.Generator().manual_seed(0))
    (actual,) = evaluate_float(graph, params, jnp.asarray(x.numpy()))
    with torch.no_grad():
        np.testing.assert_allclose(np.asarray(actual), module(x).numpy(), rtol=0, atol=1e-5)
    assert graph.inputs[0].shape[0] is None
    return [type(node.op) for node in graph.nodes]


@pytest.mark.parametrize("function", [packed, additive, all_allowed, written, written_by_an_input, positions, halves])
def test_it_is_a_constant_for_every_number_of_examples(function):
    check(function)


def test_a_mask_is_one_constant_that_broadcasts():
    assert set(check(packed)) == {ops.Reshape, ops.IntegerConstant, ops.Attention}
    assert set(check(additive)) == {ops.IntegerConstant, ops.Attention}


def test_a_mask_that_allows_everything_is_none():
    assert check(all_allowed) == [ops.Attention]


def test_what_differs_between_examples_is_refused():
    with pytest.raises(ConversionError, match="depends on the number of examples"):
        check(lambda m, x: x * (torch.arange(x.shape[0]) + 0.5)[:, None, None])


def test_a_mask_that_an_input_is_written_into_is_no_constant():
    def function(m, x):
        mask = torch.zeros(x.shape[0], 4, 4)
        mask.add_(x[..., :4])
        return F.scaled_dot_product_attention(x, x, x, mask)

    check(function)
