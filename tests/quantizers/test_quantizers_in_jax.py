"""Quantizers inside the transformations of jax, in forward mode, before operators, in plans."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.quantizer_cases import EVERY, bits, draw, gradients, parameter_for

import jquant as jq
from jquant import ops
from jquant.graph.operator import eval_float
from jquant.quantizers import adaround, fake_quant, float16_cast, forward_mode, lsq, lsq_plus, pact
from jquant.types import InputError, QuantSpec, integer_range

every = pytest.mark.parametrize("quantizer", EVERY, ids=lambda q: q.name)


@every
@pytest.mark.parametrize(("dtype", "form"), [("int4", "real"), ("uint8", "pow2")])
def test_the_twin_has_the_same_derivative_in_both_directions(quantizer, dtype, form):
    spec = QuantSpec(dtype=dtype, scale_form=form)
    x = jnp.asarray(draw(dtype, (3, 20), 0.3))
    parameter, twin = parameter_for(quantizer, x, 0.3, spec), forward_mode(quantizer)
    np.testing.assert_array_equal(bits(twin(x, parameter, spec)), bits(quantizer(x, parameter, spec)))
    np.testing.assert_array_equal(twin.scale(parameter, spec), quantizer.scale(parameter, spec))
    upstream = np.random.default_rng(9).normal(size=x.shape).astype(np.float32)
    reverse, same = (gradients(q, x, parameter, spec, upstream) for q in (quantizer, twin))
    jax.tree.map(np.testing.assert_array_equal, same, reverse)

    def loss(x, p):
        return jnp.sum(jnp.sin(twin(x, p, spec)) * upstream)

    rng = np.random.default_rng(10)
    direction = tuple(jnp.asarray(rng.normal(size=v.shape), jnp.float32) for v in (x, parameter))
    _, slope = jax.jvp(loss, (x, parameter), direction)
    to = jax.grad(loss, argnums=(0, 1))(x, parameter)
    terms = [np.sum(np.abs(a * b)) for a, b in zip(to, direction, strict=True)]
    want = sum(np.vdot(np.float64(a), np.float64(b)) for a, b in zip(to, direction, strict=True))
    assert abs(slope - want) <= 1e-5 * sum(terms) + 1e-6
    row = jax.jacfwd(lambda p: twin(x, p, spec).sum())(parameter)
    column = jax.jacrev(lambda p: quantizer(x, p, spec).sum())(parameter)
    np.testing.assert_allclose(row, column, rtol=1e-5, atol=1e-5 * float(np.abs(column).max()) + 1e-30)


@every
def test_hessian_vector_products(quantizer):
    """The slopes are constants, so the Hessian of g(q(x)) is J^T g'' J: that of sum(q^2) is 2 J^T J."""
    spec = QuantSpec(dtype="int4")
    x = jnp.asarray(draw("int4", (40,), 0.3))
    parameter, twin = parameter_for(quantizer, x, 0.3, spec), forward_mode(quantizer)

    def loss(leaves):
        return jnp.sum(twin(*leaves, spec) ** 2)

    leaves, rng = (x, parameter), np.random.default_rng(11)
    v = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), leaves)
    _, product = jax.jvp(jax.grad(loss), (leaves,), (v,))
    _, forward = jax.jvp(lambda leaves: twin(*leaves, spec), (leaves,), (v,))
    (want,) = jax.vjp(lambda leaves: twin(*leaves, spec), leaves)[1](2 * forward)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), product, want)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: quantizer(x, parameter, spec), (x,), (x,))


def test_forward_mode_of_others():
    assert forward_mode(forward_mode(lsq)) is forward_mode(lsq)
    own = jq.quantizers.Quantizer(apply=lambda x, p, s: x, init=lambda s, _: s, scale=lambda p, _: p)
    with pytest.raises(InputError, match=r"'custom' has no forward-mode twin; write its apply with jax\.custom_jvp"):
        forward_mode(own)


@pytest.mark.parametrize("quantizer", [lsq_plus, adaround, *map(forward_mode, EVERY)], ids=lambda q: q.name)
def test_jit_vmap_scan_remat(quantizer):
    spec, original = QuantSpec(dtype="int4"), next(q for q in EVERY if q is quantizer or forward_mode(q) is quantizer)
    x = jnp.asarray(draw("int4", (4, 30), 0.3))
    parameters = jnp.stack(
        [parameter_for(original, row, s, spec) for row, s in zip(x, (0.2, 0.3, 0.4, 1.0), strict=True)]
    )
    both = jax.value_and_grad(lambda r, p: jnp.sum(jnp.sin(quantizer(r, p, spec))), argnums=(0, 1))
    alone = [both(row, p) for row, p in zip(x, parameters, strict=True)]
    want = jax.tree.map(lambda *v: jnp.stack(v), *alone)
    found = {
        "vmap": jax.vmap(both)(x, parameters),
        "jit": jax.jit(jax.vmap(both))(x, parameters),
        "scan": jax.lax.scan(lambda c, row: (c, both(*row)), 0, (x, parameters))[1],
        "remat": jax.vmap(
            jax.value_and_grad(jax.checkpoint(lambda r, p: jnp.sum(jnp.sin(quantizer(r, p, spec)))), (0, 1))
        )(x, parameters),
    }
    for name, got in found.items():
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name), got, want)  # noqa: B023


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from jquant.quantizers import *
from jquant.types import QuantSpec

mesh, spec = Mesh(np.asarray(jax.devices()), ("batch",)), QuantSpec(dtype="int4")
x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 5)), jnp.float32)
for original in (fake_quant, lsq, lsq_plus, pact, adaround, float16_cast):
    if original is adaround:
        parameter, place = adaround_parameter(x, 0.1, spec), P(None, "batch")
    else:
        parameter, place = original.init(jnp.float32(0.1), spec), P()
    for quantizer in (original, forward_mode(original)):
        def loss(x, p):
            return jax.lax.psum(jnp.sum(jnp.sin(quantizer(x, p, spec))), "batch")
        split = jax.shard_map(loss, mesh=mesh, in_specs=(P("batch"), place), out_specs=P())
        got = jax.jit(jax.value_and_grad(split, argnums=(0, 1)))(x, parameter)
        want = jax.value_and_grad(lambda x, p: jnp.sum(jnp.sin(quantizer(x, p, spec))), argnums=(0, 1))(x, parameter)
        # N of the gradient scale is that of the shard, an eighth: 1 / sqrt(N qmax) is larger by sqrt(8).
        by = 8 ** 0.5 if original in (lsq, lsq_plus) else 1.0
        np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
        np.testing.assert_allclose(got[1][0], want[1][0], rtol=1e-5)
        np.testing.assert_allclose(got[1][1], want[1][1] * by, rtol=1e-4, atol=1e-5, err_msg=quantizer.name)
print("equal")
"""


def test_shard_map():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "equal"


# ---------------------------------------------------------------------------------------------------------------------
# Dead gradients: every quantizer, bits and operator with weights

BITS = ["int2", "int3", "int4", "int8", "int16"]
ones, none = {"strides": (1, 1), "dilation": (1, 1)}, {"padding": ((1, 1), (1, 1))}
WEIGHTED = {
    "conv": (ops.Conv(**ones, **none), (2, 4, 5, 5), (6, 4, 3, 3)),
    "depthwise": (ops.Conv(**ones, **none, groups=4), (2, 4, 5, 5), (4, 1, 3, 3)),
    "transposed": (ops.ConvTranspose(**ones, **none, output_padding=(0, 0)), (2, 4, 5, 5), (4, 6, 3, 3)),
    "linear": (ops.Linear(), (8, 12), (6, 12)),
}


@every
@pytest.mark.parametrize(
    "dtype", [pytest.param(d, marks=pytest.mark.slow) if d in ("int3", "int8") else d for d in BITS]
)
@pytest.mark.parametrize("operator", WEIGHTED)
def test_no_gradient_is_dead(operator, dtype, quantizer):
    op, *shapes = WEIGHTED[operator]
    if quantizer is float16_cast:
        spec = QuantSpec(dtype="float16")
    else:
        spec = QuantSpec(dtype=dtype, axis="out")
    rng = np.random.default_rng(12)
    x, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    axis, (low, high) = op.weight_axis, integer_range(dtype)
    scale = 1.0 / -low if quantizer is pact else 1.3 / high  # so that some elements saturate
    channels = jnp.full(weight.shape[axis], scale, jnp.float32)
    channels = channels.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    parameter = parameter_for(quantizer, weight, channels, spec)
    of_x = QuantSpec(dtype=spec.dtype)
    x_parameter = parameter_for(quantizer, x, scale, of_x)

    @jax.grad
    def slopes(leaves):
        x, weight, x_parameter, parameter = leaves
        y = eval_float(op, quantizer(x, x_parameter, of_x), weight=quantizer(weight, parameter, spec))
        return jnp.sum(jnp.sin(y))

    to_x, to_weight, *to_parameters = slopes((x, weight, x_parameter, parameter))
    trained = quantizer not in (fake_quant, float16_cast)
    for to in (to_x, to_weight, *to_parameters):
        assert np.isfinite(to).all()
    assert np.mean(np.asarray(to_x) != 0) > 0.3
    assert np.mean(np.asarray(to_weight) != 0) > 0.3
    for to in to_parameters:
        rows = (to[1],) if quantizer is adaround else tuple(to) if quantizer is lsq_plus else (to,)
        assert all(np.any(row != 0) == trained for row in rows)


@pytest.mark.parametrize("quantizer", [fake_quant, lsq, lsq_plus, pact], ids=lambda q: q.name)
def test_a_plan_in_forward_mode(quantizer):
    """The derivative of a whole plan along a direction, in both directions of differentiation."""
    twin, rng = forward_mode(quantizer), np.random.default_rng(13)
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in (("w", (4, 3)), ("b", (4,)))}
    node = jq.Node("fc", ops.Linear(), ("x",), jq.FrozenMap({"weight": "w", "bias": "b"}))
    graph = jq.Graph((jq.Input("x", (None, 3)),), (node, jq.Node("act", ops.Sigmoid(), ("fc",))), ("act",))
    policy = jq.Policy(weight=jq.int8(axis="out", quantizer=twin), output=jq.int8(quantizer=twin))
    model = jq.prepare(graph, params, jq.QConfig({"*": policy}), target=jq.targets.NASH_E)
    x = jnp.asarray(rng.normal(size=(16, 3)), jnp.float32)
    model = jq.calibrate(model, [x])

    def loss(params, qparams):
        return jnp.sum(jq.apply(model.replace(params=params, qparams=qparams), x, mode="fake_quant") ** 2)

    _, slope = jax.jvp(loss, (model.params, model.qparams), (model.params, model.qparams))
    to = jax.grad(loss, argnums=(0, 1))(model.params, model.qparams)
    products = jax.tree.map(lambda a, b: np.vdot(np.float64(a), np.float64(b)), to, (model.params, model.qparams))
    np.testing.assert_allclose(slope, sum(jax.tree.leaves(products)), rtol=1e-4)


def test_lower_refuses_an_offset():
    rng = np.random.default_rng(14)
    node = jq.Node("fc", ops.Linear(), ("x",), jq.FrozenMap({"weight": "w"}))
    graph = jq.Graph((jq.Input("x", (None, 3)),), (node,), ("fc",))
    policy = jq.Policy(weight=jq.int8(axis="out", quantizer=lsq_plus), output=jq.int8(quantizer=lsq_plus))
    params = {"w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}
    model = jq.prepare(graph, params, jq.QConfig({"*": policy}), target=jq.targets.NASH_E)
    x = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    model = jq.calibrate(model, [x])
    assert model.qparams["w"].shape == (2, 4)
    program = jq.lower(model)
    np.testing.assert_allclose(jq.run(program, x), jq.apply(model, x), rtol=1e-5, atol=1e-5)
    for name in ("x", "w"):
        moved = model.qparams | {name: model.qparams[name].at[1].add(0.01)}
        assert not np.array_equal(jq.apply(model.replace(qparams=moved), x), jq.apply(model, x))
        with pytest.raises(
            jq.LoweringError, match=rf"'{name}' has a learned offset \(lsq_plus\), and nash-e has no zero"
        ):
            jq.lower(model.replace(qparams=moved))
    with pytest.raises(jq.LoweringError, match=r"inside jit it is not known whether it is 0; use jq\.lsq for mode"):
        jq.apply(model, x, mode="bit_true")
