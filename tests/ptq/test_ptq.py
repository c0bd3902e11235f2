"""Post-training quantization: each method keeps the function that it should, and mends a fault put in on purpose."""

import itertools
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support import graphs

import jquant as jq
from jquant import ops, ptq
from jquant.graph.operator import eval_float
from jquant.meanings.fake_quant import fake_quant_weights
from jquant.ptq import channels, rounding
from jquant.quantizers import lsq_plus

NASH = jq.targets.NASH_E


def prepared(build, output, weight=jq.int4, **spec):
    graph = build.graph(output, size=8)
    policy = jq.Policy(weight=weight(**spec), output=jq.int8(observer=jq.observers.min_max()))
    model = jq.prepare(graph, build.params, jq.QConfig({"*": policy}), target=NASH)
    return model, [graphs.images(i, graph, batch=8) for i in range(2)]


def head(build, x):
    c = build.shapes[x][0]
    x = build.add(ops.Mean(axes=(2, 3)), (x,), (c,))
    return build.add(
        ops.Linear(), (x,), (5,), weight=build.array("head.weight", 5, c), bias=build.array("head.bias", 5)
    )


def relu(build, x):
    return build.add(ops.Relu(), (x,), build.shapes[x])


def chain(seed=3, **spec):
    """conv, depthwise, grouped, transposed, prelu, pool, linear."""
    build = graphs.Builder(seed)
    build.shapes["x"] = (3, 8, 8)
    x = relu(build, build.conv("x", 8, 3))
    x = relu(build, build.conv(x, 8, 3, groups=8))
    x = relu(build, build.conv(x, 6, 3, stride=2, groups=2))
    key = f"n{len(build.nodes)}.convtranspose"
    op = ops.ConvTranspose(strides=(2, 2), padding=((0, 0),) * 2, output_padding=(0, 0), dilation=(1, 1), groups=2)
    roles = {"weight": build.array(f"{key}.weight", 6, 4, 2, 2), "bias": build.array(f"{key}.bias", 8)}
    x = build.prelu(build.add(op, (x,), (8, 8, 8), **roles))
    x = build.pool(ops.MaxPool, x, 2, 2, 0)
    return prepared(build, head(build, x), **spec)


def noise(model, x, reference):
    """Power of the error of fake-quant over that of the float output."""
    wanted = jq.apply(model.replace(params=reference, qparams={}), x, mode="float")
    return float(jnp.sum((jq.apply(model, x) - wanted) ** 2) / jnp.sum(wanted**2))


def layer_of(plan, name):
    return next((node, op) for node, op in channels.layers(plan.graph) if node.name == name)


# ---------------------------------------------------------------------------------------------------------------------
# Equalization


def test_equalization_keeps_the_function_and_evens_the_ranges():
    model, (x, _) = chain()
    new = ptq.equalize(model)
    pairs = ptq.find_pairs(model)
    assert len(pairs.equalizable) == 4
    want = jq.apply(model, x, mode="float")
    # Every weight moves by at most two roundings a sweep; the bound is loose for five layers of them.
    np.testing.assert_allclose(
        jq.apply(new, x, mode="float"),
        want,
        rtol=1e-4,
        atol=1e-5 * np.abs(want).max(),
    )
    for pair in pairs.equalizable:
        (first, first_op), (second, second_op) = layer_of(model.plan, pair.first), layer_of(model.plan, pair.second)
        made = channels.output_ranges(first_op, new.params[first.params["weight"]])
        read = channels.input_ranges(second_op, new.params[second.params["weight"]])
        np.testing.assert_allclose(made, read, rtol=2e-2)  # neighbours in the chain move them once more
    assert any(not np.array_equal(new.params[k], model.params[k]) for k in model.params)


def faulty(model, factors):
    """The same function, its channels rescaled between the first two layers."""
    pair = ptq.find_pairs(model).equalizable[0]
    (first, _), (second, second_op) = layer_of(model.plan, pair.first), layer_of(model.plan, pair.second)
    weight, bias, after = first.params["weight"], first.params["bias"], second.params["weight"]
    moved = {
        weight: model.params[weight] * factors[:, None, None, None],
        bias: model.params[bias] * factors,
        after: channels.scale_inputs(second_op, model.params[after], 1 / factors),
    }
    return model.replace(params={**model.params, **moved})


@pytest.mark.parametrize("groups", [1, 8])
def test_rescaled_channels_collapse_under_min_max_and_equalization_restores_them(groups):
    build = graphs.Builder(5)
    build.shapes["x"] = (3, 8, 8)
    x = relu(build, build.conv("x", 8, 3))
    model, data = prepared(build, head(build, build.conv(x, 8, 3, groups=groups)), weight=jq.int8)
    factors = jnp.asarray(np.random.default_rng(0).choice([0.01, 1.0, 100.0], 8), jnp.float32)
    broken = faulty(model, factors)
    outputs = (jq.apply(m, data[0], mode="float") for m in (broken, model))
    np.testing.assert_allclose(*outputs, rtol=1e-3, atol=1e-4)

    def error(changed):
        return noise(jq.calibrate(changed, data), data[0], model.params)

    restored, wanted = ptq.equalize(broken), ptq.equalize(model)
    for key, value in wanted.params.items():
        np.testing.assert_allclose(restored.params[key], value, rtol=1e-5, atol=1e-7 * float(np.abs(value).max()))
    assert error(broken) > 4 * error(wanted)
    np.testing.assert_allclose(error(restored), error(wanted), rtol=0.05)  # a weight on a tie may round the other way
    powers = jnp.asarray(np.random.default_rng(0).choice([2.0**-7, 1.0, 2.0**7], 8), jnp.float32)
    exactly = ptq.equalize(faulty(model, powers))  # no rounding in the fault: every bit comes back
    for key, value in wanted.params.items():
        np.testing.assert_array_equal(exactly.params[key], value)


def test_a_dead_channel_stays_as_it_is():
    build = graphs.Builder(6)
    build.shapes["x"] = (3, 8, 8)
    x = relu(build, build.conv("x", 4, 3))
    model, _ = prepared(build, head(build, x))
    weight = next(op for op in model.plan.graph.nodes if isinstance(op.op, ops.Conv)).params["weight"]
    params = model.params | {weight: model.params[weight].at[1].set(0.0)}
    new = ptq.equalize(model.replace(params=params))
    assert all(np.isfinite(v).all() for v in new.params.values())
    np.testing.assert_array_equal(new.params["head.weight"][:, 1], params["head.weight"][:, 1])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("relu6", "relu6 clips at 6"),
        ("sigmoid", r"\(Sigmoid\) is not homogeneous"),
        ("add", "fused addend"),
        ("fixed", "has a fixed scale"),
        ("read twice", "several readers"),
        ("shared", "its weight is shared"),
        ("pad", r"\(Pad\) is not homogeneous"),
    ],
)
def test_what_cannot_be_equalized_says_why(kind, reason):
    build = graphs.Builder(7)
    build.shapes["x"] = (4, 8, 8)
    y = x = build.conv("x", 4, 3)
    match kind:
        case "relu6":
            y = build.add(ops.Relu6(), (x,), (4, 8, 8))
        case "sigmoid":
            y = build.add(ops.Sigmoid(), (x,), (4, 8, 8))
        case "add":
            y = build.add(ops.Add(), (x, "x"), (4, 8, 8))
        case "pad":
            y = build.add(ops.Pad(padding=((0, 0), (0, 0), (1, 1), (1, 1)), value=1.0), (x,), (4, 10, 10))
    z = build.conv(y, 4, 3)
    if kind == "shared":
        node = build.nodes[-1]
        build.nodes[-1] = replace(node, params=jq.FrozenMap(dict(node.params) | {"weight": f"{x}.weight"}))
    if kind == "read twice":
        z = build.add(ops.Mul(), (z, x), (4, 8, 8))
    graph = build.graph(head(build, z), size=8)
    rules = {"*": jq.Policy(weight=jq.int8(), output=jq.int8())}
    rules |= {x: jq.Policy(output=jq.int8(scale=0.1))} if kind == "fixed" else {}
    model = jq.prepare(graph, build.params, jq.QConfig(rules), target=NASH)
    pairs = ptq.find_pairs(model)
    with pytest.raises(AssertionError):
        assert (x, z) in [(p.first, p.second) for p in pairs.equalizable]
    assert pytest.importorskip("re").search(reason, next(p.reason for p in pairs.all if p.first == x))
    assert x in str(pairs)
    first = next(node for node in model.plan.graph.nodes if node.name == x).params["weight"]
    if kind != "shared":
        np.testing.assert_array_equal(ptq.equalize(model).params[first], model.params[first])


# ---------------------------------------------------------------------------------------------------------------------
# Weight scales


@pytest.mark.parametrize("spec", [{}, {"axis": "out"}, {"axis": "out", "scale_form": "pow2"}], ids=str)
def test_the_searched_scale_has_the_smallest_error(spec):
    model, data = chain(**spec)
    model = jq.calibrate(model, data[:1])
    found = ptq.search_weight_scales(model)
    assert {k for k in model.qparams if not np.array_equal(model.qparams[k], found.qparams[k])} <= set(
        model.plan.weights
    )

    def errors(key, scales):
        weight = np.float64(model.params[key])
        axis = model.plan.weight_axis.get(key)
        weight = weight.reshape(1, -1) if axis is None else np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
        scales = np.float64(scales).reshape(-1, 1)
        if spec.get("scale_form") == "pow2":
            scales = 2.0 ** np.ceil(np.log2(scales))
        return np.sum((np.clip(np.rint(weight / scales), -8, 7) * scales - weight) ** 2, axis=1)

    for key in model.plan.weights:
        best = errors(key, found.qparams[key])
        assert found.qparams[key].shape == model.qparams[key].shape
        assert np.all(best <= errors(key, model.qparams[key]) * (1 + 1e-5))
        for share in np.linspace(0.05, 1.2, 24):  # all of them among the candidates, or coarser
            assert np.all(best <= errors(key, model.qparams[key] * np.float32(share)) * 1.02 + 1e-9)
    collapsed = model.qparams | {key: model.qparams[key] * 100 for key in model.plan.weights}
    again = ptq.search_weight_scales(model.replace(qparams=collapsed))
    assert noise(again, data[0], model.params) < noise(model.replace(qparams=collapsed), data[0], model.params) / 2
    for key in model.plan.weights:
        assert np.all(errors(key, again.qparams[key]) <= errors(key, found.qparams[key]) * 1.01 + 1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Bias correction


def expected_correction(model, node, op, x):
    """E[(W - W_q) x] of a conv or linear layer in float64, by torch: x [N, *S, C] or [N, C], real."""
    weight = np.asarray(model.params[node.params["weight"]])
    scale = np.asarray(model.qparams[node.params["weight"]]).reshape(-1, *[1] * (weight.ndim - 1))
    rounded = np.clip(np.rint(weight / scale), -8, 7)  # the quotient in float32: the largest weights are ties, 7.5
    lost = torch.from_numpy(np.float64(weight) - np.float64(rounded) * np.float64(scale))
    x = torch.from_numpy(np.float64(x))
    if isinstance(op, ops.Linear):
        return torch.nn.functional.linear(x, lost).mean(0).numpy()
    padded = torch.nn.functional.pad(x.movedim(-1, 1), [p for pair in reversed(op.padding) for p in pair])
    return torch.nn.functional.conv2d(padded, lost, stride=op.strides, groups=op.groups).mean((0, 2, 3)).numpy()


def test_bias_correction_adds_the_mean_that_rounding_the_weights_takes():
    model, data = chain(axis="out")
    model = jq.calibrate(model, data)
    data = [data[0], data[1][:3]]  # batches count by their sizes
    new = ptq.correct_bias(model, data)
    changed = {key for key in model.params if not np.array_equal(model.params[key], new.params[key])}
    assert changed == {node.params["bias"] for node, _ in channels.layers(model.plan.graph)}
    _, values = jq.apply_with_taps(model.replace(qparams={}), jnp.concatenate(data), mode="float")
    values["x"] = jnp.concatenate(data)
    checked = 0
    for node, op in channels.layers(model.plan.graph):
        if isinstance(op, ops.ConvTranspose):
            continue
        want = expected_correction(model, node, op, values[node.inputs[0]])
        bias = np.float64(model.params[node.params["bias"]])
        got = np.float64(new.params[node.params["bias"]]) - bias
        # Sums of a few hundred float32 products, and the addition to the bias.
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max() + 2**-23 * np.abs(bias).max())
        checked += 1
    assert checked == 4


def test_bias_correction_does_not_spread_what_an_outlier_layer_saturates():
    model, plain = chain(weight=jq.int8, axis="out")
    clipped = jq.calibrate(model, plain)  # scales for the bulk
    data = [plain[0].at[0, :, 4, 4].multiply(60.0), plain[1]]  # one pixel in a thousand is far beyond them
    narrow, wide = (
        ptq.correct_bias(model.replace(qparams=q), data).params
        for q in (clipped.qparams, jq.calibrate(model, data).qparams)
    )
    for key in model.params:  # what the values lose makes no difference
        np.testing.assert_array_equal(wide[key], narrow[key])
    on_grid = model.params | fake_quant_weights(model.plan, model.params, clipped.qparams)
    same = ptq.correct_bias(model.replace(params=on_grid, qparams=clipped.qparams), data)
    for key in model.params:  # nothing was rounded: no bias moves, however much is saturated
        np.testing.assert_array_equal(same.params[key], on_grid[key])
    x = jnp.concatenate(data)
    wanted = jq.apply(model, x, mode="float").mean(0)
    unrounded = replace(model.plan, weights=jq.FrozenMap({}))
    saturated = jq.apply(
        jq.Model(unrounded, model.params, {name: clipped.qparams[name] for name in model.plan.owned}), x
    ).mean(0)
    lost = np.abs(saturated - wanted)
    assert lost.max() > 0.02 * np.abs(wanted).max()
    before, after = (
        np.abs(jq.apply(model.replace(params=p, qparams=clipped.qparams), x).mean(0) - wanted)
        for p in (model.params, narrow)
    )
    assert np.all(after <= before + 0.01 * np.abs(wanted).max())  # no mean moves away from float


def test_other_steps_do_not_see_the_scales_of_values():
    """The rounding that is learned and the scales that are found answer to the weights alone."""
    model, data = chain(axis="out")
    model = jq.calibrate(model, data)
    clipped = model.qparams | {name: model.qparams[name] / 12 for name in model.plan.owned}
    found, narrow = (ptq.search_weight_scales(model.replace(qparams=q)).qparams for q in (model.qparams, clipped))
    learned, again = (ptq.adaround(model.replace(qparams=q), data[:1], steps=2) for q in (model.qparams, clipped))
    for key in model.plan.weights:
        np.testing.assert_array_equal(found[key], narrow[key])
        np.testing.assert_array_equal(learned.params[key], again.params[key])


def test_bias_correction_after_adaround_compares_with_the_weights_from_before():
    model, data = chain(axis="out")
    model = jq.calibrate(model, data)
    moved = model.params | fake_quant_weights(model.plan, model.params, model.qparams)
    same = ptq.correct_bias(model.replace(params=moved), data)
    mended = ptq.correct_bias(model.replace(params=moved), data, reference=model)
    wanted = ptq.correct_bias(model, data)
    for node, _ in channels.layers(model.plan.graph):
        key = node.params["bias"]
        np.testing.assert_array_equal(same.params[key], model.params[key])
        np.testing.assert_array_equal(mended.params[key], wanted.params[key])


def test_bias_correction_leaves_float_alone_and_refuses_nothing_to_measure():
    model, data = chain(axis="out")
    nothing = replace(
        model.plan,
        values=jq.FrozenMap(dict.fromkeys(model.plan.values)),
        weights=jq.FrozenMap({}),
        owned=(),
    )
    same = ptq.correct_bias(jq.Model(nothing, model.params, {}), data)
    for name, value in model.params.items():
        np.testing.assert_array_equal(same.params[name], value)
    with pytest.raises(jq.CalibrationError, match="no calibration batches"):
        ptq.correct_bias(jq.calibrate(model, data), [])


# ---------------------------------------------------------------------------------------------------------------------
# AdaRound

CASES = {
    "conv": (ops.Conv(strides=(2, 1), padding=((1, 1), (0, 1)), dilation=(1, 2)), (2, 4, 7, 8), (6, 4, 3, 2)),
    "depthwise": (
        ops.Conv(strides=(1, 1), padding=((1, 1),) * 2, dilation=(1, 1), groups=4),
        (2, 4, 5, 5),
        (8, 1, 3, 3),
    ),
    "grouped, 1d": (ops.Conv(strides=(1,), padding=((1, 1),), dilation=(1,), groups=2), (2, 4, 9), (6, 2, 3)),
    "transposed": (
        ops.ConvTranspose(strides=(2, 2), padding=((1, 1),) * 2, output_padding=(1, 0), dilation=(1, 1), groups=2),
        (2, 4, 5, 5),
        (4, 3, 3, 3),
    ),
    "linear": (ops.Linear(), (2, 3, 4), (6, 4)),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_rows_times_patches_is_the_layer(case, channels_last):
    op, x_shape, shape = CASES[case]
    rng = np.random.default_rng(1)
    x, weight = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (x_shape, shape))
    if channels_last and case != "linear":
        op, x = replace(op, channels_last=True), jnp.moveaxis(x, 1, -1)
    y = eval_float(op, x, weight=weight)
    flat = channels.rows(op, weight)
    np.testing.assert_array_equal(channels.from_rows(op, flat, shape), weight)
    got = jnp.einsum("ngk,gok->ngo", rounding._patches(op, x, shape), flat)
    want = jnp.moveaxis(y, channels.channel_axis(op, y.ndim), -1)
    np.testing.assert_allclose(got.reshape(want.shape), want, rtol=1e-4, atol=1e-4)
    ranges = channels.output_ranges(op, weight)
    assert ranges.shape == (want.shape[-1],)
    # A weight that makes one output, or reads one input, alone: the views agree with the operator.
    inputs = channels.input_ranges(op, weight)
    assert inputs.shape == (x.shape[channels.channel_axis(op, x.ndim)],)
    silent = channels.scale_inputs(op, weight, jnp.zeros_like(inputs).at[1].set(1.0))
    only = (
        jnp.moveaxis(jnp.zeros_like(x), channels.channel_axis(op, x.ndim), -1)
        .at[..., 1]
        .set(jnp.moveaxis(x, channels.channel_axis(op, x.ndim), -1)[..., 1])
    )
    only = jnp.moveaxis(only, -1, channels.channel_axis(op, x.ndim))
    np.testing.assert_allclose(
        eval_float(op, x, weight=silent), eval_float(op, only, weight=weight), rtol=1e-4, atol=1e-5
    )


def grid_errors(model, moments, key, new):
    """Error of every output channel, of `new` and of nearest rounding, from second moments in float64."""
    op = rounding._op_of(model.plan, key)
    flat, scale, got = (
        np.float64(channels.rows(op, v))
        for v in (
            model.params[key],
            rounding._scale_like(model.plan, model.qparams, key, model.params[key]),
            new.params[key],
        )
    )
    nearest = np.clip(np.rint(flat / scale), -8, 7) * scale

    def error(q):
        return np.einsum("gok,gkl,gol->go", q - flat, np.float64(moments[key]), q - flat)

    return error(got), error(nearest), error


def test_adaround_on_a_chain():
    model, data = chain(axis="out")
    model = jq.calibrate(model, data)
    new = ptq.adaround(model, data, steps=300)
    moments = rounding._all_moments(model.plan, model.params, data)
    gains = []
    for key in model.plan.weights:
        got, nearest, _ = grid_errors(model, moments, key, new)
        assert np.all(got <= nearest * (1 + 1e-4))
        gains.append(np.mean(got / nearest))
        scale = np.asarray(rounding._scale_like(model.plan, model.qparams, key, model.params[key]))
        steps = np.asarray(new.params[key]) / scale
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-5)  # on the grid
        before = np.clip(np.asarray(model.params[key]) / scale, -8, 7)
        assert np.abs(np.rint(steps) - before).max() < 1 + 1e-5  # up or down, no further
    assert np.mean(gains) < 0.95
    unchanged = set(model.params) - set(model.plan.weights)
    assert all(np.array_equal(new.params[k], model.params[k]) for k in unchanged)
    one, other = jq.lower(new), jq.apply(new, data[0])
    np.testing.assert_allclose(jq.run(one, data[0]), other, atol=0.1 * float(np.abs(other).max()))


def test_adaround_comes_close_to_the_best_rounding():
    """Depthwise 3x3 on smooth images, where the errors of neighbours can cancel: 2^9 roundings can all be tried."""
    build = graphs.Builder(9)
    build.shapes["x"] = (4, 8, 8)
    model, _ = prepared(build, head(build, build.conv("x", 4, 3, groups=4)), axis="out")
    steps = np.random.default_rng(2).normal(size=(16, 4, 8, 8))
    data = [jnp.asarray(np.cumsum(np.cumsum(steps, -1), -2) + 3.0, jnp.float32)]
    model = jq.calibrate(model, data)
    new = ptq.adaround(model, data, steps=1000)
    moments = rounding._all_moments(model.plan, model.params, data)
    key = next(k for k in model.plan.weights if k != "head.weight")
    got, nearest, error = grid_errors(model, moments, key, new)
    scale = np.float64(model.qparams[key]).reshape(4, 1, 1)
    floor = np.floor(np.float64(model.params[key]).reshape(4, 1, 9) / scale)
    ups = np.array(list(itertools.product([0, 1], repeat=9)), np.float64)
    best = np.min([error(np.clip(floor + up, -8, 7) * scale) for up in ups], axis=0)
    assert np.all(best <= got * (1 + 1e-4))
    assert np.mean(nearest) > 4 * np.mean(got)
    assert np.mean(got) < 2 * np.mean(best)


def test_adaround_refuses():
    build = graphs.Builder(10)
    build.shapes["x"] = (3, 8, 8)
    x = build.conv("x", 4, 3)
    model, data = prepared(build, head(build, x), quantizer=lsq_plus)
    model = jq.calibrate(model, data)
    with pytest.raises(jq.QConfigError, match=r"has an offset to learn \(lsq_plus\)"):
        ptq.adaround(model, data)
    with pytest.raises(jq.CalibrationError, match="no calibration batches"):
        ptq.adaround(model, [])
    with pytest.raises(jq.QConfigError, match="steps must be at least 1"):
        ptq.adaround(model, data, steps=0)
    with pytest.raises(jq.QConfigError, match="candidates must be at least 1"):
        ptq.search_weight_scales(model, candidates=0)
