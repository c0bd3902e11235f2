"""`benchmarks/accuracy.py` measures our calls and a peer's on a few pictures with random weights."""

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from support.commands import load_benchmark, write_cifar
from torch import nn


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_benchmark("accuracy", monkeypatch)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch.onnx itself
def test_the_command_measures_us_and_a_peer(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keeping.ROOT", tmp_path)
    write_cifar(tmp_path, train=12, test=9)
    options = ["--data", str(tmp_path), "--tasks", "resnet20", "--seeds", "0", "--here", "--no-write"]
    rows = benchmark.main([*options, "--recipes", "jq.calibrate", "--peers", "onnxruntime"])
    found = [(row.tool, row.recipe, row.runs) for row in rows]
    assert found == [
        ("jquant", "jq.calibrate", "fake-quant"),
        ("jquant", "jq.calibrate", "integer"),
        ("onnxruntime", "symmetric grid", "onnxruntime"),
        ("onnxruntime", "default grid", "onnxruntime"),
    ]
    for row in rows:
        assert row.sqnr > 10
        assert row.seconds > 0
        assert 1 < row.lines < 40
    for name in ("of_ours", "of_peer"):  # what is finished is not measured again
        monkeypatch.setattr(benchmark, name, pytest.fail)
    assert benchmark.main([*options, "--recipes", "jq.calibrate", "--peers", "onnxruntime"]) == rows
    assert benchmark.main([*options, "--kept"]) == rows


def test_rows_are_means_over_seeds_in_a_table_and_a_picture(benchmark: ModuleType, tmp_path: Path) -> None:
    rows = [
        benchmark.Row("net", "jquant", "recipe", "integer", *values, 3)
        for values in ((1.0, 90.0, 20.0, 5.0), (3, 92, 22, 7))
    ]
    (row,) = benchmark.mean_rows(rows)
    np.testing.assert_allclose(row[4:8], (2, 91, 21, 6))
    page = benchmark.markdown([row], "command", {"net": (10, 20)})
    assert "| jquant | recipe | integer | 2.00 | 91.0 | 21.0 | 6 | 3 | 2 |" in page
    assert "10 pictures calibrate, 20 measure." in page
    benchmark.draw(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_script_of_a_peer_marks_what_a_user_writes(benchmark: ModuleType) -> None:
    for peer in benchmark.PEERS.values():
        text = (benchmark.HERE / "peers" / peer.script).read_text()
        assert text.count("# begin\n") == text.count("# end\n") == 1


class Placed(nn.Module):
    """Adds a tensor to each place."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.places


@pytest.mark.parametrize("inside", [False, True], ids=["outside of a module", "inside of one"])
def test_a_network_goes_to_a_peer_as_source_and_weights(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    torch.manual_seed(0)
    inner = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU6(inplace=True), Placed()]
    rest = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    net = nn.Sequential(nn.Sequential(*inner), *rest) if inside else nn.Sequential(*inner, *rest)
    name = f"written_network_{int(inside)}"
    benchmark.write_module(net.eval(), tmp_path / f"{name}.onnx")
    monkeypatch.syspath_prepend(tmp_path)
    read = importlib.import_module(name).Net().eval()
    read.load_state_dict(torch.load(tmp_path / f"{name}.pt", weights_only=True))
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(read(x), net(x), rtol=0, atol=0)


def test_slow_recipes_run_with_one_seed(benchmark: ModuleType) -> None:
    every, later = ([*benchmark.recipes_of("resnet20", first)] for first in (True, False))
    assert every == list(benchmark.OWN)
    assert later == ["jq.calibrate", 'jq.ptq.recipe("default")']
    assert "W4A4, blocks" not in benchmark.recipes_of("mobilenet_v2", True)


def test_a_folder_that_is_not_there(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--data", "nowhere"])
    assert "no such folder" in capsys.readouterr().err
