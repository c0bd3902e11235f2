"""Every transformation of JAX on quantized functions: {plain, linen, nnx} x transform x {float, QAT, integer}."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec
from support.processes import finish, start

import jquant as jq

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(4, 6)), jnp.float32)
SPEC = {"quantizer": jq.quantizers.forward_mode(jq.lsq)}  # the custom_jvp twin, for both directions
QCONFIG = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out", **SPEC), output=jq.int8(**SPEC))})


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.gelu(nn.Dense(5, name="up")(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.up, self.head = nnx.Linear(6, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.gelu(self.up(x)))


def plain(params, x):
    return jax.nn.gelu(x @ params["up"]["kernel"] + params["up"]["bias"]) @ params["head"]["kernel"]


def _plain() -> tuple[Callable, Any]:
    shapes = {"up": {"kernel": (6, 5), "bias": (5,)}, "head": {"kernel": (5, 3)}}
    draw = lambda shape: jnp.asarray(RNG.normal(size=shape), jnp.float32)  # noqa: E731
    return plain, jax.tree.map(draw, shapes, is_leaf=lambda v: isinstance(v, tuple))


FRAMEWORKS: dict[str, Callable[[], tuple[Callable, Any]]] = {
    "plain": _plain,
    "linen": lambda: jq.flax.from_linen(Linen(), Linen().init(jax.random.key(0), X)),
    "nnx": lambda: jq.flax.from_nnx(Nnx(nnx.Rngs(0))),
}
MEANINGS = ("float", "fake_quant", "integer")


@cache
def quantized(framework: str) -> tuple[Callable, jq.functions.QuantizedFunction, Any, jq.Program]:
    fn, params = FRAMEWORKS[framework]()
    qfn, variables = jq.quantize(fn, params, QCONFIG, [X])
    return fn, qfn, variables, qfn.lower(variables)


def meaning(framework: str, name: str) -> tuple[Callable, Any]:
    """A function of a pytree and x, and the pytree."""
    _, qfn, variables, program = quantized(framework)
    if name == "integer":
        return jq.run, program
    return partial(qfn, mode=name), variables


def by_jit(f, v, x):
    return jax.jit(f)(v, x)


def by_vmap(f, v, x):
    return jax.vmap(f, (None, 0))(v, x[:, None])[:, 0]


def by_scan(f, v, x):
    return jax.lax.scan(lambda c, xs: (c, f(v, xs)), 0, x.reshape(2, 2, -1))[1].reshape(4, -1)


def by_remat(f, v, x):
    return jax.checkpoint(f)(v, x)


def by_shard_map(f, v, x):
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (PartitionSpec(), PartitionSpec("batch"))
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("batch")))(v, x)


def by_export(f, v, x):
    leaves, structure = jax.tree.flatten(v)
    exported = jax.export.export(jax.jit(lambda leaves, x: f(jax.tree.unflatten(structure, leaves), x)))(leaves, x)
    return jax.export.deserialize(exported.serialize()).call(leaves, x)


def by_donation(f, v, x):
    g = jax.jit(lambda v, x: (f(v, x), 2.0 * x), donate_argnums=1)
    return g(v, jnp.array(x))[0]


TRANSFORMS = (by_jit, by_vmap, by_scan, by_remat, by_shard_map, by_export, by_donation)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", MEANINGS)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: t.__name__)
def test_values(transform, name: str, framework: str) -> None:
    f, v = meaning(framework, name)
    expected, found = f(v, X), transform(f, v, X)
    if name == "integer":
        np.testing.assert_array_equal(found, expected)
    else:  # XLA orders sums by the shape that it compiles; a value on a tie may then round the other way
        step = 0.0 if name == "float" else float(jnp.abs(expected).max()) / 127
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 + step)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", ["float", "fake_quant"])
@pytest.mark.parametrize("outer", [lambda f: f, jax.jit, jax.checkpoint], ids=["alone", "jit", "remat"])
def test_grad_and_jvp(outer, name: str, framework: str) -> None:
    f, v = meaning(framework, name)
    loss = outer(lambda v: (f(v, X) ** 2).sum())
    grads = jax.grad(loss)(v)
    tangents = jax.tree.map(jnp.ones_like, v)
    _, slope = jax.jvp(loss, (v,), (tangents,))
    along = sum(float(g.sum()) for g in jax.tree.leaves(grads))
    assert np.isfinite(along)
    assert float(slope) == pytest.approx(along, rel=1e-3)
    assert any(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads["params"]))
    moves = [float(jnp.abs(g).max()) for g in jax.tree.leaves(grads["qparams"])]
    assert (max(moves) > 0) == (name == "fake_quant")  # the scales are trained, and only where something is quantized


FOUR_DEVICES = """
import jax, numpy as np
from functions import test_transforms as t

jax.config.update("jax_numpy_dtype_promotion", "strict")
assert jax.device_count() == 4
for framework in t.FRAMEWORKS:
    for name in t.MEANINGS:
        t.test_values(t.by_shard_map, name, framework)
    for name in ("float", "fake_quant"):
        f, v = t.meaning(framework, name)
        alone = jax.grad(lambda v: (f(v, t.X) ** 2).sum())(v)
        sharded = jax.grad(lambda v: (t.by_shard_map(f, v, t.X) ** 2).sum())(v)
        for (path, a), b in zip(jax.tree.leaves_with_path(alone), jax.tree.leaves(sharded), strict=True):
            key = jax.tree_util.keystr(path)
            of_a_value = "qparams" in key and "kernel" not in key
            more = 2.0 if of_a_value else 1.0  # LSQ divides by the root of the elements that it sees: a quarter of them
            np.testing.assert_allclose(b, more * a, rtol=1e-4, atol=1e-4 * max(1.0, float(abs(a).max())), err_msg=key)
print("equal")
"""


def test_shard_map_over_four_devices() -> None:
    finish(start(FOUR_DEVICES, 4))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_gradient_of_fake_quant_is_near_that_of_the_function(framework: str) -> None:
    fn, qfn, variables, _ = quantized(framework)
    inside = 0.8 * X  # of the range that X calibrated: at its ends the gradient is cut off
    expected = jax.grad(lambda p: (fn(p, inside) ** 2).sum())(variables["params"])
    found = jax.grad(lambda p: (qfn({**variables, "params": p}, inside) ** 2).sum())(variables["params"])
    a, b = (jnp.concatenate([g.ravel() for g in jax.tree.leaves(tree)]) for tree in (expected, found))
    passed = b != 0  # it is 0 where a weight is at the end of its range
    assert float(passed.mean()) > 0.5
    assert float(jnp.abs(jnp.where(passed, a - b, 0.0)).max()) <= 0.3 * float(jnp.abs(a).max())


# ---------------------------------------------------------------------------------------------------------------------
# The traps


def with_helper(helper: Callable) -> Callable:
    return lambda params, x: helper(x, params["w"]) + 1.0


@pytest.mark.parametrize("ran_first", [True, False])
def test_a_helper_that_was_jitted_in_float_before_is_quantized_all_the_same(ran_first: bool) -> None:
    helper = jax.jit(lambda x, w: jnp.tanh(x @ w))
    params = {"w": jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32)}
    if ran_first:
        helper(X, params["w"])
    qconfig = jq.QConfig({"*": jq.Policy(weight=jq.int2(axis="out"), output=jq.int8())})
    qfn, variables = jq.quantize(with_helper(helper), params, qconfig, [X])
    coarse = qfn(variables, X)
    assert float(jnp.abs(coarse - with_helper(helper)(params, X)).max()) > 0.05  # two bits show
    np.testing.assert_allclose(
        helper(X, params["w"]), jnp.tanh(X @ params["w"]), rtol=1e-6
    )  # the helper does not change


def dtypes_made(jaxpr) -> list:
    found = []
    for equation in jaxpr.eqns:
        inner = [v for v in equation.params.values() if hasattr(v, "jaxpr")]
        for one in inner:
            found += dtypes_made(one.jaxpr)
        found += [] if inner else [v.aval.dtype for v in equation.outvars]
    return found


def test_a_program_under_an_outer_jit_stays_integer() -> None:
    _, qfn, variables, program = quantized("plain")
    outer = jax.jit(lambda x: jq.run(program, x))  # the program is static here: its constants are baked in
    np.testing.assert_array_equal(outer(X), jq.run(program, X))
    raw = jax.make_jaxpr(lambda x: jq.run(program, x, raw=True))(jnp.zeros((4, 6), jnp.int8))
    assert not [dtype for dtype in dtypes_made(raw.jaxpr) if jnp.issubdtype(dtype, jnp.floating)]
    at_each_step = jax.jit(lambda v, x: qfn(v, x, mode="bit_true"))
    np.testing.assert_allclose(at_each_step(variables, X), jq.run(program, X), rtol=1e-6)


@pytest.mark.parametrize("bits", [jq.int2, jq.int4])
def test_few_bits_run_on_a_cpu(bits) -> None:
    params = {"dense": {"kernel": jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32)}}
    qconfig = jq.QConfig({"*": jq.Policy(weight=bits(axis="out"), output=jq.int8())})
    qfn, variables = jq.quantize(lambda p, x: jax.nn.relu(x @ p["dense"]["kernel"]), params, qconfig, [X])
    program = qfn.lower(variables)
    reference, _ = jq.reference.run(program, np.asarray(X))
    np.testing.assert_array_equal(jq.run(program, X), jax.tree.leaves(reference)[0])
    kernel = np.asarray(qfn.fake_quantized(variables)["dense"]["kernel"])
    assert max(len(np.unique(kernel[:, i])) for i in range(3)) <= 2 ** (2 if bits is jq.int2 else 4)


def test_a_rule_with_a_typo_is_an_error_with_the_name_that_was_meant() -> None:
    fn, params = FRAMEWORKS["linen"]()
    qconfig = jq.QConfig({"*": jq.Policy(weight=jq.int8()), "haed": jq.Policy(output=jq.int16())})
    with pytest.raises(jq.QConfigError, match=r"'haed' matches nothing.*head"):
        jq.quantize(fn, params, qconfig, [X])
