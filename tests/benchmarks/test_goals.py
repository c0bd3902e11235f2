"""Goals are read from the tables of a page as they stand there; the picture shows all of them."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from support.commands import load_benchmark

PAGE = """# Page

## Running

| net | our integers over | ratio | quarter to three quarters | goal |
|---|---|---:|---:|---:|
| small | torch float | 0.61 | 0.50 to 0.70 | not met (0.60) |
| small | own float | 0.70 | 0.60 to 0.75 | met (0.80) |
| small | other | 2.00 | 1.90 to 2.10 | - |

## A step

| step | against | ratio | quarter to three quarters | goal, at most |
|---|---|---:|---:|---:|
| ours | theirs | 1.99 | 1.89 to 2.06 | 1.20 |

## First

| net | verb | cold, s | warm over cold | goal, at most |
|---|---|---:|---:|---:|
| small | run | 2.50 |  |  |
| small | all | 3.50 | 0.25 | 0.30 |

Words.
"""


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_benchmark("goals", monkeypatch)


def test_every_row_with_a_ratio_and_a_goal_is_read(benchmark: ModuleType) -> None:
    found = [(goal.section, goal.name, goal.ratio, goal.high, goal.wanted) for goal in benchmark.goals_of(PAGE)]
    assert found == [
        ("Running", "small over torch float", 0.61, 0.70, 0.60),
        ("Running", "small over own float", 0.70, 0.75, 0.80),
        ("A step", "ours over theirs", 1.99, 2.06, 1.20),
        ("First", "small: a warm process over a cold one", 0.25, 0.25, 0.30),
    ]
    assert [goal.is_met for goal in benchmark.goals_of(PAGE)] == [False, True, False, True]


def test_the_picture_has_a_row_for_each(benchmark: ModuleType, tmp_path: Path) -> None:
    goals = benchmark.goals_of(PAGE)
    heights = []
    for count in (1, 4):
        benchmark.draw(goals[:count], tmp_path / "goals.png")
        with Image.open(tmp_path / "goals.png") as picture:
            heights.append(picture.height)
            colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert heights[1] > heights[0] + 60
    for colour in ((42, 127, 79), (181, 72, 42)):  # met, not met
        assert (np.abs(colours.astype(int) - colour).sum(1) < 12).any()


def test_ratios_of_our_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_benchmark("run_integers", monkeypatch)
    make = module.Contender
    contenders = [
        make("jquant integers, net, batch 1", None, "jquant integers, net, batch 1"),
        make("torch float, net, batch 1", None, "jquant integers, net, batch 1", 0.6),
        make("onnxruntime int8 (exact), net, batch 1", None, "jquant integers, net, batch 1"),
    ]
    times = dict(zip((c.name for c in contenders), ([2.0, 2.0, 2.0], [4.0, 5.0, 8.0], [2.0, 1.0, 4.0]), strict=True))
    assert module.integers_over(contenders, times) == [
        ["net, batch 1", "torch float", "0.40", "0.33 to 0.45", "met (0.60)", "2000.0"],
        ["net, batch 1", "onnxruntime int8 (exact)", "1.00", "0.75 to 1.50", "-", "2000.0"],
    ]


def test_the_first_integer_in_fresh_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Few programs are compiled, and a warm process compiles none of them again."""
    module = load_benchmark("first_integer", monkeypatch)
    cold, warm = (module.measured("ResNet-20", str(tmp_path)) for _ in range(2))
    for verb, limit in module.LIMITS.items():
        assert cold[verb][1] <= limit
        assert cold[verb][0] > 0
    assert cold["run"][1] == 1
    assert sum(seconds for seconds, _ in warm.values()) > 0
