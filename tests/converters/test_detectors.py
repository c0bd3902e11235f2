"""Heads of detectors, as their code writes them: a free batch, integers equal to the reference, and ONNX back."""

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


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.SiLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))

    def forward(self, x):
        x = self.first(x)
        return x, self.second(x)


class Yolo(nn.Module):
    """An anchor-free head whose anchors are made in the forward, and distances decoded to boxes by a distribution."""

    strides = (2, 4)

    def __init__(self, bins=4, classes=3):
        super().__init__()
        self.backbone, self.bins, self.classes = Backbone(), bins, classes
        self.heads = nn.ModuleList(nn.Conv2d(c, 4 * bins + classes, 1) for c in (6, 8))

    def anchors(self, maps):
        points, strides = [], []
        for x, stride in zip(maps, self.strides, strict=True):
            h, w = x.shape[2:]
            sx = torch.arange(end=w, device=x.device).type_as(x) + 0.5
            sy = torch.arange(end=h, device=x.device, dtype=x.dtype) + 0.5
            sy, sx = torch.meshgrid(sy, sx, indexing="ij")
            points.append(torch.stack((sx, sy), -1).view(-1, 2))
            strides.append(x.new_full((h * w, 1), stride))
        return torch.cat(points).transpose(0, 1), torch.cat(strides).transpose(0, 1)

    def forward(self, x):
        maps = [head(f) for head, f in zip(self.heads, self.backbone(x), strict=True)]
        points, strides = self.anchors(maps)
        flat = torch.cat([m.view(m.shape[0], m.shape[1], -1) for m in maps], 2)
        box, score = flat.split((4 * self.bins, self.classes), 1)
        b, _, a = box.shape
        weights = torch.arange(self.bins, dtype=torch.float).view(1, -1, 1, 1)
        distance = (box.view(b, 4, self.bins, a).transpose(2, 1).softmax(1) * weights).sum(1)
        low, high = distance.chunk(2, 1)
        first, last = points.unsqueeze(0) - low, points.unsqueeze(0) + high
        boxes = torch.cat(((first + last) / 2, last - first), 1) * strides
        return torch.cat((boxes, score.sigmoid()), 1), *maps


class YoloV5(nn.Module):
    """Anchors of three sizes, and boxes written into columns in place."""

    def __init__(self, classes=3):
        super().__init__()
        self.backbone, self.classes = Backbone(), classes
        self.head = nn.Conv2d(8, 3 * (5 + classes), 1)
        self.register_buffer("sizes", torch.tensor([[2.0, 3.0], [4.0, 5.0], [6.0, 4.0]]))

    def forward(self, x):
        y = self.head(self.backbone(x)[1])
        b, _, h, w = y.shape
        y = y.view(b, 3, 5 + self.classes, h, w).permute(0, 1, 3, 4, 2).contiguous().sigmoid()
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        grid = torch.stack((columns, rows), 2).view(1, 1, h, w, 2).float()
        y[..., 0:2] = (y[..., 0:2] * 2 - 0.5 + grid) * 4
        y[..., 2:4] = (y[..., 2:4] * 2) ** 2 * self.sizes.view(1, 3, 1, 1, 2)
        return y.view(b, -1, 5 + self.classes)


class Ssd(nn.Module):
    """Boxes from priors, with exponents of sizes, and scores by softmax."""

    def __init__(self, classes=3):
        super().__init__()
        self.backbone, self.classes = Backbone(), classes
        self.boxes = nn.ModuleList(nn.Conv2d(c, 4 * 2, 3, padding=1) for c in (6, 8))
        self.scores = nn.ModuleList(nn.Conv2d(c, classes * 2, 3, padding=1) for c in (6, 8))
        count = 2 * (8 * 8 + 4 * 4)
        self.register_buffer("priors", torch.rand(count, 4, generator=torch.Generator().manual_seed(0)) + 0.1)

    def forward(self, x):
        boxes, scores = [], []
        for f, box, score in zip(self.backbone(x), self.boxes, self.scores, strict=True):
            boxes.append(box(f).permute(0, 2, 3, 1).contiguous().view(f.size(0), -1))
            scores.append(score(f).permute(0, 2, 3, 1).contiguous().view(f.size(0), -1))
        boxes = torch.cat(boxes, 1).view(x.size(0), -1, 4)
        scores = torch.cat(scores, 1).view(x.size(0), -1, self.classes).softmax(-1)
        centres = boxes[..., :2] * 0.1 * self.priors[:, 2:] + self.priors[:, :2]
        sizes = torch.exp(boxes[..., 2:] * 0.2) * self.priors[:, 2:]
        return torch.cat((centres - sizes / 2, centres + sizes / 2), -1), scores


class CenterNet(nn.Module):
    """Peaks of a heat map by a max pool, the best of them by topk, and their sizes by gather."""

    def __init__(self, classes=2, best=5):
        super().__init__()
        self.backbone, self.best = Backbone(), best
        self.up = nn.ConvTranspose2d(8, 6, 4, 2, 1)
        self.heat, self.size = nn.Conv2d(6, classes, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        f = torch.relu(self.up(self.backbone(x)[1]))
        heat, size = self.heat(f).sigmoid(), self.size(f)
        peaks = heat * (F.max_pool2d(heat, 3, 1, 1) == heat).float()
        b, _, h, w = peaks.shape
        scores, places = peaks.view(b, -1).topk(self.best)
        classes, places = places // (h * w), places % (h * w)
        index = places.unsqueeze(-1).expand(-1, -1, 2)
        sizes = size.permute(0, 2, 3, 1).reshape(b, -1, 2).gather(1, index)
        return scores, sizes, classes, places


class Detr(nn.Module):
    """Queries that attend to an image, whose best tokens are picked for each example."""

    def __init__(self, width=8, queries=4, picked=3):
        super().__init__()
        self.backbone, self.picked = Backbone(), picked
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm, self.score = nn.LayerNorm(width), nn.Linear(width, 1)
        self.classes, self.boxes = nn.Linear(width, 3), nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x):
        memory = self.backbone(x)[1].flatten(2).transpose(1, 2)
        best = self.score(memory).squeeze(-1).topk(self.picked, 1)[1]
        tokens = memory[torch.arange(x.shape[0]).unsqueeze(-1), best]
        queries = torch.cat((self.queries.unsqueeze(0).expand(x.shape[0], -1, -1), tokens), 1)
        y = self.norm(queries + self.attention(queries, memory, memory, need_weights=False)[0])
        mask = torch.einsum("bqc,bchw->bqhw", y, self.backbone(x)[1])
        return self.classes(y), self.boxes(y).sigmoid(), mask


class Lanes(nn.Module):
    """Rows of a lane by a softmax over columns, whose expectation is its place."""

    def __init__(self, rows=4, columns=6, lanes=2):
        super().__init__()
        self.backbone, self.shape = Backbone(), (columns, rows, lanes)
        self.head = nn.Sequential(nn.Linear(8 * 16, 12), nn.ReLU(), nn.Linear(12, columns * rows * lanes))

    def forward(self, x):
        y = self.head(self.backbone(x)[1].flatten(1)).view(-1, *self.shape)
        return (y.softmax(1) * torch.arange(self.shape[0]).float().view(1, -1, 1, 1)).sum(1), y.argmax(1)


NETS = {"yolo": Yolo, "yolo in place": YoloV5, "ssd": Ssd, "centernet": CenterNet, "detr": Detr, "lanes": Lanes}
# Integers pick by themselves, and a tie or a near one picks another place: only float is compared of what is picked.
PICKS = {"centernet", "detr"}
SLOW = {"yolo", "detr", "ssd"}


def picture(batch, seed=0):
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def imported(name):
    torch.manual_seed(0)
    module = NETS[name]().eval()
    return module, *from_torch(module, (picture(1),))


@pytest.mark.parametrize("name", NETS)
def test_a_detector_in_float_and_onnx(name):
    module, graph, params = imported(name)
    model = to_onnx(graph, params)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = picture(3, seed=1)
    with torch.no_grad():
        wanted = torch.utils._pytree.tree_leaves(module(x))
    found = jq.graph.evaluate_float(graph, params, jnp.asarray(x.numpy()))
    written = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for y, z, expected in zip(found, written, wanted, strict=True):
        largest = max(1.0, float(expected.abs().max()))
        np.testing.assert_allclose(y, expected.numpy(), rtol=0, atol=1e-5 * largest)
        np.testing.assert_allclose(z, expected.numpy(), rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in NETS])
def test_integers_of_a_detector_equal_the_reference(name):
    module, graph, params = imported(name)
    x = jnp.asarray(picture(2).numpy())
    qconfig = jq.QConfig({"*": jq.Policy(output=jq.int16(), weight=jq.int8(axis="out"))})
    model = jq.calibrate(jq.prepare(graph, params, qconfig, target=jq.targets.NASH_E), [x])
    program = jq.lower(model)
    fast = jax.tree.leaves(jq.run(program, x))
    slow = jax.tree.leaves(jq.reference.run(program, np.asarray(x))[0])
    for a, b in zip(fast, slow, strict=True):
        np.testing.assert_array_equal(a, b)
    with torch.no_grad():
        wanted = torch.utils._pytree.tree_leaves(module(picture(2)))
    if name not in PICKS:
        for a, expected in zip(fast, wanted, strict=True):
            if expected.is_floating_point():
                error = np.square(np.asarray(a) - expected.numpy()).mean() / expected.square().mean().item()
                assert -10 * math.log10(error + 1e-12) > 25  # dB


@pytest.mark.slow
def test_the_decoding_stays_outside_of_what_is_deployed():
    """One argument: the maps are deployed, and boxes are computed from them in float."""
    module, graph, params = imported("yolo")
    x = jnp.asarray(picture(2).numpy())
    qconfig = jq.QConfig({"*": jq.Policy(output=jq.int8(), weight=jq.int8(axis="out"))})
    model = jq.calibrate(jq.prepare(graph, params, qconfig, target=jq.targets.NASH_E), [x])
    maps = graph.outputs[1:]
    program = jq.lower(model, outputs=maps)
    assert len(program.graph.outputs) == 2
    assert not any(isinstance(n.op, jq.ops.Cat) for n in program.graph.nodes)
    for y, wanted in zip(jax.tree.leaves(jq.run(program, x)), module(picture(2))[1:], strict=True):
        assert np.abs(np.asarray(y) - wanted.detach().numpy()).max() < 0.1 * float(wanted.detach().abs().max())
