"""Labels of leaves: what optax decays, freezes and trains apart, in linen's variables and in the module of nnx."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx, traverse_util
from support import jax_nets

import jquant as jq

LSQ = {"quantizer": jq.lsq, "observer": jq.observers.min_max()}
QCONFIG = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out", quantizer=jq.lsq), output=jq.int8(**LSQ))})


@pytest.fixture(autouse=True)
def _flax_promotes_dtypes() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):
        yield


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: Any, index: Any, train: bool = False) -> Any:
        x = nn.Conv(4, (3, 3), use_bias=False, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn")(x))
        x = nn.LayerNorm(name="norm")(x.mean((1, 2)))
        x = x + nn.Embed(5, 4, name="table")(index)
        gain = self.param("gain", nn.initializers.ones, (4,))
        return nn.Dense(3, name="head")(x * gain)


X, INDEX = jax_nets.images(4, 6, 6, 3), jnp.arange(4)
OWN = jax_nets.filled(jax.eval_shape(Net().init, jax.random.key(0), X, INDEX))
EXPECTED = {
    "conv": {"kernel": "weight"},
    "bn": {"scale": "batch_norm", "bias": "batch_norm"},
    "norm": {"scale": "bias", "bias": "bias"},
    "table": {"embedding": "weight"},
    "gain": "bias",
    "head": {"kernel": "weight", "bias": "bias"},
}


def made(batch_norm: str = "fold") -> tuple[Any, Any]:
    fn, params = jq.flax.from_linen(Net(), OWN)
    stats = {} if batch_norm == "fold" else {"batch_stats": OWN["batch_stats"]}
    return jq.quantize(fn, params, QCONFIG, [(X, INDEX)], batch_norm=batch_norm, **stats)


@pytest.mark.parametrize("batch_norm", ["fold", "live"])
def test_labels_say_what_the_graph_does_with_a_leaf(batch_norm: str) -> None:
    qfn, variables = made(batch_norm)
    labels = jq.functions.labels(qfn, variables)
    assert jax.tree.structure(labels) == jax.tree.structure(variables)
    assert labels["params"] == EXPECTED
    assert set(labels["qparams"].values()) == {"scale"}
    assert set(jax.tree.leaves(labels.get("batch_stats", "frozen"))) == {"frozen"}
    trained = {name: variables[name] for name in ("params", "qparams")}
    assert jax.tree.structure(jq.functions.labels(qfn, trained)) == jax.tree.structure(trained)


def gradients(qfn: Any, variables: Any) -> Any:
    return jax.grad(lambda v: (qfn(v, X, INDEX) ** 2).mean())(variables)


def stepped(qfn: Any, variables: Any, tx: Any) -> Any:
    updates, _ = tx.update(gradients(qfn, variables), tx.init(variables), variables)
    return optax.apply_updates(variables, updates)


def test_weight_decay_reaches_weights_and_no_scale() -> None:
    """Against the same step of optax without decay: what moves otherwise is what was decayed."""
    qfn, variables = made()
    labels = jq.functions.labels(qfn, variables)
    mask = jax.tree.map(lambda label: label == "weight", labels)
    decayed = stepped(qfn, variables, optax.adamw(1e-3, weight_decay=0.5, mask=mask))
    plain = stepped(qfn, variables, optax.adam(1e-3))
    differ = jax.tree.map(lambda a, b: not np.array_equal(a, b), decayed, plain)
    assert differ == mask
    wanted = jax.tree.map(lambda p, v, m: p - 1e-3 * 0.5 * v if m else p, plain, variables, mask)
    for a, b in zip(*map(jax.tree.leaves, (decayed, wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)  # one rounding of a sum of three


def test_multi_transform_takes_the_labels() -> None:
    qfn, variables = made()
    labels = jq.functions.labels(qfn, variables, freeze={"scale": ["x0"], "bias": ["norm.*"]})
    assert labels["qparams"]["x0"] == labels["params"]["norm"]["scale"] == "frozen"
    rates = {"weight": 1e-2, "bias": 1e-3, "batch_norm": 1e-4, "scale": 1e-5, "frozen": 0.0}
    found = stepped(qfn, variables, optax.multi_transform({k: optax.sgd(r) for k, r in rates.items()}, labels))
    grads = gradients(qfn, variables)
    wanted = jax.tree.map(lambda v, g, label: v - rates[label] * g, variables, grads, labels)
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    assert any(jax.tree.leaves(jax.tree.map(lambda g: bool(np.abs(g).max() > 0), grads["qparams"])))


def test_masks_by_the_last_key_take_no_scale() -> None:
    qfn, variables = made()
    flat = traverse_util.flatten_dict(variables)
    kernels = {path for path in flat if path[-1] == "kernel"}
    assert kernels == {("params", "conv", "kernel"), ("params", "head", "kernel")}
    state = nnx.state(jq.flax.module(qfn, variables), nnx.Param)
    paths = {path for path, _ in nnx.to_flat_state(state)}
    assert {path for path in paths if path[-1] == "kernel"} == kernels
    assert ("qparams", "conv.kernel", "scale") in paths


def bare(params: Any, x: Any) -> Any:
    return x @ params["kernel"]


def test_a_kernel_at_the_top_of_the_params() -> None:
    """Where the scale's name is "kernel" too, a mask by the last key takes it; labels and the module do not."""
    qfn, variables = jq.quantize(bare, {"kernel": jax_nets.images(3, 4)}, QCONFIG, [jax_nets.images(2, 3)])
    assert "kernel" in variables["qparams"]
    labels = jq.functions.labels(qfn, variables)
    assert labels["params"] == {"kernel": "weight"}
    assert labels["qparams"]["kernel"] == "scale"
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(jq.flax.module(qfn, variables), nnx.Param))]
    assert [path for path in paths if path[-1] == "kernel"] == [("params", "kernel")]


def test_a_product_with_a_transposed_leaf_is_a_weight() -> None:
    def fn(params: Any, x: Any) -> Any:
        return jnp.einsum("bhi,hio->bho", x, params["heads"]) + params["shift"]

    params, x = {"heads": jax_nets.images(2, 3, 4), "shift": jax_nets.images(2, 4)}, jax_nets.images(5, 2, 3)
    qfn, variables = jq.quantize(fn, params, QCONFIG, [x])
    assert jq.functions.labels(qfn, variables)["params"] == {"heads": "weight", "shift": "bias"}


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)])
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        conv, norm = self.layers
        return self.head(nnx.relu(norm(conv(x))).mean((1, 2)))


def of_nnx() -> tuple[Any, Any, Any]:
    model = Nnx(nnx.Rngs(0))
    fn, params = jq.flax.from_nnx(model)
    stats = nnx.state(model, nnx.BatchStat)
    qfn, variables = jq.quantize(fn, params, QCONFIG, [X], batch_norm="live", batch_stats=stats)
    return qfn, variables, jq.flax.module(qfn, variables)


def test_an_optimizer_of_nnx_takes_the_labels_of_the_module() -> None:
    _, variables, module = of_nnx()
    labels = module.labels(freeze={"batch_norm": ["*"]})
    found = dict(nnx.to_flat_state(labels))
    assert found["params", "layers", 0, "kernel"] == found["params", "head", "kernel"] == "weight"
    assert found["params", "layers", 1, "scale"] == "frozen"
    assert found["params", "head", "bias"] == "bias"
    assert found["qparams", "layers.0.kernel", "scale"] == "scale"
    groups = {
        "weight": optax.sgd(1e-2),
        "bias": optax.sgd(1e-2),
        "scale": optax.sgd(1e-4),
        "frozen": optax.set_to_zero(),
    }
    optimizer = nnx.Optimizer(module, optax.multi_transform(groups, labels), wrt=nnx.Param)

    @nnx.jit
    def step(module: Any, optimizer: Any) -> None:
        optimizer.update(module, nnx.grad(lambda m: (m(X) ** 2).mean())(module))

    before = dict(nnx.to_flat_state(nnx.as_pure(nnx.state(module, nnx.Param))))
    step(module, optimizer)
    after = dict(nnx.to_flat_state(nnx.as_pure(nnx.state(module, nnx.Param))))
    moved = {path: bool((before[path] != after[path]).any()) for path in before}
    assert not moved["params", "layers", 1, "scale"]
    assert moved["params", "head", "kernel"]
    assert any(changed for path, changed in moved.items() if path[0] == "qparams")
    assert jax.tree.structure(module.variables()) == jax.tree.structure(dict(variables))
    moved_stats = jax.tree.leaves(module.variables()["batch_stats"])
    assert any(
        bool((a != b).any()) for a, b in zip(moved_stats, jax.tree.leaves(variables["batch_stats"]), strict=True)
    )


def test_decay_in_the_module_spares_scales() -> None:
    _, _, module = of_nnx()
    mask = jax.tree.map(lambda label: label == "weight", module.labels())
    optimizer = nnx.Optimizer(module, optax.adamw(0.5, weight_decay=0.5, mask=mask), wrt=nnx.Param)
    before = dict(nnx.to_flat_state(nnx.as_pure(nnx.state(module, nnx.Param))))
    zeros = jax.tree.map(jnp.zeros_like, nnx.state(module, nnx.Param))
    optimizer.update(module, zeros)
    after = dict(nnx.to_flat_state(nnx.as_pure(nnx.state(module, nnx.Param))))
    moved = {path for path in before if bool((before[path] != after[path]).any())}
    assert moved == {("params", "layers", 0, "kernel"), ("params", "head", "kernel")}


def test_what_is_wrong_is_refused() -> None:
    qfn, variables = jq.quantize(bare, {"kernel": jax_nets.images(3, 4)}, QCONFIG, [jax_nets.images(2, 3)])
    with pytest.raises(jq.QConfigError, match="freeze kind 'scales'; known: weight, bias, batch_norm, scale; did you"):
        jq.functions.labels(qfn, variables, freeze={"scales": ["*"]})
    with pytest.raises(jq.QConfigError, match="freeze pattern 'stem' matches nothing"):
        jq.functions.labels(qfn, variables, freeze=["stem"])
    with pytest.raises(jq.InputError, match="variables must be those"):
        jq.functions.labels(qfn, variables["params"])
    with pytest.raises(jq.InputError, match="variables of another function: 2 leaves of params"):
        jq.functions.labels(qfn, {**variables, "params": {"kernel": 1.0, "more": 2.0}})
