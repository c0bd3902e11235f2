"""Writing elements through every door: views changed in place, pillars, BEV pooling; integers equal the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from support.aten_scatter_cases import THROUGH_VIEWS
from support.onnx_helpers import model_of
from torch import nn

import jquant as jq
from jquant_converters import from_onnx, from_torch, model_from_onnx, to_onnx, to_torch

INT8 = jq.QConfig({"*": jq.Policy(output=jq.int8(), weight=jq.int8(axis="out"))})


class Values(nn.Module):
    def __init__(self, functions):
        super().__init__()
        self.functions = functions

    def forward(self, x, y):
        values = type("Values", (), {"x": x, "y": y})
        return {name: function(values) for name, function in self.functions.items()}


def pair(batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, 6, generator=generator), torch.randn(batch, 4, 6, generator=generator)


def arrays(tensors):
    return [jnp.asarray(x.int().numpy() if x.dtype == torch.int64 else x.numpy()) for x in tensors]


def run_onnx(model, *inputs):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip((i.name for i in session.get_inputs()), map(np.asarray, inputs), strict=True)))


def calibrated(graph, params, inputs):
    model = jq.prepare(graph, params, INT8, target=jq.targets.NASH_E)
    return jq.calibrate(model, [tuple(inputs)])


def check_everywhere(module, inputs, with_gradients=True, meet=0):
    """Float as torch, fake-quant near it, integers equal the reference, ONNX and torch out as they are here."""
    graph, params = from_torch(module, inputs)
    given = arrays(inputs)
    with torch.no_grad():
        wanted = module(*inputs).numpy()
    (y,) = jq.graph.evaluate_float(graph, params, *given)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run_onnx(to_onnx(graph, params), *given)[0], y, rtol=1e-5, atol=1e-5)
    model = calibrated(graph, params, given)
    fake = np.asarray(jq.apply(model, *given))
    assert np.abs(fake - wanted).max() <= 0.05 * np.abs(wanted).max()
    program = jq.lower(model)
    fast = np.asarray(jq.run(program, *given))
    slow, _ = jq.reference.run(program, *map(np.asarray, given))
    np.testing.assert_array_equal(fast, jax.tree.leaves(slow)[0])
    again = model_from_onnx(to_onnx(model), target=jq.targets.NASH_E)
    np.testing.assert_array_equal(jq.run(jq.lower(again), *given), fast)
    if not with_gradients:
        return graph
    with torch.no_grad():
        back = to_torch(model)(*inputs).numpy()
    # A step of int8; of values that `meet` in a sum, fake-quant rounds each first, as the integers do: half a step.
    assert np.abs(back - fake).max() <= (1 + meet / 2) * np.abs(fake).max() / 100
    gradients = jax.grad(lambda m: (jq.apply(m, *given) ** 2).sum(), allow_int=True)(model)
    for value in gradients.params.values():
        assert np.isfinite(value).all()
    assert any(np.abs(value).sum() > 0 for value in gradients.params.values())
    return graph


@pytest.mark.parametrize("name", THROUGH_VIEWS)
def test_a_change_through_a_view_is_torchs(name):
    module = Values({name: THROUGH_VIEWS[name]}).eval()
    graph, params = from_torch(module, pair(2))
    for batch in (1, 3):
        inputs = pair(batch, seed=batch)
        (y,) = jq.graph.evaluate_float(graph, params, *arrays(inputs)[: len(graph.inputs)])
        np.testing.assert_allclose(y, module(*inputs)[name].numpy(), rtol=1e-6, atol=1e-6)


class Pillars(nn.Module):
    """The features of PointPillars: a linear layer on points, the maximum of a pillar, its place on a canvas."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(4, 6)
        self.head = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, points, places):
        features = torch.relu(self.encode(points)).amax(2).transpose(1, 2)
        canvas = features.new_zeros(features.shape[0], 6, 30)
        canvas = canvas.scatter(2, places.unsqueeze(1).expand(-1, 6, -1), features)
        return self.head(canvas.view(-1, 6, 5, 6))


class Pooling(nn.Module):
    """Lift and splat: features of pixels, weighted by a distribution of depth, are summed in the cells of a map."""

    def __init__(self, known):
        super().__init__()
        self.lift = nn.Conv2d(3, 4 + 6, 1)
        cells = torch.randint(0, 20, (4 * 3 * 5,), generator=torch.Generator().manual_seed(1))
        self.cells = nn.Buffer(cells) if known else None

    def forward(self, image, cells):
        depth, features = self.lift(image).split([4, 6], 1)
        lifted = depth.softmax(1).unsqueeze(1) * features.unsqueeze(2)
        flat = lifted.flatten(2)
        grid = flat.new_zeros(flat.shape[0], 6, 20)
        if self.cells is None:
            return grid.scatter_add(2, cells.unsqueeze(1).expand(-1, 6, -1), flat).view(-1, 6, 4, 5)
        return grid.index_add(2, self.cells, flat).view(-1, 6, 4, 5)


def test_pillars():
    torch.manual_seed(0)
    places = torch.stack([torch.randperm(30)[:7] for _ in range(2)])
    graph = check_everywhere(Pillars().eval(), (torch.randn(2, 7, 5, 4), places))
    assert [type(n.op) for n in graph.nodes].count(jq.ops.Scatter) == 1


@pytest.mark.parametrize("known", [pytest.param(True, marks=pytest.mark.slow), False])
def test_bev_pooling(known):
    torch.manual_seed(0)
    cells = torch.randint(0, 20, (2, 60))
    module = Pooling(known).eval()
    if known:
        pooling, module = module, Values({})
        module.forward = lambda image: pooling(image, None)
        module.pooling = pooling
        check_everywhere(module, (torch.randn(2, 3, 3, 5),), with_gradients=False)
    else:
        meet = max(np.bincount(row).max() for row in cells.numpy())
        check_everywhere(module, (torch.randn(2, 3, 3, 5), cells), meet=meet)


# ---------------------------------------------------------------------------------------------------------------------
# ONNX, against onnxruntime

X, RNG = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32), np.random.default_rng(1)
U = RNG.normal(size=(4, 5, 6)).astype(np.float32)
ONNX = {
    "ScatterND, one axis": ("ScatterND", {"i": np.int64([[3], [-4]])}, (X, U[:2]), {}),
    "ScatterND, a slice": ("ScatterND", {"i": np.int64([[1], [2]])}, (X, U[:2]), {}),
    "ScatterND, pairs": ("ScatterND", {"i": np.int64([[[3, 0], [1, -1]]])}, (X, U[None, :2, 0]), {}),
    "ScatterND, elements": ("ScatterND", {"i": np.int64([[3, 0, 1], [1, 4, 5]])}, (X, U[0, 0, :2]), {}),
    "ScatterND, add": ("ScatterND", {"i": np.int64([[3], [3], [1]])}, (X, U[:3]), {"reduction": "add"}),
    "ScatterND, max": ("ScatterND", {"i": np.int64([[3], [3], [1]])}, (X, U[:3]), {"reduction": "max"}),
    "ScatterND, of values": ("ScatterND", {}, (X, np.int64([[3, -5], [1, 2]]), U[:2, 0]), {}),
    "ScatterElements, a slice": (
        "ScatterElements",
        {"i": np.tile(np.int64([1, 3]), (4, 5, 1))},
        (X, U[..., :2]),
        {"axis": 2},
    ),
    "ScatterElements, rows": (
        "ScatterElements",
        {"i": np.tile(np.int64([3, -6]), (4, 5, 1))},
        (X, U[..., :2]),
        {"axis": 2},
    ),
    "ScatterElements, fewer": (
        "ScatterElements",
        {},
        (X, RNG.permuted(np.tile(np.arange(5), (3, 2, 1)), axis=2)[..., :2].transpose(0, 2, 1), U[:3, :2, :2]),
        {"axis": 1},
    ),
    "GatherND": ("GatherND", {"i": np.int64([[3, 0], [1, -1]])}, (X,), {}),
    "GatherND, of values": ("GatherND", {}, (X, np.int64([[[3, -5], [1, 2]]])), {}),
    "GatherND, examples": ("GatherND", {}, (X, RNG.integers(-5, 5, (4, 3, 1))), {"batch_dims": 1}),
    "GatherND, elements of examples": ("GatherND", {}, (X, RNG.integers(-5, 5, (4, 3, 2))), {"batch_dims": 1}),
    "GatherND, of rows": ("GatherND", {}, (X, RNG.integers(-6, 6, (4, 5, 2, 1))), {"batch_dims": 2}),
}


@pytest.mark.parametrize("name", ONNX)
def test_onnx_as_in_onnxruntime(name):
    kind, constants, operands, attributes = ONNX[name]
    inputs = {f"x{k}": v for k, v in enumerate(operands)}
    names = list(inputs)
    names[1:1] = list(constants)
    node = helper.make_node(kind, names, ["y"], "node", **attributes)
    model = model_of([node], inputs, {"y": TensorProto.FLOAT}, opset=18, initializers=constants)
    (wanted,) = run_onnx(model, *operands)
    graph, params = from_onnx(model)
    found = jq.graph.evaluate_float(
        graph, params, *(jnp.asarray(v.astype(np.int32) if v.dtype == np.int64 else v) for v in operands)
    )
    np.testing.assert_array_equal(np.asarray(found[0]), wanted)
    if "slice" in name:
        assert any(isinstance(n.op, jq.ops.SliceScatter) for n in graph.nodes)
