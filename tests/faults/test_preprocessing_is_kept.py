"""How pictures become inputs belongs to a state and to a program file: said once, it holds for every later command."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import jquant as jq
from jquant.cli.application import app
from jquant.cli.settings import ImageSettings, read_settings
from jquant.cli.state import load_state, program_image

MODEL = """
import numpy as np, jax.numpy as jnp
def make():
    # Two classes: whether the first channel, as the preprocessing has it, is above 0.
    w = np.zeros((3, 2), np.float32)
    w[0] = [-1.0, 1.0]
    return (lambda p, x: jnp.mean(x, axis=(2, 3)) @ p["w"]), {"w": jnp.asarray(w)}, (jnp.ones((1, 3, 6, 6)),)
"""
RULES = '[jquant]\nschema = 1\n[rules."*".output]\ndtype = "int8"\n[rules."*".weight]\ndtype = "int8"\n'
IMAGE = '[image]\ncrop = 6\ncolor = "bgr"\nmean = [0.5, 0.5, 0.5]\nstd = [0.25]\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from PIL import Image

    rng = np.random.default_rng(0)
    for label, bright in (("dark", 60), ("light", 190)):  # of blue, which is first in "bgr"
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(100, 156, (8, 8, 3))
            pixels[..., 2] = bright + rng.integers(-20, 20, (8, 8))
            pixels[..., 0] = 250 - bright
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "pictures" / label / f"{i}.png")
    (tmp_path / "net.py").write_text(MODEL)
    (tmp_path / "q.toml").write_text(RULES)
    (tmp_path / "i.toml").write_text(RULES + IMAGE)
    (tmp_path / "only.toml").write_text(IMAGE)
    (tmp_path / "other.toml").write_text(RULES + IMAGE.replace("0.25", "0.5"))
    (tmp_path / "labels.toml").write_text(IMAGE + 'labels = "stem"\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def jquant(command: str, code: int = 0):
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == code, done.output
    return done


def top_1(command: str) -> float:
    return json.loads(jquant(command).stdout)["modes"]["bit_true"]


def test_a_later_command_reads_pictures_as_the_first_one_did(folder):
    jquant("calibrate net.py:make -c i.toml -d pictures -o net.jqs -q")
    jquant("quantize net.jqs -o net.jq -q")
    for file in ("net.jqs", "net.jq"):
        assert top_1(f"eval {file} -d pictures --json") == 100
        assert top_1(f"eval {file} -d pictures -c i.toml --json") == 100
    jquant("run net.jq -d pictures --samples 2 -o o.npz -q")
    jquant("train net.jqs -d pictures -o t.jqs -q --epochs 1")
    assert load_state(Path("t.jqs")).image == load_state(Path("net.jqs")).image == read_settings(Path("i.toml")).image
    assert program_image(Path("net.jq")) == read_settings(Path("i.toml")).image
    assert isinstance(jq.load("net.jq"), jq.Program)


def test_another_preprocessing_is_an_error_that_names_what_differs(folder):
    jquant("calibrate net.py:make -c i.toml -d pictures -o net.jqs -q")
    jquant("quantize net.jqs -o net.jq -q")
    for command in ("eval net.jqs", "eval net.jq", "calibrate net.jqs -o again.jqs", "report net.jqs -o out"):
        done = jquant(f"{command} -d pictures -c other.toml", code=1)
        assert "std = (0.5,), and (0.25,) in the model" in done.output.replace("\n", " ")
        assert not Path("again.jqs").exists()
    jquant("eval net.jqs -d pictures -c only.toml --json")


def test_labels_are_of_the_data_and_may_differ(folder):
    jquant("calibrate net.py:make -c i.toml -d pictures -o net.jqs -q")
    done = jquant("eval net.jqs -d pictures -c labels.toml --json")  # 0.png .. 3.png: their names are class numbers
    assert json.loads(done.stdout)["modes"]["bit_true"] == 25


def test_the_defaults_that_a_calibration_used_are_kept_too(folder):
    (folder / "net.py").write_text(MODEL.replace("6, 6", "8, 8"))
    jquant("calibrate net.py:make -c q.toml -d pictures -o net.jqs -q")
    assert load_state(Path("net.jqs")).image == ImageSettings()
    jquant("eval net.jqs -d pictures -c i.toml", code=1)


def test_a_state_without_pictures_takes_what_is_said_later(folder):
    np.save("x.npy", np.random.default_rng(0).normal(size=(4, 3, 6, 6)).astype(np.float32))
    jquant("calibrate net.py:make -c q.toml -d x.npy -o net.jqs -q")
    assert load_state(Path("net.jqs")).image is None
    assert top_1("eval net.jqs -d pictures -c i.toml --json") == 100
    jquant("sensitivity net.jqs -d x.npy -c i.toml --samples 2 --budget 1.5 -o m.toml -q")
    assert read_settings(Path("m.toml")).image == read_settings(Path("i.toml")).image


def test_a_program_is_read_by_its_header_in_another_process(folder):
    jquant("calibrate net.py:make -c i.toml -d pictures -o net.jqs -q")
    jquant("quantize net.jqs -o net.jq -q")
    command = [sys.executable, "-m", "jquant", "eval", "net.jq", "-d", "pictures", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["modes"] == {"bit_true": 100.0}
