"""Networks of well-known kinds: in float as torch, in integers as the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support import architectures, architectures_other
from support.architectures_other import OTHER
from support.architectures_vision import VISION

import jquant as jq
from jquant.graph.float import evaluate_float
from jquant_converters import from_torch

INTEGER = {"shufflenet": "int8", "video": "int8", "warping": "int16"}
SLOW_INTEGER = {
    "unet": "int8",
    "densenet": "int8",
    "decoder": "int16",
    "cross_attention": "int16",
    "resnet": "int8",
    "mobilenet_v3": "int8",
    "convnext": "int16",
    "swin": "int16",
    "vit": "int16",
    "lstm": "int16",
    "gru": "int16",
    "deeplab": "int8",
}


NEAR_FLOAT = ("shufflenet", "video")  # small enough that random weights keep their distance in int8


def to_jax(tensors):
    return tuple(jnp.asarray(x.to(torch.int32).numpy() if x.dtype == torch.int64 else x.numpy()) for x in tensors)


def check_float(module, example, drawn):
    """Imported at one batch, equal to torch at others within 1e-4 of the largest output."""
    graph, params = from_torch(module, example)
    run = jax.jit(lambda *x: evaluate_float(graph, params, *x))
    for given in drawn:
        with torch.no_grad():
            expected = torch.utils._pytree.tree_leaves(module(*(x.clone() for x in given)))
        actual = run(*to_jax(given))
        for a, e in zip(actual, expected, strict=True):
            assert a.shape == tuple(e.shape)
            np.testing.assert_allclose(np.asarray(a), e.numpy(), rtol=0, atol=1e-4 * float(e.abs().max()))
    return graph


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_float(name):
    batches = [architectures.inputs(name, batch, seed=batch) for batch in (1, 4)]
    check_float(architectures.build(name), architectures.inputs(name, 1, seed=0), batches)


SMALL = {name: (*VISION[name], False) for name in VISION} | {
    name: (*OTHER[name], name in architectures_other.TOKENS) for name in OTHER
}
QUICK = (
    "resnet50", "segformer", "detr", "fcos", "yolo", "flow", "bert", "llama", "pointnet", "in_place",
)  # fmt: skip


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SMALL])
def test_float_of_more(name):
    factory, shapes, tokens = SMALL[name]
    draws = [architectures.drawn(shapes, batch, batch, tokens=tokens) for batch in (1, 3)]
    graph = check_float(architectures.made(factory), draws[0], draws[1:])
    assert graph.inputs[0].shape[0] is None


def test_the_list_has_at_least_sixty():
    assert len(SMALL.keys() | architectures.ARCHITECTURES.keys()) == len(SMALL) + len(architectures.ARCHITECTURES)
    assert len(SMALL) + len(architectures.ARCHITECTURES) >= 60


def lowered(name, dtype):
    graph, params = from_torch(architectures.build(name), architectures.inputs(name, 1, seed=0))
    activations = {"int8": jq.int8, "int16": jq.int16}[dtype]()
    qconfig = jq.QConfig({"*": jq.Policy(output=activations, weight=jq.int8(axis="out"))})
    model = jq.prepare(graph, params, qconfig, target=jq.targets.NASH_E)
    batches = [to_jax(architectures.inputs(name, 4, seed=s)) for s in range(2)]
    model = jq.calibrate(model, batches)
    return model


def check_integers(name, dtype):
    """Bit for bit as the reference, and near the float network."""
    model = lowered(name, dtype)
    program = jq.lower(model)
    given = to_jax(architectures.inputs(name, 2, seed=9))
    fast = jax.tree.leaves(jq.run(program, *given))
    slow, _ = jq.reference.run(program, *map(np.asarray, given))
    real = evaluate_float(model.plan.graph, model.params, *given)
    for a, b, f in zip(fast, slow, real, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        error = np.linalg.norm(np.asarray(a) - np.asarray(f)) / np.linalg.norm(np.asarray(f))
        assert error < 0.15 or name not in NEAR_FLOAT, f"{error:.3f} away from float"


@pytest.mark.parametrize("name", INTEGER)
def test_integers(name):
    check_integers(name, INTEGER[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_INTEGER)
def test_integers_of_larger_ones(name):
    check_integers(name, SLOW_INTEGER[name])
