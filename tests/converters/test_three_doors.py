"""One function, written with torch and with jax.numpy: the three doors give one graph, and one program."""

import math
import warnings
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.alike import unnamed

import jquant as jq
from jquant import ops
from jquant.graph.float import evaluate_float
from jquant_converters import from_onnx, from_torch

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


# One vocabulary for both libraries; every function below is written in it once.
TORCH = SimpleNamespace(
    exp=torch.exp, erf=torch.erf, tanh=torch.tanh, sqrt=torch.sqrt, rsqrt=torch.rsqrt, log=torch.log,
    sigmoid=torch.sigmoid, cat=torch.cat, clip=torch.clamp,
    relu=torch.relu,
    mean=lambda x, *axes: x.mean(axes, keepdim=True),
    sum=lambda x, axis: x.sum(axis, keepdim=True),
    max=lambda x, axis: x.amax(axis, keepdim=True),
    swap=lambda x: x.transpose(-1, -2),
    where=torch.where,
    softmax=lambda x: torch.softmax(x, -1),
    permute=lambda x, *axes: x.permute(axes),
)  # fmt: skip
JAX = SimpleNamespace(
    exp=jnp.exp, erf=jax.lax.erf, tanh=jnp.tanh, sqrt=jnp.sqrt, rsqrt=jax.lax.rsqrt, log=jnp.log,
    sigmoid=jax.nn.sigmoid, cat=jnp.concatenate, clip=jnp.clip,
    relu=jax.nn.relu,
    mean=lambda x, *axes: x.mean(axes, keepdims=True),
    sum=lambda x, axis: x.sum(axis, keepdims=True),
    max=lambda x, axis: x.max(axis, keepdims=True),
    swap=lambda x: jnp.swapaxes(x, -1, -2),
    where=lambda c, a, b: jnp.where(c, a if hasattr(a, "shape") else jnp.float32(a), b),
    softmax=lambda x: jax.nn.softmax(x, -1),
    permute=lambda x, *axes: x.transpose(axes),
)  # fmt: skip

Library = SimpleNamespace | ModuleType
Function = Callable[..., Any]


def gelu_erf(f: Library, p: dict, x: Any) -> Any:
    return x * 0.5 * (1 + f.erf(x / math.sqrt(2)))


def gelu_tanh(f: Library, p: dict, x: Any) -> Any:
    return 0.5 * x * (1 + f.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(f: Library, p: dict, x: Any) -> Any:
    e = f.exp(x - f.max(x, -1))
    return e / f.sum(e, -1)


def log_softmax(f: Library, p: dict, x: Any) -> Any:
    shifted = x - f.max(x, -1)
    return shifted - f.log(f.sum(f.exp(shifted), -1))


def layer_norm(f: Library, p: dict, x: Any) -> Any:
    centred = x - f.mean(x, -1)
    return centred / f.sqrt(f.mean(centred**2, -1) + 1e-5) * p["weight"] + p["bias"]


def rms_norm(f: Library, p: dict, x: Any) -> Any:
    return x * f.rsqrt(f.mean(x * x, -1) + 1e-6) * p["weight"]


def silu(f: Library, p: dict, x: Any) -> Any:
    return x * f.sigmoid(x)


def silu_by_exp(f: Library, p: dict, x: Any) -> Any:
    return x / (1 + f.exp(-x))


def hard_swish(f: Library, p: dict, x: Any) -> Any:
    return x * f.clip(x + 3, 0, 6) / 6


def hard_sigmoid(f: Library, p: dict, x: Any) -> Any:
    return f.clip(x + 3, 0, 6) / 6


def leaky_relu(f: Library, p: dict, x: Any) -> Any:
    return f.where(x > 0, x, 0.1 * x)


def attention(f: Library, p: dict, query: Any, key: Any, value: Any, masked: Any) -> Any:
    scores = query @ f.swap(key) / math.sqrt(8)
    return f.softmax(f.where(masked, -1e9, scores)) @ value


def attention_by_addend(f: Library, p: dict, query: Any, key: Any, value: Any) -> Any:
    return f.softmax(query @ f.swap(key) * 0.25 + p["mask"]) @ value


def rope(f: Library, p: dict, x: Any) -> Any:
    first, second = x[..., :4], x[..., 4:]
    return x * p["cos"] + f.cat((-second, first), -1) * p["sin"]


def group_norm(f: Library, p: dict, x: Any) -> Any:
    n, c, h, w = x.shape
    grouped = x.reshape(n, 4, -1)
    centred = grouped - f.mean(grouped, -1)
    normal = centred / f.sqrt(f.mean(centred * centred, -1) + 1e-5)
    return normal.reshape(n, c, h, w) * p["weight"].reshape(1, -1, 1, 1) + p["bias"].reshape(1, -1, 1, 1)


ANGLES = np.arange(5, dtype=np.float32)[:, None] * np.ones(8, np.float32) / 3
HEADS = (normal(3, 2, 5, 8), normal(3, 2, 5, 8), normal(3, 2, 5, 8))
CAUSAL = np.where(np.tri(5, dtype=bool), 0, -1e9).astype(np.float32)
AFFINE = {"weight": normal(8), "bias": normal(8)}
CASES: dict[Function, tuple[dict[str, np.ndarray], tuple[np.ndarray, ...], list[type]]] = {
    gelu_erf: ({}, (normal(3, 8),), [ops.Gelu]),
    gelu_tanh: ({}, (normal(3, 8),), [ops.Gelu]),
    softmax: ({}, (normal(3, 8),), [ops.Softmax]),
    log_softmax: ({}, (normal(3, 8),), [ops.LogSoftmax]),
    layer_norm: (AFFINE, (normal(3, 4, 8),), [ops.LayerNorm]),
    rms_norm: ({"weight": normal(8)}, (normal(3, 4, 8),), [ops.RmsNorm]),
    silu: ({}, (normal(3, 8),), [ops.Silu]),
    silu_by_exp: ({}, (normal(3, 8),), [ops.Silu]),
    hard_swish: ({}, (normal(3, 8),), [ops.HardSwish]),
    hard_sigmoid: ({}, (normal(3, 8),), [ops.HardSigmoid]),
    leaky_relu: ({}, (normal(3, 8),), [ops.LeakyRelu]),
    attention: ({}, (*HEADS, normal(3, 1, 5, 5) > 1), [ops.LogicalNot, ops.Attention]),
    attention_by_addend: ({"mask": CAUSAL}, HEADS, [ops.IntegerConstant, ops.Attention]),
    rope: ({"cos": np.cos(ANGLES), "sin": np.sin(ANGLES)}, (normal(3, 2, 5, 8),), []),
    group_norm: (AFFINE, (normal(3, 8, 4, 4),), [ops.GroupNorm]),
}


class Module(torch.nn.Module):
    """A function of torch with its parameters; a mask is a buffer, as modules have it."""

    def __init__(self, function: Function, params: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.function, self.names = function, list(params)
        for name, array in params.items():
            tensor = torch.tensor(array)
            if name == "mask":
                self.register_buffer(name, tensor)
            else:
                setattr(self, name, torch.nn.Parameter(tensor))

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.function(TORCH, {name: getattr(self, name) for name in self.names}, *inputs)
        return found


def by_torch(function: Function, params: dict, inputs: tuple) -> tuple[jq.Graph, Any]:
    return from_torch(Module(function, params), tuple(map(torch.tensor, inputs)))


def by_onnx(function: Function, params: dict, inputs: tuple) -> tuple[jq.Graph, Any]:
    free = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about packages that it does not find
        program = torch.onnx.export(
            Module(function, params).eval(),
            tuple(map(torch.tensor, inputs)),
            dynamo=True,
            verbose=False,
            dynamic_shapes=(free,),
        )
    return from_onnx(program.model_proto)


def by_jax(function: Function, params: dict, inputs: tuple) -> tuple[jq.Graph, Any]:
    constants = {name: array for name, array in params.items() if name == "mask"}
    trained = {name: array for name, array in params.items() if name != "mask"}

    def call(leaves: dict, *arrays: Any) -> Any:
        return function(JAX, leaves | constants, *arrays)

    return jq.trace(call, trained, *inputs)


DOORS = [by_torch, by_onnx, by_jax]


def graphs_of(function: Function) -> dict[str, tuple[jq.Graph, Any]]:
    params, inputs, _ = CASES[function]
    return {door.__name__: door(function, params, inputs) for door in DOORS}


@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_three_doors_give_one_graph(function: Function) -> None:
    params, inputs, found = CASES[function]
    expected = Module(function, params)(*map(torch.tensor, inputs)).detach().numpy()
    graphs = graphs_of(function)
    for name, (graph, arrays) in graphs.items():
        assert not found or [type(node.op) for node in graph.nodes] == found, name
        (output,) = evaluate_float(graph, arrays, *inputs)
        # float32 of a few operations, in another order
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=2e-6, err_msg=name)
    forms = {name: unnamed(*pair) for name, pair in graphs.items()}
    assert forms["by_onnx"] == forms["by_torch"]
    assert forms["by_jax"] == forms["by_torch"]


QUICK = (silu, layer_norm, attention)
INTEGERS = [pytest.param(f, id=f.__name__, marks=[] if f in QUICK else [pytest.mark.slow]) for f in CASES]


def integers(graph: jq.Graph, params: Any, inputs: tuple) -> np.ndarray:
    """The outputs of the program, multiples of one scale."""
    model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target="nash-e")
    program = jq.lower(jq.calibrate(model, [inputs if len(inputs) > 1 else inputs[0]]))
    return np.asarray(jq.run(program, *inputs))


@pytest.mark.parametrize("function", INTEGERS)
def test_three_doors_give_one_program(function: Function) -> None:
    inputs = CASES[function][1]
    by_torch, by_onnx, by_jax = (integers(*pair, inputs) for pair in graphs_of(function).values())
    np.testing.assert_array_equal(by_onnx, by_torch)
    np.testing.assert_array_equal(by_jax, by_torch)


class Broadcast(torch.nn.Module):
    """A mask with more rows than the scores."""

    def forward(self, scores: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        return torch.softmax(scores.masked_fill(masked, -1e9), -1)


def test_a_mask_that_broadcasts_the_scores_stays_a_node_of_its_own() -> None:
    inputs = torch.tensor(normal(3, 1, 5)), torch.tensor(normal(3, 4, 5) > 1)
    graph, params = from_torch(Broadcast(), inputs)
    (output,) = evaluate_float(graph, params, *(x.numpy() for x in inputs))
    np.testing.assert_allclose(output, Broadcast()(*inputs).numpy(), rtol=1e-6, atol=1e-7)  # float32, one division
    assert [type(node.op) for node in graph.nodes] == [ops.MaskedFill, ops.Softmax]
