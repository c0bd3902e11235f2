"""Rows about the environment, reproducibility, branches, integers, overfitting, tables and reports."""

import re
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support import graphs

import jquant as jq
from jquant import analysis, ops
from jquant_converters import from_torch

ROOT = Path(__file__).parents[2]
INT8 = {"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8())}
Net = tuple[jq.Model, jax.Array]


def network(rules: dict | None = None, dropout: bool = False) -> Net:
    build = graphs.Builder(3)
    build.shapes["x"] = (3, 6, 6)
    x = build.add(ops.Relu(), (build.conv("x", 4, 3),), (4, 6, 6))
    x = build.add(ops.Dropout(rate=0.5), (x,), (4, 6, 6)) if dropout else x
    graph = build.graph(build.conv(x, 2, 3), size=6)
    model = jq.prepare(graph, build.params, jq.QConfig(INT8 | (rules or {})), target="S100")
    x = graphs.images(0, graph)
    return jq.calibrate(model, [x]), x


@pytest.fixture(scope="module")
def net() -> Net:
    return network()


def test_row_1_the_recipe_of_the_image_installs_what_the_wheel_has() -> None:
    """The image itself is not built here: its recipe names the extras and the Python that pyproject.toml has."""
    recipe = (ROOT / "Containerfile").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = re.search(r"^ARG EXTRAS=(\S+)$", recipe, flags=re.M)[1].split(",")
    assert set(extras) == set(project["optional-dependencies"]) - {"all"}
    python = re.search(r"^ARG PYTHON=(\S+)$", recipe, flags=re.M)[1]
    assert project["requires-python"] == f">={python}"
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", recipe, flags=re.M)
    assert all((ROOT / name).exists() for names in copied for name in names.split())
    assert 'ENTRYPOINT ["jquant"]' in recipe


def test_row_2_a_seed_decides_and_nothing_is_predicted() -> None:
    model, x = network(dropout=True)
    jax.tree.map(np.testing.assert_array_equal, model.qparams, jq.calibrate(model, [x]).qparams)
    one, same, other = (jq.apply_train(model, x, rngs=jax.random.key(seed))[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    for found in analysis.advise(72.0, 66.0):
        assert set(found.numbers) <= {"float", "calibrated", "target"}  # what was given, and the goal


def test_row_7_training_without_quantizers_is_float_training(net: Net) -> None:
    model, x = net
    np.testing.assert_array_equal(
        jq.apply_train(model, x, mode="float")[0], jq.apply(model.replace(qparams={}), x, mode="float")
    )
    jq.training.check_initial_loss(0.42, float_loss=0.40)
    with pytest.raises(jq.training.TrainingError, match=r"the first QAT loss is 4, that of the float model 0.4"):
        jq.training.check_initial_loss(4.0, float_loss=0.4)


def test_row_8_a_scale_that_does_not_cover_is_named(net: Net) -> None:
    model, x = net
    assert analysis.layer_advice(analysis.compare(model, x, "float", "fake_quant")) == []
    broken = {**model.qparams, "x": model.qparams["x"] / 16}
    worst = analysis.layer_advice(analysis.compare(model.replace(qparams=broken), x, "float", "fake_quant"))[0]
    assert (worst.where, worst.check) == ("x", "clamp error")


def _with_auxiliary() -> tuple[jq.Graph, dict]:
    build = graphs.Builder(3)
    build.shapes["x"] = (3, 6, 6)
    trunk = build.add(ops.Relu(), (build.conv("x", 4, 3),), (4, 6, 6))
    head, aux = build.conv(trunk, 2, 3), build.conv(trunk, 5, 1)
    return build.graph(head, aux, size=6), build.params


def test_row_21_what_is_not_deployed_is_left_float() -> None:
    graph, params = _with_auxiliary()
    head, aux = graph.outputs
    model = jq.prepare(graph, params, jq.QConfig(INT8 | {aux: None}), target="S100")
    assert model.plan.values[aux] is None
    model = jq.calibrate(model, [graphs.images(0, graph)])
    assert len(jq.lower(model, outputs=head).graph.outputs) == 1
    with pytest.raises(jq.LoweringError, match=r"float.*name the deployed outputs"):
        jq.lower(model)


def test_row_22_an_auxiliary_branch_is_found() -> None:
    graph, _ = _with_auxiliary()
    (found,) = analysis.auxiliary_branches(graph, outputs=graph.outputs[0])
    assert found.where == graph.outputs[1]
    assert analysis.auxiliary_branches(graph) == []


def test_row_29_what_cannot_be_quantized_is_named_and_left_out() -> None:
    build = graphs.Builder(3)
    build.shapes["x"] = (3, 6, 6)
    mirrored = build.add(ops.Pad(padding=((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect"), ("x",), (3, 8, 8))
    graph = build.graph(build.conv(mirrored, 2, 3), size=6)
    with pytest.raises(jq.QConfigError, match=rf"cannot run 1 nodes:\n  {re.escape(mirrored)} \(Pad\): .*reflection"):
        jq.prepare(graph, build.params, jq.QConfig(INT8), target="S100")
    model = jq.prepare(graph, build.params, jq.QConfig(INT8 | {mirrored: None, "x": None}), target="S100")
    assert model.plan.values[mirrored] is None


def test_row_32_two_halves_of_the_data_give_the_bits_of_the_whole(net: Net) -> None:
    model, x = net
    parts = [jq.calibration.collect(model, [half], microbatch=1) for half in (x[:1], x[1:])]
    merged = jq.calibration.finalize_stats(model, jq.calibration.merge_stats(model, *parts))
    jax.tree.map(np.testing.assert_array_equal, merged.qparams, jq.calibrate(model, [x], microbatch=1).qparams)
    ordered, x = network({"x": jq.Policy(output=jq.int8(observer="moving_average"))})
    stats = jq.calibration.collect(ordered, [x])
    with pytest.raises(jq.CalibrationError, match="collect on one device"):  # later batches weigh more
        jq.calibration.merge_stats(ordered, stats, stats)


def test_row_34_the_integers_are_evaluated_and_training_can_see_them(net: Net) -> None:
    model, x = net
    exact = jq.run(jq.lower(model), x)
    np.testing.assert_array_equal(jq.apply(model, x, mode="bit_true"), exact)
    simulated = jq.apply(model, x, mode="fake_quant")
    assert not np.array_equal(simulated, exact)  # fake-quant rounds real numbers, the program its accumulators
    assert float(jnp.abs(simulated - exact).max()) < 0.1 * float(jnp.abs(exact).max())


def test_row_39_an_error_says_where_to_go_on() -> None:
    class Unknown(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.i0(x)

    with pytest.raises(
        jq.ConversionError, match=r"aten\.special_i0.*\n.*add a handler to jquant_converters\.aten\.TABLE"
    ):
        from_torch(Unknown(), torch.ones(2, 3))
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert "## Adding an operator" in page


def test_row_40_41_42_signs_of_overfitting_and_row_43_what_takes_them_away(net: Net) -> None:
    model, x = net
    (key,) = [k for k in model.plan.weights if k.startswith("n0")]
    limits = {"amplification": 1e3, "peak": 100.0}
    assert analysis.overfitting_signs(model, x, **limits) == []
    large = {**model.params, key: model.params[key] * 1000}
    found = analysis.overfitting_signs(model.replace(params=large), x, **limits)
    assert any(f.where == key and "weights up to" in f.message for f in found)  # row 41
    assert any(f.where == "n0.conv" and "activations up to" in f.message for f in found)  # row 42
    assert all("weight decay" in f.fix for f in found)
    decayed = {**large, key: large[key] / 1000}  # row 43
    assert analysis.overfitting_signs(model.replace(params=decayed), x, **limits) == []

    def sharp(params: dict, x: jax.Array) -> jax.Array:  # row 40: it reads the last bits of its input
        return jnp.sin(x * 200) * params["gain"]

    graph, params = jq.trace(sharp, {"gain": jnp.ones(())}, x.reshape(x.shape[0], -1))
    model = jq.prepare(graph, params, jq.QConfig({"*": None}), target="S100")
    signs = analysis.overfitting_signs(model, x.reshape(x.shape[0], -1))
    assert any("changes the output" in f.message for f in signs)


@pytest.fixture(scope="module")
def sine() -> Net:
    graph, params = jq.trace(lambda p, x: jnp.sin(x * 5) * p["gain"], {"gain": jnp.ones(())}, jnp.ones((2, 8)))
    model = jq.prepare(graph, params, jq.QConfig({"*": jq.Policy(output=jq.int16())}), target="S100")
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (16, 8)), jnp.float32)
    return jq.calibrate(model, [x]), x


def test_row_44_a_table_is_a_function_in_training_and_a_table_on_export(sine: Net) -> None:
    model, x = sine
    (name,) = [n.name for n in model.plan.graph.nodes if isinstance(n.op, ops.Sin)]
    scale = float(model.qparams[name])
    program = jq.lower(model)
    table = np.asarray(jq.run_with_taps(program, x)[name]) * np.float64(scale)
    found = {
        mode: np.asarray(jq.apply_with_taps(model, x, mode=mode)[1][name], np.float64)
        for mode in ("fake_quant", "tables")
    }
    operand = model.plan.graph.by_name[name].inputs[0]
    real = np.sin(np.asarray(jq.apply_with_taps(model, x, mode="fake_quant")[1][operand], np.float64))
    assert np.abs(found["fake_quant"] - real).max() <= 0.51 * scale  # the function, rounded
    np.testing.assert_allclose(found["tables"], table, atol=1e-6 * scale * 2**15)  # the table, as in the program
    assert np.abs(table - real).max() > 2 * scale


def test_row_45_what_a_table_costs(sine: Net, net: Net) -> None:
    (cost,) = analysis.table_costs(*sine)
    assert cost.operator == "Sin"
    assert max(level for _, level in cost.tried) > cost.own_sqnr > 60  # dB: it costs little, other tables less
    assert analysis.table_costs(*net) == []  # no tables, no cost


def test_row_46_a_report_of_what_goes_wrong(net: Net, tmp_path: Path) -> None:
    model, x = net
    bad = np.asarray(x).copy()
    bad[1] *= 8  # far beyond what was calibrated
    cases = analysis.find_bad_cases(model, [jnp.asarray(bad)], count=1)
    assert cases.index.tolist() == [1]
    cases.save(tmp_path / "bad.npz")
    again = analysis.load_bad_cases(tmp_path / "bad.npz")
    np.testing.assert_array_equal(again.inputs["x"][0], bad[1])
    (tmp_path / "none.npz").write_bytes(b"nothing")
    with pytest.raises(jq.FormatError, match="no bad cases"):
        analysis.load_bad_cases(tmp_path / "none.npz")
