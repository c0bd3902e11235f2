"""Integers of the code in the arithmetic of floats, by torch's type promotion, ONNX's Cast and JAX's astype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from support.onnx_helpers import model_of
from torch import nn

import jquant as jq
from jquant_converters import from_onnx, from_torch, to_onnx

K = 6
FUNCTIONS = {
    "mul": lambda w, x: (x.softmax(1) * torch.arange(K)).sum(1),
    "buffer": lambda w, x: (x.softmax(1) * w).sum(1),
    "int32": lambda w, x: x * torch.arange(K, dtype=torch.int32),
    "uint8": lambda w, x: x * torch.arange(K, dtype=torch.uint8),
    "add": lambda w, x: x + torch.arange(K),
    "add, alpha": lambda w, x: torch.add(x, torch.arange(K), alpha=2),
    "sub": lambda w, x: torch.arange(K) - x,
    "div": lambda w, x: torch.arange(1, K + 1) / (x.exp() + 1),
    "addcmul": lambda w, x: torch.addcmul(x, x, torch.arange(K)),
    "max": lambda w, x: torch.maximum(x, torch.arange(K)),
    "remainder": lambda w, x: torch.remainder(x, torch.arange(1, K + 1)),
    "clamp": lambda w, x: torch.clamp(x, torch.arange(K) - 3, torch.arange(K)),
    "where": lambda w, x: torch.where(x > 0, x, w),
    "compare": lambda w, x: x > torch.arange(K) - 3,
    "cat": lambda w, x: torch.cat([x, torch.arange(K).expand(x.shape[0], -1)], 1),
    "stack": lambda w, x: torch.stack([x, torch.arange(K).expand(x.shape[0], -1)], 1),
    "in place": lambda w, x: (x * 1.0).mul_(torch.arange(K)),
    "number": lambda w, x: x * torch.tensor(3) + torch.tensor(2),
    "of the batch": lambda w, x: (x.softmax(1) * torch.arange(K).repeat(x.shape[0], 1)).sum(1),
    "beyond int32": lambda w, x: x * (torch.arange(K) * 2**40),
    "changed": lambda w, x: x[:, :2] * torch.arange(2).add_(5),
}


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.fc = function, nn.Linear(K, K)
        self.register_buffer("places", torch.arange(K))

    def forward(self, x):
        return self.function(self.places, self.fc(x))


def net(name):
    torch.manual_seed(0)
    module, x = Net(FUNCTIONS[name]).eval(), torch.randn(3, K)
    return module, x, *from_torch(module, (torch.randn(2, K),))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_torch_promotes_an_integer_of_the_code(name):
    module, x, graph, params = net(name)
    (found,) = jax.tree.leaves(jq.graph.evaluate_float(graph, params, jnp.asarray(x.numpy())))
    with torch.no_grad():
        wanted = module(x).numpy()
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6)


def test_a_softargmax_in_integers_and_onnx():
    """The place of a peak, as heads of keypoints, lanes and flow compute it."""
    module, x, graph, params = net("mul")
    qconfig = jq.QConfig({"*": jq.Policy(output=jq.int16(), weight=jq.int8(axis="out"))})
    model = jq.calibrate(jq.prepare(graph, params, qconfig, target=jq.targets.NASH_E), [jnp.asarray(x.numpy())])
    program = jq.lower(model)
    fast = jax.tree.leaves(jq.run(program, jnp.asarray(x.numpy())))[0]
    slow = jax.tree.leaves(jq.reference.run(program, x.numpy())[0])[0]
    np.testing.assert_array_equal(fast, slow)
    wanted = module(x).detach().numpy()
    assert np.abs(np.asarray(fast) - wanted).max() < 0.01
    again, read = from_onnx(to_onnx(graph, params))
    (found,) = jax.tree.leaves(jq.graph.evaluate_float(again, read, jnp.asarray(x.numpy())))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)


def test_the_exported_program_of_the_caller_stays_as_it_was():
    torch.manual_seed(0)
    batch = torch.export.Dim("batch")
    program = torch.export.export(Net(FUNCTIONS["mul"]).eval(), (torch.randn(2, K),), dynamic_shapes=({0: batch},))
    before = str(program.graph)
    from_torch(program)
    assert str(program.graph) == before


@pytest.mark.parametrize(
    "function",
    [lambda w, x: x * x.argmax(1, keepdim=True), lambda w, x: x * (x.argmax(1, keepdim=True) + w)],
    ids=["index", "index and constant"],
)
def test_an_index_of_the_data_is_refused(function):
    """It has no scale that is exact, however its range: a product with it is no arithmetic of the chip."""
    with pytest.raises(jq.ConversionError, match=r"aten\.mul\.Tensor.*an exact int32 \(index or count\)"):
        from_torch(Net(function).eval(), (torch.randn(2, K),))


def test_onnx_casts_a_range():
    """As torch.onnx writes it: Range of int64, then Cast, in the graph and not as an initializer."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "one"], ["size"]),
        helper.make_node("Range", ["zero", "size", "one"], ["places"]),
        helper.make_node("Cast", ["places"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Softmax", ["x"], ["p"], axis=1),
        helper.make_node("Mul", ["p", "numbers"], ["product"]),
        helper.make_node("ReduceSum", ["product", "axes"], ["y"], keepdims=0),
    ]
    constants = {"zero": np.array(0), "one": np.array(1), "axes": np.array([1])}
    x = np.random.default_rng(0).normal(size=(3, K)).astype(np.float32)
    graph, params = from_onnx(model_of(nodes, {"x": x}, {"y": TensorProto.FLOAT}, opset=14, initializers=constants))
    (found,) = jax.tree.leaves(jq.graph.evaluate_float(graph, params, jnp.asarray(x)))
    np.testing.assert_allclose(found, torch.tensor(x).softmax(1) @ torch.arange(float(K)), rtol=2e-6)


@pytest.mark.parametrize("promotion", ["standard", "strict"])
def test_jax_converts_a_range(promotion):
    def place(params, x):
        p = jax.nn.softmax(x @ params, axis=1)
        numbers = jnp.arange(K) if promotion == "standard" else jnp.arange(K).astype(x.dtype)
        return (p * numbers).sum(1)

    rng = np.random.default_rng(0)
    weight, x = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, K), (2, 4)))
    with jax.numpy_dtype_promotion(promotion):
        graph, params = jq.trace(place, weight, x)[:2]
        wanted = place(weight, x)
    assert not any(isinstance(node.op, jq.ops.Opaque) for node in graph.nodes)
    (found,) = jax.tree.leaves(jq.graph.evaluate_float(graph, params, x))
    np.testing.assert_allclose(found, wanted, rtol=2e-6)
