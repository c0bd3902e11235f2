"""A branch on the number of examples is followed for one number of them only: an import finds out and says so."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jquant as jq
from jquant_converters import from_torch


class Net(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.fc = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.function(self.fc(x))


BRANCHES = {
    "more than one": lambda y: y * 2 if y.shape[0] > 1 else y * 3,
    "centred batch": lambda y: y - y.mean() if y.shape[0] > 1 else y,
    "squeezed": lambda y: (y[0] if y.shape[0] == 1 else y).sum(-1),
    "second output": lambda y: (y, y.abs() if y.size(0) == 1 else y.relu()),
    "dtype": lambda y: (y > 0) if y.size(0) == 1 else (y < 0),
}


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_on_the_number_of_examples_is_found(name, batch):
    net = Net(BRANCHES[name]).eval()
    output = "output 1" if name == "second output" else "output 0"
    with pytest.raises(jq.ConversionError, match=rf"{output}.*for 1 example: .*a branch on the number of examples"):
        from_torch(net, (torch.randn(batch, 4),))


def test_a_fixed_batch_and_a_check_that_is_off_import_it():
    net, x = Net(BRANCHES["more than one"]).eval(), torch.randn(1, 4)
    graph, params = from_torch(net, (x,), dynamic_batch=False)
    want = net(x).detach().numpy()
    np.testing.assert_allclose(jq.graph.evaluate_float(graph, params, jnp.asarray(x.numpy()))[0], want, atol=1e-6)
    graph, params = from_torch(net, (x,), check=False)
    assert np.abs(np.asarray(jq.graph.evaluate_float(graph, params, jnp.asarray(x.numpy()))[0]) - want).max() > 1e-3


@pytest.mark.parametrize(
    "function",
    [
        lambda y: torch.nn.functional.layer_norm(y, (4,)),
        lambda y: y.masked_fill(y < 0, float("-inf")),
        lambda y: torch.nn.functional.dropout(y, 0.5, training=False),
    ],
)
def test_what_has_no_branch_passes(function):
    from_torch(Net(function).eval(), (torch.randn(2, 4),))


def test_a_module_is_left_as_it_was():
    net = Net(torch.nn.BatchNorm1d(4)).train()
    state = torch.get_rng_state()
    from_torch(net, (torch.randn(2, 4, generator=torch.Generator().manual_seed(0)),))
    assert net.training
    assert net.function.training
    assert int(net.function.num_batches_tracked) == 0
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_branch_in_a_traced_function_is_found(batch):
    def fn(params, x):
        return x * params["a"] if x.shape[0] > 1 else x * 3.0

    with pytest.raises(jq.ConversionError, match=r"for 1 example.*dynamic_batch=False"):
        jq.trace(fn, {"a": jnp.ones(4)}, jnp.ones((batch, 4)))
    jq.trace(fn, {"a": jnp.ones(4)}, jnp.ones((batch, 4)), check=False)
    jq.trace(lambda p, x: x * p["a"] if x.shape[0] > 1 else p["a"] * x, {"a": jnp.ones(4)}, jnp.ones((batch, 4)))
