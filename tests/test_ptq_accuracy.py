"""The figures of `benchmarks/PTQ.md` are made by a command that runs: here on a few pictures and random weights."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    spec = importlib.util.spec_from_file_location("ptq_accuracy", ROOT / "benchmarks" / "ptq_accuracy.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ptq_accuracy", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("recipe", "seeds"), [("W8A8 min-max", "0"), pytest.param("W4A8 adaround, bias", "01", marks=pytest.mark.slow)]
)
def test_the_command_measures(benchmark: ModuleType, tmp_path: Path, recipe: str, seeds: str) -> None:
    from nets import CifarResNet

    rng = np.random.default_rng(0)
    pictures = {f"{part}_x": rng.integers(0, 256, (n, 32, 32, 3), np.uint8) for part, n in (("train", 12), ("test", 9))}
    labels = {f"{part}_y": rng.integers(0, 10, n, np.uint8) for part, n in (("train", 12), ("test", 9))}
    np.savez(tmp_path / "cifar10_jpeg.npz", **pictures, **labels)
    torch.manual_seed(0)
    torch.save(CifarResNet(20).state_dict(), tmp_path / "cifar10_resnet20.pth")
    options = ["--data", str(tmp_path), "--tasks", "resnet20", "--seeds", *seeds, "--steps", "2", "--no-write"]
    rows = benchmark.main([*options, "--recipes", recipe])
    (row,) = rows
    assert len(row.accuracy) == len(row.float_accuracy) == len(seeds)
    assert all(0 <= accuracy <= 100 for accuracy in (*row.accuracy, *row.float_accuracy))
    form, _, name = recipe.partition(" ")
    assert f"| {form} | {name}" in benchmark.markdown(rows, [0], 2)


def test_seeds_choose_who_calibrates(benchmark: ModuleType) -> None:
    labels = np.zeros(50, np.int32)
    for free in (50, 20):
        (first, measured), (second, _) = (benchmark.split(labels, free, 10, seed) for seed in (0, 1))
        assert len(first) == 10
        assert sorted(first) != sorted(second)
        assert not set(first) & set(measured)
        assert len(measured) == (40 if free == 50 else 20)


def test_a_folder_that_is_not_there(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--data", "nowhere"])
    assert "no such folder" in capsys.readouterr().err
