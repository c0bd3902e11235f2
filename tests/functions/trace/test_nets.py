"""Nets as people write them in JAX: the same floats as the original, and integers equal to the specification."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import jax_nets

import jquant as jq

QCONFIG = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8())})


@pytest.fixture(autouse=True)
def _flax_promotes_dtypes():
    with jax.numpy_dtype_promotion("standard"):  # flax divides float32 by int32, and so do its users
        yield


QUICK = ("resnet", "channels_first", "decoder", "scanned_layers")  # the others are `slow`


@pytest.mark.parametrize("name", jax_nets.NETS)
def test_float_is_that_of_the_original(name: str) -> None:
    net = jax_nets.NETS[name]()
    expected = jax.jit(net.fn)(net.params, *net.inputs)
    graph, params = jq.trace(net.fn, net.params, *net.inputs)
    (found,) = jax.jit(lambda params, *xs: jq.graph.evaluate_float(graph, params, *xs))(params, *net.inputs)
    assert found.shape == expected.shape
    assert float(jnp.abs(found - expected).max()) <= 1e-6 * float(jnp.abs(expected).max())
    assert not any(isinstance(node.op, jq.ops.Opaque) for node in graph.nodes)

    assert graph.inputs[0].shape[0] is None
    larger = [jnp.concatenate([x, x[:1]]) for x in net.inputs]
    assert jax.eval_shape(lambda *xs: jq.graph.evaluate_float(graph, params, *xs), *larger)[0].shape[0] == 3


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in jax_nets.NETS])
def test_integers_are_those_of_the_specification(name: str) -> None:
    net = jax_nets.NETS[name]()
    expected = jax.jit(net.fn)(net.params, *net.inputs)
    graph, params = jq.trace(net.fn, net.params, *net.inputs)
    model = jq.prepare(graph, params, QCONFIG, target=jq.targets.NASH_E)
    program = jq.lower(jq.calibrate(model, [net.inputs]))
    found = jq.run(program, *net.inputs)
    (reference,) = jax.tree.leaves(jq.reference.run(program, *map(np.asarray, net.inputs))[0])
    np.testing.assert_array_equal(found, reference)
    assert float(jnp.abs(found - expected).max()) <= 0.1 * float(jnp.abs(expected).max())


def operators(name: str) -> dict[str, str]:
    net = jax_nets.NETS[name]()
    graph, _ = jq.trace(net.fn, net.params, *net.inputs)
    return {node.name: type(node.op).__name__ for node in graph.nodes}


def test_a_net_of_linen_is_read_as_its_layers() -> None:
    found = operators("resnet")
    assert found["block2.conv1"] == "Conv"
    assert found["block2.shortcut_bn"] == "BatchNorm"
    assert set(found.values()) == {"Conv", "BatchNorm", "Relu", "MaxPool", "Add", "Mean", "Linear"}


def test_a_net_of_nnx_is_read_as_its_layers() -> None:
    found = operators("convnext")
    assert found["blocks.0.depthwise"] == "Conv"
    assert found["blocks.0.norm"] == "LayerNorm"
    assert sorted(set(found.values())) == ["Add", "BatchNorm", "Conv", "Gelu", "LayerNorm", "Linear", "Mean"]


def test_a_transformer_has_attention_and_rms_norm() -> None:
    found = operators("decoder")
    kinds = list(found.values())
    assert kinds.count("Attention") == 2
    assert kinds.count("RmsNorm") == 5
    assert kinds.count("Silu") == 2
    assert found["blocks.0.qkv"] == "Linear"
    assert "Opaque" not in kinds


def test_layers_of_a_scan_have_names_and_weights_of_their_own() -> None:
    net = jax_nets.NETS["scanned_layers"]()
    graph, params = jq.trace(net.fn, net.params, *net.inputs)
    assert {f"layers.in.{i}" for i in range(3)} <= {node.name for node in graph.nodes}
    stacked = net.params["layers"]["in"]["kernel"]
    for i in range(3):
        np.testing.assert_array_equal(params[f"layers.in.{i}.kernel"], stacked[i].T)


def test_a_tied_embedding_stays_one_parameter() -> None:
    net = jax_nets.NETS["decoder"]()
    graph, params = jq.trace(net.fn, net.params, *net.inputs)
    readers = [node for node in graph.nodes if "embed.embedding" in node.params.values()]
    assert [type(node.op).__name__ for node in readers] == ["Embedding", "Linear"]
    assert params["embed.embedding"].shape == (17, 12)


def test_a_traced_graph_goes_out_to_onnx() -> None:
    from onnx.reference import ReferenceEvaluator

    from jquant_converters import to_onnx

    net = jax_nets.NETS["resnet"]()  # channels last, which ONNX does not have
    graph, params = jq.trace(net.fn, net.params, *net.inputs)
    model = to_onnx(graph, params)
    (found,) = ReferenceEvaluator(model).run(None, {"x": np.asarray(net.inputs[0])})
    expected = np.asarray(net.fn(net.params, *net.inputs))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    model = jq.prepare(graph, params, QCONFIG, target=jq.targets.NASH_E)
    with pytest.raises(jq.ConversionError, match="channels-last in the traced function"):
        to_onnx(jq.calibrate(model, [net.inputs]))
