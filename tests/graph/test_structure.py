"""Arguments and results keep the nesting of the model that a graph came from, through every verb and file."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jquant as jq
from jquant.graph.structure import output_names
from jquant_converters import from_torch

INT8 = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8())})
RNG = np.random.default_rng(0)
LEFT, RIGHT = (RNG.normal(size=(4, 3)).astype(np.float32) for _ in range(2))


class Heads(NamedTuple):
    boxes: object
    scores: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Found:
    sums: object
    heads: object


def of_jax(params: dict, cameras: dict, scale: jax.Array) -> dict:
    """A dict and an array in; a dict of a list and a dataclass out."""
    x = (cameras["left"] + cameras["right"]) @ params["w"]
    return {"b": [x, jax.nn.relu(x)], "a": Found(x * scale, Heads(x + scale, -x))}


class OfTorch(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(3, 2)

    def forward(self, cameras: dict, scale: torch.Tensor) -> dict:
        x = self.fc(cameras["right"] + cameras["left"])
        return {"scores": (torch.relu(x),), "boxes": Heads(x * scale, x + scale)}


def same(found: object, want: object, within: float) -> None:
    """The same containers with near values; torch's are compared as numpy."""
    assert type(found) is type(want)
    if isinstance(want, dict):
        assert set(found) == set(want)  # JAX sorts keys
        for key in want:
            same(found[key], want[key], within)
    elif isinstance(want, tuple | list):
        assert len(found) == len(want)
        for a, b in zip(found, want, strict=True):
            same(a, b, within)
    elif dataclasses.is_dataclass(want):
        for field in dataclasses.fields(want):
            same(getattr(found, field.name), getattr(want, field.name), within)
    else:
        np.testing.assert_allclose(np.asarray(found), np.asarray(want), atol=within)


SCALE = np.full((4, 2), 0.5, np.float32)


def numpy_of(value: object) -> object:
    """torch's result with JAX arrays for tensors."""
    return torch.utils._pytree.tree_map(lambda t: jnp.asarray(t.detach().numpy()), value)


@pytest.fixture(scope="module")
def by_jax() -> tuple:
    params = {"w": jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32)}
    inputs = ({"left": jnp.asarray(LEFT), "right": jnp.asarray(RIGHT)}, jnp.asarray(SCALE))
    graph, flat = jq.trace(of_jax, params, *inputs)
    model = jq.calibrate(jq.prepare(graph, flat, INT8, target="nash-e"), [inputs])
    return model, inputs, of_jax(params, *inputs)


@pytest.fixture(scope="module")
def by_torch() -> tuple:
    torch.manual_seed(0)
    module = OfTorch().eval()
    example = ({"right": torch.from_numpy(RIGHT), "left": torch.from_numpy(LEFT)}, torch.from_numpy(SCALE))
    graph, params = from_torch(module, example)
    model = jq.prepare(graph, params, INT8, target="nash-e")
    inputs = ({"left": jnp.asarray(LEFT), "right": jnp.asarray(RIGHT)}, jnp.asarray(SCALE))  # another order of the keys
    return jq.calibrate(model, [inputs]), inputs, numpy_of(module(*example))


@pytest.mark.parametrize("door", ["by_jax", "by_torch"])
def test_every_verb_takes_and_gives_what_the_model_does(door: str, request: pytest.FixtureRequest, tmp_path) -> None:
    model, inputs, want = request.getfixturevalue(door)
    same(jq.apply(model, *inputs, mode="float"), want, 1e-5)
    step = 0.1  # the widest value is about 4: 8 bits and two operations
    same(jq.apply(model, *inputs), want, step)
    same(jq.apply_train(model, *inputs)[0], want, step)
    program = jq.lower(model)
    same(jq.run(program, *inputs), want, step)
    jq.save(tmp_path / "net.jq", program)
    same(jq.run(jq.load(tmp_path / "net.jq"), *inputs), want, step)
    loss = lambda m: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(jq.apply(m, *inputs)))  # noqa: E731
    assert isinstance(jax.grad(loss)(model), jq.Model)
    assert jq.analysis.compare(model, inputs, "float", "bit_true").rows


def test_arrays_one_after_the_other_are_taken_too(by_jax: tuple) -> None:
    model, inputs, _ = by_jax
    jax.tree.map(np.testing.assert_array_equal, jq.apply(model, *jax.tree.leaves(inputs)), jq.apply(model, *inputs))


@pytest.mark.parametrize(
    ("cameras", "message"),
    [
        ({"left": LEFT}, "the inputs, 0: a dict with left, right is expected, not one with left"),
        ({"left": LEFT, "rihgt": RIGHT}, "a dict with left, right is expected, not one with left, rihgt"),
        ([LEFT, RIGHT], "the inputs, 0: a dict with left, right is expected, not list"),
    ],
)
def test_another_nesting_is_refused(by_jax: tuple, cameras: object, message: str) -> None:
    model, inputs, _ = by_jax
    with pytest.raises(jq.InputError) as error:
        jq.apply(model, cameras, inputs[1])
    assert message in str(error.value)


def test_outputs_have_names_and_are_deployed_by_them(by_torch: tuple) -> None:
    model, inputs, want = by_torch
    assert list(output_names(model.plan.graph)) == ["scores.0", "boxes.boxes", "boxes.scores"]
    program = jq.lower(model, outputs="boxes.scores")
    np.testing.assert_allclose(jq.run(program, *inputs), want["boxes"].scores, atol=0.1)
    with pytest.raises(jq.LoweringError, match=r"'boxes.score' is no output.*did you mean 'boxes.scores'"):
        jq.lower(model, outputs="boxes.score")


def test_a_class_that_a_file_names_is_not_made(by_jax: tuple, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has not seen the class gets its fields as a dict; a file runs no code."""
    from jquant.graph import structure

    model, inputs, want = by_jax
    jq.save(tmp_path / "net.jq", jq.lower(model))
    monkeypatch.setattr(structure, "_CLASSES", {})
    found = jq.run(jq.load(tmp_path / "net.jq"), *inputs)
    assert found["a"].keys() == {"sums", "heads"}
    np.testing.assert_allclose(found["a"]["heads"]["boxes"], want["a"].heads.boxes, atol=0.1)


def test_a_structure_that_does_not_fit_is_refused(by_jax: tuple) -> None:
    graph = by_jax[0].plan.graph
    with pytest.raises(jq.GraphError, match="5 outputs, and their structure 1 leaves"):
        jq.graph.validate(dataclasses.replace(graph, gives=graph.gives.parts[0].parts[0]))
