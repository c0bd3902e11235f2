"""Shifted relus: the function in float stays, the steps behind a relu are halved, and the integers are as ever."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from support import graphs
from support.compilations import counted
from support.properties import check_reference

import jquant as jq
from jquant import ops, ptq
from jquant.meanings.fake_quant import fake_quant_weight

NASH = jq.targets.NASH_E
PAD = ops.Pad(padding=((0, 0), (0, 0), (0, 0), (1, 1)), value=-1.0)
INT8 = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8(observer=jq.observers.min_max()))})


def calibrated(build, *outputs, qconfig=INT8, size=8):
    graph = build.graph(*outputs, size=size)
    data = [graphs.images(i, graph, batch=4) for i in range(2)]
    return jq.calibrate(jq.prepare(graph, build.params, qconfig, target=NASH), data), data


def start(channels=3, seed=0):
    build = graphs.Builder(seed)
    build.shapes["x"] = (channels, 8, 8)
    return build


def relu(build, x, op=ops.Relu):
    return build.add(op(), (x,), build.shapes[x])


def linear(build, x, inputs, **options):
    weight, bias = build.array("head.weight", 5, inputs), build.array("head.bias", 5)
    return build.add(ops.Linear(), (x,), (5,), weight=weight, bias=bias, **options)


def reasons(model, **options):
    return {shift.name: shift.reason for shift in ptq.find_shifts(model, **options).all}


def with_readers_on_grid(model, **options):
    """The model as it was, the weights on their grid that a shift puts there."""
    by_name = model.plan.graph.by_name
    readers = {name for shift in ptq.find_shifts(model, **options).possible for name in shift.readers}
    keys = [by_name[name].params["weight"] for name in readers]
    params, qparams = {}, ptq.shift_relus(model, **options).qparams  # scales of dead channels are raised
    for key in keys:
        rounded = fake_quant_weight(key, model.plan, model.params, qparams)
        params[key] = rounded.transpose(model.plan.turned[key]) if key in model.plan.turned else rounded
    return model.replace(params={**model.params, **params})


@pytest.mark.parametrize("op", [ops.Relu, ops.Relu6])
def test_two_layers_are_what_numpy_makes_of_unsigned_values(op):
    build = start()
    first = build.conv("x", 6, 1)
    build.params[f"{first}.weight"] *= 8
    x = relu(build, first, op)
    model, data = calibrated(build, build.conv(x, 4, 1))
    model = model.replace(qparams=model.qparams | {first: jnp.float32(0.0625)})  # relu6 clips some, saturation others
    shifted = ptq.shift_relus(model)
    step = np.float32(0.0625 * 127 / 255)

    def grid(key):
        weight, scale = np.asarray(model.params[key])[:, :, 0, 0], np.asarray(model.qparams[key])
        return np.float64(np.clip(np.rint(weight / scale[:, None]), -128, 127)) * scale[:, None]

    scale = np.float64(model.qparams["x"])
    pixels = np.clip(np.rint(np.asarray(data[0], np.float64) / scale), -128, 127) * scale

    def layer(x, name):
        bias = np.asarray(build.params[f"{name}.bias"], np.float64)
        return np.einsum("nchw,oc->nohw", x, grid(f"{name}.weight")) + bias[:, None, None]

    y = np.clip(layer(pixels, "n0.conv"), 0, 6 if op is ops.Relu6 else None)
    unsigned = np.clip(np.rint(y / step), 0, 255) * step
    assert np.mean(y > 127.5 * step) > 0
    assert np.mean(y == 0) > 0.1
    wanted = layer(unsigned, "n2.conv")
    got = np.asarray(jq.apply(shifted, data[0]))
    # Bias and output are rounded to an LSB of the accumulator; a value near a tie may go to the other side.
    lsb = step * np.asarray(model.qparams["n2.conv.weight"])[:, None, None]
    apart = np.abs(got - wanted)
    assert np.mean(apart > 1.01 * lsb) < 0.05
    assert np.all(apart <= 1.01 * lsb + step * np.abs(grid("n2.conv.weight")).max())
    integers = np.asarray(jq.run(jq.lower(shifted), data[0]))
    np.testing.assert_array_equal(integers, np.asarray(jq.apply(shifted, data[0], mode="bit_true")))


def with_more_relus(graph):
    """Every other function of one operand is a relu, and most layers without one have it behind them."""
    nodes, renamed = [], {}
    for i, node in enumerate(graph.nodes):
        made = replace(node, inputs=tuple(renamed.get(value, value) for value in node.inputs))
        if isinstance(node.op, ops.Sigmoid | ops.LeakyRelu | ops.PRelu):
            made = replace(made, op=ops.Relu(), params=jq.FrozenMap())
        nodes.append(made)
        if isinstance(node.op, ops.Conv | ops.BatchNorm) and i % 3:
            nodes.append(jq.Node(f"{node.name}.relu", ops.Relu6() if i % 2 else ops.Relu(), (node.name,)))
            renamed[node.name] = f"{node.name}.relu"
    return replace(graph, nodes=tuple(nodes))


@pytest.mark.parametrize("pads", [False, True])
@settings(max_examples=12)
@given(drawn=graphs.networks())
def test_any_network_computes_what_it_did(pads, drawn):
    graph, params = with_more_relus(drawn[0]), drawn[1]
    data = [graphs.images(i, graph, batch=2) for i in range(2)]
    model = jq.calibrate(jq.prepare(graph, params, INT8, target=NASH), data)
    shifted, before = ptq.shift_relus(model, pads=pads), with_readers_on_grid(model, pads=pads)
    wanted = np.asarray(jq.apply(before, data[0], mode="float"))
    got = np.asarray(jq.apply(shifted, data[0], mode="float"))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * max(1.0, float(np.abs(wanted).max())))
    program = jq.lower(shifted)
    check_reference(program, (data[1],))
    np.testing.assert_array_equal(jq.run(program, data[1]), jq.apply(shifted, data[1], mode="bit_true"))
    assert not ptq.find_shifts(shifted, pads=pads).possible  # nothing is left for a second call


def every_way(seed=1):
    """A stem, a pool, data movement, a padded convolution, a residual and a head: all of them can be shifted."""
    build = start(seed=seed)
    x = relu(build, build.conv("x", 8, 3))
    x = build.pool(ops.MaxPool, x, 2, 2, 0)
    y = relu(build, build.conv(x, 8, 3, groups=8), ops.Relu6)
    y = build.conv(y, 8, 1, bias=False)
    x = relu(build, build.add(ops.Add(), (y, x), build.shapes[y]))
    x = build.add(ops.Pad(padding=((0, 0), (0, 0), (1, 0), (0, 1))), (x,), (8, 5, 5))
    x = relu(build, build.conv(x, 6, 1))
    x = build.add(ops.Flatten(), (x,), (6 * 25,))
    return calibrated(build, linear(build, x, 6 * 25))


def test_a_shift_goes_through_pools_padding_and_residuals():
    model, data = every_way()
    found = ptq.find_shifts(model, pads=True)
    assert len(found.possible) == len(found.all) == 4
    assert len(found.padded) == 1
    assert found.padded[0] in str(found)
    shifted = ptq.shift_relus(model, pads=True)
    graph = shifted.plan.graph
    kinds = [type(node.op).__name__ for node in graph.nodes]
    assert kinds.count("Clamp") == 4
    assert kinds.count("Pad") == 2
    layers = [node for node in graph.nodes if isinstance(node.op, ops.Conv)]
    assert all(node.op.activation == "none" for node in layers)
    assert all(node.op.padding == ((0, 0), (0, 0)) for node in layers[1:])
    wanted = jq.apply(with_readers_on_grid(model, pads=True), data[0], mode="float")
    np.testing.assert_allclose(jq.apply(shifted, data[0], mode="float"), wanted, rtol=0, atol=1e-4)
    program = jq.lower(shifted)
    check_reference(program, (data[0],))
    for shift in found.possible:
        spec = shifted.plan.spec(f"{shift.name}.clamp")
        scale = float(jq.lower(model).scales[shift.name])
        assert spec.fixed_scale == pytest.approx(scale * 127 / 255, rel=1e-6)
        lowest = float(np.asarray(program.constants[f"{shift.name}.clamp"]["lower"]))
        assert lowest == -128  # a bound beyond the range: the saturation is the relu


def error(model, reference, x):
    wanted = np.float64(jq.apply(reference, x, mode="float"))
    return float(np.sum((np.float64(jq.apply(model, x)) - wanted) ** 2) / np.sum(wanted**2))


def test_the_error_of_values_falls_to_a_quarter():
    model, data = every_way()
    before = with_readers_on_grid(model, pads=True)  # the weights' error is not that of values
    plain = jq.apply(before, data[0])
    assert plain.shape == (4, 5)
    noise = [
        error(each, before, data[0]) for each in (before, ptq.shift_relus(model), ptq.shift_relus(model, pads=True))
    ]
    assert noise[2] < noise[1] < noise[0]
    assert noise[2] < 0.5 * noise[0]


def test_a_second_calibration_and_training_leave_the_scales_alone():
    model, data = every_way()
    shifted = ptq.shift_relus(model, pads=True)
    again = jq.calibrate(shifted, data)
    names = [shift.name for shift in ptq.find_shifts(model, pads=True).possible]
    assert not set(names) & set(again.qparams)
    np.testing.assert_array_equal(jq.lower(again).scales[names[0]], jq.lower(shifted).scales[names[0]])


def test_a_shifted_model_goes_into_files_and_out(tmp_path):
    model, data = every_way()
    shifted = ptq.shift_relus(model, pads=True)
    jq.plan.save(tmp_path / "net.jqm", shifted)
    loaded = jq.plan.load(tmp_path / "net.jqm")
    wanted = jq.run(jq.lower(shifted), data[0])
    np.testing.assert_array_equal(jq.run(jq.lower(loaded), data[0]), wanted)
    jq.save(tmp_path / "net.jqp", jq.lower(shifted))
    np.testing.assert_array_equal(jq.run(jq.load(tmp_path / "net.jqp"), data[0]), wanted)
    name = ptq.find_shifts(model, pads=True).possible[0].name
    assert f"{name}.clamp" in str(jq.describe(shifted))
    assert "shifted" in str(jq.explain(shifted))
    rows = {row.name: row.sqnr for row in jq.analysis.compare(shifted, data[0], "float", "bit_true").rows}
    assert rows[f"{name}.clamp"] > 20


def test_bias_correction_behind_it_changes_nothing_of_a_reader():
    model, data = every_way()
    shifted = ptq.shift_relus(model, pads=True)
    corrected = ptq.correct_bias(shifted, data)
    key = shifted.plan.graph.by_name[ptq.find_shifts(model, pads=True).possible[0].readers[0]].params["bias"]
    np.testing.assert_array_equal(corrected.params[key], shifted.params[key])


# ---------------------------------------------------------------------------------------------------------------------
# What stays as it is, and why


def test_a_padded_reader_needs_leave_to_pad():
    build = start()
    first = build.conv("x", 4, 1)
    second = build.conv(relu(build, first), 4, 3)
    model, _ = calibrated(build, second)
    assert reasons(model) == {first: f"{second} pads with zeros (`pads` allows a node for that)"}
    assert reasons(model, pads=True) == {first: ""}
    assert ptq.shift_relus(model) is model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda b, x: b.add(ops.Sigmoid(), (x,), b.shapes[x]), "(Sigmoid) has no bias that could take up the constant"),
        (lambda b, x: x, "is int32"),
        (lambda b, x: b.add(ops.Mul(), (x, x), b.shapes[x]), "(Mul) has no bias"),
        (lambda b, x: b.conv(b.add(PAD, (x,), (4, 8, 10)), 4, 1), "pads with -1"),
        (lambda b, x: b.conv(b.pool(ops.AvgPool, x, 3, 1, 1), 4, 1), "(AvgPool) has no bias"),
    ],
)
def test_other_readers_are_refused_with_the_reason(make, reason):
    build = start()
    x = relu(build, build.conv("x", 4, 1))
    model, _ = calibrated(build, make(build, x))
    (found,) = ptq.find_shifts(model).all
    assert reason in found.reason
    assert reason in str(ptq.find_shifts(model))
    assert ptq.shift_relus(model) is model


def test_a_mean_of_mostly_zeros_keeps_its_finer_scale():
    build = start()
    first = build.conv("x", 4, 1)
    x = build.add(ops.Mean(axes=(2, 3)), (relu(build, first),), (4,))
    model, _ = calibrated(build, linear(build, x, 4))
    mean = next(n.name for n in model.plan.graph.nodes if isinstance(n.op, ops.Mean))
    small = model.replace(qparams=model.qparams | {mean: model.qparams[first] / 4})
    assert reasons(small) == {first: f"{mean} (Mean) has a range below the constant"}
    large = model.replace(qparams=model.qparams | {mean: model.qparams[first]})
    assert reasons(large) == {first: ""}


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (jq.int16(), "is int16: a shift would win nothing that counts"),
        (jq.QuantSpec(dtype="int8", fixed_scale=0.05), "has the scale of another value, or a fixed one"),
    ],
)
def test_other_formats_stay_as_they_are(spec, reason):
    build = start()
    x = relu(build, build.conv("x", 4, 1))
    rules = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8()), x: jq.Policy(output=spec)})
    model, _ = calibrated(build, build.conv(x, 4, 1), qconfig=rules)
    (found,) = ptq.find_shifts(model).all
    assert found.reason.endswith(reason)


def test_weights_that_are_trained_as_their_transposition():
    rng = np.random.default_rng(0)
    weights = {
        name: jnp.asarray(rng.normal(size=size), jnp.float32) for name, size in {"a": (6, 8), "b": (8, 5)}.items()
    }
    x = jnp.asarray(rng.normal(size=(16, 6)), jnp.float32)
    graph, params = jq.trace(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], weights, x)
    model = jq.calibrate(jq.prepare(graph, params, INT8, target=NASH), [x])
    plain = ptq.shift_relus(model)
    turned = jq.FrozenMap({node.params["weight"]: (1, 0) for node in model.plan.graph.nodes})
    model = model.replace(plan=replace(model.plan, turned=turned))
    shifted = ptq.shift_relus(model)
    for key, param in plain.params.items():
        np.testing.assert_array_equal(shifted.params[key], param)
    assert len(shifted.plan.graph.nodes) == len(model.plan.graph.nodes) + 1
    wanted = jq.apply(with_readers_on_grid(model), x, mode="float")
    np.testing.assert_allclose(jq.apply(shifted, x, mode="float"), wanted, rtol=0, atol=1e-4)
    check_reference(jq.lower(shifted), (x,))


def test_a_dead_channel_still_holds_what_is_added_to_it():
    """Its weight scale is as small as the fused addend allows; half the step of the operand would be too small."""
    build = start()
    first = build.conv("x", 4, 1)
    y = build.conv(relu(build, first), 3, 1)
    model, data = calibrated(build, build.conv(relu(build, build.add(ops.Add(), (y, "x"), build.shapes[y])), 4, 1))
    key = f"{y}.weight"
    scales = model.qparams[key].at[0].set(2.0**-23)
    model = jq.training.raise_collapsed_scales(model.replace(qparams=model.qparams | {key: scales}))
    assert model.qparams[key][0] > 2.0**-23
    shifted = ptq.shift_relus(model)
    assert shifted.qparams[key][0] > 1.9 * model.qparams[key][0]
    check_reference(jq.lower(shifted), (data[0],))


def test_names_that_are_taken_already():
    build = start()
    first = build.conv("x", 6, 1)
    x = relu(build, first)
    build.nodes.append(
        jq.Node(
            f"{first}.clamp",
            ops.Conv(strides=(1, 1), padding=((0, 0),) * 2, dilation=(1, 1)),
            (x,),
            jq.FrozenMap({"weight": build.array("second.weight", 4, 6, 1, 1)}),
        )
    )
    build.params[f"{first}.clamp.bias"] = jnp.ones(4)
    add = ops.Conv(strides=(1, 1), padding=((0, 0),) * 2, dilation=(1, 1))
    last = {"weight": build.array("third.weight", 4, 4, 1, 1), "bias": f"{first}.clamp.bias"}
    build.nodes.append(jq.Node("last", add, (f"{first}.clamp",), jq.FrozenMap(last)))
    model, data = calibrated(build, "last")
    shifted = ptq.shift_relus(model)
    assert f"{first}.clamp.2" in shifted.plan.graph.by_name
    assert shifted.plan.graph.by_name[f"{first}.clamp"].params["bias"] == f"{first}.clamp.bias.2"
    wanted = jq.apply(with_readers_on_grid(model), data[0], mode="float")
    np.testing.assert_allclose(jq.apply(shifted, data[0], mode="float"), wanted, rtol=0, atol=1e-4)


def test_it_compiles_nothing():
    model, _ = every_way()
    ptq.shift_relus(model, pads=True)
    model, _ = every_way(seed=2)
    with counted() as found:
        ptq.shift_relus(model, pads=True)
    assert not found


def test_a_power_of_two_is_halved():
    build = start()
    first = build.conv("x", 4, 1)
    rules = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8(scale_form="pow2"))})
    model, data = calibrated(build, build.conv(relu(build, first), 4, 1), qconfig=rules)
    shifted = ptq.shift_relus(model)
    scales = [float(jq.lower(each).scales[first]) for each in (model, shifted)]
    assert scales[1] == scales[0] / 2
    check_reference(jq.lower(shifted), (data[0],))


def test_an_output_that_others_read_too_is_left_alone():
    build = start()
    x = relu(build, build.conv("x", 4, 1))
    model, _ = calibrated(build, build.conv(x, 4, 1), x)
    (found,) = ptq.find_shifts(model).all
    assert "is an output of the graph" in found.reason


def test_a_shared_weight_or_bias_is_left_alone():
    build = start()
    x = relu(build, build.conv("x", 4, 1))
    key = build.array("shared", 4, 4, 1, 1)
    op = ops.Conv(strides=(1, 1), padding=((0, 0),) * 2, dilation=(1, 1))
    y = build.add(op, (x,), (4, 8, 8), weight=key)
    model, _ = calibrated(build, build.add(op, (y,), (4, 8, 8), weight=key))
    (found,) = ptq.find_shifts(model).all
    assert "shares its weight" in found.reason


def test_it_needs_scales():
    build = start()
    graph = build.graph(build.conv(relu(build, build.conv("x", 4, 1)), 4, 1), size=8)
    with pytest.raises(jq.CalibrationError, match="no scale for"):
        ptq.shift_relus(jq.prepare(graph, build.params, INT8, target=NASH))
