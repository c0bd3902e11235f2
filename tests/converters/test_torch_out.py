"""`to_torch`: every operator in float, fake-quant to the bit where float sums are exact, and through both exporters."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support import architectures
from support.aten_cases import GROUPS, Values, difference, example

import jquant as jq
from jquant import ops
from jquant.types import CalibrationError, ConversionError
from jquant_converters import from_torch, to_torch

HALF_EVEN = jq.targets.NASH_E.with_fields({"rescale.post_rounding": "half_even"})
FLOAT = jq.QConfig({"*": None})


def narrowed(tensors):
    """Integers as the graph has them."""
    return [x.to(torch.int32) if x.dtype == torch.int64 else x for x in tensors]


def outputs_of(module, *inputs):
    with torch.no_grad():
        found = module(*narrowed(inputs))
    return torch.utils._pytree.tree_leaves(found)


@pytest.mark.parametrize("group", GROUPS)
def test_every_imported_overload_goes_out_again(group):
    """As a graph, and as a plan, whose convolutions and pools run channels-last."""
    module = Values(GROUPS[group]).eval()
    graph, params = from_torch(module, example(2))
    model = jq.prepare(graph, params, FLOAT, target=jq.targets.NASH_P)
    for written in (to_torch(graph, params), to_torch(model)):
        inputs = example(3, seed=3)
        used = [x for entry, x in zip(graph.inputs, inputs, strict=True) if entry.name]
        with torch.no_grad():
            expected = module(*inputs)
        names = [name for name, value in expected.items() for _ in torch.utils._pytree.tree_leaves(value)]
        leaves = torch.utils._pytree.tree_leaves(expected)
        for name, actual, value in zip(names, outputs_of(written, *used), leaves, strict=True):
            assert not difference(actual.detach().numpy(), value.detach().numpy(), 1e-5), name


EXACT = [
    ops.Mean(axes=(1,)),
    ops.Variance(axes=(1, 2), correction=0),
    ops.Pad(padding=((0, 0), (1, 2), (0, 3)), mode="border"),
    ops.Pad(padding=((0, 0), (2, 1), (3, 0)), mode="reflect"),
]


@pytest.mark.parametrize(("op", "dtype"), [
    (op, dtype) for op in EXACT for dtype in ("uint8", "bool", "int32") if isinstance(op, ops.Pad) or dtype != "int32"
])  # fmt: skip
def test_exact_values_that_torch_has_no_kernel_for(op, dtype):
    """numpy is the reference."""
    x = (np.random.default_rng(0).integers(0, 200, (2, 4, 5)) % (2 if dtype == "bool" else 256)).astype(dtype)
    graph = jq.Graph((jq.Input("x", (None, 4, 5), dtype),), (jq.Node("y", op, ("x",)),), ("y",))
    if isinstance(op, ops.Pad):
        wanted = np.pad(x, op.padding, "edge" if op.mode == "border" else "reflect")
    else:
        wanted = (np.mean if isinstance(op, ops.Mean) else np.var)(x.astype(np.float64), axis=op.axes)
    written = to_torch(graph, {})
    np.testing.assert_allclose(outputs_of(written, torch.from_numpy(x))[0].numpy(), wanted, rtol=1e-6)
    again, params = from_torch(written, torch.from_numpy(x))
    (found,) = jq.graph.evaluate_float(again, params, x)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def calibrated(name, output, weight, target, **options):
    graph, params = from_torch(architectures.build(name), architectures.inputs(name, 1, seed=0))
    qconfig = jq.QConfig({"*": jq.Policy(output=output, weight=weight)})
    model = jq.prepare(graph, params, qconfig, target=target, **options)
    batches = [jnp.asarray(architectures.inputs(name, 4, seed=s)[0].numpy()) for s in range(2)]
    return jq.calibrate(model, batches)


@pytest.mark.parametrize("output", [jq.int8, jq.int16], ids=["int8", "int16"])
@pytest.mark.parametrize("name", ["shufflenet", pytest.param("deeplab", marks=pytest.mark.slow)])
def test_power_of_two_scales_give_the_bits_of_fake_quant(name, output):
    """Products are multiples of one power of two. Those of int8 sum up below 2^24, so that sums are exact in float."""
    weight = jq.int8(axis="out", scale_form="pow2") if output is jq.int8 else jq.int4(axis="out", scale_form="pow2")
    model = calibrated(name, output(scale_form="pow2"), weight, HALF_EVEN)
    (x,) = architectures.inputs(name, 3, seed=7)
    expected = np.asarray(jq.apply(model, jnp.asarray(x.numpy())))
    (actual,) = outputs_of(to_torch(model), x)
    if output is jq.int8:
        np.testing.assert_array_equal(actual.numpy(), expected)
    else:  # a sum of int16 products has more than 24 bits: float rounding moves some values by one LSB of int16
        np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("batch_norm", ["fold", "live"])
def test_a_batch_norm_of_features_that_follows_no_layer(batch_norm):
    norm = torch.nn.BatchNorm1d(7)
    norm.running_mean, norm.running_var = torch.linspace(-1, 1, 7), torch.linspace(0.5, 2, 7)
    module = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Tanh(), norm, torch.nn.Linear(7, 3)).eval()
    graph, params = from_torch(module, (torch.zeros(2, 6),))
    qconfig = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8())})
    model = jq.prepare(graph, params, qconfig, target=jq.targets.NASH_E, batch_norm=batch_norm)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    model = jq.calibrate(model, [x.numpy()])
    np.testing.assert_allclose(
        jq.apply(model.replace(qparams={}), x.numpy(), mode="float"), module(x).detach(), rtol=0, atol=1e-5
    )
    program = jq.lower(model)
    np.testing.assert_array_equal(jq.run(program, x.numpy()), jq.reference.run(program, x.numpy())[0][0])
    written = to_torch(jq.training.fold_batch_norm(model))
    np.testing.assert_allclose(outputs_of(written, x)[0], jq.apply(model, x.numpy()), rtol=0, atol=1e-5)


def test_real_scales_differ_by_one_lsb_at_most_behind_each_quantization():
    """One layer and its input: a reciprocal in place of a division moves x / scale by an ulp, so a tie at most."""
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.ReLU())
    graph, params = from_torch(module, (torch.zeros(1, 3, 9, 9),))
    qconfig = jq.QConfig({"*": jq.Policy(output=jq.int8(), weight=jq.int8(axis="out"))})
    model = jq.prepare(graph, params, qconfig, target=jq.targets.NASH_E, high_precision_outputs=False)
    x = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    model = jq.calibrate(model, [jnp.asarray(x.numpy())])
    expected = np.asarray(jq.apply(model, jnp.asarray(x.numpy())))
    (actual,) = outputs_of(to_torch(model), x)
    steps = np.abs(actual.numpy() - expected) / np.asarray(model.qparams["0"])
    assert steps.max() < 1.01
    assert (steps > 0.5).mean() < 0.01


def test_weights_are_integers_under_their_keys_and_permutations_of_the_plan_are_gone():
    model = calibrated("shufflenet", jq.int8(), jq.int8(axis="out"), jq.targets.NASH_E)
    module = to_torch(model)
    state = module.state_dict()
    assert state["stem.0.weight"].dtype == torch.int8
    assert state["stem.0.weight_scale"].shape == (8,)
    assert state["fc.bias"].dtype == torch.float32
    assert not module.training
    permuted = sum("permute" in str(node.target) for node in module.graph.nodes)
    assert permuted == sum(isinstance(n.op, jq.ops.Permute) and ".to_" not in n.name for n in model.plan.graph.nodes)


@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_both_exporters_take_it_with_a_free_batch(dtype, tmp_path):
    model = calibrated(
        "shufflenet", getattr(jq, dtype)(), jq.int8(axis="out"), jq.targets.NASH_E, high_precision_outputs=False
    )
    module = to_torch(model)
    (x,), (other,) = (architectures.inputs("shufflenet", n, seed=n) for n in (2, 5))
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(module, (x,), dynamic_shapes=batch)
    (expected,) = outputs_of(module, other)
    torch.testing.assert_close(outputs_of(program.module(), other)[0], expected, rtol=0, atol=0)
    assert sum("quantize_per_tensor" in str(n.target) for n in program.graph.nodes) >= 2 * len(model.plan.owned)


@pytest.mark.filterwarnings("ignore")  # of torch.onnx itself
@pytest.mark.parametrize(
    "dtype", [pytest.param(jq.int8, id="int8", marks=pytest.mark.slow), pytest.param(jq.int16, id="int16")]
)
def test_the_onnx_exporter_writes_quantize_and_dequantize(dtype, tmp_path):
    pytest.importorskip("onnxscript")
    import onnxruntime

    model = calibrated("shufflenet", dtype(), jq.int8(axis="out"), jq.targets.NASH_E)
    module = to_torch(model)
    (x,), (other,) = (architectures.inputs("shufflenet", n, seed=n) for n in (2, 5))
    path = tmp_path / "model.onnx"
    written = torch.onnx.export(
        module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), opset_version=21, verbose=False
    )
    written.save(path)
    counts = Counter(node.op_type for node in written.model.graph)
    assert counts["QuantizeLinear"] == len(model.plan.owned)
    assert counts["DequantizeLinear"] > len(model.plan.owned)  # equal weights are written once
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options)
    (actual,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    (expected,) = outputs_of(module, other)
    np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "name", ["shufflenet", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cross_attention", "gru"))]
)
def test_there_and_back_again(name):
    """torch -> jquant -> torch -> jquant: the same float outputs, and the same plan and integers up to names."""
    given = architectures.inputs(name, 2, seed=1)
    graph, params = from_torch(architectures.build(name), given)
    again, params_again = from_torch(to_torch(graph, params), given)
    arrays = [jnp.asarray(x.numpy()) for x in given]
    qconfig = jq.QConfig({"*": jq.Policy(output=jq.int16(), weight=jq.int8(axis="out"))})
    results = []
    for g, p in ((graph, params), (again, params_again)):
        float_outputs = jq.graph.evaluate_float(g, p, *arrays)
        model = jq.prepare(g, p, qconfig, target=jq.targets.NASH_E)
        model = jq.calibrate(model, [arrays if len(arrays) > 1 else arrays[0]])
        formats = Counter((type(n.op).__name__, str(model.plan.values[n.name])) for n in model.plan.graph.nodes)
        results.append((float_outputs, formats, jax.tree.leaves(jq.run(jq.lower(model), *arrays))))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert results[0][1] == results[1][1]
    for a, b in zip(results[0][2], results[1][2], strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_what_has_no_form_in_torch_is_refused_by_name():
    node = jq.Node("roi", jq.ops.RoiAlign(output_size=(2, 2)), ("x", "boxes"))
    graph = jq.Graph((jq.Input("x", (None, 3, 8, 8)), jq.Input("boxes", (None, 4))), (node,), ("roi",))
    with pytest.raises(ConversionError, match=r"node 'roi' \(RoiAlign\).*end the graph before it"):
        to_torch(graph, {})


def test_bad_arguments():
    graph, params = from_torch(torch.nn.Linear(3, 2), (torch.zeros(1, 3),))
    qconfig = jq.QConfig({"*": jq.Policy(output=jq.int8(), weight=jq.int8(quantizer=jq.lsq_plus))})
    model = jq.prepare(graph, params, qconfig, target=jq.targets.NASH_E)
    with pytest.raises(CalibrationError, match="no scale"):
        to_torch(model)
    model = jq.calibrate(model, [jnp.ones((2, 3))])
    with pytest.raises(ConversionError, match="learned offset"):
        to_torch(model)
    with pytest.raises(ConversionError, match="takes a Model, or a Graph with its params, not Graph"):
        to_torch(graph)


def test_statistics_are_buffers_and_the_affine_part_is_trained():
    """The exporter of torch and its training refuse a mean or variance that asks for a gradient."""
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    net, x = torch.nn.Sequential(torch.nn.ReLU(), norm).eval(), torch.randn(2, 4, 5, 5)
    written = to_torch(*from_torch(net, (x,)))
    torch.testing.assert_close(torch.export.export(written, (x,)).module()(x), net(x))
    assert {name for name, _ in written.named_buffers()} == {"1.running_mean", "1.running_var"}
    written(x).sum().backward()
    net(x).sum().backward()
    for role, parameter in norm.named_parameters():
        torch.testing.assert_close(dict(written.named_parameters())[f"1.{role}"].grad, parameter.grad)
