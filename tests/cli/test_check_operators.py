"""`jquant check` beside the documented constraints of operators."""

import json
from pathlib import Path

from typer.testing import CliRunner

from jquant.cli import app

SOURCE = """
import jax.numpy as jnp

def function():
    return (lambda p, x: jnp.sort(jnp.abs(x), axis=1)), {}, (jnp.ones((2, 6)),)
"""
QCONFIG = """
[jquant]
schema = 1
[rules."*".output]
dtype = "int8"
"""


def test_check_names_what_is_documented_and_what_is_not(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(SOURCE)
    (tmp_path / "q.toml").write_text(QCONFIG)
    command = ["check", f"{tmp_path / 'net.py'}:function", "--config", str(tmp_path / "q.toml")]
    text = CliRunner().invoke(app, command)
    assert text.exit_code == 0, text.output
    assert "no public row is known for: Sort (1)" in text.output
    assert "within what is documented: Abs (1)" in text.output
    found = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)["operators"]
    assert [(entry["operator"], entry["state"]) for entry in found] == [("Abs", "within"), ("Sort", "unknown")]
    assert "toolchain.d-robotics.cc" in found[0]["source"]
