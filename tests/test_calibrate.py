"""Calibration: the scales are those of the data, in any order and split of it, and broken data is refused."""

import re

import graphs
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant import ops
from jquant.calibrate import (
    collect,
    finalize_stats,
    gather_stats,
    init_stats,
    merge_stats,
    reset_scale,
    update_stats,
)
from jquant.observers import clip_std, histogram, percentile

NASH = jq.targets.NASH_E


def config(observer: jq.Observer | None = None) -> jq.QConfig:
    return jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8(observer=observer))})


def network() -> tuple[jq.Graph, dict]:
    build = graphs.Builder(11)
    build.shapes["x"] = (3, 8, 8)
    x = build.add(ops.Relu(), (build.batch_norm(build.conv("x", 6, 3)),), (6, 8, 8))
    x = build.add(ops.Sigmoid(), (build.conv(x, 4, 3),), (4, 8, 8))
    x = build.add(ops.Mean(axes=(2, 3)), (x,), (4,))
    x = build.add(ops.Linear(), (x,), (5,), weight=build.array("head.weight", 5, 4), bias=build.array("head.bias", 5))
    return build.graph(x, size=8), build.params


def planned(observer: jq.Observer | None = None) -> tuple[jq.Plan, dict]:
    return jq.prepare(*network(), config(observer), target=NASH)


def batches(plan: jq.Plan, count: int = 4, size: int = 4) -> list[jax.Array]:
    return [graphs.images(i, plan.graph, batch=size) * (i + 1) for i in range(count)]


def assert_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, scale in a.items():
        np.testing.assert_array_equal(scale, b[name], err_msg=name)


def test_scales_are_the_minimum_and_maximum_in_float64() -> None:
    plan, params = planned()
    data = batches(plan)
    qparams = jq.calibrate(plan, params, data)
    taps = [jq.apply_with_taps(plan, params, {}, x, mode="calibration")[1] for x in data]
    assert set(qparams) == {*plan.owned, *plan.weights}
    for name in plan.owned:
        seen = np.concatenate([np.asarray(t[name], np.float64).ravel() for t in taps])
        # Taps come from another compilation of the float model, which may differ in the last bits.
        np.testing.assert_allclose(qparams[name], max(-seen.min(), seen.max(), 0) / 127.5, rtol=2e-6, err_msg=name)
    for key, axis in plan.weight_axis.items():
        weight = np.moveaxis(np.asarray(params[key], np.float64), axis, 0)
        np.testing.assert_allclose(
            qparams[key], np.abs(weight).reshape(len(weight), -1).max(1) / 127.5, rtol=1e-7, err_msg=key
        )
    assert all(v.dtype == jnp.float32 for v in qparams.values())


@pytest.mark.parametrize("observer", [jq.min_max(), jq.mse()], ids=lambda o: o.name)
def test_the_order_of_batches_does_not_matter(observer: jq.Observer) -> None:
    plan, params = planned(observer)
    data = batches(plan)
    qparams = jq.calibrate(plan, params, data)
    assert_equal(qparams, jq.calibrate(plan, params, data[::-1]))


def exact_network() -> tuple[jq.Graph, dict]:
    """Small integers, which float32 sums exactly: else a batch of another size may differ in its last bits."""
    build = graphs.Builder(12)
    build.shapes["x"] = (3, 8, 8)
    x = build.add(ops.Relu(), (build.conv("x", 6, 3),), (6, 8, 8))
    x = build.add(ops.Relu(), (build.pool(ops.MaxPool, build.conv(x, 4, 3), 2, 2, 0),), (4, 4, 4))
    return build.graph(x, size=8), {k: jnp.round(4 * v) for k, v in build.params.items()}


@pytest.mark.parametrize("observer", [jq.min_max(), jq.mse()], ids=lambda o: o.name)
def test_the_split_into_batches_does_not_matter(observer: jq.Observer) -> None:
    plan, params = jq.prepare(*exact_network(), config(observer), target=NASH)
    data = jnp.round(4 * jnp.concatenate(batches(plan)))
    qparams = jq.calibrate(plan, params, [data])
    assert_equal(qparams, jq.calibrate(plan, params, jnp.split(data, 4)))
    assert_equal(qparams, jq.calibrate(plan, params, iter([data[:7], data[7:9], data[9:]])))  # unequal last


def test_any_network_is_split_to_within_rounding() -> None:
    plan, params = planned()
    data = jnp.concatenate(batches(plan))
    whole, split = jq.calibrate(plan, params, [data]), jq.calibrate(plan, params, [data[:7], data[7:]])
    for name, scale in whole.items():
        np.testing.assert_allclose(split[name], scale, rtol=2e-6, err_msg=name)


@pytest.mark.parametrize("observer", [jq.min_max(), jq.mse()], ids=lambda o: o.name)
def test_two_shards_merged_are_one(observer: jq.Observer) -> None:
    plan, params = planned(observer)
    data = batches(plan)
    update = jax.jit(update_stats, static_argnums=0)

    def observe(part: list) -> dict:
        stats = init_stats(plan)
        for x in part:
            stats = update(plan, params, stats, {"x": x})
        return stats

    a, b = observe(data[:1]), observe(data[1:])
    one = jq.calibrate(plan, params, data)
    assert_equal(finalize_stats(plan, params, merge_stats(plan, a, b)), one)
    assert_equal(finalize_stats(plan, params, merge_stats(plan, b, a)), one)
    assert_equal(finalize_stats(plan, params, merge_stats(plan, init_stats(plan), observe(data))), one)


def test_a_moving_average_cannot_be_merged() -> None:
    plan, params = planned(jq.moving_average())
    stats = update_stats(plan, params, init_stats(plan), {"x": batches(plan)[0]})
    with pytest.raises(jq.CalibrationError, match="moving_average of 'x' depends on the order of batches"):
        merge_stats(plan, stats, stats)


def assert_same(a: object, b: object) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("observer", [histogram(64), clip_std()], ids=lambda o: o.name)
def test_microbatches_are_batches(observer: jq.Observer) -> None:
    plan, params = planned(observer)
    data = np.concatenate(batches(plan))[:14]
    small = [data[0:4], data[4:8], data[8:12], data[12:14]]
    stats = collect(plan, params, small)
    assert_same(stats, collect(plan, params, [data], microbatch=4))
    assert_same(stats, collect(plan, params, [jnp.asarray(data[:8]), data[8:]], microbatch=4))
    one_device = jax.make_mesh((1,), ("data",))
    assert_same(stats, collect(plan, params, [data], microbatch=4, mesh=one_device))
    assert_same(stats, collect(plan, params, small, mesh=one_device))
    assert_same(stats, gather_stats(plan, stats))
    assert_same(stats, merge_stats(plan, collect(plan, params, small[1:]), collect(plan, params, small[:1])))


def test_what_cannot_be_split_is_refused() -> None:
    plan, params = planned()
    data, mesh = batches(plan), jax.make_mesh((1,), ("data",))
    with pytest.raises(jq.InputError, match="microbatch must be at least 1"):
        jq.calibrate(plan, params, data, microbatch=0)
    with pytest.raises(jq.InputError, match=re.escape("the mesh has no axis 'batch', only data")):
        jq.calibrate(plan, params, data, mesh=mesh, axis="batch")
    with pytest.raises(jq.CalibrationError, match="batch 1: input 'x' contains NaN"):
        jq.calibrate(plan, params, [data[0], jnp.nan * data[1]], mesh=mesh)
    with pytest.raises(jq.CalibrationError, match="no calibration batches"):
        jq.calibrate(plan, params, [], mesh=mesh)
    whole = jq.Graph((jq.Input("x", (2, 3)),), (jq.Node("relu", ops.Relu(), ("x",)),), ("relu",))
    plan, params = jq.prepare(whole, {}, config(), target=NASH)
    with pytest.raises(jq.InputError, match="input 'x' has no batch axis to split"):
        jq.calibrate(plan, params, [jnp.ones((2, 3))], microbatch=1)
    plan, params = planned(jq.moving_average())
    with pytest.raises(jq.CalibrationError, match=r"moving_average of 'x'.* use min_max, percentile"):
        jq.calibrate(plan, params, data, mesh=mesh)
    with pytest.raises(jq.CalibrationError, match=r"moving_average of 'x'.* cannot be merged"):
        gather_stats(plan, init_stats(plan))


def test_a_moving_average_goes_by_microbatches() -> None:
    plan, params = planned(jq.moving_average(0.5))
    data = batches(plan)
    assert_equal(jq.calibrate(plan, params, data), jq.calibrate(plan, params, [np.concatenate(data)], microbatch=4))


def test_statistics_of_another_plan_are_refused() -> None:
    plan, params = planned(histogram(64))
    stats = init_stats(plan)
    with pytest.raises(jq.CalibrationError, match=re.escape("statistics of another plan: this one has 'x'")):
        merge_stats(plan, stats, {k: v for k, v in stats.items() if k != "x"})
    with pytest.raises(jq.CalibrationError, match="statistics of another plan: this one lacks 'y'"):
        merge_stats(plan, stats | {"y": stats["x"]}, stats)
    with pytest.raises(jq.CalibrationError, match="statistics of 'x' are not those of histogram; collect them anew"):
        reset_scale(plan, params, init_stats(planned(histogram(32))[0]), percentile())


def test_scales_are_derived_again_without_data() -> None:
    data = batches(planned()[0])
    plan, params = planned(histogram())
    stats = collect(plan, params, data)
    assert_equal(finalize_stats(plan, params, stats), jq.calibrate(*planned(jq.mse()), data))
    for method in (percentile(99.0), jq.min_max()):
        again = reset_scale(plan, params, stats, method)
        assert_equal(again, jq.calibrate(*planned(method), data) | {k: again[k] for k in plan.weights})
    only = reset_scale(plan, params, stats, percentile(90.0), names="n*.conv")
    kept, reset = finalize_stats(plan, params, stats), reset_scale(plan, params, stats, percentile(90.0))
    names = {name for name in plan.owned if name.endswith(".conv")}
    assert 0 < len(names) < len(plan.owned)
    assert_equal(only, {name: (reset if name in names else kept)[name] for name in kept})


def test_a_scale_that_cannot_be_derived_again_is_refused() -> None:
    plan, params = planned(histogram(64))
    stats = init_stats(plan)
    with pytest.raises(jq.CalibrationError, match="clip_std needs statistics of its own"):
        reset_scale(plan, params, stats, clip_std())
    with pytest.raises(jq.CalibrationError, match=re.escape("'n9*' matches no observed value")):
        reset_scale(plan, params, stats, jq.mse(), names="n9*")
    plan, params = planned()
    with pytest.raises(jq.CalibrationError, match=r"min_max of 'x' kept no histogram; collect with jq\.histogram"):
        reset_scale(plan, params, init_stats(plan), jq.mse())
    plan, params = planned(histogram(64))
    stats = collect(plan, params, batches(plan))
    stats["x"] = stats["x"]._replace(range=jax.tree.map(lambda v: v * jnp.inf, stats["x"].range))
    with pytest.raises(jq.CalibrationError, match="the values of 'x' are not finite"):
        reset_scale(plan, params, stats, percentile())


def test_nothing_is_shown_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    plan, params = planned()
    jq.calibrate(plan, params, batches(plan))
    assert capfd.readouterr() == ("", "")


def test_update_is_a_pure_function_for_scan() -> None:
    plan, params = planned()
    data = jnp.stack(batches(plan))
    stats, _ = jax.lax.scan(lambda s, x: (update_stats(plan, params, s, {"x": x}), None), init_stats(plan), data)
    assert_equal(finalize_stats(plan, params, stats), jq.calibrate(plan, params, list(data)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_broken_batch_is_refused_with_its_index(value: float) -> None:
    plan, params = planned()
    data = batches(plan)
    data[2] = data[2].at[1, 0, 3, 3].set(value)
    with pytest.raises(jq.CalibrationError, match="batch 2: input 'x' contains NaN or infinite"):
        jq.calibrate(plan, params, data)


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
    plan, params = planned()
    with pytest.raises(jq.InputError, match=re.escape(message)):
        jq.calibrate(plan, params, [batches(plan)[0], batch])


@pytest.mark.parametrize("empty", [[], iter(())])
def test_no_batches_are_refused(empty: object) -> None:
    plan, params = planned()
    with pytest.raises(jq.CalibrationError, match="no calibration batches"):
        jq.calibrate(plan, params, empty)


def test_a_generator_is_used_up_once() -> None:
    plan, params = planned()
    data = (x for x in batches(plan))
    jq.calibrate(plan, params, data)
    with pytest.raises(jq.CalibrationError, match="used up by an earlier pass"):
        jq.calibrate(plan, params, data)


def test_parameters_are_checked() -> None:
    plan, params = planned()
    with pytest.raises(jq.CalibrationError, match=r"parameter 'head.bias' contains NaN"):
        jq.calibrate(plan, params | {"head.bias": params["head.bias"].at[0].set(jnp.nan)}, batches(plan))
    with pytest.raises(jq.GraphError, match=r"parameter 'head.bias' is float16"):
        jq.calibrate(plan, params | {"head.bias": params["head.bias"].astype(jnp.float16)}, batches(plan))
    with pytest.raises(jq.GraphError, match=r"'head.bias' \(bias\) is missing"):
        jq.calibrate(plan, {k: v for k, v in params.items() if k != "head.bias"}, batches(plan))


def test_an_overflow_inside_the_model_is_refused() -> None:
    plan, params = planned()
    with pytest.raises(jq.CalibrationError, match="not finite"):
        jq.calibrate(plan, params, [jnp.full((1, 3, 8, 8), 3e38, jnp.float32)])


def test_fixed_scales_are_neither_observed_nor_trained() -> None:
    policy = config().rules["*"]
    fixed = jq.QConfig(
        {"*": policy, "x": jq.Policy(output=jq.int8(threshold=4.0)), "n0.conv": jq.Policy(weight=jq.int8(scale=0.01))}
    )
    plan, params = jq.prepare(*network(), fixed, target=NASH)
    qparams = jq.calibrate(plan, params, batches(plan))
    assert "x" in plan.owned
    assert not {"x", "n0.conv.weight"} & qparams.keys()
    program = jq.lower(plan, params, qparams)
    assert float(program.scales["x"]) == 4 / 128
    assert "x" not in jq.labels(plan).qparams


def test_several_inputs_come_as_tuples() -> None:
    inputs = (jq.Input("a", (None, 3)), jq.Input("b", (None, 3)))
    graph = jq.Graph(inputs, (jq.Node("sum", ops.Add(), ("a", "b")),), ("sum",))
    plan, params = jq.prepare(graph, {}, config(), target=NASH)
    a, b = jnp.float32([[1, 2, 3]]), jnp.float32([[-4, 0, 0]])
    qparams = jq.calibrate(plan, params, [(a, b), (2 * a, b)])
    np.testing.assert_allclose([qparams[n] for n in ("a", "b", "sum")], np.float32([6, 4, 6]) / 127.5, rtol=1e-6)
