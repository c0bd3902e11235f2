"""Folding, fusion and the decisions of prepare: the function stays, the structure is the chip's, limits are named."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from support import graphs

import jquant as jq
from jquant import ops

NASH = jq.targets.NASH_E
INT8 = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8())})
FLOAT_BOUND = 1e-4  # of the largest output: batch norm folded into a weight rounds each product once more


def builder(size: int = 8, channels: int = 4, seed: int = 3) -> graphs.Builder:
    build = graphs.Builder(seed)
    build.shapes["x"] = (channels, size, size)
    return build


def relu(build: graphs.Builder, x: str) -> str:
    return build.add(ops.Relu(), (x,), build.shapes[x])


def add(build: graphs.Builder, a: str, b: str) -> str:
    return build.add(ops.Add(), (a, b), build.shapes[a])


def structure(plan: jq.Plan) -> list[str]:
    return [type(n.op).__name__ for n in plan.graph.nodes if not isinstance(n.op, ops.Permute)]


def assert_same_function(graph: jq.Graph, params: dict, model: jq.Model) -> None:
    x = graphs.images(5, graph)
    want = jq.graph.evaluate_float(graph, params, x)
    got = jq.apply(model, x, mode="float")
    for a, b in zip(want, got if isinstance(got, tuple) else (got,), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(b, a, rtol=0, atol=FLOAT_BOUND * float(jnp.abs(a).max()))


def prepared(build: graphs.Builder, *outputs: str, config: jq.QConfig = INT8, **options) -> jq.Model:
    graph = build.graph(*outputs, size=build.shapes["x"][1])
    model = jq.prepare(graph, build.params, config, target=NASH, **options)
    assert_same_function(graph, build.params, model)
    assert set(model.params) == set(model.plan.graph.param_names)
    return model


@settings(max_examples=12)
@given(network=graphs.networks())
def test_random_networks_keep_their_function(network: tuple) -> None:
    graph, params = network
    model = jq.prepare(graph, params, INT8, target=NASH)
    assert "BatchNorm" not in structure(model.plan)
    assert jq.graph.validate(model.plan.graph, model.params) is model.plan.graph
    assert_same_function(graph, params, model)


@settings(max_examples=25)
@given(network=graphs.networks())
def test_explain_has_every_imported_value_once(network: tuple) -> None:
    graph, params = network
    model = jq.prepare(graph, params, INT8, target=NASH)
    outputs = [r.name for r in model.plan.resolutions if r.port == "output"]
    assert sorted(outputs) == sorted(graph.values)
    for row in model.plan.resolutions:
        assert row.reason or row.requested == row.applied
    table = jq.explain(model).splitlines()
    assert [line.split()[0] for line in table[2:]] == [r.name for r in model.plan.resolutions]


def test_prepare_is_deterministic_and_leaves_its_arguments() -> None:
    build = builder()
    graph = build.graph(relu(build, build.batch_norm(build.conv("x", 4, 3))), size=8)
    before = dict(build.params)
    a, b = (jq.prepare(graph, build.params, INT8, target=NASH) for _ in range(2))
    assert (a.plan, hash(a.plan)) == (b.plan, hash(b.plan))
    assert all(build.params[k] is v for k, v in before.items())
    jax.tree.map(np.testing.assert_array_equal, a, b)


# ---------------------------------------------------------------------------------------------------------------------
# Batch norm


@pytest.mark.parametrize("bias", [True, False])
def test_chained_batch_norms_fold_into_one_conv(bias: bool) -> None:
    build = builder()
    x = build.batch_norm(build.batch_norm(build.conv("x", 6, 3, bias=bias)))
    model = prepared(build, relu(build, x))
    assert structure(model.plan) == ["Conv"]
    assert model.plan.graph.by_name["n0.conv"].op.activation == "relu"


def test_a_batch_norm_alone_becomes_a_depthwise_conv() -> None:
    build = builder()
    model = prepared(build, build.conv(build.batch_norm("x"), 5, 3))
    assert structure(model.plan) == ["Conv", "Conv"]
    assert model.plan.graph.nodes[1].op.groups == 4 or model.plan.graph.nodes[0].op.groups == 4


def test_a_batch_norm_whose_conv_has_another_reader_stays_apart() -> None:
    build = builder()
    y = build.conv("x", 4, 3)
    model = prepared(build, build.batch_norm(y), relu(build, y))
    assert sorted(structure(model.plan)) == ["Conv", "Conv", "Relu"]


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("key", ["shared.weight", "n0.conv.weight", "n2.conv.weight"])
def test_folding_leaves_a_shared_weight_alone(both: bool, key: str) -> None:
    """Two convs of one weight, a batch norm behind one or both; the key may be what the fold would call its copy."""
    build = builder()
    op = ops.Conv(strides=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1))
    weight, bias = build.array(key, 4, 4, 3, 3), build.array(key.replace("weight", "bias"), 4)
    x = build.add(op, ("x",), (4, 8, 8), weight=weight, bias=bias)
    x = build.batch_norm(x)
    x = build.add(op, (x,), (4, 8, 8), weight=weight, bias=bias)
    model = prepared(build, build.batch_norm(x) if both else relu(build, x))
    first, second = (n for n in model.plan.graph.nodes if isinstance(n.op, ops.Conv))
    assert first.params["weight"] != second.params["weight"]
    assert len(model.params) == 4


def test_a_linear_takes_a_batch_norm_of_rank_two() -> None:
    build = builder()
    x = build.add(ops.Mean(axes=(2, 3)), ("x",), (4,))
    x = build.add(ops.Linear(), (x,), (6,), weight=build.array("fc.weight", 6, 4))
    model = prepared(build, build.batch_norm(x))
    assert structure(model.plan) == ["Mean", "Linear"]
    assert set(model.plan.graph.by_name["n1.linear"].params) == {"weight", "bias"}


# ---------------------------------------------------------------------------------------------------------------------
# Fusion


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("activation", [None, ops.Relu(), ops.Relu6()])
def test_conv_batch_norm_add_activation_is_one_node(swapped: bool, activation: jq.ops.Op | None) -> None:
    build = builder()
    x = relu(build, build.conv("x", 4, 3))
    y = build.batch_norm(build.conv(x, 4, 3))
    z = add(build, *((x, y) if swapped else (y, x)))
    z = z if activation is None else build.add(activation, (z,), (4, 8, 8))
    model = prepared(build, z)
    assert structure(model.plan) == ["Conv", "Conv"]
    (host,) = [n for n in model.plan.graph.nodes if isinstance(n.op, ops.Conv) and n.op.addend]
    assert host.inputs[1] == "n0.conv"
    assert host.op.activation == ("none" if activation is None else type(activation).__name__.lower())
    assert model.plan.renamed[z] == host.name


def test_of_two_convs_the_later_takes_the_add() -> None:
    build = builder()
    a, b = build.conv("x", 4, 3), build.conv("x", 4, 1)
    model = prepared(build, relu(build, add(build, a, b)))
    assert structure(model.plan) == ["Conv", "Conv"]
    assert model.plan.graph.by_name[b].op.addend
    assert model.plan.graph.by_name[b].inputs[1] == a
    assert not model.plan.graph.by_name[a].op.addend


def test_another_reader_between_prevents_fusion() -> None:
    build = builder()
    y = build.conv("x", 4, 3)
    model = prepared(build, relu(build, y), build.add(ops.Sigmoid(), (y,), (4, 8, 8)))
    assert sorted(structure(model.plan)) == ["Conv", "Relu", "Sigmoid"]


def test_a_graph_output_between_prevents_fusion() -> None:
    build = builder()
    y = build.conv("x", 4, 3)
    model = prepared(build, y, relu(build, y))
    assert structure(model.plan) == ["Conv", "Relu"]


def test_what_is_unfused_keeps_its_own_rounding() -> None:
    build = builder()
    y, z = build.conv("x", 4, 3), build.conv("x", 4, 1)
    total = add(build, y, z)
    end = relu(build, total)
    assert structure(prepared(build, end).plan) == ["Conv", "Conv"]
    apart = prepared(build, end, unfused=[y, z])
    assert structure(apart.plan) == ["Conv", "Conv", "Add", "Relu"]
    assert {y, z, total} <= set(apart.plan.owned)
    one = prepared(build, end, unfused=[z])  # the other takes the add, and with it the activation
    assert structure(one.plan) == ["Conv", "Conv"]
    assert one.plan.renamed[end] == y
    late = prepared(build, end, unfused=[total])
    assert structure(late.plan) == ["Conv", "Conv", "Relu"]


def test_an_unknown_name_of_unfused_is_an_error() -> None:
    build = builder()
    y = build.conv("x", 4, 3)
    with pytest.raises(jq.QConfigError, match=f"no node '{y}x'; did you mean '{y}'"):
        prepared(build, relu(build, y), unfused=[f"{y}x"])


def test_an_activation_before_the_add_keeps_the_add() -> None:
    build = builder()
    y = relu(build, build.conv("x", 4, 3))
    model = prepared(build, add(build, y, "x"))
    assert structure(model.plan) == ["Conv", "Add"]


def test_adding_a_value_to_itself_is_not_fused() -> None:
    build = builder()
    y = build.conv("x", 4, 3)
    model = prepared(build, add(build, y, y))
    assert structure(model.plan) == ["Conv", "Add"]


def test_a_broadcast_add_is_not_fused() -> None:
    build = builder()
    y = build.conv("x", 4, 3)
    z = build.add(ops.AdaptiveAvgPool(output_size=(1, 1)), ("x",), (4, 1, 1))
    model = prepared(build, add(build, y, z))
    assert "Add" in structure(model.plan)


def test_a_float_add_is_not_fused() -> None:
    build = builder()
    y = add(build, build.conv("x", 4, 3), "x")
    model = prepared(build, y, config=jq.QConfig({"*": INT8.rules["*"], "type:Add": None}))
    assert structure(model.plan) == ["Conv", "Add"]
    assert model.plan.values[y] is None


def test_nodes_that_reach_no_output_are_dropped() -> None:
    build = builder()
    y = build.conv("x", 4, 3)
    relu(build, build.conv("x", 4, 1))
    model = prepared(build, y)
    assert structure(model.plan) == ["Conv"]
    assert set(model.params) == {"n0.conv.weight", "n0.conv.bias"}


# ---------------------------------------------------------------------------------------------------------------------
# Formats


def test_outputs_keep_their_accumulator_unless_told_otherwise() -> None:
    build = builder()
    y = build.conv(relu(build, build.conv("x", 4, 3)), 5, 1)
    model = prepared(build, y)
    assert model.plan.values[y] == jq.high_precision
    assert model.plan.owned == ("x", "n0.conv")
    (row,) = [r for r in model.plan.resolutions if (r.name, r.port) == (y, "output")]
    assert (row.requested, row.applied) == ("int8", "int32 (high precision)")
    assert "feeds only graph outputs" in row.reason
    model = prepared(build, y, high_precision_outputs=False)
    assert model.plan.spec(y) == dataclasses.replace(jq.int8(), rounding="half_up")  # as the rescale rounds


def test_high_precision_inside_is_refused() -> None:
    build = builder()
    y = build.conv("x", 4, 3)
    graph = build.graph(build.conv(y, 4, 1), size=8)
    config = jq.QConfig({"*": INT8.rules["*"], y: jq.Policy(output=jq.high_precision)})
    with pytest.raises(
        jq.QConfigError, match=r"node 'n0\.conv' \(Conv\): high precision is for a conv, linear or matrix product that"
    ):
        jq.prepare(graph, build.params, config, target=NASH)


def test_an_input_policy_inserts_a_requantize() -> None:
    build = builder()
    a, b = relu(build, build.conv("x", 4, 3)), relu(build, build.conv("x", 4, 1))
    z = build.add(ops.Mul(), (a, b), (4, 8, 8))
    config = jq.QConfig({"*": INT8.rules["*"], z: jq.Policy(input={"b": jq.int16()})})
    model = prepared(build, z, config=config)
    node = model.plan.graph.by_name[f"{z}.b"]
    assert isinstance(node.op, ops.Requantize)
    assert model.plan.spec(f"{z}.b").dtype == "int16"
    assert model.plan.graph.by_name[z].inputs == (model.plan.renamed[a], f"{z}.b")
    x = graphs.images(0, model.plan.graph)
    program = jq.lower(jq.calibrate(model, [x]))
    assert jq.run_with_taps(program, x)[f"{z}.b"].dtype == jnp.int16


def test_consumers_that_want_one_format_share_a_requantize() -> None:
    build = builder()
    x = relu(build, build.conv("x", 4, 3))
    first, second, third = (build.add(ops.Mul(), (x, x), (4, 8, 8)) for _ in range(3))
    total = add(build, add(build, first, second), third)
    wide, narrow = jq.Policy(input={"b": jq.int16()}), jq.Policy(input={"b": jq.int8(scale_form="pow2")})
    config = jq.QConfig({"*": INT8.rules["*"], first: wide, second: wide, third: narrow})
    model = prepared(build, total, config=config)
    assert [model.plan.graph.by_name[n].inputs[1] for n in (first, second, third)] == [f"{first}.b"] * 2 + [
        f"{third}.b"
    ]
    assert f"{second}.b" not in jq.calibrate(model, [graphs.images(0, model.plan.graph)]).qparams


def test_an_unknown_port_names_the_known_ones() -> None:
    build = builder()
    z = add(build, build.conv("x", 4, 3), "x")
    config = jq.QConfig({"*": INT8.rules["*"], z: jq.Policy(input={"c": jq.int16()})})
    with pytest.raises(jq.QConfigError, match=re.escape(f"node {z!r} (Add) has no input 'c'; it has a, b")):
        jq.prepare(build.graph(z, size=8), build.params, config, target=NASH)


def test_two_specs_for_a_shared_weight_are_refused() -> None:
    build = builder()
    op, weight = (
        ops.Conv(strides=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1)),
        build.array("w.weight", 4, 4, 1, 1),
    )
    a = build.add(op, ("x",), (4, 8, 8), weight=weight)
    b = build.add(op, (a,), (4, 8, 8), weight=weight)
    config = jq.QConfig({"*": INT8.rules["*"], b: jq.Policy(weight=jq.int4())})
    with pytest.raises(jq.QConfigError, match=r"weight 'w\.weight' is shared.*give one rule"):
        jq.prepare(build.graph(b, size=8), build.params, config, target=NASH)


def test_int16_on_both_sides_is_refused_by_name() -> None:
    build = builder()
    y = build.conv(relu(build, build.conv("x", 4, 3)), 4, 3)
    config = jq.QConfig({"*": jq.Policy(weight=jq.int16(), output=jq.int16())})
    with pytest.raises(jq.QConfigError, match="nash-e cannot run 2 nodes") as caught:
        jq.prepare(build.graph(y, size=8), build.params, config, target=NASH)
    for name in ("n0.conv", "n2.conv"):
        assert f"{name} (Conv): input and weight are both int16" in str(caught.value)


@pytest.mark.parametrize(
    ("kernel", "channels", "message"),
    [(33, 1, r"kernel \(33, 33\) is larger than 31"), (31, 70, "67270 products a sum are more than 65535")],
)
def test_kernels_beyond_the_documented_limits_are_refused(kernel: int, channels: int, message: str) -> None:
    build = builder(size=40, channels=channels)
    y = build.conv("x", 1, kernel)
    graph = build.graph(y, size=40)
    with pytest.raises(jq.QConfigError, match=rf"{y} \(Conv\): {message}"):
        jq.prepare(graph, build.params, INT8, target=NASH)
    jq.prepare(graph, build.params, jq.QConfig({"*": None}), target=NASH)  # float has no such limit


def test_nash_p_has_fake_quant_and_no_integers() -> None:
    build = builder()
    graph = build.graph(relu(build, build.conv("x", 4, 3)), size=8)
    x = graphs.images(0, graph)
    outputs = []
    for target in (NASH, jq.targets.NASH_P):
        model = jq.prepare(graph, build.params, INT8, target=target)
        model = jq.calibrate(model, [x])
        outputs.append(jq.apply(model, x))
    np.testing.assert_array_equal(*outputs)
    with pytest.raises(jq.LoweringError, match=r"nash-p: its integer post-processing is not public.*NASH_E"):
        jq.lower(model)
    with pytest.raises(jq.LoweringError, match="nash-p"):
        jq.apply(model, x, mode="bit_true")


def test_a_float_branch_is_left_out_of_the_integers() -> None:
    build = builder()
    x = relu(build, build.conv("x", 4, 3))
    main = build.conv(x, 5, 1)
    build.params |= {
        "aux.weight": build.params[build.array("w", 2, 4, 1, 1)],
        "aux.bias": build.params[build.array("b", 2)],
    }
    op = ops.Conv(strides=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1))
    build.nodes.append(jq.Node("aux.conv", op, (x,), jq.FrozenMap({"weight": "aux.weight", "bias": "aux.bias"})))
    build.shapes["aux.conv"] = (2, 8, 8)
    del build.params["w"], build.params["b"]
    config = jq.QConfig({"*": INT8.rules["*"], "aux.*": None})
    model = prepared(build, main, "aux.conv", config=config)
    images = graphs.images(0, model.plan.graph)
    model = jq.calibrate(model, [images])
    assert "aux.weight" not in model.qparams
    assert model.plan.values["aux.conv"] is None
    with pytest.raises(jq.LoweringError, match=r"node 'aux\.conv' \(Conv\): 'aux\.conv' is float.*outputs="):
        jq.lower(model)
    program = jq.lower(model, outputs=[main])
    assert "aux.conv" not in program.graph.values
    assert jq.run(program, images).shape == (3, 5, 8, 8)
    with pytest.raises(jq.LoweringError, match="'nothing' is no output of the graph; outputs: "):
        jq.lower(model, outputs=["nothing"])
    exact = jq.apply(model, images, mode="fake_quant")
    assert [y.shape for y in exact] == [(3, 5, 8, 8), (3, 2, 8, 8)]


def test_nothing_lowers_before_calibration() -> None:
    build = builder()
    model = prepared(build, relu(build, build.conv("x", 4, 3)))
    x = graphs.images(0, model.plan.graph)
    for call in (
        lambda: jq.lower(model),
        lambda: jq.apply(model, x),
        lambda: jq.apply(model, x, mode="bit_true"),
    ):
        with pytest.raises(jq.CalibrationError, match=r"no scale for 'x', 'n0.conv.weight'; call jq\.calibrate"):
            call()
    with pytest.raises(jq.CalibrationError, match="must be a mapping"):
        jq.lower(model.replace(qparams=None))


def test_a_zero_channel_survives_folding_and_lowering() -> None:
    """gamma = 0 makes a channel a constant: the smallest weight scale, and the bias still reaches the output."""
    build = builder()
    y = relu(build, build.batch_norm(build.conv("x", 4, 3)))
    build.params["n1.batchnorm.weight"] = build.params["n1.batchnorm.weight"].at[1].set(0.0)
    model = prepared(build, y, high_precision_outputs=False)
    x = graphs.images(0, model.plan.graph)
    model = jq.calibrate(model, [x])
    program = jq.lower(model)
    got, want = np.asarray(jq.run(program, x))[:, 1], np.maximum(build.params["n1.batchnorm.bias"][1], 0)
    assert np.abs(got - want).max() <= 0.51 * float(model.qparams["n0.conv"]) + 1e-6
