"""Row 27: observers that go on in training, and fake-quant that is switched by pattern and step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jquant as jq

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)
WIDE = X * 3  # data beyond what calibration saw
ALL = {"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8(quantizer="lsq"))}


def dense(params: dict, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"]) @ params["b"]["kernel"] + params["b"]["bias"]


@pytest.fixture(scope="module")
def net() -> jq.Model:
    rng = np.random.default_rng(1)
    arrays = {
        n: {"kernel": rng.normal(size=s).astype(np.float32), "bias": rng.normal(size=s[1]).astype(np.float32)}
        for n, s in {"a": (4, 6), "b": (6, 3)}.items()
    }
    graph, params = jq.trace(dense, jax.tree.map(jnp.asarray, arrays), X)
    model = jq.prepare(graph, params, jq.QConfig(ALL), target="nash-e")
    return jq.calibrate(model, [X])


def outputs(net: jq.Model, x: jax.Array, step: int = 0, **asked: object) -> jax.Array:
    model = net
    return jq.apply_train(model, x, switches=jq.training.switches(model, **asked), step=step)[0]


def on_grid(value: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(np.asarray(value, np.float32) / scale), -128, 127).astype(np.float32) * scale


def by_hand(net: jq.Model, x: np.ndarray, *, values: bool, weights: bool) -> tuple[np.ndarray, np.ndarray]:
    """The value of `a` before its own quantizer, and the output, in numpy: quantized where asked."""
    model = net
    q = {name: np.asarray(scale) for name, scale in model.qparams.items()}
    p = {name: np.asarray(array, np.float32) for name, array in model.params.items()}

    def layer(name: str, x: np.ndarray, x_scale: np.ndarray) -> np.ndarray:
        weight, bias = p[f"{name}.kernel"], p[f"{name}.bias"]
        if weights:
            acc = x_scale * q[f"{name}.kernel"]
            bias = (np.rint(bias.astype(np.float64) / acc) * acc).astype(np.float32)
            weight = on_grid(weight, q[f"{name}.kernel"][:, None])
        return (x.astype(np.float64) @ weight.T.astype(np.float64) + bias).astype(np.float32)

    x = on_grid(x, q["x"]) if values else np.asarray(x)
    a = np.maximum(layer("a", x, q["x"]), 0)
    return a, layer("b", on_grid(a, q["a"]) if values else a, q["a"])


def test_row_27_everything_on_is_training_and_everything_off_is_float(net: jq.Model) -> None:
    model = net
    np.testing.assert_array_equal(outputs(net, X), jq.apply_train(model, X)[0])
    off = {"values": {"*": False}, "weights": {"*": False}}
    np.testing.assert_array_equal(outputs(net, X, **off), jq.apply(model.replace(qparams={}), X, mode="float"))


@pytest.mark.parametrize(("values", "weights"), [(True, True), (False, True), (True, False), (False, False)])
def test_row_27_each_kind_alone(net: jq.Model, values: bool, weights: bool) -> None:
    got = outputs(net, X, values={"*": values}, weights={"*": weights})
    np.testing.assert_allclose(got, by_hand(net, X, values=values, weights=weights)[1], atol=2e-5)


def test_row_27_a_pattern_and_a_step(net: jq.Model) -> None:
    """`relu` is fused into `a`; it is quantized in steps 3 and 4."""
    model = net
    step = jax.jit(lambda switches, step: jq.apply_train(model, X, switches=switches, step=step)[0])
    on = jq.training.switches(model, values={"*": False, "relu": (3, 5), "x": True}, weights={"b.kernel": 10})
    never, always = (
        step(jq.training.switches(model, values={"a": quantized}, weights={"b.*": False}), jnp.int32(0))
        for quantized in (False, True)
    )
    assert not np.array_equal(never, always)
    for at, wanted in ((0, never), (2, never), (3, always), (4, always), (5, never)):
        np.testing.assert_array_equal(step(on, jnp.int32(at)), wanted)
    late = step(jq.training.switches(model, values={"a": False}), jnp.int32(0))
    np.testing.assert_array_equal(step(on, jnp.int32(10)), late)  # the weight of b from step 10 on
    assert step._cache_size() == 1


def test_row_27_what_is_off_has_the_gradient_of_float(net: jq.Model) -> None:
    model = net

    def loss(qparams: dict, switches: jq.training.Switches) -> jax.Array:
        return jnp.sum(jq.apply_train(model.replace(qparams=qparams), WIDE, switches=switches)[0] ** 2)

    gradient = jax.grad(loss)(model.qparams, jq.training.switches(model, values={"a": False}))
    assert float(gradient["a"]) == 0.0
    assert float(gradient["x"]) != 0.0
    both = jax.grad(lambda p: jnp.sum(jq.apply_train(model.replace(params=p), X, switches=off)[0]))
    off = jq.training.switches(model, values={"*": False}, weights={"*": False})
    want = jax.grad(lambda p: jnp.sum(jq.apply(model.replace(params=p, qparams={}), X, mode="float")))(model.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), both(model.params), want)


# -- observers


def test_row_27_an_observed_scale_follows_the_quantized_model(net: jq.Model) -> None:
    model = net
    observed = jq.training.switches(model, observers={"*": True}, averaging=0.25)
    y, moved = jq.apply_train(model, WIDE, switches=observed)
    seen = float(np.abs(np.asarray(WIDE)).max()) / 127.5  # min_max of a signed value
    want = {"x": 0.75 * float(model.qparams["x"]) + 0.25 * seen}
    new = model.replace(qparams={**model.qparams, "x": jnp.float32(want["x"])})
    a, _ = by_hand(new, np.asarray(WIDE), values=True, weights=True)  # behind the new scale of x
    want["a"] = 0.75 * float(model.qparams["a"]) + 0.25 * float(a.max()) / 127.5
    for name, scale in want.items():
        assert float(moved.scales[name]) == pytest.approx(scale, rel=1e-6)
    # everything in the step has the new scales, the bias of the next layer too
    np.testing.assert_array_equal(
        y, jq.apply(model.replace(qparams={**model.qparams, **moved.scales}), WIDE, mode="fake_quant")
    )


def test_row_27_the_ends_of_averaging(net: jq.Model) -> None:
    model = net
    for averaging, scale in ((0.0, model.qparams["x"]), (1.0, jq.calibrate(model, [WIDE]).qparams["x"])):
        on = jq.training.switches(model, observers={"x": True}, averaging=averaging)
        _, moved = jq.apply_train(model, WIDE, switches=on)
        assert float(moved.scales["x"]) == float(scale)


def loss(y: jax.Array, batch: tuple) -> jax.Array:
    return jnp.mean((y - batch[1]) ** 2)


def batch(i: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(100 + i)
    return tuple(jnp.asarray(rng.normal(size=s) * 2, jnp.float32) for s in ((8, 4), (8, 3)))


def test_row_27_frozen_at_a_step_and_then_trained(net: jq.Model) -> None:
    """Observed scales are not the optimizer's while they are observed; afterwards they are."""
    model = net
    step = jq.training.make_step(loss, donate=False)
    state = jq.TrainState.create(model, tx=optax.sgd(1e-3, momentum=0.9))
    on = jq.training.switches(model, observers={"a": (0, 3)}, averaging=0.5)
    scales, followed = [], []
    for i in range(6):
        before = state
        state, _ = step(state, batch(i), switches=on)
        scales.append(float(state.model.qparams["a"]))
        _, moved = jq.apply_train(before.model, batch(i)[0], switches=on, step=before.step)
        followed.append(float(moved.scales["a"]))
    np.testing.assert_allclose(scales[:3], followed[:3], rtol=1e-6)
    assert all(abs(a - b) > 1e-7 for a, b in zip(scales[3:], scales[2:], strict=False))
    assert step._cache_size() == 1
    off = jq.training.switches(model)
    step(state, batch(9), switches=off)
    assert step._cache_size() == 1  # other switches, the same program


def test_row_27_resume_is_exact(net: jq.Model, tmp_path) -> None:
    model = net
    on = jq.training.switches(model, values={"x": 2}, observers={"*": (1, 5)}, averaging=0.1)
    step = jq.training.make_step(loss, donate=False)
    start = jq.TrainState.create(model, tx=optax.adam(1e-3))
    whole, _ = jq.training.fit(step, start, [batch(i) for i in range(6)], switches=on)
    half, _ = jq.training.fit(step, start, [batch(i) for i in range(3)], switches=on)
    kept = jq.training.open_checkpoints(tmp_path, model)
    kept.save(half, position=3)
    found = kept.restore(start)
    kept.close()
    again, _ = jq.training.fit(step, found.state, [batch(i) for i in range(found.position, 6)], switches=on)
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    assert float(whole.model.qparams["a"]) != float(model.qparams["a"])


@pytest.mark.parametrize("mesh", [False, True])
def test_row_27_slices_average_what_they_observe(net: jq.Model, mesh: bool) -> None:
    model = net
    one = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    step = jq.training.make_step(loss, slices=2, donate=False, mesh=one if mesh else None)
    state = jq.TrainState.create(model, tx=optax.sgd(0.0))
    on = jq.training.switches(model, observers={"x": True}, averaging=1.0)
    x, y = batch(0)
    state, _ = step(state, (x, y), switches=on)
    want = np.mean([np.abs(np.asarray(part)).max() / 127.5 for part in (x[:4], x[4:])])
    assert float(state.model.qparams["x"]) == pytest.approx(float(want), rel=1e-6)
    assert float(state.model.qparams["a"]) == float(model.qparams["a"])


@pytest.mark.parametrize("handling", ["live", "frozen", "reverse_fold"])
def test_row_27_with_batch_norm_that_is_kept(handling: str) -> None:
    rng = np.random.default_rng(5)
    params = {"conv.weight": rng.normal(size=(4, 3, 3, 3)), "norm.running_var": rng.uniform(0.5, 2, 4)}
    params |= {f"norm.{role}": rng.normal(size=4) + (role == "weight") for role in ("weight", "bias", "running_mean")}
    params = {name: jnp.asarray(array, jnp.float32) for name, array in params.items()}
    conv = jq.ops.Conv(strides=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1))
    roles = {role: f"norm.{role}" for role in ("weight", "bias", "running_mean", "running_var")}
    nodes = (
        jq.Node("conv", conv, ("x",), jq.FrozenMap({"weight": "conv.weight"})),
        jq.Node("norm", jq.ops.BatchNorm(), ("conv",), jq.FrozenMap(roles)),
        jq.Node("relu", jq.ops.Relu(), ("norm",)),
    )
    graph = jq.Graph((jq.Input("x", (None, 3, 5, 5)),), nodes, ("relu",))
    model = jq.prepare(graph, params, jq.QConfig(ALL), target="nash-e", batch_norm=handling)
    x = jnp.asarray(rng.normal(size=(4, 3, 5, 5)), jnp.float32)
    model = jq.calibrate(model, [x])
    plain, stats = jq.apply_train(model, x)
    same, moved = jq.apply_train(model, x, switches=jq.training.switches(model))
    np.testing.assert_array_equal(same, plain)
    jax.tree.map(np.testing.assert_array_equal, moved.batch_stats, stats)
    off = jq.training.switches(model, values={"*": False}, weights={"*": False})
    in_float, _ = jq.apply_train(model, x, mode="float")
    got = jq.apply_train(model, x, switches=off)[0]
    np.testing.assert_allclose(got, in_float, atol=2e-5 * float(jnp.abs(in_float).max()))


# -- what is wrong


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"values": {"rleu": True}}, "values: 'rleu' matches no quantized value; did you mean 'relu'"),
        ({"weights": {"a.kernle": True}}, "weights: 'a.kernle' matches no quantized weight; did you mean 'a.kernel'"),
        ({"observers": {"a.kernel": True}}, "observers: 'a.kernel' matches no observed value"),
        ({"values": {"a": "soon"}}, "'a' is switched at 'soon'; give True, False, a first step"),
        ({"values": {"a": (5, 3)}}, "is switched at (5, 3)"),
        ({"values": {"a": -1}}, "is switched at -1"),
        ({"averaging": float("nan")}, "averaging must be in [0, 1]"),
    ],
)
def test_row_27_switches_that_name_nothing_or_no_time(net: jq.Model, asked: dict, message: str) -> None:
    with pytest.raises(jq.QConfigError) as error:
        jq.training.switches(net, **asked)
    assert message in str(error.value)


def test_row_27_modes_and_plans_that_have_no_switches(net: jq.Model) -> None:
    model = net
    for mode in ("float", "bit_true"):
        with pytest.raises(jq.QConfigError, match=f"switches in mode '{mode}': they are for mode 'fake_quant'"):
            jq.apply_train(model, X, mode=mode, switches=jq.training.switches(model))
    with pytest.raises(jq.QConfigError, match=r"must be made by jq\.training\.switches\(model, \.\.\.\), not dict"):
        jq.apply_train(model, X, switches={"a": True})
    other = jq.training.Switches({}, {}, jnp.float32(0.1))
    with pytest.raises(jq.QConfigError, match="switches of another plan"):
        jq.apply_train(model, X, switches=other)
