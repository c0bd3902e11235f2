"""Float islands: float16 operators between quantized ones, only where a rule asks for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import graphs

import jquant as jq

INT8 = jq.Policy(weight=jq.int8(axis="out"), output=jq.int8())


@pytest.fixture(scope="module")
def network() -> tuple[jq.Graph, dict]:
    build = graphs.Builder(3)
    build.shapes["x"] = (3, 8, 8)
    x = build.conv("x", 6, 3)
    x = build.add(jq.ops.Sigmoid(), (x,), (6, 8, 8))
    x = build.conv(x, 4, 1)
    return build.graph(x, size=8), build.params


def island(network: tuple, target: jq.Target = jq.targets.NASH_E) -> jq.Model:
    graph, params = network
    config = jq.QConfig({"*": INT8, "type:Sigmoid": jq.Policy(output=jq.float16())})
    model = jq.prepare(graph, params, config, target=target)
    return jq.calibrate(model, [graphs.images(0, graph)])


def test_an_island_runs_in_float_between_integers(network: tuple) -> None:
    model = island(network)
    program = jq.lower(model)
    x = graphs.images(1, network[0])
    values = jq.run_with_taps(program, x)
    sigmoid = next(n.name for n in model.plan.graph.nodes if isinstance(n.op, jq.ops.Sigmoid))
    (before,) = model.plan.graph.by_name[sigmoid].inputs
    assert (values[before].dtype, values[sigmoid].dtype) == (jnp.int8, jnp.float16)
    real = values[before].astype(jnp.float32) * program.scales[before]
    expected = np.asarray(jax.nn.sigmoid(real)).astype(np.float16)
    np.testing.assert_array_equal(values[sigmoid], expected)
    border = values[f"{sigmoid}.to_int8"]
    scale = np.float32(program.scales[f"{sigmoid}.to_int8"])
    np.testing.assert_array_equal(border, np.rint(expected.astype(np.float32) / scale).clip(-128, 127))


def test_fake_quant_has_the_same_values(network: tuple) -> None:
    model = island(network)
    x = graphs.images(1, network[0])
    exact = jq.run(jq.lower(model), x)
    np.testing.assert_array_equal(jq.apply(model, x, mode="bit_true"), exact)
    sigmoid = next(n.name for n in model.plan.graph.nodes if isinstance(n.op, jq.ops.Sigmoid))
    _, values = jq.apply_with_taps(model, x)
    rounded = np.asarray(values[sigmoid]).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(values[sigmoid], rounded)
    assert sigmoid not in model.qparams
    assert f"{sigmoid}.to_int8" in model.qparams


def test_islands_are_listed(network: tuple) -> None:
    model = island(network)
    assert "border of a float island" in jq.explain(model)
    assert "float islands, evaluated in float: n1.sigmoid" in str(jq.lower(model))


def test_without_a_rule_there_is_none(network: tuple) -> None:
    graph, params = network
    model = jq.prepare(graph, params, jq.QConfig({"*": INT8}), target=jq.targets.NASH_E)
    program = jq.lower(jq.calibrate(model, [graphs.images(0, graph)]))
    assert "float islands" not in str(program)
    assert "float16" not in {f.output for f in program.formats.values()}


def test_a_program_with_an_island_is_saved_and_loaded(network: tuple, tmp_path) -> None:
    model = island(network)
    program, x = jq.lower(model), graphs.images(1, network[0])
    jq.save(tmp_path / "net.jq", program)
    np.testing.assert_array_equal(jq.run(jq.load(tmp_path / "net.jq"), x), jq.run(program, x))


def test_the_reference_says_that_it_has_no_float(network: tuple) -> None:
    model = island(network)
    with pytest.raises(jq.GraphError, match=r"n1\.sigmoid.*float island has no integer arithmetic"):
        jq.reference.run(jq.lower(model), np.asarray(graphs.images(1, network[0])))


def test_a_conv_may_be_an_island_too(network: tuple) -> None:
    graph, params = network
    config = jq.QConfig({"*": INT8, "n2.conv": jq.Policy(output=jq.float16())})
    model = jq.prepare(graph, params, config, target=jq.targets.NASH_E)
    model = jq.calibrate(model, [graphs.images(0, graph)])
    x = graphs.images(1, graph)
    y = jq.run(jq.lower(model), x)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, np.asarray(y).astype(np.float16).astype(np.float32))
    # The same float operator on the same dequantized values: one float16 rounding apart at most.
    fake = jq.apply(model, x)
    assert np.mean(np.abs(np.asarray(y - fake)) <= 2e-3 * np.abs(fake) + 0.05) > 0.99


@pytest.mark.parametrize("target", [jq.targets.NASH_P, jq.targets.NASH_H, jq.targets.NASH_B], ids=lambda t: t.name)
def test_float16_is_usable_where_integers_are_not_public(network: tuple, target: jq.Target) -> None:
    graph, params = network
    config = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.float16())})
    model = jq.prepare(graph, params, config, target=target)
    x = graphs.images(1, graph)
    y = jq.apply(jq.calibrate(model, [x]), x)
    assert np.abs(np.asarray(y - jq.apply(model, x, mode="float"))).max() < 0.1
    with pytest.raises(jq.LoweringError, match=f"{target.name}: its integer post-processing is not public"):
        jq.lower(jq.calibrate(model, [x]))


def test_the_gradient_of_the_cast_stops_where_it_clamps() -> None:
    spec = jq.float16()
    gradient = jax.grad(lambda x: jq.quantizers.float16_cast(x, jnp.float32(1), spec).sum())(
        jnp.asarray([1.0, 7e4, -7e4])
    )
    np.testing.assert_array_equal(gradient, [1.0, 0.0, 0.0])
    values = jq.quantizers.float16_cast(
        jnp.asarray([1.0 + 2**-11, 1.0 + 3 * 2**-11, 7e4, -jnp.inf]), jnp.float32(1), spec
    )
    np.testing.assert_array_equal(values, [1.0, 1.0 + 2**-9, 65504.0, -65504.0])  # ties to even, then the clamp
