"""Movement, indexing and sorting: the float rule, the integer rule and the reference against torch."""

from collections.abc import Callable
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import jquant as jq
from jquant import ops
from jquant.graph.operator import constraints, eval_float, eval_integer, lower_op, to_channels_last
from jquant.reference import rule_of
from jquant.reference.call import Call
from jquant.types import NodeFormat, integer_range

NASH = jq.targets.NASH_E
DTYPES = ("int8", "int16", "bool", "int32", "uint8")
EXACT = ("bool", "int32", "uint8")
SHAPE = (2, 6, 4, 4)


def padded(pairs: tuple[int, ...], mode: str) -> Callable:
    return lambda x: F.pad(x, pairs, mode)


def ordered(axis: int, descending: bool, output: int, k: int | None = None) -> Callable:
    """Output 0 of torch's stable sort, the values, or 1, the positions; the first k of them."""

    def call(x: torch.Tensor) -> torch.Tensor:
        y = x.sort(dim=axis, descending=descending, stable=True)[output]
        return y if k is None else y.narrow(axis, 0, k)

    return call


# (operator, the same by torch, shapes of the operands)
MOVES: list[tuple[jq.ops.Op, Callable, tuple]] = [
    (
        ops.Slice(starts=(0, 1, -3, 0), stops=(None, 5, None, -1), steps=(1, 2, 1, 3)),
        lambda x: x[:, 1:5:2, -3:, :-1:3],
        (SHAPE,),
    ),
    (ops.Slice(starts=(0, 5), stops=(None, 99), steps=(1, 4)), lambda x: x[:, 5:99:4], ((3, 11),)),
    (ops.IndexSelect(axis=1, indices=(3, -1, 0, 0)), lambda x: x[:, [3, -1, 0, 0]], (SHAPE,)),
    (ops.IndexSelect(axis=-1, indices=(2,)), lambda x: x[..., [2]], (SHAPE,)),
    (ops.Expand(shape=(-1, 5, 4, 3)), lambda x: x.expand(-1, 5, 4, 3), ((2, 1, 4, 1),)),
    (ops.Expand(shape=(3, 2, -1, -1)), lambda x: x.expand(3, 2, -1, -1), ((1, 4),)),
    (ops.Tile(repeats=(1, 2, 1, 3)), lambda x: x.repeat(1, 2, 1, 3), (SHAPE,)),
    (ops.Tile(repeats=(2, 1, 2)), lambda x: x.repeat(2, 1, 2), ((3, 4),)),
    (ops.Roll(shifts=(3, -5), axes=(1, -1)), lambda x: x.roll((3, -5), (1, -1)), (SHAPE,)),
    (ops.Roll(shifts=(1, 1), axes=(2, 2)), lambda x: x.roll((1, 1), (2, 2)), (SHAPE,)),
    (ops.Flip(axes=(1, -1)), lambda x: x.flip(1, -1), (SHAPE,)),
    (ops.PixelShuffle(factor=2), lambda x: F.pixel_shuffle(x, 2), ((2, 12, 3, 5),)),
    (ops.PixelUnshuffle(factor=2), lambda x: F.pixel_unshuffle(x, 2), ((2, 3, 4, 6),)),
    (ops.ChannelShuffle(groups=2), lambda x: F.channel_shuffle(x, 2), (SHAPE,)),
    (ops.ChannelShuffle(groups=3), lambda x: F.channel_shuffle(x, 3), ((2, 6, 5),)),
    (ops.Pad(padding=((0, 0), (0, 0), (1, 2), (0, 3)), value=1.0), lambda x: F.pad(x, (0, 3, 1, 2), value=1), (SHAPE,)),
    (ops.Pad(padding=((0, 0), (0, 0), (7, 2), (0, 3)), mode="border"), padded((0, 3, 7, 2), "replicate"), (SHAPE,)),
    (ops.Pad(padding=((0, 0), (0, 0), (3, 2), (0, 3)), mode="reflect"), padded((0, 3, 3, 2), "reflect"), (SHAPE,)),
    (ops.Reshape(shape=(-1, 8, 12)), lambda x: x.reshape(-1, 8, 12), (SHAPE,)),
    (ops.Reshape(shape=(-1, 1, 6, 4, 4)), lambda x: x.unsqueeze(1), (SHAPE,)),
    (ops.Flatten(start=1, end=-2), lambda x: x.flatten(1, -2), (SHAPE,)),
    (ops.Permute(axes=(0, 2, 3, 1)), lambda x: x.permute(0, 2, 3, 1), (SHAPE,)),
    (ops.Cat(axis=-1), lambda *x: torch.cat(x, -1), ((2, 3, 4), (2, 3, 1), (2, 3, 2))),
    (ops.Stack(axis=1), lambda *x: torch.stack(x, 1), ((2, 3, 4), (2, 3, 4))),
    (ops.Stack(axis=-1), lambda *x: torch.stack(x, -1), ((2, 3), (2, 3), (2, 3))),
]
for _axis, _down in product((1, -1), (False, True)):
    MOVES += [
        (ops.Sort(axis=_axis, descending=_down), ordered(_axis, _down, 0), (SHAPE,)),
        (ops.SortIndices(axis=_axis, descending=_down), ordered(_axis, _down, 1), (SHAPE,)),
        (ops.TopK(axis=_axis, k=3, largest=_down), ordered(_axis, _down, 0, 3), (SHAPE,)),
        (ops.TopKIndices(axis=_axis, k=3, largest=_down), ordered(_axis, _down, 1, 3), (SHAPE,)),
    ]
SPATIAL = [(op, shapes) for op, _, shapes in MOVES if op.layout == "axes"]
POSITIONS = (ops.SortIndices, ops.TopKIndices)


def name(value: object) -> str:
    return str(value) if isinstance(value, jq.ops.Op) else ""


def integers(seed: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Few different values in the second half of axis 0, the two ends among them, so that a sort meets ties."""
    rng = np.random.default_rng([23, seed])
    low, high = (0, 1) if dtype == "bool" else (0, 255) if dtype == "uint8" else integer_range(dtype)
    x = rng.integers(low, high, shape, endpoint=True)
    x[len(x) // 2 :] = rng.choice([low, high, low + 1], x[len(x) // 2 :].shape)
    return x.astype(dtype)


def fast(
    op: jq.ops.Op, dtype: str, *operands: np.ndarray, scales: tuple[float, ...] = (1.0,), scale: float = 1.0
) -> tuple:
    """(fast, reference) of an operator whose operands have one dtype, apart from an int32 index behind them."""
    scales = scales * len(operands) if len(scales) == 1 else scales
    shape = jax.eval_shape(lambda *x: eval_float(op, *x), *operands).shape
    inputs = [
        ops.Operand(str(x.dtype), jnp.float32(s), (None, *x.shape[1:])) for x, s in zip(operands, scales, strict=True)
    ]
    dtype = "int32" if isinstance(op, POSITIONS) else dtype
    output = ops.Operand(dtype, jnp.float32(scale), (None, *shape[1:]))
    constants = lower_op(op, inputs, output, {}, NASH).constants
    node_format = NodeFormat(tuple(x.dtype for x in inputs), dtype)
    traced = jax.jit(lambda c, *x: eval_integer(op, node_format, NASH, *x, **c)).trace(constants, *operands)
    assert "f32" not in str(traced.jaxpr)
    y = traced.lower().compile()(constants, *operands)
    assert y.dtype == dtype
    wide = {role: np.asarray(v).astype(np.int64) for role, v in constants.items()}
    call = Call(op, [x.astype(np.int64) for x in operands], wide, node_format, NASH)
    return np.asarray(y), rule_of(op)(call)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "expected", "shapes"), MOVES, ids=name)
def test_integers_and_reference_move_as_torch(op: jq.ops.Op, expected: Callable, shapes: tuple, dtype: str) -> None:
    operands = [integers(i, shape, dtype) for i, shape in enumerate(shapes)]
    by_torch = expected(*(torch.from_numpy(x.astype(np.float64)) for x in operands)).numpy()
    quick, slow = fast(op, dtype, *operands)
    np.testing.assert_array_equal(quick.astype(np.float64), by_torch)
    np.testing.assert_array_equal(slow.astype(np.float64), by_torch)
    if dtype in EXACT:  # the float meaning of an exact value is the value
        np.testing.assert_array_equal(eval_float(op, *map(jnp.asarray, operands)), quick)


@pytest.mark.parametrize(("op", "expected", "shapes"), MOVES, ids=name)
def test_float_and_its_gradient_are_those_of_torch(op: jq.ops.Op, expected: Callable, shapes: tuple) -> None:
    rng = np.random.default_rng(0)
    operands = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    tensors = [torch.from_numpy(x).requires_grad_() for x in operands]
    y = expected(*tensors)
    np.testing.assert_array_equal(eval_float(op, *map(jnp.asarray, operands)), y.detach().numpy())
    if isinstance(op, POSITIONS):
        return
    weight = rng.integers(-4, 5, size=y.shape).astype(np.float32)  # sums of small integers are exact
    (y * torch.from_numpy(weight)).sum().backward()
    grads = jax.grad(lambda xs: (eval_float(op, *xs) * weight).sum())(list(map(jnp.asarray, operands)))
    for grad, tensor in zip(grads, tensors, strict=True):
        np.testing.assert_array_equal(grad, tensor.grad.numpy())


@pytest.mark.parametrize(("op", "shapes"), SPATIAL, ids=name)
def test_channels_last_is_the_same_operator(op: jq.ops.Op, shapes: tuple) -> None:
    operands = [jnp.asarray(np.random.default_rng(i).normal(size=s), jnp.float32) for i, s in enumerate(shapes)]
    y = eval_float(op, *operands)
    converted = to_channels_last(op, operands[0].ndim)
    if y.ndim != operands[0].ndim:
        assert converted is None
        return
    assert converted is not None
    moved = eval_float(converted, *(jnp.moveaxis(x, 1, -1) for x in operands))
    np.testing.assert_array_equal(jnp.moveaxis(moved, -1, 1), y)


def graph_of(*nodes: jq.Node, inputs: tuple[jq.Input, ...], outputs: tuple[str, ...] = ("y",)) -> jq.Graph:
    return jq.Graph(inputs, nodes, outputs)


def program_of(graph: jq.Graph, *data: np.ndarray) -> tuple[jq.Model, jq.Program]:
    model = jq.prepare(graph, {}, jq.QConfig({"*": jq.Policy(output=jq.int8())}), target=NASH)
    model = jq.calibrate(model, [tuple(map(jnp.asarray, data))])
    return model, jq.lower(model)


FOLLOWING = {type(op): (op, shapes) for op, shapes in SPATIAL if len(shapes[0]) == 4 and "reflect" not in str(op)}


@pytest.mark.parametrize(("op", "shapes"), FOLLOWING.values(), ids=name)
def test_after_a_pool_it_follows_the_channels_last_layout(op: jq.ops.Op, shapes: tuple) -> None:
    one = ops.MaxPool(kernel=(1, 1), strides=(1, 1), padding=((0, 0),) * 2, dilation=(1, 1))
    nodes = (jq.Node("pool", one, ("x",)), jq.Node("y", op, ("pool",)))
    graph = graph_of(*nodes, inputs=(jq.Input("x", (None, *shapes[0][1:])),))
    x = np.random.default_rng(1).normal(size=shapes[0]).astype(np.float32)
    model, program = program_of(graph, x)
    alone = program_of(graph_of(jq.Node("y", op, ("x",)), inputs=graph.inputs), x)[1]
    np.testing.assert_array_equal(jq.run(program, jnp.asarray(x)), jq.run(alone, jnp.asarray(x)))
    permutes = [n.inputs[0] for n in model.plan.graph.nodes if isinstance(n.op, ops.Permute)]
    assert permutes == ["x", "y"]  # in at the pool and out at the end, none between


# ---------------------------------------------------------------------------------------------------------------------
# Indices that are values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [1, -1])
def test_gather_is_that_of_torch_and_clamps(axis: int, dtype: str) -> None:
    x = integers(0, (4, 7, 5), dtype)
    shape = (4, 9, 3) if axis == 1 else (4, 6, 8)  # longer along the axis, shorter along the others
    index = np.random.default_rng(1).integers(0, x.shape[axis], shape).astype(np.int32)
    by_torch = torch.gather(torch.from_numpy(x.astype(np.int64)), axis, torch.from_numpy(index).long()).numpy()
    for beyond in (index, np.where(index == 0, -3, np.where(index == x.shape[axis] - 1, 99, index)).astype(np.int32)):
        quick, slow = fast(ops.Gather(axis=axis), dtype, x, beyond)
        np.testing.assert_array_equal(quick, by_torch)
        np.testing.assert_array_equal(slow, by_torch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 2, -2])
def test_index_select_by_an_operand(axis: int, dtype: str) -> None:
    x, index = integers(0, (4, 7, 5), dtype), np.array([2, 0, 0, 3, 1], np.int32)
    by_torch = torch.index_select(torch.from_numpy(x.astype(np.int64)), axis, torch.from_numpy(index)).numpy()
    for result in fast(ops.IndexSelect(axis=axis), dtype, x, index):
        np.testing.assert_array_equal(result, by_torch)
    for result in fast(ops.IndexSelect(axis=axis), dtype, x, np.array([-1, 99], np.int32)):
        np.testing.assert_array_equal(result, np.take(x, [0, -1], axis))


def test_the_gradient_of_gather_adds_what_is_read_twice() -> None:
    index = jnp.asarray([[0, 0, 2]], jnp.int32)
    grad = jax.grad(lambda x: (eval_float(ops.Gather(axis=1), x, index) * jnp.asarray([1.0, 2.0, 4.0])).sum())
    np.testing.assert_array_equal(grad(jnp.zeros((1, 4))), [[3, 0, 4, 0]])
    select = jax.grad(lambda x: (eval_float(ops.IndexSelect(axis=0), x, index[0]) * jnp.asarray([1.0, 2.0, 4.0])).sum())
    np.testing.assert_array_equal(select(jnp.zeros(4)), [3, 0, 4, 0])


def test_expand_takes_the_batch_of_another_value() -> None:
    """A class token: a parameter [1, 1, D] in front of the tokens of every example, whatever the batch."""
    graph = jq.Graph(
        (jq.Input("x", (None, 3, 4)),),
        (
            jq.Node("token", ops.Constant(), (), jq.FrozenMap({"value": "token.value"})),
            jq.Node("all", ops.Expand(shape=(-1, 1, 4)), ("token", "x")),
            jq.Node("y", ops.Cat(axis=1), ("all", "x")),
        ),
        ("y",),
    )
    params = {"token.value": jnp.asarray([[[1.0, -2.0, 0.5, 0.0]]])}
    model = jq.prepare(graph, params, jq.QConfig({"*": jq.Policy(output=jq.int8())}), target=NASH)
    x = np.random.default_rng(0).normal(size=(5, 3, 4)).astype(np.float32)
    program = jq.lower(jq.calibrate(model, [jnp.asarray(x)]))
    for batch in (1, 5):
        y = jq.run(program, jnp.asarray(x[:batch]))
        (slow,), _ = jq.reference.run(program, x[:batch])
        np.testing.assert_array_equal(y, slow)
        np.testing.assert_allclose(y[:, 0], np.broadcast_to(model.params["token.value"][0, 0], (batch, 4)), atol=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# Joining


@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("op", [ops.Cat(axis=1), ops.Stack(axis=2)], ids=name)
def test_joining_at_one_scale_is_the_identity(op: jq.ops.Op, dtype: str) -> None:
    low, high = integer_range(dtype)
    every = np.arange(low, high + 1).reshape(1, -1).astype(dtype)
    expected = np.asarray(eval_float(op, every, every))
    for scale in (0.1, 2.0**-23, 3.7):
        for result in fast(op, dtype, every, every, scales=(scale,), scale=scale):
            np.testing.assert_array_equal(result, expected)


def test_joining_rescales_each_operand() -> None:
    x = np.array([[100, -100, 1, -1]], np.int8)
    for result in fast(ops.Stack(axis=1), "int8", x, x, scales=(0.5, 2.0), scale=1.0):
        np.testing.assert_array_equal(result, [[[50, -50, 1, 0], [127, -128, 2, -2]]])


# ---------------------------------------------------------------------------------------------------------------------
# Sorting


def test_equal_elements_keep_their_order() -> None:
    x = np.array([[3, -128, 3, 127, -128, 127]], np.int8)
    for result in fast(ops.SortIndices(axis=1), "int8", x):
        np.testing.assert_array_equal(result, [[1, 4, 0, 2, 3, 5]])
    for result in fast(ops.SortIndices(axis=1, descending=True), "int8", x):
        np.testing.assert_array_equal(result, [[3, 5, 0, 2, 1, 4]])


@pytest.mark.parametrize("size", [2**16, 2**16 + 1])
@pytest.mark.parametrize("descending", [False, True])
def test_long_axes_sort_the_same(size: int, descending: bool) -> None:
    """Up to 2^16 elements, value and position share an int32."""
    x = integers(3, (2, size), "int16")
    quick, slow = fast(ops.SortIndices(axis=1, descending=descending), "int16", x)
    np.testing.assert_array_equal(quick, slow)


# ---------------------------------------------------------------------------------------------------------------------
# Padding


def test_a_padding_value_is_rounded_half_up_and_saturates() -> None:
    x = np.zeros((1, 1), np.int8)
    for value, expected in ((0.25, 1), (-0.25, 0), (1e9, 127), (-np.inf, -128)):
        op = ops.Pad(padding=((0, 0), (0, 1)), value=value)
        for result in fast(op, "int8", x, scales=(0.5,), scale=0.5):
            np.testing.assert_array_equal(result, [[0, expected]])


def test_reflection_is_refused_by_the_chip_and_a_long_one_everywhere() -> None:
    op = ops.Pad(padding=((0, 0), (2, 0)), mode="reflect")
    graph = graph_of(jq.Node("y", op, ("x",)), inputs=(jq.Input("x", (None, 4)),))
    with pytest.raises(jq.QConfigError, match=r"y \(Pad\): it pads with constants or the border, not by reflection"):
        program_of(graph, np.ones((2, 4), np.float32))
    assert constraints(ops.Pad(padding=((0, 0), (2, 0))), [], None, None, NASH) == []
    with pytest.raises(jq.GraphError, match="must be smaller than the axes"):
        eval_float(op, jnp.zeros((1, 2)))


# ---------------------------------------------------------------------------------------------------------------------
# Everything together, and what is refused


def everything() -> jq.Graph:
    """Masks, indices and numbers through one program."""
    nodes = (
        jq.Node("cut", ops.Slice(starts=(0, 1, 0), stops=(None, None, 6), steps=(1, 1, 1)), ("x",)),
        jq.Node("rolled", ops.Roll(shifts=(2,), axes=(2,)), ("cut",)),
        jq.Node("both", ops.Cat(axis=1), ("rolled", "cut")),
        jq.Node("best", ops.TopK(axis=2, k=3), ("both",)),
        jq.Node("where", ops.TopKIndices(axis=2, k=3), ("both",)),
        jq.Node("picked", ops.Gather(axis=2), ("both", "where")),
        jq.Node("mask_cut", ops.Pad(padding=((0, 0), (1, 2)), value=1.0), ("mask",)),
        jq.Node("masks", ops.Stack(axis=1), ("mask_cut", "mask_cut")),
        jq.Node("reversed", ops.Flip(axes=(-1,)), ("masks",)),
        jq.Node("mask_sorted", ops.Sort(axis=-1, descending=True), ("masks",)),
        jq.Node("wheres", ops.Cat(axis=1), ("where", "where")),
    )
    inputs = (jq.Input("x", (None, 3, 8)), jq.Input("mask", (None, 4), "bool"))
    return jq.Graph(inputs, nodes, ("picked", "best", "reversed", "mask_sorted", "wheres"))


@pytest.fixture(scope="module")
def together() -> tuple:
    rng = np.random.default_rng(5)
    data = rng.normal(size=(6, 3, 8)).astype(np.float32), rng.random((6, 4)) < 0.5
    return (*program_of(everything(), *data), tuple(map(jnp.asarray, data)))


def test_masks_indices_and_numbers_in_one_program(together: tuple) -> None:
    model, program, data = together
    quick = jq.run_with_taps(program, *data)
    _, slow = jq.reference.run(program, *map(np.asarray, data))
    for value in program.graph.values:
        np.testing.assert_array_equal(np.asarray(quick[value]), slow[value], err_msg=value)
    picked, best, reversed_, mask_sorted, wheres = jq.run(program, *data)
    np.testing.assert_array_equal(picked, best)  # a sort and its indices agree
    assert [str(y.dtype) for y in (reversed_, mask_sorted, wheres)] == ["bool", "bool", "int32"]
    for exact, replaced in zip(jq.run(program, *data), jq.apply(model, *data, mode="bit_true"), strict=True):
        np.testing.assert_array_equal(exact, replaced)


def test_the_same_bits_saved_vmapped_and_for_any_batch(together: tuple, tmp_path: object) -> None:
    _, program, data = together
    expected = jq.run(program, *data)
    jq.save(tmp_path / "program", program)
    loaded = jq.load(tmp_path / "program")
    one = jax.vmap(lambda x, mask: tuple(y[0] for y in jq.run(program, x[None], mask[None])))(*data)
    first, rest = (jq.run(program, *(d[part] for d in data)) for part in (slice(1), slice(1, None)))
    split = [jnp.concatenate(pair) for pair in zip(first, rest, strict=True)]
    for other in (jq.run(loaded, *data), one, split):
        for a, b in zip(expected, other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("op", "operands", "message"),
    [
        (ops.Slice(starts=(0,), stops=(None,), steps=(-1,)), (np.zeros(3),), "must be positive"),
        (ops.TopK(axis=0, k=4), (np.zeros(3),), "k=4 elements of an axis of 3"),
        (ops.IndexSelect(axis=0, indices=(3,)), (np.zeros(3),), "leave axis 0 of 3"),
        (ops.IndexSelect(axis=0), (np.zeros(3),), "one of the two"),
        (ops.IndexSelect(axis=0, indices=(1,)), (np.zeros(3), np.zeros(2, np.int32)), "one of the two"),
        (ops.IndexSelect(axis=0), (np.zeros(3), np.zeros((2, 1), np.int32)), "has 2 axes"),
        (ops.Gather(axis=0), (np.zeros(3), np.zeros(2)), "the index is float32"),
        (ops.Gather(axis=0), (np.zeros((3, 2)), np.zeros((3, 4), np.int32)), "does not fit"),
        (ops.Tile(repeats=(2,)), (np.zeros((3, 2)),), "1 repeats for 2 axes"),
        (ops.PixelShuffle(factor=2), (np.zeros((4, 2, 2)),), "an image batch of 4 axes"),
        (ops.Pad(padding=((0, 1),), value=0.5), (np.zeros(3, np.int32),), "0.5 is no int32"),
    ],
    ids=name,
)
def test_what_is_refused(op: jq.ops.Op, operands: tuple, message: str) -> None:
    arrays = [jnp.asarray(x, jnp.float32 if x.dtype == np.float64 else x.dtype) for x in operands]
    with pytest.raises(jq.GraphError, match=message):
        eval_float(op, *arrays)
