"""The axis of samples is found wherever operators put it."""

import jax.numpy as jnp
import numpy as np

import jquant as jq
from jquant import ops
from jquant.calibration.samples import batch_axes, by_sample


def planned(batch):
    nodes = (
        jq.Node("moved", ops.Permute(axes=(1, 0, 2)), ("x",)),
        jq.Node("merged", ops.Reshape(shape=(-1, 2)), ("x",)),
        jq.Node("relu", ops.Relu(), ("merged",)),
    )
    graph = jq.Graph((jq.Input("x", (batch, 3, 4)),), nodes, ("moved", "relu"))
    qconfig = jq.QConfig({"*": jq.Policy(output=jq.int8(observer=jq.observers.mean_of_maxima()))})
    return jq.prepare(graph, {}, qconfig, target=jq.targets.NASH_E)


def test_moved_and_merged_axes():
    model = planned(None)
    x = np.random.default_rng(0).normal(size=(5, 3, 4)).astype(np.float32)
    axes = batch_axes(model.plan, model.params, {"x": jnp.asarray(x)})
    assert (axes["x"], axes["moved"], axes["merged"]) == ((0, 5), (1, 5), (0, 5))
    for name, value in {"x": x, "moved": x.transpose(1, 0, 2), "merged": x.reshape(-1, 2)}.items():
        found = np.asarray(by_sample(jnp.asarray(value), axes[name]))
        assert found.shape == (1, 5, 12)
        np.testing.assert_array_equal(np.sort(found[0]), np.sort(x.reshape(5, 12)))
    want = np.float64(np.abs(x).reshape(5, -1).max(1)).mean() / 127.5
    for batches in ([x], [x[:2], x[2:]], list(x[:, None])):
        np.testing.assert_allclose(jq.calibrate(model, batches).qparams["x"], want, rtol=2.0**-20)


def test_of_a_fixed_batch_a_call_is_a_sample():
    model = planned(2)
    x = np.random.default_rng(1).normal(size=(4, 3, 4)).astype(np.float32)
    assert batch_axes(model.plan, model.params, {"x": jnp.asarray(x[:2])}) == {}
    want = np.float64([np.abs(x[:2]).max(), np.abs(x[2:]).max()]).mean() / 127.5
    np.testing.assert_allclose(jq.calibrate(model, [x[:2], x[2:]]).qparams["x"], want, rtol=2.0**-20)
