"""Comparison layer by layer, and the report of it."""

import base64
import json
import re

import graphs
import jax
import numpy as np
import pytest

import jquant as jq
from jquant.analysis import Comparison, compare, write_report
from jquant.analysis.report import format_number

Net = tuple[jq.Plan, dict, dict, jax.Array]


@pytest.fixture(scope="module")
def net() -> Net:
    build = graphs.Builder(9)
    build.shapes["x"] = (3, 8, 8)
    x = build.add(jq.ops.Relu(), (build.batch_norm(build.conv("x", 6, 3)),), (6, 8, 8))
    x = build.add(jq.ops.Mean(axes=(2, 3)), (build.conv(x, 4, 3),), (4,))
    x = build.add(
        jq.ops.Linear(), (x,), (5,), weight=build.array("head.weight", 5, 4), bias=build.array("head.bias", 5)
    )
    graph = build.graph(x, size=8)
    config = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8())})
    plan, params = jq.prepare(graph, build.params, config, target=jq.targets.NASH_E)
    images = graphs.images(1, graph, batch=4)
    return plan, params, jq.calibrate(plan, params, [images]), images


@pytest.mark.parametrize("meaning", ["float", "qat", "integer"])
def test_equal_meanings_have_no_error(net: Net, meaning: str) -> None:
    found = compare(*net, meaning, meaning)
    assert [row.name for row in found.rows] == list(net[0].graph.values)
    for row in found.rows:
        assert row.cosine == pytest.approx(1, abs=1e-6)
        assert (row.max_error, row.mse, row.differing) == (0, 0, 0)
        assert row.max_lsb in (0, None)


@pytest.mark.parametrize(("a", "b"), [("float", "qat"), ("float", "integer"), ("qat", "integer")])
def test_rows_are_the_values_in_graph_order_with_true_numbers(net: Net, a: str, b: str) -> None:
    plan, params, qparams, x = net
    found = compare(*net, a, b)
    assert (found.a, found.b) == (a, b)
    assert [row.name for row in found.rows] == list(plan.graph.values)
    program = jq.lower(plan, params, qparams)

    def values(meaning: str) -> dict:
        if meaning == "integer":
            return {
                n: np.asarray(v, np.float64) * np.asarray(program.scales[n], np.float64)
                for n, v in jq.run_with_taps(program, x).items()
            }
        return jq.apply_with_taps(plan, params, qparams, x, mode="float" if meaning == "float" else "qat")[1]

    first, second = values(a), values(b)
    for row in found.rows:
        p, q = (np.asarray(v[row.name], np.float64) for v in (first, second))
        assert row.maximum == pytest.approx(p.max(), rel=1e-5, abs=1e-6)
        assert row.minimum == pytest.approx(p.min(), rel=1e-5, abs=1e-6)
        assert row.max_error == pytest.approx(np.abs(p - q).max(), rel=1e-3, abs=1e-5)
        assert row.cosine == pytest.approx((p * q).sum() / np.sqrt((p * p).sum() * (q * q).sum()), abs=1e-5)
        assert row.cosine > 0.99
        high_precision = plan.values[row.name].is_high_precision
        assert (row.max_lsb is None) == (row.saturated is None) == high_precision
        if not high_precision:
            assert row.max_lsb == pytest.approx(row.max_error / row.scale, rel=1e-5)
    lines = found.table().splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(plan.graph.values)


def test_saturation_is_seen(net: Net) -> None:
    plan, params, qparams, x = net
    rows = {row.name: row for row in compare(plan, params, qparams, 3 * x, "float", "qat").rows}
    share = np.mean(np.abs(3 * np.asarray(x)) > 127.5 * float(qparams["x"]))
    assert 0 < rows["x"].saturated == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(("a", "b"), [("flaot", "qat"), ("float", "flaot")])
def test_an_unknown_meaning_names_the_known_ones(net: Net, a: str, b: str) -> None:
    with pytest.raises(
        jq.JQuantError, match="unknown meaning 'flaot'; known: float, qat, integer; did you mean 'float'"
    ):
        compare(*net, a, b)


def test_uncalibrated_and_broken_inputs_are_refused(net: Net) -> None:
    plan, params, qparams, x = net
    with pytest.raises(jq.CalibrationError, match="no scale for 'x'"):
        compare(plan, params, {}, x, "float", "integer")
    with pytest.raises(jq.CalibrationError, match="no scale for 'x'"):
        compare(plan, params, {}, x, "float", "qat")
    with pytest.raises(jq.InputError, match="NaN or infinite"):
        compare(plan, params, qparams, x.at[0, 0, 0, 0].set(np.nan), "float", "qat")


def test_a_report_is_one_page_and_the_same_numbers_as_json(net: Net, tmp_path) -> None:
    found = {"float and <qat>": compare(*net, "float", "qat"), "qat and integer": compare(*net, "qat", "integer")}
    summary = [{"model": "net", "top-1": 0.75}, {"model": "other", "top-1": None}]
    report = write_report(tmp_path / "new" / "folder", "A & B", summary, found, notes=["note <1>"])
    assert (report.html.name, report.json.name) == ("report.html", "report.json")
    assert sorted(p.name for p in report.html.parent.iterdir()) == ["report.html", "report.json"]
    data = json.loads(report.json.read_text())
    assert data == {
        "title": "A & B",
        "notes": ["note <1>"],
        "summary": summary,
        "comparisons": {name: json.loads(json.dumps(c.to_dict())) for name, c in found.items()},
    }
    page = report.html.read_text()
    assert "A &amp; B" in page
    assert "note &lt;1&gt;" in page
    assert "float and &lt;qat&gt;" in page
    pictures = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert len(pictures) == 4
    assert all(base64.b64decode(p).startswith(b"\x89PNG\r\n") for p in pictures)
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)  # self-contained
    for comparison in found.values():
        for row in comparison.rows:
            assert row.name in page
            assert format_number(row.cosine) in page
    write_report(tmp_path / "new" / "folder", "again", summary, found)  # replaces
    assert json.loads(report.json.read_text())["title"] == "again"


def test_unsigned_formats_are_drawn(net: Net, tmp_path) -> None:
    """uint8 is for training only, and still has a range to draw."""
    build = graphs.Builder(1)
    build.shapes["x"] = (3, 8, 8)
    graph = build.graph(build.add(jq.ops.Relu(), (build.batch_norm("x"),), (3, 8, 8)), size=8)
    config = jq.QConfig({"*": jq.Policy(weight=jq.int8(), output=jq.uint8())})
    plan, params = jq.prepare(graph, build.params, config, target=jq.targets.NASH_P, high_precision_outputs=False)
    x = abs(graphs.images(0, graph))
    found = compare(plan, params, jq.calibrate(plan, params, [x]), x, "float", "qat")
    assert isinstance(found, Comparison)
    assert write_report(tmp_path, "unsigned", [], {"unsigned": found}).html.is_file()
