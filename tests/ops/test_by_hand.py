"""Single numbers by hand, at the edges that the suites in bulk draw rarely or never."""

from fractions import Fraction
from math import floor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant import ops
from jquant.graph.operator import Operand, constraints, eval_float, eval_on_grid, lower_op
from jquant.numerics.color import join_planes
from jquant.numerics.rescale import quantize_exactly
from jquant.ops.conv import _accumulator
from jquant.ops.elementwise import exact_number
from jquant.ops.lookup import table_constants
from jquant.ops.movement import carries_accumulator
from jquant.ops.opaque import OpaqueCall
from jquant.ops.resample import _all_steps
from jquant.program.insert.colour import _quantized_conv
from jquant.targets import NASH_E
from jquant.types import GraphError, InputError, LoweringError


def test_the_slopes_of_a_value_of_one_axis_are_those_of_its_elements() -> None:
    y = eval_float(ops.PRelu(), jnp.float32([-1, 2, -3]), weight=jnp.float32([0.5, 0.5, 2]))
    assert y.tolist() == [-0.5, 2, -6]


def test_a_draw_of_dropout_is_shared_along_its_axes() -> None:
    x = jnp.ones((3, 4, 50))
    y = np.asarray(eval_float(ops.Dropout(rate=0.5, shared_axes=(1,)), x, rng=jax.random.key(0)))
    np.testing.assert_array_equal(y, y[:, :1].repeat(4, axis=1))
    assert set(np.unique(y)) == {0.0, 2.0}
    assert len({tuple(row) for row in y[:, 0].tolist()}) == 3


def test_integers_are_compared_as_integers() -> None:
    """2^24 + 1 is no float32."""
    a, b = jnp.int32([2**24 + 1, 2**31 - 1, -(2**31)]), jnp.int32([2**24, 2**31 - 2, -(2**31)])
    assert eval_float(ops.Equal(), a, b).tolist() == [False, False, True]
    assert eval_float(ops.Greater(), a, b).tolist() == [True, True, False]
    assert eval_float(ops.Less(), a, b).tolist() == [False, False, False]


@pytest.mark.parametrize(("value", "dtype"), [
    (-1, "bool"), (2, "bool"), (-1, "uint8"), (256, "uint8"), (0.5, "int32"), (2.0**31, "int32"),
])  # fmt: skip
def test_a_number_that_an_exact_operand_is_not(value: float, dtype: str) -> None:
    with pytest.raises(GraphError, match=f"is no {dtype}"):
        exact_number(value, dtype)


@pytest.mark.parametrize(("value", "dtype"), [(0, "bool"), (1, "bool"), (255, "uint8"), (-(2.0**31), "int32")])
def test_a_number_that_an_exact_operand_is(value: float, dtype: str) -> None:
    found = exact_number(value, dtype)
    assert (float(found), str(found.dtype)) == (value, dtype)


@pytest.mark.parametrize(("value", "carries"), [(0.0, True), (1.0, False), (-0.5, False)])
def test_only_zeros_have_every_scale(value: float, carries: bool) -> None:
    """Accumulators of channels with scales of their own can be padded with zeros, and with nothing else."""
    pad = ops.Pad(padding=((0, 0), (1, 1)), mode="constant", value=value)
    assert carries_accumulator(pad, (2, 3), (2, 5)) == carries


@pytest.mark.parametrize("side", [7, 100, 1000])
@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_the_worst_sum_of_a_bin(side: int, ratio: int) -> None:
    """ratio^2 samples of -128, each with weights whose sum is 2^(2 bits), bits being those of a fraction of a pixel."""
    bits = min(NASH_E.grid.coordinate_bits - side.bit_length(), NASH_E.grid.max_fraction_bits)
    op = ops.RoiAlign(output_size=(2, 2), sampling_ratio=ratio, spatial_scale=1.0, channels_last=True)
    x = Operand("int8", np.float32(0.1), (side, side, 4))
    boxes, output = Operand("int16", np.float32(0.25), (4,)), Operand("int8", np.float32(0.1), (2, 2, 4))
    assert lower_op(op, (x, boxes), output, {}, NASH_E).worst_case == ratio * ratio * 128 * 2 ** (2 * bits)


REDUCTIONS = [
    *(cls(axes=(0,)) for cls in (ops.Mean, ops.Sum, ops.ReduceMax, ops.ReduceMin, ops.ReduceAll, ops.ReduceAny)),
    *(cls(axis=0) for cls in (ops.CumSum, ops.ArgMax, ops.ArgMin)),
]


@pytest.mark.parametrize("op", REDUCTIONS, ids=lambda op: type(op).__name__)
def test_reductions_over_the_batch_are_refused(op: ops.Op) -> None:
    dtype = "bool" if isinstance(op, ops.ReduceAll | ops.ReduceAny) else "int8"
    x = Operand(dtype, np.float32(1), (None, 5))
    found = constraints(op, (x,), Operand(dtype, np.float32(1), (5,)), None, NASH_E)
    assert [line for line in found if "over the batch" in line]


def test_quotients_next_to_the_end_of_32_bits() -> None:
    """The 31 bits in front of the point are all kept; beyond them it saturates."""
    x = np.float32([2**31 - 128, 2**30 + 128, -(2**30) - 128, 2**31, -(2**31), 1.5 * 2**31])
    one = np.float32(1)
    wanted = [2**31 - 128, 2**30 + 128, -(2**30) - 128, 2**31 - 1, -(2**31), 2**31 - 1]
    for rounding in ("half_even", "half_up", "floor"):
        assert quantize_exactly(x, one, one, rounding=rounding).tolist() == wanted
    assert quantize_exactly(np.float32([3 * 2.0**30]), np.float32(3), one, rounding="half_even").tolist() == [2**30]
    assert quantize_exactly(np.float32([2.0**31]), np.float32(3), one, rounding="half_even").tolist() == [715827883]


def test_an_equation_without_an_operator_is_the_same_when_it_is_traced_again() -> None:
    """Its parameters are functions, whose addresses differ."""

    def equation() -> OpaqueCall:
        @jax.custom_jvp
        def f(x: jax.Array) -> jax.Array:
            return jnp.sin(x)

        f.defjvps(lambda tangent, _, x: tangent * jnp.cos(x))
        return OpaqueCall(jax.make_jaxpr(f)(1.0).eqns[0])

    first, second = equation(), equation()
    assert first == second
    assert hash(first) == hash(second)
    assert "0x" not in first.text
    (y,) = first(jnp.float32(0.5))
    assert float(y) == float(jnp.sin(jnp.float32(0.5)))
    assert eval_float(ops.Opaque(call=first), jnp.float32(0.5)) == y
    largest = OpaqueCall(jax.make_jaxpr(lambda x: jax.lax.top_k(x, 1))(jnp.float32([2, 5, 3])).eqns[0])
    assert eval_float(ops.Opaque(call=largest), jnp.float32([2, 5, 3])).tolist() == [5]
    assert eval_float(ops.Opaque(call=largest, index=1), jnp.float32([2, 5, 3])).tolist() == [1]


def test_a_number_of_tables_that_the_march_has_not_is_refused_for_int16_alone() -> None:
    """A table of int8 has 256 entries, whatever the options say."""
    op = ops.Sigmoid(table=ops.TableOptions(num_tables=NASH_E.tables.multiple + 1))
    scale = np.float32(0.01)
    with pytest.raises(LoweringError, match=r"num_tables must be a multiple of \d+ from \d+ to \d+, not \d+"):
        table_constants(op, scale, "int16", scale, "int16", NASH_E.tables)
    assert list(table_constants(op, scale, "int8", scale, "int8", NASH_E.tables)) == ["table"]


def test_attention_looks_neither_ahead_nor_where_a_mask_forbids() -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 1, 5, 4))
    allowed = rng.random((1, 5, 5)) < 0.6
    allowed[:, :, 0] = True
    scores = np.where(allowed & np.tri(5, dtype=bool), q @ k.swapaxes(1, 2) / 2, -np.inf)
    wanted = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True) @ v
    op = ops.Attention(causal=True, mask="bool")
    found = eval_float(op, *(jnp.asarray(x, jnp.float32) for x in (q, k, v)), jnp.asarray(allowed))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


REGION = {"output_size": (2, 2), "sampling_ratio": 2, "spatial_scale": 1.0}
AVERAGES = [
    (ops.RoiAlign(**REGION), (2, 3, 8, 8), (3, 4)),
    (ops.GridSample(), (2, 3, 8, 8), (2, 5, 5, 2)),
    (ops.Warp(), (2, 3, 8, 8), (2, 2, 8, 8)),
    (ops.Interpolate(size=(5, 11), mode="bilinear"), (2, 3, 8, 8)),
]


@pytest.mark.parametrize(("op", "shapes"), [(op, shapes) for op, *shapes in AVERAGES], ids=lambda v: type(v).__name__)
def test_averages_that_keep_their_scale_are_on_its_grid(op: ops.Op, shapes: list[tuple[int, ...]]) -> None:
    """So fake-quant has the numbers of the integers, where no quantizer follows."""
    scale = np.float32(2.0**-5)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-128, 128, shapes[0]) * scale, jnp.float32)
    others = [jnp.asarray(rng.uniform(0.0, 0.9, shape), jnp.float32) for shape in shapes[1:]]
    image = Operand("int8", scale, shapes[0])
    inputs = [image, *(Operand("int16", np.float32(2.0**-10), shape) for shape in shapes[1:])]
    exact = np.asarray(eval_float(op, x, *others)) / scale
    found = np.asarray(eval_on_grid(op, inputs, image, NASH_E, x, *others)) / scale
    np.testing.assert_array_equal(found, np.rint(found))
    assert np.abs(exact - np.rint(exact)).max() > 0.1
    assert np.abs(found - exact).max() <= 0.5


def test_operands_of_two_dtypes_are_compared_as_real_numbers() -> None:
    a, b = jnp.float32([0.5, -1.0, 0.25]), jnp.float32([0.40625, 2.0, 0.25])
    inputs = [Operand("int8", np.float32(0.25), (3,)), Operand("int16", np.float32(2.0**-10), (3,))]
    output = Operand("int16", np.float32(2.0**-10), (3,))
    assert eval_on_grid(ops.Maximum(), inputs, output, NASH_E, a, b).tolist() == [0.5, 2.0, 0.25]
    mask = Operand("bool", np.float32(1), (3,))
    assert eval_on_grid(ops.Greater(), inputs, mask, NASH_E, a, b).tolist() == [True, False, False]


def test_a_slice_of_a_value_without_axes() -> None:
    assert float(eval_float(ops.Slice(starts=(), stops=(), steps=()), jnp.float32(3))) == 3


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_nearest_pixels_whose_coordinates_are_integers(mode: str) -> None:
    """floor((k + offset) n / out) of exact fractions, for a march that counts in fixed point."""
    form = NASH_E.with_fields({"resize.nearest_index": "fixed"}).resize
    offset = Fraction(1, 2) if mode == "nearest-exact" else Fraction(0)
    for n in range(1, 49):
        for out in range(1, 49):
            (steps,) = _all_steps(ops.Interpolate(size=(out,), mode=mode), (n,), form)
            wanted = [floor((k + offset) * n / out) for k in range(out)]
            assert (steps.at() >> steps.bits).tolist() == wanted, (n, out)


@pytest.mark.parametrize(
    ("y", "uv"), [((4, 1), (2, 2)), ((4, 4, 1), (2, 2)), ((4, 4, 2), (2, 2, 2)), ((4, 4, 1), (2, 2, 1))]
)
def test_planes_of_other_forms_are_refused(y: tuple[int, ...], uv: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="NV12 planes are y"):
        join_planes(jnp.zeros(y, jnp.uint8), jnp.zeros(uv, jnp.uint8))


def test_a_rounding_to_one_side_may_be_half_a_step_further_off() -> None:
    """Of the convolution that an insertion puts in front: what its test allows."""
    weight, bias = np.array([[0.5, 0.25, 0.125]]), np.array([0.0])
    errors = []
    for rounding in ("half_up", "floor", "toward_zero"):
        march = NASH_E.with_fields({"rescale.post_rounding": rounding})
        errors.append(_quantized_conv(weight, bias, Operand("int8", np.float32(0.5), (None, 4, 4, 1)), march)[1])
    np.testing.assert_allclose(np.diff(errors), [0.5, 0.0])


@pytest.mark.parametrize("k", [0, 4])
def test_no_elements_and_more_than_there_are_cannot_be_taken(k: int) -> None:
    with pytest.raises(GraphError, match=f"k={k} elements of an axis of 3"):
        eval_float(ops.TopK(axis=1, k=k), jnp.float32([[1, 2, 3]]))


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("products", [4, 2**18])
def test_each_column_of_an_accumulator_says_whether_it_can_leave_32_bits(is_transposed: bool, products: int) -> None:
    """2^18 products of -128 and -128 reach 2^32; a result of int8 has no such columns."""
    a = Operand("int8", np.float32(0.1), (None, 3, products))
    b = Operand("int8", np.float32(0.1), (None, 5, products) if is_transposed else (None, products, 5))
    op = ops.MatMul(transpose_b=is_transposed)
    wide = lower_op(op, (a, b), Operand("int32", np.float32(0.01), (None, 3, 5)), {}, NASH_E)
    assert np.asarray(wide.saturating).tolist() == [products > 4] * 5
    assert wide.worst_case == products * 2**14
    narrow = lower_op(op, (a, b), Operand("int8", np.float32(0.01), (None, 3, 5)), {}, NASH_E)
    assert narrow.saturating is None


@pytest.mark.parametrize(("addends", "holds"), [(0, "pair"), (1, "pair"), (2, "limbs")])
def test_what_holds_a_sum_whose_weights_are_not_known(addends: int, holds: str) -> None:
    """An addend of int16 times a multiplier of 15 bits reaches 2^30, and 576 products of bytes 2^23 more."""
    one = np.float32(1)
    weight = jnp.zeros((3, 3, 64, 8), jnp.int8)
    operands = [Operand("int16", one, (None, 4, 4, 8))] * addends
    assert _accumulator(None, Operand("int8", one, (None, 4, 4, 64)), operands, weight, NASH_E) == holds
