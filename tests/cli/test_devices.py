"""Commands on several devices: the same statistics, counts and integers as on one."""

from pathlib import Path

import numpy as np
from support.terminal import run_all

from jquant.cli.state import load_state

DEVICES = "--xla_force_host_platform_device_count=2"


def test_two_devices_give_what_one_gives(tmp_path: Path) -> None:
    recipe = "[train]\nepochs = 1\nbatch = 500\nlearning_rate = 0.001\n"
    assert run_all(tmp_path, {"demo": "demo d -q"})["demo"].code == 0
    (tmp_path / "q.toml").write_text((tmp_path / "d/q.toml").read_text().partition("[train]")[0] + recipe)
    data = np.load(tmp_path / "d/train.npz")
    np.savez(tmp_path / "odd.npz", **{name: data[name][:21] for name in data.files})
    lines = {
        "calibrate 1": "calibrate d/float.jqs -c q.toml -d d/train.npz -o one.jqs --microbatch 100",
        "calibrate 2": "calibrate d/float.jqs -c q.toml -d d/train.npz -o two.jqs --microbatch 100 --devices 2",
        "eval 1": "eval one.jqs -d odd.npz --mode fake_quant --mode bit_true --json",
        "eval 2": "eval one.jqs -d odd.npz --mode fake_quant --mode bit_true --json --devices 2",
        "compare 1": "compare one.jqs -d odd.npz --samples 21 --json",
        "compare 2": "compare one.jqs -d odd.npz --samples 21 --json --batch 8 --devices 2 --position p.json",
        "run 1": "run one.jqs -d odd.npz -o one.npz --raw --taps --batch 8",
        "run 2": "run one.jqs -d odd.npz -o two.npz --raw --taps --batch 8 --devices 2",
        "train": "train one.jqs -c q.toml -d d/train.npz -o trained.jqs --devices 2 --json",
        "uneven": "train one.jqs -c uneven.toml -d d/train.npz -o t.jqs --devices 2",
        "too many": "eval one.jqs -d odd.npz --devices 3",
    }
    (tmp_path / "uneven.toml").write_text((tmp_path / "q.toml").read_text().replace("batch = 500", "batch = 501"))
    found = run_all(tmp_path, lines, XLA_FLAGS=DEVICES)
    codes = {name: (result.code, result.err[-500:]) for name, result in found.items() if result.code}
    assert set(codes) == {"uneven", "too many"}, codes
    assert (tmp_path / "one.jqs").read_bytes() == (tmp_path / "two.jqs").read_bytes()
    assert found["eval 1"].json == found["eval 2"].json
    whole, parts = (found[f"compare {i}"].json["rows"] for i in (1, 2))
    for row, other in zip(whole, parts, strict=True):
        assert (row["name"], row["size"]) == (other["name"], other["size"])
        assert abs(row["sqnr"] - other["sqnr"]) < 0.01  # a float value may round to the other side of an LSB
    assert (tmp_path / "p.json").is_file()
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert one.files == two.files
    for name in one.files:
        assert len(one[name]) == 21
        np.testing.assert_array_equal(one[name], two[name])
    before, after = load_state(tmp_path / "one.jqs").qparams, load_state(tmp_path / "trained.jqs").qparams
    assert found["train"].json["steps"] == len(data["x"]) // 500
    assert any(float(np.max(after[name])) != float(np.max(before[name])) for name in before)
    assert "train.batch is 501; with --devices 2 it must be a multiple" in found["uneven"].err
    assert "--devices 3: this machine has 2 of platform cpu" in found["too many"].err
