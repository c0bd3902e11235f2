"""Calibration: the scales are those of the data, in any order and split of it, and broken data is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import graphs

import jquant as jq
from jquant import ops
from jquant.calibration.collection import collect, finalize_stats
from jquant.calibration.devices import gather_stats
from jquant.calibration.observe import init_stats, merge_stats, reset_scale, update_stats
from jquant.observers import clip_std, histogram, percentile

NASH = jq.targets.NASH_E


def config(observer: jq.observers.Observer | None = None) -> jq.QConfig:
    return jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8(observer=observer))})


def network() -> tuple[jq.Graph, dict]:
    build = graphs.Builder(11)
    build.shapes["x"] = (3, 8, 8)
    x = build.add(ops.Relu(), (build.batch_norm(build.conv("x", 6, 3)),), (6, 8, 8))
    x = build.add(ops.Sigmoid(), (build.conv(x, 4, 3),), (4, 8, 8))
    x = build.add(ops.Mean(axes=(2, 3)), (x,), (4,))
    x = build.add(ops.Linear(), (x,), (5,), weight=build.array("head.weight", 5, 4), bias=build.array("head.bias", 5))
    return build.graph(x, size=8), build.params


def planned(observer: jq.observers.Observer | None = None) -> jq.Model:
    return jq.prepare(*network(), config(observer), target=NASH)


def batches(plan: jq.Plan, count: int = 4, size: int = 4) -> list[jax.Array]:
    return [graphs.images(i, plan.graph, batch=size) * (i + 1) for i in range(count)]


def assert_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, scale in a.items():
        np.testing.assert_array_equal(scale, b[name], err_msg=name)


def test_scales_are_the_minimum_and_maximum_in_float64() -> None:
    model = planned(jq.observers.min_max())
    data = batches(model.plan)
    model = jq.calibrate(model, data)
    taps = [jq.apply_with_taps(model.replace(qparams={}), x, mode="float")[1] for x in data]
    assert set(model.qparams) == {*model.plan.owned, *model.plan.weights}
    for name in model.plan.owned:
        seen = np.concatenate([np.asarray(t[name], np.float64).ravel() for t in taps])
        # Taps come from another compilation of the float model, which may differ in the last bits.
        np.testing.assert_allclose(
            model.qparams[name], max(-seen.min(), seen.max(), 0) / 127.5, rtol=2e-6, err_msg=name
        )
    for key, axis in model.plan.weight_axis.items():
        weight = np.moveaxis(np.asarray(model.params[key], np.float64), axis, 0)
        np.testing.assert_allclose(
            model.qparams[key], np.abs(weight).reshape(len(weight), -1).max(1) / 127.5, rtol=1e-7, err_msg=key
        )
    assert all(v.dtype == jnp.float32 for v in model.qparams.values())


@pytest.mark.parametrize(
    "observer",
    [jq.observers.min_max(), jq.observers.mse(), jq.observers.nmse(), jq.observers.mean_of_maxima()],
    ids=lambda o: o.name,
)
def test_the_order_of_batches_does_not_matter(observer: jq.observers.Observer) -> None:
    model = planned(observer)
    data = batches(model.plan)
    model = jq.calibrate(model, data)
    assert_equal(model.qparams, jq.calibrate(model, data[::-1]).qparams)


def exact_network() -> tuple[jq.Graph, dict]:
    """Small integers, which float32 sums exactly: else a batch of another size may differ in its last bits."""
    build = graphs.Builder(12)
    build.shapes["x"] = (3, 8, 8)
    x = build.add(ops.Relu(), (build.conv("x", 6, 3),), (6, 8, 8))
    x = build.add(ops.Relu(), (build.pool(ops.MaxPool, build.conv(x, 4, 3), 2, 2, 0),), (4, 4, 4))
    return build.graph(x, size=8), {k: jnp.round(4 * v) for k, v in build.params.items()}


@pytest.mark.parametrize(
    "observer",
    [jq.observers.min_max(), jq.observers.mse(), jq.observers.nmse(), jq.observers.mean_of_maxima()],
    ids=lambda o: o.name,
)
def test_the_split_into_batches_does_not_matter(observer: jq.observers.Observer) -> None:
    model = jq.prepare(*exact_network(), config(observer), target=NASH)
    data = jnp.round(4 * jnp.concatenate(batches(model.plan)))
    model = jq.calibrate(model, [data])
    assert_equal(model.qparams, jq.calibrate(model, jnp.split(data, 4)).qparams)
    assert_equal(model.qparams, jq.calibrate(model, iter([data[:7], data[7:9], data[9:]])).qparams)  # unequal last


def test_any_network_is_split_to_within_rounding() -> None:
    model = planned(jq.observers.min_max())
    data = jnp.concatenate(batches(model.plan))
    whole, split = jq.calibrate(model, [data]).qparams, jq.calibrate(model, [data[:7], data[7:]]).qparams
    for name, scale in whole.items():
        np.testing.assert_allclose(split[name], scale, rtol=2e-6, err_msg=name)


@pytest.mark.parametrize(
    "observer",
    [jq.observers.min_max(), jq.observers.mse(), jq.observers.nmse(), jq.observers.mean_of_maxima()],
    ids=lambda o: o.name,
)
def test_two_shards_merged_are_one(observer: jq.observers.Observer) -> None:
    model = planned(observer)
    data = batches(model.plan)
    update = jax.jit(update_stats)

    def observe(part: list) -> dict:
        stats = init_stats(model)
        for x in part:
            stats = update(model, stats, {"x": x})
        return stats

    a, b = observe(data[:1]), observe(data[1:])
    one = jq.calibrate(model, data)
    assert_equal(finalize_stats(model, merge_stats(model, a, b)).qparams, one.qparams)
    assert_equal(finalize_stats(model, merge_stats(model, b, a)).qparams, one.qparams)
    assert_equal(finalize_stats(model, merge_stats(model, init_stats(model), observe(data))).qparams, one.qparams)


def test_a_moving_average_cannot_be_merged() -> None:
    model = planned(jq.observers.moving_average())
    stats = update_stats(model, init_stats(model), {"x": batches(model.plan)[0]})
    with pytest.raises(jq.CalibrationError, match="moving_average of 'x' depends on the order of batches"):
        merge_stats(model, stats, stats)


def assert_same(a: object, b: object) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    "observer", [histogram(64), clip_std(), jq.observers.nmse(), jq.observers.mean_of_maxima()], ids=lambda o: o.name
)
def test_microbatches_are_batches(observer: jq.observers.Observer) -> None:
    model = planned(observer)
    data = np.concatenate(batches(model.plan))[:14]
    small = [data[0:4], data[4:8], data[8:12], data[12:14]]
    stats = collect(model, small)
    assert_same(stats, collect(model, [data], microbatch=4))
    assert_same(stats, collect(model, [jnp.asarray(data[:8]), data[8:]], microbatch=4))
    one_device = jax.make_mesh((1,), ("data",))
    assert_same(stats, collect(model, [data], microbatch=4, mesh=one_device))
    assert_same(stats, collect(model, small, mesh=one_device))
    assert_same(stats, gather_stats(model, stats))
    assert_same(stats, merge_stats(model, collect(model, small[1:]), collect(model, small[:1])))


def test_what_cannot_be_split_is_refused() -> None:
    model = planned()
    data, mesh = batches(model.plan), jax.make_mesh((1,), ("data",))
    with pytest.raises(jq.InputError, match="microbatch must be at least 1"):
        jq.calibrate(model, data, microbatch=0)
    with pytest.raises(jq.InputError, match=re.escape("the mesh has no axis 'batch', only data")):
        jq.calibrate(model, data, mesh=mesh, axis="batch")
    with pytest.raises(jq.CalibrationError, match="batch 1: input 'x' contains NaN"):
        jq.calibrate(model, [data[0], jnp.nan * data[1]], mesh=mesh)
    with pytest.raises(jq.CalibrationError, match="no calibration batches"):
        jq.calibrate(model, [], mesh=mesh)
    whole = jq.Graph((jq.Input("x", (2, 3)),), (jq.Node("relu", ops.Relu(), ("x",)),), ("relu",))
    model = jq.prepare(whole, {}, config(), target=NASH)
    with pytest.raises(jq.InputError, match="input 'x' has no batch axis to split"):
        jq.calibrate(model, [jnp.ones((2, 3))], microbatch=1)
    model = planned(jq.observers.moving_average())
    with pytest.raises(jq.CalibrationError, match=r"moving_average of 'x'.* use min_max, percentile"):
        jq.calibrate(model, data, mesh=mesh)
    with pytest.raises(jq.CalibrationError, match=r"moving_average of 'x'.* cannot be merged"):
        gather_stats(model, init_stats(model))


def test_a_moving_average_takes_no_microbatches() -> None:
    """It is one of batches: that of their parts is up to 17 % away."""
    model = planned(jq.observers.moving_average(0.5))
    data = batches(model.plan)
    with pytest.raises(jq.CalibrationError, match=r"moving_average of 'x' .* without `microbatch`"):
        jq.calibrate(model, data, microbatch=2)


def test_statistics_of_another_plan_are_refused() -> None:
    model = planned(histogram(64))
    stats = init_stats(model)
    with pytest.raises(jq.CalibrationError, match=re.escape("statistics of another plan: this one has 'x'")):
        merge_stats(model, stats, {k: v for k, v in stats.items() if k != "x"})
    with pytest.raises(jq.CalibrationError, match="statistics of another plan: this one lacks 'y'"):
        merge_stats(model, stats | {"y": stats["x"]}, stats)
    with pytest.raises(jq.CalibrationError, match="statistics of 'x' are not those of histogram; collect them again"):
        reset_scale(model, init_stats(planned(histogram(32))), percentile())


def test_scales_are_derived_again_without_data() -> None:
    data = batches(planned().plan)
    model = planned(histogram())
    stats = collect(model, data)
    assert_equal(finalize_stats(model, stats).qparams, jq.calibrate(planned(jq.observers.mse()), data).qparams)
    for method in (percentile(99.0), jq.observers.min_max()):
        again = reset_scale(model, stats, method)
        assert_equal(
            again.qparams,
            jq.calibrate(planned(method), data).qparams | {k: again.qparams[k] for k in model.plan.weights},
        )
    only = reset_scale(model, stats, percentile(90.0), names="n*.conv")
    kept, reset = finalize_stats(model, stats).qparams, reset_scale(model, stats, percentile(90.0)).qparams
    names = {name for name in model.plan.owned if name.endswith(".conv")}
    assert 0 < len(names) < len(model.plan.owned)
    assert_equal(only.qparams, {name: (reset if name in names else kept)[name] for name in kept})


def test_a_scale_that_cannot_be_derived_again_is_refused() -> None:
    model = planned(histogram(64))
    stats = init_stats(model)
    with pytest.raises(jq.CalibrationError, match="clip_std needs statistics of its own"):
        reset_scale(model, stats, clip_std())
    with pytest.raises(jq.CalibrationError, match=re.escape("'n9*' matches no observed value")):
        reset_scale(model, stats, jq.observers.mse(), names="n9*")
    model = planned(jq.observers.min_max())
    with pytest.raises(
        jq.CalibrationError, match=r"min_max of 'x' kept no histogram; collect with jq\.observers\.histogram"
    ):
        reset_scale(model, init_stats(model), jq.observers.mse())
    model = planned(histogram(64))
    stats = collect(model, batches(model.plan))
    stats["x"] = stats["x"]._replace(range=jax.tree.map(lambda v: v * jnp.inf, stats["x"].range))
    with pytest.raises(jq.CalibrationError, match="the values of 'x' are not finite"):
        reset_scale(model, stats, percentile())


def test_nothing_is_shown_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    model = planned()
    jq.calibrate(model, batches(model.plan))
    assert capfd.readouterr() == ("", "")


def test_update_is_a_pure_function_for_scan() -> None:
    model = planned()
    data = jnp.stack(batches(model.plan))
    stats, _ = jax.lax.scan(lambda s, x: (update_stats(model, s, {"x": x}), None), init_stats(model), data)
    assert_equal(finalize_stats(model, stats).qparams, jq.calibrate(model, list(data)).qparams)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_broken_batch_is_refused_with_its_index(value: float) -> None:
    model = planned()
    data = batches(model.plan)
    data[2] = data[2].at[1, 0, 3, 3].set(value)
    with pytest.raises(jq.CalibrationError, match="batch 2: input 'x' contains NaN or infinite"):
        jq.calibrate(model, data)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (np.zeros((2, 3, 8, 9), np.float32), "batch 1: input 'x' has shape [2, 3, 8, 9], expected [batch, 3, 8, 8]"),
        (np.zeros((2, 3, 8, 8), np.float64), "batch 1: input 'x' is float64, expected float32"),
        (np.zeros((0, 3, 8, 8), np.float32), "batch 1: input 'x' has an empty batch"),
        ((), "batch 1: the graph has 1 inputs (x), 0 were given"),
        ("images", "batch 1: input 'x' must be an array, not str"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_with_its_index(batch: object, message: str) -> None:
    model = planned()
    with pytest.raises(jq.InputError, match=re.escape(message)):
        jq.calibrate(model, [batches(model.plan)[0], batch])


@pytest.mark.parametrize("empty", [[], iter(())])
def test_no_batches_are_refused(empty: object) -> None:
    model = planned()
    with pytest.raises(jq.CalibrationError, match="no calibration batches"):
        jq.calibrate(model, empty)


def test_a_generator_is_used_up_once() -> None:
    model = planned()
    data = (x for x in batches(model.plan))
    jq.calibrate(model, data)
    with pytest.raises(jq.CalibrationError, match="used up by an earlier pass"):
        jq.calibrate(model, data)


def test_parameters_are_checked() -> None:
    model = planned()
    with pytest.raises(jq.CalibrationError, match=r"parameter 'head.bias' contains NaN"):
        jq.calibrate(
            model.replace(params=model.params | {"head.bias": model.params["head.bias"].at[0].set(jnp.nan)}),
            batches(model.plan),
        )
    with pytest.raises(jq.GraphError, match=r"parameter 'head.bias' is float16"):
        jq.calibrate(
            model.replace(params=model.params | {"head.bias": model.params["head.bias"].astype(jnp.float16)}),
            batches(model.plan),
        )
    with pytest.raises(jq.GraphError, match=r"'head.bias' \(bias\) is missing"):
        jq.calibrate(
            model.replace(params={k: v for k, v in model.params.items() if k != "head.bias"}), batches(model.plan)
        )


def test_an_overflow_inside_the_model_is_refused() -> None:
    model = planned()
    with pytest.raises(jq.CalibrationError, match="not finite"):
        jq.calibrate(model, [jnp.full((1, 3, 8, 8), 3e38, jnp.float32)])


def test_fixed_scales_are_neither_observed_nor_trained() -> None:
    policy = config().rules["*"]
    fixed = jq.QConfig(
        {"*": policy, "x": jq.Policy(output=jq.int8(threshold=4.0)), "n0.conv": jq.Policy(weight=jq.int8(scale=0.01))}
    )
    model = jq.prepare(*network(), fixed, target=NASH)
    model = jq.calibrate(model, batches(model.plan))
    assert "x" in model.plan.owned
    assert not {"x", "n0.conv.weight"} & model.qparams.keys()
    program = jq.lower(model)
    assert float(program.scales["x"]) == 4 / 128
    assert "x" not in jq.labels(model).qparams


def test_several_inputs_come_as_tuples() -> None:
    inputs = (jq.Input("a", (None, 3)), jq.Input("b", (None, 3)))
    graph = jq.Graph(inputs, (jq.Node("sum", ops.Add(), ("a", "b")),), ("sum",))
    model = jq.prepare(graph, {}, config(), target=NASH)
    a, b = jnp.float32([[1, 2, 3]]), jnp.float32([[-4, 0, 0]])
    model = jq.calibrate(model, [(a, b), (2 * a, b)])
    np.testing.assert_allclose([model.qparams[n] for n in ("a", "b", "sum")], np.float32([6, 4, 6]) / 127.5, rtol=1e-6)
