"""Layers of torch that have no operator of their own, made of others at the import: against torch."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import jquant as jq
from jquant_converters import from_torch


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *x):
        return self.function(*x)


def grouped(query, key, value, **options):
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


QKV = normal(2, 8, 5, 4), normal(2, 2, 6, 4, seed=1), normal(2, 2, 6, 4, seed=2)
PICTURE, SEQUENCE = (normal(2, 3, 8, 7),), (normal(2, 5, 3),)
CASES = {
    "grouped attention": (lambda: Function(grouped), QKV),
    "grouped attention, causal": (lambda: Function(lambda q, k, v: grouped(q, k, v, is_causal=True)), QKV),
    "one head of keys": (lambda: Function(lambda q, k, v: grouped(q, k[:, :1], v[:, :1], scale=0.3)), QKV),
    "other heads of values": (lambda: Function(lambda q, k, v: grouped(q, k, v.repeat(1, 2, 1, 1))), QKV),
    "circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), PICTURE),
    "circular, sides": (lambda: nn.Conv2d(3, 4, (3, 5), 2, (1, 2), padding_mode="circular"), PICTURE),
    "circular, 1d": (lambda: nn.Conv1d(3, 4, 4, padding="same", padding_mode="circular"), (normal(2, 3, 9),)),
    "circular, all of it": (lambda: Function(lambda x: F.pad(x, (7, 3, 0, 8), mode="circular")), PICTURE),
    "circular, cropped": (lambda: Function(lambda x: F.pad(x, (-2, 3, 1, -1), mode="circular")), PICTURE),
    "adaptive pool, one axis": (lambda: nn.AdaptiveAvgPool2d((4, 3)), PICTURE),
    "adaptive pool, volumes": (lambda: nn.AdaptiveAvgPool3d((2, 3, 1)), (normal(2, 2, 5, 6, 4),)),
    "adaptive pool, 1d": (lambda: nn.AdaptiveAvgPool1d(4), (normal(2, 3, 6),)),
    "adaptive pool": (lambda: nn.AdaptiveAvgPool2d((3, 5)), PICTURE),
    "adaptive pool, more": (lambda: nn.AdaptiveAvgPool2d((None, 10)), PICTURE),
    "rnn": (lambda: nn.RNN(3, 4, batch_first=True), SEQUENCE),
    "rnn, relu": (lambda: nn.RNN(3, 4, 2, "relu", bias=False, batch_first=True, bidirectional=True), SEQUENCE),
    "rnn, layers": (lambda: nn.RNN(3, 4, 3, batch_first=True, bidirectional=True, dropout=0.2), SEQUENCE),
    "rnn, state": (lambda: nn.RNN(3, 4, 2, batch_first=True), (*SEQUENCE, None)),
    "rnn cell": (lambda: nn.RNNCell(3, 4), (normal(2, 3),)),
    "rnn cell, state": (lambda: nn.RNNCell(3, 4, nonlinearity="relu"), (normal(2, 3), normal(2, 4, seed=1))),
}


@pytest.mark.parametrize("case", CASES)
def test_as_torch_in_float_and_near_it_in_integers(case: str):
    torch.manual_seed(0)
    make, inputs = CASES[case]
    module = make().eval()
    if case == "rnn, state":
        rnn, inputs = module, (*SEQUENCE, normal(2, 2, 4, seed=1))
        module = Function(lambda x, h: rnn(x, h.transpose(0, 1).contiguous()))
        module.rnn = rnn
    graph, params = from_torch(module, inputs)
    arrays = [jnp.asarray(x.numpy()) for x in inputs]
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(module(*inputs))
    for actual, wanted in zip(jq.graph.evaluate_float(graph, params, *arrays), expected, strict=True):
        np.testing.assert_allclose(np.asarray(actual), wanted.numpy(), rtol=0, atol=2e-6)
    qconfig = jq.QConfig({"*": jq.Policy(output=jq.int16(), weight=jq.int8(axis="out"))})
    model = jq.prepare(graph, params, qconfig, target=jq.targets.NASH_E)
    program = jq.lower(jq.calibrate(model, [tuple(arrays)]))
    results = torch.utils._pytree.tree_leaves(jq.run(program, *arrays))
    for actual, wanted in zip(results, expected, strict=True):
        assert np.abs(np.asarray(actual) - wanted.numpy()).max() < 0.03 * float(wanted.abs().max())


def test_an_rnn_has_its_module_path_and_its_own_weights():
    module = nn.Sequential(nn.Linear(3, 3), nn.RNN(3, 4, batch_first=True)).eval()
    graph, params = from_torch(module, SEQUENCE)
    assert {k for k in params if k.startswith("1.")} == {f"1.{k}" for k in module[1].state_dict()}
    assert sum(node.name == "1" for node in graph.nodes) == 1
    assert graph.outputs[0] == "1"
