"""Mixed precision in one call: against every choice that fits, and against taking the most sensitive values first."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import graphs

import jquant as jq
from jquant import ops
from jquant.analysis import mix_precision
from jquant.analysis.mixing import Mixed, first_samples, relative_noise, wide_share
from jquant.graph.evaluate import evaluate
from jquant.meanings.fake_quant import fake_quant_rule
from jquant.meanings.meaning import meaning_of

NASH = jq.targets.NASH_E
QCONFIG = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8())})


def spiked(seed: int) -> tuple[jq.Graph, dict]:
    """Values of unlike sizes and unlike needs: one channel of the second layer is far beyond the others."""
    build = graphs.Builder(seed)
    build.shapes["x"] = (3, 8, 8)
    x = build.add(ops.Relu(), (build.conv("x", 6, 3),), (6, 8, 8))
    spike = build.conv(x, 4, 3)
    weight = build.params[f"{spike}.weight"]
    build.params[f"{spike}.weight"] = weight.at[0].multiply(20.0)
    x = build.add(ops.Sigmoid(), (build.conv(build.add(ops.Relu(), (spike,), (4, 8, 8)), 6, 3, 2),), (6, 4, 4))
    x = build.add(ops.Mean(axes=(2, 3)), (build.conv(x, 4, 3),), (4,))
    head = {"weight": build.array("head.weight", 5, 4), "bias": build.array("head.bias", 5)}
    return build.graph(build.add(ops.Linear(), (x,), (5,), **head), size=8), build.params


def batches(graph: jq.Graph) -> list:
    return [graphs.images(i, graph, batch=8) for i in range(4)]


@pytest.fixture(scope="module", params=[5, pytest.param(0, marks=pytest.mark.slow)])
def found(request: pytest.FixtureRequest) -> tuple[Mixed, list, tuple[jq.Graph, dict]]:
    net = spiked(request.param)
    data = batches(net[0])
    return mix_precision(*net, QCONFIG, data, target=NASH, share=0.25), data, net


def noise_of_choices(models: dict[str, jq.Model], x: jnp.ndarray) -> Callable[[frozenset[str]], float]:
    """Noise over signal of the output with int16 for some values, all quantizers on; without the search."""
    narrow = models["int8"]
    rule = fake_quant_rule(narrow.plan, narrow.params, narrow.qparams)
    (output,) = narrow.plan.graph.outputs
    wanted = meaning_of(narrow, "float").values({"x": x})[output]

    @jax.jit  # one program for all choices
    def noise(is_wide: dict[str, jnp.ndarray]) -> jnp.ndarray:
        def tap(name: str, value: jnp.ndarray) -> jnp.ndarray:
            if name not in narrow.plan.owned:
                return value
            each = [jq.fake_quant(value, m.qparams[name], m.plan.spec(name)) for m in (models["int16"], narrow)]
            return jnp.where(is_wide[name], *each)

        return relative_noise(wanted, evaluate(narrow.plan.graph, {"x": x}, rule, tap)[output])

    return lambda wide: float(noise({name: jnp.asarray(name in wide) for name in narrow.plan.owned}))


def calibrated(net: tuple[jq.Graph, dict], data: list, dtype: str) -> jq.Model:
    value = {"int8": jq.int8, "int16": jq.int16}[dtype]()
    rules = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=value)})
    return jq.calibrate(jq.prepare(*net, rules, target=NASH), data[:-1])


@pytest.fixture(scope="module")
def every_choice(found: tuple) -> tuple[dict[frozenset[str], float], dict[str, int]]:
    """{values at int16: noise} of all choices, and the bytes of each value at 8 bits."""
    mixed, data, net = found
    models = {dtype: calibrated(net, data, dtype) for dtype in ("int8", "int16")}
    names = [row.name for row in mixed.search.ranking.rows if row.dtype == "int16"]
    assert len(names) >= 5
    sizes = {row.name: row.bytes for row in mixed.search.ranking.rows if row.dtype == "int8"}
    (x,) = first_samples([(batch,) for batch in data[:-1]], 16)[0]
    choices = (frozenset(c) for k in range(len(names) + 1) for c in itertools.combinations(names, k))
    noise = noise_of_choices(models, x)
    return {choice: noise(choice) for choice in choices}, sizes


def test_the_choice_is_near_the_best_of_all(found: tuple, every_choice: tuple) -> None:
    (mixed, _, _), (noise, sizes) = found, every_choice
    chosen = frozenset(mixed.names)
    limit = sum(sizes[name] for name in chosen)
    weights = sum(np.prod(mixed.model.params[key].shape) for key in mixed.model.plan.weights)
    room = 0.25 * (sum(sizes.values()) + weights) / (2 - 0.25)
    assert limit <= room
    best = min(value for choice, value in noise.items() if sum(sizes[n] for n in choice) <= room)
    # Errors are taken to add up, and the weights' errors correlate with them: near, not equal.
    assert noise[chosen] <= 1.1 * best
    assert noise[chosen] < 0.8 * noise[frozenset()]


def test_the_choice_beats_the_most_sensitive_first(found: tuple, every_choice: tuple) -> None:
    """The habit of a fixed share of the most sensitive values, taken in order for as long as they fit."""
    (mixed, _, _), (noise, sizes) = found, every_choice
    room = sum(sizes[name] for name in mixed.names)
    errors = {row.name: row.error for row in mixed.search.ranking.rows if row.dtype == "int8" and row.name in sizes}
    habit: set[str] = set()
    for name in sorted(errors, key=errors.__getitem__, reverse=True):
        if sum(sizes[n] for n in habit | {name}) > room:
            break
        habit.add(name)
    assert noise[frozenset(mixed.names)] <= noise[frozenset(habit)] * (1 + 1e-6)


def test_the_model_is_the_choice(found: tuple) -> None:
    mixed, data, net = found
    plan = mixed.model.plan
    assert {name for name in plan.owned if plan.spec(name).dtype == "int16"} >= set(mixed.names)
    again = jq.prepare(*net, jq.QConfig({**QCONFIG.rules, **mixed.rules()}), target=NASH)
    assert again.plan == plan
    assert 0 < mixed.share <= 0.25
    assert mixed.share == wide_share(mixed.model, "bytes")
    wanted, got = (np.float64(jq.apply(mixed.model, data[-1], mode=mode)) for mode in ("float", "fake_quant"))
    assert mixed.mixed == pytest.approx(10 * np.log10(np.sum(wanted**2) / np.sum((got - wanted) ** 2)), abs=1e-3)
    assert mixed.narrow < mixed.mixed <= mixed.wide + 0.5
    assert mixed.names[0] in str(mixed)
    assert jq.run(jq.lower(mixed.model), data[0]).shape == (8, 5)


def test_multiply_accumulates_as_the_cost(found: tuple) -> None:
    _, data, net = found
    by_macs = mix_precision(*net, QCONFIG, data, target=NASH, share=0.4, cost="macs")
    assert 0 < by_macs.share <= 0.4
    assert "of the macs at int16" in str(by_macs)


def test_refuses(found: tuple) -> None:
    _, data, (graph, params) = found
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(jq.JQuantError, match="share must be"):
            mix_precision(graph, params, QCONFIG, data, target=NASH, share=share)
    with pytest.raises(jq.InputError, match="samples must be at least 1"):
        mix_precision(graph, params, QCONFIG, data, target=NASH, samples=0)
    wide = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int16())})
    with pytest.raises(jq.JQuantError, match="no value of the plan can have int16"):
        mix_precision(graph, params, wide, data, target=NASH)
