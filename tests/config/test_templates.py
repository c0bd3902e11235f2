"""Templates, strict mode, files of qconfigs, and the printed plan."""

import jax.numpy as jnp
import pytest
from support import graphs

import jquant as jq
from jquant import templates


@pytest.fixture(scope="module")
def network() -> tuple[jq.Graph, dict]:
    build = graphs.Builder(3)
    build.shapes["x"] = (3, 8, 8)
    x = build.add(jq.ops.Relu(), (build.conv("x", 6, 3),), (6, 8, 8))
    x = build.pool(jq.ops.MaxPool, x, 2, 2, 0)
    x = build.conv(x, 4, 1)
    return build.graph(x, size=8), build.params


def prepared(network: tuple, rules: dict, **options) -> jq.Plan:
    return jq.prepare(*network, jq.QConfig(rules), target=jq.targets.NASH_E, **options).plan


def test_presets(network: tuple) -> None:
    plan = prepared(network, templates.int8_default())
    assert {plan.spec(n).dtype for n in plan.owned} == {"int8"}
    plan = prepared(network, templates.weight8_activation16(observer=jq.observers.mse()))
    assert {plan.spec(n).dtype for n in plan.owned} == {"int16"}
    assert {spec.dtype for spec in plan.weights.values()} == {"int8"}
    assert {plan.spec(n).observer.name for n in plan.owned} == {"mse"}


def test_fixed_activations_have_no_trained_scale(network: tuple) -> None:
    rules = templates.int8_default(quantizer=jq.lsq)
    plan = prepared(network, templates.fixed_activations(rules))
    assert {plan.spec(n).quantizer.name for n in plan.owned} == {"fake_quant"}
    assert {spec.quantizer.name for spec in plan.weights.values()} == {"lsq"}


def test_by_module(network: tuple) -> None:
    rules = templates.by_module(
        {"": {"output": jq.int8(), "weight": jq.int8()}, "n0": jq.int16(), "n3.conv": {"weight": jq.int4()}}
    )
    plan = prepared(network, rules)
    assert plan.spec("n0.conv").dtype == "int16"  # the relu, which n0 does not cover, makes the value of the layer
    assert plan.weights["n3.conv.weight"].dtype == "int4"
    plan = prepared(network, templates.int8_default() | templates.by_module({"n1": jq.int16()}))
    assert plan.spec("n0.conv").dtype == "int16"


@pytest.mark.parametrize("wrong", [{0: jq.int8()}, {"a": "int8"}, {"a": {"out": jq.int8()}}])
def test_by_module_refuses(wrong: dict) -> None:
    with pytest.raises(jq.QConfigError, match="module"):
        templates.by_module(wrong)


def test_conv_dtype(network: tuple) -> None:
    graph, _ = network
    rules = templates.conv_dtype(graph, input=jq.int8(), weight=jq.int16(axis="out"), prefix="n3.conv")
    assert list(rules) == ["n3.conv"]
    plan = prepared(network, templates.weight8_activation16() | rules)
    assert plan.weights["n3.conv.weight"].dtype == "int16"
    assert plan.spec("n3.conv.x").dtype == "int8"
    with pytest.raises(jq.QConfigError, match=r"no module 'n3\.comv'; did you mean 'n3\.conv'"):
        templates.conv_dtype(graph, prefix="n3.comv")


def test_matmul_dtype() -> None:
    nodes = (jq.Node("att.product", jq.ops.MatMul(), ("a", "b")),)
    graph = jq.Graph((jq.Input("a", (None, 3, 4)), jq.Input("b", (None, 4, 5))), nodes, ("att.product",))
    rules = templates.int8_default() | templates.matmul_dtype(graph, jq.int16(), jq.int8())
    plan = prepared((graph, {}), rules)
    assert [plan.spec(v).dtype for v in plan.graph.by_name["att.product"].inputs] == ["int16", "int8"]


def test_sensitive() -> None:
    ranking = ["c", "a", "b"]
    assert list(templates.sensitive(ranking, topk=2, spec=jq.int16())) == ["c", "a"]
    assert list(templates.sensitive(ranking, ratio=0.34, spec=jq.int16())) == ["c", "a"]
    assert templates.sensitive(ranking, ratio=0.1, spec=jq.int16(), port="weight")["c"].weight == jq.int16()
    for options in ({}, {"topk": 1, "ratio": 0.5}, {"topk": 4}, {"ratio": 1.5}, {"topk": 1, "port": "input"}):
        with pytest.raises(jq.QConfigError):
            templates.sensitive(ranking, spec=jq.int16(), **options)


def test_grid_int16_goes_back_to_the_layer_that_makes_the_grid() -> None:
    nodes = (
        jq.Node("make", jq.ops.Linear(), ("z",), jq.FrozenMap({"weight": "w"})),
        jq.Node("bound", jq.ops.Tanh(), ("make",)),
        jq.Node("grid", jq.ops.Reshape(shape=(-1, 3, 3, 2)), ("bound",)),
        jq.Node("sample", jq.ops.GridSample(), ("x", "grid")),
    )
    graph = jq.Graph((jq.Input("x", (None, 2, 5, 5)), jq.Input("z", (None, 4))), nodes, ("sample",))
    rules = templates.grid_int16(graph)
    assert set(rules) == {"grid", "bound", "make"}
    params = {"w": jnp.ones((18, 4))}
    with pytest.raises(jq.QConfigError, match="int16"):
        prepared((graph, params), templates.int8_default())
    plan = prepared((graph, params), templates.int8_default() | rules)
    assert plan.spec("grid").dtype == "int16"
    assert plan.spec("sample").dtype == "int8"


def test_strict_raises_for_a_name_and_explains_a_pattern(network: tuple) -> None:
    wide = jq.Policy(output=jq.int16())
    named = templates.int8_default() | {"n2.maxpool": wide}
    with pytest.raises(jq.QConfigError, match=r"n2\.maxpool: asked for int16, but it would be int8: MaxPool keeps"):
        prepared(network, named)
    plan = prepared(network, named, strict=False)
    assert "MaxPool keeps the format of its operand" in jq.explain(jq.Model(plan, {}))
    plan = prepared(network, templates.int8_default() | {"n2.*": wide})
    assert "MaxPool keeps the format of its operand" in jq.explain(jq.Model(plan, {}))


CONFIG = jq.QConfig(
    {
        "*": jq.Policy(weight=jq.int8(axis="out", quantizer=jq.lsq), output=jq.int8(observer=jq.observers.mse())),
        're:n[12]\\.".*': jq.Policy(output=jq.int16(scale=0.125, scale_form="pow2")),
        "type:Linear": jq.Policy(input={"x": jq.int16()}, output=jq.high_precision),
        "soft": jq.Policy(output=jq.float16(), weight=None),
        "aux.*": None,
    }
)


@pytest.mark.parametrize("form", ["json", "toml"])
def test_files_round_trip(form: str) -> None:
    text = getattr(jq.config, f"qconfig_to_{form}")(CONFIG)
    assert getattr(jq.config, f"qconfig_from_{form}")(text) == CONFIG


def test_a_file_written_by_hand() -> None:
    text = """
    [jquant]
    schema = 1
    [rules."*"]
    output = "int8"
    weight = { dtype = "int8", axis = "out", quantizer = "lsq", observer = "min_max" }
    """
    config = jq.config.qconfig_from_toml(text)
    assert config.policy("a", "Conv").weight == jq.int8(axis="out", quantizer=jq.lsq, observer=jq.observers.min_max())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "not JSON"),
        ("{}", "schema None"),
        ('{"jquant": {"schema": 2}, "rules": {}}', "schema 2"),
        ('{"jquant": {"schema": 1}, "rules": {"*": {"ouput": "int8"}}}', "did you mean 'output'"),
        ('{"jquant": {"schema": 1}, "rules": {"*": {"output": 8}}}', "must be a dtype"),
        (
            '{"jquant": {"schema": 1}, "rules": {"*": {"output": {"dtype": "int8", "observer": "kll"}}}}',
            "unknown observer",
        ),
        ('{"jquant": {"schema": 1}, "rules": {"*": {"output": {"dtype": "int8", "quantizer": "eval"}}}}', "quantizer"),
        ('{"jquant": {"schema": 1}, "rules": {"*": {"float": true, "output": "int8"}}}', "stands alone"),
    ],
)
def test_broken_files(text: str, message: str) -> None:
    with pytest.raises(jq.FormatError, match=message):
        jq.config.qconfig_from_json(text)


def test_what_a_file_cannot_hold() -> None:
    own = jq.quantizers.Quantizer(jq.fake_quant.apply, jq.fake_quant.init, jq.fake_quant.scale, name="mine")
    with pytest.raises(jq.QConfigError, match="'mine' is one of your own"):
        jq.config.qconfig_to_json(jq.QConfig({"*": jq.Policy(output=jq.int8(quantizer=own))}))


def test_a_described_plan_shows_what_quantizes_every_value(network: tuple) -> None:
    rules = templates.int8_default(quantizer=jq.lsq) | {"x": jq.Policy(output=jq.int8(scale=0.0625))}
    graph, params = network
    model = jq.prepare(graph, params, jq.QConfig(rules), target=jq.targets.NASH_E)
    text = jq.describe(jq.calibrate(model, [graphs.images(0, graph)]))
    lines = {line.split()[0]: line for line in text.splitlines()[2:]}
    assert "0.0625" in lines["x"]
    assert lines["x"].endswith("fixed")
    assert lines["n0.conv"].split()[-3:] == ["lsq", "nmse", "trainable"]
    assert lines["n0.conv.weight"].split()[-3:] == ["lsq", "min_max", "trainable"]
    assert lines["n2.maxpool"].endswith("follows its operand")
    assert lines["n3.conv"].endswith("high precision")
    assert "(6)" in lines["n0.conv.weight"]  # a scale for each of its channels
