"""Batch norm that trains behind `jq.quantize`: the numbers of flax, the integers of jquant, and the way back."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax_nets import filled

import jquant as jq

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(8, 6, 6, 3)), jnp.float32)
Y = jnp.asarray(RNG.integers(0, 4, 8), jnp.int32)
LSQ = {"quantizer": jq.lsq}
QCONFIG = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out", **LSQ), output=jq.int8(**LSQ))})
MOMENTUM = 0.9


@pytest.fixture(autouse=True)
def _flax_promotes_dtypes() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):
        yield


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        norm = {"use_running_average": not train, "momentum": MOMENTUM}
        x = nn.relu(nn.BatchNorm(**norm, name="bn1")(nn.Conv(6, (3, 3), use_bias=False, name="conv1")(x)))
        x = nn.relu(nn.BatchNorm(**norm, name="bn2")(nn.Conv(5, (3, 3), name="conv2")(x)))
        return nn.Dense(4, name="head")(x.mean((1, 2)))


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(3, 6, (3, 3), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(6, momentum=MOMENTUM, rngs=rngs)
        self.conv2 = nnx.Conv(6, 5, (3, 3), rngs=rngs)
        self.bn2 = nnx.BatchNorm(5, momentum=MOMENTUM, rngs=rngs)
        self.head = nnx.Linear(5, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn2(self.conv2(nnx.relu(self.bn1(self.conv1(x))))))
        return self.head(x.mean((1, 2)))


class Made(NamedTuple):
    """A quantized function with its variables, and flax's own answer in training: outputs and moved statistics."""

    qfn: jq.QuantizedFunction
    variables: dict[str, Any]
    flax: tuple[jax.Array, Any]
    serve: Any  # (params, batch_stats) -> outputs of flax in inference


def linen(batch_norm: Any = "live") -> Made:
    own = filled(jax.eval_shape(Linen().init, jax.random.key(0), X))
    fn, params = jq.flax.from_linen(Linen(), own)
    stats = own["batch_stats"]
    quantized = jq.quantize(fn, params, QCONFIG, [X], batch_norm=batch_norm, batch_stats=stats, momentum=MOMENTUM)
    outputs, moved = Linen().apply(own, X, train=True, mutable=["batch_stats"])
    return Made(
        *quantized, (outputs, moved["batch_stats"]), lambda p, s: Linen().apply({"params": p, "batch_stats": s}, X)
    )


def nnx_model() -> Nnx:
    model = Nnx(nnx.Rngs(0))
    nnx.update(model, filled(nnx.state(model)))
    return model


def of_nnx(batch_norm: Any = "live") -> Made:
    model = nnx_model()
    fn, params = jq.flax.from_nnx(model)
    stats = nnx.state(model, nnx.BatchStat)
    quantized = jq.quantize(fn, params, QCONFIG, [X], batch_norm=batch_norm, batch_stats=stats, momentum=MOMENTUM)
    training = nnx.clone(model)
    outputs = training(X)

    def serve(params: Any, stats: Any) -> jax.Array:
        copy = jq.flax.to_nnx(model, params, stats)
        copy.eval()
        return copy(X)

    return Made(*quantized, (outputs, nnx.state(training, nnx.BatchStat)), serve)


FRAMEWORKS = {"linen": linen, "nnx": of_nnx}


def close(a: Any, b: Any, bound: float = 2e-5) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=bound, atol=bound)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_in_float_it_trains_as_flax_does(framework: str) -> None:
    """Some ten float32 operations on numbers near 1: 2e-5."""
    qfn, variables, expected, serve = FRAMEWORKS[framework]()
    close(jax.jit(lambda v: qfn.train(v, X, mode="float"))(variables), expected)
    close(qfn(variables, X, mode="float"), serve(variables["params"], variables["batch_stats"]))


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("mode", ["live", "reverse_fold", "frozen"])
def test_training_reaches_everything_and_ships_as_integers(framework: str, mode: str) -> None:
    qfn, variables, _, serve = FRAMEWORKS[framework](mode)

    def loss(trained: Any, stats: Any) -> tuple[jax.Array, Any]:
        logits, stats = qfn.train({**trained, "batch_stats": stats}, X)
        return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean(), stats

    trained, stats = {k: variables[k] for k in ("params", "qparams")}, variables["batch_stats"]
    tx = optax.multi_transform({"params": optax.sgd(1e-2), "qparams": optax.sgd(1e-5)}, {k: k for k in trained})
    memory, step, losses = tx.init(trained), jax.jit(jax.value_and_grad(loss, has_aux=True)), []
    for _ in range(5):
        (value, stats), grads = step(trained, stats)
        updates, memory = tx.update(grads, memory)
        trained = optax.apply_updates(trained, updates)
        losses.append(float(value))
    for path, leaf in jax.tree.leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        taken_away = mode != "frozen" and "conv2" in name and "bias" in name  # by the mean of the batch
        assert taken_away or np.abs(leaf).max() > 0, name
    assert losses[-1] < losses[0]
    moved = [
        not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (stats, variables["batch_stats"])), strict=True)
    ]
    assert moved == [mode != "frozen"] * len(moved)

    after = {**trained, "batch_stats": stats}
    program = qfn.lower(after)
    (exact,), _ = jq.reference.run(program, np.asarray(X))
    np.testing.assert_array_equal(jq.run(program, X), exact)
    error = np.abs(np.asarray(qfn(after, X)) - np.asarray(exact)).max()
    assert error < 0.05 * np.abs(np.asarray(exact)).max()
    close(qfn(after, X, mode="float"), serve(after["params"], stats))
    served = serve(qfn.fake_quantized(after), stats)  # kernels on their grid, values in float
    assert 0 < np.abs(served - qfn(after, X, mode="float")).max() < 0.05 * np.abs(exact).max()


def test_an_nnx_optimizer_trains_it_and_statistics_are_batch_stats() -> None:
    qfn, variables, _, _ = of_nnx()
    model = jq.flax.module(qfn, variables)
    optimizer = nnx.Optimizer(model, optax.sgd(1e-4), wrt=nnx.Param)
    before = [np.array(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.BatchStat))]

    @nnx.jit
    def step(model: Any, optimizer: Any) -> jax.Array:
        def loss(model: Any) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(X), Y).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(5)]
    assert losses[-1] < losses[0]
    for a, b in zip(before, jax.tree.leaves(nnx.state(model, nnx.BatchStat)), strict=True):
        assert not np.array_equal(a, b)
    model.eval()
    after = model.variables()
    np.testing.assert_array_equal(model(X), qfn(after, X))
    back = jq.flax.to_nnx(nnx_model(), after["params"], after["batch_stats"])
    back.eval()
    close(back(X), qfn(after, X, mode="float"))


def test_what_is_refused() -> None:
    own = filled(jax.eval_shape(Linen().init, jax.random.key(0), X))
    fn, params = jq.flax.from_linen(Linen(), own)
    stats = own["batch_stats"]
    with pytest.raises(jq.ConversionError, match=r"running statistic of node 'conv1'.* is no leaf of batch_stats"):
        jq.quantize(fn, params, QCONFIG, [X], batch_norm="live")
    with pytest.raises(jq.QConfigError, match=r"momentum 1\.0: the share of running statistics to keep"):
        jq.quantize(fn, params, QCONFIG, [X], batch_stats=stats, momentum=1.0)
    with pytest.raises(jq.QConfigError, match="'alive'"):
        jq.quantize(fn, params, QCONFIG, [X], batch_norm="alive", batch_stats=stats)
    qfn, variables = jq.quantize(fn, params, QCONFIG, [X], batch_norm="live", batch_stats=stats)
    with pytest.raises(jq.InputError, match=r"'params': \.\.\., 'qparams': \.\.\., 'batch_stats': \.\.\."):
        qfn({k: variables[k] for k in ("params", "qparams")}, X)
