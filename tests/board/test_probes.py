"""Each probe depends on what it says and on nothing else, separates what it is for, and goes out as ONNX and torch."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from support.board import board_of, hidden

import jquant as jq
from jquant.board.questions import Asked, questions_of
from jquant_converters import write_probes

ASKED = [Asked(probe) for probe in jq.board.probe()]
PROBES = [one.probe for one in ASKED]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_other_field_changes_what_a_probe_gives(seed: int) -> None:
    """The board has every field at random, and the fit those that a probe asks about: the others are any."""
    march = hidden(seed)
    questions, _ = questions_of(ASKED, board_of(march, PROBES))
    assert len(questions) > 80
    for question in questions:
        row = tuple(jq.targets.value_of(march, field) for field in question.asks)
        found = question.answers(row, question.operands)
        assert found is not None, question.where
        np.testing.assert_array_equal(found, question.wanted, err_msg="/".join(question.where))


def test_every_field_is_asked_about_or_a_limit() -> None:
    asked = {field for probe in PROBES for field in probe.fields}
    assert asked == set(jq.board.domains())
    assert asked | set(jq.board.LIMITS) == set(jq.targets.fields())


@pytest.mark.parametrize(("family", "all_apart"), [("resize", "resize.rounding"), ("tables", "tables.entry_rounding")])
def test_probes_tell_values_apart(family: str, all_apart: str) -> None:
    """Rounding to nearest from cutting off, in every field; the five of one field from each other."""
    found = jq.board.separation(jq.board.probe([family]))
    assert found[all_apart].alike == ()
    for separation in found.values():
        assert len(separation.counts) > len(separation.alike)
        if separation.field.endswith("_rounding"):
            assert ("half_up", "floor") not in separation.alike, separation.field
            assert ("half_even", "floor") not in separation.alike, separation.field


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(jq.QConfigError, match="no family of probes 'resise'; did you mean 'resize'"):
        jq.board.probe(["resise"])


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kit")
    write_probes(folder, PROBES)
    return folder


def test_files_are_what_the_toolchain_accepts_and_onnxruntime_runs(kit: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    found = 0
    for probe in PROBES:
        path = kit / probe.name / "model.onnx"
        if not path.is_file():
            assert f"{probe.name}/model.onnx: " in (kit / "README.md").read_text()
            continue
        model = onnx.load(path)
        (opset,) = (entry.version for entry in model.opset_import if entry.domain == "")
        assert 10 <= opset <= 19
        assert model.ir_version <= 9
        session = onnxruntime.InferenceSession(path, options)
        inputs = {name: np.load(kit / probe.name / "inputs" / f"{name}.npy") for name in probe.inputs}
        outputs = session.run(None, inputs)
        assert len(outputs) == len(probe.graph.outputs)
        found += 1
    assert found >= len(PROBES) - 1  # RoiAlign has no ONNX form here


def test_the_readme_names_every_dump_and_the_formats_every_scale(kit: Path) -> None:
    text = (kit / "README.md").read_text()
    for probe in PROBES:
        assert f"## {probe.name}\n" in text
        assert probe.says in text
        assert all(name in text for name in probe.asks)
        formats = json.loads((kit / probe.name / "formats.json").read_text())
        assert set(probe.inputs) <= set(formats["nodes"])
