"""Arguments are checked before any work: there is no model at all, and the error is about the argument."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import typer.testing

from jquant.cli.application import app
from jquant.cli.arguments import check_file, check_space
from jquant.types import JQuantError

DATA = "-d data.npz"
CASES = {
    f"train no.jqs {DATA} -o o.jqs --curves c.xyz": "--curves c.xyz: it is written as .png or .svg or .pdf",
    f"train no.jqs {DATA} -o o.jqs --curves data.npz/c.png": "--curves data.npz/c.png: {here}/data.npz is a file",
    f"train no.jqs {DATA} -o o.jqs --checkpoints data.npz": "--checkpoints data.npz: {here}/data.npz is a file",
    f"train no.jqs {DATA} -o folder": "--output folder is a folder; name a file",
    f"calibrate no.jqs {DATA} -o folder": "--output folder is a folder; name a file",
    f"quantize no.jqs {DATA} -o folder": "--output folder is a folder; name a file",
    f"quantize no.jqs {DATA} -o o.jq --report data.npz": "--report data.npz: {here}/data.npz is a file",
    "quantize no.jqs -o o.jq --report r": "a report compares on data: give --data",
    f"run no.jq {DATA} -o o.txt": "--output o.txt: it is written as .npz",
    f"eval no.jqs {DATA} --mode int": "unknown mode 'int'",
    f"compare no.jqs {DATA} -b floot": "unknown mode 'floot'",
    f"compare no.jqs {DATA} -a values.npz": "no values at values.npz",
    f"compare no.jqs {DATA} -a values.npz --batch 4": "values of a .npz are compared in one batch",
    f"compare no.jqs {DATA} --sort sqn": "no column 'sqn'",
    f"compare no.jqs {DATA} -o folder": "--output folder is a folder",
    f"sensitivity no.jqs {DATA} --metric cosin": "unknown metric 'cosin'",
    f"sensitivity no.jqs {DATA} --mode one": "--mode 'one': it is one of one_on, one_off",
    f"sensitivity no.jqs {DATA} --kind weights": "--kind 'weights': it is one of activation, weight; did you mean",
    f"sensitivity no.jqs {DATA} --cost ops": "--cost 'ops': it is one of macs, bytes",
    f"report no.jqs {DATA} -o data.npz": "--output data.npz: {here}/data.npz is a file",
    "export no.jq -o folder": "--output folder is a folder",
    "board check no.jq folder --picture p.gif": "--picture p.gif: it is written as .png",
    "board fit folder -o folder": "--output folder is a folder",
    "board probe -o data.npz": "--output data.npz: {here}/data.npz is a file",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    np.savez(tmp_path / "data.npz", x=np.zeros((2, 3), np.float32))
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))  # else the command sets a folder for good
    return tmp_path


@pytest.mark.parametrize("line", CASES)
def test_before_any_work(line: str, here: Path) -> None:
    found = typer.testing.CliRunner().invoke(app, line.split())
    assert found.exit_code in (1, 2)
    assert CASES[line].format(here=here) in found.output
    assert not (here / "o.jqs").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="cannot be written to"):
        check_file(tmp_path / "a" / "b.jqs")


def test_space(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(JQuantError, match=r"--output .*: .* MB will be written, and .* MB are free"):
        check_space(tmp_path / "no" / "file", "--output", 2 * free + 2**30)
    check_space(tmp_path / "no" / "file", "--output", 1)
    check_space(None, "--output", 2**60)
