"""Batch norm kept for training: what it computes, what reaches it, and that it ships the integers that it trained."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import graphs

import jquant as jq
from jquant import ops
from jquant.ops.batch_norm import STATISTICS
from jquant.plan.batch_norm import kept_nodes, untrained

NASH = jq.targets.NASH_E
MODES = ("live", "frozen", "reverse_fold")


def config(**options: object) -> jq.QConfig:
    dtype = {"int8": jq.int8, "int4": jq.int4}[options.pop("dtype", "int8")]
    weight = dtype(**{"axis": "out", "quantizer": jq.lsq, **options})
    return jq.QConfig({"*": jq.Policy(weight=weight, output=jq.int8(quantizer=jq.lsq))})


def network(*, pow2: bool = False, up: bool = False) -> tuple[jq.Graph, dict]:
    """Every place of a batch norm: before relu, before an add, alone, behind a transposed conv and a linear."""
    build = graphs.Builder(21)
    build.shapes["x"] = (3, 8, 8)
    x = build.add(ops.Relu(), (build.batch_norm(build.conv("x", 6, 3, bias=False)),), (6, 8, 8))
    y = build.batch_norm(build.conv(x, 6, 3, groups=6))
    x = build.add(ops.Relu(), (build.add(ops.Add(), (y, x), (6, 8, 8)),), (6, 8, 8))
    x = build.batch_norm(x)
    channels = 6
    if up:
        op = ops.ConvTranspose(strides=(2, 2), padding=((1, 1),) * 2, output_padding=(0, 0), dilation=(1, 1))
        x = build.add(op, (x,), (4, 16, 16), weight=build.array("up.weight", 6, 4, 4, 4))
        x, channels = build.add(ops.Relu(), (build.batch_norm(x),), (4, 16, 16)), 4
    x = build.add(ops.Mean(axes=(2, 3)), (x,), (channels,))
    x = build.add(ops.Linear(), (x,), (7,), weight=build.array("a.weight", 7, channels), bias=build.array("a.bias", 7))
    x = build.add(ops.Relu(), (build.batch_norm(x),), (7,))
    x = build.add(ops.Linear(), (x,), (5,), weight=build.array("head.weight", 5, 7), bias=build.array("head.bias", 5))
    graph, params = build.graph(x, size=8), build.params
    gammas = [k for k in params if k.endswith("batchnorm.weight")]
    for key in gammas:
        size = 2.0 ** np.round(np.log2(np.abs(params[key]))) if pow2 else np.abs(params[key])
        params[key] = jnp.asarray(np.where(np.arange(len(size)) % 3 == 1, -size, size), jnp.float32)
        if pow2:  # then the multiplier of the batch norm is the power of two itself
            params[key.replace("weight", "running_var")] = jnp.ones(len(size))
    return (with_norms(graph, epsilon=0.0) if pow2 else graph), params


def with_norms(graph: jq.Graph, **options: float) -> jq.Graph:
    """The graph with other options of its batch norms."""
    nodes = (replace(n, op=replace(n.op, **options)) if isinstance(n.op, ops.BatchNorm) else n for n in graph.nodes)
    return replace(graph, nodes=tuple(nodes))


def prepared(mode: str | dict, qconfig: jq.QConfig | None = None, **options: bool) -> tuple:
    graph, params = network(**options)
    model = jq.prepare(graph, params, qconfig or config(), target=NASH, batch_norm=mode)
    x = graphs.images(1, graph, batch=6)
    return jq.calibrate(model, [x]), x


@pytest.fixture(scope="module", params=MODES)
def kept(request: pytest.FixtureRequest) -> tuple:
    return prepared(request.param)


def assert_same(a: object, b: object) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


# ---------------------------------------------------------------------------------------------------------------------
# One integer form


@pytest.mark.parametrize("mode", MODES)
def test_a_search_finds_the_scales_of_fold(mode: str) -> None:
    """Where scaling is exact, the best scale before the batch norm is the best one behind it."""
    few = config(dtype="int4")
    model, _ = prepared(mode, few, pow2=True)
    wanted, _ = prepared("fold", few, pow2=True)
    observed = {key: wanted.qparams[key] if key in model.plan.values else v for key, v in model.qparams.items()}
    found = jq.ptq.search_weight_scales(model.replace(qparams=observed))
    best = jq.ptq.search_weight_scales(wanted)
    assert any((found.qparams[key] != observed[key]).any() for key in model.plan.weights)
    program, wanted_program = jq.lower(found), jq.lower(best)
    layers = [node for node in model.plan.graph.nodes if "weight" in node.params]
    for node in layers:
        if node.op.batch_norm is None or not node.op.batch_norm.alone:  # one alone has a weight of its own making
            assert_same(program.constants[node.name]["weight"], wanted_program.constants[node.name]["weight"])
    assert len(layers) == 5


@pytest.mark.parametrize("mode", MODES)
def test_folding_gives_the_plan_of_fold(mode: str) -> None:
    model, _ = prepared(mode, up=True)
    wanted, _ = prepared("fold", up=True)
    assert len(kept_nodes(model.plan)) == 5
    assert [n.name for n in model.plan.graph.nodes] == [n.name for n in wanted.plan.graph.nodes]
    assert model.plan.values == wanted.plan.values
    folded = jq.training.fold_batch_norm(model)
    assert folded.plan.graph == wanted.plan.graph
    assert (folded.plan.weights, folded.plan.weight_axis, folded.plan.trained) == (
        wanted.plan.weights,
        wanted.plan.weight_axis,
        wanted.plan.trained,
    )
    assert folded.params.keys() == wanted.params.keys()
    assert folded.qparams.keys() == set(folded.plan.trained)
    for key, value in folded.params.items():  # the largest weight of a channel lies on a tie, and may have moved off it
        step = np.abs(value).max() / 127 if key in folded.plan.weights else 0.0
        np.testing.assert_allclose(value, wanted.params[key], rtol=1e-6, atol=1e-6 + 0.51 * step, err_msg=key)


def test_reverse_fold_has_the_program_of_fold() -> None:
    model, _ = prepared("reverse_fold")
    wanted, _ = prepared("fold")
    for key in wanted.plan.weights:
        np.testing.assert_array_equal(model.qparams[key], wanted.qparams[key])
    assert_same(jq.lower(model), jq.lower(wanted.replace(qparams=model.qparams)))


@pytest.mark.parametrize("mode", ["live", "frozen"])
def test_where_scaling_is_exact_the_program_is_that_of_fold(mode: str) -> None:
    """The multipliers are powers of two, so that a scale observed before or behind them is the same number."""
    model, _ = prepared(mode, pow2=True)
    program, wanted = jq.lower(model), jq.lower(prepared("fold", pow2=True)[0])
    alone = [n.name for n in kept_nodes(model.plan) if n.op.batch_norm.alone]
    assert len(alone) == 1  # its ones are 127 LSB, where min-max would give them 127.5
    for name, constants in wanted.constants.items():
        if name not in alone:
            assert_same(program.constants[name], constants)
    np.testing.assert_array_equal(np.abs(program.constants[alone[0]]["weight"]), 127)


@pytest.mark.parametrize("mode", ["live", "frozen"])
@pytest.mark.parametrize("axis", ["out", None])
def test_the_weight_integers_are_those_that_training_quantizes(mode: str, axis: str | None) -> None:
    model, _ = prepared(mode, config(axis=axis))
    generator = np.random.default_rng(5)
    qparams = {
        k: v * generator.uniform(0.3, 1, v.shape).astype(np.float32) for k, v in model.qparams.items()
    }  # saturates
    program = jq.lower(model.replace(qparams=qparams))
    for node in kept_nodes(model.plan):
        key, axis_of = node.params["weight"], node.op.weight_axis
        weight = np.asarray(model.params[key])
        shape = [-1 if i == axis_of else 1 for i in range(weight.ndim)]
        scale = np.float32(1) / 127 if node.op.batch_norm.alone else np.asarray(qparams[key])
        sign = (
            np.where(np.asarray(model.params[node.params["norm_weight"]]) < 0, -1, 1).astype(np.float32).reshape(shape)
        )
        wanted = np.clip(np.rint(weight * sign / (scale.reshape(shape) if scale.ndim else scale)), -128, 127)
        found = np.asarray(program.constants[node.name]["weight"])  # [*K, I, O]
        wanted = np.moveaxis(wanted, (axis_of, 1 - axis_of), (-1, -2))
        np.testing.assert_array_equal(found.reshape(wanted.shape), wanted, err_msg=node.name)


def test_what_is_trained_is_what_ships(kept: tuple) -> None:
    """The value of bit-true training is the program's, and validation that of the folded plan; gradients are live."""
    model, x = kept
    trained, batch_stats = jq.training.split_batch_stats(model)
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(len(x), 5)), jnp.float32)

    def gradient(mode: str) -> tuple[jq.Model, jax.Array]:
        def loss(t: jq.Model) -> tuple[jax.Array, jax.Array]:
            y, _ = jq.apply_train(t, x, batch_stats=batch_stats, mode=mode)
            return jnp.sum(weights * y), y

        return jax.jit(jax.grad(loss, has_aux=True))(trained)

    program, folded = jq.lower(model), jq.training.fold_batch_norm(model)
    found, y = gradient("bit_true")
    np.testing.assert_array_equal(y, jq.run(program, x))
    np.testing.assert_array_equal(jq.apply(model, x), jq.apply(folded, x))
    assert_same(jq.lower(folded), program)

    assert found.params.keys() == trained.params.keys()
    assert found.qparams.keys() == set(model.plan.trained)
    live = [n.params for n in kept_nodes(model.plan) if n.op.batch_norm.statistics == "batch"]
    dead = {roles["bias"] for roles in live if "bias" in roles}  # the mean of the batch takes it out again
    dead |= {"n7.batchnorm.bias"} if live else set()  # that of the next layer, behind a mean
    expected = gradient("fake_quant")[0]
    # Another jit has other roundings. What cancels behind a batch norm is a sum of terms as large as any gradient.
    bound = 1e-4 * max(np.abs(like).max() for like in jax.tree.leaves(expected))
    for (path, g), like in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        name = path[-1].key
        assert np.isfinite(g).all(), name
        assert np.any(np.abs(g) > 1e-6) or name in dead, f"dead gradient: {name}"
        np.testing.assert_allclose(g, like, rtol=1e-4, atol=bound, err_msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# What training computes


def moments(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    y = y.reshape(-1, y.shape[-1])
    return y.mean(0), y.var(0)


def single(mode: str, quantizer: jq.quantizers.Quantizer = jq.fake_quant) -> tuple:
    """One 1x1 convolution with bias and batch norm: small enough for numpy in float64."""
    build = graphs.Builder(4)
    build.shapes["x"] = (3, 4, 4)
    graph = build.graph(build.batch_norm(build.conv("x", 5, 1)), size=4)
    build.params["n1.batchnorm.weight"] = build.params["n1.batchnorm.weight"].at[2].set(-0.7)
    policy = jq.Policy(weight=jq.int4(axis="out", quantizer=quantizer), output=None)
    rules = {"*": policy, "x": jq.Policy(output=jq.int16())}
    model = jq.prepare(graph, build.params, jq.QConfig(rules), target=NASH, batch_norm=mode)
    x = graphs.images(1, graph, batch=6)
    model = jq.calibrate(model, [x])
    qparams = {**model.qparams, "n0.conv.weight": model.qparams["n0.conv.weight"] * 0.83}  # some weights saturate
    return model.replace(qparams=qparams), x


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("mode", ["live", "reverse_fold"])
def test_live_batch_norm_against_float64(mode: str, quantized: bool) -> None:
    model, x = single(mode)
    p = {k.split(".")[-1] if "batchnorm" in k else k: np.asarray(v, np.float64) for k, v in model.params.items()}
    images, weight = np.moveaxis(np.asarray(x, np.float64), 1, -1), p["n0.conv.weight"][:, :, 0, 0]
    undo = np.ones(5)
    if quantized:
        images = np.rint(images / float(model.qparams["x"])) * float(model.qparams["x"])
        scale = np.asarray(model.qparams["n0.conv.weight"], np.float64)[:, None]
        undo = p["weight"] / np.sqrt(p["running_var"] + 1e-5) if mode == "reverse_fold" else np.sign(p["weight"])
        weight = np.clip(np.rint(weight * undo[:, None] / scale), -8, 7) * scale
    y = images @ weight.T / undo + p["n0.conv.bias"]
    mean, variance = moments(y)
    wanted = (y - mean) / np.sqrt(variance + 1e-5) * p["weight"] + p["bias"]
    call = jax.jit(lambda x: jq.apply_train(model, x, mode="fake_quant" if quantized else "float"))
    found, stats = call(x)
    count = y.size // 5
    np.testing.assert_allclose(np.moveaxis(found, 1, -1), wanted, rtol=1e-4, atol=1e-4)  # some 20 roundings of 2^-24
    assert stats.keys() == set(untrained(model.plan))
    for role, batch in (("running_mean", mean), ("running_var", variance * count / (count - 1))):
        np.testing.assert_allclose(stats[f"n1.batchnorm.{role}"], 0.9 * p[role] + 0.1 * batch, rtol=1e-5, atol=1e-5)


def test_without_live_statistics_training_is_validation() -> None:
    model, x = prepared("frozen")
    y, stats = jq.apply_train(model, x)
    np.testing.assert_array_equal(y, jq.apply(model, x))
    assert_same(stats, jq.training.split_batch_stats(model)[1])


@pytest.mark.parametrize("mode", ["live", "reverse_fold"])
def test_statistics_can_be_frozen_and_freed(mode: str) -> None:
    model, x = prepared(mode)
    frozen = jq.training.set_batch_statistics(model, "running", ["n0.*", "type:Linear"])
    assert jq.training.set_batch_statistics(frozen, "batch").plan == model.plan
    _, stats = jq.apply_train(frozen.replace(params=model.params, qparams=model.qparams), x)
    moving = {n.params[r] for n in kept_nodes(frozen.plan) for r in STATISTICS if n.op.batch_norm.statistics == "batch"}
    assert len(moving) == 2 * 2
    assert {key for key, value in stats.items() if not np.array_equal(value, model.params[key])} == moving
    whole = jq.training.set_batch_statistics(model, "running")
    np.testing.assert_array_equal(jq.apply_train(whole, x)[0], jq.apply(model, x))
    assert_same(jq.lower(whole), jq.lower(model))


def test_a_norm_that_is_used_twice_moves_twice() -> None:
    build = graphs.Builder(4)
    build.shapes["x"] = (3, 4, 4)
    conv = build.conv("x", 3, 3)
    norm = build.batch_norm(conv)
    first = {n.name: n for n in build.nodes}
    for name, source in (("again.conv", norm), ("again.norm", "again.conv")):
        old = first[conv if name.endswith("conv") else norm]
        build.nodes.append(replace(old, name=name, inputs=(source,)))
    build.shapes |= {"again.conv": (3, 4, 4), "again.norm": (3, 4, 4)}
    graph = build.graph("again.norm", size=4)
    x = graphs.images(1, graph, batch=4)
    model = jq.prepare(graph, build.params, config(), target=NASH, batch_norm="live")
    model = jq.calibrate(model, [x])
    np.testing.assert_array_equal(jq.apply(model, x, mode="bit_true"), jq.run(jq.lower(model), x))
    once = jq.apply_train(jq.training.set_batch_statistics(model, "running", ["again.conv"]), x)[1]
    twice = jq.apply_train(model, x)[1]
    assert not np.array_equal(once["n1.batchnorm.running_var"], twice["n1.batchnorm.running_var"])
    assert len(jq.training.fold_batch_norm(model).plan.weights) == 1  # one layer, called twice


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


def test_a_pruned_channel_divides_by_nothing() -> None:
    model, x = single("reverse_fold", jq.lsq)
    pruned = {"n1.batchnorm.weight": model.params["n1.batchnorm.weight"].at[1].set(0.0)}
    model = jq.calibrate(model.replace(params={**model.params, **pruned}), [x])
    trained, stats = jq.training.split_batch_stats(model)

    def loss(t: jq.Model) -> jax.Array:
        return jnp.sum(jq.apply_train(t, x, batch_stats=stats)[0] ** 2)

    value, gradient = jax.jit(jax.value_and_grad(loss))(trained)
    assert all(np.isfinite(v).all() for v in jax.tree.leaves((value, gradient)))
    jq.training.fold_batch_norm(model)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def patterns(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 1, 8, 8] of ten patterns, moved by up to a pixel, in noise; and which pattern it is."""
    known, generator = np.random.default_rng(0).normal(size=(10, 8, 8)), np.random.default_rng(seed)
    labels = generator.integers(0, 10, count)
    moved = [np.roll(known[k], generator.integers(-1, 2, 2), (0, 1)) for k in labels]
    images = np.stack(moved)[:, None] + 0.5 * generator.normal(size=(count, 1, 8, 8))
    return images.astype(np.float32), labels.astype(np.int32)


def small_net() -> tuple[jq.Graph, dict]:
    build = graphs.Builder(7)
    build.shapes["x"] = (1, 8, 8)
    x = build.add(ops.Relu(), (build.batch_norm(build.conv("x", 8, 3, bias=False)),), (8, 8, 8))
    x = build.add(ops.Relu(), (build.batch_norm(build.conv(x, 16, 3, 2, bias=False)),), (16, 4, 4))
    x = build.add(ops.Flatten(), (x,), (256,))
    weight = {"weight": build.array("head.weight", 10, 256), "bias": build.array("head.bias", 10)}
    x = build.add(ops.Linear(), (x,), (10,), **weight)
    generator = np.random.default_rng(0)
    params = {
        k: jnp.ones_like(v) if k.split(".")[-1] in ("weight", "running_var") else v * 0 for k, v in build.params.items()
    }
    for key, value in build.params.items():
        if value.ndim > 1:
            fan = np.prod(value.shape[1:])
            params[key] = jnp.asarray(generator.normal(size=value.shape) * np.sqrt(2 / fan), jnp.float32)
    return build.graph(x, size=8), params


@pytest.mark.parametrize("mode", ["fold", *MODES])
def test_every_mode_trains_a_net(mode: str) -> None:
    """From random weights, 4-bit with LSQ, in the mode itself; the accuracy is that of the integer program."""
    (train_x, train_y), (test_x, test_y) = patterns(1500, seed=1), patterns(500, seed=2)
    graph, params = small_net()
    policy = jq.Policy(weight=jq.int4(axis="out", quantizer=jq.lsq), output=jq.int8(quantizer=jq.lsq))
    model = jq.prepare(graph, params, jq.QConfig({"*": policy}), target=NASH, batch_norm=mode)
    model = jq.calibrate(model, [train_x[:256]])
    rates = {"weight": optax.adam(4e-3), "batch_norm": optax.adam(4e-3), "scale": optax.adam(3e-4)}
    state = jq.TrainState.create(model, tx=optax.multi_transform(rates, jq.labels(model)))

    @jax.jit
    def step(state: jq.TrainState, x: jax.Array, y: jax.Array) -> jq.TrainState:
        def loss(t: jq.Model) -> tuple[jax.Array, dict]:
            logits, stats = jq.apply_train(t, x, batch_stats=state.batch_stats)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), stats

        gradients, stats = jax.grad(loss, has_aux=True)(state.trainable)
        return state.update(gradients, stats)

    generator = np.random.default_rng(1)
    for _ in range(6):
        order = generator.permutation(len(train_x))
        for i in range(0, len(order) - 63, 64):
            state = step(state, train_x[order[i : i + 64]], train_y[order[i : i + 64]])
    program = jq.lower(state.model)
    accuracy = (np.asarray(jq.run(program, test_x)).argmax(-1) == test_y).mean()
    assert accuracy > 0.93, accuracy
    assert mode in ("fold", "frozen") or not np.array_equal(
        state.batch_stats["n1.batchnorm.running_mean"], model.params["n1.batchnorm.running_mean"]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Labels, states, errors


def test_a_switched_off_channel_lowers(kept: tuple) -> None:
    """Its folded weights are almost 0, and would leave its accumulator too small a step for its bias and addend."""
    model, x = kept
    (node,) = [n for n in kept_nodes(model.plan) if n.op.addend]
    weight = node.params["norm_weight"]
    params = model.params | {weight: model.params[weight].at[0].set(1e-9)}
    model = jq.calibrate(model.replace(params=params), [x])
    program = jq.lower(model.replace(params=params))
    np.testing.assert_array_equal(jq.apply(model.replace(params=params), x, mode="bit_true"), jq.run(program, x))


def test_labels_know_batch_norm(kept: tuple) -> None:
    model, _ = kept
    found = jq.labels(model, freeze={"batch_norm": ["n1.*"], "scale": ["n*", "x"], "weight": ["head.*"]})
    state = jq.TrainState.create(model, tx=optax.sgd(0.1))
    assert found.params.keys() == state.trainable.params.keys() == model.params.keys() - set(untrained(model.plan))
    assert found.params["n1.batchnorm.weight"] == found.params["head.weight"] == found.qparams["x"] == "frozen"
    assert found.params["n4.batchnorm.weight"] == "batch_norm"
    assert found.params["n0.conv.weight"] == "weight"
    assert found.qparams["head.weight"] == "scale"
    assert state.model.params.keys() == model.params.keys()
    with pytest.raises(jq.QConfigError, match=r"freeze kind 'batchnorm'; known: .*did you mean 'batch_norm'"):
        jq.labels(model, freeze={"batchnorm": ["*"]})
    with pytest.raises(jq.QConfigError, match=r"freeze pattern 'n0.conv.weight' matches no batch_norm"):
        jq.labels(model, freeze={"batch_norm": ["n0.conv.weight"]})


def test_a_mapping_chooses_by_name() -> None:
    model, _ = prepared({"*": "live", "n4.*": "fold", "re:n1[0-9]\\..*": "frozen"})
    modes = [n.op.batch_norm.statistics for n in kept_nodes(model.plan)]
    assert sorted(modes) == ["batch", "batch", "running"]


@pytest.mark.parametrize(
    ("mode", "qconfig", "message"),
    [
        ("alive", config(), "batch_norm 'alive'; known: fold, live, frozen, reverse_fold; did you mean 'live'"),
        ({"n1.batchnrom": "live"}, config(), "matches no batch norm; did you mean 'n1.batchnorm'"),
        ("live", config(scale_form="pow2"), "its weight scale would be no power of two; use 'reverse_fold' or 'fold'"),
        ("frozen", config(scale=0.1), "its weight would not have the fixed scale; use 'reverse_fold'"),
    ],
)
def test_what_cannot_be_kept_is_refused(mode: str | dict, qconfig: jq.QConfig, message: str) -> None:
    with pytest.raises(jq.QConfigError, match=re.escape(message)):
        prepared(mode, qconfig)


def test_other_wrong_calls_are_refused(kept: tuple) -> None:
    model, x = kept
    with pytest.raises(jq.JQuantError, match=r"works on folded weights, and node 'n0.conv' keeps its batch norm"):
        jq.ptq.equalize(model)
    with pytest.raises(jq.QConfigError, match="statistics must be 'batch' or 'running', not 'live'"):
        jq.training.set_batch_statistics(model, "live")
    with pytest.raises(jq.QConfigError, match="'head' matches no node that keeps a batch norm"):
        jq.training.set_batch_statistics(model, "batch", ["head"])
    with pytest.raises(jq.GraphError, match=r"parameter 'n1.batchnorm.running_mean' \(norm_mean\) is missing"):
        jq.apply_train(jq.training.split_batch_stats(model)[0], x)
    if kept_nodes(model.plan)[0].op.batch_norm.statistics == "batch":
        with pytest.raises(jq.GraphError, match=r"node 'n[0-9]\..*linear'.*the statistics of one value"):
            jq.apply_train(model, x[:1])


def test_a_momentum_of_zero_is_refused() -> None:
    graph, params = network()
    graph = with_norms(graph, momentum=0.0)
    with pytest.raises(
        jq.QConfigError, match=r"has the momentum 0\.0 .* running statistics would not follow the batches"
    ):
        jq.prepare(graph, params, config(), target=NASH, batch_norm="live")
    jq.prepare(graph, params, config(), target=NASH, batch_norm="frozen")
