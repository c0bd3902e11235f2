"""Composites: their float meaning against torch, the chain against the float meaning, and the formats inside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant import ops

torch = pytest.importorskip("torch")
F = torch.nn.functional


def array(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


W, B = array(6, seed=1), array(6, seed=2)


def _t(v: np.ndarray) -> "torch.Tensor":
    return torch.from_numpy(v)


def _recurrent(kind: str, op: jq.ops.Op, arrays: list[np.ndarray], params: dict) -> np.ndarray:
    """torch's layer on the same weights; time reversed by hand, as torch has no lone reverse direction."""
    x, *states = arrays
    size = params["weight_hh"].shape[1]
    layer = getattr(torch.nn, kind)(x.shape[2], size, batch_first=True, bias="bias_ih" in params)
    with torch.no_grad():
        for role, value in params.items():
            getattr(layer, f"{role}_l0").copy_(_t(value))
        given = _t(np.ascontiguousarray(x[:, ::-1] if op.reverse else x))
        state = tuple(_t(s)[None] for s in states)
        sequence, last = layer(given, state if kind == "LSTM" else state[0]) if states else layer(given)
    hidden, cell = last if kind == "LSTM" else (last, last)
    found = {"sequence": sequence.flip(1) if op.reverse else sequence, "hidden": hidden[0], "cell": cell[0]}
    return found[op.output].numpy()


def _weights(gates: int) -> dict[str, np.ndarray]:
    shapes = {
        "weight_ih": (gates * 3, 4),
        "weight_hh": (gates * 3, 3),
        "bias_ih": (gates * 3,),
        "bias_hh": (gates * 3,),
    }
    return {role: 0.5 * array(*shape, seed=i) for i, (role, shape) in enumerate(shapes.items())}


# (operator, operands, params, torch)
CASES = {
    "softmax": (ops.Softmax(axis=1), [array(4, 7, 3)], {}, lambda x: F.softmax(x, 1)),
    "log_softmax": (ops.LogSoftmax(axis=-1), [array(4, 7)], {}, lambda x: F.log_softmax(x, -1)),
    "div": (ops.Div(), [array(4, 7), 2 + np.abs(array(4, 1))], {}, torch.div),
    "var": (ops.Variance(axes=(2,)), [array(4, 7, 9)], {}, lambda x: x.var(2)),
    "var, biased": (
        ops.Variance(axes=(1, 2), keepdims=True, correction=0),
        [array(4, 7, 9)],
        {},
        lambda x: x.var((1, 2), correction=0, keepdim=True),
    ),
    "norm 1": (ops.Norm(axes=(1,), order="1"), [array(4, 9)], {}, lambda x: x.norm(1, 1)),
    "norm 2": (ops.Norm(axes=(1,)), [array(4, 9)], {}, lambda x: x.norm(2, 1)),
    "norm max": (ops.Norm(axes=(1,), order="max"), [array(4, 9)], {}, lambda x: x.norm(float("inf"), 1)),
    "layer_norm": (
        ops.LayerNorm(),
        [array(4, 5, 6)],
        {"weight": W, "bias": B},
        lambda x: F.layer_norm(x, (6,), _t(W), _t(B)),
    ),
    "layer_norm 2": (ops.LayerNorm(rank=2), [array(4, 5, 6)], {}, lambda x: F.layer_norm(x, (5, 6))),
    "rms_norm": (ops.RmsNorm(), [array(4, 5, 6)], {"weight": W}, lambda x: F.rms_norm(x, (6,), _t(W), 1e-6)),
    "group_norm": (
        ops.GroupNorm(groups=3),
        [array(4, 6, 5, 3)],
        {"weight": W, "bias": B},
        lambda x: F.group_norm(x, 3, _t(W), _t(B)),
    ),
    "instance_norm": (ops.InstanceNorm(), [array(4, 6, 5, 3)], {}, F.instance_norm),
    "attention": (
        ops.Attention(),
        [array(2, 3, 5, 4, seed=i) for i in range(3)],
        {},
        F.scaled_dot_product_attention,
    ),
    "attention, causal": (
        ops.Attention(causal=True, scale=0.7),
        [array(2, 5, 4, seed=i) for i in range(3)],
        {},
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7),
    ),
    "attention, mask": (
        ops.Attention(mask="bool"),
        [*(array(2, 5, 4, seed=i) for i in range(3)), np.tril(np.ones((2, 5, 5), bool), 1)],
        {},
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
    ),
    "attention, bias": (
        ops.Attention(mask="add"),
        [*(array(2, 5, 4, seed=i) for i in range(3)), array(2, 5, 5, seed=9)],
        {},
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
    ),
}
for _op in (ops.Lstm(), ops.Lstm(reverse=True), ops.Lstm(output="hidden"), ops.Lstm(output="cell")):
    CASES[f"lstm {_op.output} {_op.reverse}"] = (_op, [array(2, 3, 4)], _weights(4), None)
CASES["lstm, state"] = (ops.Lstm(), [array(2, 3, 4), array(2, 3), array(2, 3, seed=1)], _weights(4), None)
for _op in (ops.Gru(), ops.Gru(reverse=True, output="hidden")):
    CASES[f"gru {_op.output} {_op.reverse}"] = (_op, [array(2, 3, 4)], _weights(3), None)
CASES["gru, state"] = (ops.Gru(), [array(2, 3, 4), array(2, 3)], _weights(3), None)


def expected(name: str) -> np.ndarray:
    op, arrays, params, function = CASES[name]
    if function is None:
        return _recurrent(type(op).__name__.upper(), op, arrays, params)
    return function(*map(_t, arrays)).numpy()


@pytest.mark.parametrize("name", CASES)
def test_the_float_meaning_is_torch(name: str) -> None:
    op, arrays, params, _ = CASES[name]
    y = jq.ops.eval_float(op, *map(jnp.asarray, arrays), **{k: jnp.asarray(v) for k, v in params.items()})
    np.testing.assert_allclose(y, expected(name), rtol=2e-5, atol=2e-5)


def graph_of(name: str) -> tuple[jq.Graph, dict[str, jax.Array], tuple[jax.Array, ...]]:
    op, arrays, params, _ = CASES[name]
    names = [f"x{i}" for i in range(len(arrays))]
    inputs = tuple(jq.Input(n, (None, *a.shape[1:]), str(a.dtype)) for n, a in zip(names, arrays, strict=True))
    node = jq.Node("y", op, tuple(names), jq.FrozenMap({role: f"y.{role}" for role in params}))
    values = {f"y.{role}": jnp.asarray(value) for role, value in params.items()}
    return jq.Graph(inputs, (node,), ("y",)), values, tuple(map(jnp.asarray, arrays))


INT16 = jq.QConfig({"*": jq.Policy(output=jq.int16(), weight=jq.int8(axis="out"))})
INT8 = jq.QConfig({"*": jq.Policy(output=jq.int8(), weight=jq.int8(axis="out"))})


@pytest.mark.parametrize("name", CASES)
def test_the_chain_means_the_same_in_float(name: str) -> None:
    graph, params, arrays = graph_of(name)
    model = jq.prepare(graph, params, INT16, target=jq.targets.NASH_E)
    assert type(CASES[name][0]).__name__ not in {type(n.op).__name__ for n in model.plan.graph.nodes}
    y = jq.apply(model, *arrays, mode="float")
    np.testing.assert_allclose(y, expected(name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_integers_follow_the_float_meaning(name: str) -> None:
    """Within 0.6 % of the range with int16 operands: an int8 weight, or the pole of a table, is the coarsest thing."""
    graph, params, arrays = graph_of(name)
    model = jq.prepare(graph, params, INT16, target=jq.targets.NASH_E, high_precision_outputs=False)
    model = jq.calibrate(model, [arrays])
    y, wanted = np.asarray(jq.run(jq.lower(model), *arrays)), expected(name)
    coarse = 0.02 if model.plan.weights or "attention" in name else 0.006
    assert np.abs(y - wanted).max() <= coarse * np.abs(wanted).max()


def test_inner_values_are_int16_and_the_output_as_asked() -> None:
    graph, params, _ = graph_of("softmax")
    model = jq.prepare(graph, params, INT8, target=jq.targets.NASH_E)
    dtypes = {name: model.plan.spec(name).dtype for name in model.plan.graph.values}
    assert dtypes == {
        "x0": "int8",
        "y.max": "int8",  # keeps its operand's
        "y.shift": "int16",
        "y.exp": "int16",
        "y.sum": "int16",
        "y.reciprocal": "int16",
        "y": "int8",
    }
    assert "y.exp" in jq.explain(model)


def test_an_inner_name_that_is_taken_gets_another() -> None:
    nodes = (jq.Node("y.exp", ops.Exp(), ("x",)), jq.Node("y", ops.Softmax(), ("y.exp",)))
    graph = jq.Graph((jq.Input("x", (None, 7)),), nodes, ("y",))
    model = jq.prepare(graph, {}, INT16, target=jq.targets.NASH_E)
    assert {"y.exp", "y.2.exp"} < set(model.plan.graph.values)
    x = jnp.asarray(array(4, 7))
    y = jq.run(jq.lower(jq.calibrate(model, [x])), x)
    np.testing.assert_allclose(y, jq.graph.evaluate_float(graph, {}, x)[0], atol=5e-3)


def test_a_rule_that_names_a_composite_is_about_its_output() -> None:
    """Under strict: what an inner value that keeps its operand's format cannot have was not asked for by name."""
    graph, params, _ = graph_of("softmax")
    model = jq.prepare(
        graph, params, jq.QConfig(dict(INT8.rules) | {"y": jq.Policy(output=jq.int16())}), target=jq.targets.NASH_E
    )
    assert (model.plan.spec("y.max").dtype, model.plan.spec("y").dtype) == ("int8", "int16")


def test_a_rule_for_an_inner_value_counts() -> None:
    graph, params, _ = graph_of("softmax")
    rules = dict(INT8.rules)
    model = jq.prepare(
        graph, params, jq.QConfig(rules | {"y.reciprocal": jq.Policy(output=jq.int8())}), target=jq.targets.NASH_E
    )
    assert model.plan.spec("y.reciprocal").dtype == "int8"
    assert model.plan.spec("y.exp").dtype == "int16"


@pytest.mark.parametrize("output", [None, jq.float16()])
def test_a_float_composite_stays_whole(output: jq.QuantSpec | None) -> None:
    graph, params, _ = graph_of("layer_norm")
    config = jq.QConfig({"*": jq.Policy(output=jq.int8()), "y": jq.Policy(output=output)})
    model = jq.prepare(graph, params, config, target=jq.targets.NASH_E)
    assert [type(n.op).__name__ for n in model.plan.graph.nodes] == ["LayerNorm"]


def test_a_row_that_is_masked_as_a_whole_is_zero() -> None:
    graph = jq.Graph(
        (jq.Input("x", (None, 4)), jq.Input("m", (None, 4), "bool")), (jq.Node("y", ops.Softmax(), ("x", "m")),), ("y",)
    )
    x, m = jnp.asarray(array(2, 4)), jnp.asarray([[True] * 4, [False, True, False, True]])
    model = jq.prepare(graph, {}, INT8, target=jq.targets.NASH_E)
    y = jq.run(jq.lower(jq.calibrate(model, [(x, m)])), x, m)
    np.testing.assert_array_equal(np.asarray(y)[np.asarray(m)], 0.0)
    assert abs(float(y[1].sum()) - 1) < 0.02
    np.testing.assert_array_equal(jq.graph.evaluate_float(graph, {}, x, m)[0][0], 0.0)


def test_a_masked_element_is_nothing_however_narrow_the_scores() -> None:
    """The smallest integer of the scores is no minus infinity: a masked element must not leak through exp."""
    graph = jq.Graph(
        (jq.Input("x", (None, 8)), jq.Input("m", (None, 8), "bool")), (jq.Node("y", ops.Softmax(), ("x", "m")),), ("y",)
    )
    x = jnp.asarray(0.01 * array(3, 8))
    m = jnp.asarray(np.arange(8) % 2 == 1)[None].repeat(3, 0)
    model = jq.prepare(graph, {}, INT16, target=jq.targets.NASH_E)
    y = np.asarray(jq.run(jq.lower(jq.calibrate(model, [(x, m)])), x, m))
    assert np.abs(y[:, ::2] - 0.25).max() < 0.01


def test_an_int16_product_falls_back_on_one_side_and_says_so() -> None:
    graph, params, _ = graph_of("attention")
    model = jq.prepare(graph, params, INT16, target=jq.targets.NASH_E)
    text = jq.explain(model)
    assert "int16 x int16" in text
    assert model.plan.spec("y.b").dtype == "int8"  # the values: the probabilities have the smaller range
    assert model.plan.spec("y.products.b").dtype == "int8"
    chosen = jq.QConfig(dict(INT16.rules) | {"y.products": jq.Policy(input={"a": jq.int8()})})
    model = jq.prepare(graph, model.params, chosen, target=jq.targets.NASH_E)
    assert model.plan.spec("y.products.a").dtype == "int8"
    assert "y.products.b" not in model.plan.graph.values


def test_an_int16_product_of_an_operand_with_a_policy_has_a_node_of_its_own() -> None:
    """The policy of operand a has the name y.a, and the product needs a second conversion of it."""
    graph = jq.Graph(
        (jq.Input("x", (None, 4, 4)), jq.Input("z", (None, 4, 4))),
        (jq.Node("s", ops.Sigmoid(), ("x",)), jq.Node("y", ops.MatMul(), ("z", "s"))),
        ("y",),
    )
    asked = jq.Policy(input={"b": jq.int16(), "a": jq.int16()})
    model = jq.prepare(graph, {}, jq.QConfig({"*": jq.Policy(output=jq.int16()), "y": asked}), target="nash-e")
    inserted = {
        name: model.plan.spec(name).dtype for name in ("y.a", "y.b", "y.b_1") if name in model.plan.graph.values
    }
    assert inserted == {"y.a": "int16", "y.b": "int16", "y.b_1": "int8"}
    x, z = (jnp.asarray(array(2, 4, 4)) for _ in range(2))
    found = jq.run(jq.lower(jq.calibrate(model, [(x, z)])), x, z)
    assert np.abs(found - np.asarray(z) @ (1 / (1 + np.exp(-np.asarray(x))))).max() < 0.05


@pytest.mark.parametrize("name", ["softmax", "layer_norm", "attention", "lstm sequence False", "gru sequence False"])
def test_gradients_reach_every_operand_weight_and_scale(name: str) -> None:
    graph, params, arrays = graph_of(name)
    config = jq.QConfig(
        {"*": jq.Policy(output=jq.int16(quantizer=jq.lsq), weight=jq.int8(axis="out", quantizer=jq.lsq))}
    )
    model = jq.prepare(graph, params, config, target=jq.targets.NASH_E)
    model = jq.calibrate(model, [arrays])

    def loss(params: dict, qparams: dict, arrays: tuple) -> jax.Array:
        y = jq.apply(model.replace(params=params, qparams=qparams), *arrays, mode="fake_quant")
        return (y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)).sum()

    for found in jax.tree.leaves(jax.grad(loss, argnums=(0, 1, 2))(model.params, model.qparams, arrays)):
        assert bool(jnp.isfinite(found).all())
    gradients = jax.grad(loss, argnums=(0, 1, 2))(model.params, model.qparams, arrays)
    for key, found in {**gradients[0], **{f"x{i}": g for i, g in enumerate(gradients[2])}}.items():
        assert float(jnp.abs(found).max()) > 0, key
