"""Channels that batch norm has switched off: their scales must leave room for the bias and for a fused add."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import graphs

import jquant as jq
from jquant import ops
from jquant.plan.accumulators import _smallest_scale

SPECS = {
    "per channel": jq.int8(axis="out"),
    "lsq": jq.int8(axis="out", quantizer=jq.lsq),
    "pow2": jq.int8(axis="out", scale_form="pow2"),
    "lsq_plus": jq.int8(axis="out", quantizer=jq.lsq_plus),
}


def residual(*, add: bool, groups: int = 1, transposed: bool = False) -> tuple[jq.Graph, dict]:
    """A convolution (plus its input) whose channel 0 has weights of 1e-9, and a bias of 30 to 60."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(8, 8 // groups, 3, 3))
    weight[0] *= 1e-9
    params = {"y.weight": jnp.asarray(weight, jnp.float32), "y.bias": jnp.asarray(rng.uniform(30, 60, 8), jnp.float32)}
    one = {"strides": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1), "groups": groups}
    op = ops.ConvTranspose(**one, output_padding=(0, 0)) if transposed else ops.Conv(**one)
    nodes = [jq.Node("y", op, ("x",), jq.FrozenMap({"weight": "y.weight", "bias": "y.bias"}))]
    nodes += [jq.Node("sum", ops.Add(), ("y", "x"))] if add else []
    return jq.Graph((jq.Input("x", (None, 8, 6, 6)),), tuple(nodes), (nodes[-1].name,)), params


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("add", [False, True])
def test_a_dead_channel_keeps_its_bias_and_its_addend(spec: str, add: bool) -> None:
    graph, params = residual(add=add)
    config = jq.QConfig({"*": jq.Policy(weight=SPECS[spec], output=jq.int8())})
    model = jq.prepare(graph, params, config, target=jq.targets.NASH_E, high_precision_outputs=False)
    x = graphs.images(1, graph, batch=8)
    program = jq.lower(jq.calibrate(model, [x]))
    assert int(np.abs(program.constants["y"]["bias"]).max()) < 2**31 - 1
    y = np.asarray(jq.run(program, x))
    outputs, _ = jq.reference.run(program, np.asarray(x))
    np.testing.assert_array_equal(y, outputs[0])
    exact = np.asarray(jq.apply(model, x, mode="float"))
    # One LSB for the rescale, half of one for the operand's own rounding, which the addend passes on.
    bound = 2.0 * float(program.scales["y"])
    np.testing.assert_allclose(y[:, 0], exact[:, 0], atol=bound)


@pytest.mark.parametrize("spec", [jq.int8(), jq.int8(axis="out")], ids=["tensor", "channel"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_shares_scales_between_groups(spec: jq.QuantSpec, groups: int) -> None:
    graph, params = residual(add=False, groups=groups, transposed=True)
    params["y.weight"] = params["y.weight"] * 1e-9
    config = jq.QConfig({"*": jq.Policy(weight=spec, output=jq.int8())})
    model = jq.prepare(graph, params, config, target=jq.targets.NASH_E, high_precision_outputs=False)
    x = graphs.images(1, graph, batch=8)
    program = jq.lower(jq.calibrate(model, [x]))
    y = np.asarray(jq.run(program, x))
    bias = np.asarray(model.params["y.bias"])[:, None, None]
    np.testing.assert_allclose(y, np.broadcast_to(bias, y.shape), atol=float(program.scales["y"]))


def test_floors_of_scales_are_those_of_numpy_inside_of_jit() -> None:
    graph, params = residual(add=True)
    config = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8())})
    model = jq.prepare(graph, params, config, target=jq.targets.NASH_E, high_precision_outputs=False)
    model = jq.calibrate(model, [graphs.images(1, graph)])
    (node,) = (node for node in model.plan.graph.nodes if isinstance(node.op, ops.Conv))
    assert len(node.inputs) == 2

    @jax.jit
    def floors(bias: jax.Array, scale: jax.Array) -> jax.Array:
        found = dict(model.params) | {"y.bias": bias}
        return _smallest_scale(node, dict.fromkeys(node.inputs, scale), found, jq.targets.NASH_E, per_channel=True)

    rng, largest = np.random.default_rng(0), np.float32(2**31 * (1 - 2**-20))
    for _ in range(50):
        bias, scale = (1e6 * rng.normal(size=8)).astype(np.float32), np.float32(np.exp2(rng.uniform(-9, 0)))
        addend = scale / np.float32(32767) / scale
        np.testing.assert_array_equal(floors(bias, scale), np.maximum(np.abs(bias) / largest / scale, addend))


def test_healthy_scales_stay_bit_for_bit() -> None:
    graph, params = residual(add=True)
    params = {key: jnp.abs(value) + 0.1 for key, value in params.items()}
    config = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8())})
    model = jq.prepare(graph, params, config, target=jq.targets.NASH_E)
    model = jq.calibrate(model, [graphs.images(1, graph)])
    weight = np.asarray(model.params["y.weight"])
    np.testing.assert_array_equal(
        np.asarray(model.qparams["y.weight"]), np.abs(weight).reshape(8, -1).max(1) / np.float32(127.5)
    )


@pytest.mark.parametrize("batch_norm", [False, True])
def test_what_training_let_collapse_is_raised(batch_norm: bool) -> None:
    graph, params = residual(add=True)
    if batch_norm:
        keys = {role: f"norm.{role}" for role in ("weight", "bias", "running_mean", "running_var")}
        norm = jq.Node("norm", ops.BatchNorm(), ("y",), jq.FrozenMap(keys))
        nodes = (graph.nodes[0], norm, jq.Node("sum", ops.Add(), ("norm", "x")))
        graph = jq.Graph(graph.inputs, nodes, graph.outputs)
        params |= {key: jnp.zeros(8) if role in ("bias", "running_mean") else jnp.ones(8) for role, key in keys.items()}
    config = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out", quantizer=jq.lsq), output=jq.int8())})
    how = "reverse_fold" if batch_norm else "fold"
    model = jq.prepare(graph, params, config, target=jq.targets.NASH_E, batch_norm=how)
    x = graphs.images(1, graph, batch=8)
    model = jq.calibrate(model, [x])
    trained = model.qparams | {"y.weight": model.qparams["y.weight"].at[3].set(2.0**-22)}
    with pytest.raises(jq.LoweringError, match=r"node 'y'.*more than 32767 times.*raise_collapsed_scales"):
        jq.lower(model.replace(qparams=trained))
    raised = jq.training.raise_collapsed_scales(model.replace(qparams=trained))
    program = jq.lower(raised)
    assert float(raised.qparams["y.weight"][3]) > 2.0**-22
    assert raised.qparams.keys() == trained.keys()
    for key, value in trained.items():
        others = [i for i in range(8) if i != 3] if key == "y.weight" else ...
        np.testing.assert_array_equal(np.asarray(raised.qparams[key])[others], np.asarray(value)[others], err_msg=key)
    outputs, _ = jq.reference.run(program, np.asarray(x))
    np.testing.assert_array_equal(jq.run(program, x), outputs[0])
