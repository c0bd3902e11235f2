"""A plugin of pytest: which tests reach which lines of the integer code, and how long each test takes.

REACHED=FOLDER pytest -p mutants.reached ...

Every process writes `FOLDER/WORKER.json`: {"tests": {id: seconds}, "lines": {file: {line: [id, ...]}}}. A line that
runs when its module is imported, or inside a program that an earlier test compiled, has no test here.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import coverage
import pytest

_SEEN = coverage.Coverage(
    data_file=None,
    include=["*/jquant/numerics/*", "*/jquant/ops/*", "*/jquant/program/*"],
    config_file=False,
    messages=False,
)
_SECONDS: Counter[str] = Counter()


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("numprocesses", None):  # the process that hands out the tests runs none
        _SEEN.start()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _SEEN.switch_context(item.nodeid)
    try:
        return (yield)
    finally:
        _SEEN.switch_context("")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.passed:
        _SECONDS[report.nodeid] += report.duration


def pytest_unconfigure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):
        return
    _SEEN.stop()
    data, root = _SEEN.get_data(), Path(str(config.rootpath))
    lines = {
        str(Path(name).relative_to(root)): {
            line: [test for test in tests if test] for line, tests in data.contexts_by_lineno(name).items()
        }
        for name in data.measured_files()
    }
    path = Path(os.environ["REACHED"]) / f"{os.environ.get('PYTEST_XDIST_WORKER', 'main')}.json"
    path.write_text(json.dumps({"tests": _SECONDS, "lines": lines}))
