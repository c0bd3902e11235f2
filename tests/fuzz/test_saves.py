"""A few kills and full disks; `python tests/fuzz/saves.py` takes 200 kills of every kind."""

import subprocess
import sys
from pathlib import Path

import pytest

SAVES = Path(__file__).parent / "saves.py"

IN_PLACE = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import saves

def build():
    def save(folder, which):
        with (folder / "half").open("wb") as file:
            for _ in range(3 + 3 * which):
                file.write(bytes([which]) * 4000)
                file.flush()
                time.sleep(0.01)
    return save

found = saves.check_kills(saves.Kind(build), 5, 1)
assert found["lost"] > 0, found
try:
    assert saves.check_full_disk(saves.Kind(build))["lost"] > 0
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="fork and tmpfs")
@pytest.mark.parametrize(
    ("kinds", "count"), [("program,march,report", 5), pytest.param("", 200, marks=pytest.mark.slow)]
)
def test_nothing_is_lost_by_a_kill_or_a_full_disk(kinds: str, count: int) -> None:
    command = [sys.executable, "-W", "ignore", str(SAVES), "--count", str(count), "--kinds", kinds]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) >= (3 if kinds else 11)


@pytest.mark.skipif(sys.platform != "linux", reason="fork and tmpfs")
def test_a_save_in_place_is_found() -> None:
    command = [sys.executable, "-W", "ignore", "-c", IN_PLACE, str(SAVES.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
