"""Rows about formats that are asked for by name: asking is answered, by the format or by an error with the name."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jquant as jq
from jquant import templates
from jquant_converters import from_onnx, from_torch, model_from_onnx, to_onnx

INT8 = {"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8())}
INT16, WIDE = jq.Policy(output=jq.int16()), jq.Policy(output=jq.high_precision)
IMAGE = torch.linspace(-1, 1, 2 * 3 * 6 * 6).reshape(2, 3, 6, 6)


def imported(model: torch.nn.Module) -> tuple[jq.Graph, dict]:
    return from_torch(model.eval(), IMAGE)


def layers(*modules: torch.nn.Module) -> tuple[jq.Graph, dict]:
    torch.manual_seed(0)
    return imported(torch.nn.Sequential(*modules))


def conv(before: int, after: int) -> torch.nn.Module:
    return torch.nn.Conv2d(before, after, 3, padding=1)


@pytest.fixture(scope="module")
def two_convs() -> tuple[jq.Graph, dict]:
    return layers(conv(3, 4), torch.nn.ReLU(), conv(4, 5))


def prepared(network: tuple[jq.Graph, dict], rules: dict, **options: object) -> jq.Plan:
    return jq.prepare(*network, jq.QConfig(INT8 | rules), target="nash-e", **options).plan


def row(plan: jq.Plan, name: str) -> jq.types.Resolution:
    return next(r for r in plan.resolutions if (r.name, r.port) == (name, "output"))


# -- row 17: an output format has no effect, because the name names nothing


def test_row_17_an_index_is_no_name() -> None:
    with pytest.raises(jq.QConfigError, match="key 0 is int; keys are strings"):
        jq.QConfig({0: WIDE})


def test_row_17_a_layer_inside_a_fused_group_gets_what_is_asked_for_it(two_convs: tuple) -> None:
    plan = prepared(two_convs, {"0": INT16})
    assert plan.spec("0").dtype == "int16"
    assert row(plan, "1").applied == "int16"
    assert "asked for at 0" in row(plan, "1").reason
    assert "which takes this format" in row(plan, "0").reason
    assert prepared(two_convs, {}).spec("0").dtype == "int8"


def test_row_17_high_precision_inside_is_refused_by_the_name_that_asks(two_convs: tuple) -> None:
    for name in ("0", "1"):
        with pytest.raises(jq.QConfigError, match=f"'{name}'.*feeds only graph outputs; give it int8 or int16"):
            prepared(two_convs, {name: WIDE})
        plan = prepared(two_convs, {name: WIDE}, strict=False)
        assert plan.spec("0").dtype == "int8"  # what the rule before asked for
        assert "feeds only graph outputs" in row(plan, name).reason


def test_row_17_without_an_earlier_rule_there_is_nothing_to_fall_back_to(two_convs: tuple) -> None:
    rules = jq.QConfig({"*": jq.Policy(weight=jq.int8(), output=jq.high_precision)})
    with pytest.raises(jq.QConfigError, match="give it int8 or int16"):
        jq.prepare(*two_convs, rules, target="nash-e", strict=False)


def test_row_17_two_formats_for_one_value_are_refused(two_convs: tuple) -> None:
    rules = {"0": INT16, "1": jq.Policy(output=jq.int8())}
    with pytest.raises(jq.QConfigError, match="0: asked for int16, and 1 for int8"):
        prepared(two_convs, rules)
    assert prepared(two_convs, rules, strict=False).spec("0").dtype == "int8"  # the later rule


def test_row_17_a_name_outweighs_a_later_pattern_for_another_node_of_the_group(two_convs: tuple) -> None:
    plan = prepared(two_convs, {"0": INT16, "type:Relu": jq.Policy(output=jq.int8())})
    assert plan.spec("0").dtype == "int16"
    plan = prepared(two_convs, {"type:Conv": INT16, "type:Relu": jq.Policy(output=jq.int8())})
    assert plan.spec("0").dtype == "int8"  # two patterns: the later one


def test_row_17_a_batch_norm_and_an_addition_belong_to_the_layer() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.relu, self.head = (
                conv(3, 3),
                torch.nn.BatchNorm2d(3),
                torch.nn.ReLU(),
                conv(3, 2),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.relu(self.norm(self.conv(x)) + x))

    network = imported(Block())
    for name in ("conv", "norm", "add", "relu"):
        plan = prepared(network, {name: INT16})
        assert plan.spec("conv").dtype == "int16", name
        assert row(plan, "relu").applied == "int16"


def test_row_17_a_name_that_is_near_to_one(two_convs: tuple) -> None:
    with pytest.raises(
        jq.QConfigError, match=r"there is no module 'bacbone\.\*'; did you mean .*'backbone'\?.*no glob"
    ):
        prepared(_named(), templates.by_module({"bacbone.*": jq.int16()}))
    with pytest.raises(jq.QConfigError, match=r"'bacbone\.\*' matches nothing; did you mean 'backbone\.\*'"):
        prepared(_named(), {"bacbone.*": INT16})
    with pytest.raises(jq.QConfigError, match=r"'re:bacbone\.1' matches nothing; did you mean 'backbone\.1'"):
        prepared(_named(), {r"re:bacbone.1": INT16})
    assert prepared(_named(), templates.by_module({"backbone": jq.int16()})).spec("backbone.0").dtype == "int16"


def _named() -> tuple[jq.Graph, dict]:
    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = torch.nn.Sequential(conv(3, 4), torch.nn.ReLU()), conv(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.backbone(x))

    return imported(Named())


# -- row 18: high precision, where it is and where it is not


def test_row_18_high_precision_asked_for_is_what_one_has_without_asking() -> None:
    network = layers(conv(3, 4), torch.nn.ReLU())
    assert prepared(network, {}).values["0"] == jq.high_precision
    for name in ("0", "1"):
        for strict in (True, False):
            assert prepared(network, {name: WIDE}, strict=strict).values["0"] == jq.high_precision
    assert prepared(network, {"1": WIDE}, high_precision_outputs=False).values["0"] == jq.high_precision
    assert prepared(network, {}, high_precision_outputs=False).spec("0").dtype == "int8"


def test_row_18_high_precision_at_an_addition() -> None:
    class Residual(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) + x

    plan = prepared(imported(Residual()), {"add": WIDE})
    assert plan.values["conv"] == jq.high_precision


def test_row_19_and_20_what_the_printed_plan_says(two_convs: tuple) -> None:
    graph, params = two_convs
    model = jq.prepare(graph, params, jq.QConfig(INT8), target="nash-e")
    lines = {line.split()[0]: line for line in jq.describe(jq.calibrate(model, [_x()])).splitlines()[2:]}
    assert lines["2"].endswith("high precision")
    assert lines["2"].split()[2] == "int32"
    assert lines["0"].split()[2] == "int8"
    assert "fake_quant" in lines["0"]


def _x() -> jnp.ndarray:
    return jnp.asarray(IMAGE.numpy())


# -- row 31: the output node


def test_row_31_int8_asked_for_at_the_output_layer_is_int8(two_convs: tuple) -> None:
    plan = prepared(two_convs, {"2": jq.Policy(output=jq.int8())})
    assert plan.spec("2").dtype == "int8"
    assert "2" in plan.owned
    assert prepared(two_convs, {"type:Conv": jq.Policy(output=jq.int8())}).values["2"] == jq.high_precision
    assert prepared(two_convs, templates.by_module({"2": jq.int8()})).spec("2").dtype == "int8"


class Heads(torch.nn.Module):
    """An SSD head: permuted, reshaped to boxes; and an auxiliary output that reads the same accumulator."""

    def __init__(self, auxiliary: bool) -> None:
        super().__init__()
        self.conv, self.aux = conv(3, 8), conv(8, 2) if auxiliary else None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.conv(x)
        boxes = y.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4)
        return (boxes,) if self.aux is None else (boxes, self.aux(y))


def test_row_31_data_movement_behind_the_accumulator_is_looked_through() -> None:
    torch.manual_seed(1)
    model = Heads(auxiliary=False).eval()
    graph, params = from_torch(model, IMAGE)
    model = jq.prepare(graph, params, jq.QConfig(INT8), target="nash-e")
    assert model.plan.values["conv"] == jq.high_precision
    model = jq.calibrate(model, [_x()])
    program = jq.lower(model)
    (integers,) = jq.run(program, jnp.asarray(_quantized(program, "x")), raw=True)
    # the accumulator in numpy, from the integers of the program and torch's float64 convolution, exact below 2^53
    weight = np.asarray(program.constants["conv"]["weight"], np.float64).transpose(3, 2, 0, 1)
    x = torch.tensor(_quantized(program, "x"), dtype=torch.float64)
    bias = torch.tensor(np.asarray(program.constants["conv"]["bias"], np.float64))
    wanted = torch.nn.functional.conv2d(x, torch.tensor(weight), bias, padding=1)
    wanted = wanted.permute(0, 2, 3, 1).reshape(2, -1, 4).numpy()
    np.testing.assert_array_equal(np.asarray(integers, np.int64), wanted)
    # and its scales: of channel 4 * k + j of 8, at box 2 * i + k and coordinate j
    scales = np.asarray(model.qparams["x"]) * np.asarray(model.qparams["conv.weight"])
    real = wanted.reshape(2, 36, 2, 4) * scales.astype(np.float64).reshape(2, 4)
    (got,) = jq.run(program, _x())
    np.testing.assert_allclose(got, real.reshape(2, -1, 4), rtol=1e-6, atol=1e-7)  # two float32 products
    np.testing.assert_allclose(got, jq.apply(model, _x(), mode="fake_quant")[0], atol=2e-6)


def _quantized(program: jq.Program, name: str) -> np.ndarray:
    return np.clip(np.rint(IMAGE.numpy() / np.asarray(program.scales[name])), -128, 127).astype(np.int8)


def test_row_31_a_float_reader_takes_no_precision_away() -> None:
    network = imported(Heads(auxiliary=True))
    assert prepared(network, {"aux": None}).values["conv"] == jq.high_precision
    assert prepared(network, {}).spec("conv").dtype == "int8"  # the branch is quantized: it needs a grid
    graph, params = network
    model = jq.prepare(graph, params, jq.QConfig(INT8 | {"aux": None}), target="S100")
    program = jq.lower(jq.calibrate(model, [_x()]), outputs="reshape")
    assert program.graph.outputs == ("reshape",)
    with pytest.raises(jq.LoweringError, match=r"'reshpe' is no output of the graph.*did you mean 'reshape'"):
        jq.lower(jq.calibrate(model, [_x()]), outputs="reshpe")


@pytest.mark.parametrize(
    ("behind", "kept"),
    [
        (torch.nn.Flatten(), True),
        (torch.nn.PixelShuffle(2), True),
        (torch.nn.ZeroPad2d(1), True),
        (torch.nn.ReplicationPad2d(1), True),
        (torch.nn.Sequential(torch.nn.Unflatten(1, (2, 4)), torch.nn.Flatten(2)), True),
        (torch.nn.ConstantPad2d(1, 0.5), False),  # 0.5 is another integer in each channel
        (torch.nn.MaxPool2d(2), False),  # it compares int8 or int16
    ],
)
def test_row_31_what_an_accumulator_passes(behind: torch.nn.Module, kept: bool) -> None:
    torch.manual_seed(2)
    model = torch.nn.Sequential(conv(3, 8), behind).eval()
    graph, params = from_torch(model, IMAGE)
    model = jq.prepare(graph, params, jq.QConfig(INT8), target="nash-e")
    assert (model.plan.values["0"] == jq.high_precision) is kept
    if kept:
        assert jq.plan.plan_from_json(jq.plan.plan_to_json(model.plan)) == model.plan
        model = jq.calibrate(model, [_x()])
        program = jq.lower(model)
        want = jq.apply(model, _x(), mode="fake_quant")
        np.testing.assert_allclose(np.asarray(jq.run(program, _x())), np.asarray(want), atol=2e-6)
        slow = jq.reference.run(program, IMAGE.numpy())[1][program.graph.outputs[0]]
        np.testing.assert_array_equal(jq.run(program, jnp.asarray(_quantized(program, "input")), raw=True), slow)
        back = model_from_onnx(to_onnx(model), target="nash-e")
        assert back.plan.values["0"] == jq.high_precision


def test_row_31_a_format_asked_for_behind_the_layer_is_applied_or_refused() -> None:
    network = layers(conv(3, 4), torch.nn.Flatten())
    plan = prepared(network, {"1": jq.Policy(output=jq.int8())})
    assert plan.spec("1").dtype == "int8"
    with pytest.raises(jq.QConfigError, match="1: asked for int16, but it would be int8: Flatten keeps the format"):
        prepared(network, {"1": INT16})


# -- rows 35 and 36: a module that is called several times


class Twice(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ff, self.act, self.ff_1 = conv(3, 3), torch.nn.ReLU(), conv(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ff_1(self.act(self.ff(self.act(self.ff(x)))))


def test_row_35_a_rule_for_a_module_reaches_all_its_calls() -> None:
    network = imported(Twice())
    calls = {node.name: node.call_of for node in network[0].nodes}
    assert calls == {"ff": "", "act": "", "ff_2": "ff", "act_1": "act", "ff_1": ""}  # `ff_1` is a module of its own
    for rules in ({"ff": INT16}, templates.by_module({"ff": jq.int16()}), {"act": INT16}, {"re:f+": INT16}):
        plan = prepared(network, rules)
        assert [plan.spec(v).dtype for v in ("ff", "ff_2")] == ["int16", "int16"]
        assert plan.values["ff_1"] == jq.high_precision


def test_row_36_one_call_alone_by_its_own_name() -> None:
    network = imported(Twice())
    plan = prepared(network, {"ff_2": INT16})
    assert [plan.spec(v).dtype for v in ("ff", "ff_2")] == ["int8", "int16"]
    plan = prepared(network, {"ff": INT16, "ff_2": jq.Policy(output=jq.int8())})
    assert [plan.spec(v).dtype for v in ("ff", "ff_2")] == ["int16", "int8"]


def test_row_35_calls_of_a_function_of_jax_and_of_a_file() -> None:
    def network(params: dict, x: jnp.ndarray) -> jnp.ndarray:
        for _ in range(2):
            x = jnp.tanh(x @ params["ff"]["kernel"])
        return x @ params["head"]["kernel"]

    params = {"ff": {"kernel": jnp.eye(4) * 0.5}, "head": {"kernel": jnp.ones((4, 2))}}
    graph, params = jq.trace(network, params, jnp.ones((2, 4)))
    assert [(n.name, n.call_of) for n in graph.nodes if n.name.startswith("ff")] == [("ff", ""), ("ff_1", "ff")]
    model = jq.prepare(graph, params, jq.QConfig(INT8 | {"ff": jq.Policy(weight=jq.int4())}), target="nash-e")
    assert model.plan.weights["ff.kernel"].dtype == "int4"
    again, _ = from_onnx(to_onnx(graph, params))
    assert {n.call_of for n in again.nodes if n.name == "ff_1"} == {"ff"}


# -- row 30: the march; row 10, 11: strings


def test_row_30_the_march_by_the_name_of_the_chip(two_convs: tuple) -> None:
    graph, params = two_convs
    for name in ("S100", "J6E", "nash-e", "NASH_E"):
        assert jq.prepare(graph, params, jq.QConfig(INT8), target=name).plan.target is jq.targets.NASH_E
    assert jq.targets.find_target("J6M") is jq.targets.NASH_M
    with pytest.raises(jq.QConfigError, match="unknown march 'S10'; did you mean 'S100'"):
        jq.prepare(graph, params, jq.QConfig(INT8), target="S10")
    with pytest.raises(jq.QConfigError, match=re.escape("not None")):
        jq.prepare(graph, params, jq.QConfig(INT8), target=None)


def test_row_11_strings_where_a_file_has_strings() -> None:
    assert jq.int8(quantizer="lsq", observer="mse") == jq.int8(quantizer=jq.lsq, observer=jq.observers.mse())
    assert templates.int8_default(observer="kl")["*"].output.observer.name == "kl"
    with pytest.raises(jq.QConfigError, match="unknown observer 'mes'; did you mean 'mse'"):
        jq.int8(observer="mes")
    with pytest.raises(jq.QConfigError, match="unknown quantizer 'lqs'; did you mean 'lsq'"):
        jq.int16(quantizer="lqs")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"observer": jq.observers.mse}, "the function 'mse'; call it: jq.observers.mse()"),
        ({"observer": 3}, "observer must be a jq.observers.Observer such as jq.observers.mse(), not 3"),
        ({"quantizer": jq.observers.mse()}, "quantizer must be a jq.quantizers.Quantizer such as jq.lsq"),
    ],
)
def test_row_10_a_wrong_quantizer_or_observer_is_refused_where_it_is_written(wrong: dict, message: str) -> None:
    with pytest.raises(jq.QConfigError, match=re.escape(message)):
        jq.int8(**wrong)


@pytest.mark.parametrize("march", ["nash-p", "nash-h", "nash-b"])
def test_row_30_marches_whose_integers_are_not_public_calibrate_and_train(march: str, two_convs: tuple) -> None:
    graph, params = two_convs
    model = jq.prepare(graph, params, jq.QConfig(INT8), target=march)
    model = jq.calibrate(model, [_x()])
    y, _ = jq.apply_train(model, _x())
    assert y.shape == (2, 5, 6, 6)
    with pytest.raises(jq.LoweringError, match=rf"{march}: its integer post-processing is not public"):
        jq.lower(model)
