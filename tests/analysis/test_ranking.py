"""Sensitivity by lanes against a plain loop, and the search of mixed precision against all combinations."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from support.small_nets import QCONFIG, Net, small_graph, small_net

import jquant as jq
from jquant.analysis import Ranking, SensitivityRow, search_mixed_precision, sensitivity
from jquant.graph.evaluate import evaluate
from jquant.graph.float import float_rule
from jquant.meanings.fake_quant import fake_quant_rule, fake_quant_tap


@pytest.fixture(scope="module")
def net() -> Net:
    return small_net()


def one_by_one(net: Net, metric, mode: str) -> dict[str, float]:
    """The loop that the lanes replace, without jit, vmap or switches: one evaluation a quantizer."""
    model, x = net
    tap, quantized = fake_quant_tap(model.plan, model.qparams), fake_quant_rule(model.plan, model.params, model.qparams)
    plain = float_rule(model.plan.graph, model.params)
    (output,) = model.plan.graph.outputs

    def run(on: set[str]) -> np.ndarray:
        def rule(node, *operands):
            weights = {node.params[role] for role in node.op.weight_roles} & on
            if mode == "one_off":  # what is on has a bias on its grid as well
                return (quantized if weights else plain)(node, *operands)
            own = {w: jq.fake_quant(model.params[w], model.qparams[w], model.plan.weights[w]) for w in weights}
            return float_rule(model.plan.graph, model.params | own)(node, *operands)

        def switched(name, value):
            return tap(name, value) if name in on else value

        return np.asarray(evaluate(model.plan.graph, {"x": x}, rule, switched)[output], np.float64)

    everything = {*model.plan.owned, *model.plan.weights}
    baseline = run(set())
    chosen = {n: {n} if mode == "one_on" else everything - {n} for n in (*model.plan.owned, *model.plan.weights)}
    return {name: metric(baseline, run(on)) for name, on in chosen.items()}


def sqnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10((a**2).mean() / ((a - b) ** 2).mean())


def l2(a, b):
    return jnp.sqrt(jnp.mean((a - b) ** 2))


@pytest.mark.parametrize("lanes", [3, 16])
@pytest.mark.parametrize("mode", ["one_on", "one_off"])
def test_the_ranking_is_that_of_the_loop(net: Net, mode: str, lanes: int) -> None:
    """Equal to the loop within 0.5 % of the noise (0.02 dB): float sums are grouped otherwise under vmap, and a value
    on the edge of a rounding may then fall to the other side. Ranks are compared where the loop's gaps are wider.
    """
    expected = one_by_one(net, sqnr, mode)
    found = sensitivity(net[0], [net[1]], mode=mode, lanes=lanes)
    assert {row.name: row.metric for row in found.rows} == pytest.approx(expected, abs=0.02)
    in_order = [expected[row.name] for row in found.rows]
    for before, after in itertools.pairwise(in_order):
        assert (before < after + 0.04) if mode == "one_on" else (before > after - 0.04)
    assert found.baseline == pytest.approx(
        sqnr(*(np.asarray(jq.apply(*net, mode=m), np.float64) for m in ("float", "fake_quant"))), abs=0.02
    )


def test_a_metric_of_ones_own_over_batches_of_unequal_size(net: Net) -> None:
    model, x = net
    found = sensitivity(model, [x, x[:1]], metric=l2, kinds=["weight"])
    assert found.metric == "l2"
    assert {row.name for row in found.rows} == set(model.plan.weights)
    each = [one_by_one((model, part), lambda a, b: np.sqrt(((a - b) ** 2).mean()), "one_on") for part in (x, x[:1])]
    for row in found.rows:
        assert row.error == row.metric == pytest.approx(np.mean([e[row.name] for e in each]), rel=1e-2)
    assert [row.error for row in found.rows] == sorted((row.error for row in found.rows), reverse=True)


def test_an_injected_fault_comes_first_and_feeds_the_template(net: Net) -> None:
    model, x = net
    broken = dict(model.qparams) | {"n0.conv": model.qparams["n0.conv"] * 40}
    ranking = sensitivity(model.replace(qparams=broken), [x], metric="cosine")
    assert ranking.rows[0].name == "n0.conv"
    assert ranking.rows[0].error == pytest.approx(1 - ranking.rows[0].metric)
    assert ranking.names()[0] == "n2.relu"  # the value of the fused node is asked for by the last node that went in
    assert set(ranking.names("weight")) == {"n0.conv", "n3.conv", "n5.conv", "n7.linear"}
    rules = {**QCONFIG.rules, **jq.templates.sensitive(ranking.names(), topk=1, spec=jq.int16())}
    again = jq.prepare(*small_graph(), jq.QConfig(rules), target=jq.targets.NASH_E)
    assert again.plan.values["n0.conv"].dtype == "int16"
    assert [name for name, spec in again.plan.values.items() if spec and spec.dtype == "int16"] == ["n0.conv"]


def test_costs_are_counted(net: Net) -> None:
    model, x = net
    rows = {row.name: row for row in sensitivity(model, [x], metric="mse").rows}
    products = {"n0.conv": 64 * 6 * 27, "n3.conv": 64 * 6 * 54, "n5.conv": 64 * 4 * 54, "n7.linear": 5 * 4}
    total = sum(products.values())
    assert rows["n3.conv.weight"].macs == pytest.approx(products["n3.conv"] / total)
    assert rows["n0.conv"].macs == pytest.approx(products["n3.conv"] / total)  # the node that reads it
    assert rows["x"].macs == pytest.approx(products["n0.conv"] / total)  # behind a permutation
    assert (rows["n0.conv"].bytes, rows["n3.conv.weight"].bytes) == (6 * 64, 6 * 6 * 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "cosin"}, "unknown metric 'cosin'; known: cosine, .*did you mean 'cosine'"),
        ({"mode": "one_of"}, "unknown mode 'one_of'"),
        ({"kinds": ["weights"]}, "unknown kind 'weights'"),
        ({"lanes": 0}, "lanes must be at least 1"),
        ({"mode": "one_off", "weights": ["int4"]}, "leave activations and weights empty"),
    ],
)
def test_bad_arguments_are_named(net: Net, arguments: dict, message: str) -> None:
    with pytest.raises(jq.JQuantError, match=message):
        sensitivity(net[0], [net[1]], **arguments)


def test_no_batches(net: Net) -> None:
    with pytest.raises(jq.CalibrationError, match=r"no batches"):
        sensitivity(net[0], [])


# ---------------------------------------------------------------------------------------------------------------------
# Mixed precision


@pytest.fixture(scope="module")
def measured(net: Net) -> Ranking:
    model, x = net
    formats = {"activations": ("int8", "int16"), "weights": ("int4", "int8")}
    return sensitivity(model, [x], metric="mse", **formats)


def test_a_finer_format_costs_less_error_at_the_same_range(measured: Ranking) -> None:
    errors = {(row.name, row.dtype): row.error for row in measured.rows}
    assert len(errors) == len(measured.rows) == 20
    for name, dtype in errors:
        finer = {"int8": "int16", "int4": "int8"}.get(dtype)
        if (name, finer) in errors:
            assert errors[name, finer] < errors[name, dtype]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("cost", ["bytes", "macs"])
def test_the_search_equals_all_combinations(net: Net, measured: Ranking, cost: str, share: float) -> None:
    options: dict[str, list[tuple[str, float, float]]] = {}
    for row in measured.rows:
        wide = row.dtype == "int16"
        price = row.bytes if cost == "bytes" else row.macs * (1 + wide) if row.kind == "activation" else 0.0
        options.setdefault(row.name, []).append((row.dtype, price, row.error))
    everything = [
        (sum(p for _, p, _ in chosen), sum(e for _, _, e in chosen)) for chosen in itertools.product(*options.values())
    ]
    assert len(everything) == 2**10
    low, high = min(c for c, _ in everything), max(c for c, _ in everything)
    budget = low + share * (high - low)
    best = min(error for spent, error in everything if spent <= budget + 1e-9)
    found = search_mixed_precision(net[0], measured, budget=budget, cost=cost)
    assert found.exact
    assert found.error == pytest.approx(best, rel=1e-9)
    assert found.cost <= budget * (1 + 1e-9)
    assert (found.lowest, found.highest) == pytest.approx((low, high))
    spent = sum(p for name, rows in options.items() for dtype, p, _ in rows if found.choices[name] == dtype)
    assert spent == pytest.approx(found.cost)


def test_the_rules_make_the_plan_that_was_chosen(net: Net, measured: Ranking) -> None:
    found = search_mixed_precision(net[0], measured, budget=2600, cost="bytes")
    graph, params = small_graph()
    rules = {**QCONFIG.rules, **found.rules()}
    model = jq.prepare(graph, params, jq.QConfig(rules), target=jq.targets.NASH_E)
    assert {name: model.plan.spec(name).dtype for name in found.choices} == dict(found.choices)
    assert len(set(found.choices.values())) > 1
    jq.lower(jq.calibrate(model, [net[1]]))
    assert "cost" in found.table()


def test_a_large_search_is_thinned_and_says_so(net: Net) -> None:
    rng = np.random.default_rng(0)
    name, plan = "n0.conv", net[0].plan
    rows = _random_rows(rng, plan)
    ranking = Ranking("mse", "one_on", 0.0, tuple(rows))
    budget = sum(row.bytes for row in rows) * 0.5
    exact = search_mixed_precision(net[0], ranking, budget=budget)
    thinned = search_mixed_precision(net[0], ranking, budget=budget, limit=5)
    assert exact.exact
    assert not thinned.exact
    assert exact.error <= thinned.error
    assert thinned.cost <= budget
    assert name in thinned.choices


def _random_rows(rng: np.random.Generator, plan: jq.Plan) -> list[SensitivityRow]:
    found = []
    for name in (*plan.owned, *plan.weights):
        errors = np.sort(rng.random(2))[::-1]
        size = int(rng.integers(1, 10**6))
        for dtype, error, factor in zip(("int8", "int16"), errors, (1, 2), strict=True):
            kind = "weight" if name in plan.weights else "activation"
            found.append(
                SensitivityRow(
                    name=name,
                    rule=name,
                    kind=kind,
                    operator="",
                    dtype=dtype,
                    metric=float(error),
                    error=float(error),
                    macs=0.1,
                    bytes=size * factor,
                )
            )
    return found


def test_a_search_that_cannot_be_is_refused(net: Net, measured: Ranking) -> None:
    with pytest.raises(jq.JQuantError, match=r"the budget of 1 bytes is below the cheapest choice"):
        search_mixed_precision(net[0], measured, budget=1)
    with pytest.raises(jq.JQuantError, match=r"unknown cost 'flops'; known: bytes, macs"):
        search_mixed_precision(net[0], measured, budget=1, cost="flops")
    one_off = Ranking("mse", "one_off", 0.0, measured.rows)
    with pytest.raises(jq.JQuantError, match=r"needs a ranking of mode 'one_on'"):
        search_mixed_precision(net[0], one_off, budget=1e9)
    wide = Ranking("mse", "one_on", 0.0, tuple(_random_rows(np.random.default_rng(1), net[0].plan)))
    with pytest.raises(jq.JQuantError, match=r"'head.weight' as int16: .* search with cost='bytes'"):
        search_mixed_precision(net[0], wide, budget=1e9, cost="macs")
