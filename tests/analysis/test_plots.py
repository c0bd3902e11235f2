"""Pictures of one thing: their figures are right by hand, and the files are pictures."""

import math

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

import jquant as jq


def network(x, rules, *, target="nash-e"):
    params = {"w": jnp.eye(3)}
    graph, params = jq.trace(lambda p, x: jax.nn.gelu(x @ p["w"], approximate=False), params, x)
    return jq.prepare(graph, params, jq.QConfig(rules), target=target, high_precision_outputs=False)


X = jnp.asarray([[-4.0, 0.5, 1.0], [2.0, 0.25, -0.5]])


def shown(path) -> tuple[int, int]:
    with Image.open(path) as picture:
        picture.load()
        assert np.asarray(picture.convert("L")).std() > 3  # not blank
        return picture.size


def test_a_graph_before_and_after_calibration_and_as_a_program(tmp_path):
    model = network(X, jq.templates.int8_default())
    jq.analysis.plot_graph(tmp_path / "a.png", model)
    calibrated = jq.calibrate(model, [X])
    jq.analysis.plot_graph(tmp_path / "b.png", calibrated)
    with mpl.rc_context({"svg.fonttype": "none"}):  # words as words
        jq.analysis.plot_graph(tmp_path / "deep" / "c.svg", jq.lower(calibrated))
    assert shown(tmp_path / "a.png") == shown(tmp_path / "b.png")
    words = (tmp_path / "deep" / "c.svg").read_text()
    for name, scale in jq.lower(calibrated).scales.items():
        assert f">{name}<" in words
        assert f"int8 · {float(scale):.3g}" in words


def test_a_wide_graph_keeps_its_boxes_apart():
    from jquant.analysis.plots import _places

    entry, nodes = jq.Input("x", (None, 4)), []
    for i in range(5):
        nodes.append(jq.Node(f"relu_{i}", jq.ops.Relu(), ("x",)))
    nodes.append(jq.Node("all", jq.ops.Cat(axis=1), tuple(node.name for node in nodes)))
    places = _places(jq.Graph((entry,), tuple(nodes), ("all",)))
    columns = sorted(column for column, row in places.values() if row == 1)
    assert np.diff(columns).min() >= 1
    assert places["x"] == (0.0, 0)
    assert places["all"] == (pytest.approx(0.0), 2)


def test_a_graph_that_no_page_holds_is_refused(tmp_path):
    nodes = [jq.Node("n0", jq.ops.Relu(), ("x",))]
    nodes += [jq.Node(f"n{i}", jq.ops.Relu(), (f"n{i - 1}",)) for i in range(1, 151)]
    graph = jq.Graph((jq.Input("x", (None, 4)),), tuple(nodes), ("n150",))
    model = jq.prepare(graph, {}, jq.QConfig(jq.templates.int8_default()), target="nash-e")
    with pytest.raises(jq.InputError, match="has 151 nodes, and a picture holds 150; `jquant report`"):
        jq.analysis.plot_graph(tmp_path / "a.png", model)


def test_observers_have_the_scales_that_calibration_gives(tmp_path):
    model = network(X, jq.templates.int8_default())
    chosen = {"all": jq.observers.min_max(), "middle": jq.observers.percentile(50.0)}
    scales = jq.analysis.plot_observers(tmp_path / "a.png", model, "x", [X[:1], X[1:]], chosen)
    assert scales["all"] == np.float32(4.0 / 127.5)  # half of 255 steps
    assert scales["middle"] < scales["all"]
    assert shown(tmp_path / "a.png")[0] > 500
    every = jq.analysis.plot_observers(tmp_path / "b.png", model, "x", [X])
    calibrated = jq.calibrate(model, [X])
    assert every["nmse"] == float(calibrated.qparams["x"])  # the default of values
    assert every["min_max"] == scales["all"]


def test_what_cannot_be_drawn_of_a_value(tmp_path):
    model = network(X, jq.templates.int8_default())
    with pytest.raises(jq.InputError, match="no value 'y' has a scale of its own; there are 'x'"):
        jq.analysis.plot_observers(tmp_path / "a.png", model, "y", [X])
    with pytest.raises((jq.InputError, jq.CalibrationError), match="no calibration batches"):
        jq.analysis.plot_observers(tmp_path / "a.png", model, "x", [])


@pytest.mark.parametrize("wide", [False, True])
def test_the_error_of_a_table_by_hand(tmp_path, wide):
    """The integers of `run` at every operand against erf of Python, in LSB."""
    form = jq.int16(scale=2**-12) if wide else jq.int8(scale=2**-4)
    rules = {
        "*": jq.Policy(output=form, weight=jq.int8(axis="out")),
        "type:Gelu": jq.Policy(output=jq.int8(scale=2**-4)),
    }
    model = jq.calibrate(network(X, rules), [X])
    (gelu,) = [node.name for node in model.plan.graph.nodes if isinstance(node.op, jq.ops.Gelu)]
    worst = jq.analysis.plot_table(tmp_path / "a.png", model, gelu)
    low, high, step = (-32768, 32767, 2**-12) if wide else (-128, 127, 2**-4)
    reals = np.arange(low, high + 1) * step
    wanted = np.clip([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in reals], -8.0, 127 / 16)
    graph = jq.Graph(
        (jq.Input("x", (None, 1)),), (jq.Node("gelu", model.plan.graph.by_name[gelu].op, ("x",)),), ("gelu",)
    )
    alone = {"x": jq.Policy(output=form), "gelu": rules["type:Gelu"]}
    one = jq.prepare(graph, {}, jq.QConfig(alone), target="nash-e", high_precision_outputs=False)
    program = jq.lower(jq.calibrate(one, [jnp.ones((1, 1))]))
    found = np.asarray(jq.run(program, jnp.asarray(reals, jnp.float32)[:, None]))[:, 0]
    assert worst == pytest.approx(np.abs(found - wanted).max() * 16, abs=1e-4)
    assert shown(tmp_path / "a.png")[0] > 500
    with pytest.raises(jq.InputError, match=f"no node 'x' is a table; there are '{gelu}'"):
        jq.analysis.plot_table(tmp_path / "a.png", model, "x")
