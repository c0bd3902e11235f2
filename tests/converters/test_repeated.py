"""What a model computes from the number of examples alone: positions, masks, and how such values meet the inputs."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import jquant.ops as ops
from jquant.graph.float import evaluate_float
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


def written_behind_an_expansion(m, x):
    row = torch.zeros(1, 4, 6)
    rows = row.expand(x.shape[0], 4, 6)
    row.add_(1)
    return rows + x


def written_as_a_sum(m, x):
    total = torch.ones(x.shape[0], 4, 6).amax(0)
    total[1:3] += 2.0
    return x * total


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


@pytest.mark.parametrize(
    "function",
    [packed, additive, all_allowed, written, written_by_an_input, written_behind_an_expansion, written_as_a_sum,
     positions, halves],
)  # fmt: skip
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


def view_of_what_an_input_changes(m, x):
    z = torch.zeros(x.shape[0], 4, 6)
    first = z[0]
    z.add_(x)
    return first * 2 + x


def half_of_what_an_input_changes(m, x):
    z = torch.zeros(x.shape[0], 4, 6)
    early, _ = z.chunk(2, 1)
    z.add_(x)
    return early * 2 + x[:, :2]


def one_example_changes(m, x):
    z = torch.zeros(x.shape[0], 4, 6)
    z[0].add_(1)
    return z + x


def test_a_change_through_another_name_is_no_constant():
    check(half_of_what_an_input_changes)
    with pytest.raises(ConversionError, match="it picks an example of the batch"):
        check(view_of_what_an_input_changes)
    with pytest.raises(ConversionError, match="it writes to an example of the batch"):
        check(one_example_changes)


def test_a_buffer_is_not_changed_through_a_view_of_its_rows():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.count = nn.Buffer(torch.zeros(1, 4, 6))

        def forward(self, x):
            self.count.expand(x.shape[0], 4, 6)[0].add_(1)
            return x + self.count

    module = Counting()
    with pytest.raises(ConversionError, match=r"changes a parameter or buffer in place|writes 'count'"):
        from_torch(module, (torch.randn(2, 4, 6),))
    assert not module.count.any()


def test_a_mask_that_an_input_is_written_into_is_no_constant():
    def function(m, x):
        mask = torch.zeros(x.shape[0], 4, 4)
        mask.add_(x[..., :4])
        return F.scaled_dot_product_attention(x, x, x, mask)

    check(function)
