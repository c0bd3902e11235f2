"""Dropout and stochastic depth of linen, nnx and plain JAX: another mask in each step of QAT, none in integers."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from support import jax_nets

import jquant as jq

MIN_MAX = {"observer": jq.observers.min_max()}
QCONFIG = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8(**MIN_MAX))})
KEY = jax.random.key(7)
KEEP = 0.75
X = jax_nets.images(8, 6, 6, 4)
PARAMS = {"w": jax_nets.images(4, 4, seed=1)}


@pytest.fixture(autouse=True)
def _flax_promotes_dtypes() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):
        yield


def dropouts(graph: jq.Graph) -> list[Any]:
    return [node.op for node in graph.nodes if isinstance(node.op, jq.ops.Dropout)]


# ---------------------------------------------------------------------------------------------------------------------
# How code writes it


def mask(*shape: int) -> jax.Array:
    return jax.random.bernoulli(KEY, KEEP, shape)


def scanned(x: jax.Array) -> jax.Array:
    def body(x: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        return jnp.where(jax.random.bernoulli(key, KEEP, x.shape), jnp.tanh(x) / KEEP, 0), None

    return jax.lax.scan(body, x, jax.random.split(KEY, 1))[0]


def mapped(x: jax.Array) -> jax.Array:
    def one(x: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.where(jax.random.bernoulli(key, KEEP, x.shape), x / KEEP, 0)

    return jax.vmap(one)(x, jax.random.split(KEY, x.shape[0]))


EACH: dict[str, Callable[[jax.Array], jax.Array]] = {
    "where": lambda x: jnp.where(mask(*x.shape), x / KEEP, 0),
    "where, then scaled": lambda x: jnp.where(mask(*x.shape), x, 0) / KEEP,
    "inverted": lambda x: jnp.where(~mask(*x.shape), 0.0, x / KEEP),
    "the other side": lambda x: jnp.where(jax.random.uniform(KEY, x.shape) >= 1 - KEEP, x / KEEP, 0),
    "haiku": lambda x: mask(*x.shape) * x / KEEP,
    "remat": jax.checkpoint(lambda x: jnp.where(mask(*x.shape), x / KEEP, 0)),
    "scan": scanned,
    "vmap": mapped,
    "old keys": lambda x: jnp.where(jax.random.bernoulli(jax.random.PRNGKey(1), KEEP, x.shape), x / KEEP, 0),
}
DEPTH: dict[str, Callable[[jax.Array], jax.Array]] = {
    "select": lambda x: jax.lax.select(jnp.broadcast_to(mask(len(x), 1, 1, 1), x.shape), x / KEEP, jnp.zeros_like(x)),
    "product": lambda x: x * mask(len(x), 1, 1, 1) / KEEP,
    "scaled mask": lambda x: x * (mask(len(x), 1, 1, 1).astype(jnp.float32) / KEEP),
    "scaled first": lambda x: x / KEEP * mask(len(x), 1, 1, 1),
    "chosen factor": lambda x: x * jnp.where(mask(len(x), 1, 1, 1), 1 / KEEP, 0.0),
    "floor": lambda x: x / KEEP * jnp.floor(KEEP + jax.random.uniform(KEY, (len(x), 1, 1, 1))),
    "reshaped": lambda x: x * mask(len(x)).reshape(-1, 1, 1, 1) / KEEP,
}


def traced(drop: Callable[[jax.Array], jax.Array], *, dynamic_batch: bool = True) -> tuple[jq.Graph, Any]:
    return jq.trace(lambda p, x: drop(x @ p["w"]), PARAMS, X, dynamic_batch=dynamic_batch)


@pytest.mark.parametrize("dynamic_batch", [True, False])
@pytest.mark.parametrize("name", EACH)
def test_every_way_to_write_dropout(name: str, dynamic_batch: bool) -> None:
    graph, _ = traced(EACH[name], dynamic_batch=dynamic_batch)
    assert dropouts(graph) == [jq.ops.Dropout(rate=0.25)]


@pytest.mark.parametrize("dynamic_batch", [True, False])
@pytest.mark.parametrize("name", DEPTH)
def test_every_way_to_write_stochastic_depth(name: str, dynamic_batch: bool) -> None:
    graph, _ = traced(DEPTH[name], dynamic_batch=dynamic_batch)
    assert dropouts(graph) == [jq.ops.Dropout(rate=0.25, shared_axes=(1, 2, 3))]


@pytest.mark.parametrize("written", [*EACH.values(), *DEPTH.values()], ids=[*EACH, *DEPTH])
def test_what_is_kept_is_that_of_the_code(written: Callable[[jax.Array], jax.Array]) -> None:
    """Where both masks keep an element, the two are the same number: the one of the code, and the one drawn here."""
    graph, params = traced(written)
    model = jq.prepare(graph, params, QCONFIG, target="nash-e")
    found, _ = jq.apply_train(model, X, mode="float", rngs=jax.random.key(3))
    expected = written(X @ PARAMS["w"])
    both = (found != 0) & (expected != 0)
    assert float(both.mean()) > 0.2
    np.testing.assert_allclose(found[both], expected[both], rtol=1e-5)
    off = jq.apply_train(model, X, mode="float")[0]
    np.testing.assert_allclose(off[both] / KEEP, expected[both], rtol=1e-5)


def test_one_draw_for_the_whole_batch() -> None:
    for drop in (lambda x: x * mask() / KEEP, lambda x: jnp.where(mask(), x / KEEP, 0.0)):
        graph, params = traced(drop)
        assert dropouts(graph) == [jq.ops.Dropout(rate=0.25, shared_axes=(0, 1, 2, 3))]
        model = jq.prepare(graph, params, QCONFIG, target="nash-e")
        kept = [jq.apply_train(model, X, mode="float", rngs=jax.random.key(i))[0] != 0 for i in range(20)]
        assert {float(k.mean()) for k in kept} == {0.0, 1.0}


# ---------------------------------------------------------------------------------------------------------------------
# What is no dropout


def twice(x: jax.Array) -> jax.Array:
    kept = mask(*x.shape)
    return jnp.where(kept, x / KEEP, 0) + jnp.where(kept, jnp.tanh(x) / KEEP, 0)


def joined(x: jax.Array) -> jax.Array:
    """One draw for a row and a column, repeated and joined: no longer a draw for each element or axis."""
    repeated = jnp.broadcast_to(mask(len(x), 1, 6, 4), x.shape).reshape(-1, 36, 4)
    return x.reshape(-1, 36, 4) * repeated / KEEP


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (
            lambda x: jnp.where(mask(*x.shape), x, 0),
            "probability of 0.75 multiplies what it keeps by 1; dropout",
        ),
        (
            lambda x: jnp.where(mask(*x.shape), x / 0.5, 0),
            "what it keeps by 1; dropout multiplies by 1.33333",
        ),
        (lambda x: x + 0.1 * jax.random.normal(KEY, x.shape), "add of a value and of random numbers .* is no dropout"),
        (lambda x: x * jax.random.uniform(KEY, ()), "mul of a value and of random numbers"),
        (lambda x: jnp.where(mask(*x.shape), x, -1.0), "select_n of a value and of random numbers"),
        (twice, "one random mask is used for several values"),
        (joined, "mul of a value and of random numbers"),
        (
            lambda x: jax.lax.cond(mask(), lambda x: x / KEEP, lambda x: x * 0, x),
            "a branch is taken by a random",
        ),
        (lambda x: x @ (jnp.eye(4) * mask(4, 4) + x[0, 0, 0, 0]), "random numbers"),
    ],
)
@pytest.mark.parametrize("dynamic_batch", [True, False])
def test_other_random_numbers_are_refused(written: Any, says: str, dynamic_batch: bool) -> None:
    """They would be drawn once, when the function is traced, and be the same in every step."""
    with pytest.raises(jq.ConversionError, match=says):
        traced(written, dynamic_batch=dynamic_batch)


def test_a_kernel_that_is_dropped_is_refused_and_random_features_are_weights() -> None:
    with pytest.raises(jq.ConversionError, match="dot_general of a value and of random numbers"):
        jq.trace(lambda p, x: x @ (p["w"] * mask(4, 4) / KEEP), PARAMS, X)
    features = lambda p, x: jnp.cos(x @ jax.random.normal(KEY, (4, 8)))  # noqa: E731
    graph, params = jq.trace(features, {}, X)
    np.testing.assert_allclose(jq.graph.evaluate_float(graph, params, X)[0], features({}, X), atol=1e-5)


@pytest.mark.parametrize("key", [jax.random.key(0), jax.random.PRNGKey(0)], ids=["typed", "old"])
def test_a_key_as_an_input_says_what_to_do(key: jax.Array) -> None:
    def fn(params: Any, x: Any, key: Any) -> Any:
        return jnp.where(jax.random.bernoulli(key, KEEP, x.shape), x / KEEP, 0)

    with pytest.raises(jq.ConversionError, match="a key of random numbers; let the function close over any key"):
        jq.trace(fn, {}, X, key, dynamic_batch=False)


# ---------------------------------------------------------------------------------------------------------------------
# linen


class Block(nn.Module):
    """A residual block with dropout and stochastic depth behind one flag, as linen code has it."""

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        y = nn.Conv(4, (3, 3), name="conv")(x)
        y = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn")(y))
        y = nn.Dropout(0.5, deterministic=not train)(y)
        x = x + nn.Dropout(0.25, broadcast_dims=(1, 2, 3), deterministic=not train, name="depth")(y)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


OWN = jax_nets.filled(jax.eval_shape(Block().init, jax.random.key(0), X))


def linen_block() -> tuple[Any, Any]:
    fn, params = jq.flax.from_linen(Block(), OWN, dropout=True, train=False)
    stats = OWN["batch_stats"]
    return jq.quantize(fn, params, QCONFIG, [X], batch_norm="live", batch_stats=stats, momentum=0.9)


def test_linen_behind_one_flag_with_batch_norm() -> None:
    qfn, variables = linen_block()
    found = dropouts(qfn.plan.graph)
    assert found == [jq.ops.Dropout(rate=0.5), jq.ops.Dropout(rate=0.25, shared_axes=(1, 2, 3))]
    np.testing.assert_allclose(qfn(variables, X, mode="float"), Block().apply(OWN, X), rtol=0, atol=1e-5)

    @jax.jit
    def step(variables: Any, key: jax.Array) -> Any:
        return qfn.train(variables, X, rngs=key)

    first, again, other = (step(variables, jax.random.key(k))[0] for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert float(jnp.abs(first - other).max()) > 1e-3
    np.testing.assert_array_equal(
        qfn.train(variables, X, rngs={"dropout": jax.random.key(1)})[0],
        qfn.train(variables, X, rngs=jax.random.key(1))[0],
    )

    def loss(trained: Any, key: jax.Array) -> jax.Array:
        return (qfn.train({**variables, **trained}, X, rngs=key)[0] ** 2).mean()

    trained = {name: variables[name] for name in ("params", "qparams")}
    grads = [jax.jit(jax.grad(loss))(trained, jax.random.key(k))["params"]["conv"]["kernel"] for k in (0, 1)]
    assert float(jnp.abs(grads[0] - grads[1]).max()) > 0
    (moved,) = {float(jnp.abs(leaf).max()) > 0 for leaf in grads}
    assert moved


def test_integers_and_evaluation_have_it_off() -> None:
    """The same integers as those of the model that was traced without, where no addition is fused over the dropout."""
    module = nn.Sequential([nn.Dense(8), nn.relu, nn.Dropout(0.5, deterministic=True), nn.Dense(3)])
    own = jax_nets.filled(jax.eval_shape(module.init, jax.random.key(0), X))
    qfn, variables = jq.quantize(*jq.flax.from_linen(module, own, dropout=True), QCONFIG, [X])
    without, plain = jq.quantize(*jq.flax.from_linen(module, own), QCONFIG, [X])
    assert len(dropouts(qfn.plan.graph)) == 1
    np.testing.assert_array_equal(qfn(variables, X), without(plain, X))
    program = qfn.lower(variables)
    np.testing.assert_array_equal(jq.run(program, X), jq.run(without.lower(plain), X))
    np.testing.assert_array_equal(jq.run(program, X), jq.reference.run(program, np.asarray(X))[0][0])
    with pytest.raises(jq.JQuantError, match="the deployed integers have none"):
        qfn(variables, X, mode="bit_true", rngs=KEY)
    with pytest.raises(jq.InputError, match="the function was traced without any"):
        without(plain, X, rngs=KEY)
    with pytest.raises(jq.InputError, match="rngs has 'dropout', 'params'; one key for dropout is wanted"):
        qfn(variables, X, rngs={"dropout": KEY, "params": KEY})


def test_fake_quant_does_not_clip_what_dropout_scales_up() -> None:
    """The range is that of what is kept without dropout; x / keep goes beyond, as the float model has it."""
    module = nn.Sequential([nn.relu, nn.Dropout(0.5, deterministic=True), nn.Dense(4)])
    own = jax_nets.filled(jax.eval_shape(module.init, jax.random.key(0), X))
    qfn, variables = jq.quantize(*jq.flax.from_linen(module, own, dropout=True), QCONFIG, [X])
    kernel = qfn.fake_quantized(variables)["layers_2"]
    (dropout,) = [node.name for node in qfn.plan.graph.nodes if isinstance(node.op, jq.ops.Dropout)]
    *_, values = jq.training.apply_train_with_taps(qfn.model(variables), X, rngs=KEY, taps=dropout)
    scale = float(variables["qparams"]["x"])
    assert float(values[dropout].max()) > 128 * scale
    outputs = qfn(variables, X, rngs=KEY)
    np.testing.assert_allclose(outputs, values[dropout] @ kernel["kernel"] + kernel["bias"], rtol=0, atol=1e-4)


def test_the_share_that_is_dropped_is_the_rate() -> None:
    """5 standard deviations of a binomial distribution, for elements and for examples."""
    x = jnp.ones((400, 3, 5))
    module = nn.Sequential([lambda x: x * 2.0, nn.Dropout(0.3, broadcast_dims=(2,), deterministic=True)])
    qfn, variables = jq.quantize(*jq.flax.from_linen(module, {"params": {}}, dropout=True), QCONFIG, [x])
    found = qfn(variables, x, mode="float", rngs=KEY)
    dropped = (found == 0).mean(-1)
    assert set(np.unique(dropped)) == {0.0, 1.0}
    assert abs(float(dropped.mean()) - 0.3) < 5 * (0.3 * 0.7 / 1200) ** 0.5
    np.testing.assert_allclose(found[found != 0], 2 / 0.7, rtol=1e-6)


def test_attention_of_linen() -> None:
    """Its dropout is no module: the options turn it on, and dropout=True alone says so."""
    x = jax_nets.images(2, 5, 8)
    module = nn.MultiHeadDotProductAttention(2, dropout_rate=0.25, deterministic=True)
    own = jax_nets.filled(jax.eval_shape(module.init, jax.random.key(0), x, x))
    with pytest.raises(jq.InputError, match="the dropout of attention is no module"):
        jq.quantize(*jq.flax.from_linen(module, own, dropout=True), QCONFIG, [(x, x)])
    drawing = nn.MultiHeadDotProductAttention(2, dropout_rate=0.25)
    fn, params = jq.flax.from_linen(drawing, own, dropout=True, deterministic=False)
    qfn, variables = jq.quantize(fn, params, QCONFIG, [(x, x)])
    assert dropouts(qfn.plan.graph) == [jq.ops.Dropout(rate=0.25, shared_axes=(0, 1))]  # broadcast_dropout
    np.testing.assert_allclose(qfn(variables, x, x, mode="float"), module.apply(own, x, x), rtol=0, atol=1e-5)
    assert float(jnp.abs(qfn(variables, x, x, rngs=KEY) - qfn(variables, x, x)).max()) > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# nnx


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first, self.second = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.depth = nnx.Dropout(0.25, broadcast_dims=(1, 2, 3), rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = self.dropout(nnx.relu(self.norm(self.first(x))))
        return x + self.depth(self.second(x))


def test_nnx_with_its_optimizer() -> None:
    model = Nnx(nnx.Rngs(0))
    fn, params = jq.flax.from_nnx(model, dropout=True)
    stats = nnx.state(model, nnx.BatchStat)
    qfn, variables = jq.quantize(fn, params, QCONFIG, [X], batch_norm="live", batch_stats=stats)
    assert dropouts(qfn.plan.graph) == [jq.ops.Dropout(rate=0.5), jq.ops.Dropout(rate=0.25, shared_axes=(1, 2, 3))]
    module, rngs = jq.flax.module(qfn, variables), nnx.Rngs(dropout=3)
    optimizer = nnx.Optimizer(module, optax.sgd(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(module: Any, optimizer: Any, rngs: nnx.Rngs) -> Any:
        value, grads = nnx.value_and_grad(lambda m, r: (m(X, rngs=r) ** 2).mean())(module, rngs)
        optimizer.update(module, grads)
        return value

    losses = [float(step(module, optimizer, rngs)) for _ in range(3)]
    assert len(set(losses)) == 3
    assert float(jnp.abs(module(X, rngs=KEY) - module(X)).max()) > 1e-3
    module.eval()
    np.testing.assert_array_equal(module(X, rngs=rngs), qfn(module.variables(), X))
    served = jq.flax.to_nnx(model, module.variables()["params"], module.variables()["batch_stats"])
    served.eval()
    np.testing.assert_allclose(qfn(module.variables(), X, mode="float"), served(X), rtol=0, atol=1e-4)


def test_training_in_float_with_dropout_is_that_of_jax() -> None:
    """The same steps by hand in JAX, with the masks that were drawn here: values, gradients and weights."""
    key, x = jax.random.key(5), jax_nets.images(16, 4)
    params = {"a": jax_nets.images(4, 8, seed=2), "b": jax_nets.images(8, 2, seed=3)}

    def fn(params: Any, x: Any, kept: Any = None) -> Any:
        y = jax.nn.relu(x @ params["a"])
        kept = jax.random.bernoulli(jax.random.key(0), KEEP, y.shape) if kept is None else kept
        return jnp.where(kept, y / KEEP, 0.0) @ params["b"]

    qfn, variables = jq.quantize(fn, params, QCONFIG, [x])
    (name,) = [node.name for node in qfn.plan.graph.nodes if isinstance(node.op, jq.ops.Dropout)]
    for i in range(3):
        rng = jax.random.fold_in(key, i)
        *_, taps = jq.training.apply_train_with_taps(qfn.model(variables), x, mode="float", rngs=rng, taps=name)
        active = jax.nn.relu(x @ variables["params"]["a"]) > 0
        kept = (taps[name] != 0) | ~active  # of what relu made zero, either
        scales = {"qparams": variables["qparams"]}
        grads = jax.grad(lambda p, s=scales, r=rng: (qfn({"params": p, **s}, x, mode="float", rngs=r) ** 2).mean())
        wanted = jax.grad(lambda p, k=kept: (fn(p, x, k) ** 2).mean())
        found, expected = grads(variables["params"]), wanted(variables["params"])
        for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # sums of 16 * 8 float32 products near 1
        variables = {**variables, "params": jax.tree.map(lambda v, g: v - 0.1 * g, variables["params"], found)}


def test_a_file_keeps_dropout(tmp_path: Any) -> None:
    qfn, variables = linen_block()
    jq.functions.save(tmp_path / "net.jqf", qfn, variables)
    fn, params = jq.flax.from_linen(Block(), OWN, dropout=True, train=False)
    again, found = jq.functions.load(tmp_path / "net.jqf", fn, params, X, batch_stats=OWN["batch_stats"])
    np.testing.assert_array_equal(again.train(found, X, rngs=KEY)[0], qfn.train(variables, X, rngs=KEY)[0])
    plain, params = jq.flax.from_linen(Block(), OWN, train=False)
    with pytest.raises(jq.FormatError, match=r"another function: node .*Dropout"):
        jq.functions.load(tmp_path / "net.jqf", plain, params, X, batch_stats=OWN["batch_stats"])


def test_channels_first_keeps_its_axes() -> None:
    """A graph in the order of torch runs channels last: one draw for each channel of each example."""
    conv = jq.ops.Conv(strides=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1))
    nodes = (
        jq.Node("conv", conv, ("x",), jq.FrozenMap({"weight": "conv.weight"})),
        jq.Node("drop", jq.ops.Dropout(rate=0.5, shared_axes=(2, 3)), ("conv",)),
    )
    graph, params = (
        jq.Graph((jq.Input("x", (None, 4, 6, 6)),), nodes, ("drop",)),
        {"conv.weight": jnp.ones((8, 4, 1, 1))},
    )
    model = jq.prepare(graph, params, QCONFIG, target="nash-e")
    assert dropouts(model.plan.graph) == [jq.ops.Dropout(rate=0.5, shared_axes=(1, 2))]
    y = jq.apply_train(model, jnp.ones((4, 4, 6, 6)), mode="float", rngs=KEY)[0]
    assert y.shape == (4, 8, 6, 6)
    kept = (y != 0).mean((2, 3))
    assert set(np.unique(kept)) == {0.0, 1.0}
