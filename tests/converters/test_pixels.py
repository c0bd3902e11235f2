"""Grids of pixels that torch code normalizes for grid_sample are imported as the pixels that they are."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample

import jquant as jq
from jquant_converters import from_torch, to_torch

RNG = np.random.default_rng(0)
X = torch.tensor(RNG.normal(size=(2, 3, 6, 5)), dtype=torch.float32)
PIXELS = torch.tensor(RNG.uniform(-1.5, 6.5, (2, 4, 3, 2)), dtype=torch.float32)
INPUTS = (jq.Input("x", (None, 3, 6, 5)), jq.Input("grid", (None, 4, 3, 2)))


class Sampling(nn.Module):
    def __init__(self, normalize: Any, corners: bool) -> None:
        super().__init__()
        self.normalize, self.corners, self.conv = normalize, corners, nn.Conv2d(3, 2, 1)
        self.register_buffer("base", torch.rand(1, 6, 5, 2) * 4)

    def forward(self, x: Tensor, grid: Tensor) -> Tensor:
        grid = grid if self.normalize is not moved else self.conv(x).permute(0, 2, 3, 1) * 3 + self.base
        return grid_sample(x, self.normalize(grid), align_corners=self.corners)


def whole(grid: Tensor) -> Tensor:
    return (2 * grid + 1) / torch.tensor([5.0, 6.0]) - 1


def moved(grid: Tensor) -> Tensor:
    return whole(grid)


def halves(grid: Tensor) -> Tensor:
    return (grid + 0.5) * torch.tensor([2 / 5, 2 / 6]) - 1.0


def by_coordinate(grid: Tensor) -> Tensor:
    return torch.stack([grid[..., 0] * 2 / 4 - 1, 2 * grid[..., 1] / 5 - 1], -1)


def concatenated(grid: Tensor) -> Tensor:
    return torch.cat([2 * grid[..., :1] / 4 - 1, -(1 - 2 * grid[..., 1:] / 5)], -1)


READ = [(whole, False), (moved, False), (halves, False), (by_coordinate, True), (concatenated, True)]
LEFT = [
    (by_coordinate, False),  # of aligned corners
    (whole, True),
    (lambda grid: grid, False),  # normalized by its maker
    (lambda grid: whole(grid.flip(-1)), False),  # (row, column) turned: sides of the other one
    (lambda grid: torch.stack([grid[..., 1] * 2 / 4 - 1, grid[..., 0] * 2 / 5 - 1], -1), True),  # exchanged
    (lambda grid: (2 * grid + 1) / 5 - 1, False),  # one side for both
]


def sample_of(graph: jq.Graph) -> jq.Node:
    (found,) = [n for n in graph.nodes if isinstance(n.op, jq.ops.GridSample)]
    return found


@pytest.mark.parametrize(("normalize", "corners"), READ)
def test_what_code_normalizes_is_read_as_pixels(normalize: Any, corners: bool) -> None:
    torch.manual_seed(0)
    module = Sampling(normalize, corners).eval()
    graph, params = from_torch(module, (X, PIXELS))
    assert sample_of(graph).op == jq.ops.GridSample(coordinates="absolute")
    left = {type(n.op).__name__ for n in graph.nodes} - {"GridSample"}
    assert left == ({"Conv", "Permute", "Scale", "Add", "Constant"} if normalize is moved else set())
    found = jq.graph.evaluate_float(graph, params, X, PIXELS)[0]
    np.testing.assert_allclose(found, module(X, PIXELS).detach().numpy(), atol=3e-5)


@pytest.mark.parametrize(("normalize", "corners"), LEFT)
def test_other_arithmetic_stays(normalize: Any, corners: bool) -> None:
    module = Sampling(normalize, corners).eval()
    graph, params = from_torch(module, (X, PIXELS))
    op = sample_of(graph).op
    absolute = normalize is LEFT[3][0]  # the flip stays in front of it
    assert op.coordinates == ("absolute" if absolute else "normalized")
    np.testing.assert_allclose(
        jq.graph.evaluate_float(graph, params, X, PIXELS)[0], module(X, PIXELS).detach().numpy(), atol=3e-5
    )


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_the_operator_goes_to_torch_and_comes_back(mode: Any, padding: Any) -> None:
    op = jq.ops.GridSample(mode=mode, padding=padding, coordinates="absolute")
    graph = jq.Graph(INPUTS, (jq.Node("y", op, ("x", "grid")),), ("y",))
    module = to_torch(graph, {})
    want = jq.graph.evaluate_float(graph, {}, X, PIXELS)[0]
    np.testing.assert_allclose(module(X, PIXELS).numpy(), want, atol=2e-5)
    back, _ = from_torch(module, (X, PIXELS))
    assert [(n.op, n.inputs) for n in back.nodes] == [(op, ("x", "grid"))]


def test_one_grid_for_the_whole_batch_comes_back() -> None:
    graph = jq.Graph(
        (INPUTS[0],),
        (
            jq.Node("g", jq.ops.Constant(), (), jq.FrozenMap({"value": "g"})),
            jq.Node("y", jq.ops.GridSample(coordinates="absolute"), ("x", "g")),
        ),
        ("y",),
    )
    params = {"g": PIXELS[:1].numpy()}
    module = to_torch(graph, params)
    back, restored = from_torch(module, X)
    assert sample_of(back).op == jq.ops.GridSample(coordinates="absolute")
    np.testing.assert_allclose(
        jq.graph.evaluate_float(back, restored, X)[0], jq.graph.evaluate_float(graph, params, X)[0], atol=1e-6
    )
