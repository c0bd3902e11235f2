"""Comparison of any two meanings: every number against numpy float64, every fault where it was put."""

import jax.numpy as jnp
import numpy as np
import pytest
from support.small_nets import Net, small_net

import jquant as jq
from jquant.analysis import compare


@pytest.fixture(scope="module")
def net() -> Net:
    return small_net()


def real(net: Net, meaning: str) -> dict[str, np.ndarray]:
    """The values of a meaning in float64, by the public functions."""
    model, x = net
    if meaning == "bit_true":
        program = jq.lower(model)
        taps = jq.run_with_taps(program, x)
        return {n: np.asarray(v, np.float64) * np.asarray(program.scales[n], np.float64) for n, v in taps.items()}
    taps = jq.apply_with_taps(model, x, mode=meaning)[1]
    return {n: np.asarray(v, np.float64) for n, v in taps.items()}


@pytest.mark.parametrize(
    ("a", "b"), [("float", "fake_quant"), ("fake_quant", "tables"), ("fake_quant", "bit_true"), ("tables", "bit_true")]
)
def test_every_metric_equals_numpy(net: Net, a: str, b: str) -> None:
    found = compare(*net, a, b)
    first, second = real(net, a), real(net, b)
    assert [row.name for row in found.rows] == list(net[0].plan.graph.values)
    for row in found.rows:
        p, q = first[row.name], second[row.name]
        # Values are float32 sums of at most 54 products: equal to about 1e-5 of the largest.
        near = {"rel": 1e-3, "abs": 2e-5 * np.abs(p).max()}
        assert row.l1 == pytest.approx(np.abs(p - q).mean(), **near)
        assert row.mse == pytest.approx(((p - q) ** 2).mean(), rel=1e-2, abs=1e-10)
        assert (row.b_minimum, row.b_maximum) == pytest.approx((q.min(), q.max()), **near)
        if ((p - q) ** 2).mean() > 1e-9:
            assert row.sqnr == pytest.approx(10 * np.log10((p**2).mean() / ((p - q) ** 2).mean()), abs=0.05)
        counts = [np.histogram(v, 64, (min(p.min(), q.min()), max(p.max(), q.max())))[0] for v in (p, q)]
        assert sum(row.histogram.a) == sum(row.histogram.b) == row.size == p.size
        # A sample on the edge of a bin may fall to either side in float32.
        assert np.abs(np.array(row.histogram.a) - counts[0]).sum() <= 0.02 * p.size + 2
        share = [np.maximum(n, 1e-3) / np.maximum(n, 1e-3).sum() for n in (row.histogram.a, row.histogram.b)]
        assert row.kl == pytest.approx((share[0] * np.log(share[0] / share[1])).sum(), rel=1e-3, abs=1e-5)


def test_weights_are_compared_per_channel(net: Net) -> None:
    model, _ = net
    found = compare(*net, "float", "bit_true")
    assert [row.name for row in found.weights] == list(model.plan.weights)
    for row in found.weights:
        weight, scale = np.asarray(model.params[row.name], np.float64), np.asarray(model.qparams[row.name], np.float64)
        shaped = scale.reshape(-1, *(1,) * (weight.ndim - 1))
        rounded = np.clip(np.rint(weight / shaped), -128, 127) * shaped
        assert row.max_error == pytest.approx(np.abs(weight - rounded).max(), rel=1e-3)
        assert row.max_lsb == pytest.approx((np.abs(weight - rounded) / shaped).max(), rel=1e-3)
        assert row.max_lsb < 0.5001
        assert row.scale == pytest.approx(scale.max())
        assert row.own_sqnr is None
    same = compare(*net, "fake_quant", "bit_true")
    assert all(row.max_error == 0 for row in same.weights)  # both on one grid


def test_the_error_of_a_node_alone_finds_the_node_with_the_fault(net: Net) -> None:
    """A scale twenty times too small: everything behind it is wrong, and only one node is at fault."""
    model, x = net
    broken = dict(model.qparams) | {"n0.conv": model.qparams["n0.conv"] / 20}
    for meaning in ("fake_quant", "bit_true"):
        found = compare(model.replace(qparams=broken), x, "float", meaning)
        assert found.worst("own_sqnr", 1)[0].name == "n0.conv"
        sound = compare(*net, "float", meaning)
        for name in ("n3.conv", "n5.conv"):
            assert found.row(name).sqnr < sound.row(name).sqnr - 3  # the accumulated error does not tell
            assert found.row(name).own_max_lsb < 1.5
        assert found.row("n0.conv").own_max_lsb > 20
        assert found.row("n0.conv").saturated > 0.1


def test_the_own_error_is_that_of_the_baselines_node_on_the_operands_of_the_other(net: Net) -> None:
    model, _ = net
    found, second = compare(*net, "float", "bit_true"), real(net, "bit_true")
    node = model.plan.graph.by_name["n5.conv"]
    operands = [jnp.asarray(second[v], jnp.float32) for v in node.inputs]
    alone = jq.ops.eval_float(node.op, *operands, **{role: model.params[key] for role, key in node.params.items()})
    row = found.row("n5.conv")
    assert row.own_max_error == pytest.approx(np.abs(np.asarray(alone) - second["n5.conv"]).max(), rel=1e-3)
    assert row.own_max_lsb == pytest.approx(row.own_max_error / float(model.qparams["n5.conv"]), rel=1e-5)
    assert found.row("x").own_max_error is None


def test_two_models_of_one_plan(net: Net) -> None:
    """Calibrated against trained: the trained state has other parameters and scales."""
    model, x = net
    trained = {k: v * 1.01 for k, v in model.params.items()}
    found = compare(model, x, "fake_quant", "fake_quant", model_b=model.replace(params=trained))
    assert found.row("head.weight").max_error > 0
    expected = np.asarray(jq.apply(model.replace(params=trained), x)) - np.asarray(jq.apply(model, x))
    assert found.rows[-1].max_error == pytest.approx(np.abs(expected).max(), rel=1e-4)


def test_the_tables_alone(net: Net) -> None:
    found = compare(*net, "fake_quant", "tables")
    assert {row.name for row in found.rows if row.own_max_error} <= {"n4.sigmoid"}


def test_arrays_from_elsewhere(net: Net) -> None:
    model, _ = net
    values = real(net, "float")
    elsewhere = {
        "n5.conv": values["n5.conv"] + 0.25,
        "head.weight": np.asarray(net[0].params["head.weight"]),
        "other": 1,
    }
    found = compare(*net, "float", elsewhere)
    assert [row.name for row in found.rows] == ["n5.conv"]
    assert found.rows[0].max_error == pytest.approx(0.25, abs=1e-5)
    assert found.rows[0].own_sqnr is None  # its operand is not among the arrays
    assert [row.name for row in found.weights] == ["head.weight"]
    assert set(found.missing) == {*model.plan.graph.values, *model.plan.weights} - {"n5.conv", "head.weight"}
    everything = compare(*net, values, "bit_true")
    assert everything.a == "given"
    assert [row.name for row in everything.rows] == list(model.plan.graph.values)
    assert everything.rows[-1].own_sqnr is None  # arrays have no rule


def test_arrays_that_do_not_fit_are_refused(net: Net) -> None:
    with pytest.raises(jq.JQuantError, match=r"none of the 1 arrays has the name .*did you mean 'n5.conv'"):
        compare(*net, "float", {"n5.cnv": np.zeros(3)})
    with pytest.raises(jq.InputError, match=r"'n5.conv' is \[4, 4, 8, 8\], and the plan has \[4, 8, 8, 4\]"):
        compare(*net, "float", {"n5.conv": np.zeros((4, 4, 8, 8))})
    with pytest.raises(jq.InputError, match=r"'n5.conv' contains NaN"):
        compare(*net, {"n5.conv": np.full((4, 8, 8, 4), np.nan)}, "float")


def test_rows_sort_by_a_column_and_name_the_columns(net: Net) -> None:
    found = compare(*net, "float", "bit_true")
    worst = found.worst("max_lsb", 3)
    assert [row.max_lsb for row in worst] == sorted((r.max_lsb for r in found.rows if r.max_lsb), reverse=True)[:3]
    assert found.table(sort="cosine").splitlines()[2].split()[0] == min(found.rows, key=lambda r: r.cosine).name
    assert found.table(weights=True).splitlines()[2].split()[0] == found.weights[0].name
    for column in ("nam", "name", "histogram"):
        with pytest.raises(jq.JQuantError, match=rf"no column '{column}' to sort by; known: scale"):
            found.worst(column)
    with pytest.raises(jq.JQuantError, match=r"no row 'n5.cov'; did you mean 'n5.conv'"):
        found.row("n5.cov")
