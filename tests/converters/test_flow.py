"""A net of optical flow as RAFT writes it: a grid of coordinates plus a flow, at which features are sampled."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import jquant as jq
from jquant_converters import from_torch, to_onnx


def coords_grid(batch, height, width):
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((columns, rows), 0).float()[None].repeat(batch, 1, 1, 1)


def sampled(image, coords):
    """Values of an image [N, C, H, W] at coordinates [N, H, W, 2] in pixels, normalised for grid_sample."""
    height, width = image.shape[-2:]
    x, y = coords.split([1, 1], dim=-1)
    grid = torch.cat([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=-1)
    return F.grid_sample(image, grid, align_corners=True)


class ConvGru(nn.Module):
    def __init__(self, hidden, inputs):
        super().__init__()
        self.z, self.r, self.q = (nn.Conv2d(hidden + inputs, hidden, 3, padding=1) for _ in range(3))

    def forward(self, h, x):
        hx = torch.cat([h, x], 1)
        z, r = torch.sigmoid(self.z(hx)), torch.sigmoid(self.r(hx))
        return (1 - z) * h + z * torch.tanh(self.q(torch.cat([r * h, x], 1)))


class Flow(nn.Module):
    """Two images to a flow: features of the second one are warped by it, and it is improved step by step."""

    def __init__(self, width=6, steps=2):
        super().__init__()
        self.steps = steps
        self.features = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
        self.gru, self.head = ConvGru(width, width + 3), nn.Conv2d(width, 2, 3, padding=1)

    def forward(self, first, second):
        a, b = self.features(first), self.features(second)
        n, c, h, w = a.shape
        start = coords_grid(n, h, w)
        coords, hidden = start.clone(), torch.tanh(a)
        for _ in range(self.steps):
            coords = coords.detach()
            warped = sampled(b, coords.permute(0, 2, 3, 1))
            correlation = (a * warped).sum(1, keepdim=True) / math.sqrt(c)
            hidden = self.gru(hidden, torch.cat([warped, correlation, coords - start], 1))
            coords = coords + self.head(hidden)
        return coords - start, sampled(b, coords.permute(0, 2, 3, 1))


def pictures(batch, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return tuple(F.avg_pool2d(torch.randn(batch, 3, 20, 18, generator=draw), 3, 1) for _ in range(2))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    module = Flow().eval()
    return module, *from_torch(module, pictures(1))


def arrays(pair):
    return [jnp.asarray(x.numpy()) for x in pair]


def decibels(found, wanted):
    error = np.square(np.asarray(found) - wanted).mean() / np.square(wanted).mean()
    return -10 * math.log10(error + 1e-12)


def test_a_warp_by_a_grid_of_coordinates_in_float_and_onnx(net):
    module, graph, params = net
    given = pictures(3, seed=1)
    with torch.no_grad():
        wanted = [y.numpy() for y in module(*given)]
    for y, expected in zip(jq.graph.evaluate_float(graph, params, *arrays(given)), wanted, strict=True):
        np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    written = to_onnx(graph, params).SerializeToString()
    session = onnxruntime.InferenceSession(written, options, providers=["CPUExecutionProvider"])
    feeds = {entry.name: x.numpy() for entry, x in zip(session.get_inputs(), given, strict=True)}
    for y, expected in zip(session.run(None, feeds), wanted, strict=True):
        np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_a_flow_in_fake_quant_and_integers(net):
    module, graph, params = net
    given = pictures(2)
    with torch.no_grad():
        wanted = [y.numpy() for y in module(*given)]
    qconfig = jq.QConfig({"*": jq.Policy(output=jq.int16(), weight=jq.int8(axis="out"))})
    model = jq.prepare(graph, params, qconfig, target=jq.targets.NASH_E)
    model = jq.calibrate(model, [tuple(arrays(given))])
    for y, expected in zip(jq.apply(model, *arrays(given), mode="fake_quant"), wanted, strict=True):
        assert decibels(y, expected) > 30
    program = jq.lower(model)
    fast = jax.tree.leaves(jq.run(program, *arrays(given)))
    slow = jax.tree.leaves(jq.reference.run(program, *(x.numpy() for x in given))[0])
    for a, b, expected in zip(fast, slow, wanted, strict=True):
        np.testing.assert_array_equal(a, b)
        assert decibels(a, expected) > 30
