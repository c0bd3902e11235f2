"""Fine-tuning: all weights, biases and scales learn together against the float model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support import graphs
from support.compilations import counted

import jquant as jq
from jquant import ops, ptq

NASH = jq.targets.NASH_E


def small(weight=jq.int4, value=jq.int8):
    """conv, relu, conv, relu, mean, linear; with scales."""
    build = graphs.Builder(3)
    build.shapes["x"] = (3, 8, 8)
    x = "x"
    for channels in (8, 8):
        x = build.conv(x, channels, 3)
        x = build.add(ops.Relu(), (x,), build.shapes[x])
    x = build.add(ops.Mean(axes=(2, 3)), (x,), (8,))
    x = build.add(ops.Linear(), (x,), (5,), weight=build.array("head.weight", 5, 8), bias=build.array("head.bias", 5))
    graph = build.graph(x, size=8)
    for i, (key, shape) in enumerate((k, v.shape) for k, v in build.params.items()):
        size = np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.1  # values keep their size from layer to layer
        build.params[key] = jnp.asarray(np.random.default_rng(i).normal(size=shape) * size, jnp.float32)
    policy = jq.Policy(weight=weight(axis="out"), output=value())
    model = jq.prepare(graph, build.params, jq.QConfig({"*": policy}), target=NASH)
    data = [np.asarray(graphs.images(i, graph, batch=16)) for i in range(6)]
    return ptq.search_weight_scales(jq.calibrate(model, data[:2])), data


def noise(model, reference, batches):
    wanted, made = (
        np.concatenate([np.asarray(jq.apply(m, x, mode=mode), np.float64) for x in batches])
        for m, mode in ((reference, "float"), (model, "fake_quant"))
    )
    return np.sum((made - wanted) ** 2) / np.sum(wanted**2)


def test_the_noise_falls_on_data_that_it_has_not_seen():
    model, data = small()
    start = ptq.correct_bias(model, data[:2])
    tuned = ptq.finetune(start, data[:2], reference=model, steps=150, learning_rate=2e-3)
    before, corrected, after = (noise(each, model, data[2:]) for each in (model, start, tuned))
    assert after < 0.8 * corrected < 0.8 * before / 3  # measured: 0.64, and a fifth
    program = jq.lower(tuned)
    integers = np.concatenate([np.asarray(jq.run(program, x)) for x in data[2:]])
    wanted = np.concatenate([np.asarray(jq.apply(model, x, mode="float"), np.float64) for x in data[2:]])
    assert np.sum((integers - wanted) ** 2) / np.sum(wanted**2) < 0.8 * corrected


def test_the_goal_is_the_reference():
    """A bias that a reference does not have is taken out again."""
    model, data = small(weight=jq.int8)
    off = model.replace(params={**model.params, "head.bias": model.params["head.bias"] + 0.5})
    tuned = ptq.finetune(off, data[:2], reference=model, steps=200, learning_rate=1e-2)
    assert noise(off, model, data[2:]) > 50 * noise(tuned, model, data[2:])
    # Its own float values are the goal of a model alone: the offset stays.
    alone = ptq.finetune(off, data[:2], steps=200, learning_rate=1e-2)
    assert noise(alone, off, data[2:]) < 50 * noise(alone, model, data[2:])


def test_the_first_step_goes_against_the_gradient_that_torch_finds():
    """Adam's first step is the rate times the sign of the gradient. Values are float: torch has the same loss."""
    rng = np.random.default_rng(0)
    shapes = {"a.weight": (4, 6), "a.bias": (4,), "b.weight": (3, 4), "b.bias": (3,)}
    params = {key: jnp.asarray(rng.normal(size=shape), jnp.float32) for key, shape in shapes.items()}
    nodes = [
        jq.Node(layer, ops.Linear(), (source,), {"weight": f"{layer}.weight", "bias": f"{layer}.bias"})
        for layer, source in (("a", "x"), ("b", "a"))
    ]
    graph = jq.Graph((jq.Input("x", (None, 6)),), tuple(nodes), ("b",))
    rules = {"*": jq.Policy(weight=jq.int8(axis="out"), output=None), "a": None}
    x = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)
    model = jq.calibrate(jq.prepare(graph, params, jq.QConfig(rules), target=NASH), [x])
    other = {k: v + 0.1 * jnp.cos(jnp.arange(v.size, dtype=v.dtype).reshape(v.shape)) for k, v in model.params.items()}
    goal = model.replace(params=other)
    moved = ptq.finetune(model, [x], reference=goal, steps=1, learning_rate=1e-3, scale_rate=0.0, layers=2)

    def forward(params):
        return (torch.tensor(x) @ params["a.weight"].T + params["a.bias"]) @ params["b.weight"].T + params["b.bias"]

    theirs = {k: torch.tensor(np.asarray(v), requires_grad=True) for k, v in model.params.items()}
    wanted = forward({k: torch.tensor(np.asarray(v)) for k, v in goal.params.items()})
    (torch.sum((forward(theirs) - wanted) ** 2) / torch.sum(wanted**2)).backward()
    for key, leaf in theirs.items():
        gradient = leaf.grad.numpy()
        clear = np.abs(gradient) > 0.1 * np.abs(gradient).max()  # rounding of weights turns no sign of these
        if key == "b.weight":  # the largest of a row is beyond the grid, where a weight has no gradient
            rows = np.abs(np.asarray(model.params[key]))
            clear &= rows < rows.max(axis=1, keepdims=True)
        step = np.asarray(moved.params[key]) - np.asarray(model.params[key])
        np.testing.assert_allclose(step[clear], -1e-3 * np.sign(gradient[clear]), rtol=1e-3)
    for name, value in model.qparams.items():
        np.testing.assert_array_equal(moved.qparams[name], value)


def test_rates_of_zero_change_nothing_and_the_model_stays_readable():
    model, data = small()
    same = ptq.finetune(model, data[:1], steps=2, learning_rate=0.0, scale_rate=0.0)
    for name, value in {**model.params, **model.qparams}.items():
        np.testing.assert_array_equal({**same.params, **same.qparams}[name], value)
    jax.block_until_ready(jax.tree.leaves(model))  # its memory was not given away


def test_steps_compile_once():
    model, data = small()
    ptq.finetune(model, data[:2], steps=2)
    with counted() as durations:
        ptq.finetune(model, data[:2], steps=2)
    assert not durations


def test_batches_may_be_drawn_as_they_are_needed():
    model, data = small()
    drawn = []

    def batches():
        for x in data:
            drawn.append(len(drawn))
            yield x

    ptq.finetune(model, batches(), steps=3)
    assert drawn == [0, 1, 2]
    with pytest.raises(jq.CalibrationError, match="used up"):
        ptq.finetune(model, batches(), steps=7)


def test_refuses():
    model, data = small()
    for setting, value in {"steps": 0, "learning_rate": float("nan"), "scale_rate": -1.0, "layers": 0}.items():
        with pytest.raises(jq.QConfigError, match=f"{setting} must be"):
            ptq.finetune(model, data, **{setting: value})
    with pytest.raises(jq.CalibrationError, match="no scale for"):
        ptq.finetune(model.replace(qparams={}), data)
    with pytest.raises(jq.InputError, match="batch 0"):
        ptq.finetune(model, [data[0][:, :2]])
    with pytest.raises(jq.GraphError):
        ptq.finetune(model, data, reference=model.replace(params={}))
