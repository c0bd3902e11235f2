"""`jq.quantize` and the helpers for flax: training in anyone's loop, and the way back to the framework's variables."""

import importlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from support import jax_nets

import jquant as jq
from jquant.meanings import rolled
from jquant.meanings.fake_quant import fake_quant_weight
from jquant.numerics.fusion import computed_once

EXAMPLES = Path(__file__).parents[2] / "examples"
# min_max: the search of the default observer compiles for most of a test's time, and nothing here is about it.
INT8 = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8(observer=jq.observers.min_max()))})
WEIGHTS = jq.QConfig({"*": jq.Policy(weight=jq.int4(axis="out"), output=None)})


@pytest.fixture(autouse=True)
def _flax_promotes_dtypes():
    with jax.numpy_dtype_promotion("standard"):
        yield


class Small(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(4, (3, 3), use_bias=False, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn")(x))
        x = nn.Dropout(0.5, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(3, name="head")(x)


def small() -> tuple:
    net = jax_nets.linen(Small(), jax_nets.images(2, 6, 6, 3))
    fn, params = jq.flax.from_linen(Small(), net.params, train=False)
    return fn, params, jax_nets.images(8, 6, 6, 3, seed=5)


def test_the_signature_is_that_of_the_function() -> None:
    def fn(params, a, b):
        return {"sum": a @ params["w"] + b, "b": b}

    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.float32)}
    a, b = jax_nets.images(3, 4), jax_nets.images(3, 4, seed=1)
    qfn, variables = jq.quantize(fn, params, INT8, [(a, b)])
    found, expected = qfn(variables, a, b), fn(params, a, b)
    assert set(found) == {"sum", "b"}
    np.testing.assert_allclose(found["sum"], expected["sum"], atol=0.1)
    assert variables["params"] is params
    with pytest.raises(jq.InputError, match="the mapping that"):
        qfn(params, a, b)


def test_what_was_quantized_before_and_after_training_runs_as_integers() -> None:
    fn, params, x = small()
    qfn, variables = jq.quantize(fn, params, INT8, [x])
    target = fn(params, x)

    @jax.jit
    def step(variables):
        loss, grads = jax.value_and_grad(lambda v: ((qfn(v, x) - target) ** 2).mean())(variables)
        return jax.tree.map(lambda v, g: v - 0.01 * g, variables, grads), loss

    for _ in range(3):
        variables, loss = step(variables)
    assert float(loss) < 0.01
    program = qfn.lower(variables)
    found = jq.run(program, x)
    np.testing.assert_array_equal(found, jax.tree.leaves(jq.reference.run(program, np.asarray(x))[0])[0])
    np.testing.assert_allclose(qfn(variables, x, mode="bit_true"), found, rtol=1e-6)


def test_a_train_state_of_linen_trains_it() -> None:
    fn, params, x = small()
    learned = jq.Policy(weight=jq.int8(axis="out", quantizer=jq.lsq), output=jq.int8(quantizer=jq.lsq))
    qfn, variables = jq.quantize(fn, params, jq.QConfig({"*": learned}), [x])
    state = TrainState.create(apply_fn=qfn, params=variables, tx=optax.sgd(1e-3))
    grads = jax.grad(lambda v: (state.apply_fn(v, x) ** 2).mean())(state.params)
    state = state.apply_gradients(grads=grads)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, variables)
    assert changed["params"]["conv"]["kernel"]
    assert any(changed["qparams"].values())


def test_nnx_optimizer_trains_it_and_the_model_takes_the_weights_back() -> None:
    model = jax_nets.ConvNext(nnx.Rngs(0))
    x = jax_nets.images(2, 16, 16, 3)
    fn, params = jq.flax.from_nnx(model)
    np.testing.assert_allclose(fn(params, x), model(x), rtol=1e-6)
    qfn, variables = jq.quantize(fn, params, WEIGHTS, [x])
    module = jq.flax.module(qfn, variables)
    optimizer = nnx.Optimizer(module, optax.sgd(1e-2), wrt=nnx.Param)
    before = module(x)
    grads = nnx.grad(lambda m: (m(x) ** 2).mean())(module)
    optimizer.update(module, grads)
    assert float(jnp.abs(module(x) - before).max()) > 0
    back = jq.flax.to_nnx(model, qfn.fake_quantized(module.variables()))
    np.testing.assert_allclose(back(x), module(x), rtol=0, atol=1e-4)
    assert len(np.unique(np.asarray(back.head.kernel[...])[:, 0])) <= 16


def test_dropout_and_statistics_of_nnx_are_left_out_of_the_params() -> None:
    model = jax_nets.TemporalConv(nnx.Rngs(0))
    model.train()
    x = jax_nets.images(2, 9, 4)
    fn, params = jq.flax.from_nnx(model)
    assert not model.bn.use_running_average  # the model itself is left in training
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    qfn, variables = jq.quantize(fn, params, INT8, [x])
    jax.grad(lambda v: qfn(v, x).sum())(variables)
    np.testing.assert_allclose(qfn(variables, x), fn(params, x), atol=0.1)


class Recurrent(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(4, 6, rngs=rngs), rngs=rngs)

    def __call__(self, x):
        return self.rnn(x)[:, -1]


def test_a_module_of_nnx_that_counts_its_random_numbers_is_a_pure_function() -> None:
    model, x = Recurrent(nnx.Rngs(0)), jax_nets.images(3, 2, 4)
    expected = model(x)
    fn, params = jq.flax.from_nnx(model)
    np.testing.assert_allclose(jax.jit(fn)(params, x), expected, rtol=1e-6)
    np.testing.assert_array_equal(fn(params, x), fn(params, x))
    qfn, variables = jq.quantize(fn, params, INT8, [x])
    np.testing.assert_allclose(qfn(variables, x), expected, atol=0.1)


def test_fake_quantized_weights_are_a_drop_in_for_the_function() -> None:
    fn, params, x = small()  # batch norm is folded into the kernel that is quantized
    qfn, variables = jq.quantize(fn, params, WEIGHTS, [x])
    served = qfn.fake_quantized(variables)
    assert jax.tree.structure(served) == jax.tree.structure(params)
    assert float(jnp.abs(fn(params, x) - fn(served, x)).max()) > 1e-3
    np.testing.assert_allclose(fn(served, x), qfn(variables, x), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(served["bn"]["scale"], params["bn"]["scale"])


USERS_OWN = jq.quantizers.Quantizer(
    apply=jq.lsq.apply, init=jq.lsq.init, scale=jq.lsq.scale
)  # may depend on the order of axes


@pytest.mark.parametrize("axis", ["out", None])
@pytest.mark.parametrize(
    "quantizer",
    [jq.fake_quant, jq.lsq, jq.lsq_plus, jq.pact, USERS_OWN],
    ids=lambda q: q.name,
)
def test_weights_are_quantized_as_the_function_stores_them(
    quantizer: jq.quantizers.Quantizer, axis: str | None
) -> None:
    """Transposed before it is rounded, a weight would be copied, and its gradient too."""
    fn, params, x = small()
    weight = jq.int4(axis=axis, quantizer=quantizer)
    qfn, variables = jq.quantize(fn, params, jq.QConfig({"*": jq.Policy(weight=weight, output=jq.int8())}), [x])
    stored = {"conv.kernel": (3, 3, 3, 4), "head.kernel": (4, 3)}
    assert set(qfn.plan.weights) == set(stored)
    assert set(qfn.plan.turned) == (set() if quantizer is USERS_OWN else set(stored))

    plan_params = qfn.params_of(variables["params"])
    plain = replace(qfn.plan, turned=jq.types.FrozenMap())
    for key, shape in stored.items():

        def rounded(plan, weight, qparams, key=key):
            return fake_quant_weight(key, plan, {key: weight}, qparams)

        own = (plan_params[key], variables["qparams"])
        found, pull = jax.vjp(partial(rounded, qfn.plan), *own)
        expected, pull_plain = jax.vjp(partial(rounded, plain), *own)
        axes = qfn.plan.turned.get(key, tuple(range(len(shape))))
        np.testing.assert_array_equal(found.transpose(axes), expected)
        gradient = jax_nets.images(*found.shape, seed=3)
        to_weight, to_scales = pull(gradient)
        plain_to_weight, plain_to_scales = pull_plain(gradient.transpose(axes))
        np.testing.assert_array_equal(to_weight, plain_to_weight)
        # Two orders of one sum: at most n ulp of sum |slope * gradient| each, a slope being at most 8.
        bound = 2 * found.size * 8 * float(np.abs(gradient).sum()) * 2.0**-24
        np.testing.assert_allclose(to_scales[key], plain_to_scales[key], rtol=0, atol=bound)
        calls = [e for e in jax.make_jaxpr(partial(rounded, qfn.plan))(*own).eqns if "custom_vjp" in e.primitive.name]
        assert [call.invars[0].aval.shape for call in calls] == [found.shape]
        assert found.shape == (shape if key in qfn.plan.turned else plan_params[key].shape)


def test_the_work_of_an_unrolled_recurrence_grows_with_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What XLA computes for a step of training: with states that it repeats, it would grow with their square."""
    monkeypatch.setattr(rolled, "find_loops", lambda *_, **__: [])

    def work(steps: int) -> float:
        def fn(params, x):
            state = x
            for _ in range(steps):
                gate = jax.nn.sigmoid(jnp.tanh(state) @ params["gate"])
                state = gate * state + (1.0 - gate) * x
            return state

        params, x = {"gate": jax_nets.images(8, 8)}, jax_nets.images(4, 8)
        qfn, variables = jq.quantize(fn, params, INT8, [x])
        if steps == 2:
            np.testing.assert_allclose(qfn(variables, x), fn(params, x), atol=0.1)
        step = jax.jit(jax.grad(lambda v: (qfn(v, x) ** 2).sum()))
        return step.lower(variables).compile().cost_analysis()["flops"]

    first, second, third = work(2), work(4), work(8)
    np.testing.assert_allclose(third - second, 2 * (second - first), rtol=0.02)


def test_a_state_is_computed_once_and_stays_what_it_is() -> None:
    x = jnp.asarray([-0.0, 1e-30, -3.5, jnp.inf, jnp.nan], jnp.float32)
    found = jax.jit(computed_once)(x)
    np.testing.assert_array_equal(found, x)
    np.testing.assert_array_equal(jnp.signbit(found), jnp.signbit(x))
    value, tangent = jax.jvp(computed_once, (x[:4],), (jnp.arange(4.0),))
    np.testing.assert_array_equal(value, x[:4])
    np.testing.assert_array_equal(tangent, jnp.arange(4.0))
    np.testing.assert_array_equal(
        jax.grad(lambda v: (computed_once(v) * jnp.arange(4.0)).sum())(x[:4]), jnp.arange(4.0)
    )


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("lstm", "decoder")]


@pytest.mark.parametrize("name", ["scanned_layers", *SLOW])
def test_fake_quantized_weights_of_stacked_and_joined_leaves(name: str) -> None:
    net = jax_nets.NETS[name]()
    qfn, variables = jq.quantize(net.fn, net.params, WEIGHTS, [net.inputs])
    served = qfn.fake_quantized(variables)
    expected = qfn(variables, *net.inputs)
    if name != "decoder":  # whose embedding is tied to a quantized layer: the table becomes quantized too
        np.testing.assert_allclose(net.fn(served, *net.inputs), expected, rtol=0, atol=1e-4)
    assert any(bool((a != b).any()) for a, b in zip(*map(jax.tree.leaves, (served, net.params)), strict=True))


def test_a_weight_that_is_computed_cannot_go_back() -> None:
    def fn(params, x):
        return x @ (params["w"] / jnp.linalg.norm(params["w"], axis=0))

    x = jax_nets.images(2, 3)
    qfn, variables = jq.quantize(fn, {"w": jax_nets.images(3, 2)}, WEIGHTS, [x])
    with pytest.raises(jq.ConversionError, match="computed from w"):
        qfn.fake_quantized(variables)


def test_functions_of_jquant_are_found_in_a_model() -> None:
    def fn(params, x, flow):
        y = jq.ops.pixel_shuffle(x * params["gain"], 2)
        y = jq.ops.interpolate(y, size=(5, 5))
        y = jq.ops.grid_sample(y, jnp.tanh(y[..., :2]), padding="border")
        return jq.ops.warp(y, flow)

    params, inputs = {"gain": jnp.float32(1.5)}, (jax_nets.images(2, 4, 6, 8), jax_nets.images(2, 5, 5, 2))
    graph, kept = jq.trace(fn, params, *inputs)
    kinds = [type(node.op).__name__ for node in graph.nodes]
    assert [k for k in kinds if k not in ("Constant", "Mul", "Slice", "Tanh")] == [
        "PixelShuffle", "Interpolate", "GridSample", "Warp",
    ]  # fmt: skip
    np.testing.assert_allclose(jq.graph.evaluate_float(graph, kept, *inputs)[0], fn(params, *inputs), atol=1e-5)
    jax.jit(jax.grad(lambda x: fn(params, x, inputs[1]).sum()))(inputs[0])


def test_a_function_of_jquant_under_vmap_is_read_inside() -> None:
    x = jax_nets.images(2, 4, 6, 8)
    fn = lambda params, x: jax.vmap(lambda a: jq.ops.pixel_shuffle(a[None], 2)[0])(x)  # noqa: E731
    graph, params = jq.trace(fn, {}, x)
    np.testing.assert_array_equal(jq.graph.evaluate_float(graph, params, x)[0], fn({}, x))


def test_examples_of_the_three_depths_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    three_depths = importlib.import_module("three_depths")

    losses = three_depths.main(steps=2)
    assert set(losses) == {"by hand", "weights", "whole model"}
    assert all(np.isfinite(list(losses.values())))


def test_a_dropout_that_is_on_is_read_as_dropout() -> None:
    module, x = nn.Sequential([nn.Dense(8), nn.Dropout(0.25, deterministic=False)]), jax_nets.images(4, 6)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    fn, params = jq.flax.from_linen(module, module.init(keys, x), rngs={"dropout": jax.random.key(2)})
    qfn, variables = jq.quantize(fn, params, INT8, [x])
    (dropout,) = [node.op for node in qfn.plan.graph.nodes if isinstance(node.op, jq.ops.Dropout)]
    assert dropout.rate == pytest.approx(0.25)
    still, active = qfn(variables, x), qfn(variables, x, rngs=jax.random.key(3))
    assert 0 < float((active == 0).mean()) < 0.6
    np.testing.assert_allclose(jnp.where(active == 0, 0, active * 0.75), jnp.where(active == 0, 0, still), rtol=1e-5)


def test_a_traced_plan_goes_out_to_torch() -> None:
    import torch

    from jquant_converters import to_torch

    fn, params, x = small()
    qfn, variables = jq.quantize(fn, params, INT8, [x])
    module = to_torch(qfn.model(variables))
    np.testing.assert_allclose(module(torch.tensor(np.asarray(x))).detach(), qfn(variables, x), rtol=0, atol=1e-5)
