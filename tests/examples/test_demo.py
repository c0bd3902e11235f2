"""The demo and the examples, as a user runs them, and the network of the demo against the executable specification."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_demo_prints_its_table_and_writes_the_same_numbers(tmp_path: Path) -> None:
    text = run_example("mnist.py", "--epochs", "4", "--qat-epochs", "1", "--out", str(tmp_path / "report"))
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    page = (tmp_path / "report" / "report.html").read_text()
    assert str(tmp_path / "report" / "report.html") in text.replace("\n", "")
    assert [row["weights"] for row in written["summary"]] == ["int8", "int4"]
    for row in written["summary"]:
        assert row["bit-true differs %"] == 0
        assert f"{row['integer %']:.2f}" in text
        assert json.dumps(row["integer %"]) in page
    int8, int4 = written["summary"]
    assert int8["integer %"] > int8["float %"] - 2  # shortened training; the README has the figures of the whole
    assert int4["integer %"] > int4["float %"] - 4
    assert "int4 weights after QAT" in page


@pytest.mark.slow
def test_mobilenet_runs_on_the_pictures_of_scikit_image(tmp_path: Path) -> None:
    text = run_example("mobilenet_v2.py", "--observers", "mse", "--json", str(tmp_path / "numbers.json"))
    result = json.loads((tmp_path / "numbers.json").read_text())
    (row,) = result["rows"]
    assert "agreement with float" in result["measure"]
    assert "agreement with float" in text
    assert row["bit-true logits that differ"] == 0
    assert row["integer"] >= 75


@pytest.fixture(scope="module")
def demo() -> tuple[jq.Model, jnp.ndarray]:
    """The network of the demo after one epoch, 4-bit weights, calibrated; and the demo's whole test set."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import mnist
        import torch
    finally:
        sys.path.remove(str(EXAMPLES))
    data = mnist.load_mnist()
    net = mnist.train_float(data, 1)
    from jquant_converters import from_torch

    graph, params = from_torch(net, (torch.from_numpy(data.train_x[:1]),))
    model = jq.prepare(graph, params, mnist.qconfig("int4"), target=jq.targets.NASH_E)
    return jq.calibrate(model, [jnp.asarray(data.train_x[:200])]), jnp.asarray(data.test_x)


def test_the_program_equals_the_reference_on_the_whole_test_set(demo: tuple) -> None:
    model, images = demo
    program = jq.lower(model)
    fast = jq.run_with_taps(program, images)
    _, slow = jq.reference.run(program, np.asarray(images))
    for name in program.graph.values:
        np.testing.assert_array_equal(np.asarray(fast[name]), slow[name], err_msg=name)


def test_bit_true_training_sees_the_program_on_the_whole_test_set(demo: tuple) -> None:
    model, images = demo
    exact = jq.run(jq.lower(model), images)
    trained, _ = jq.apply_train(model, images, mode="bit_true")
    np.testing.assert_array_equal(trained, exact)
