"""Equal blocks with weights of their own that run as one loop: the values of block by block, in a small program."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from support import jax_nets
from support.processes import finish, start

import jquant as jq
from jquant import ops
from jquant.analysis.meanings import Side, stacked_values_of
from jquant.calibration import observe
from jquant.graph.loops import LEAST_BLOCKS, find_loops
from jquant.graph.rolled import stack, unstack
from jquant.meanings import rolled
from jquant.program import integers
from jquant.targets import NASH_E
from jquant.training import state

FEATURES, BATCH = 8, 4
POW2 = jq.QConfig(
    {"*": jq.Policy(weight=jq.int8(axis="out", scale_form="pow2"), output=jq.int8(scale_form="pow2"))}
)  # exact sums, so that their order cannot move a rounding
ANY = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8())})


@contextmanager
def block_by_block() -> Iterator[None]:
    """Nothing runs as a loop inside, and nothing compiled before is used."""
    jax.clear_caches()
    with ExitStack() as patches:
        for module in (rolled, integers, observe):
            patches.enter_context(mock.patch.object(module, "find_loops", return_value=[]))
        yield
    jax.clear_caches()


def residual(blocks: int, *, shared: bool = False) -> tuple[jq.Graph, dict[str, Any]]:
    """x [batch, FEATURES] through blocks of two layers, with the values of two of them in the head.

    `shared`: the second layer of every block has the same weight.
    """
    nodes: list[jq.Node] = []
    params: dict[str, Any] = {"head": 0.3 * jax_nets.images(FEATURES, FEATURES, seed=99)}

    def add(name: str, op: jq.ops.Op, *inputs: str, **roles: str) -> str:
        nodes.append(jq.Node(name, op, inputs, jq.FrozenMap(roles)))
        return name

    value = add("stem", ops.Mul(), "x", "x")
    for n in range(blocks):
        second = "shared" if shared else f"v{n}"
        params[f"w{n}"] = 0.3 * jax_nets.images(FEATURES, FEATURES, seed=2 * n)
        params[second] = 0.3 * jax_nets.images(FEATURES, FEATURES, seed=1 if shared else 2 * n + 1)
        params[f"b{n}"] = 0.1 * jax_nets.images(FEATURES, seed=n)
        hidden = add(f"{n}.first", ops.Linear(), value, weight=f"w{n}", bias=f"b{n}")
        hidden = add(f"{n}.relu", ops.Relu(), hidden)
        hidden = add(f"{n}.second", ops.Linear(), hidden, weight=second)
        total = add(f"{n}.add", ops.Add(), value, hidden)
        value = add(f"{n}.bounded", ops.Clamp(minimum=-2.0, maximum=2.0), total)
    middle = add("middle", ops.Add(), f"{blocks // 2}.relu", value)
    add("logits", ops.Linear(), middle, weight="head")
    return jq.Graph((jq.Input("x", (None, FEATURES)),), tuple(nodes), ("logits", f"{blocks - 3}.add")), params


def model_of(blocks: int, qconfig: jq.QConfig = ANY, **options: Any) -> tuple[jq.Model, jax.Array]:
    graph, params = residual(blocks, **options)
    x = jnp.round(jax_nets.images(BATCH, FEATURES) * 2**8) / 2**8
    return jq.calibrate(jq.prepare(graph, params, qconfig, target=NASH_E), [x]), x


def primitives(function: Callable[..., Any], *operands: Any) -> list[str]:
    """The primitives of a function, those in its loops once."""
    found: list[str] = []

    def walk(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            found.append(equation.primitive.name)
            for value in equation.params.values():
                for inner in value if isinstance(value, tuple | list) else (value,):
                    if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                        walk(getattr(inner, "jaxpr", inner))

    walk(jax.make_jaxpr(function)(*operands).jaxpr)
    return found


def assert_equal(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("shared", [False, True], ids=["own", "one shared"])
def test_integers_are_those_of_the_reference(shared: bool) -> None:
    model, x = model_of(LEAST_BLOCKS + 2, shared=shared)
    program = jq.lower(model)
    assert "scan" in primitives(jq.run, program, x)
    q = jnp.asarray(np.random.default_rng(0).integers(-128, 128, (64, FEATURES)), jnp.int8)
    outputs, _ = jq.reference.run(program, np.asarray(q), raw=True)
    assert_equal([np.asarray(y) for y in jq.run(program, q, raw=True)], [np.asarray(y) for y in outputs])


@pytest.mark.parametrize("verb", ["run", "apply", "calibrate", "compare"])
def test_the_program_does_not_grow_with_the_blocks(verb: str) -> None:
    def products(blocks: int) -> int:
        model, x = model_of(blocks)
        operands = {"x": x}
        side = Side.of(model, "float")
        function: Callable[..., Any] = {
            "run": lambda: jq.run(jq.lower(model), x),
            "apply": lambda: jq.apply(model, x),
            "calibrate": lambda: jq.calibration.update_stats(model, jq.calibration.init_stats(model), operands),
            "compare": lambda: stacked_values_of(side, "float", operands),
        }[verb]
        return primitives(function).count("dot_general")

    assert products(20) == products(40) <= 8


@pytest.mark.parametrize("mode", ["float", "fake_quant"])
def test_outputs_and_gradients_are_those_of_block_by_block(mode: Any) -> None:
    model, x = model_of(18, POW2)

    def run() -> Any:
        def loss(model: jq.Model, x: jax.Array) -> Any:
            outputs, _ = jq.apply_train(model, x, mode=mode)
            return sum(jnp.sum(y**2) for y in outputs), outputs

        jax.clear_caches()
        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(model, x)

    with mock.patch.object(state, "MANY_BLOCKS", 16):
        assert "scan" in primitives(lambda: jq.apply_train(model, x, mode=mode))
        gradients, outputs = run()
    with block_by_block():
        expected_gradients, expected = run()
    if mode == "fake_quant":
        assert_equal(outputs, expected)
    for (path, a), b in zip(
        jax.tree.leaves_with_path((outputs, gradients)), jax.tree.leaves((expected, expected_gradients)), strict=True
    ):
        size = max(float(np.abs(b).max()), 1e-3)  # sums of at most 1000 terms, each with 2^-24 of the size
        np.testing.assert_allclose(a / size, b / size, rtol=0, atol=1e-4, err_msg=jax.tree_util.keystr(path))


OBSERVERS = [
    jq.observers.min_max(),
    jq.observers.nmse(),
    jq.observers.mean_of_maxima(),
    jq.observers.moving_average(0.9),
]


@pytest.mark.parametrize("observer", OBSERVERS, ids=lambda observer: observer.name)
def test_statistics_are_those_of_block_by_block(observer: jq.observers.Observer) -> None:
    """In powers of two, so that a sum in another order is the same; over batches of two sizes."""
    graph, params = residual(12)
    params = {key: jnp.round(value * 8) / 8 for key, value in params.items()}
    rules = jq.Policy(weight=jq.int8(axis="out"), output=jq.int8(observer=observer))
    model = jq.prepare(graph, params, jq.QConfig({"*": rules}), target=NASH_E)
    x = jnp.round(jax_nets.images(10, FEATURES) * 4) / 4
    batches = [x[:4], x[4:8], x[8:]]
    found = jq.calibration.collect(model, batches)
    with block_by_block():
        expected = jq.calibration.collect(model, batches)
    assert_equal(found, expected)
    step = jax.jit(jq.calibration.update_stats)
    stats = jq.calibration.init_stats(model)
    for batch in batches:
        stats = step(model, stats, {"x": batch})
    assert_equal(stats, expected)


DEVICES = """
import jax, numpy as np
from meanings.test_equal_blocks import ANY, FEATURES, LEAST_BLOCKS, NASH_E, assert_equal, jax_nets, residual
import jquant as jq

graph, params = residual(LEAST_BLOCKS + 2)
model = jq.prepare(graph, params, ANY, target=NASH_E)
x = jax_nets.images(12, FEATURES)
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
stats = jq.calibration.collect(model, [x], microbatch=3)
assert_equal(jq.calibration.collect(model, [x], microbatch=3, mesh=mesh), stats)
model = jq.calibration.finalize_stats(model, stats)
program = jq.lower(model)
outputs, _ = jq.reference.run(program, np.asarray(x))
expected = jq.apply(model, x)
explicit = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
rows = jax.sharding.PartitionSpec("data")
split = jax.jit(jax.shard_map(lambda x: jq.run(program, x), mesh=mesh, in_specs=rows, out_specs=rows))
for found in (
    split(x),
    jq.run(program, jax.device_put(x, jax.sharding.NamedSharding(mesh, rows))),
    jq.run(program, jax.device_put(x, jax.sharding.NamedSharding(explicit, rows))),
):
    assert_equal([np.asarray(y) for y in found], [np.asarray(y) for y in outputs])
for each in (mesh, explicit):
    found = jq.apply(model, jax.device_put(x, jax.sharding.NamedSharding(each, rows)))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
print("equal")
"""


def test_on_many_devices() -> None:
    """Statistics and integers are those of one device, however the samples are spread."""
    finish(start(DEVICES, 4))


@pytest.mark.parametrize("b", ["fake_quant", "bit_true"])
def test_a_comparison_is_that_of_block_by_block(b: Any) -> None:
    model, x = model_of(12, POW2)
    found = jq.analysis.compare(model, x, "float", b)
    with block_by_block():
        expected = jq.analysis.compare(model, x, "float", b)
    assert [row.name for row in found.rows] == [row.name for row in expected.rows]
    for row, other in zip(found.rows, expected.rows, strict=True):
        np.testing.assert_allclose(row.sqnr, other.sqnr, rtol=1e-4, err_msg=row.name)  # float sums in another order
        assert row.size == other.size
        assert row.operator == other.operator


def test_values_that_shrink_from_block_to_block_are_no_loop() -> None:
    conv = ops.Conv(strides=(1,), padding=((0, 0),), dilation=(1,))
    values = ["x", *(f"conv{n}" for n in range(20))]
    nodes = [jq.Node(values[n + 1], conv, (values[n],), jq.FrozenMap({"weight": f"w{n}"})) for n in range(20)]
    params = {f"w{n}": 0.4 * jax_nets.images(3, 3, 3, seed=n) for n in range(20)}
    graph = jq.Graph((jq.Input("x", (None, 3, 60)),), tuple(nodes), ("conv19",))
    x = jax_nets.images(2, 3, 60)
    model = jq.calibrate(jq.prepare(graph, params, ANY, target=NASH_E), [x])
    program = jq.lower(model)
    (output,), _ = jq.reference.run(program, np.asarray(x))
    np.testing.assert_array_equal(jq.run(program, x), output)
    found, in_float = jq.apply(model, x), jq.apply(model, x, mode="float")
    with block_by_block():
        np.testing.assert_array_equal(found, jq.apply(model, x))
        np.testing.assert_allclose(in_float, jq.apply(model, x, mode="float"), rtol=1e-5, atol=1e-6)


def test_a_block_in_another_format_parts_the_loop() -> None:
    graph, params = residual(40)
    policy = jq.Policy(weight=jq.int8(axis="out"), output=jq.int8())
    rules = {"*": policy, "20.second": jq.Policy(weight=jq.int8(axis="out"), output=jq.int16())}
    x = jax_nets.images(BATCH, FEATURES)
    model = jq.calibrate(jq.prepare(graph, params, jq.QConfig(rules), target=NASH_E), [x])
    loops = find_loops(model.plan.graph, lambda node: rolled._kind(node, model))
    assert len(loops) == 2
    assert "20.second" not in {name for loop in loops for row in loop.steps for name in row}
    program = jq.lower(model)
    outputs, _ = jq.reference.run(program, np.asarray(x))
    assert_equal([np.asarray(y) for y in jq.run(program, x)], [np.asarray(y) for y in outputs])


def test_weights_of_two_blocks() -> None:
    """Block n has the weights n and n + 1."""
    nodes, value = [], "x"
    for n in range(20):
        for place in (n, n + 1):
            nodes.append(jq.Node(f"{n}.{place}", ops.Linear(), (value,), jq.FrozenMap({"weight": f"w{place}"})))
            nodes.append(jq.Node(f"{n}.{place}.relu", ops.Relu() if place == n else ops.Tanh(), (nodes[-1].name,)))
            value = nodes[-1].name
    graph = jq.Graph((jq.Input("x", (None, FEATURES)),), tuple(nodes), (value,))
    params = {f"w{n}": 0.3 * jax_nets.images(FEATURES, FEATURES, seed=n) for n in range(21)}
    x = jax_nets.images(BATCH, FEATURES)
    model = jq.calibrate(jq.prepare(graph, params, POW2, target=NASH_E), [x])
    program = jq.lower(model)
    assert "scan" in primitives(jq.run, program, x)
    (output,), _ = jq.reference.run(program, np.asarray(x))
    np.testing.assert_array_equal(jq.run(program, x), output)
    found = jq.apply(model, x)
    with block_by_block():
        np.testing.assert_array_equal(found, jq.apply(model, x))


def test_a_stack_of_programs_under_vmap() -> None:
    graph, params = residual(LEAST_BLOCKS + 1)
    x = jax_nets.images(BATCH, FEATURES)
    model = jq.calibrate(jq.prepare(graph, params, ANY, target=NASH_E), [x])
    other = model.replace(params={key: 0.5 * value for key, value in model.params.items()})
    programs = [jq.lower(model), jq.lower(other)]
    found = jax.vmap(jq.run, in_axes=(0, None))(jq.stack_programs(programs), x)
    for i, program in enumerate(programs):
        outputs, _ = jq.reference.run(program, np.asarray(x))
        assert_equal([np.asarray(y[i]) for y in found], [np.asarray(y) for y in outputs])


def test_integers_are_exported() -> None:
    model, x = model_of(LEAST_BLOCKS + 1)
    program = jq.lower(model)
    run = jax.jit(lambda x: jq.run(program, x)[0])
    shape = jax.export.symbolic_shape(f"batch, {FEATURES}")
    exported = jax.export.export(run)(jax.ShapeDtypeStruct(shape, jnp.float32))
    np.testing.assert_array_equal(exported.call(x), run(x))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8, jnp.int32, jnp.bool_, jnp.uint8])
@pytest.mark.parametrize("count", [1, 16, 17, 40])
def test_arrays_are_joined_and_parted(dtype: Any, count: int) -> None:
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.integers(-128, 128, (3, 2)).astype(np.float32), dtype) for _ in range(count)]
    if dtype == jnp.float32:
        arrays[0] = arrays[0].at[0, 0].set(jnp.nan)
        arrays[-1] = arrays[-1].at[0, 0].set(-jnp.inf)
    expected = np.stack([np.asarray(array) for array in arrays])

    def both(arrays: Sequence[jax.Array]) -> Any:
        joint = stack(arrays)
        return joint, unstack(joint)

    for found, parts in (both(arrays), jax.jit(both)(arrays)):
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(np.stack([np.asarray(part) for part in parts]), expected)
