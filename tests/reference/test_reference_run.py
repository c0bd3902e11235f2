"""The reference interpreter, operator by operator: against torch in float64, where integers are exact, and by hand."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from jquant import reference
from jquant.ops.activation import Dropout, PRelu, Relu, Relu6
from jquant.ops.composite import Softmax
from jquant.ops.conv import Conv, Linear
from jquant.ops.elementwise import Add, Constant, Mul, Requantize, Scale
from jquant.ops.movement import Cat, Flatten, Pad, Permute, Reshape
from jquant.ops.pool import AdaptiveAvgPool, AvgPool, MaxPool
from jquant.ops.reduce import Mean
from jquant.ops.table import LeakyRelu, Sigmoid
from jquant.targets import NASH_E
from jquant.types import (
    FrozenMap,
    Graph,
    GraphError,
    Input,
    InputError,
    LoweringError,
    Node,
    NodeFormat,
    Op,
    Program,
    Target,
)

TARGET = NASH_E
IDENTITY = {"mantissa": 16384, "pre": 0, "post": 14}  # a rescale by 1
HALF = {"mantissa": 16384, "pre": 0, "post": 15}


def program(
    op: Op, constants: Mapping[str, Any], inputs: tuple[str, ...], output: str, target: Target = TARGET, **scales: Any
) -> Program:
    """A program of one node `y` on inputs x0, x1, ... of the given dtypes."""
    names = tuple(f"x{i}" for i in range(len(inputs)))
    graph = Graph(tuple(Input(name, (None,)) for name in names), (Node("y", op, names),), ("y",))
    return Program(
        constants={"y": {role: np.asarray(value, np.int32) for role, value in constants.items()}},
        scales={name: np.float32(scales.get(name, 1.0)) for name in (*names, "y")},
        accumulators={},
        graph=graph,
        formats=FrozenMap({"y": NodeFormat(inputs, output)}),
        inputs=FrozenMap(dict(zip(names, inputs, strict=True))),
        target=target,
        lowered_for=str(target),
    )


def run_one(op: Op, constants: Mapping[str, Any], *operands: Any, dtype: str = "int8", output: str = "") -> np.ndarray:
    made = program(op, constants, (dtype,) * len(operands), output or dtype)
    (y,), values = reference.run(made, *operands, raw=True)
    assert y is values["y"]
    assert y.dtype == np.int64
    return y


def integers(seed: int, *shape: int, low: int = -128, high: int = 127) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, shape, endpoint=True)


def tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.astype(np.float64))


def last(x: np.ndarray) -> np.ndarray:
    """[N, C, *S] -> [N, *S, C]."""
    return np.moveaxis(x, 1, -1)


def torch_padding(padding: tuple[tuple[int, int], ...]) -> list[int]:
    return [n for pair in reversed(padding) for n in pair]


CONVS = [
    # kernel, size, strides, padding, dilation, groups
    ((), (), (), (), (), 1),
    ((), (), (), (), (), 4),
    ((3,), (9,), (1,), ((1, 1),), (1,), 1),
    ((2,), (9,), (3,), ((0, 2),), (2,), 2),
    ((3, 3), (7, 6), (1, 1), ((1, 1), (1, 1)), (1, 1), 1),
    ((3, 2), (7, 8), (2, 3), ((2, 0), (1, 3)), (2, 1), 1),
    ((3, 3), (6, 6), (1, 2), ((1, 1), (0, 1)), (1, 2), 4),
    ((1, 1), (5, 5), (2, 2), ((0, 0), (0, 0)), (1, 1), 2),
    ((2, 3, 2), (4, 5, 4), (1, 2, 1), ((1, 0), (1, 1), (0, 0)), (1, 1, 2), 2),
]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("kernel", "size", "strides", "padding", "dilation", "groups"), CONVS)
def test_conv_accumulates_as_torch(kernel, size, strides, padding, dilation, groups, channels_last) -> None:
    channels, outputs = 4, 8
    x, weight = integers(0, 2, channels, *size), integers(1, outputs, channels // groups, *kernel)
    bias = integers(2, outputs, low=-(10**6), high=10**6)
    if kernel:
        function = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
        padded = F.pad(tensor(x), torch_padding(padding))
        expected = function(padded, tensor(weight), tensor(bias), strides, 0, dilation, groups).numpy()
    else:
        per_group = np.split(x, groups, axis=1), np.split(weight, groups)
        expected = np.concatenate([a @ w.T for a, w in zip(*per_group, strict=True)], axis=1) + bias
    op = Conv(strides=strides, padding=padding, dilation=dilation, groups=groups, channels_last=channels_last)
    constants = {"weight": np.moveaxis(weight, (0, 1), (-1, -2)), "bias": bias}
    y = run_one(op, constants, last(x) if channels_last else x, output="int32")
    np.testing.assert_array_equal(y, last(expected) if channels_last else expected)


def pointwise_conv(**attributes: Any) -> Conv:
    return Conv(strides=(), padding=(), dilation=(), channels_last=True, **attributes)


def test_conv_rescales_each_channel() -> None:
    row = {"mantissa": [16384, 32767], "pre": [0, 3], "post": [16, 14]}
    constants = {"weight": [[1, 100]], "bias": [2, 0], **row}
    # (10 + 2) / 4 = 3;  1000 >> 3 = 125, 125 * 32767 / 2^14 = 249.99 -> saturated
    np.testing.assert_array_equal(run_one(pointwise_conv(), constants, [[10], [-1]]), [[3, 127], [0, -26]])


def test_a_high_precision_output_saturates_in_int32() -> None:
    constants = {"weight": [[127, -128]], "bias": [2**31 - 1, -(2**31)]}
    y = run_one(pointwise_conv(), constants, [[127]], output="int32")
    np.testing.assert_array_equal(y, [[2**31 - 1, -(2**31)]])


@pytest.mark.parametrize("op", [pointwise_conv(addend=True), Linear(addend=True)], ids=["conv", "linear"])
def test_the_addend_joins_the_accumulator_before_the_rescale(op: Op) -> None:
    constants = {"weight": [[1, 1]], "bias": [0, 100], "sumin_scale": [3, 16384], "sumin_rshift": [1, 14], **HALF}
    # channel 0: 4 + rsh(-5 * 3, 1) = 4 - 7 = -3, half of it rounds up to -1;  channel 1: (4 + 100 + 7) / 2 = 55.5
    np.testing.assert_array_equal(run_one(op, constants, [[4]], [[-5, 7]]), [[-1, 56]])


def test_the_addend_of_channels_first() -> None:
    op = Conv(strides=(1,), padding=((0, 0),), dilation=(1,), addend=True)
    constants = {"weight": [[[1, 2]]], "bias": [0, 0], "sumin_scale": [1, 10], "sumin_rshift": [0, 0], **IDENTITY}
    y = run_one(op, constants, [[[1, 2, 3]]], [[[0, 1, 0], [1, 0, 2]]])
    np.testing.assert_array_equal(y, [[[1, 3, 3], [12, 4, 26]]])


@pytest.mark.parametrize(
    ("activation", "expected"), [("none", [-20, 10, 50]), ("relu", [0, 10, 50]), ("relu6", [0, 10, 30])]
)
@pytest.mark.parametrize("upper", [30, [30, 30, 30]])
def test_the_fused_activation_clamps_after_the_rescale(activation, expected, upper) -> None:
    constants = {"weight": [[-2, 1, 5]], "bias": [0, 0, 0], "upper": upper, **IDENTITY}
    np.testing.assert_array_equal(run_one(Linear(activation=activation), constants, [10]), expected)
    np.testing.assert_array_equal(run_one(pointwise_conv(activation=activation), constants, [[10]]), [expected])
    np.testing.assert_array_equal(run_one(Linear(activation=activation), constants, [10], output="int32"), expected)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 4, 5)])
def test_linear(shape: tuple[int, ...]) -> None:
    x, weight, bias = integers(0, *shape, low=-32768, high=32767), integers(1, 5, 6), integers(2, 6)
    y = run_one(Linear(), {"weight": weight, "bias": bias}, x, dtype="int16", output="int32")
    np.testing.assert_array_equal(y, (tensor(x) @ tensor(weight) + tensor(bias)).numpy())


def test_an_accumulator_beyond_int32_neither_wraps_nor_saturates_before_the_rescale() -> None:
    """65535 products of -32768 * -128 are 2^38: the rescale by 2^-31 still gives 128, with all 38 bits."""
    constants = {"weight": np.full((65535, 1), -128), "bias": [0], "mantissa": [16384], "pre": [31], "post": [14]}
    y = run_one(Linear(), constants, np.full((1, 65535), -32768), dtype="int16")
    np.testing.assert_array_equal(y, [[(65535 * 2**22) >> 31]])


POOLS = [
    # kernel, size, strides, padding (symmetric, as torch has it)
    ((3,), (10,), (2,), (1,)),
    ((2, 2), (6, 6), (2, 2), (0, 0)),
    ((2, 2), (7, 5), (2, 2), (0, 0)),
    ((3, 3), (7, 8), (2, 2), (1, 1)),
    ((3, 2), (8, 7), (3, 3), (1, 1)),
    ((2, 3), (5, 5), (3, 2), (1, 0)),
    ((2, 2), (2, 3), (3, 3), (1, 1)),
    ((2, 2, 3), (4, 5, 6), (2, 2, 2), (1, 0, 1)),
]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize(("kernel", "size", "strides", "padding"), POOLS)
def test_max_pool(kernel, size, strides, padding, dilation, ceil_mode, channels_last) -> None:
    x = integers(0, 2, 3, *size, low=-128, high=-1)  # a padding of zeros would win
    function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    expected = function(tensor(x), kernel, strides, padding, dilation, ceil_mode).numpy()
    op = MaxPool(
        kernel=kernel,
        strides=strides,
        padding=tuple((p, p) for p in padding),
        dilation=(dilation,) * len(kernel),
        ceil_mode=ceil_mode,
        channels_last=channels_last,
    )
    y = run_one(op, {}, last(x) if channels_last else x)
    np.testing.assert_array_equal(y, last(expected) if channels_last else expected)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("count_include_pad", [False, True])
@pytest.mark.parametrize(("kernel", "size", "strides", "padding"), [pool for pool in POOLS if len(pool[0]) == 2])
def test_avg_pool(kernel, size, strides, padding, count_include_pad, ceil_mode, channels_last) -> None:
    """The divisor is in the constants: 1 gives exact sums, and torch's own its mean within the bound of a rescale."""
    x = integers(0, 2, 3, *size)
    padding_pairs = tuple((p, p) for p in padding)
    op = AvgPool(
        kernel=kernel,
        strides=strides,
        padding=padding_pairs,
        ceil_mode=ceil_mode,
        count_include_pad=count_include_pad,
        channels_last=channels_last,
    )

    def average(t: np.ndarray, divisor: int | None = None) -> np.ndarray:
        return F.avg_pool2d(tensor(t), kernel, strides, padding, ceil_mode, count_include_pad, divisor).numpy()

    def compute(row: Mapping[str, Any], output: str) -> np.ndarray:
        y = run_one(op, row, last(x) if channels_last else x, output=output)
        return y if channels_last else last(y)

    sums = last(average(x, 1))
    np.testing.assert_array_equal(compute({role: [value] for role, value in IDENTITY.items()}, "int16"), sums)
    ones = np.ones((1, 1, *size))
    counts = np.rint(last(average(ones, 1))[0] / last(average(ones))[0])  # [*S_out, 1]
    row = {"mantissa": np.rint(2**14 / counts), "pre": np.zeros_like(counts), "post": np.full_like(counts, 14)}
    assert np.abs(compute(row, "int8") - last(average(x))).max() <= 0.51


def test_an_average_rounds_its_pre_shift_half_up() -> None:
    op = AvgPool(kernel=(2,), strides=(2,), padding=((0, 0),), channels_last=True)
    constants = {"mantissa": [16384], "pre": [1], "post": [14]}
    np.testing.assert_array_equal(run_one(op, constants, [[[1], [2], [-1], [-2]]]), [[[2], [-1]]])
    mean = run_one(Mean(axes=(1,)), {"mantissa": 16384, "pre": 1, "post": 14}, [[1, 2], [-1, -2]])
    np.testing.assert_array_equal(mean, [1, -2])


def test_an_overhanging_average_of_one_axis() -> None:
    """Windows start at -1, 1, 3, 5 of 7 elements; the last holds 6 and 7, and its own constants double the sum."""
    op = AvgPool(kernel=(3,), strides=(2,), padding=((1, 0),), ceil_mode=True, channels_last=True)
    constants = {"mantissa": [[16384]] * 4, "pre": [[0]] * 4, "post": [[14], [14], [14], [13]]}
    y = run_one(op, constants, [[[1], [2], [3], [4], [5], [6], [7]]])
    np.testing.assert_array_equal(y, [[[3], [9], [15], [26]]])


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("output_size", [(1, 1), (2, 3), (4, 6)])
def test_adaptive_avg_pool(output_size, channels_last) -> None:
    x = integers(0, 2, 3, 4, 6)
    windows = 24 // (output_size[0] * output_size[1])
    expected = np.rint(F.adaptive_avg_pool2d(tensor(x), output_size).numpy() * windows)
    op = AdaptiveAvgPool(output_size=output_size, channels_last=channels_last)
    y = run_one(op, IDENTITY, last(x) if channels_last else x, output="int16")
    np.testing.assert_array_equal(y, last(expected) if channels_last else expected)


def test_adaptive_avg_pool_refuses_windows_of_different_sizes() -> None:
    with pytest.raises(GraphError, match=r"'y' \(AdaptiveAvgPool\) .*\(2,\) does not divide the input size \(5,\)"):
        run_one(AdaptiveAvgPool(output_size=(2,), channels_last=True), IDENTITY, np.zeros((1, 5, 3), int))


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("axes", [(1,), (-1,), (1, 2), (0, -1)])
def test_mean(axes, keepdims) -> None:
    x = integers(0, 3, 4, 5)
    y = run_one(Mean(axes=axes, keepdims=keepdims), IDENTITY, x, output="int16")
    np.testing.assert_array_equal(y, x.sum(axis=axes, keepdims=keepdims))


def test_add_and_mul_broadcast() -> None:
    a, b = integers(0, 4, 1, 3), integers(1, 5, 1)
    row = {"mantissa": 20000, "pre": 1, "post": 16}
    total = run_one(Add(), {"multiplier": [3, 1 << 2], **row}, a, b)
    product = run_one(Mul(), row, a, b)
    for y, acc in ((total, a * 3 + b * 4), (product, a * b)):
        np.testing.assert_array_equal(y, reference.rescale(acc, 20000, 1, 16, "int8", TARGET))
    assert total.shape == (4, 5, 3)


def test_scale_moves_only_the_sign() -> None:
    np.testing.assert_array_equal(run_one(Scale(factor=3.5), {}, [-128, 5]), [-128, 5])
    np.testing.assert_array_equal(run_one(Scale(factor=-0.1), {}, [-128, 5, 127]), [127, -5, -127])


def test_constant_and_requantize() -> None:
    np.testing.assert_array_equal(run_one(Constant(), {"value": [[1, -2]]}, dtype="int8"), [[1, -2]])
    np.testing.assert_array_equal(
        run_one(Requantize(), IDENTITY, [300, -300, 5], dtype="int16", output="int8"), [127, -128, 5]
    )


def test_cat_rescales_each_operand() -> None:
    constants = {"mantissa": [16384, 16384], "pre": [0, 0], "post": [14, 15]}
    y = run_one(Cat(axis=-1), constants, [[1, -128]], [[1, 3, -1]])
    np.testing.assert_array_equal(y, [[1, -128, 1, 2, 0]])


def test_relu_and_relu6() -> None:
    np.testing.assert_array_equal(run_one(Relu(), {}, [-128, 0, 127]), [0, 0, 127])
    np.testing.assert_array_equal(run_one(Relu6(), {"upper": 60}, [-128, 30, 127]), [0, 30, 60])


@pytest.mark.parametrize("channels_last", [True, False])
def test_prelu(channels_last: bool) -> None:
    slope = [16384, -16384]  # 1/2 and -1/2, in LSB of 2^-15
    constants = {"slope": slope, **IDENTITY, "negative_mantissa": 16384, "negative_pre": 15, "negative_post": 14}
    x = np.array([[[10, 10], [-10, -128], [-3, 127]]])  # [N, S, C]
    expected = np.array([[[10, 10], [-5, 64], [-2, 127]]])  # -1.5: the pre-shift floors
    y = run_one(PRelu(channels_last=channels_last), constants, x if channels_last else np.moveaxis(x, -1, 1))
    np.testing.assert_array_equal(y, expected if channels_last else np.moveaxis(expected, -1, 1))


def test_prelu_sums_before_it_saturates_and_takes_one_slope() -> None:
    constants = {"slope": [-2], **IDENTITY, "negative_mantissa": 16384, "negative_pre": 0, "negative_post": 14}
    np.testing.assert_array_equal(run_one(PRelu(), constants, [[-100, -10, 5]]), [[127, 20, 5]])


@pytest.mark.parametrize("op", [Sigmoid(), LeakyRelu()])
def test_tables(op: Op) -> None:
    table = integers(0, 256)
    np.testing.assert_array_equal(run_one(op, {"table": table}, np.arange(-128, 128)), table)
    with pytest.raises(GraphError, match="256 entries and int8"):
        run_one(op, {"table": table}, [1], dtype="int16")


def test_movement() -> None:
    x = integers(0, 2, 3, 4)
    t = torch.from_numpy(x)
    for y, expected in [
        (run_one(Reshape(shape=(-1, 6)), {}, x), t.reshape(-1, 6)),
        (run_one(Flatten(), {}, x), t.flatten(1)),
        (run_one(Flatten(start=0, end=1), {}, x), t.flatten(0, 1)),
        (run_one(Flatten(start=-2, end=-2), {}, x), t),
        (run_one(Permute(axes=(2, 0, 1)), {}, x), t.permute(2, 0, 1)),
        (run_one(Pad(padding=((0, 0), (1, 0), (2, 3))), {"fill": -7}, x), F.pad(t, (2, 3, 1, 0), value=-7)),
        (run_one(Dropout(), {}, x), t),
    ]:
        np.testing.assert_array_equal(y, expected.numpy())


def test_run_quantizes_and_dequantizes_at_the_border() -> None:
    made = program(Add(), {"multiplier": [2, 1], **HALF}, ("int8", "int16"), "int8", x0=0.1, x1=0.5, y=0.25)
    made.scales["x1"] = np.float32(0.5)
    a, b = np.array([0.25, -100], np.float32), np.array([0.75, 3], np.float32)
    (y,), values = reference.run(made, a, b)
    np.testing.assert_array_equal(values["x0"], [2, -128])
    np.testing.assert_array_equal(values["x1"], [2, 6])  # 1.5 is a tie: to even
    np.testing.assert_array_equal(values["y"], [3, -125])
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, np.array([0.75, -31.25], np.float32))
    other = dataclasses.replace(TARGET, quantize_rounding="half_up")
    half_up = dataclasses.replace(made, target=other, lowered_for=str(other))
    _, values = reference.run(half_up, np.array([0.25, 0.25], np.float32), np.array([0.25, 1.25], np.float32))
    np.testing.assert_array_equal(values["x1"], [1, 3])


def test_errors_name_the_node_and_the_operator() -> None:
    with pytest.raises(GraphError, match=r"'y' \(Softmax\): the reference has no rule"):
        run_one(Softmax(), {}, [1])
    with pytest.raises(GraphError, match=r"'y' \(Linear\): the constant 'bias' is missing; present: \['weight'\]"):
        run_one(Linear(), {"weight": [[1]]}, [1])
    with pytest.raises(GraphError, match=r"'y' \(Reshape\) on operands of shape \(2,\)"):
        run_one(Reshape(shape=(3,)), {}, [1, 2])
    pool = MaxPool(kernel=(3,), strides=(1,), padding=((0, 0),), dilation=(1,), channels_last=True)
    with pytest.raises(GraphError, match=r"window of 3.* does not fit into 2"):
        run_one(pool, {}, np.zeros((1, 2, 1), int))
    with pytest.raises(GraphError, match=r"channels 3, weight \(2, 4\) and groups 2"):
        run_one(pointwise_conv(groups=2), {"weight": np.zeros((2, 4)), "bias": [0] * 4}, [[1, 2, 3]], output="int32")


def test_inputs_are_checked() -> None:
    made = program(Relu(), {}, ("int8",), "int8")
    with pytest.raises(InputError, match=r"1 inputs \(x0\); got 2"):
        reference.run(made, [1], [2], raw=True)
    with pytest.raises(InputError, match="leaves the range of int8"):
        reference.run(made, [128], raw=True)
    with pytest.raises(InputError, match="not float64"):
        reference.run(made, [1.0], raw=True)
    with pytest.raises(InputError, match=r"'y' \(Constant\): .* leaves the range of int8"):
        run_one(Constant(), {"value": [200]}, dtype="int8")
    other = dataclasses.replace(TARGET, name="nash-p", integer=False)
    floating = dataclasses.replace(made, target=other, lowered_for=str(other))
    with pytest.raises(LoweringError, match="nash-p: the integer post-processing is not public"):
        reference.run(floating, [1], raw=True)
