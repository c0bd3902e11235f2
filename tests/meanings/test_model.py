"""A model is one value: a pytree with a static plan. Every verb takes it; gradients and labels have its form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import graphs

import jquant as jq
from jquant import ops

NASH = jq.targets.NASH_E
LSQ = jq.Policy(weight=jq.int8(axis="out", quantizer=jq.lsq), output=jq.int8(quantizer=jq.lsq))


@pytest.fixture(scope="module")
def net() -> tuple[jq.Model, jax.Array]:
    build = graphs.Builder(5)
    build.shapes["x"] = (3,)
    x = build.add(ops.Linear(), ("x",), (4,), weight=build.array("a.weight", 4, 3), bias=build.array("a.bias", 4))
    x = build.add(ops.Linear(), (build.add(ops.Relu(), (x,), (4,)),), (2,), weight=build.array("b.weight", 2, 4))
    graph = jq.Graph((jq.Input("x", (None, 3)),), tuple(build.nodes), (x,))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
    return jq.calibrate(jq.prepare(graph, build.params, jq.QConfig({"*": LSQ}), target=NASH), [x]), x


def test_prepare_makes_it_and_calibrate_gives_it_scales(net: tuple) -> None:
    model, _ = net
    assert set(model.params) == {"a.weight", "a.bias", "b.weight"}
    assert set(model.qparams) == set(model.plan.trained)
    bare = model.replace(qparams={})
    assert repr(bare) == "Model(2 nodes for nash-e, 3 parameters, not calibrated)"
    assert repr(model) == f"Model(2 nodes for nash-e, 3 parameters, {len(model.plan.trained)} scales)"
    assert bare.plan is model.plan
    assert bare.params is model.params


def test_a_gradient_is_a_model(net: tuple) -> None:
    """Of a sum of squares: against finite differences of the float model, which is smooth where no relu is at 0."""
    model, x = net

    def loss(model: jq.Model) -> jax.Array:
        return jnp.sum(jq.apply(model, x, mode="float") ** 2)

    found = jax.grad(loss)(model)
    assert isinstance(found, jq.Model)
    assert jax.tree.structure(found) == jax.tree.structure(model)
    a, bias, b = (np.asarray(model.params[key], np.float64) for key in ("a.weight", "a.bias", "b.weight"))
    hidden = np.maximum(np.asarray(x, np.float64) @ a.T + bias, 0)
    y = hidden @ b.T
    np.testing.assert_allclose(found.params["b.weight"], 2 * y.T @ hidden, rtol=1e-4)
    back = 2 * y @ b * (hidden > 0)
    np.testing.assert_allclose(found.params["a.weight"], back.T @ np.asarray(x, np.float64), rtol=1e-4)
    assert all(np.all(g == 0) for g in found.qparams.values())  # nothing is quantized in float


def test_optimizers_and_labels_have_its_form(net: tuple) -> None:
    model, x = net
    tx = optax.multi_transform({"weight": optax.sgd(0.1), "scale": optax.set_to_zero()}, jq.labels(model))
    grads = jax.grad(lambda model: jnp.sum(jq.apply(model, x) ** 2))(model)
    updates, _ = tx.update(grads, tx.init(model), model)
    moved = optax.apply_updates(model, updates)
    assert isinstance(moved, jq.Model)
    np.testing.assert_allclose(
        moved.params["b.weight"], model.params["b.weight"] - 0.1 * grads.params["b.weight"], rtol=1e-6
    )
    jax.tree.map(np.testing.assert_array_equal, moved.qparams, model.qparams)


def test_many_models_are_one_under_vmap(net: tuple) -> None:
    model, x = net
    other = model.replace(params=jax.tree.map(lambda v: v * 1.5, dict(model.params)))
    both = jax.tree.map(lambda *v: jnp.stack(v), model, other)
    found = jax.vmap(jq.apply, in_axes=(0, None))(both, x)
    np.testing.assert_array_equal(found[0], jq.apply(model, x))
    np.testing.assert_array_equal(found[1], jq.apply(other, x))


def test_a_model_of_the_same_plan_compiles_nothing(net: tuple) -> None:
    model, x = net
    run = jax.jit(jq.apply)
    run(model, x)
    run(model.replace(params=jax.tree.map(lambda v: v + 1, dict(model.params))), x)
    assert run._cache_size() == 1


@pytest.mark.parametrize("verb", [jq.apply, jq.lower, jq.calibrate, jq.apply_train])
def test_something_else_is_refused(net: tuple, verb) -> None:
    model, x = net
    arguments = {jq.lower: (), jq.calibrate: ([x],)}.get(verb, (x,))
    with pytest.raises(jq.JQuantError, match=r"a jq\.Model is wanted, as jq\.prepare returns it, not Plan"):
        verb(model.plan, *arguments)


@pytest.mark.parametrize("mode", ["float", "fake_quant", "tables", "bit_true"])
@pytest.mark.parametrize("handling", ["live", "frozen", "reverse_fold"])
def test_every_mode_folds_a_kept_batch_norm_by_itself(mode: str, handling: str) -> None:
    """Against the model that was folded by hand: no caller has to remember it."""
    build = graphs.Builder(2)
    build.shapes["x"] = (2, 4, 4)
    x = build.batch_norm(build.conv("x", 3, 1))
    graph = build.graph(build.add(ops.Sigmoid(), (x,), (3, 4, 4)), size=4)
    x = graphs.images(3, graph)
    model = jq.prepare(graph, build.params, jq.QConfig({"*": LSQ}), target=NASH, batch_norm=handling)
    model = jq.calibrate(model, [x])
    folded = jq.training.fold_batch_norm(model)
    assert folded.plan != model.plan
    found = np.asarray(jq.apply(model, x, mode=mode))
    if mode == "float":  # folding by hand puts a weight on its grid, which moves the float function
        want = jq.graph.evaluate_float(graph, build.params, x)[0]
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)
        return
    want = np.asarray(jq.apply(folded, x, mode=mode))
    np.testing.assert_array_equal(found, want)
    (row,) = [row for row in jq.analysis.compare(model, x, "float", mode).rows if row.name == graph.outputs[0]]
    assert row.b_maximum == want.max()


def test_parameters_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An array of JAX never changes: a second call looks at its inputs alone. What is gone is forgotten."""
    import gc

    from jquant.graph import checks

    graph, params = jq.trace(lambda p, x: x @ p["w"], {"w": jnp.eye(3)}, jnp.ones((2, 3)))
    model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target="nash-e")
    model = jq.calibrate(model, [jnp.ones((2, 3))])
    before = jq.apply(model, np.ones((2, 3), np.float32))
    looked = []
    isfinite = np.isfinite
    monkeypatch.setattr(checks.np, "isfinite", lambda array: looked.append(array.shape) or isfinite(array))
    np.testing.assert_array_equal(jq.apply(model, np.ones((2, 3), np.float32)), before)
    assert set(looked) <= {(2, 3)}
    broken = dict(model.params) | {key: array.at[0].set(jnp.nan) for key, array in model.params.items()}
    with pytest.raises(jq.CalibrationError, match="contains NaN"):
        jq.apply(dataclasses.replace(model, params=broken), np.ones((2, 3), np.float32))
    array = jnp.arange(3.0)
    assert checks.is_finite(array)
    key = id(array)
    assert key in checks._FINITE
    del array
    gc.collect()
    assert key not in checks._FINITE
