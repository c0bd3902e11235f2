"""Every command, run in another process as a user would, one after the other on the files of the demo."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.terminal import ENVIRONMENT, Result, run_all

import jquant as jq

MODEL = """
import numpy as np, torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.fc = torch.nn.Linear(4, 2)
    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))
def make():
    torch.manual_seed(0)
    return Net()
def batches():
    for i in range(2):
        yield {"x": np.full((2, 1, 16, 16), i / 2, np.float32), "y": np.zeros(2, np.int32)}
def maps():
    for batch in batches():
        yield {"x": batch["x"], "y": np.zeros((2, 4, 4), np.float32)}
def error(outputs, labels):
    return np.abs(outputs).max()
def l2(a, b):
    return ((a - b) ** 2).mean()
def function():
    import jax.numpy as jnp
    return (lambda p, x: jnp.maximum(x @ p["w"], 0)), {"w": jnp.ones((3, 2))}, (jnp.ones((2, 3)),)
number = 3
"""

PICTURES = """
[jquant]
schema = 1
[rules."*".output]
dtype = "int8"
[rules."*".weight]
dtype = "int8"
axis = "out"
[image]
resize = 12
crop = [8, 10]
mean = [0.5, 0.4, 0.3]
std = [0.25]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "net.py").write_text(MODEL)
    (folder / "p.toml").write_text(PICTURES)
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(4):
        (folder / "pictures" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 16, 3)).astype(np.uint8)).save(
            folder / f"pictures/{'ab'[i % 2]}/{i}.png"
        )
    return folder


COMMANDS = (
    "demo",
    "init",
    "inspect",
    "check",
    "calibrate",
    "quantize",
    "train",
    "eval",
    "compare",
    "sensitivity",
    "report",
)
COMMANDS = (*COMMANDS, "export", "run", "doctor")

TEST = "--data d/test.npz"
TRAIN = "--data d/train.npz"
STEPS = {
    "demo": "demo d --steps 60 --json",
    "inspect": "inspect d/float.jqs",
    "inspect plan": "inspect d/float.jqs --config d/q.toml --json",
    "inspect state": "inspect d/net.jqs",
    "inspect program": "inspect d/net.jq",
    "inspect platform": "inspect d/net.jq --platform cuda",
    "inspect platform of a state": "inspect d/net.jqs --platform cuda",
    "inspect unknown platform": "inspect d/net.jq --platform abacus",
    "check": "check d/net.jqs",
    "calibrate": f"calibrate d/float.jqs -c d/q.toml {TRAIN} --samples 100 -o c.jqs --json",
    "quantize": f"quantize c.jqs -o c.jq {TEST} --report r --samples 4",
    "train": f"train c.jqs -c d/q.toml {TRAIN} -o t.jqs --json -v --curves curves.png",
    "eval": f"eval t.jqs {TEST} --batch 300 --json --position counts.json",
    "eval again": f"eval t.jqs {TEST} --batch 300 --json --position counts.json",
    "eval program": f"eval c.jq {TEST} --at-least 101",
    "eval own metric": "eval c.jq -d net.py:batches --metric net.py:error --json",
    "compare": f"compare c.jqs {TEST} --samples 4 --sort sqnr --top 3 -o c.json",
    "compare states": f"compare c.jqs --other t.jqs {TEST} --samples 4 --json",
    "sensitivity": f"sensitivity c.jqs {TEST} --samples 4 --metric net.py:l2 --top 2",
    "search": f"sensitivity c.jqs {TEST} --samples 4 --budget 1.3 -o m.toml --json",
    "mixed": f"quantize d/float.jqs -c m.toml {TRAIN} --samples 100 -o m.jq -q",
    "run": f"run c.jq {TEST} --samples 5 -o o.npz --raw --taps",
    "run real": f"run c.jq {TEST} --samples 5 -o real.npz --taps -q",
    "compare arrays": f"compare c.jqs {TEST} --samples 5 -a real.npz --json",
    "report": f"report c.jqs {TEST} -o r2 --samples 4 --json",
    "export": "export c.jq --to stablehlo --batch 5 -o c.stablehlo",
    "export onnx": "export c.jqs --to onnx -o c.onnx --json",
    "export float onnx": "export d/float.jqs --to onnx -o f.onnx",
    "export torch": "export c.jqs --to torch -o c.pt2",
    "jax function": "inspect net.py:function",
    "torch module": "calibrate net.py:make --shape 1,3,8,10 -c p.toml -d pictures -o p.jqs",
    "agreement": "eval p.jqs -d pictures -c p.toml --json",
    "doctor": "doctor --json",
    "inspect with settings": "inspect d/float.jqs --config d/q.toml",
    "inspect module": "inspect net.py:make --shape 1,3,8,10",
    "eval text": f"eval c.jqs {TEST} --samples 64 --mode fake_quant",
    "eval program text": f"eval c.jq {TEST} --samples 64",
    "compare states text": f"compare c.jqs --other t.jqs {TEST} --samples 2",
    "report text": f"report c.jqs {TEST} --samples 2 --no-accuracy -o r3",
    "doctor text": "doctor",
} | {f"help {name}": f"{name} --help" for name in COMMANDS}


@pytest.fixture(scope="module")
def done(folder: Path) -> dict[str, Result]:
    return run_all(folder, STEPS)


def ok(result: Result) -> Result:
    assert result.code == 0, result.err + result.out
    assert result.err == "" or result.err.startswith("epoch"), result.err
    return result


def test_the_demo_learns_and_writes_its_files(done: dict, folder: Path) -> None:
    top = ok(done["demo"]).json["top_1"]
    assert top["float"] > 40  # of six classes, after a shortened training
    assert abs(top["int8 integers"] - top["float"]) < 5
    assert {p.name for p in (folder / "d").iterdir()} == {
        "float.jqs",
        "net.jqs",
        "net.jq",
        "q.toml",
        "train.npz",
        "test.npz",
    }


def test_inspect_shows_what_there_is(done: dict) -> None:
    assert "MaxPool" in ok(done["inspect"]).out
    rows = ok(done["inspect plan"]).json["resolutions"]
    assert {"name": "head", "port": "output"}.items() <= rows[-5].items() or any(r["name"] == "head" for r in rows)
    assert "trainable" in ok(done["inspect state"]).out
    assert "nash-e" in ok(done["inspect program"]).out
    assert "product f32 x f32 -> f32" in ok(done["inspect platform"]).out
    assert done["inspect platform of a state"].code == 2
    assert "make one with jquant quantize" in done["inspect platform of a state"].err
    assert done["inspect unknown platform"].code != 0
    assert "'abacus' is none of cpu, cuda, rocm, tpu" in done["inspect unknown platform"].err


def test_check_finds_nothing_wrong_with_the_demo(done: dict) -> None:
    assert "none of them an error" in ok(done["check"]).out or "nothing found" in done["check"].out


def test_calibrate_and_quantize_equal_the_library(done: dict, folder: Path) -> None:
    scales = ok(done["calibrate"]).json["scales"]
    program = jq.load(folder / "c.jq")
    assert float(program.scales["x"]) == pytest.approx(scales["x"])
    assert "wrote c.jq" in ok(done["quantize"]).out
    assert (folder / "r" / "report.html").stat().st_size > 10_000
    summary = {row["mode"]: row for row in json.loads((folder / "r2" / "report.json").read_text())["summary"]}
    ok(done["report"])
    assert summary["bit_true"]["samples"] == 600
    assert summary["bit_true"]["top-1 %"] > 35


NEXT = {
    "inspect": "init d/float.jqs -o q.toml",
    "inspect state": "eval d/net.jqs --data DATA",
    "inspect program": "run d/net.jq --data DATA -o d/net.npz",
    "inspect platform": "run d/net.jq --data DATA -o d/net.npz",
    "inspect with settings": "calibrate d/float.jqs --config d/q.toml --data DATA -o net.jqs",
    "inspect module": "init net.py:make --shape 1,3,8,10 -o q.toml",
    "check": "eval d/net.jqs --data DATA",
    "eval text": "quantize c.jqs -o c.jq",
    "eval program text": "run c.jq --data d/test.npz -o c.npz",
    "compare": "sensitivity c.jqs --data d/test.npz --top 10",
    "compare states text": "quantize t.jqs -o t.jq",
    "sensitivity": "sensitivity c.jqs --data d/test.npz --budget 1.2 -o mixed.toml",
    "report text": "sensitivity c.jqs --data d/test.npz --budget 1.2 -o mixed.toml",
    "export": "run c.jq --data DATA -o outputs.npz",
    "run": "export c.jq -o c.stablehlo",
    "doctor text": "demo",
}


def test_a_command_ends_with_the_next_one_to_type(done: dict, folder: Path) -> None:
    """What it says is a command that reads its arguments, and the files it names are there."""
    assert ok(done["quantize"]).out.splitlines()[-1] == "next: jquant run c.jq --data d/test.npz -o c.npz"
    assert ok(done["torch module"]).out.splitlines()[-1] == "next: jquant eval p.jqs --data pictures"
    for name, line in NEXT.items():
        assert ok(done[name]).out.splitlines()[-1] == f"next: jquant {line}", name
    run = {name: NEXT.get(name, "").replace("DATA", "d/test.npz") for name in ("inspect", "sensitivity")}
    for name in ("quantize", "torch module"):
        run[name] = done[name].out.splitlines()[-1].removeprefix("next: jquant ")
    for name, result in run_all(folder, run).items():
        assert result.code == 0, f"{name}: {result.err}"


def test_training_lowers_the_loss_and_keeps_the_state(done: dict, folder: Path) -> None:
    result = ok(done["train"]).json
    assert result["after"]["loss"] < result["before"]["loss"]
    assert result["float"]["top-1 %"] > 40
    assert result["steps"] == 30
    assert re.match(r"epoch 1: loss [\d.]+, top-1 % [\d.]+, \d+ samples a second", done["train"].err)
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    modes = ok(done["eval"]).json["modes"]
    assert ok(done["eval again"]).json == done["eval"].json
    assert set(modes) == {"float", "fake_quant", "bit_true"}
    assert modes["bit_true"] == pytest.approx(modes["fake_quant"], abs=3)


def test_an_unmet_accuracy_is_exit_code_3(done: dict) -> None:
    assert done["eval program"].code == 3
    assert "top-1 % is" in done["eval program"].err
    assert ok(done["eval own metric"]).json["samples"] == 4


def test_compare_and_sensitivity_print_and_write(done: dict, folder: Path) -> None:
    lines = ok(done["compare"]).out.splitlines()
    assert lines[0].startswith("name")
    assert "more" in lines[5]
    assert json.loads((folder / "c.json").read_text())["b"] == "bit_true"
    changed = {row["name"]: row["max_error"] for row in ok(done["compare states"]).json["weights"]}
    assert all(error > 0 for error in changed.values())
    assert len(ok(done["sensitivity"]).out.splitlines()) == 5  # a head of two, two rows, the next command


def test_the_search_writes_a_qconfig_that_quantizes(done: dict, folder: Path) -> None:
    found = ok(done["search"]).json
    assert found["cost"] <= 1.3 * (1 + 1e-6)
    assert len(set(found["choices"].values())) > 1
    assert ok(done["mixed"]).out == ""  # quiet
    dtypes = {entry.output for entry in jq.load(folder / "m.jq").formats.values()}
    assert "int16" in dtypes


def test_run_writes_the_integers_of_the_program(done: dict, folder: Path) -> None:
    ok(done["run"])
    with np.load(folder / "o.npz") as written, np.load(folder / "d" / "test.npz") as data:
        values = jq.run_with_taps(jq.load(folder / "c.jq"), data["x"][:5])
        assert set(written.files) == set(values)
        for name in written.files:
            np.testing.assert_array_equal(written[name], values[name])


def test_export_gives_the_same_outputs(done: dict, folder: Path) -> None:
    from jax import export

    ok(done["export"])
    loaded = export.deserialize(bytearray((folder / "c.stablehlo").read_bytes()))
    with np.load(folder / "d" / "test.npz") as data:
        x = data["x"][:5]
    np.testing.assert_array_equal(loaded.call(x)[0], jq.run(jq.load(folder / "c.jq"), x))


def test_onnx_export_writes_a_checked_model(done: dict, folder: Path) -> None:
    import onnx

    assert ok(done["export onnx"]).json["bytes"] == (folder / "c.onnx").stat().st_size
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(folder / "c.onnx").graph.node}
    ok(done["export float onnx"])
    assert "QuantizeLinear" not in {node.op_type for node in onnx.load(folder / "f.onnx").graph.node}


def test_torch_export_is_an_archive_that_torch_runs(done: dict, folder: Path) -> None:
    import torch
    import torch.ao.quantization.fx._decomposed  # defines the operators of the archive

    ok(done["export torch"])
    program = torch.export.load(folder / "c.pt2")
    with np.load(folder / "d" / "test.npz") as data:
        x = data["x"][:3]
    outputs = program.module()(torch.from_numpy(x))
    assert (outputs[0] if isinstance(outputs, tuple) else outputs).shape == (3, 6)


def test_a_function_of_jax_is_a_model(done: dict) -> None:
    assert "Relu" in ok(done["jax function"]).out


def test_a_torch_module_and_a_folder_of_pictures(done: dict) -> None:
    ok(done["torch module"])
    modes = ok(done["agreement"]).json
    assert modes["samples"] == 4
    assert modes["metric"] == "top-1 %"  # the folders are labels


def test_the_doctor_compares_with_the_reference(done: dict) -> None:
    found = ok(done["doctor"]).json
    assert found["integers equal the reference"] is True
    assert found["outputs compared"] > 1000
    assert found["fast int8 products"] == "yes"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(done: dict, name: str) -> None:
    text = ok(done[f"help {name}"]).out
    assert f"jquant {name}" in text.split("Usage:")[1].split("\n", 1)[1]
    assert "--json" in text


def test_bad_arguments_are_named_in_one_line(folder: Path, done: dict) -> None:
    (folder / "bad.toml").write_text("[jquant]\nschema = 1\n[imag]\nresize = 3\n")
    (folder / "typo.toml").write_text('[jquant]\nschema = 1\n[rules."stm"]\noutput = "int8"\n')
    (folder / "broken.jq").write_bytes((folder / "c.jq").read_bytes()[:500])
    (folder / "empty").mkdir(exist_ok=True)
    np.savez(folder / "wrong.npz", z=np.zeros(3))
    cases = {
        "frobnicate": (2, "No such command"),
        "run c.jq -o x.npz": (2, "Missing option"),
        "inspect nothing.jq": (1, "no model at nothing.jq"),
        "inspect broken.jq": (1, "not a program (.jq) nor a state (.jqs) of jquant, or a damaged one"),
        "inspect wrong.npz": (2, "wrong.npz is no model: give it with --data"),
        "eval c.jq -d nothing": (1, "no data at nothing"),
        "eval c.jq -d empty": (1, "no pictures"),
        "eval c.jq -d wrong.npz": (1, "no array 'x'; it has 'z'"),
        "inspect c.jqs -c bad.toml": (1, "unknown key 'imag'; did you mean 'image'"),
        "check d/float.jqs -c typo.toml": (3, "are errors"),
        f"compare d/float.jqs {TEST}": (2, "no qconfig yet"),
        f"compare c.jqs {TEST} -a flaot": (1, "did you mean 'float'"),
        f"compare c.jqs {TEST} --sort sqn": (1, "no column 'sqn'"),
        f"eval c.jqs {TEST} --mode int": (1, "unknown mode 'int'"),
        f"eval c.jq {TEST} --mode float": (2, "one mode, bit_true"),
        "train c.jqs -d net.py:number -o x.jqs": (1, "is int, not a function"),
        f"train c.jq {TRAIN} -o x.jqs": (2, "is a program"),
        f"sensitivity c.jqs {TEST} --metric cosin": (1, "did you mean 'cosine'"),
        f"sensitivity c.jqs {TEST} --samples 4 --budget 0": (1, "below the cheapest"),
        "export c.jq --to onx -o x": (2, "unknown format 'onx'"),
        "export c.jq --to onnx -o x": (2, "needs the state"),
        "inspect nothing_here:make": (1, "No module named"),
        "inspect net.py:mak": (1, "has no 'mak'"),
        "inspect net.py:make": (2, "give --shape"),
        "inspect net.py": (2, "net.py: name what makes the model in it too, such as net.py:function or "),
        "inspect net.py:Net --shape 1,3,8,8 --checkpoint none.pth": (1, "no checkpoint at none.pth"),
        "inspect net.py:error --shape 1,3,8,8": (2, "missing a required argument: 'outputs'; name a function without"),
        f"calibrate net.py:make -c none.toml {TEST} -o x.jqs": (
            1,
            "no settings at none.toml; `jquant init -o none.toml`",
        ),
        "inspect net.pth.tar": (2, "net.pth.tar is no model: give it with --checkpoint"),
        "eval c.jqs -d net.py:maps": (1, "give --metric module:function of (outputs, labels)"),
        "inspect net.py:make --shape 1,a": (2, "integers with commas"),
        "inspect net.py:make --shape 1,3,8,8 --checkpoint c.jq": (1, "not a readable checkpoint"),
        f"run c.jq {TEST} -o x.txt": (2, "written as .npz"),
        f"run c.jq {TEST} -o x.npz --samples 0": (2, "samples"),
        "doctor --fast": (2, "No such option"),
        "demo d --steps 0": (2, "steps"),
        "quantize d/float.jqs -o x.jq": (2, "no qconfig yet"),
        f"calibrate d/float.jqs {TEST} -o x.jqs": (2, "no qconfig yet"),
        f"report d/float.jqs {TEST} -o x": (2, "no qconfig yet"),
        "report d/net.jqs -d net.py:maps -o x": (1, "--no-accuracy writes the report"),
    }
    before = {p.name for p in folder.iterdir()}
    results = run_all(folder, {line: line for line in cases})
    for name, (code, text) in cases.items():
        found = results[name]
        assert (found.code, text in found.err) == (code, True), f"{name}: {found}"
        assert "Traceback" not in found.err, name
    assert {p.name for p in folder.iterdir()} - before <= {"__pycache__"}  # nothing was written


# What was started in the background of a shell, and all that it starts, ignores interrupts.
HEARS = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "runpy.run_module('jquant', run_name='__main__')"
)


def interrupt(process: subprocess.Popen[str]) -> str:
    """Presses Ctrl-C until it is heard: CPython drops an exception that is raised while a destructor runs."""
    for _ in range(12):
        process.send_signal(signal.SIGINT)
        try:
            return process.communicate(timeout=10)[1]
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError("the process ignores interrupts")


def test_an_interrupt_leaves_no_file(folder: Path, done: dict) -> None:
    command = [sys.executable, "-c", HEARS, *f"train c.jqs {TRAIN} -o i.jqs --epochs 500 -v".split()]
    process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("epoch 1: loss")
        time.sleep(0.2)
        err = interrupt(process)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    assert process.returncode == 130
    assert "interrupted" in err
    assert not [p.name for p in folder.iterdir() if p.name.startswith((".i.jqs", "i.jqs"))]
