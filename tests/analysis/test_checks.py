"""Each check finds the fault that was put in, with its numbers, and says nothing where there is none."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from support import graphs
from support.small_nets import QCONFIG, Net, small_graph, small_net

import jquant as jq
from jquant import analysis, ops


@pytest.fixture(scope="module")
def net() -> Net:
    return small_net()


def named(findings: list, check: str) -> list:
    return [f for f in findings if f.check == check]


def test_a_sound_model_has_no_errors_or_warnings(net: Net) -> None:
    found = analysis.check_model(*small_graph(), QCONFIG, qparams=net[0].qparams)
    assert {f.level for f in found} <= {"note"}
    assert analysis.check_model(*small_graph(), None) == []


def test_shared_parameters() -> None:
    build = graphs.Builder(1)
    build.shapes["x"] = (4, 6, 6)
    first = build.conv("x", 4, 3)
    second = build.conv(first, 4, 3)
    nodes = (build.nodes[0], replace(build.nodes[1], params=build.nodes[0].params))
    graph = replace(build.graph(second, size=6), nodes=nodes)
    (finding,) = named(analysis.check_model(graph, build.params, None), "shared operator")[:1]
    assert finding.numbers == {"calls": 2}
    assert first in finding.message
    assert second in finding.message


def two_heads() -> tuple[jq.Graph, dict]:
    build = graphs.Builder(2)
    build.shapes["x"] = (3, 6, 6)
    body = build.conv("x", 4, 3)
    head, aux = build.conv(body, 2, 1), build.conv(build.conv(body, 4, 3), 3, 1)
    return build.graph(head, aux, size=6), build.params


def test_auxiliary_branches() -> None:
    graph, params = two_heads()
    head, aux = graph.outputs
    (finding,) = named(analysis.check_model(graph, params, QCONFIG, outputs=[head]), "auxiliary branch")
    assert finding.numbers == {"nodes": 2}
    assert aux in finding.message
    assert analysis.auxiliary_branches(graph) == []
    with pytest.raises(jq.JQuantError, match=r"'hed' is no output of the graph"):
        analysis.auxiliary_branches(graph, ["hed"])


def test_unquantized_values_are_errors_only_on_the_way_to_a_deployed_output() -> None:
    graph, params = two_heads()
    head, aux = graph.outputs
    config = jq.QConfig({**QCONFIG.rules, aux: None})
    (finding, *_) = named(analysis.check_model(graph, params, config), "unquantized")
    assert finding.level == "error"
    assert aux in finding.where
    assert named(analysis.check_model(graph, params, config, outputs=[head]), "unquantized") == []


def test_an_activation_that_cannot_be_fused() -> None:
    build = graphs.Builder(3)
    build.shapes["x"] = (3, 6, 6)
    conv = build.conv("x", 4, 3)
    relu = build.add(ops.Relu(), (conv,), (4, 6, 6))
    graph = build.graph(build.add(ops.Add(), (conv, relu), (4, 6, 6)), size=6)
    found = named(analysis.check_model(graph, build.params, QCONFIG), "unfused")
    assert relu in [f.where for f in found]
    assert "also read by" in found[0].message


def test_surprising_dtypes_and_fixed_scales() -> None:
    rules = {**QCONFIG.rules, "x": jq.Policy(output=jq.int8(scale=1 / 128))}
    rules["n3.conv"] = jq.Policy(weight=jq.int4(axis="out"))
    found = analysis.check_model(*small_graph(), jq.QConfig(rules))
    assert next(f.where for f in named(found, "fixed scale")) == "x"
    assert any(f.where == "n3.conv.weight" and "int4" in f.message for f in named(found, "dtype"))


def test_weights_of_unlike_range_under_one_scale() -> None:
    graph, params = small_graph()
    params = params | {"n3.conv.weight": params["n3.conv.weight"].at[0].multiply(1000)}
    one = jq.QConfig({"*": jq.Policy(weight=jq.int8(), output=jq.int8())})
    (finding,) = named(analysis.check_model(graph, params, one), "weight range")
    assert finding.where == "n3.conv.weight"
    assert finding.numbers["largest"] > 64 * finding.numbers["median"]
    assert named(analysis.check_model(graph, params, QCONFIG), "weight range") == []


def test_operands_of_unlike_range() -> None:
    build = graphs.Builder(4)
    build.shapes["x"] = (4, 6, 6)
    sigmoid = build.add(ops.Sigmoid(), ("x",), (4, 6, 6))
    large = build.add(ops.Scale(factor=50.0), ("x",), (4, 6, 6))
    cat = build.add(ops.Cat(axis=1), (sigmoid, large), (8, 6, 6))
    graph = build.graph(cat, size=6)
    model = jq.prepare(graph, build.params, QCONFIG, target=jq.targets.NASH_E)
    model = jq.calibrate(model, [graphs.images(0, graph)])
    (finding,) = named(analysis.check_plan(model), "operand ranges")
    assert finding.where == cat
    assert finding.numbers[large] > 16 * finding.numbers[sigmoid]


def test_what_prepare_refuses_is_an_error() -> None:
    (finding,) = analysis.check_model(*small_graph(), jq.QConfig({"n3.cnv": None}))
    assert (finding.level, finding.check) == ("error", "prepare")
    assert "did you mean" in finding.message
    assert "error" in analysis.findings_table([finding])


def test_the_first_node_that_differs() -> None:
    graph, _ = small_graph()
    assert analysis.graph_difference(graph, graph) == []
    renamed = replace(
        graph,
        nodes=tuple(
            replace(n, name=f"v2.{n.name}", inputs=tuple(v if v == "x" else f"v2.{v}" for v in n.inputs))
            for n in graph.nodes
        ),
        outputs=tuple(f"v2.{o}" for o in graph.outputs),
    )
    assert analysis.graph_difference(graph, renamed) == []  # names do not matter
    changed = replace(graph, nodes=(*graph.nodes[:2], replace(graph.nodes[2], op=ops.Relu6()), *graph.nodes[3:]))
    first = analysis.graph_difference(graph, changed)[0]
    assert (first.level, first.where) == ("error", graph.nodes[2].name)
    assert "Relu6" in first.message
    shorter = replace(graph, nodes=graph.nodes[:-1], outputs=(graph.nodes[-2].name,))
    assert analysis.graph_difference(graph, shorter)[0].where == graph.nodes[-1].name
    other_input = replace(graph, inputs=(replace(graph.inputs[0], shape=(None, 1, 8, 8)),))
    assert analysis.graph_difference(graph, other_input)[0].where == "inputs"


# ---------------------------------------------------------------------------------------------------------------------
# Advice


@pytest.mark.parametrize(
    ("calibrated", "qat", "target", "level", "words"),
    [
        (71.9, None, 71.5, "note", "at the target"),
        (71.4, None, 71.9, "note", "almost at the target"),
        (69.0, None, None, "note", "good"),
        (66.0, None, None, "note", "fair"),
        (60.0, None, None, "warning", "too little to train from"),
        (60.0, None, 80.0, "error", "above the float accuracy"),
        (70.0, 71.9, None, "note", "reaches the target"),
        (70.0, 65.0, None, "error", "worse than calibration"),
        (60.0, 71.0, 71.5, "note", "close to the target"),
        (60.0, 66.0, None, "warning", "far from the target"),
    ],
)
def test_the_next_step(calibrated: float, qat: float | None, target: float | None, level: str, words: str) -> None:
    (finding,) = analysis.advise(72.0, calibrated, qat, target=target)
    assert finding.level == level
    assert words in finding.message
    assert finding.numbers["calibrated"] == calibrated
    assert finding.fix in str(finding)


def test_advice_needs_a_float_accuracy() -> None:
    with pytest.raises(jq.JQuantError, match=r"float accuracy must be positive"):
        analysis.advise(0.0, 0.0)


def test_clamping_and_rounding_are_told_apart(net: Net) -> None:
    model, x = net
    clamped = dict(model.qparams) | {"n3.conv": model.qparams["n3.conv"] / 8}
    first = analysis.layer_advice(analysis.compare(model.replace(qparams=clamped), x, "float", "fake_quant"))[0]
    assert (first.check, first.where) == ("clamp error", "n3.conv")
    assert first.numbers["seen"] > first.numbers["covered"]
    fixed = float(first.fix.split("scale=")[1].rstrip(")"))
    assert fixed == pytest.approx(float(model.qparams["n3.conv"]), rel=0.02)
    coarse = dict(model.qparams) | {"n3.conv": model.qparams["n3.conv"] * 30}
    first = analysis.layer_advice(analysis.compare(model.replace(qparams=coarse), x, "float", "fake_quant"))[0]
    assert (first.check, first.where) == ("rounding error", "n3.conv")
    assert "int16" in first.fix
    assert analysis.layer_advice(analysis.compare(*net, "float", "fake_quant"), sqnr_below=10) == []


def test_tables_that_cost_accuracy_and_what_helps() -> None:
    build = graphs.Builder(5)
    build.shapes["x"] = (4, 6, 6)
    wide = build.add(ops.Scale(factor=5.0), ("x",), (4, 6, 6))
    sine = build.add(ops.Sin(single_period=False), (wide,), (4, 6, 6))
    graph = build.graph(build.add(ops.Sigmoid(), (sine,), (4, 6, 6)), size=6)
    config = jq.QConfig({"*": jq.Policy(output=jq.int16())})
    model = jq.prepare(graph, {}, config, target=jq.targets.NASH_E)
    x = graphs.images(0, graph)
    model = jq.calibrate(model, [x])
    worst, other = analysis.table_costs(model, x)
    assert (worst.name, other.operator) == (sine, "Sigmoid")
    assert worst.output_sqnr < other.output_sqnr
    assert worst.tried[0][1] > worst.own_sqnr + 6
    best, reached = next((change, level) for change, level in worst.tried if change.startswith("num_tables"))
    assert reached > worst.own_sqnr + 6
    assert any("single_period" in change for change, _ in worst.tried)
    # What was tried is what comes out when it is done.
    options = replace(model.plan.graph.by_name[sine].op.table, num_tables=int(best.split("=")[1].split(",")[0]))
    placement = best.split("'")[1]
    nodes = tuple(
        replace(n, op=replace(n.op, table=replace(options, placement=placement))) if n.name == sine else n
        for n in graph.nodes
    )
    prepared = jq.prepare(replace(graph, nodes=nodes), {}, config, target=jq.targets.NASH_E)
    model = prepared.replace(qparams=model.qparams)
    again = {cost.name: cost for cost in analysis.table_costs(model, x)}
    assert again[sine].own_sqnr == pytest.approx(reached, abs=1e-3)
    found = analysis.check_plan(model)
    assert named(found, "table") == []


def test_signs_of_overfitting(net: Net) -> None:
    model, x = net
    assert analysis.overfitting_signs(model, x, peak=1e4, amplification=1e3) == []
    large = dict(model.params) | {"head.weight": model.params["head.weight"] * 1000}
    found = analysis.overfitting_signs(model.replace(params=large), x, peak=500, amplification=1e3)
    assert {"head.weight", "n7.linear"} <= {f.where for f in found}
    found = analysis.overfitting_signs(model, x, peak=1e6, amplification=1e-6)
    assert {f.message.split(" of the input")[0] for f in found} == {"noise", "brightness", "a shift by one pixel"}


def test_the_nan_checklist_in_its_order(net: Net) -> None:
    model, x = net
    assert analysis.nan_checklist(model, x, losses=[2, 1, 0.5, 0.3, 0.3, 0.3, 0.3, 0.3]) == []
    broken = x.at[0, 0, 0, 0].set(jnp.nan)
    (first, *_) = analysis.nan_checklist(model, broken)
    assert (first.where, first.numbers["count"]) == ("x", 1)
    (found,) = analysis.nan_checklist(
        model.replace(params=dict(model.params) | {"head.bias": model.params["head.bias"] * jnp.inf}), x
    )
    assert found.where == "head.bias"
    assert "not calibrated" in analysis.nan_checklist(model.replace(qparams={}), x)[0].message
    (found,) = analysis.nan_checklist(model.replace(qparams=dict(model.qparams) | {"n3.conv": jnp.float32(jnp.nan)}), x)
    assert found.where == "n3.conv"
    assert found.message == "the scale of the value is not finite"
    (found,) = analysis.nan_checklist(model, x, losses=[2.0, 1.5, 1.4, 2.2, 2.1, 2.3])
    assert found.message == "the loss has risen again from 1.4, and stays"
    (found,) = analysis.nan_checklist(model, x, learning_rate=0.1, float_learning_rate=0.1)
    assert "high for QAT" in found.message
    assert jq.training.find_nan(model, x) is None


def test_settings_of_training_follow_the_global_batch() -> None:
    rate, epochs = analysis.training_advice(0.1, 100, float_batch=256, batch=256)
    assert (rate.level, rate.numbers["learning_rate"], epochs.numbers["epochs"]) == ("note", pytest.approx(0.01), 15)
    found = analysis.training_advice(0.1, 100, float_batch=256, batch=256, devices=4, schedule="OneCycle")
    assert (found[0].level, found[0].numbers["learning_rate"]) == ("warning", pytest.approx(0.04))
    assert "SGD" in found[-1].fix
    with pytest.raises(jq.QConfigError, match=r"must be positive"):
        analysis.training_advice(0.1, 0, float_batch=1, batch=1)


# ---------------------------------------------------------------------------------------------------------------------
# Bad cases


def test_the_worst_samples_of_a_dataset(net: Net, tmp_path) -> None:
    model, x = net
    data = np.array(jnp.concatenate([x] * 3))
    data[[2, 7]] *= np.array([6.0, 4.0], np.float32).reshape(2, 1, 1, 1)  # far beyond what was calibrated
    batches = [jnp.asarray(data[i : i + 5]) for i in range(0, 12, 5)]
    cases = analysis.find_bad_cases(model, batches, count=3)
    outputs = [np.asarray(y) for y in (jq.apply(model, jnp.asarray(data), mode="float"),)]
    integer = np.asarray(jq.run(jq.lower(model), jnp.asarray(data)))
    errors = np.abs(outputs[0] - integer).mean(axis=1)
    assert cases.index.tolist() == np.argsort(-errors, kind="stable")[:3].tolist()
    assert set(cases.index[:2].tolist()) == {2, 7}
    np.testing.assert_allclose(cases.error, errors[cases.index], rtol=1e-4)
    np.testing.assert_array_equal(cases.inputs["x"][0], data[cases.index[0]])
    cases.save(tmp_path / "bad.npz")
    again = analysis.load_bad_cases(tmp_path / "bad.npz")
    assert (again.a, again.b, again.metric, again.output) == ("float", "bit_true", "l1", "n7.linear")
    np.testing.assert_array_equal(again.inputs["x"], cases.inputs["x"])
    np.testing.assert_array_equal(again.error, cases.error)
    assert again.table() == cases.table()
    assert analysis.compare(model, again.batch(2), "float", "fake_quant").row("x").saturated > 0


def test_a_file_that_holds_no_cases(tmp_path) -> None:
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(jq.FormatError, match=r"no bad cases"):
        analysis.load_bad_cases(tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", index=np.zeros(1))
    with pytest.raises(jq.FormatError, match=r"no bad cases"):
        analysis.load_bad_cases(tmp_path / "y.npz")
    with pytest.raises(FileNotFoundError, match=r"no bad cases at"):
        analysis.load_bad_cases(tmp_path / "z.npz")
