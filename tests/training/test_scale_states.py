"""States of a plan, and the optimizer's: what is refused, and what is carried through `prepare`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import graphs

import jquant as jq
from jquant import ops

NASH = jq.targets.NASH_E
RULES = {
    "*": jq.Policy(weight=jq.int8(axis="out", quantizer=jq.lsq), output=jq.int8(quantizer=jq.lsq)),
    "type:Input": jq.Policy(output=jq.int8(scale=1 / 32)),
}


def network() -> tuple[jq.Graph, dict]:
    build = graphs.Builder(5)
    build.shapes["x"] = (3, 6, 6)
    x = build.add(ops.Relu(), (build.batch_norm(build.conv("x", 4, 3)),), (4, 6, 6))
    x = build.batch_norm(
        build.add(ops.MaxPool(kernel=(2, 2), strides=(2, 2), padding=((0, 0),) * 2, dilation=(1, 1)), (x,), (4, 3, 3))
    )
    up = ops.ConvTranspose(strides=(1, 1), padding=((0, 0),) * 2, output_padding=(0, 0), dilation=(1, 1), groups=2)
    x = build.batch_norm(build.add(up, (x,), (4, 4, 4), weight=build.array("up.weight", 4, 2, 2, 2)))
    x = build.add(ops.Mean(axes=(2, 3)), (x,), (4,))
    x = build.add(ops.Linear(), (x,), (5,), weight=build.array("head.weight", 5, 4), bias=build.array("head.bias", 5))
    return build.graph(x, size=6), build.params


@pytest.fixture(scope="module")
def net() -> tuple:
    graph, raw = network()
    model = jq.prepare(graph, raw, jq.QConfig(RULES), target=NASH)
    x = graphs.images(1, graph, batch=4)
    return graph, raw, jq.calibrate(model, [x]), x


# ---------------------------------------------------------------------------------------------------------------------
# Scales


def test_every_value_and_weight_has_a_state(net: tuple) -> None:
    _, _, model, _ = net
    before = jq.training.find_states(model.replace(qparams={}))
    assert before.counts() == {"fixed": 1, "missing": len(model.plan.trained), "follows": 2, "high precision": 1}
    trained = model.qparams | {"n0.conv": model.qparams["n0.conv"] * 2}
    labels = jq.labels(model, freeze={"scale": ["up.weight"]})
    states = jq.training.check_states(model.replace(qparams=trained), "fake_quant", calibrated=model, labels=labels)
    assert {row.name for row in states.rows} == {*model.plan.values, *model.plan.weights}
    assert states.of("trained") == ("n0.conv",)
    assert set(states.of("calibrated")) == set(model.plan.trained) - {"n0.conv"}
    assert [row.name for row in states.rows if row.frozen] == ["up.weight"]
    assert re.search(r"n0\.conv +value +int8 +trained", str(states))


def test_a_kept_batch_norm_is_shown() -> None:
    graph, raw = network()
    model = jq.prepare(graph, raw, jq.QConfig(RULES), target=NASH, batch_norm={"*": "fold", "n1.*": "frozen"})
    (row,) = [row for row in jq.training.find_states(model).rows if row.note.startswith("batch norm")]
    assert (row.name, row.note) == ("n0.conv", "batch norm frozen")


def test_nonsense_is_refused(net: tuple) -> None:
    _, _, model, _ = net
    few = {key: value for key, value in model.qparams.items() if key != "up.weight"}
    cases = [
        ({}, r"mode 'fake_quant' before calibration: 'n0.conv', .* and \d more have no scale yet. Call jq.calibrate"),
        (few, r"mode 'fake_quant' before calibration: 'up.weight' has no scale yet"),
        (model.qparams | {"n0.conv": jnp.float32(0)}, "the scale of 'n0.conv' is 0: no calibration gives that"),
        (model.qparams | {"n0.conv": jnp.float32(np.nan)}, "the scale of 'n0.conv' is not finite"),
        (model.qparams | {"n0.conv": jnp.float32(2**-23)}, "'n0.conv' was 0 on all calibration data"),
        (model.qparams | {"n0.con": jnp.float32(1)}, "qparams has 'n0.con', which the plan does not"),
    ]
    for broken, message in cases:
        with pytest.raises(jq.CalibrationError, match=message):
            jq.training.check_states(model.replace(qparams=broken), "fake_quant")
    jq.training.check_states(model.replace(qparams={}), "float")
    jq.training.check_states(
        model.replace(qparams=model.qparams | {"n0.conv": jnp.float32(2**-23)}), "fake_quant", collapsed=["n0.*"]
    )
    with pytest.raises(jq.JQuantError, match="unknown mode 'train'"):
        jq.training.check_states(model, "train")


def test_scales_that_were_not_trained_are_found(net: tuple) -> None:
    _, _, model, _ = net
    moved = {key: value * 1.01 for key, value in model.qparams.items()}
    jq.training.check_states(model.replace(qparams=moved), "fake_quant", calibrated=model, trained=["*"])
    frozen = jq.labels(model, freeze=["up.*"])
    still = moved | {"up.weight": model.qparams["up.weight"]}
    with pytest.raises(jq.CalibrationError, match=r"not trained: 'up.weight' has the calibrated scale; no step moved"):
        jq.training.check_states(model.replace(qparams=still), "fake_quant", calibrated=model, trained=["*"])
    with pytest.raises(jq.CalibrationError, match="they are frozen by their labels"):
        jq.training.check_states(
            model.replace(qparams=still), "fake_quant", calibrated=model, trained=["up.*"], labels=frozen
        )
    with pytest.raises(jq.CalibrationError, match=r"'up.weihgt' matches no scale; did you mean 'up.weight'"):
        jq.training.check_states(model.replace(qparams=moved), "fake_quant", calibrated=model, trained=["up.weihgt"])
    with pytest.raises(jq.CalibrationError, match="pass calibrated="):
        jq.training.check_states(model.replace(qparams=moved), "fake_quant", trained=["*"])


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer


def gradients(net: tuple) -> tuple[dict, dict]:
    """Of one loss, by the float parameters and by those of the plan."""
    graph, raw, model, x = net
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(len(x), 5)), jnp.float32)
    by_float = jax.jit(jax.grad(lambda p: jnp.sum(weights * jq.graph.evaluate_float(graph, p, x)[0])))(raw)
    by_plan = jax.jit(
        jax.grad(lambda p: jnp.sum(weights * jq.apply_train(model.replace(params=p, qparams={}), x, mode="float")[0]))
    )(model.params)
    return by_float, by_plan


def test_moments_of_float_training_become_those_of_the_folded_parameters(net: tuple) -> None:
    """One float step leaves the gradient in the moments: moved, they must be the gradient by the plan's parameters."""
    graph, raw, model, _ = net
    by_float, by_plan = gradients(net)
    float_tx = optax.chain(optax.trace(0.9), optax.scale_by_adam(b1=0.0, b2=0.0), optax.scale(-0.1))
    with jax.numpy_dtype_promotion("standard"):  # optax mixes counts with floats
        _, state = float_tx.update(by_float, float_tx.init(raw), raw)
    weight = optax.chain(
        optax.trace(0.9), optax.scale_by_adam(), optax.scale_by_schedule(optax.constant_schedule(1e-3))
    )
    tx = optax.multi_transform(
        {"weight": weight, "scale": optax.adam(1e-4), "frozen": optax.set_to_zero()}, jq.labels(model)
    )
    with pytest.raises(jq.JQuantError, match="has two TraceState"):
        jq.training.migrate_optimizer_state(graph, raw, (state, state), tx=tx, trainable=model)
    moved = jq.training.migrate_optimizer_state(graph, raw, state, tx=tx, trainable=model)
    trace, adam, schedule = moved.inner_states["weight"].inner_state
    assert int(schedule.count) == 0
    assert int(adam.count) == 1
    alone = "n4.batchnorm.folded_weight"
    assert not np.any(adam.mu.params[alone])
    for key, wanted in by_plan.items():
        if key == alone:
            continue
        size = float(np.abs(wanted).max())
        for power, found in ((1, trace.trace), (1, adam.mu), (2, adam.nu)):
            found = found.params[key]
            np.testing.assert_allclose(
                found, wanted**power, rtol=1e-3, atol=1e-4 * size**power, err_msg=f"{key} {power}"
            )
    scales = moved.inner_states["scale"].inner_state[0]
    assert all(np.all(v == 0) for v in scales.mu.qparams.values())
    jq.TrainState.create(model, tx=tx, opt_state=moved)


def test_the_key_map_names_what_was_fused(net: tuple) -> None:
    graph, raw, model, _ = net
    sources = {key: source.key for key, source in jq.training.parameter_sources(graph, raw, model).items()}
    assert sources == {
        "n0.conv.weight": "n0.conv.weight",
        "n0.conv.bias": "n1.batchnorm.bias",
        "n4.batchnorm.folded_bias": "n4.batchnorm.bias",
        "up.weight": "up.weight",
        "n5.convtranspose.bias": "n6.batchnorm.bias",
        "head.weight": "head.weight",
        "head.bias": "head.bias",
    }


def test_a_kept_batch_norm_keeps_its_moments() -> None:
    graph, raw = network()
    model = jq.prepare(graph, raw, jq.QConfig(RULES), target=NASH, batch_norm={"*": "live", "n6.*": "fold"})
    trained, _ = jq.training.split_batch_stats(model)
    tx = optax.sgd(0.1, momentum=0.9)
    state = jax.tree.map(jnp.ones_like, tx.init(raw))
    moved = jq.training.migrate_optimizer_state(graph, raw, state, tx=tx, trainable=trained)
    assert all(np.all(moved[0].trace.params[k] == 1) for k in trained.params if not k.startswith(("up", "n5")))


def test_an_optimizer_from_before_prepare_is_refused(net: tuple) -> None:
    graph, raw, model, _ = net
    tx = optax.adam(1e-3)
    with pytest.raises(
        jq.JQuantError, match=r"made for other parameters \(it lacks .*An optimizer is built after prepare"
    ):
        jq.TrainState.create(model, tx=tx, opt_state=tx.init(raw))
    other = optax.sgd(1e-3, momentum=0.9)
    with pytest.raises(jq.JQuantError, match="the new optimizer has no state like ScaleByAdamState"):
        jq.training.migrate_optimizer_state(graph, raw, tx.init(raw), tx=other, trainable=model)
    with pytest.raises(jq.JQuantError, match="holds no moments"):
        jq.training.migrate_optimizer_state(graph, raw, optax.sgd(0.1).init(raw), tx=tx, trainable=model)
