"""Switches of fake-quant and observers in the training of a quantized function, and in the user's own loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import jquant as jq

LEARNED = jq.Policy(weight=jq.int8(axis="out", quantizer="lsq"), output=jq.int8(quantizer="lsq"))
X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)
WIDE = X * 3  # data beyond what calibration saw


class Small(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train, name="bn")(nn.Dense(6, use_bias=False, name="up")(x))
        return nn.Dense(3, name="head")(nn.relu(x))


@pytest.fixture(scope="module")
def net() -> tuple:
    with jax.numpy_dtype_promotion("standard"):
        variables = Small().init(jax.random.key(0), X)
        fn, params = jq.flax.from_linen(Small(), variables, train=False)
        stats = variables["batch_stats"]
        return jq.quantize(fn, params, jq.QConfig({"*": LEARNED}), [X], batch_norm="live", batch_stats=stats)


@pytest.fixture(autouse=True)
def _flax_promotes_dtypes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_everything_on_is_training_and_everything_off_is_float(net: tuple) -> None:
    qfn, variables = net
    plain, stats = qfn.train(variables, X)
    same, moved = qfn.train(variables, X, switches=jq.training.switches(qfn))
    np.testing.assert_array_equal(same, plain)
    jax.tree.map(np.testing.assert_array_equal, moved.batch_stats, stats)
    off = jq.training.switches(qfn, values={"*": False}, weights={"*": False})
    want = Small().apply(
        {"params": variables["params"], "batch_stats": variables["batch_stats"]}, X, train=True, mutable=["batch_stats"]
    )
    found, moved = qfn.train(variables, X, switches=off)
    np.testing.assert_allclose(found, want[0], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), moved.batch_stats, want[1]["batch_stats"])


def test_scales_follow_the_data_until_they_are_frozen_in_a_loop_of_the_users(net: tuple) -> None:
    """The scale of the input by hand: half of the way to max / 127.5 in steps 0 to 2, LSQ with momentum after them."""
    qfn, variables = net
    on = jq.training.switches(qfn, values={"*": 1}, observers={"x": (0, 3)}, averaging=0.5)
    tx = optax.sgd(1e-3, momentum=0.9)

    @jax.jit
    def step(variables, opt_state, i, x):
        def loss(variables):
            y, moved = qfn.train(variables, x, switches=on, step=i)
            return (y**2).mean(), moved

        grads, moved = jax.grad(loss, has_aux=True)(variables)
        updates, opt_state = tx.update(grads, opt_state, variables)
        return qfn.update(optax.apply_updates(variables, updates), moved), opt_state

    opt_state, found = tx.init(variables), []
    scale = np.float32(variables["qparams"]["x"])
    seen = np.float32(np.abs(np.asarray(WIDE)).max() / 127.5)
    for i in range(5):
        before, (variables, opt_state) = variables, step(variables, opt_state, jnp.int32(i), WIDE)
        if i < 3:
            scale = np.float32(0.5) * scale + np.float32(0.5) * seen
            assert float(variables["qparams"]["x"]) == pytest.approx(float(scale), rel=1e-6)
        found.append(float(variables["qparams"]["x"]))
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), before["batch_stats"], variables["batch_stats"])
        assert all(jax.tree.leaves(moved))
    assert found[3] != found[2]  # the optimizer's again
    assert step._cache_size() == 1
    assert jq.run(qfn.lower(variables), WIDE).shape == (8, 3)


def test_statistics_alone_go_through_update_too(net: tuple) -> None:
    qfn, variables = net
    _, stats = qfn.train(variables, X)
    found = qfn.update(variables, stats)
    assert found["batch_stats"] is stats
    assert found["qparams"] is variables["qparams"]
    with pytest.raises(jq.InputError, match="the mapping that"):
        qfn.update(variables["params"], stats)


def test_where_there_is_nothing_to_switch(net: tuple) -> None:
    qfn, variables = net
    on = jq.training.switches(qfn, observers={"*": True})
    with pytest.raises(jq.QConfigError, match="switches in mode 'bit_true': they are for mode 'fake_quant'"):
        qfn.train(variables, X, mode="bit_true", switches=on)
    with pytest.raises(jq.InputError, match=r"switches need qfn\.train.* and qfn\.update"):
        jq.flax.module(qfn, variables)(X, switches=on)
