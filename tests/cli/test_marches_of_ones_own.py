"""The command line with a march that is no Nash march: in a file, in the settings, and in a saved state."""

from pathlib import Path

import numpy as np
import pytest
from support.marches import NARROW

import jquant as jq
from jquant import ops
from jquant.cli.settings import read_settings
from jquant.cli.state import State, load_state, save_state


def test_a_march_goes_through_settings_and_states(tmp_path: Path) -> None:
    jq.targets.dump(NARROW, tmp_path / "mine.toml")
    (tmp_path / "by_file.toml").write_text(f'[target]\nmarch = "{tmp_path / "mine.toml"}"\n')
    (tmp_path / "by_field.toml").write_text(jq.targets.to_toml(NARROW, "target"))
    for name in ("by_file", "by_field"):
        assert read_settings(tmp_path / f"{name}.toml").march == NARROW
    graph = jq.Graph((jq.Input("x", (None, 3)),), (jq.Node("y", ops.Relu(), ("x",)),), ("y",))
    for march in (NARROW, jq.targets.NASH_M):
        save_state(tmp_path / "state.jqs", State(graph, {"w": np.zeros(1, np.float32)}, None, march))
        assert load_state(tmp_path / "state.jqs").target == march


def test_a_march_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "q.toml").write_text('[target]\nmarch = "none.toml"\n')
    with pytest.raises(jq.FormatError, match=r"no march at none\.toml"):
        read_settings(tmp_path / "q.toml")
    (tmp_path / "q.toml").write_text(jq.targets.to_toml(NARROW, "target").replace("max_rank = 10\n", ""))
    with pytest.raises(jq.FormatError, match="missing field max_rank"):
        read_settings(tmp_path / "q.toml")
