"""Training: gradients reach everything that is to be trained, and nothing else changes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from support import graphs

import jquant as jq
from jquant import ops
from jquant.meanings.meaning import meaning_of

LSQ = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out", quantizer=jq.lsq), output=jq.int8(quantizer=jq.lsq))})
NASH = jq.targets.NASH_E
Net = tuple[jq.Model, jax.Array]


def built(*, dropout: bool = False) -> Net:
    build = graphs.Builder(21)
    build.shapes["x"] = (3, 8, 8)
    x = build.add(ops.Relu(), (build.batch_norm(build.conv("x", 6, 3)),), (6, 8, 8))
    y = build.batch_norm(build.conv(x, 6, 3, groups=6))
    x = build.add(ops.Relu(), (build.add(ops.Add(), (y, x), (6, 8, 8)),), (6, 8, 8))
    x = build.add(ops.Mean(axes=(2, 3)), (x,), (6,))
    x = build.add(ops.Dropout(rate=0.5), (x,), (6,)) if dropout else x
    x = build.add(ops.Linear(), (x,), (5,), weight=build.array("head.weight", 5, 6), bias=build.array("head.bias", 5))
    graph = build.graph(x, size=8)
    model = jq.prepare(graph, build.params, LSQ, target=NASH)
    images = graphs.images(1, graph, batch=6)
    return jq.calibrate(model, [images]), images


@pytest.fixture(scope="module")
def net() -> Net:
    return built()


@pytest.fixture(scope="module")
def dropping() -> Net:
    return built(dropout=True)


def gradient(net: Net, mode: str) -> jq.Model:
    """Of a loss that is linear in the outputs, so that two modes get the same cotangent."""
    model, x = net
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(len(x), 5)), jnp.float32)

    def loss(t: jq.Model) -> jax.Array:
        return jnp.sum(weights * jq.apply_train(t, x, mode=mode)[0])

    return jax.jit(jax.grad(loss))(model)


@pytest.mark.parametrize("mode", ["fake_quant", "bit_true"])
def test_the_gradient_reaches_every_parameter_and_scale(net: Net, mode: str) -> None:
    model, _ = net
    found = gradient(net, mode)
    assert found.params.keys() == set(model.plan.graph.param_names)
    assert found.qparams.keys() == {*model.plan.owned, *model.plan.weights}
    for leaves, values in ((found.params, model.params), (found.qparams, model.qparams)):
        for name, g in leaves.items():
            assert g.shape == values[name].shape
            assert np.isfinite(g).all(), name
            assert np.any(g != 0), f"dead gradient: {name}"


def test_bit_true_has_the_gradient_of_fake_quant(net: Net) -> None:
    jax.tree.map(np.testing.assert_array_equal, gradient(net, "bit_true"), gradient(net, "fake_quant"))


@settings(max_examples=8)
@given(network=graphs.networks())
def test_without_fake_quant_it_is_the_float_graph(network: tuple) -> None:
    graph, params = network
    model = jq.prepare(graph, params, LSQ, target=NASH)
    x = graphs.images(1, graph)
    (output,) = model.plan.graph.outputs
    float_values = jax.jit(lambda model: meaning_of(model, "float").values({"x": x}))(model)
    # Outside the jit of apply, inputs are constants and may compile otherwise: then it is the same to a few ulp.
    np.testing.assert_allclose(jq.apply_train(model, x, mode="float")[0], float_values[output], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(jq.apply_train(model, x, mode="float")[0], jq.apply(model, x, mode="float"))


def test_without_fake_quant_it_is_bit_equal_to_the_evaluated_graph(net: Net) -> None:
    model, x = net
    run = jax.jit(lambda p, x: jq.graph.evaluate_float(model.plan.graph, p, x))
    np.testing.assert_array_equal(
        jq.apply_train(model.replace(qparams={}), x, mode="float")[0], run(model.params, x)[0]
    )


def test_training_and_validation_agree_where_nothing_is_random(net: Net) -> None:
    model, x = net
    for mode in ("fake_quant", "bit_true"):
        y, stats = jq.apply_train(model, x, mode=mode, batch_stats={"a": x})
        np.testing.assert_array_equal(y, jq.apply(model, x, mode=mode))
        assert stats.keys() == {"a"}


def test_dropout_is_active_only_with_a_key(dropping: Net) -> None:
    model, x = dropping
    still = jq.apply_train(model, x)[0]
    np.testing.assert_array_equal(still, jq.apply(model, x, mode="fake_quant"))
    a, again, b = (jq.apply_train(model, x, rngs=jax.random.key(k))[0] for k in (0, 0, 1))
    np.testing.assert_array_equal(a, again)
    assert np.any(a != still)
    assert np.any(a != b)
    np.testing.assert_array_equal(jq.apply_train(model, x, mode="bit_true")[0], jq.run(jq.lower(model), x))


def test_bit_true_with_dropout_is_refused(dropping: Net) -> None:
    model, x = dropping
    with pytest.raises(jq.JQuantError, match=r"mode 'bit_true' with dropout.*use mode 'fake_quant'"):
        jq.apply_train(model, x, rngs=jax.random.key(0), mode="bit_true")


def step(state: jq.TrainState, x: jax.Array) -> jq.TrainState:
    def loss(t: jq.Model) -> jax.Array:
        return jnp.mean(jq.apply_train(t, x)[0] ** 2)

    return state.update(jax.grad(loss)(state.trainable))


def test_a_learning_rate_of_zero_changes_nothing(net: Net) -> None:
    model, x = net
    state = jq.TrainState.create(model, tx=optax.sgd(0.0))
    new = jax.jit(lambda s: step(s, x))(state)
    assert (int(state.step), int(new.step)) == (0, 1)
    jax.tree.map(np.testing.assert_array_equal, new.trainable, state.trainable)
    np.testing.assert_array_equal(jq.apply(new.model, x), jq.apply(model, x))


def test_frozen_parameters_and_scales_stay(net: Net) -> None:
    model, x = net
    labels = jq.labels(model, freeze=["head.*", "x"])
    assert labels.params["head.weight"] == labels.qparams["head.weight"] == labels.qparams["x"] == "frozen"
    assert labels.params["n0.conv.weight"] == "weight"
    assert labels.qparams["n0.conv.weight"] == "scale"
    rules = {"weight": optax.sgd(1e-2, momentum=0.9), "scale": optax.sgd(1e-4), "frozen": optax.set_to_zero()}
    state = jq.TrainState.create(model, tx=optax.multi_transform(rules, labels))
    for _ in range(3):
        state = step(state, x)
    for kind in ("params", "qparams"):
        for name, label in getattr(labels, kind).items():
            old, new = getattr(model, kind)[name], getattr(state.model, kind)[name]
            assert np.array_equal(old, new) == (label == "frozen"), f"{kind} {name}"
            assert new.dtype == jnp.float32
    before = float(jnp.mean(jq.apply(model, x) ** 2))
    assert float(jnp.mean(jq.apply(state.model, x) ** 2)) < before
    jq.lower(state.model)


def test_the_state_is_a_pytree_for_scan(net: Net) -> None:
    model, x = net
    state = jq.TrainState.create(model, tx=optax.sgd(1e-3, momentum=0.9))
    state, _ = jax.lax.scan(lambda s, batch: (step(s, batch), None), state, x.reshape(3, 2, *x.shape[1:]))
    assert int(state.step) == 3


def test_wrong_calls_are_refused(net: Net) -> None:
    model, x = net
    with pytest.raises(jq.JQuantError, match=r"unknown mode 'fake_qaunt'; known: .*did you mean 'fake_quant'"):
        jq.apply_train(model, x, mode="fake_qaunt")
    with pytest.raises(jq.JQuantError, match="unknown mode 'bittrue'"):
        jq.apply(model, x, mode="bittrue")
    with pytest.raises(jq.QConfigError, match=r"freeze pattern 'haed.bias' matches nothing; did you mean 'head.bias'"):
        jq.labels(model, freeze=["haed.bias"])
    with pytest.raises(jq.CalibrationError, match="no scale for 'x'"):
        jq.apply_train(model.replace(qparams={}), x)
    with pytest.raises(jq.CalibrationError, match="no scale for 'x'"):
        jq.TrainState.create(model.replace(qparams={}), tx=optax.sgd(0.1))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.float32(np.nan)}, jq.CalibrationError, "the scale of 'x' is not finite"),
        ({"x": np.float64(0.1)}, jq.CalibrationError, "the scale of 'x' is not a float32 array"),
        ({"x": 0.1}, jq.CalibrationError, "the scale of 'x' is not a float32 array"),
        (
            {"n0.con": np.float32(1)},
            jq.CalibrationError,
            "qparams has 'n0.con', which the plan does not; did you mean 'n0.conv'",
        ),
    ],
)
def test_broken_scales_are_refused(net: Net, change: dict, error: type, message: str) -> None:
    model, x = net
    for call in (jq.apply_train, jq.apply):
        with pytest.raises(error, match=re.escape(message)):
            call(model.replace(qparams=model.qparams | change), x)
    with pytest.raises(error, match=re.escape(message)):
        jq.lower(model.replace(qparams=model.qparams | change))


def test_broken_inputs_are_refused(net: Net) -> None:
    model, x = net
    for call in (jq.apply_train, jq.apply):
        with pytest.raises(jq.InputError, match="contains NaN or infinite"):
            call(model, x.at[0, 0, 0, 0].set(jnp.nan))
        with pytest.raises(jq.InputError, match="is float16, expected float32"):
            call(model, x.astype(jnp.float16))
        with pytest.raises(jq.CalibrationError, match=r"parameter 'head.bias' contains NaN"):
            call(model.replace(params=model.params | {"head.bias": jnp.full(5, jnp.inf)}), x)


def test_adam_trains_under_strict_promotion() -> None:
    """optax mixes int32 counts with float32; the suite runs under strict promotion, as a careful user's code does."""
    build = graphs.Builder(3)
    build.shapes["x"] = (3, 8, 8)
    x = build.add(jq.ops.Mean(axes=(2, 3)), (build.conv("x", 4, 3),), (4,))
    graph = build.graph(x, size=8)
    config = jq.QConfig(
        {"*": jq.Policy(weight=jq.int8(axis="out", quantizer=jq.lsq), output=jq.int8(quantizer=jq.lsq))}
    )
    model = jq.prepare(graph, build.params, config, target=jq.targets.NASH_E)
    images = graphs.images(0, graph)
    state = jq.TrainState.create(jq.calibrate(model, [images]), tx=optax.adam(1e-3))

    def loss(trainable: jq.Model) -> jax.Array:
        return (jq.apply_train(trainable, images)[0] ** 2).mean()

    after = jax.jit(lambda s: s.update(jax.grad(loss)(s.trainable)))(state)
    assert loss(after.trainable) < loss(state.trainable)
    assert int(after.step) == 1
