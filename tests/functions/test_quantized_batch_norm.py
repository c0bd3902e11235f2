"""Batch norm that trains behind `jq.quantize`: the numbers of flax, the integers of jquant, and the way back."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from support.jax_nets import filled

import jquant as jq

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(8, 6, 6, 3)), jnp.float32)
Y = jnp.asarray(RNG.integers(0, 4, 8), jnp.int32)
LSQ = {"quantizer": jq.lsq}
QCONFIG = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out", **LSQ), output=jq.int8(**LSQ))})
WEIGHTS = jq.QConfig({"*": jq.Policy(weight=jq.int4(axis="out"), output=None)})
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

    qfn: jq.functions.QuantizedFunction
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
    close(qfn(after, X, mode="float"), serve(after["params"], stats), bound=1e-5)
    served = serve(qfn.fake_quantized(after), stats)  # kernels on their grid, values in float
    assert 0 < np.abs(served - qfn(after, X, mode="float")).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("mode", ["fold", "live", "reverse_fold", "frozen"])
def test_kernels_on_their_grid_serve_in_flax_as_they_ship(mode: str) -> None:
    """Weights alone are quantized, so flax in inference is the quantized function; a negative gamma turns a weight."""
    own = filled(jax.eval_shape(Linen().init, jax.random.key(0), X))
    own["params"]["bn1"]["scale"] = own["params"]["bn1"]["scale"].at[::2].multiply(-1.0)
    fn, params = jq.flax.from_linen(Linen(), own)
    qfn, variables = jq.quantize(fn, params, WEIGHTS, [X], batch_norm=mode, batch_stats=own["batch_stats"])
    _, stats = qfn.train(variables, X)
    variables = {**variables, "batch_stats": stats}
    served = Linen().apply({"params": qfn.fake_quantized(variables), "batch_stats": stats}, X)
    assert np.abs(served - fn(params, X, batch_stats=stats)).max() > 1e-3
    np.testing.assert_allclose(served, qfn(variables, X), rtol=0, atol=1e-5)
    gradient = jax.grad(lambda v: (qfn(v, X) ** 2).sum())(variables)
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), gradient["batch_stats"])


def test_a_train_state_of_linen_trains_it() -> None:
    qfn, variables, _, serve = linen()
    state = TrainState.create(apply_fn=qfn.train, params=variables, tx=optax.adamw(1e-4))

    @jax.jit
    def step(state: TrainState) -> TrainState:
        def loss(variables: Any) -> tuple[jax.Array, Any]:
            logits, stats = state.apply_fn(variables, X)
            return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean(), stats

        grads, stats = jax.grad(loss, has_aux=True)(state.params)
        state = state.apply_gradients(grads=grads)
        return state.replace(params={**state.params, "batch_stats": stats})

    after = step(state).params
    _, stats = qfn.train(variables, X)
    close(after["batch_stats"], stats)  # of the batch alone, whatever the optimizer does to what is 0
    assert jax.tree.structure(after) == jax.tree.structure(variables)
    close(qfn(after, X, mode="float"), serve(after["params"], after["batch_stats"]), bound=1e-5)


def one_by_one(f: Callable, v: Any, xs: jax.Array) -> Any:
    return jax.tree.map(lambda *a: jnp.stack(a), *(f(v, x) for x in xs))


TRANSFORMS: dict[str, Callable] = {
    "jit": lambda f, v, xs: one_by_one(jax.jit(f), v, xs),
    "remat": lambda f, v, xs: one_by_one(jax.checkpoint(f), v, xs),
    "vmap": lambda f, v, xs: jax.vmap(f, (None, 0))(v, xs),
    "scan": lambda f, v, xs: jax.lax.scan(lambda c, x: (c, f(v, x)), 0, xs)[1],
}


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_training_under_transforms(name: str, framework: str) -> None:
    qfn, variables, _, _ = FRAMEWORKS[framework]()
    train, batches = partial(qfn.train, mode="float"), X.reshape(2, 4, *X.shape[1:])

    def gradient(v: Any, x: jax.Array) -> Any:
        return jax.grad(lambda v: (train(v, x)[0] ** 2).sum())(v)

    for f in (train, gradient):
        close(TRANSFORMS[name](f, variables, batches), one_by_one(f, variables, batches), bound=1e-4)
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), gradient(variables, X)["batch_stats"])


# ---------------------------------------------------------------------------------------------------------------------
# Functions of JAX alone


def normalized(x: jax.Array, norm: Any, stats: Any) -> jax.Array:
    return (x - stats["mean"]) * (jax.lax.rsqrt(stats["var"] + 1e-5) * norm["scale"]) + norm["bias"]


def plain(params: Any, x: jax.Array, batch_stats: Any) -> jax.Array:
    x = normalized(x @ params["up"], params["bn1"], batch_stats["bn1"])
    x = normalized(jnp.tanh(x), params["bn2"], batch_stats["bn2"])  # follows no layer
    x = (x @ params["mid"]) * params["gamma"]  # no batch norm, though it folds like one
    return jax.nn.relu(x) @ params["head"]


def of_plain() -> tuple[Any, Any, jax.Array]:
    norm = {"scale": jnp.asarray(RNG.uniform(0.5, 1.5, 7), jnp.float32), "bias": jnp.linspace(-1, 1, 7)}
    stats = {"mean": jnp.linspace(-0.2, 0.2, 7), "var": jnp.linspace(0.5, 1.5, 7)}
    shapes = {"up": (6, 7), "mid": (7, 5), "head": (5, 3), "gamma": (5,)}
    params = {k: jnp.asarray(RNG.normal(size=s), jnp.float32) for k, s in shapes.items()} | {"bn1": norm, "bn2": norm}
    return params, {"bn1": stats, "bn2": stats}, jnp.asarray(RNG.normal(size=(16, 6)), jnp.float32)


def test_a_plain_function_trains_and_a_layer_scale_has_no_statistics() -> None:
    params, stats, x = of_plain()
    qfn, variables = jq.quantize(plain, params, QCONFIG, [x], batch_norm="live", batch_stats=stats, momentum=0.75)
    found, moved = qfn.train(variables, x, mode="float")

    first = x @ params["up"]
    own = {"bn1": {"mean": first.mean(0), "var": first.var(0)}}
    second = jnp.tanh(normalized(first, params["bn1"], own["bn1"]))
    own["bn2"] = {"mean": second.mean(0), "var": second.var(0)}
    close(found, plain(params, x, own))
    close(moved, jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, stats, own))

    after = {**variables, "batch_stats": moved}
    program = qfn.lower(after)
    np.testing.assert_array_equal(jq.run(program, x), jq.reference.run(program, np.asarray(x))[0][0])
    close(qfn(after, x, mode="float"), plain(params, x, moved))


def test_a_mapping_keeps_by_name_and_statistics_can_be_frozen_late() -> None:
    params, stats, x = of_plain()
    rules = {"*": "live", "bn2": "fold"}
    qfn, variables = jq.quantize(plain, params, QCONFIG, [x], batch_norm=rules, batch_stats=stats)
    _, moved = qfn.train(variables, x)
    assert not np.array_equal(moved["bn1"]["var"], stats["bn1"]["var"])
    jax.tree.map(np.testing.assert_array_equal, moved["bn2"], stats["bn2"])
    late = replace(qfn, plan=jq.training.set_batch_statistics(qfn.model(variables), "running").plan)
    found, moved = late.train(variables, x)
    jax.tree.map(np.testing.assert_array_equal, moved, stats)
    np.testing.assert_array_equal(found, qfn(variables, x))


def part(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[i], tree)


def test_statistics_that_are_parts_of_one_leaf_move_apart() -> None:
    params, stats, x = of_plain()
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), stats["bn1"], stats["bn2"])

    def parts(params: Any, x: jax.Array, batch_stats: Any) -> jax.Array:
        return plain(params, x, {"bn1": part(batch_stats, 0), "bn2": part(batch_stats, 1)})

    found, wanted = (
        qfn.train(variables, x, mode="float")
        for qfn, variables in (
            jq.quantize(parts, params, QCONFIG, [x], batch_norm="live", batch_stats=stacked),
            jq.quantize(plain, params, QCONFIG, [x], batch_norm="live", batch_stats=stats),
        )
    )
    np.testing.assert_array_equal(found[0], wanted[0])
    close([part(found[1], 0), part(found[1], 1)], [wanted[1]["bn1"], wanted[1]["bn2"]], bound=0)


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        norm = nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM, name="bn")
        return nn.Dense(3, name="head")(norm(nn.Dense(5, name="b")(nn.relu(norm(nn.Dense(5, name="a")(x))))))


def test_a_norm_that_is_used_twice_moves_twice_as_in_flax() -> None:
    x = X[:, 0, 0]
    own = filled(jax.eval_shape(Twice().init, jax.random.key(0), x))
    fn, params = jq.flax.from_linen(Twice(), own)
    stats = own["batch_stats"]
    qfn, variables = jq.quantize(fn, params, QCONFIG, [x], batch_norm="live", batch_stats=stats, momentum=MOMENTUM)
    outputs, moved = Twice().apply(own, x, train=True, mutable=["batch_stats"])
    close(qfn.train(variables, x, mode="float"), (outputs, moved["batch_stats"]))


def test_without_running_statistics_training_is_the_call() -> None:
    params, stats, x = of_plain()
    qfn, variables = jq.quantize(lambda p, x: plain(p, x, stats), params, QCONFIG, [x])
    outputs, none = qfn.train(variables, x)
    assert none is None
    np.testing.assert_array_equal(outputs, qfn({**variables, "batch_stats": none}, x))


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
    with pytest.raises(jq.ConversionError, match=r"running statistic of node 'conv1'.* is not in batch_stats"):
        jq.quantize(fn, params, QCONFIG, [X], batch_norm="live")
    with pytest.raises(jq.QConfigError, match=r"momentum 1\.0: the share of running statistics to keep"):
        jq.quantize(fn, params, QCONFIG, [X], batch_stats=stats, momentum=1.0)
    with pytest.raises(jq.QConfigError, match="'alive'"):
        jq.quantize(fn, params, QCONFIG, [X], batch_norm="alive", batch_stats=stats)
    qfn, variables = jq.quantize(fn, params, QCONFIG, [X], batch_norm="live", batch_stats=stats)
    with pytest.raises(jq.InputError, match=r"'params': \.\.\., 'qparams': \.\.\., 'batch_stats': \.\.\."):
        qfn({k: variables[k] for k in ("params", "qparams")}, X)
