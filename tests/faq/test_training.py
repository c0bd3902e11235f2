"""Rows about NaN and training: each state that goes wrong is played, and named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant import analysis

INT8 = {"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8())}
X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)
Calibrated = jq.Model


def calibrated(fn, params: dict, rules: dict | None = None) -> Calibrated:
    graph, params = jq.trace(fn, params, X)
    model = jq.prepare(graph, params, jq.QConfig(INT8 | (rules or {})), target="nash-e")
    return jq.calibrate(model, [X])


def dense(params: dict, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ params["a"]["kernel"]) @ params["b"]["kernel"]


@pytest.fixture(scope="module")
def net() -> Calibrated:
    rng = np.random.default_rng(1)
    shapes = {"a": (4, 6), "b": (6, 3)}
    return calibrated(dense, {n: {"kernel": jnp.asarray(rng.normal(size=s), jnp.float32)} for n, s in shapes.items()})


def messages(net: Calibrated, qparams: dict, **options: object) -> list[str]:
    model = net
    return [f"{f.where}: {f.message}" for f in analysis.nan_checklist(model.replace(qparams=qparams), X, **options)]


# -- rows 12, 13, 15: the states that the checklist is for


def test_row_12_a_sound_model_has_nothing_on_the_list(net: Calibrated) -> None:
    assert messages(net, net.qparams) == []


def test_row_13_nan_in_the_input(net: Calibrated) -> None:
    model = net
    (found,) = analysis.nan_checklist(model, X.at[2, 1].set(jnp.inf).at[0, 0].set(jnp.nan))
    assert (found.where, found.numbers["count"]) == ("x", 2)
    with pytest.raises(jq.InputError, match="1 inputs, and 2 were given"):
        analysis.nan_checklist(model, X, X)


def test_row_15_not_calibrated(net: Calibrated) -> None:
    assert messages(net, {}) == [": the model is not calibrated: no value has a scale"]


def test_row_15_one_scale_is_missing(net: Calibrated) -> None:
    rest = {name: scale for name, scale in net.qparams.items() if name != "a"}
    assert messages(net, rest) == ["a: it has no scale"]


def test_row_15_scales_of_zero_and_of_one(net: Calibrated) -> None:
    model = net
    zeros, ones = jax.tree.map(jnp.zeros_like, model.qparams), jax.tree.map(jnp.ones_like, model.qparams)
    assert set(messages(net, zeros)) == {
        f"{n}: the scale of the {'weight' if n in model.plan.weights else 'value'} is 0: no calibration gives that"
        for n in model.plan.trained
    }
    assert messages(net, ones) == [": all scales are 1: the default of a format, which no calibration gives"]
    for mode in ("fake_quant", "tables", "bit_true"):
        with pytest.raises(jq.CalibrationError, match=r"the scale of 'x' is 0: it was never set; call jq.calibrate"):
            jq.apply(model.replace(qparams=zeros), X, mode=mode)
    with pytest.raises(jq.CalibrationError, match="'x' is 0"):
        jq.lower(model.replace(qparams=zeros))
    assert jq.apply(model, X).shape == (8, 3)


def test_row_12_nan_in_the_scale_of_a_weight_is_named(net: Calibrated) -> None:
    broken = net.qparams | {"a.kernel": net.qparams["a.kernel"].at[1].set(jnp.nan)}
    assert messages(net, broken) == ["a.kernel: the scale of the weight is not finite"]


def test_row_12_a_gradient_that_is_nan_is_named_where_all_values_are_finite() -> None:
    def root(params: dict, x: jax.Array) -> jax.Array:
        return jnp.sqrt(jax.nn.relu(x @ params["a"]["kernel"]))

    kernel = jnp.asarray(np.random.default_rng(2).normal(size=(4, 3)), jnp.float32)
    net = calibrated(root, {"a": {"kernel": kernel}})
    assert bool(jnp.isfinite(jq.apply(net, X)).all())
    (found,) = messages(net, net.qparams)
    assert "the gradient that comes back to" in found
    assert "Sqrt" in found
    assert messages(net, net.qparams, loss=lambda y: jnp.float32(0) * y.max()) != []  # 0 * inf


# -- row 14: has the float model converged


@pytest.mark.parametrize(
    ("losses", "level", "words"),
    [
        (np.linspace(2.0, 0.2, 10), "warning", "still falls, by 0.2 an epoch"),
        ([2.0, 1.0, 0.5, 0.3, 0.3, 0.3, 0.3, 0.3], "note", "flat: the training has converged"),
        ([2.0, 1.2, 0.5, 0.31, 0.30, 0.32, 0.29, 0.31, 0.30], "note", "flat: the training has converged"),
        ([2.0, 1.0, 0.5, 0.4, 0.5, 0.6, 0.7, 0.8], "error", "rises, by 0.1 an epoch"),
        ([2.0, 1.0, 0.5, 0.4, 0.9, 0.9, 0.9, 0.9], "error", "has risen again from 0.4"),
        ([2.0, 1.0, float("nan")], "error", "the loss is nan from value 3 of 3 on"),
        ([2.0, float("inf"), 1.0, 1.0, 1.0], "error", "the loss is inf from value 2"),
        ([2.0, 1.0, 0.5], "note", "3 losses are too few"),
        ([0.7] * 8, "warning", "hardly fallen since the first epoch"),
    ],
)
def test_row_14_every_curve_has_a_judgement(losses: list, level: str, words: str, net: Calibrated) -> None:
    found = analysis.judge_losses(losses)
    assert found.level == level
    assert words in found.message
    if "per_epoch" in found.numbers:  # numpy's own line through the last third
        tail = np.asarray(losses, np.float64)[-max(3, len(losses) // 3) :]
        assert found.numbers["per_epoch"] == pytest.approx(np.polyfit(np.arange(len(tail)), tail, 1)[0], abs=1e-12)
    listed = messages(net, net.qparams, losses=list(losses))
    assert listed == ([] if "has converged" in words else [f": {found.message}"])


def test_row_14_what_is_no_curve() -> None:
    with pytest.raises(jq.InputError, match="losses must be"):
        analysis.judge_losses([])
    with pytest.raises(jq.InputError, match="losses must be numbers"):
        analysis.judge_losses(["a"])


# -- row 16: learning rate, gradients, schedule; row 9: batches


def test_row_16_a_rate_that_is_no_rate(net: Calibrated) -> None:
    assert messages(net, net.qparams, learning_rate=float("nan")) == [": the learning rate is nan"]
    assert "high for QAT" in messages(net, net.qparams, learning_rate=0.1, float_learning_rate=0.1)[0]
    assert messages(net, net.qparams, learning_rate=0.01, float_learning_rate=0.1) == []
    for name in ("learning_rate", "scale_rate", "weight_decay", "momentum", "clip", "threshold_decay"):
        for wrong in (float("nan"), float("inf"), -1.0, "0.1"):
            with pytest.raises(jq.QConfigError, match=f"{name} must be a finite number"):
                jq.training.make_optimizer(net, **{"learning_rate": 0.1, name: wrong})


@pytest.mark.parametrize(
    "schedule", ["OneCycleLR", "one_cycle", "CyclicLR", "get_linear_schedule_with_warmup", "WarmUp"]
)
def test_row_16_schedules_with_a_high_rate_are_remarked_on(schedule: str) -> None:
    name = schedule.removeprefix("get_").replace("_schedule", "")
    found = analysis.training_advice(0.1, 100, float_batch=256, batch=256, schedule=name)
    assert "SGD with step decay" in found[-1].fix


@pytest.mark.parametrize("schedule", ["CosineAnnealingLR", "StepLR", "MultiStepLR", "constant", "exponential_decay"])
def test_row_16_other_schedules_are_not(schedule: str) -> None:
    found = analysis.training_advice(0.1, 100, float_batch=256, batch=256, schedule=schedule)
    assert [f.check for f in found] == ["learning rate", "epochs"]


def test_row_16_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(jq.QConfigError, match=r"unknown schedule 'OneCicleLR'; did you mean 'onecycle'"):
        analysis.training_advice(0.1, 100, float_batch=256, batch=256, schedule="OneCicleLR")
    with pytest.raises(jq.QConfigError, match=r"float_learning_rate must be positive and finite, not nan"):
        analysis.training_advice(float("nan"), 100, float_batch=256, batch=256)


def test_row_9_the_rule_is_that_of_the_optimizer() -> None:
    sgd = analysis.training_advice(0.1, 100, float_batch=64, batch=64, devices=4)[0]
    adam = analysis.training_advice(1e-3, 100, float_batch=64, batch=64, devices=4, optimizer="adamw")[0]
    assert sgd.numbers["learning_rate"] == pytest.approx(0.1 / 10 * 4)
    assert adam.numbers["learning_rate"] == pytest.approx(1e-3 / 10 * 2)  # the square root of 4
    assert sgd.level == adam.level == "warning"
    replaced = analysis.training_advice(
        1e-3, 100, float_batch=64, batch=64, devices=4, optimizer="adamw", schedule="OneCycleLR"
    )[0]
    assert replaced.numbers["learning_rate"] == 1e-3
    assert "says nothing about that of SGD" in replaced.message
    trained = jq.training.FloatTraining(
        learning_rate=3e-4, epochs=90, batch=64, optimizer="adamw", schedule="one_cycle"
    )
    recipe = jq.training.recommend(trained, batch=1024, calibration_drop=0.02)
    assert (recipe.optimizer, recipe.learning_rate) == ("sgd", 1e-3)
    with pytest.raises(jq.QConfigError, match=r"schedule 'onecycle'; known: .*did you mean 'one_cycle'"):
        jq.training.FloatTraining(learning_rate=0.1, epochs=90, batch=64, schedule="onecycle")


# -- rows 2 to 6: what next


def test_row_4_accuracies_that_are_none() -> None:
    with pytest.raises(jq.JQuantError, match="the calibrated accuracy is nan"):
        analysis.advise(75.0, float("nan"))
    with pytest.raises(
        jq.JQuantError, match=r"the float accuracy is 0\.76 and the calibrated accuracy 75: a fraction and percent"
    ):
        analysis.advise(0.76, 75.0)
    assert "99.3 % of float" in analysis.advise(0.72, 0.715)[0].message
    assert "99.3 % of float" in analysis.advise(72.0, 71.5)[0].message


def test_row_3_almost_at_the_target_or_train() -> None:
    assert "observers" in analysis.advise(72.0, 71.4, target=71.9)[0].fix
    assert "train (QAT)" in analysis.advise(72.0, 69.0)[0].fix


def test_row_5_and_6_after_training() -> None:
    assert "back to calibration" in analysis.advise(72.0, 60.0, 66.0)[0].fix
    assert "pipeline" in analysis.advise(72.0, 70.0, 65.0)[0].fix
    (same,) = analysis.advise(72.0, 66.0, 66.0)
    assert same.level == "warning"
    assert "changed nothing" in same.message


# -- row 10: PACT


def _pact(rules: dict) -> Calibrated:
    rng = np.random.default_rng(4)
    params = {"a": {"kernel": jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)}, "b": {"kernel": jnp.ones((6, 3))}}
    return calibrated(dense, params, rules)


def test_row_10_pact_starts_where_something_clips_and_its_threshold_moves() -> None:
    data = jnp.asarray(np.random.default_rng(5).normal(size=(4096, 4)), jnp.float32)
    graph, params = jq.trace(dense, {"a": {"kernel": jnp.eye(4, 6)}, "b": {"kernel": jnp.ones((6, 3))}}, data)
    rules = jq.QConfig(INT8 | {"relu": jq.Policy(output=jq.int8(quantizer="pact"))})
    model = jq.prepare(graph, params, rules, target="nash-e")
    model = jq.calibrate(model, [data])
    peak = float(jnp.max(jnp.maximum(data, 0.0)))
    (name,) = [n for n in model.plan.owned if model.plan.spec(n).quantizer is jq.pact]
    assert 0 < float(model.qparams[name]) < peak

    def loss(qparams: dict) -> jax.Array:
        return jnp.sum(jq.apply(model.replace(qparams=qparams), data, mode="fake_quant"))

    def on_grid(value: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return np.clip(np.rint(np.asarray(value) / scale), -128, 127) * scale

    x = on_grid(data, np.asarray(model.qparams["x"]))
    a, b = (on_grid(model.params[key], np.asarray(model.qparams[key])[:, None]).T for key in ("a.kernel", "b.kernel"))
    clipped = np.maximum(x @ a, 0) >= np.asarray(model.qparams[name])
    assert 0 < clipped.sum() < 100
    slope = (clipped @ b.astype(np.float64)).sum()  # alpha goes to all outputs, through the weight
    assert float(jax.grad(loss)(model.qparams)[name]) == pytest.approx(slope, rel=1e-5)
    at_peak = model.qparams | {name: jnp.float32(peak * 1.01)}
    assert float(jax.grad(loss)(at_peak)[name]) == 0.0  # what min_max would start from


@pytest.mark.parametrize(("optimizer", "step"), [("sgd", 0.1 * 1.9), ("adamw", 0.1)])
def test_row_10_the_threshold_decays_as_in_the_paper(optimizer: str, step: float) -> None:
    """With no gradient, alpha becomes (1 - rate * decay) * alpha; nesterov's first step is 1 + momentum of it."""
    model = _pact({"relu": jq.Policy(output=jq.int8(quantizer="pact"))})
    (name,) = [n for n in model.plan.owned if model.plan.spec(n).quantizer is jq.pact]
    for decay, own in ((None, 0.01), (0.02, 0.02)):
        tx = jq.training.make_optimizer(
            model, optimizer=optimizer, learning_rate=0.1, weight_decay=0.01, threshold_decay=decay
        )
        state = jq.TrainState.create(model, tx=tx)
        new = state.update(jax.tree.map(jnp.zeros_like, state.trainable))
        ratio = float(new.model.qparams[name]) / float(model.qparams[name])
        assert ratio == pytest.approx(1 - step * own, abs=1e-6)
        others = [n for n in model.qparams if n != name]
        assert all(np.array_equal(new.model.qparams[n], model.qparams[n]) for n in others)
