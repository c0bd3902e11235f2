"""Golden files: what earlier releases wrote loads, and means what it meant. `make.py` beside this file made them."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant import training
from jquant.analysis.cases import load_bad_cases
from jquant.cli.settings import ImageSettings
from jquant.cli.state import load_state

HERE = Path(__file__).parent
FOLDERS = sorted(path for path in HERE.iterdir() if (path / "expected.json").is_file())


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_make", HERE / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=FOLDERS, ids=lambda path: path.name)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.param


def expected(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "expected.json").read_text())


def test_there_is_a_folder() -> None:
    assert "2" in [path.name for path in FOLDERS]


def test_a_program_gives_its_integers(folder: Path, make: ModuleType) -> None:
    program = jq.load(folder / "program.jq", target="nash-e")
    fast = jq.run_with_taps(program, make.images())
    _, slow = jq.reference.run(program, np.asarray(make.images()))
    wanted = expected(folder)["integers"]
    assert set(slow) == set(wanted)
    for name, integers in wanted.items():
        np.testing.assert_array_equal(slow[name].reshape(-1), np.asarray(integers, slow[name].dtype), err_msg=name)
        np.testing.assert_array_equal(np.asarray(fast[name]).reshape(-1), integers, err_msg=name)


def test_a_state_gives_the_same_program(folder: Path, make: ModuleType) -> None:
    state = load_state(folder / "state.jqs")
    assert state.image == ImageSettings(crop=4)
    assert {key: float(np.asarray(a, np.float64).sum()) for key, a in state.params.items()} == expected(folder)[
        "params"
    ]
    outputs, _ = jq.reference.run(jq.lower(state.calibrated()), np.asarray(make.images()))
    wanted, _ = jq.reference.run(jq.load(folder / "program.jq"), np.asarray(make.images()))
    np.testing.assert_array_equal(outputs, wanted)


def test_a_graph_gives_its_floats(folder: Path, make: ModuleType) -> None:
    graph = jq.graph.graph_from_json((folder / "graph.json").read_text())
    _, params = make.make_graph()
    (floats,) = jq.graph.evaluate_float(graph, params, make.images())
    # Some 50 additions and products of numbers around 1, each within 2^-24 of its value.
    np.testing.assert_allclose(np.asarray(floats), expected(folder)["floats"], rtol=0, atol=2e-5)


def test_a_plan_belongs_to_its_graph(folder: Path) -> None:
    plan = jq.plan.plan_from_json((folder / "plan.json").read_text())
    assert (str(plan.target), plan.graph.outputs) == (expected(folder)["march"], ("fc",))
    assert plan.spec("act").dtype == "int16"
    assert plan.spec("act").fixed_scale == 2.0**-12
    assert plan.weights["fc.weight"].quantizer == jq.lsq


def test_a_model_goes_on(folder: Path, make: ModuleType) -> None:
    model = jq.plan.load(folder / "model.jqm", target=jq.targets.NASH_E)
    outputs, _ = jq.reference.run(jq.lower(model), np.asarray(make.images()))
    wanted, _ = jq.reference.run(jq.load(folder / "program.jq"), np.asarray(make.images()))
    np.testing.assert_array_equal(outputs, wanted)


def test_marches_and_qconfigs_say_what_they_said(folder: Path, make: ModuleType) -> None:
    for name in ("march.toml", "march.json"):
        assert str(jq.targets.load(folder / name)) == expected(folder)["march"]
    assert jq.config.qconfig_from_json(folder / "qconfig.json") == make.QCONFIG
    assert jq.config.qconfig_from_toml(folder / "qconfig.toml") == make.QCONFIG


def test_a_function_goes_on(folder: Path, make: ModuleType) -> None:
    qfn, variables = jq.functions.load(folder / "function.jqf", make.function, make.function_params(), make.rows())
    fast = jq.run_with_taps(qfn.lower(variables), make.rows())
    wanted = expected(folder)["function"]
    assert set(wanted) == set(fast)
    for name, integers in wanted.items():
        np.testing.assert_array_equal(np.asarray(fast[name]).reshape(-1), integers, err_msg=name)
    for found, made in zip(jax.tree.leaves(variables["params"]), jax.tree.leaves(make.function_params()), strict=True):
        np.testing.assert_array_equal(found, made)


def test_bad_cases_are_there(folder: Path, make: ModuleType) -> None:
    cases = load_bad_cases(folder / "cases.npz")
    np.testing.assert_array_equal(cases.inputs["x"], make.images())
    assert (cases.index.tolist(), cases.error.tolist(), cases.output) == ([2, 0], [0.5, 0.25], "fc")


def test_a_checkpoint_goes_on(folder: Path, make: ModuleType, tmp_path: Path) -> None:
    shutil.copytree(folder / "checkpoint", tmp_path / "run")
    model = load_state(folder / "state.jqs").calibrated()
    state = make.fresh_state(model)
    checkpoints = training.open_checkpoints(tmp_path / "run", model)
    found = checkpoints.restore(jax.tree.map(jnp.zeros_like, state))
    checkpoints.close()
    assert found is not None
    assert (found.step, found.position) == (0, {"batch": 3})
    assert found.key is not None
    np.testing.assert_array_equal(jax.random.key_data(found.key), jax.random.key_data(jax.random.key(5)))
    for read, made in zip(jax.tree.leaves(found.state), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(read, made)
