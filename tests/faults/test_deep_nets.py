"""Nothing calls itself once a layer: 600 layers under a limit of 400 nested calls, and 2,000 in the slow set."""

import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant_converters import from_onnx, to_onnx

CALLS = 400


@pytest.fixture
def few_calls() -> Iterator[None]:
    """Python's limit of nested calls at so many above this one; JAX itself needs about a hundred."""
    before, frame, here = sys.getrecursionlimit(), sys._getframe(), 0
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        here += 1
    sys.setrecursionlimit(here + CALLS)
    yield
    sys.setrecursionlimit(before)


def chain(params: list[jax.Array], x: jax.Array) -> jax.Array:
    for w in params:
        x = x + jax.nn.relu(x @ w)
    return x


@pytest.mark.parametrize("depth", [600, pytest.param(2000, marks=pytest.mark.slow)])
def test_every_verb_of_the_host(few_calls: None, tmp_path: Path, depth: int) -> None:
    rng = np.random.default_rng(0)
    weights = [jnp.asarray(w) for w in (0.02 * rng.normal(size=(depth, 4, 4))).astype(np.float32)]
    x = rng.normal(size=(3, 4)).astype(np.float32)
    graph, params = jq.trace(chain, weights, jnp.asarray(x))
    assert len(graph.nodes) == 3 * depth
    assert jq.graph.graph_from_json(jq.graph.graph_to_json(graph)) == graph
    rules = {"*": jq.Policy(output=jq.int8(scale=0.1), weight=jq.int8(scale=0.001))}
    model = jq.prepare(graph, params, jq.QConfig(rules), target="nash-e")
    assert jq.describe(model).count("\n") > depth
    assert jq.explain(model).count("\n") > depth
    program = jq.lower(model)
    jq.save(tmp_path / "net.jq", program)
    jq.plan.save(tmp_path / "net.jqm", model)
    again, kept = jq.load(tmp_path / "net.jq"), jq.plan.load(tmp_path / "net.jqm")
    assert str(again) == str(program)
    assert kept.plan == model.plan
    outputs, _ = jq.reference.run(again, x)
    expected, _ = jq.reference.run(program, x)
    np.testing.assert_array_equal(outputs, expected)
    content = to_onnx(graph, params).SerializeToString()
    read, _ = from_onnx(content)
    assert sum(type(node.op).__name__ == "Linear" for node in read.nodes) == depth
