"""Ctrl-C ends every command with exit code 130 and one line, also while XLA compiles in a thread."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jquant.host.interrupts import _end, is_command

MODEL = """
import jax.numpy as jnp, numpy as np, pathlib
def make():
    rng = np.random.default_rng(0)
    params = {f"w{i}": jnp.asarray(rng.normal(size=(16, 16)) / 4, jnp.float32) for i in range(12)}
    def fn(p, x):
        for i in range(12):
            x = jnp.tanh(x @ p[f"w{i}"])
        return x
    return fn, params, (jnp.ones((2, 16)),)
def data():
    pathlib.Path("reading").write_text("")  # what follows compiles
    yield {"x": np.random.default_rng(1).normal(size=(8, 16)).astype(np.float32), "y": np.zeros(8, np.int32)}
"""
RULES = '[jquant]\nschema = 1\n[rules."*".output]\ndtype = "int16"\n[rules."*".weight]\ndtype = "int8"\n'
# CI may have the signal ignored.
START = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "runpy.run_module('jquant', run_name='__main__')"
)
COMMANDS = {
    "report": "report net.jqs -d net.py:data -o out --samples 4",
    "compare": "compare net.jqs -d net.py:data --samples 4",
    "sensitivity": "sensitivity net.jqs -d net.py:data --samples 4",
    "calibrate": "calibrate net.py:make -c q.toml -d net.py:data -o other.jqs",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    (folder / "net.py").write_text(MODEL)
    (folder / "q.toml").write_text(RULES)
    np.save(folder / "x.npy", np.random.default_rng(1).normal(size=(8, 16)).astype(np.float32))
    command = "calibrate net.py:make -c q.toml -d x.npy -o net.jqs -q"
    subprocess.run([sys.executable, "-m", "jquant", *command.split()], cwd=folder, check=True, capture_output=True)
    return folder


def interrupted(folder: Path, command: str, after: float) -> tuple[int, str]:
    """Exit code and stderr of a command that gets SIGINT so many seconds after it began to read data."""
    (folder / "reading").unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", START, *command.split()],
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        end = time.monotonic() + 120
        while not (folder / "reading").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(after)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        return process.returncode, err
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
def test_ctrl_c_during_the_imports_is_one_line_and_130(folder):
    """`python -m jquant` is sent SIGINT when -v says that jax is being imported."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        pytest.skip("SIGINT is ignored here, and so it is in the command")
    process = subprocess.Popen(
        [sys.executable, "-v", "-m", "jquant", "doctor"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stderr:
            if "import 'jax" in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 130
        assert "Traceback" not in rest
        assert "error: interrupted; no file was left half-written" in rest
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
def test_a_finished_command_keeps_its_code_while_python_ends(folder):
    """SIGINT comes from an exit handler: the command's work is done, and Python takes itself down."""
    late = "import atexit, os; atexit.register(os.kill, os.getpid(), signal.SIGINT); "
    command = [sys.executable, "-c", START.replace("runpy.run", late + "runpy.run"), "inspect", "net.jqs", "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stderr == ""


BEFORE_THE_COMMAND = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["jquant", "doctor"]
from jquant.cli import application
application.use_compilation_cache = lambda: os.kill(os.getpid(), signal.SIGINT)
application.main()
"""
OUTSIDE = BEFORE_THE_COMMAND.replace(
    "application.use_compilation_cache = lambda: os.kill(os.getpid(), signal.SIGINT)",
    "application.app = lambda prog_name: signal.default_int_handler(2, None)",
)
FIRST_LINES = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["jquant", "doctor"]
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "jquant.host.interrupts":
            sys.meta_path.remove(self)
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
import jquant.cli
"""


LOST = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["jquant", "doctor"]
from jquant.cli import application
from jquant.host.interrupts import restore
from jquant.host.whole_files import replacing
application._GRACE = 0.2
def save(prog_name):
    restore()
    with replacing("net.jq") as partial:
        partial.write_bytes(b"half")
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:  # as in a callback of XLA, where Python ignores it
            pass
        time.sleep(60)
application.app = save
application.main()
"""


@pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
def test_an_interrupt_that_is_lost_leaves_no_file(tmp_path):
    (tmp_path / "net.jq").write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", LOST], cwd=tmp_path, capture_output=True, text=True, timeout=50)
    assert done.returncode == 130
    assert done.stderr == "error: interrupted; no file was left half-written\n"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"net.jq": b"old"}


@pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
@pytest.mark.parametrize(
    "script", [BEFORE_THE_COMMAND, OUTSIDE, FIRST_LINES], ids=["arguments are read", "outside", "first lines"]
)
def test_ctrl_c_before_the_command_is_one_line_and_130(script):
    chosen = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}  # the user's own choice is kept
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=chosen)
    assert done.returncode == 130
    assert done.stderr == "error: interrupted; no file was left half-written\n"


def test_an_interrupt_of_a_program_that_imports_jquant_goes_on():
    script = FIRST_LINES.replace('"jquant", "doctor"', '"train.py"')
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode not in (0, 130)
    assert done.stderr.endswith("KeyboardInterrupt\n")


def test_only_a_command_answers_ctrl_c_itself():
    python = [sys.executable, "-m"]
    assert is_command(["-m"], [*python, "jquant", "doctor"])
    assert is_command(["/usr/bin/jquant", "doctor"], ["python", "/usr/bin/jquant", "doctor"])
    assert not is_command(["-m"], [*python, "pytest", "jquant"])
    assert not is_command(["train.py"], ["python", "train.py"])
    assert not is_command([""], ["python"])
    assert not is_command([], ["python", "-c", "-m"])
    assert signal.getsignal(signal.SIGINT) is not _end


@pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
@pytest.mark.parametrize(
    ("name", "after"), [("report", 0.5), ("report", 2.0), ("compare", 1.0), ("sensitivity", 1.0), ("calibrate", 0.3)]
)
def test_an_interrupted_command_ends_with_130(folder, name, after):
    code, err = interrupted(folder, COMMANDS[name], after)
    if code == 0:
        pytest.skip("the command was done before it was interrupted")
    # Where the signal falls into a callback of XLA, Python prints that it ignores it; the command ends all the same.
    assert code == 130, err
    assert err.endswith("error: interrupted; no file was left half-written\n")
    assert not (folder / "other.jqs").exists()
    assert not [p.name for p in folder.rglob("*.partial")]
