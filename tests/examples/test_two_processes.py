"""The example of docs/scaling.md: two processes calibrate, train and evaluate one model."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_two_processes_train_and_count_all_of_the_data() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "examples.two_processes"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "256 samples on 4 devices of 2 processes" in done.stdout
    figures = dict(re.findall(r"(float|integers): top-1 ([\d.]+) %", done.stdout))
    assert set(figures) == {"float", "integers"}
    assert min(map(float, figures.values())) > 85  # of three classes
