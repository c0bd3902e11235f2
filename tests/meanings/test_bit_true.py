"""What training sees in mode "bit_true" is what runs: with int16, tables and sampling, of all nodes or of some."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import graphs

import jquant as jq
from jquant import ops

NASH = jq.targets.NASH_E


def network() -> tuple[jq.Graph, dict]:
    """Convolutions with batch norm, int8 and int16, tables, and a grid that the network makes itself."""
    build = graphs.Builder(8)
    build.shapes["x"] = (3, 6, 8)
    x = build.add(ops.Relu(), (build.batch_norm(build.conv("x", 4, 3)),), (4, 6, 8))
    y = build.add(ops.Sigmoid(), (build.conv(x, 4, 1),), (4, 6, 8))
    x = build.add(ops.Mul(), (x, y), (4, 6, 8))
    mean = build.add(ops.Mean(axes=(2, 3)), (x,), (4,))
    build.array("theta.weight", 6, 4)
    build.params["theta.bias"] = jnp.asarray([1.0, 0, 0, 0, 1.0, 0])
    theta = build.add(ops.Linear(), (mean,), (6,), weight="theta.weight", bias="theta.bias")
    theta = build.add(ops.Reshape(shape=(-1, 2, 3)), (theta,), (2, 3))
    grid = build.add(ops.AffineGrid(size=(6, 8)), (theta,), (6, 8, 2))
    x = build.add(ops.GridSample(), (x, grid), (4, 6, 8))
    x = build.batch_norm(build.conv(x, 5, 3))
    nodes = build.graph(x, size=8)
    return jq.Graph((jq.Input("x", (None, 3, 6, 8)),), nodes.nodes, nodes.outputs), build.params


WIDE_OUTPUT = {"output": jq.int16(quantizer=jq.lsq)}


def rules() -> dict:
    wide = {"n3.conv": 1, "type:Sigmoid": 1, "type:Linear": 1, "type:Reshape": 1, "type:AffineGrid": 1}
    every = jq.Policy(weight=jq.int8(axis="out", quantizer=jq.lsq), output=jq.int8(quantizer=jq.lsq))
    return {"*": every} | dict.fromkeys(wide, jq.Policy(**WIDE_OUTPUT))


@pytest.fixture(scope="module")
def net() -> tuple:
    graph, raw = network()
    model = jq.prepare(graph, raw, jq.QConfig(rules()), target=NASH, batch_norm={"*": "live", "n1.*": "fold"})
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, 6, 8)), jnp.float32)
    return jq.calibrate(model, [x]), x


def dequantized(program: jq.Program, x: jax.Array) -> dict[str, np.ndarray]:
    """Every value of the program by the numpy reference, in real units."""
    _, values = jq.reference.run(program, np.asarray(x))
    scales = {name: np.asarray(scale) for name, scale in program.scales.items()}
    return {n: v.astype(np.float32) * scales[n] if n in scales else v for n, v in values.items()}


def test_nothing_differs_between_training_and_the_program(net: tuple) -> None:
    model, x = net
    kinds = {type(n.op).__name__ for n in model.plan.graph.nodes}
    assert {"GridSample", "AffineGrid", "Sigmoid"} <= kinds
    program = jq.lower(model)
    assert {"int8", "int16"} <= {f.output for f in program.formats.values()}
    y, _ = jq.apply_train(model, x, mode="bit_true")
    np.testing.assert_array_equal(y, jq.run(program, x))
    every = [n.name for n in model.plan.graph.nodes]
    wanted, (_, found) = dequantized(program, x), jq.apply_with_taps(model, x, mode="bit_true", bit_true=every)
    for name in every:  # computed node by node, from what fake-quant hands on
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def test_one_operator_on_integers_shows_what_it_costs(net: tuple) -> None:
    model, x = net
    _, fake = jq.apply_with_taps(model, x)
    _, part = jq.apply_with_taps(model, x, mode="bit_true", bit_true="type:GridSample")
    names = [n.name for n in model.plan.graph.nodes]
    (sample,) = [n.name for n in model.plan.graph.nodes if isinstance(n.op, ops.GridSample)]
    for name in names[: names.index(sample)]:
        np.testing.assert_array_equal(part[name], fake[name], err_msg=name)
    scale = float(jq.lower(model).scales[sample])
    steps = np.abs(np.asarray(part[sample]) - np.asarray(fake[sample])) / scale
    assert 0.1 < steps.max() < 2.5  # fake-quant does not round what is sampled
    integers = np.asarray(part[sample]) / scale
    np.testing.assert_allclose(integers, np.rint(integers), atol=1e-4)
    tables = ["type:Sigmoid", "re:.*mean"]
    _, part = jq.apply_with_taps(model, x, mode="bit_true", bit_true=tables)
    assert not np.array_equal(part["n4.sigmoid"], fake["n4.sigmoid"])
    np.testing.assert_array_equal(part["n3.conv"], fake["n3.conv"])


def test_the_gradient_stays_that_of_fake_quant() -> None:
    """Of a linear loss: the last node sees other values on integers, and gradients do not notice."""
    build = graphs.Builder(2)
    build.shapes["x"] = (3, 4, 4)
    graph = build.graph(build.add(ops.Sigmoid(), (build.conv("x", 4, 3),), (4, 4, 4)), size=4)
    config = jq.QConfig({"*": jq.Policy(**WIDE_OUTPUT, weight=jq.int8(axis="out", quantizer=jq.lsq))})
    model = jq.prepare(graph, build.params, config, target=NASH)
    x = graphs.images(1, graph, batch=3)
    model = jq.calibrate(model, [x])

    def gradient(**options: object) -> tuple[jq.Model, jax.Array]:
        def loss(t: jq.Model) -> tuple[jax.Array, jax.Array]:
            y, _ = jq.apply_train(t, x, **options)
            return jnp.sum(y * jnp.arange(y.size, dtype=jnp.float32).reshape(y.shape)) / y.size, y

        return jax.jit(jax.grad(loss, has_aux=True))(model)

    (found, y), (wanted, fake) = gradient(mode="bit_true", bit_true="type:Sigmoid"), gradient(mode="fake_quant")
    assert not np.array_equal(y, fake)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_part_needs_no_integers_elsewhere() -> None:
    graph, raw = network()
    float_head = rules() | {"n5.mul": None}
    model = jq.prepare(graph, raw, jq.QConfig(float_head), target=NASH)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, 6, 8)), jnp.float32)
    model = jq.calibrate(model, [x])
    with pytest.raises(jq.LoweringError, match="float"):
        jq.apply(model, x, mode="bit_true")
    y = jq.apply(model, x, mode="bit_true", bit_true="type:Sigmoid")
    assert np.isfinite(y).all()
    with pytest.raises(jq.LoweringError, match=r"node 'n5.mul'"):
        jq.apply(model, x, mode="bit_true", bit_true="n5.mul")


def test_wrong_choices_are_refused(net: tuple) -> None:
    model, x = net
    with pytest.raises(jq.JQuantError, match=r"'type:GridSampel' matches no node; did you mean 'type:GridSample'"):
        jq.apply(model, x, mode="bit_true", bit_true="type:GridSampel")
    with pytest.raises(jq.JQuantError, match=r"chooses nodes of mode 'bit_true', and the mode is 'fake_quant'"):
        jq.apply_train(model, x, bit_true="type:GridSample")


IMAGE = ("resnet", "mobilenet_v3", "densenet", "shufflenet", "unet", "video", "deeplab", "warping")
SEQUENCE = ("decoder", "cross_attention", "convnext", "swin", "vit", "gru", "lstm")  # lstm: 192 tables, 6 GB


@pytest.mark.slow
@pytest.mark.parametrize("name", [*IMAGE, *SEQUENCE])
def test_nothing_differs_for_imported_architectures(name: str) -> None:
    import torch
    from support import architectures

    from jquant_converters import from_torch

    def arrays(batch: int, seed: int) -> tuple[jax.Array, ...]:
        given = architectures.inputs(name, batch, seed=seed)
        return tuple(jnp.asarray(v.to(torch.int32).numpy() if v.dtype == torch.int64 else v.numpy()) for v in given)

    graph, raw = from_torch(architectures.build(name), architectures.inputs(name, 1, seed=0))
    config = jq.QConfig({"*": jq.Policy(output=jq.int16(), weight=jq.int8(axis="out"))})
    mode = "live" if any(isinstance(n.op, ops.BatchNorm) for n in graph.nodes) else "fold"
    model = jq.prepare(graph, raw, config, target=NASH, batch_norm=mode)
    model = jq.calibrate(model, [arrays(4, 0)])
    x = arrays(2, 9)
    found = jax.tree.leaves(jq.apply_train(model, *x, mode="bit_true")[0])
    for a, b in zip(found, jax.tree.leaves(jq.run(jq.lower(model), *x)), strict=True):
        np.testing.assert_array_equal(a, b)
