"""A section of `benchmarks/RESULTS.md` is written by its own command and leaves the others alone."""

from functools import partial
from pathlib import Path

import pytest
from support.commands import load_benchmark


def test_sections_are_replaced_one_by_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results = load_benchmark("results", monkeypatch)
    monkeypatch.setattr(results, "PATH", tmp_path / "RESULTS.md")
    results.write_section("a", "## A\n\n1.5")
    results.write_section("b", "## B\n\n2.5")
    results.write_section("a", "## A\n\n3.5")
    page = (tmp_path / "RESULTS.md").read_text()
    assert page.startswith("# What takes how long")
    assert "1.5" not in page
    assert page.index("3.5") < page.index("2.5")
    assert page.count("<!--") == 4


def test_a_step_is_measured_against_its_own_base(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load_benchmark("timing", monkeypatch)
    done: list[str] = []
    contenders = [
        bench.Contender("float", lambda: done.append("float"), "float"),
        bench.Contender("qat", lambda: done.append("qat"), "float", 1.1),
    ]
    times = bench.measure(contenders, 8)
    assert done[:4] == ["float", "float", "qat", "qat"]
    rounds = [tuple(done[i : i + 2]) for i in range(4, 20, 2)]
    assert set(rounds) == {("float", "qat"), ("qat", "float")}
    assert len(done) == 20
    assert {name: len(values) for name, values in times.items()} == {"float": 8, "qat": 8}
    assert bench.rows(contenders, {"float": [1.0, 2.0, 4.0], "qat": [2.0, 3.0, 10.0]}) == [
        ["qat", "float", "2.00", "1.75 to 2.25", "1.10"]
    ]


def test_integers_are_run_beside_float_and_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, bench = (load_benchmark(name, monkeypatch) for name in ("results", "run_integers"))
    monkeypatch.setattr(results, "PATH", tmp_path / "RESULTS.md")
    small = bench.Workload("small", partial(bench.CifarResNet, 8), (2, 3, 32, 32), {bench.TORCH: 0.5})
    monkeypatch.setattr(bench, "WORKLOADS", (small,))
    bench.main(["--rounds", "1"])
    page = (tmp_path / "RESULTS.md").read_text()
    for name in (bench.OWN, bench.TORCH, bench.ORT, bench.EXACT, bench.FBGEMM):
        assert f"| small | {name} |" in page
    assert page.count("met (0.50)") == 1
    with pytest.raises(SystemExit):
        bench.main(["--rounds", "0"])
    assert "at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_a_net_is_compared_in_accuracy_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load_benchmark("peers_in_jax", monkeypatch)
    monkeypatch.delitem(bench.LIBRARIES, "qwix, products alone")  # it warns, which is an error here
    found = {row[1]: row for row in bench.compare("mixer", 1)}
    assert {"jquant, all values", "jquant, products alone"} <= set(found)
    for row in found.values():
        assert float(row[2]) > 20
        assert row[4] == "6 of 6"
    assert found["jquant, all values"][3] == "6 of 6"
    floats = bench.in_float(bench.SUBJECTS["mixer"]())
    assert bench.quantized_kernels(floats) == "0 of 6"
    monkeypatch.setitem(bench.LIBRARIES, "broken", ("jquant", lambda subject: 1 / 0))
    assert [row[2] for row in bench.compare("mixer", 1) if row[1] == "broken"] == [
        "ZeroDivisionError: division by zero"
    ]
