"""Unrolled recurrences that run as one loop: outputs and gradients as step by step, in a program that stays small."""

from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from support import jax_nets

import jquant as jq
from jquant import ops
from jquant.graph.loops import LEAST_STEPS, Loop, find_loops
from jquant.meanings import rolled
from jquant.meanings.meaning import meaning_of
from jquant.quantizers import lsq
from jquant.targets import NASH_E

FEATURES, BATCH = 8, 4


def policy(**options: Any) -> jq.Policy:
    """Scales that are powers of two make every sum exact, so that its order cannot move a rounding."""
    weight = jq.int8(axis="out", scale_form="pow2", **options)
    return jq.Policy(weight=weight, output=jq.int8(scale_form="pow2", **options))


ALL = jq.QConfig({"*": policy()})
LEARNED = jq.QConfig({"*": policy(quantizer=lsq)})
PRODUCTS = jq.QConfig(
    {"*": None, "type:Linear": jq.Policy(weight=policy().weight, input={"x": jq.int8(scale_form="pow2")})}
)


class Net(NamedTuple):
    """A prepared recurrence: x [batch, steps, features] and a start; its last state, and the sum of two others."""

    model: jq.Model
    inputs: tuple[jax.Array, ...]

    @property
    def plan(self) -> jq.Plan:
        return self.model.plan

    def loops(self) -> list[Loop]:
        return find_loops(self.plan.graph, lambda node: rolled._kind(node, self.model))

    def step_by_step(self, *inputs: jax.Array, **options: Any) -> list[jax.Array]:
        named = dict(zip((entry.name for entry in self.plan.graph.inputs), inputs or self.inputs, strict=True))
        run = jax.jit(lambda: meaning_of(self.model, "fake_quant", **options).values(named))
        return [run()[name] for name in self.plan.graph.outputs]

    def gradients(self, **options: Any) -> Any:
        """Outputs, and gradients to the model and inputs, of a program that is compiled anew."""

        def loss(model: jq.Model, inputs: Any) -> Any:
            outputs, _ = jq.apply_train(model, *inputs, **options)
            return sum(jnp.sum(y**2) for y in outputs), outputs

        jax.clear_caches()
        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(self.model, self.inputs)


def recurrence(steps: int, qconfig: jq.QConfig, *, back: int = 1, layers: int = 1, dropout: bool = False) -> Net:
    nodes: list[jq.Node] = []

    def add(name: str, op: jq.ops.Op, *inputs: str, **params: str) -> str:
        nodes.append(jq.Node(name, op, inputs, jq.FrozenMap(params)))
        return name

    values = [
        add(f"x{t}", ops.Slice(starts=(0, t, 0), stops=(None, t + 1, None), steps=(1, 1, 1)), "x") for t in range(steps)
    ]
    params = {}
    for n in range(layers):
        params |= {f"w{n}": 0.3 * jax_nets.images(FEATURES, FEATURES, seed=n), f"b{n}": jax_nets.images(FEATURES)}
        states = ["start"] * back
        for t in range(steps):
            state = add(f"{n}.dropped{t}", ops.Dropout(rate=0.5), states[-1]) if dropout else states[-1]
            product = add(f"{n}.product{t}", ops.Linear(), state, weight=f"w{n}", bias=f"b{n}")
            total = add(f"{n}.total{t}", ops.Add(), product, values[t] if back == 1 else states[-back])
            states.append(add(f"{n}.state{t}", ops.Clamp(minimum=-1.0, maximum=1.0), total))
        values = states[back:]
    total = add("sum", ops.Add(), values[1], values[-2])
    inputs = (jq.Input("x", (None, steps, FEATURES)), jq.Input("start", (None, 1, FEATURES)))
    graph = jq.Graph(inputs, tuple(nodes), (values[-1], total))
    model = jq.prepare(graph, params, qconfig, target=NASH_E)
    drawn = jax_nets.images(BATCH, steps, FEATURES), jax_nets.images(BATCH, 1, FEATURES, seed=1)
    arrays = tuple(jnp.round(v * 2**8) / 2**8 for v in drawn)
    return Net(jq.calibrate(model, [arrays]), arrays)


def assert_close(found: Any, expected: Any) -> None:
    """Gradients are sums over the steps and the batch in another order: 2^-24 for each of at most 1000 terms."""
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        size = max(float(np.abs(b).max()), 1e-3)
        np.testing.assert_allclose(a / size, b / size, rtol=0, atol=1e-4, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("qconfig", "dropout"),
    [(ALL, False), (ALL, True), (LEARNED, False), (PRODUCTS, False)],
    ids=["all", "dropout", "learned", "products"],
)
def test_a_loop_gives_the_outputs_and_gradients_of_its_steps(qconfig: jq.QConfig, dropout: bool) -> None:
    net = recurrence(10, qconfig, dropout=dropout)
    options = {"rngs": jax.random.key(3)} if dropout else {}
    (loop,) = net.loops()
    assert len(loop.steps) >= 8
    gradients, outputs = net.gradients(**options)
    with mock.patch.object(rolled, "find_loops", return_value=[]):
        expected_gradients, expected = net.gradients(**options)
    assert_close(outputs, expected)
    assert_close(gradients, expected_gradients)
    (to_model, _), to_scales = gradients, gradients[0].qparams
    assert all(bool((leaf != 0).any()) for leaf in to_model.params.values())
    if qconfig is LEARNED:
        names = {name for row in loop.steps for name in row} & to_scales.keys()
        assert len(names) >= 8
        assert all(bool((to_scales[name] != 0).any()) for name in names)
    if dropout:
        assert bool((outputs[0] != net.step_by_step()[0]).any())
        assert_close(outputs, net.step_by_step(rng=options["rngs"]))


def test_each_layer_is_a_loop() -> None:
    net = recurrence(9, ALL, layers=2)
    first, second = net.loops()
    assert first.stop <= second.start
    assert {node.params["weight"] for node in first.body if "weight" in node.params} == {"w0"}
    assert_close(jq.apply(net.model, *net.inputs), tuple(net.step_by_step()))


def test_the_loop_of_an_lstm_has_whole_steps() -> None:
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 13, (BATCH, 10)), jnp.int32)
    net = jax_nets.linen(jax_nets.LstmClassifier(8, 8), ids)
    graph, params = jq.trace(net.fn, net.params, ids)
    model = jq.prepare(graph, params, ALL, target=NASH_E)
    (loop,) = find_loops(model.plan.graph, lambda node: rolled._kind(node, model))
    assert len(loop.steps) >= 7
    assert sum(type(node.op).__name__ == "Linear" for node in loop.body) == 2
    assert len(loop.carried) == 2  # the cell, and what is multiplied by the weights


def test_each_step_keeps_its_own_scale() -> None:
    net = recurrence(10, ALL)
    (loop,) = net.loops()
    plain = jq.apply(net.model, *net.inputs)
    for row in (loop.steps[0], loop.steps[-1]):
        name = next(name for name in row if name in net.model.qparams)
        scales = {**net.model.qparams, name: net.model.qparams[name] * 16}
        coarse = net._replace(model=net.model.replace(qparams=scales))
        changed = jq.apply(coarse.model, *coarse.inputs)
        assert any(bool((a != b).any()) for a, b in zip(changed, plain, strict=True))
        assert_close(changed, tuple(coarse.step_by_step()))


def test_loops_under_jvp_vmap_and_in_float() -> None:
    net = recurrence(9, jq.QConfig({"*": policy(quantizer=jq.quantizers.forward_mode(jq.fake_quant))}))
    assert net.loops()
    x, start = net.inputs

    def run(x: jax.Array, mode: Any = "fake_quant") -> jax.Array:
        return jq.apply(net.model, x, start, mode=mode)[0]

    np.testing.assert_allclose(
        run(x, "float"), jq.graph.evaluate_float(net.plan.graph, net.model.params, x, start)[0], atol=1e-5
    )
    each = jax.vmap(run)(jnp.stack([x, 0.5 * x]))
    np.testing.assert_allclose(each[1], run(0.5 * x), atol=1e-5)
    direction = jax_nets.images(*x.shape, seed=7)
    _, tangent = jax.jvp(run, (x,), (direction,))
    np.testing.assert_allclose(tangent.sum(), (jax.grad(lambda x: run(x).sum())(x) * direction).sum(), rtol=1e-4)


def test_loops_inside_shard_map_and_exported() -> None:
    net = recurrence(9, ALL)
    assert net.loops()

    def run(x: jax.Array, start: jax.Array) -> jax.Array:
        return jq.apply(net.model, x, start, mode="fake_quant")[0]

    expected = run(*net.inputs)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")
    split = jax.shard_map(run, mesh=mesh, in_specs=(rows, rows), out_specs=rows)
    np.testing.assert_array_equal(jax.jit(split)(*net.inputs), expected)
    scope = jax.export.SymbolicScope()
    shapes = [jax.export.symbolic_shape(f"batch, {n}, {FEATURES}", scope=scope) for n in (9, 1)]
    exported = jax.export.export(jax.jit(run))(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    np.testing.assert_array_equal(exported.call(*net.inputs), expected)


def test_the_program_does_not_grow_with_the_steps() -> None:
    def size(steps: int) -> int:
        net = recurrence(steps, PRODUCTS)
        step = jax.jit(jax.grad(lambda params: jq.apply(net.model.replace(params=params), *net.inputs)[0].sum()))
        return step.lower(net.model.params).compile().as_text().count(" = ")

    few, many = size(10), size(20)
    assert many < 1.2 * few  # step by step it is nearly twice as large


@pytest.mark.parametrize(("steps", "back"), [(LEAST_STEPS, 1), (14, 3)], ids=["few steps", "three steps back"])
def test_what_is_no_loop_runs_step_by_step(steps: int, back: int) -> None:
    net = recurrence(steps, ALL, back=back)
    assert not net.loops()
    assert_close(jq.apply(net.model, *net.inputs), tuple(net.step_by_step()))


def test_steps_that_do_not_wait_for_one_another_are_no_loop() -> None:
    nodes = [
        jq.Node(f"x{t}", ops.Slice(starts=(0, t, 0), stops=(None, t + 1, None), steps=(1, 1, 1)), ("x",))
        for t in range(10)
    ]
    nodes += [jq.Node(f"y{t}", ops.Linear(), (f"x{t}",), jq.FrozenMap({"weight": "w"})) for t in range(10)]
    order = [node for pair in zip(nodes[:10], nodes[10:], strict=True) for node in pair]
    graph = jq.Graph((jq.Input("x", (None, 10, FEATURES)),), tuple(order), ("y9",))
    assert not find_loops(graph, lambda node: (node.op, node.params))


def test_a_cache_that_grows_is_read_step_by_step() -> None:
    nodes, cache = [], "x"
    for t in range(10):
        mean = jq.Node(f"mean{t}", ops.Mean(axes=(1,), keepdims=True), (cache,))
        product = jq.Node(f"product{t}", ops.Linear(), (mean.name,), jq.FrozenMap({"weight": "w", "bias": "b"}))
        nodes += [mean, product, jq.Node(f"cache{t}", ops.Cat(axis=1), (cache, product.name))]
        cache = f"cache{t}"
    graph = jq.Graph((jq.Input("x", (None, 2, FEATURES)),), tuple(nodes), (cache,))
    params = {"w": 0.3 * jax_nets.images(FEATURES, FEATURES), "b": jax_nets.images(FEATURES)}
    model = jq.prepare(graph, params, ALL, target=NASH_E)
    x = jax_nets.images(BATCH, 2, FEATURES)
    net = Net(jq.calibrate(model, [x]), (x,))
    assert net.loops()
    found = jq.apply(net.model, x)
    assert found.shape == (BATCH, 12, FEATURES)
    assert_close([found], net.step_by_step())


def test_a_step_in_another_format_stays_out_of_the_loop() -> None:
    rules = {"*": policy(), "0.total3": jq.Policy(output=jq.int16(scale_form="pow2"))}
    net = recurrence(14, jq.QConfig(rules))
    (loop,) = net.loops()
    assert "0.total3" not in {name for row in loop.steps for name in row}
    assert_close(jq.apply(net.model, *net.inputs), tuple(net.step_by_step()))


def test_taps_see_every_step() -> None:
    net = recurrence(10, ALL)
    outputs, values = jq.apply_with_taps(net.model, *net.inputs, mode="fake_quant")
    assert set(values) == set(net.plan.graph.values)
    assert_close(outputs, jq.apply(net.model, *net.inputs, mode="fake_quant"))
