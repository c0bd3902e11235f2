"""Around the step of training: checks that a trainer needs, recipes, the loop, curves."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import graphs

import jquant as jq
from jquant import ops, training
from jquant.training.loop import Step

NASH = jq.targets.NASH_E
LSQ = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out", quantizer=jq.lsq), output=jq.int8(quantizer=jq.lsq))})


def prepared(mode: str = "fold") -> jq.Model:
    build = graphs.Builder(3)
    build.shapes["x"] = (2, 6, 6)
    x = build.add(ops.Relu(), (build.batch_norm(build.conv("x", 4, 3)),), (4, 6, 6))
    x = build.add(ops.Mean(axes=(2, 3)), (x,), (4,))
    x = build.add(ops.Linear(), (x,), (3,), weight=build.array("head.weight", 3, 4), bias=build.array("head.bias", 3))
    graph = build.graph(x, size=6)
    model = jq.prepare(graph, build.params, LSQ, target=NASH, batch_norm=mode)
    return jq.calibrate(model, [batch[0] for batch in batches(4)])


def batches(count: int, size: int = 16) -> list[tuple[jax.Array, jax.Array]]:
    """Images [N, 2, 6, 6], and the class by which channel is brighter, or neither."""
    generator, found = np.random.default_rng(7), []
    for _ in range(count):
        x = generator.normal(size=(size, 2, 6, 6)).astype(np.float32)
        difference = x[:, 0].mean((1, 2)) - x[:, 1].mean((1, 2))
        found.append((jnp.asarray(x), jnp.asarray(np.digitize(difference, [-0.1, 0.1]), jnp.int32)))
    return found


def loss(logits: jax.Array, batch: tuple) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def measured(logits: jax.Array, batch: tuple) -> tuple[jax.Array, dict]:
    return loss(logits, batch), {"accuracy": jnp.mean(jnp.argmax(logits, -1) == batch[1])}


@pytest.fixture(scope="module")
def net() -> jq.Model:
    return prepared()


@pytest.fixture(scope="module")
def step(net: jq.Model) -> Step:
    return training.make_step(measured, donate=False)


def state_of(net: jq.Model, **options: object) -> jq.TrainState:
    options = {"learning_rate": 0.05} | options
    return jq.TrainState.create(net, tx=training.make_optimizer(net, **options))


def accuracy(net: jq.Model, state: jq.TrainState) -> float:
    x, labels = batches(1, 64)[0]
    logits = jq.apply(state.model, x)
    return float((np.asarray(logits).argmax(-1) == np.asarray(labels)).mean())


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def test_a_learning_rate_of_zero_keeps_the_calibrated_accuracy(net: jq.Model, step: Step) -> None:
    def evaluate(state: jq.TrainState) -> float:
        return accuracy(net, state)

    calibrated = accuracy(net, state_of(net))
    zero = state_of(net, learning_rate=0.0, weight_decay=0.1)
    assert training.check_zero_learning_rate(step, zero, batches(3), evaluate=evaluate) == calibrated
    decayed = optax.chain(optax.sgd(0.0), optax.add_decayed_weights(-1e-3))
    wrong = jq.TrainState.create(net, tx=decayed)
    with pytest.raises(training.TrainingError, match=r"moved trainable\.params\['head.bias'\].*weight decay"):
        training.check_zero_learning_rate(step, wrong, batches(1), evaluate=evaluate)
    noise = iter(range(9))
    with pytest.raises(training.TrainingError, match=r"evaluated twice.*is it random"):
        training.check_zero_learning_rate(step, zero, batches(1), evaluate=lambda _: next(noise))


def test_live_statistics_are_named_by_the_check() -> None:
    live = prepared("live")
    zero = state_of(live, learning_rate=0.0)
    step = training.make_step(loss, donate=False)
    with pytest.raises(training.TrainingError, match=r"moved batch_stats.*set_batch_statistics\(model, 'running'\)"):
        training.check_zero_learning_rate(step, zero, batches(1), evaluate=lambda _: 0)


def test_without_fake_quant_training_is_float_training_bit_for_bit(net: jq.Model) -> None:
    """The reference knows nothing of QAT: it differentiates the evaluated float graph."""
    model = net
    tx = optax.sgd(0.05, momentum=0.9)
    state = jq.TrainState.create(model, tx=tx)

    def objective(trainable: jq.Model, batch: tuple) -> jax.Array:
        return loss(jq.graph.evaluate_float(model.plan.graph, trainable.params, batch[0])[0], batch)

    @jax.jit
    def reference(state: jq.TrainState, batch: tuple) -> tuple[jq.TrainState, dict]:
        value, grads = jax.value_and_grad(objective)(state.trainable, batch)
        return state.update(grads), {"loss": value}

    off = training.make_step(loss, mode="float", donate=False)
    assert training.check_float_training(off, reference, state, batches(6)) == 6
    on = training.make_step(loss, mode="fake_quant", donate=False)
    with pytest.raises(training.TrainingError, match=r"step 1: loss\['loss'\] differs from float training: up to"):
        training.check_float_training(on, reference, state, batches(2))
    with pytest.raises(training.TrainingError, match="no batches"):
        training.check_float_training(off, reference, state, [])


def test_the_first_loss_raises_an_alarm() -> None:
    training.check_initial_loss(0.55, float_loss=0.5)
    with pytest.raises(training.TrainingError, match=r"the first QAT loss is 2.3, that of the float model 0.5"):
        training.check_initial_loss(2.3, float_loss=0.5)
    with pytest.raises(training.TrainingError, match="find_nan"):
        training.check_initial_loss(float("nan"), float_loss=0.5)


# ---------------------------------------------------------------------------------------------------------------------
# NaN


def fragile(op: jq.ops.Op, bias: float = 0.0) -> jq.Model:
    """x -> linear `before` -> op -> linear `after`, in float where fake-quant would hide what happens."""
    build = graphs.Builder(3)
    build.shapes["x"] = (4,)
    nodes = (
        jq.Node("before", ops.Linear(), ("x",), jq.FrozenMap({"weight": "w", "bias": "b"})),
        jq.Node("middle", op, ("before",)),
        jq.Node("after", ops.Linear(), ("middle",), jq.FrozenMap({"weight": "v"})),
    )
    params = {"w": jnp.ones((2, 4)), "b": jnp.full(2, bias), "v": jnp.ones((1, 2))}
    graph = jq.Graph((jq.Input("x", (None, 4)),), nodes, ("after",))
    return jq.prepare(graph, params, jq.QConfig({"*": None}), target=NASH)


def test_the_first_nan_is_found() -> None:
    x = jnp.zeros((3, 4), jnp.float32)

    def total(y: jax.Array) -> jax.Array:
        return jnp.sum(y)

    model = fragile(ops.Log(), bias=-1.0)
    found = training.find_nan(model, x, loss=total)
    assert (found.where, found.name, found.operator) == ("forward", "middle", "Log")
    model = fragile(ops.Sqrt())  # sqrt(0) is 0, its slope infinite
    found = training.find_nan(model, x, loss=total)
    assert (found.where, found.name, found.operator) == ("backward", "before", "from middle: Sqrt")
    assert "the gradient that comes back to 'before' is the first that is not finite (from middle: Sqrt)" in str(found)
    model = fragile(ops.Relu())
    assert training.find_nan(model, x, loss=total) is None
    assert training.find_nan(model, x, loss=lambda y: jnp.log(-1 - jnp.sum(y) ** 2)).where == "loss"
    assert training.find_nan(model, x.at[0].set(jnp.nan), loss=total).where == "input"
    broken = model.replace(params=model.params | {"v": jnp.full((1, 2), jnp.inf)})
    assert training.find_nan(broken, x, loss=total) == training.NotFinite("parameter", "v")


def test_an_infinity_that_saturates_is_found(net: jq.Model) -> None:
    model = net
    huge = model.params | {"n0.conv.weight": model.params["n0.conv.weight"].at[:].set(3e38)}
    x = jnp.abs(batches(1)[0][0])  # of one sign: in which order a convolution sums must not make NaN of infinities
    model = model.replace(params=huge, qparams=model.qparams | {"n0.conv.weight": jnp.full(4, 3e36)})
    assert np.isfinite(jq.apply(model, x)).all()
    found = training.find_nan(model, x, loss=lambda y: y.sum())
    assert (found.where, found.name, found.operator) == ("forward", "n0.conv", "Conv")


def test_the_step_of_the_first_nan_is_found(net: jq.Model, step: Step) -> None:
    data = batches(4)
    data[2] = (data[2][0], data[2][1])
    assert training.find_first_nan(step, state_of(net), data, loss=loss) is None

    def poisoned(state: jq.TrainState, batch: tuple) -> tuple:
        new, metrics = step(state, batch)
        bad = new.trainable.params | {"head.weight": new.model.params["head.weight"] * jnp.inf}
        broken = jq.TrainState(new.step, new.trainable.replace(params=bad), {}, new.opt_state, new.tx)
        return (broken if int(state.step) == 2 else new), metrics

    found = training.find_first_nan(poisoned, state_of(net), data, loss=loss)
    assert (found.where, found.name, found.step) == ("update", "head.weight", 2)

    def explode(logits: jax.Array, batch: tuple) -> jax.Array:
        return loss(logits, batch) / (batch[0].shape[0] - 8)

    data[1] = (data[1][0][:8], data[1][1][:8])
    exploding = training.make_step(explode, donate=False)
    found = training.find_first_nan(exploding, state_of(net), data, loss=explode)
    assert (found.where, found.step) == ("loss", 1)


# ---------------------------------------------------------------------------------------------------------------------
# Recipes


def test_the_learning_rate_grows_with_the_global_batch() -> None:
    assert training.scale_learning_rate(0.1, batch=1024, base_batch=256) == pytest.approx(0.4)
    assert training.scale_learning_rate(0.1, batch=1024, base_batch=256, rule="sqrt") == pytest.approx(0.2)
    with pytest.raises(jq.QConfigError, match="batches must be at least 1"):
        training.scale_learning_rate(0.1, batch=0, base_batch=256)


def test_schedules_end_small() -> None:
    step = training.step_decay(1e-3, steps=90)
    assert [float(step(i)) for i in (0, 29, 31, 61, 89)] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-5, 1e-5])
    cosine = training.cosine_decay(1e-3, steps=90)
    assert [float(cosine(i)) for i in (0, 45, 90)] == pytest.approx([1e-3, 5.05e-4, 1e-5])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_recipes_train_and_decay_kernels_alone(net: jq.Model, step: Step, optimizer: str) -> None:
    model = net
    rate = {"sgd": 0.05, "adamw": 0.01}[optimizer]
    state = state_of(net, optimizer=optimizer, learning_rate=rate, weight_decay=1e-3, clip=1.0)
    state, history = training.fit(step, state, batches(20), report_every=1)
    losses = [value for _, value in history.metrics["loss"]]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert all(np.any(state.model.qparams[k] != model.qparams[k]) for k in model.plan.trained)

    decayed = state_of(net, optimizer=optimizer, learning_rate=0.1, weight_decay=0.1, freeze={"scale": ["x"]})
    nothing = jax.tree.map(jnp.zeros_like, decayed.trainable)
    moved = decayed.update(nothing)
    kernels = {k for k in model.params if not np.array_equal(moved.model.params[k], model.params[k])}
    assert kernels == {"n0.conv.weight", "head.weight"}
    assert all(np.array_equal(moved.model.qparams[k], model.qparams[k]) for k in model.plan.trained)


def test_scales_move_relatively_under_adam_and_clipping_is_global(net: jq.Model) -> None:
    model = net
    state = state_of(net, optimizer="adamw", learning_rate=1e-2)
    ones = jax.tree.map(jnp.ones_like, state.trainable)
    moved = state.update(ones)
    for name in model.plan.owned:
        assert float(moved.model.qparams[name] / model.qparams[name]) == pytest.approx(0.99, abs=1e-4)
    clipped = state_of(net, learning_rate=1.0, momentum=0.0, clip=1e-3)
    moved = clipped.update(jax.tree.map(lambda g: 1e6 * g, ones))
    moves = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), moved.trainable, clipped.trainable)
    assert np.sqrt(sum(map(float, jax.tree.leaves(moves)))) == pytest.approx(1e-3, rel=1e-2)


def test_rules_of_thumb_say_why(net: jq.Model) -> None:
    trained = training.FloatTraining(learning_rate=0.1, epochs=90, batch=256, weight_decay=1e-4)
    good = training.recommend(trained, batch=64, calibration_drop=0.002)
    assert good.learning_rate == pytest.approx(0.1 / 20 / 4)
    assert (good.schedule, good.decays, good.epochs, good.train_scales, good.clip) == ("step", 2, 9.0, False, None)
    assert good.why.keys() == {f for f in training.Recipe.__dataclass_fields__ if f != "why"}
    assert "linear in the global batch, 256 -> 64" in str(good)
    cycle = training.FloatTraining(
        learning_rate=1e-3, epochs=20, batch=64, optimizer="adamw", schedule="one_cycle", batch_norm="frozen"
    )
    few = training.recommend(cycle, batch=64, calibration_drop=0.3, bits=4, saw_nan=True)
    assert (few.optimizer, few.train_scales, few.clip, few.batch_norm, few.epochs) == ("sgd", True, 1.0, "frozen", 4.0)
    for recipe, frozen in ((good, True), (few, False)):
        state = jq.TrainState.create(net, tx=recipe.make_optimizer(net, steps_per_epoch=10))
        moved = state.update(jax.tree.map(jnp.ones_like, state.trainable))
        assert np.array_equal(moved.model.qparams["n0.conv"], net.qparams["n0.conv"]) == frozen
    with pytest.raises(jq.QConfigError, match="optimizer 'adam'; known: sgd, adamw"):
        training.make_optimizer(net, optimizer="adam", learning_rate=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def test_slices_are_gradient_accumulation(net: jq.Model) -> None:
    """Of a mean loss without LSQ factors: the mean of slices is that of the batch, but for rounding."""
    model = net
    (batch,) = batches(1)
    state = jq.TrainState.create(model, tx=optax.sgd(0.5))
    whole, cut = (training.make_step(measured, mode="float", slices=n, donate=False)(state, batch) for n in (1, 4))
    for name, value in whole[0].model.params.items():
        np.testing.assert_allclose(cut[0].model.params[name], value, rtol=1e-5, atol=1e-6)
    assert cut[1]["accuracy"] == pytest.approx(whole[1]["accuracy"])
    with pytest.raises(jq.InputError, match="a batch of 16 cannot be cut into 3 equal slices"):
        training.make_step(loss, slices=3, donate=False)(state, batch)
    with pytest.raises(jq.InputError, match="slices must be at least 1"):
        training.make_step(loss, slices=0)


def test_a_donated_state_is_gone(net: jq.Model) -> None:
    donating = training.make_step(loss)
    state = state_of(net)
    new, _ = donating(state, batches(1)[0])
    assert jax.tree.leaves(state.trainable)[0].is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(net))  # what the state was made of
    assert np.isfinite(new.model.params["head.bias"]).all()


def test_the_loop_reports_and_goes_on(
    net: jq.Model, step: Step, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    start = state_of(net)
    whole, history = training.fit(
        step, start, batches(5), report_every=2, on_report=lambda s, m: seen.append(int(s.step))
    )
    assert seen == [2, 4, 5]
    assert history.metrics.keys() == {"loss", "accuracy", "images/s"}
    assert capsys.readouterr().err == ""  # not a terminal

    def generator() -> Iterator[tuple]:
        yield from batches(5)[2:]

    half, _ = training.fit(step, start, batches(5)[:2])
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    rest, _ = training.fit(step, half, generator(), total=5, report_every=1)
    jax.tree.map(np.testing.assert_array_equal, whole, rest)
    shown = capsys.readouterr().err
    assert "step 5/5  accuracy" in shown
    assert "images/s" in shown


def test_curves_are_a_picture(tmp_path: Path) -> None:
    runs = {"loss": {"float": [2.0, 1.0, 0.5], "QAT": [(0, 2.2), (2, float("nan"))]}, "accuracy": {"QAT": [0.1, 0.9]}}
    training.plot_curves(tmp_path / "new" / "curves.png", runs, title="float and QAT")
    assert (tmp_path / "new" / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(jq.InputError, match="at least one metric"):
        training.plot_curves(tmp_path / "none.png", {})
    with pytest.raises(jq.InputError, match="the curve 'a' of 'loss' has the shape"):
        training.plot_curves(tmp_path / "none.png", {"loss": {"a": [(1, 2, 3)]}})
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("slices", [4, 32])
def test_sliced_training_holds_one_sum_of_gradients(slices: int) -> None:
    """Temporaries of at most 3 x the parameters: the sum, the gradients of a slice, and weights on their grids."""
    width = 192
    params = {name: jnp.ones((width, width), jnp.float32) / width for name in "abc"}
    graph, params = jq.trace(lambda p, x: (x @ p["a"]) @ p["b"] @ p["c"], params, jnp.ones((1, width)))
    model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target="nash-e")
    model = jq.calibrate(model, [jnp.ones((1, width))])
    state = jq.TrainState.create(model, tx=training.make_optimizer(model, learning_rate=0.01))
    batch = (jnp.ones((32, width)), jnp.zeros((32, width)))
    step = training.make_step(lambda y, batch: jnp.mean((y - batch[1]) ** 2), slices=slices)
    found = step.lower(state, batch).compile().memory_analysis()
    assert found.temp_size_in_bytes <= 3 * sum(v.nbytes for v in jax.tree.leaves(model.params))
