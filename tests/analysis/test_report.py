"""Comparison layer by layer, and the report of it."""

import html
import json
import re
import shutil
import subprocess
import tomllib
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from support import graphs
from support.small_nets import QCONFIG, Net, small_graph, small_net

import jquant as jq
from jquant.analysis import Comparison, Report, check_plan, compare, layer_advice, next_steps, sensitivity, write_report


@pytest.fixture(scope="module")
def net() -> Net:
    return small_net()


@pytest.mark.parametrize("meaning", ["float", "fake_quant", "bit_true"])
def test_equal_meanings_have_no_error(net: Net, meaning: str) -> None:
    found = compare(*net, meaning, meaning)
    assert [row.name for row in found.rows] == list(net[0].plan.graph.values)
    for row in found.rows:
        assert row.cosine == pytest.approx(1, abs=1e-6)
        assert (row.max_error, row.mse, row.differing) == (0, 0, 0)
        assert row.max_lsb in (0, None)


@pytest.mark.parametrize(("a", "b"), [("float", "fake_quant"), ("float", "bit_true"), ("fake_quant", "bit_true")])
def test_rows_are_the_values_in_graph_order_with_true_numbers(net: Net, a: str, b: str) -> None:
    model, x = net
    found = compare(*net, a, b)
    assert (found.a, found.b) == (a, b)
    assert [row.name for row in found.rows] == list(model.plan.graph.values)
    program = jq.lower(model)

    def values(meaning: str) -> dict:
        if meaning == "bit_true":
            return {
                n: np.asarray(v, np.float64) * np.asarray(program.scales[n], np.float64)
                for n, v in jq.run_with_taps(program, x).items()
            }
        return jq.apply_with_taps(model, x, mode=meaning)[1]

    first, second = values(a), values(b)
    for row in found.rows:
        p, q = (np.asarray(v[row.name], np.float64) for v in (first, second))
        assert row.maximum == pytest.approx(p.max(), rel=1e-5, abs=1e-6)
        assert row.minimum == pytest.approx(p.min(), rel=1e-5, abs=1e-6)
        assert row.max_error == pytest.approx(np.abs(p - q).max(), rel=1e-3, abs=1e-5)
        assert row.cosine == pytest.approx((p * q).sum() / np.sqrt((p * p).sum() * (q * q).sum()), abs=1e-5)
        assert row.cosine > 0.99
        high_precision = model.plan.values[row.name].is_high_precision
        assert (row.max_lsb is None) == (row.saturated is None) == high_precision
        if not high_precision:
            assert row.max_lsb == pytest.approx(row.max_error / row.scale, rel=1e-5)
    lines = found.table().splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(model.plan.graph.values)


def test_saturation_is_seen(net: Net) -> None:
    model, x = net
    rows = {row.name: row for row in compare(model, 3 * x, "float", "fake_quant").rows}
    share = np.mean(np.abs(3 * np.asarray(x)) > 127.5 * float(model.qparams["x"]))
    assert 0 < rows["x"].saturated == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(("a", "b"), [("flaot", "fake_quant"), ("float", "flaot")])
def test_an_unknown_mode_names_the_known_ones(net: Net, a: str, b: str) -> None:
    known = "float, fake_quant, tables, bit_true"
    with pytest.raises(jq.JQuantError, match=f"unknown mode 'flaot'; known: {known}; did you mean 'float'"):
        compare(*net, a, b)


def test_uncalibrated_and_broken_inputs_are_refused(net: Net) -> None:
    model, x = net
    with pytest.raises(jq.CalibrationError, match=r"no scale for 'x'"):
        compare(model.replace(qparams={}), x, "float", "bit_true")
    with pytest.raises(jq.CalibrationError, match=r"no scale for 'x'"):
        compare(model.replace(qparams={}), x, "float", "fake_quant")
    with pytest.raises(jq.InputError, match=r"NaN or infinite"):
        compare(model, x.at[0, 0, 0, 0].set(np.nan), "float", "fake_quant")


def conforms(value: object, schema: dict, whole: dict, where: str = "report") -> None:
    """The part of JSON Schema that the schema uses."""
    if "$ref" in schema:
        return conforms(value, whole["$defs"][schema["$ref"].rsplit("/", 1)[1]], whole, where)
    if "const" in schema:
        assert value == schema["const"], where
    if "enum" in schema:
        assert value in schema["enum"], where
    kinds = {"object": dict, "array": list, "string": str, "number": (int, float), "integer": int, "null": type(None)}
    if "type" in schema:
        names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        assert any(isinstance(value, kinds[name]) for name in names), f"{where}: {value!r} is no {names}"
    if isinstance(value, list):
        for i, item in enumerate(value):
            conforms(item, schema.get("items", {}), whole, f"{where}[{i}]")
    if isinstance(value, dict):
        assert set(schema.get("required", ())) <= value.keys(), where
        for key, item in value.items():
            rest = schema.get("additionalProperties", {})
            known = schema.get("properties", {}).get(key, rest)
            assert known is not False, f"{where}.{key} is not in the schema"
            conforms(item, known, whole, f"{where}.{key}")
    return None


def full_report(net: Net, folder: Path) -> Report:
    model, x = net
    found = {
        "float and <qat>": compare(*net, "float", "fake_quant"),
        "qat & integer": compare(*net, "fake_quant", "bit_true"),
    }
    broken = compare(
        model.replace(qparams=dict(model.qparams) | {"n3.conv": model.qparams["n3.conv"] / 8}), x, "float", "fake_quant"
    )
    return write_report(
        folder,
        "A & B",
        [{"model": "net </script>", "top-1": 0.75}, {"model": "other", "top-1": None}],
        found,
        notes=["note <1>"],
        plan=model.plan,
        ranking=sensitivity(model, [x]),
        findings=[*layer_advice(broken), *check_plan(model)],
        about={"model": "<net>"},
        steps=next_steps(broken, model.plan),
    )


@pytest.fixture(scope="module")
def written(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Report:
    return full_report(net, tmp_path_factory.mktemp("report") / "new" / "folder")


def test_a_report_is_one_page_the_same_numbers_as_json_and_pictures(net: Net, written: Report) -> None:
    names = ["1-errors.png", "1-ranges.png", "2-errors.png", "2-ranges.png", "report.html", "report.json"]
    assert sorted(p.name for p in written.html.parent.iterdir()) == names
    assert all(p.read_bytes().startswith(b"\x89PNG\r\n") for p in written.pictures)
    data = json.loads(written.json.read_text())
    schema = json.loads(files("jquant.analysis").joinpath("report.schema.json").read_text())
    conforms(data, schema, schema)
    assert data["summary"][0]["model"] == "net </script>"
    assert [row["name"] for row in data["comparisons"]["qat & integer"]["rows"]] == list(net[0].plan.graph.values)
    assert data["findings"][0]["check"] == "clamp error"
    assert {node["name"] for node in data["graph"]} == set(net[0].plan.graph.values)
    places = [(node["depth"], node["column"]) for node in data["graph"]]
    assert len(set(places)) == len(places)
    assert data["about"]["model"] == "<net>"
    assert data["about"]["march"] == net[0].plan.target.name
    assert set(data["about"]) >= {"date", "jquant", "jax", "python"}
    page = written.html.read_text()
    assert "A &amp; B" in page
    assert "<dd>&lt;net&gt;</dd>" in page
    assert "note &lt;1&gt;" in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)  # self-contained
    inside = re.search(r'id="data">(.*?)</script>', page, re.S)
    assert inside is not None
    assert json.loads(inside.group(1)) == data


def test_the_first_step_is_a_rule_that_helps(net: Net) -> None:
    """The rule of the worst value, put at the end of the settings, applies and mends that value."""
    model, x = net
    scales = dict(model.qparams) | {"n3.conv": model.qparams["n3.conv"] / 8}
    broken = compare(model.replace(qparams=scales), x, "float", "fake_quant")
    first = next_steps(broken, model.plan, limit=1)[0]
    assert first.where == "n3.conv"
    assert "beyond what the scale covers" in first.why
    settings = jq.config.qconfig_to_toml(QCONFIG) + "\n" + first.rule + "\n"
    again = jq.prepare(*small_graph(), jq.config.qconfig_from_toml(settings), target=model.plan.target)
    rows = {row.name: row for row in compare(jq.calibrate(again, [x]), x, "float", "fake_quant").rows}
    assert again.plan.spec("n3.conv").fixed_scale == pytest.approx(np.abs(rows["n3.conv"].maximum) / 128, rel=0.5)
    assert rows["n3.conv"].own_sqnr > first.level + 10


def test_the_step_of_a_coarse_value_is_a_wider_format(net: Net) -> None:
    model, x = net
    scales = dict(model.qparams) | {"n3.conv": model.qparams["n3.conv"] * 40}
    first = next_steps(compare(model.replace(qparams=scales), x, "float", "fake_quant"), model.plan, limit=1)[0]
    assert first.where == "n3.conv"
    rules = tomllib.loads(first.rule)["rules"]
    assert list(rules.values()) == [{"output": {"dtype": "int16"}}]
    again = jq.prepare(
        *small_graph(),
        jq.QConfig({**QCONFIG.rules, next(iter(rules)): jq.Policy(output=jq.int16())}),
        target=model.plan.target,
    )
    assert again.plan.spec("n3.conv").dtype == "int16"


def test_a_report_replaces_the_one_before_and_has_no_infinite_numbers(net: Net, tmp_path: Path) -> None:
    row = compare(*net, "float", "fake_quant").rows[0]
    worst = replace(row, sqnr=float("nan"), max_error=float("inf"))
    for title in ("first", "again"):
        written = write_report(tmp_path, title, [], {"x": Comparison("a", "b", (worst,))}, pictures=False)
    data = json.loads(written.json.read_text())
    assert data["title"] == "again"
    assert data["comparisons"]["x"]["rows"][0]["sqnr"] is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]


# ---------------------------------------------------------------------------------------------------------------------
# In a browser, where there is one

BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)

WATCH = """<script>window.problems = []; addEventListener("error", e => problems.push(e.message));
console.error = console.warn = (...words) => problems.push(words.join(" "));</script>"""

ACT = """<script>
const has = (table, name) => [...table.querySelectorAll("th")].some(h => h.textContent === name);
const table = [...document.querySelectorAll("table")].find(t => has(t, "own sqnr"));
const head = [...table.querySelectorAll("th")], place = head.findIndex(h => h.textContent === "max error");
const column = i => [...table.querySelectorAll("tbody tr")].map(r => r.children[i].textContent);
const found = {sections: [...document.querySelectorAll("h2")].map(h => h.textContent), before: column(0)};
head[place].click(); found.down = column(place);
head[place].click(); found.up = column(place);
const own = head.findIndex(h => h.textContent === "own sqnr");
head[own].click(); found.own = column(own);
head[0].click(); found.names = column(0);
table.querySelector("tbody tr").click();
found.picture = document.querySelector(".place svg").getAttribute("aria-label");
const search = document.getElementById("search");
search.value = "N3.CONV"; search.dispatchEvent(new Event("input"));
const lines = [...document.querySelectorAll("tbody tr")];
found.shown = lines.filter(r => !r.hidden).length;
found.matching = lines.filter(r => r.textContent.toLowerCase().includes("n3.conv")).length;
search.value = ""; search.dispatchEvent(new Event("input"));
found.all = [...document.querySelectorAll("tbody tr")].filter(r => r.hidden).length;
const graph = document.querySelector(".graph svg"), view = graph.getAttribute("viewBox");
graph.dispatchEvent(new WheelEvent("wheel", {deltaY: -100, clientX: 300, clientY: 300, cancelable: true}));
found.zoomed = view !== graph.getAttribute("viewBox");
found.boxes = graph.querySelectorAll("rect").length;
found.milliseconds = performance.now();
found.problems = problems;
document.body.textContent = "RESULT" + JSON.stringify(found) + "END";
</script>"""


def in_browser(page: str, folder: Path) -> dict:
    """What the page says of itself once a script has used it; errors of its own scripts included."""
    path = folder / "watched.html"
    path.write_text(page.replace("<head>", "<head>" + WATCH, 1).replace("</body>", ACT + "</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    done = subprocess.run([BROWSER, *options, path.as_uri()], capture_output=True, text=True, timeout=120, check=False)
    inside = re.search(r"RESULT(.*)END", done.stdout, re.S)
    assert inside is not None, done.stderr[-2000:]
    return json.loads(html.unescape(inside.group(1)))


@pytest.mark.skipif(
    BROWSER is None, reason="no headless Chromium on this machine: apt-get install chromium-headless-shell"
)
def test_the_page_sorts_searches_and_zooms_in_a_browser(net: Net, written: Report, tmp_path: Path) -> None:
    found = in_browser(written.html.read_text(), tmp_path)
    assert found["problems"] == []
    values = list(net[0].plan.graph.values)
    assert found["before"] == values
    numbers = [float(cell) for cell in found["down"]]
    assert numbers == sorted(numbers, reverse=True)
    assert [float(cell) for cell in found["up"]] == sorted(numbers)
    known = [float(cell) for cell in found["own"] if cell != "–"]
    assert known == sorted(known, reverse=True)
    assert found["own"][-1] == "–"  # what has no number comes last
    assert found["names"] == sorted(values)
    assert found["picture"] == f"histogram of {sorted(values)[0]}"
    assert 0 < found["shown"] <= found["matching"]
    assert found["all"] == 0
    assert found["zoomed"]
    assert found["boxes"] == len(values)
    assert {"Summary", "What to do next", "Findings", "Sensitivity", "Graph"} < set(found["sections"])


def test_unsigned_formats_are_drawn(net: Net, tmp_path) -> None:
    """uint8 is for training only, and still has a range to draw."""
    build = graphs.Builder(1)
    build.shapes["x"] = (3, 8, 8)
    graph = build.graph(build.add(jq.ops.Relu(), (build.batch_norm("x"),), (3, 8, 8)), size=8)
    config = jq.QConfig({"*": jq.Policy(weight=jq.int8(), output=jq.config.uint8())})
    model = jq.prepare(graph, build.params, config, target=jq.targets.NASH_P, high_precision_outputs=False)
    x = abs(graphs.images(0, graph))
    found = compare(jq.calibrate(model, [x]), x, "float", "fake_quant")
    assert isinstance(found, Comparison)
    assert write_report(tmp_path, "unsigned", [], {"unsigned": found}).html.is_file()
