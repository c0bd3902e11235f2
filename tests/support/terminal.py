"""Commands of `jquant` in a process of their own, as a user runs them."""

import atexit
import json
import os
import pty
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

CACHE = tempfile.mkdtemp(prefix="jquant-tests-")  # of compiled programs, in place of the user's
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
SETTINGS = {"JAX_PLATFORMS": "cpu", "JAX_NUMPY_DTYPE_PROMOTION": "strict", "COLUMNS": "200", "XDG_CACHE_HOME": CACHE}
ENVIRONMENT = os.environ | SETTINGS

# One process for many commands: starting one and importing jax takes seconds. Exit codes are those of the commands.
DRIVER = """
import contextlib, io, json, sys, traceback
from jquant.cli import app
for line in sys.stdin:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app(json.loads(line), prog_name="jquant")
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            code = 99
            traceback.print_exc()
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


def run_all(folder: Path, commands: dict[str, str], **settings: str) -> dict[str, Result]:
    lines = "".join(json.dumps(line.split()) + "\n" for line in commands.values())
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", DRIVER],
        input=lines,
        cwd=folder,
        env=ENVIRONMENT | settings,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = [Result(*json.loads(line)) for line in done.stdout.splitlines()]
    return dict(zip(commands, results, strict=True))


def on_terminal(code: str) -> tuple[bytes, bytes]:
    """What a process writes to stdout, a pipe, and to stderr, a terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=theirs, stdout=subprocess.PIPE) as process:
        os.close(theirs)
        seen = _read_all(ours)
        out = process.communicate()[0]
    return out, seen


def shown_on_terminal(code: str, **settings: str) -> str:
    """What a process writes to a terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=ENVIRONMENT | settings, stderr=theirs, stdout=theirs):
        os.close(theirs)
        return _read_all(ours).decode()


def _read_all(terminal: int) -> bytes:
    """What comes out of a terminal until the other side closes it; it is closed then."""
    seen = b""
    try:
        while part := os.read(terminal, 4096):
            seen += part
    except OSError:  # how Linux says that the other side has closed
        pass
    os.close(terminal)
    return seen
