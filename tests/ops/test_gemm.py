"""Convolutions, matrix products and table lookup: float against torch, integers against the reference, the limits."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import jquant as jq
from jquant import ops
from jquant.graph.float import evaluate_float
from jquant.graph.operator import eval_float
from jquant.ops.conv import kernel_limits
from jquant.program.lower import lower_traced
from jquant.reference.lowering import bias_constant, rescale_constants

SPECS = {"int8": jq.int8, "int16": jq.int16}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng([41, seed])


def real(seed: int, *shape: int) -> np.ndarray:
    return rng(seed).normal(size=shape).astype(np.float32)


def transposed(rank: int, **options) -> ops.ConvTranspose:
    fields = {"strides": (2,) * rank, "padding": ((1, 1),) * rank, "output_padding": (0,) * rank}
    return ops.ConvTranspose(**fields | {"dilation": (1,) * rank} | options)


def one_node(op: jq.ops.Op, shapes: list[tuple[int, ...]], params: dict, dtypes: tuple[str, ...] = ()) -> jq.Graph:
    names = [f"x{i}" for i in range(len(shapes))]
    kinds = (*dtypes, *("float32",) * (len(shapes) - len(dtypes)))
    inputs = tuple(jq.Input(n, (None, *s), d) for n, s, d in zip(names, shapes, kinds, strict=True))
    node = jq.Node("y", op, tuple(names), jq.FrozenMap({role: role for role in params}))
    return jq.Graph(inputs, (node,), ("y",))


def config(operands: list[str], output: str, weight: str = "int8") -> jq.QConfig:
    rules = {"*": jq.Policy(output=jq.int8(), weight=jq.QuantSpec(dtype=weight, axis="out"))}
    rules |= {f"x{i}": jq.Policy(output=SPECS[dtype](scale=2.0**-7)) for i, dtype in enumerate(operands)}
    return jq.QConfig(rules | {"y": jq.Policy(output=jq.high_precision if output == "int32" else SPECS[output]())})


def lowered(op: jq.ops.Op, data: list[np.ndarray], params: dict, output: str, weight: str = "int8") -> jq.Program:
    """A program of one node, on integers `data`."""
    graph = one_node(op, [d.shape[1:] for d in data], params)
    model = jq.prepare(
        graph, params, config([str(d.dtype) for d in data], output, weight), target=jq.targets.NASH_E,
        high_precision_outputs=False,
    )  # fmt: skip
    real = tuple(jnp.asarray(d * np.float32(2.0**-7), jnp.float32) for d in data)
    return jq.lower(jq.calibrate(model, [real]))


def both(program: jq.Program, data: list[np.ndarray]) -> np.ndarray:
    """The integers of the output, once the fast path and the reference agree on them."""
    fast = jq.run(program, *map(jnp.asarray, data), raw=True)
    (slow,), _ = jq.reference.run(program, *data, raw=True)
    np.testing.assert_array_equal(np.asarray(fast), slow)
    return slow


# ---------------------------------------------------------------------------------------------------------------------
# Float

TRANSPOSED = {
    "1d": (transposed(1), (6, 5, 4)),
    "2d": (transposed(2, output_padding=(1, 0)), (6, 5, 3, 3)),
    "2d, groups": (transposed(2, groups=3, dilation=(2, 1), strides=(2, 3)), (6, 2, 3, 4)),
    "depthwise": (transposed(2, groups=6), (6, 1, 4, 4)),
    "3d": (transposed(3), (6, 2, 3, 2, 3)),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", TRANSPOSED)
def test_transposed_in_float_is_that_of_torch(case: str, channels_last: bool) -> None:
    op, weight_shape = TRANSPOSED[case]
    rank = len(op.strides)
    x, weight = real(0, 2, 6, *(4, 5, 3)[:rank]), real(1, *weight_shape)
    bias = real(2, weight_shape[1] * op.groups)
    run = getattr(F, f"conv_transpose{rank}d")
    padding = tuple(low for low, _ in op.padding)
    args = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (x, weight, bias)]
    y = run(*args, op.strides, padding, op.output_padding, op.groups, op.dilation)
    y.square().sum().backward()

    def ours(x, weight, bias):
        x = jnp.moveaxis(x, 1, -1) if channels_last else x
        got = eval_float(dataclasses.replace(op, channels_last=channels_last), x, weight=weight, bias=bias)
        return jnp.moveaxis(got, -1, 1) if channels_last else got

    # sums of at most 100 products of size 1: a float32 rounding each
    np.testing.assert_allclose(ours(x, weight, bias), y.detach().numpy(), atol=1e-4)
    gradients = jax.jit(jax.grad(lambda *a: (ours(*a) ** 2).sum(), argnums=(0, 1, 2)))(x, weight, bias)
    for gradient, arg in zip(gradients, args, strict=True):
        np.testing.assert_allclose(gradient, arg.grad.numpy(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_conv_in_float_and_its_gradient_are_those_of_torch(rank: int, groups: int) -> None:
    op = ops.Conv(strides=(2,) * rank, padding=((1, 1),) * rank, dilation=(1,) * rank, groups=groups)
    x, weight = real(0, 2, 6, *(5, 4, 6)[:rank]), real(1, 12, 6 // groups, *(3, 2, 3)[:rank])
    args = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (x, weight)]
    y = getattr(F, f"conv{rank}d")(*args, None, 2, 1, 1, groups)
    y.square().sum().backward()
    np.testing.assert_allclose(eval_float(op, x, weight=weight), y.detach().numpy(), atol=1e-4)
    gradients = jax.jit(jax.grad(lambda x, w: (eval_float(op, x, weight=w) ** 2).sum(), argnums=(0, 1)))(x, weight)
    for gradient, arg in zip(gradients, args, strict=True):
        np.testing.assert_allclose(gradient, arg.grad.numpy(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "shapes",
    [
        ((5,), (5,)),
        ((5,), (2, 5, 3)),
        ((2, 4, 5), (5,)),
        ((4, 5), (5, 3)),
        ((2, 1, 4, 5), (3, 5, 2)),
        ((7, 4, 5), (5, 3)),
    ],
    ids=str,
)
def test_matmul_in_float_is_that_of_torch(shapes: tuple) -> None:
    a, b = (real(i, *shape) for i, shape in enumerate(shapes))
    expected = torch.matmul(torch.tensor(a), torch.tensor(b)).numpy()
    np.testing.assert_allclose(eval_float(ops.MatMul(), a, b), expected, atol=1e-5)  # five products of size 1
    if a.ndim > 1:
        np.testing.assert_allclose(
            eval_float(ops.MatMul(transpose_a=True), np.swapaxes(a, -1, -2), b), expected, atol=1e-5
        )
    if b.ndim > 1:
        np.testing.assert_allclose(
            eval_float(ops.MatMul(transpose_b=True), a, np.swapaxes(b, -1, -2)), expected, atol=1e-5
        )


def test_a_vector_cannot_be_transposed() -> None:
    with pytest.raises(jq.GraphError, match="a vector has no last two axes"):
        eval_float(ops.MatMul(transpose_b=True), jnp.ones((3, 4)), jnp.ones(4))


def test_embedding_in_float_and_its_gradient_are_those_of_torch() -> None:
    table, index = jnp.asarray(real(0, 9, 4)), rng(1).integers(0, 9, (3, 5))
    weight = torch.tensor(np.array(table), requires_grad=True)
    y = F.embedding(torch.tensor(index), weight, padding_idx=2)
    y.square().sum().backward()
    op, index = ops.Embedding(padding_index=2), jnp.asarray(index, jnp.int32)
    np.testing.assert_array_equal(eval_float(op, index, weight=table), y.detach().numpy())
    gradient = jax.grad(lambda w: (eval_float(op, index, weight=w) ** 2).sum())(table)
    np.testing.assert_allclose(gradient, weight.grad.numpy(), rtol=1e-6)
    assert (gradient[2] == 0).all()


@pytest.mark.parametrize("jit", [False, True])
def test_an_index_outside_the_table_is_nan(jit: bool) -> None:
    def run(index):
        return eval_float(ops.Embedding(), index, weight=jnp.ones((4, 2)))

    y = (jax.jit(run) if jit else run)(jnp.asarray([0, -1, 3, 4], jnp.int32))
    assert np.isnan(y).all(axis=-1).tolist() == [False, True, False, True]


# ---------------------------------------------------------------------------------------------------------------------
# Integers

FORMATS = [("int8", "int8", "int8"), ("int16", "int8", "int16"), ("int8", "int16", "int8"), ("int16", "int8", "int32")]
WIDE = {
    # 4608 products a sum: past int32 where an operand is int16
    "conv": (ops.Conv(strides=(1, 1), padding=((0, 0),) * 2, dilation=(1, 1)), (512, 3, 3), (8, 512, 3, 3)),
    "grouped": (
        ops.Conv(strides=(1, 1), padding=((0, 0),) * 2, dilation=(1, 1), groups=2),
        (1024, 3, 3),
        (8, 512, 3, 3),
    ),
    "transposed": (transposed(2, strides=(1, 1), padding=((2, 2), (2, 2))), (512, 3, 3), (512, 8, 3, 3)),
    "linear": (ops.Linear(), (4608,), (8, 4608)),
}


@pytest.mark.parametrize("formats", FORMATS, ids=" ".join)
@pytest.mark.parametrize("kind", WIDE)
def test_4608_products_of_extremes_with_scales_from_2_to_the_minus_20_to_10(kind: str, formats: tuple) -> None:
    """Half of the channels are all -32768 or -128, half all the largest; so are the examples."""
    op, shape, weight_shape = WIDE[kind]
    x_dtype, weight_dtype, output = formats
    ends = np.iinfo(x_dtype)
    x = np.stack([np.full(shape, ends.min), np.full(shape, ends.max), rng().choice([ends.min, ends.max], shape)])
    magnitude = np.exp2(np.linspace(-20, 10, 8)) * np.resize([-1.0, 1.0], 8)
    channel = np.moveaxis(np.ones(weight_shape), op.weight_axis, -1) * magnitude
    params = {"weight": jnp.asarray(np.moveaxis(channel, -1, op.weight_axis), jnp.float32)}
    params["bias"] = jnp.asarray(magnitude, jnp.float32)
    program = lowered(op, [x.astype(x_dtype)], params, output, weight_dtype)
    y = both(program, [x.astype(x_dtype)])
    wide = "int16" in (x_dtype, weight_dtype)
    assert program.formats["y"].accumulator == ("limbs" if wide else "int32")
    assert (float(program.accumulators["y"].worst_case) >= 2**31) == wide
    if output == "int32":  # a saturated accumulator has the right sign; one that wrapped has not
        flat = y.reshape(3, 8) if kind == "linear" else y.reshape(3, 8, -1)[..., 0]
        assert (np.sign(flat[0]) == -np.sign(magnitude)).all()
        assert (np.abs(flat[0, 1:]) >= 2**31 - 1).all()  # the weights of the first are 8: no scale is below 2^-23


@pytest.mark.parametrize("rule", [{}, {"rescale.pre_rounding": "half_up"}, {"rescale.high_precision": True}], ids=str)
@pytest.mark.parametrize("formats", [("int8", "int8"), ("int16", "int16"), ("int8", "int32")], ids=" ".join)
def test_a_bias_at_the_end_of_int32_takes_no_limbs(formats: tuple, rule: dict) -> None:
    """Every pre-shift, with sums on both sides of the ends of int32."""
    dtype, output = formats
    x = rng().integers(np.iinfo(dtype).min, np.iinfo(dtype).max + 1, (20, 40)).astype(dtype)
    params = {"weight": jnp.asarray(rng(1).normal(size=(64, 40)), jnp.float32), "bias": jnp.zeros(64)}
    program = lowered(ops.Linear(), [x], params, output)
    constants = dict(program.constants["y"])
    ends = np.where(np.arange(64) < 32, 2**31 - 1, -(2**31))
    ends = ends - rng(2).integers(-1, 2, 64) * rng(3).integers(0, 2**17, 64)
    constants["bias"] = jnp.asarray(ends.clip(-(2**31), 2**31 - 1), jnp.int32)
    if output != "int32":
        constants["pre"] = jnp.arange(64, dtype=jnp.int32) % 32
        constants["post"] = (22 if output == "int8" else 14) + jnp.arange(64, dtype=jnp.int32) % 7
    found = {}
    for accumulator in ("pair", "limbs"):
        form = dataclasses.replace(program.formats["y"], accumulator=accumulator)
        changed = dataclasses.replace(
            program,
            constants={**program.constants, "y": constants},
            formats=jq.types.FrozenMap({**program.formats, "y": form}),
            target=(target := program.target.with_fields(rule)),
            lowered_for=str(target),
        )
        found[accumulator] = both(changed, [x])
    np.testing.assert_array_equal(found["pair"], found["limbs"])
    assert len(np.unique(found["pair"])) > 10


@pytest.mark.parametrize("formats", [("int8", "int8"), ("int16", "int8"), ("int8", "int16")], ids=" ".join)
@pytest.mark.parametrize("output", ["int8", "int16", "int32"])
def test_4608_products_of_activations(formats: tuple, output: str) -> None:
    a, b = (np.empty((4, *s), d) for s, d in zip(((2, 4608), (4608, 2)), formats, strict=True))
    for i, (left, right) in enumerate((("min", "min"), ("max", "max"), ("min", "max"), ("max", "min"))):
        a[i], b[i] = getattr(np.iinfo(a.dtype), left), getattr(np.iinfo(b.dtype), right)
    program = lowered(ops.MatMul(), [a, b], {}, output)
    y = both(program, [a, b])
    wide = "int16" in formats
    assert program.formats["y"].accumulator == ("limbs" if wide else "int32")
    exact = a.astype(np.int64) @ b.astype(np.int64)
    if output == "int32":
        np.testing.assert_array_equal(y, exact.clip(-(2**31), 2**31 - 1))


def test_the_constants_of_a_grouped_transposed_convolution() -> None:
    """One scale for an output channel of every group: channel g * (O / groups) + c has scale c."""
    op, params = transposed(2, groups=2), {"weight": jnp.asarray(real(0, 4, 3, 3, 3)), "bias": jnp.asarray(real(1, 6))}
    params["weight"] = params["weight"] * jnp.asarray([1.0, 4.0, 0.25]).reshape(1, 3, 1, 1)
    data = [rng().integers(-128, 128, (2, 4, 5, 5)).astype(np.int8)]
    program = lowered(op, data, params, "int8")
    both(program, data)
    constants = program.constants["y"]
    scale = np.abs(params["weight"]).max(axis=(0, 2, 3)) / 127.5
    out = Fraction(float(program.scales["y"]))
    for channel in range(6):
        weight = Fraction(float(np.float32(scale[channel % 3])))
        acc = weight / 128
        expected = rescale_constants(acc / out, 8, narrow=False, target=jq.targets.NASH_E)
        assert tuple(int(constants[r][channel]) for r in ("mantissa", "pre", "post")) == expected
        assert int(constants["bias"][channel]) == bias_constant(
            Fraction(float(params["bias"][channel])), acc, jq.targets.NASH_E
        )


CUBE = ops.Conv(strides=(1,) * 3, padding=((1, 1),) * 3, dilation=(1,) * 3)
CASES = {
    "dense": (WIDE["conv"][0], (16, 6, 6), {"weight": (8, 16, 3, 3)}),
    "depthwise": (dataclasses.replace(WIDE["conv"][0], groups=16), (16, 6, 6), {"weight": (16, 1, 3, 3)}),
    "grouped": (dataclasses.replace(WIDE["conv"][0], groups=4), (16, 6, 6), {"weight": (8, 4, 3, 3)}),
    "3d": (CUBE, (4, 4, 5, 4), {"weight": (6, 4, 3, 3, 3)}),
    "transposed": (transposed(2), (16, 6, 6), {"weight": (16, 8, 4, 4), "bias": (8,)}),
    "transposed groups": (transposed(2, groups=2), (16, 6, 6), {"weight": (16, 4, 3, 3), "bias": (8,)}),
    "linear": (ops.Linear(), (16,), {"weight": (8, 16)}),
}
KERNELS = {"3d": "dense", "transposed": "dense", "transposed groups": "grouped", "linear": "matmul"}


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_is_recorded_and_obeyed(case: str) -> None:
    op, shape, shapes = CASES[case]
    data = [rng().integers(-128, 128, (2, *shape)).astype(np.int8)]
    program = lowered(op, data, {r: jnp.asarray(real(1, *s)) for r, s in shapes.items()}, "int8")
    y = both(program, data)
    entry = program.formats["y"]
    assert entry.kernel == KERNELS.get(case, case)
    if case == "linear":
        return

    def with_kernel(name: str) -> jq.Program:
        formats = dict(program.formats) | {"y": dataclasses.replace(entry, kernel=name)}
        return dataclasses.replace(program, formats=jq.FrozenMap(formats))

    x = jnp.asarray(data[0])
    np.testing.assert_array_equal(jq.run(with_kernel("patches"), x, raw=True), y)
    assert "conv_general" not in str(jax.make_jaxpr(lambda v: jq.run(with_kernel("patches"), v, raw=True))(x))
    with pytest.raises(jq.GraphError, match="kernel 'matmul' cannot run"):
        jq.run(with_kernel("matmul"), x, raw=True)


@pytest.mark.parametrize("case", ["transposed", "transposed groups", "grouped", "3d"])
def test_the_same_bits_lowered_inside_jit_and_bit_true(case: str) -> None:
    op, shape, shapes = CASES[case]
    params = {r: jnp.asarray(real(1, *s)) for r, s in shapes.items()}
    graph = one_node(op, [shape], params)
    qconfig = jq.QConfig({"*": jq.Policy(output=jq.int8(), weight=jq.int8(axis="out"))})
    model = jq.prepare(graph, params, qconfig, target=jq.targets.NASH_E, high_precision_outputs=False)
    x = jnp.asarray(real(2, 3, *shape))
    model = jq.calibrate(model, [x])
    program, inside = jq.lower(model), jax.jit(lower_traced)(model)
    for node, roles in program.constants.items():
        for role, constant in roles.items():
            np.testing.assert_array_equal(constant, inside.constants[node][role], err_msg=role)
    y = jq.run(program, x)
    np.testing.assert_array_equal(jq.run(inside, x), y)
    np.testing.assert_array_equal(jq.apply(model, x, mode="bit_true"), y)
    fake = jq.apply(model, x, mode="fake_quant")
    # one LSB: section 3 bounds the rescale by 0.51 LSB, and fake-quant rounds once
    assert np.abs(np.asarray(y - fake)).max() <= 1.01 * float(program.scales[program.graph.outputs[0]])


@pytest.mark.parametrize("groups", [1, 2])
def test_batch_norm_add_and_relu_go_into_a_transposed_convolution(groups: int) -> None:
    up = transposed(2, groups=groups)
    params = {"weight": real(0, 4, 6 // groups, 4, 4), "bias": real(1, 6), "mean": real(2, 6), "gain": real(3, 6)}
    params |= {"variance": np.abs(real(4, 6)) + 0.3, "offset": real(5, 6), "flat": real(6, 6, 4, 1, 1)}
    params = {key: jnp.asarray(value) for key, value in params.items()}
    ones = {"strides": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1)}
    norm = {"running_mean": "mean", "running_var": "variance", "weight": "gain", "bias": "offset"}
    nodes = (
        jq.Node("skip", ops.ConvTranspose(**ones | {"strides": (2, 2)}, output_padding=(1, 1)), ("x",),
                jq.FrozenMap({"weight": "skip.weight"})),
        jq.Node("up", up, ("x",), jq.FrozenMap({"weight": "weight", "bias": "bias"})),
        jq.Node("norm", ops.BatchNorm(), ("up",), jq.FrozenMap(norm)),
        jq.Node("sum", ops.Add(), ("norm", "skip")),
        jq.Node("out", ops.Relu(), ("sum",)),
    )  # fmt: skip
    params["skip.weight"] = jnp.moveaxis(params.pop("flat"), 0, 1)
    graph = jq.Graph((jq.Input("x", (None, 4, 5, 5)),), nodes, ("out",))
    x = jnp.asarray(real(7, 2, 4, 5, 5))
    (expected,) = evaluate_float(graph, params, x)
    qconfig = jq.QConfig({"*": jq.Policy(output=jq.int8(), weight=jq.int8(axis="out"))})
    model = jq.prepare(graph, params, qconfig, target=jq.targets.NASH_E, high_precision_outputs=False)
    kinds = [type(node.op).__name__ for node in model.plan.graph.nodes if type(node.op).__name__ != "Permute"]
    assert kinds == ["ConvTranspose", "ConvTranspose"]
    assert model.plan.graph.by_name["up"].op.addend
    assert model.plan.graph.by_name["up"].op.activation == "relu"
    model = jq.calibrate(model, [x])
    np.testing.assert_allclose(jq.apply(model, x, mode="float"), expected, atol=1e-4)
    program = jq.lower(model)
    fast = jq.run_with_taps(program, x)
    _, slow = jq.reference.run(program, np.asarray(x))
    for name in program.graph.values:
        np.testing.assert_array_equal(np.asarray(fast[name]), slow[name], err_msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# Embedding in integers


def embedding_program() -> jq.Program:
    graph = one_node(ops.Embedding(), [(5,)], {"weight": None}, ("int32",))
    params = {"weight": jnp.asarray(real(0, 9, 4))}
    qconfig = jq.QConfig({"*": jq.Policy(output=jq.int16(), weight=jq.int8())})
    model = jq.prepare(graph, params, qconfig, target=jq.targets.NASH_E)
    indices = jnp.asarray(np.arange(10).reshape(2, 5) % 9, jnp.int32)
    return jq.lower(jq.calibrate(model, [indices]))


def test_embedding_takes_rows_of_a_table_on_the_grid_of_its_output() -> None:
    program = embedding_program()
    index = rng(1).integers(0, 9, (3, 5)).astype(np.int32)
    y = both(program, [index])
    scale = np.float32(program.scales["y"])
    np.testing.assert_array_equal(y, np.rint(real(0, 9, 4) / scale).clip(-32768, 32767)[index])
    assert str(program.constants["y"]["weight"].dtype) == "int16"


def test_an_index_outside_the_table_is_zero_in_integers_and_refused_by_the_reference() -> None:
    program = embedding_program()
    index = np.asarray([[0, 8, 9, -1, 3]], np.int32)
    y = jq.run(program, jnp.asarray(index), raw=True)
    assert (np.asarray(y)[0, [2, 3]] == 0).all()
    assert (np.asarray(y)[0, [0, 1, 4]] != 0).any(axis=-1).all()
    with pytest.raises(jq.GraphError, match=r"indices \[-1, 9\] leave the 9 rows"):
        jq.reference.run(program, index, raw=True)


# ---------------------------------------------------------------------------------------------------------------------
# Limits


def prepared(op: jq.ops.Op, shapes: list, params: dict, qconfig: jq.QConfig, dtypes: tuple[str, ...] = ()) -> jq.Plan:
    return jq.prepare(one_node(op, shapes, params, dtypes), params, qconfig, target=jq.targets.NASH_E).plan


def test_a_sum_of_more_than_65535_products_is_refused() -> None:
    with pytest.raises(jq.QConfigError, match="65536 products a sum are more than 65535"):
        prepared(ops.MatMul(), [(1, 65536), (65536, 1)], {}, config(["int8", "int8"], "int8"))


def test_both_int16_are_refused_for_a_transposed_convolution() -> None:
    params = {"weight": jnp.ones((4, 2, 3, 3))}
    with pytest.raises(jq.QConfigError, match="input and weight are both int16"):
        prepared(transposed(2), [(4, 5, 5)], params, config(["int16"], "int8", "int16"))


def test_the_limits_of_a_transposed_weight_count_its_inputs() -> None:
    op, target = transposed(2, groups=2), jq.targets.NASH_E
    assert kernel_limits((16000, 40000, 2, 2), target, op) == []
    assert kernel_limits((40000, 1, 2, 2), target, op) == ["80000 products a sum are more than 65535"]
    assert kernel_limits((4, 1, 33, 2), target, op) == ["kernel (33, 2) is larger than 31"]


def test_a_sum_over_the_batch_is_refused() -> None:
    graph = jq.Graph(
        (jq.Input("x0", (None, 4)), jq.Input("x1", (None, 4))),
        (jq.Node("y", ops.MatMul(transpose_a=True), ("x0", "x1")),),
        ("y",),
    )
    model = jq.prepare(graph, {}, config(["int8", "int8"], "int8"), target=jq.targets.NASH_E)
    model = jq.calibrate(model, [(jnp.ones((3, 4)), jnp.ones((3, 4)))])
    with pytest.raises(jq.LoweringError, match=r"'y' \(MatMul\): it sums over the batch"):
        jq.lower(model)


def test_the_index_of_an_embedding_is_exact() -> None:
    with pytest.raises(jq.GraphError, match="the index of an embedding is float32"):
        prepared(ops.Embedding(), [(5,)], {"weight": jnp.ones((4, 2))}, config(["int8"], "int8"))
