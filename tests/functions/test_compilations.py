"""How many XLA programs each verb compiles: the wait that users feel, counted, since a time depends on the machine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from support.compilations import counted
from torch import nn

import jquant as jq
from jquant_converters import from_onnx, from_torch, to_onnx, to_torch


class Block(nn.Module):
    """A residual block with batch norm, every size its own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs))
        self.skip = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(self.first(x)) + self.skip(x))


def residual() -> nn.Module:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 4))
    return nn.Sequential(Block(3, 5), Block(5, 7), Block(7, 9), head)


def inverted() -> nn.Module:
    """Depthwise convolutions and functions that become tables."""
    layers = [
        nn.Sequential(
            nn.Conv2d(c, 2 * c, 1), nn.BatchNorm2d(2 * c), nn.SiLU(),
            nn.Conv2d(2 * c, 2 * c, 3, groups=2 * c, padding=1), nn.Hardswish(), nn.Conv2d(2 * c, c + 1, 1),
        )
        for c in (3, 4, 5)
    ]  # fmt: skip
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4), nn.Sigmoid())


def attention() -> nn.Module:
    """Layer norm, softmax and gelu in int16."""
    embed = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2))
    return nn.Sequential(embed, nn.Linear(4, 8), nn.TransformerEncoderLayer(8, 2, 12, 0.0, "gelu", batch_first=True))


NETS = {"residual": residual, "inverted": inverted, "attention": attention}


def at_most(limit: int, verb: Callable[[], Any]) -> Any:
    with counted() as found:
        result = verb()
    assert len(found) <= limit, f"{len(found)} compilations, and the limit is {limit}"
    return result


def qconfig_of(name: str) -> jq.QConfig:
    """The default observer for one net; its search is one program for any, and slow to compile."""
    if name == "attention":
        output = jq.int16(observer=jq.observers.min_max())
        return jq.QConfig({"*": jq.Policy(output=output, weight=jq.int8(axis="out"))})
    return jq.QConfig(jq.templates.int8_default(observer=None if name == "residual" else "min_max"))


@pytest.mark.parametrize("name", NETS)
def test_no_verb_compiles_more_than_its_limit(name: str, tmp_path: Path) -> None:
    jax.clear_caches()
    torch.manual_seed(0)
    module = NETS[name]().eval()
    example = torch.randn(2, 3, 8, 8)
    x = example.numpy()

    graph, weights = at_most(0, lambda: from_torch(module, example))
    prepared = at_most(0, lambda: jq.prepare(graph, weights, qconfig_of(name), target=jq.targets.NASH_E))
    model = at_most(3, lambda: jq.calibrate(prepared, [x, x + 0.5]))
    program = at_most(0, lambda: jq.lower(model))
    at_most(1, lambda: jq.run(program, x))
    at_most(0, lambda: jq.run(jq.lower(model), x))
    at_most(1, lambda: jq.apply(model, x))
    at_most(0, lambda: (str(program), jq.describe(model), jq.explain(model)))
    at_most(0, lambda: jq.save(tmp_path / "net.jqp", program))
    at_most(0, lambda: jq.load(tmp_path / "net.jqp"))
    at_most(0, lambda: (to_torch(graph, weights), to_torch(model)))
    file = at_most(0, lambda: (to_onnx(graph, weights), to_onnx(model)))[0]
    at_most(0, lambda: from_onnx(file))
    at_most(3, lambda: jq.analysis.compare(model, x, "float", "bit_true"))


def test_sensitivity_compiles_as_often_for_a_deep_net_as_for_a_flat_one() -> None:
    jax.clear_caches()
    torch.manual_seed(0)
    x = np.asarray(torch.randn(2, 3, 8, 8))
    graph, params = from_torch(residual().eval(), torch.from_numpy(x))
    model = jq.prepare(graph, params, qconfig_of("residual"), target=jq.targets.NASH_E)
    model = jq.calibrate(model, [x])
    at_most(4, lambda: jq.analysis.sensitivity(model, [x]))


@pytest.mark.parametrize("name", ["residual", "inverted"])
def test_steps_of_a_recipe_do_not_compile_once_a_layer(name: str) -> None:
    jax.clear_caches()
    torch.manual_seed(0)
    x = np.asarray(torch.randn(4, 3, 8, 8))
    graph, params = from_torch(NETS[name]().eval(), torch.from_numpy(x))
    model = jq.calibrate(jq.prepare(graph, params, qconfig_of(name), target=jq.targets.NASH_E), [x])
    # One for each power of two that the rows of weights are padded to.
    searched = at_most(4, lambda: jq.ptq.search_weight_scales(model))
    at_most(2, lambda: jq.ptq.correct_bias(searched, [x[:2], x[2:]]))
    at_most(0, lambda: jq.ptq.shift_relus(searched))
