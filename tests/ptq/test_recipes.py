"""Recipes keep a step only where the outputs come closer to float, on data that no step has seen."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from support import graphs

import jquant as jq
from jquant import ops, ptq
from jquant.ptq import recipes as module
from jquant.ptq import values as values_module
from jquant.ptq.recipes import judge_of, split_batches

NASH = jq.targets.NASH_E


def small(weight=jq.int4):
    build = graphs.Builder(3)
    build.shapes["x"] = (3, 8, 8)
    x = build.add(ops.Relu(), (build.conv("x", 8, 3),), (8, 8, 8))
    x = build.add(ops.Mean(axes=(2, 3)), (build.conv(x, 6, 3),), (6,))
    x = build.add(ops.Linear(), (x,), (5,), weight=build.array("head.weight", 5, 6), bias=build.array("head.bias", 5))
    graph = build.graph(x, size=8)
    policy = jq.Policy(weight=weight(axis="out"), output=jq.int8())
    model = jq.prepare(graph, build.params, jq.QConfig({"*": policy}), target=NASH)
    return model, [graphs.images(i, graph, batch=8) for i in range(4)]


def sqnr(model, tuned, x):
    wanted = np.float64(jq.apply(model, x, mode="float"))
    got = np.float64(jq.apply(tuned.model, x))
    return 10 * np.log10(np.sum(wanted**2) / np.sum((got - wanted) ** 2))


@pytest.mark.parametrize("name", ["fast", "default", "best"])
def test_what_is_kept_lowers_the_error_of_the_output(name):
    model, data = small()
    tuned = ptq.recipe(name, model, data, steps=50)
    first, *others = tuned.trials
    assert first.step == "calibrate: nmse"
    best = first.sqnr
    for trial in others:
        assert trial.kept == (trial.sqnr > best)
        best = max(best, trial.sqnr)
    assert tuned.sqnr == best > first.sqnr
    assert (tuned.used, tuned.held_back) == (24, 8)
    np.testing.assert_allclose(sqnr(model, tuned, data[-1]), tuned.sqnr, atol=1e-3)
    steps = " ".join(t.step for t in tuned.trials)
    assert ("by gradient" in steps, "bias correction" in steps) == (name != "fast", name != "fast")
    assert ("mean_of_maxima" in steps, "adaround" in steps) == (name == "best", name == "best")
    assert ("block reconstruction" in steps) == (name == "best")  # the weights have 4 bits
    for trial in tuned.trials:
        assert trial.step in str(tuned)
    assert jq.run(jq.lower(tuned.model), data[0]).shape == (8, 5)


def test_a_step_that_harms_is_left_out(monkeypatch):
    model, data = small()

    def broken(model, batches, *, reference):
        return model.replace(params={k: v + 1.0 if k.endswith("bias") else v for k, v in model.params.items()})

    monkeypatch.setattr(module, "correct_bias", broken)
    tuned = ptq.recipe("default", model, data)
    assert [t.kept for t in tuned.trials if t.step == "bias correction"] == [False]
    for key, value in model.params.items():
        np.testing.assert_array_equal(tuned.model.params[key], value)


def test_the_last_batches_judge_or_the_last_samples_of_one():
    model, data = small()
    seen, judged = split_batches(model.plan, data, 0.25)
    assert (len(seen), len(judged)) == (3, 1)
    np.testing.assert_array_equal(judged[0][0], data[3])
    seen, judged = split_batches(model.plan, data[:1], 0.25)
    np.testing.assert_array_equal(seen[0][0], data[0][:6])
    np.testing.assert_array_equal(judged[0][0], data[0][6:])


def test_refuses():
    model, data = small()
    with pytest.raises(jq.QConfigError, match=r"unknown recipe 'defalt'; known: .*did you mean 'default'"):
        ptq.recipe("defalt", model, data)
    with pytest.raises(jq.QConfigError, match="held_back must be"):
        ptq.recipe("fast", model, data, held_back=1.0)
    with pytest.raises(jq.CalibrationError, match="two batches at least"):
        ptq.recipe("fast", model, [data[0][:1]])
    with pytest.raises(jq.CalibrationError, match="no calibration batches"):
        ptq.recipe("fast", model, [])


def test_gradients_decide_what_a_scale_is_for():
    """A channel that the output multiplies by 0 may saturate: the scale is that of the others."""
    build = graphs.Builder(1)
    build.shapes["x"] = (4, 4, 4)
    x = build.add(ops.Mean(axes=(2, 3)), (build.conv("x", 4, 1),), (4,))
    x = build.add(ops.Linear(), (x,), (3,), weight=build.array("head.weight", 3, 4), bias=build.array("head.bias", 3))
    graph = build.graph(x, size=4)
    policy = jq.Policy(weight=jq.int8(axis="out"), output=jq.int8(observer=jq.observers.min_max()))
    model = jq.prepare(graph, build.params, jq.QConfig({"*": policy}), target=NASH)
    conv = next(node for node in model.plan.graph.nodes if isinstance(node.op, ops.Conv))
    weight = conv.params["weight"]
    params = model.params | {
        weight: model.params[weight].at[2].multiply(40.0),
        "head.weight": model.params["head.weight"].at[:, 2].set(0),
    }
    data = [graphs.images(0, graph, batch=8)]
    model = jq.calibrate(model.replace(params=params), data)
    found = ptq.search_value_scales(model, data)
    assert float(found.qparams[conv.name]) < float(model.qparams[conv.name]) / 4
    for key in model.plan.weights:
        np.testing.assert_array_equal(found.qparams[key], model.qparams[key])
    judge = judge_of(model, [tuple(data)])
    before, after = judge(model), judge(found)
    assert after > before + 3
    no_gradient = params | {"head.weight": jnp.zeros_like(params["head.weight"])}
    same = ptq.search_value_scales(model.replace(params=no_gradient), data)
    np.testing.assert_array_equal(same.qparams[conv.name], model.qparams[conv.name])


def test_gradients_take_few_samples_in_batches_that_fit_the_memory(monkeypatch):
    model, data = small()
    seen = [(np.asarray(x),) for x in data[:3]]
    size = len(seen[0][0])
    assert [len(batch[0]) for batch in module._few(model, seen)] == [min(size, 8)] * 3
    monkeypatch.setattr(module, "free_memory", lambda: 1)
    one = module._few(model, seen)
    assert {len(batch[0]) for batch in one} == {1}
    np.testing.assert_array_equal(np.concatenate([b[0] for b in one]), np.concatenate([x for (x,) in seen])[:24])


def test_gradients_compile_one_size():
    model, data = small()
    whole = np.concatenate([np.asarray(x) for x in data])
    uneven = [(whole[:13],), (whole[13:16],), (whole[:11],)]
    few = module._few(model, uneven)
    assert [len(batch[0]) for batch in few] == [8, 8]
    np.testing.assert_array_equal(np.concatenate([x for (x,) in few]), np.concatenate([whole[:8], whole[:8]]))


def test_a_fixed_batch_stays_whole():
    model, data = small()
    plan = model.plan
    entry = replace(plan.graph.inputs[0], shape=data[0].shape)
    fixed = model.replace(plan=replace(plan, graph=replace(plan.graph, inputs=(entry,))))
    seen = [(np.asarray(x),) for x in data * 4]
    assert [len(batch[0]) for batch in module._few(fixed, seen)] == [8] * 3


def test_weighted_errors_are_the_sums_that_numpy_finds():
    """Values larger than a block and smaller than one, of two formats."""
    model, data = small()
    model = jq.calibrate(model, data[:1])
    plan, rng = model.plan, np.random.default_rng(0)
    names = tuple(plan.owned)[:3]
    wide = replace(plan.spec(names[2]), dtype="int16")
    model = model.replace(plan=replace(plan, values=type(plan.values)({**plan.values, names[2]: wide})))
    sizes = (3, values_module._BLOCK // 2 + 5), (7,), (2, 2, 5)
    values, gradients = (
        {name: rng.normal(size=size).astype(np.float32) for name, size in zip(names, sizes, strict=True)}
        for _ in range(2)
    )
    found = values_module._weighted_errors(model.plan, model.qparams, values, gradients)
    assert set(found) == set(names)
    for name, bits in zip(names, (8, 8, 16), strict=True):
        for factor, error in zip(values_module._FACTORS, np.asarray(found[name]), strict=True):
            scale = np.float64(np.float32(model.qparams[name]) * factor)
            x, g = values[name].astype(np.float64), gradients[name].astype(np.float64)
            rounded = np.clip(np.rint(x / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
            # float32 sums and quotients; a quotient on a tie may round the other way, which leaves the error.
            np.testing.assert_allclose(error, np.sum((g * (rounded - x)) ** 2), rtol=2e-3)
