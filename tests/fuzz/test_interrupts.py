"""How an interrupted command is judged; `python tests/fuzz/interrupts.py` interrupts 500 of them."""

import importlib.util
import json
import signal
from pathlib import Path
from types import ModuleType

import pytest

import jquant.cli


@pytest.fixture(scope="module")
def interrupts() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_interrupts", Path(__file__).parent / "interrupts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TRACEBACK = 'Traceback (most recent call last):\n  File "{}", line 1, in x\nKeyboardInterrupt\n'


@pytest.mark.parametrize(("code", "error", "outcome"), [
    (0, "", "done"),
    (130, "error: interrupted; no file was left half-written\n", "130"),
    (130, "Exception ignored in: <f>\nerror: interrupted; no file was left half-written\n", "130"),
    (130, "epoch 1: loss 0.4\nerror: interrupted; no file was left half-written\n", "130"),
    (130, TRACEBACK.format("/src/jquant/x.py") + "error: interrupted; no file was left half-written\n", "pages"),
    (130, "", "pages"),
    (-signal.SIGINT, TRACEBACK.format("lib/python3.11/site.py"), "python"),
    (-signal.SIGINT, TRACEBACK.format("/src/jquant/__init__.py"), "pages"),
    (1, "Fatal Python error: init_import_site\n" + TRACEBACK.format("__editable___jquant_finder.py"), "python"),
    (-signal.SIGINT, "", "python"),
    (1, "error: no file at net.jqs\n", "code"),
    (1, "error: interrupted; no file was left half-written\n", "code"),
    (-signal.SIGSEGV, "", "code"),
])  # fmt: skip
def test_outcomes(interrupts: ModuleType, code: int, error: str, outcome: str) -> None:
    assert interrupts.judge(code, error) == outcome


def test_every_command_is_interrupted(interrupts: ModuleType) -> None:
    text = (Path(jquant.cli.__file__).parent / "help.json").read_text(encoding="utf-8")  # tests/cli keeps it right
    assert set(interrupts.COMMANDS) == set(json.loads(text)) - {""}
