"""The figures of `benchmarks/PTQ.md` are made by a command that runs: here on a few pictures and random weights."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from support.commands import load_benchmark, write_cifar


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_benchmark("ptq_accuracy", monkeypatch)


@pytest.mark.parametrize(
    ("recipe", "seeds"), [("W8A8 min-max", "0"), pytest.param("W4A8 adaround, bias", "01", marks=pytest.mark.slow)]
)
def test_the_command_measures(benchmark: ModuleType, tmp_path: Path, recipe: str, seeds: str) -> None:
    write_cifar(tmp_path, train=12, test=9)
    options = ["--data", str(tmp_path), "--tasks", "resnet20", "--seeds", *seeds, "--steps", "2", "--no-write"]
    rows = benchmark.main([*options, "--recipes", recipe])
    assert [row.runs for row in rows] == ["fake-quant", "integer"]
    for row in rows:
        shares = (row.accuracy, row.float_accuracy, row.agreement)
        assert all(len(share) == len(seeds) and all(0 <= v <= 100 for v in share) for share in shares)
        assert row.recipe.weight < 8 or all(sqnr > 10 for sqnr in row.sqnr)
    form, _, name = recipe.partition(" ")
    assert f"| {form} | {name}" in benchmark.markdown(rows, [0], 2)


def test_figures_of_logits(benchmark: ModuleType) -> None:
    wanted = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    got = wanted + np.array([[0.0, 0.0], [-1.0, 0.5], [0.0, 0.5]])
    found = benchmark.figures(wanted, got, np.array([1, 1, 1]))
    np.testing.assert_allclose(found, (200 / 3, 100.0, 200 / 3, 10 * np.log10(30 / 1.5)))


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
