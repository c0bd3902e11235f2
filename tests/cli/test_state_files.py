"""State files: what they refuse, with the name of the file and the place in it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.sealed import arrays_of, change, change_arrays, read_parts, resealed

import jquant as jq
from jquant import ops
from jquant.cli.settings import ImageSettings
from jquant.cli.state import State, image_metadata, load_state, program_image, save_state

CONFIG = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8())})


@pytest.fixture
def state() -> State:
    node = jq.Node("fc", ops.Linear(), ("x",), jq.FrozenMap({"weight": "fc.weight"}))
    graph = jq.Graph((jq.Input("x", (None, 2)),), (node,), ("fc",))
    params = {"fc.weight": jnp.asarray([[0.5, -0.25], [1.0, 2.0], [0.125, 0.0]])}
    model = jq.prepare(graph, params, CONFIG, target=jq.targets.NASH_E)
    model = jq.calibrate(model, [jnp.asarray([[1.0, -1.0], [0.5, 0.25]])])
    return State(graph, params, CONFIG, jq.targets.NASH_E, model.qparams, model.params, ImageSettings(crop=6))


@pytest.fixture
def path(state: State, tmp_path: Path) -> Path:
    save_state(tmp_path / "net.jqs", state)
    return tmp_path / "net.jqs"


def test_a_state_is_read_as_it_was_written(state: State, path: Path) -> None:
    again = load_state(path)
    assert (again.graph, again.qconfig, again.target, again.image) == (
        state.graph,
        state.qconfig,
        state.target,
        state.image,
    )
    for kind in ("params", "qparams", "trained"):
        assert getattr(again, kind).keys() == getattr(state, kind).keys()
        for name, array in getattr(state, kind).items():
            np.testing.assert_array_equal(getattr(again, kind)[name], array, strict=True)
    assert resealed(path.read_bytes()) == path.read_bytes()


def test_parameters_of_no_node_are_left_out(state: State, path: Path) -> None:
    before = path.read_bytes()
    save_state(path, replace(state, params={**state.params, "unused": jnp.zeros(3)}))
    assert path.read_bytes() == before


def test_a_flipped_bit_is_found(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-2] + bytes([content[-2] ^ 4]) + content[-1:])
    with pytest.raises(jq.FormatError, match=r"net\.jqs: .* its content differs from its digest"):
        load_state(path)


def test_a_state_of_version_1_is_refused_by_its_version(path: Path) -> None:
    static = json.loads(read_parts(path.read_bytes())[0]["__metadata__"]["state"])
    save_file(arrays_of(path.read_bytes()), path, {"state": json.dumps(static | {"jquant": 1})})
    with pytest.raises(jq.FormatError, match=r"net\.jqs: .* format version 1; this release reads version 2"):
        load_state(path)


def test_the_preprocessing_of_a_program_is_covered(state: State, tmp_path: Path) -> None:
    path = tmp_path / "net.jq"
    jq.save(path, jq.lower(state.calibrated()), metadata=image_metadata(state))
    assert program_image(path) == ImageSettings(crop=6)
    path.write_bytes(path.read_bytes().replace(b'\\"crop\\": 6', b'\\"crop\\": 7'))
    for read in (program_image, jq.load):
        with pytest.raises(jq.FormatError, match=r"net\.jq: .*its content differs from its digest"):
            read(path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(calibrated=1), "calibrated: expected true or false, found 1"),
        (lambda d: d.pop("trained"), "trained: expected true or false, found None"),
        (lambda d: d.update(calibrated=False), "unexpected array 'scale:.*': the state is not calibrated"),
        (lambda d: d.update(graph=[]), r"graph: expected an object for Graph, found \[\]"),
        (lambda d: d["graph"]["nodes"][0]["inputs"].append("x"), "2 operands were given, and it has 1"),
        (lambda d: d["image"].update(std=[0]), r"image\.std must be .* not 0"),
        (lambda d: d["image"].update(color="pink"), r"image\.color must be one of"),
        (lambda d: d["image"].update(divisor=10**400), r"image\.divisor must be a finite number"),
        (lambda d: d.update(image=3), "image must be a table"),
        (lambda d: d.update(march="nash"), "nash"),
        (lambda d: d.update(qconfig=[]), "qconfig"),
        (lambda d: d.update(jquant=3), "format version 3; this release reads version 2"),
    ],
)
def test_static_parts_are_checked(path: Path, edit: Callable[[dict[str, Any]], Any], message: str) -> None:
    change(path, "state", edit)
    with pytest.raises(jq.FormatError, match=rf"net\.jqs: .*{message}|net\.jqs: {message}"):
        load_state(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["param", "scale", "trained"])
def test_numbers_that_are_not_finite_are_named(path: Path, kind: str, value: float) -> None:
    change_arrays(path, lambda arrays: arrays[f"{kind}:fc.weight"].__setitem__(0, value))
    with pytest.raises(jq.FormatError, match=rf"net\.jqs: array '{kind}:fc\.weight' contains NaN or infinite values"):
        load_state(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("param:no", "array 'param:no' is a parameter of no node"),
        ("x", "unexpected array 'x' of dtype float32"),
        ("other:fc", "unexpected array 'other:fc' of dtype float32"),
    ],
)
def test_unknown_arrays_are_named(path: Path, name: str, message: str) -> None:
    change_arrays(path, lambda arrays: arrays.update({name: np.ones(1, np.float32)}))
    with pytest.raises(jq.FormatError, match=rf"net\.jqs: {message}"):
        load_state(path)


@pytest.mark.parametrize("name", ["scale:no", "trained:no"])
def test_arrays_that_the_plan_does_not_know_are_named(path: Path, name: str) -> None:
    change_arrays(path, lambda arrays: arrays.update({name: np.ones(1, np.float32)}))
    with pytest.raises(jq.FormatError, match=rf"array '{name}' does not belong to the model"):
        load_state(path).prepared()
    change_arrays(path, lambda arrays: (arrays.pop(name), arrays.pop(f"{name.split(':')[0]}:fc.weight")))
    with pytest.raises(jq.FormatError, match=r"array '.*:fc\.weight' is not there"):
        load_state(path).prepared()


def test_a_program_is_no_state_and_a_state_no_program(state: State, path: Path) -> None:
    with pytest.raises(jq.FormatError, match=r"net\.jqs: no program: the file holds 'state'"):
        jq.load(path)
    jq.save(path.with_name("net.jq"), jq.lower(state.calibrated()))
    with pytest.raises(jq.FormatError, match=r"net\.jq: no state: the file holds 'program'"):
        load_state(path.with_name("net.jq"))
