"""Table functions: float against torch, integers against the reference and against float64, on every input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conformance.tables_cases import FUNCTIONS, TableCase, fast, inputs_of, lowered, measure, scales_of
from support.sealed import resealed_text

import jquant as jq
from jquant import ops
from jquant.graph.serialize import graph_from_json, graph_to_json
from jquant.ops.lookup import table_constants, table_integers, traits
from jquant.reference import tables as reference

OPTIONS = (
    ops.TableOptions(num_tables=126, placement="curvature", symmetric=False),
    ops.TableOptions(placement="balanced", input_range=(-1.5, 2.0), left_slope=0.25),
    ops.TableOptions(placement=(-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0), symmetric=False, right_slope=0.0),
)
every_function = pytest.mark.parametrize("case", FUNCTIONS, ids=lambda case: case.name)

FORM = jq.targets.NASH_E.tables


def sampled(case: TableCase) -> np.ndarray:
    """Real x well within the domain, away from kinks."""
    low, high = max(case.within[0], -case.reach), min(case.within[1], case.reach)
    return np.linspace(low, high, 203)[1:-1].astype(np.float32)


def in_torch(case: TableCase, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The function and its derivative in float64."""
    real = torch.from_numpy(x.astype(np.float64)).requires_grad_()
    y = case.exact(real)
    (slope,) = torch.autograd.grad(y.sum(), real)
    return y.detach().numpy(), slope.numpy()


def graph_of(op: jq.ops.Op) -> jq.Graph:
    return jq.Graph((jq.Input("x", (None, 8)),), (jq.Node("y", op, ("x",)),), ("y",))


def program_of(op: jq.ops.Op, dtype: str = "int16") -> jq.Program:
    spec = {"int8": jq.int8, "int16": jq.int16}[dtype]
    rules = {"x": jq.Policy(output=spec(scale=3e-4)), "y": jq.Policy(output=spec(scale=2e-4))}
    model = jq.prepare(graph_of(op), {}, jq.QConfig(rules), target=jq.targets.NASH_E)
    return jq.lower(model)


def test_every_function_is_measured() -> None:
    assert {type(case.op) for case in FUNCTIONS} == set(ops.TABLE_FUNCTIONS)
    assert all(jq.reference.rule_of(case.op) is not None for case in FUNCTIONS)


@every_function
def test_float_and_gradient_are_those_of_torch(case: TableCase) -> None:
    x = sampled(case)
    y, slope = in_torch(case, x)
    ok = np.isfinite(y) & np.isfinite(slope)
    made = jax.vmap(jax.value_and_grad(lambda v: ops.eval_float(case.op, v)))(jnp.asarray(x))
    assert made[0].dtype == jnp.float32
    assert ok.any()
    np.testing.assert_allclose(made[0][ok], y[ok], rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(made[1][ok], slope[ok], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("formats", [("int8", "int8"), ("int16", "int16")], ids=" to ".join)
@every_function
def test_every_input_is_exact_and_near_the_function(case: TableCase, formats: tuple[str, str]) -> None:
    found = measure(case, *formats)
    assert found.mismatches == 0
    assert found.max_error <= found.bound


@pytest.mark.parametrize("case", FUNCTIONS[::9], ids=lambda case: case.name)
def test_entries_are_the_function_at_the_points_of_the_specification(case: TableCase) -> None:
    op = dataclasses.replace(case.op, **{"single_period": False} if hasattr(case.op, "single_period") else {})
    s_x, s_y = scales_of(case, "int16", "int16")
    made = lowered(op, s_x, "int16", s_y, "int16")
    points = reference.entry_points(np.asarray(made["boundaries"]), s_x, FORM).clip(traits(op).low, traits(op).high)
    values = dataclasses.replace(case, op=op).exact(torch.from_numpy(points)).numpy()
    np.testing.assert_array_equal(made["entries"], reference.entries(values, s_y, "int16", FORM))
    for (a, b), line in zip(
        np.stack([made["boundaries"][:-1], made["boundaries"][1:]], 1), made["lines"][1:], strict=False
    ):
        assert tuple(line.tolist()) == reference.index_line(int(a), int(b), FORM)


@pytest.mark.parametrize(
    ("op", "sign"),
    [
        *((op, -1) for op in (ops.Tanh(), ops.Asin(), ops.Reciprocal(), ops.Pow(exponent=3.0), ops.Sin())),
        *((op, 1) for op in (ops.Cosh(), ops.Cos(), ops.Pow(exponent=-2.0))),
    ],
    ids=lambda v: type(v).__name__,
)
def test_symmetry_is_exact(op: jq.ops.Op, sign: int) -> None:
    constants = lowered(op, 4e-4, "int16", 1e-4, "int16")
    x = np.arange(1, 32768)
    right, left = (fast(op, v, "int16", "int16", constants) for v in (x, -x))
    np.testing.assert_array_equal(left, np.clip(sign * right, -32768, 32767))
    lone = dataclasses.replace(op, table=dataclasses.replace(op.table, symmetric=False))
    assert lowered(lone, 4e-4, "int16", 1e-4, "int16")["mirror"] == 0


def test_given_points_are_the_boundaries_and_slopes_continue_them() -> None:
    points = (-2.0, -1.5, -1.0, 0.0, 0.5, 1.0, 2.0)
    op = ops.Exp(table=ops.TableOptions(placement=points, left_slope=0.0, right_slope=-2.0))
    constants = lowered(op, 2.0**-12, "int16", 2.0**-11, "int16")
    assert constants["boundaries"].tolist() == [int(p * 2**12) for p in points]
    x = np.array([-32768, -8193, -8192, 8191, 8192, 8193, 9192])
    y = fast(op, x, "int16", "int16", constants)
    at_ends = np.rint(np.exp([-2.0, 2.0]) * 2**11)
    assert y[0] == y[1] == y[2] == at_ends[0]
    np.testing.assert_allclose(y[4:] - at_ends[1], [0, -1, -1000], atol=1)  # one LSB of x is half a LSB of y


def test_more_tables_are_nearer() -> None:
    errors = []
    for num_tables in (6, 24, 126):
        op = ops.Tanh(table=ops.TableOptions(num_tables=num_tables, placement="evenly", symmetric=False))
        case = TableCase(op, torch.tanh, 8.0, 20)
        assert lowered(op, 1e-3, "int16", 1e-3, "int16")["entries"].shape == (num_tables, 64)
        errors.append(measure(case, "int16", "int16").max_error)
    assert errors[0] > 2 * errors[1] > 2 * errors[2]


@pytest.mark.parametrize("op", [ops.Sin(), ops.Cos()])
def test_one_period_is_enough_for_a_wide_range(op: jq.ops.Op) -> None:
    exact = torch.sin if isinstance(op, ops.Sin) else torch.cos
    assert measure(TableCase(op, exact, 500.0, 4.0), "int16", "int16").max_error < 4.0
    wide = dataclasses.replace(op, single_period=False)
    assert measure(TableCase(wide, exact, 500.0, 4.0), "int16", "int16").max_error > 5_000


def test_what_is_not_finite_saturates() -> None:
    def ends(op: jq.ops.Op, *x: float, dtype: str) -> list[int]:
        constants = lowered(op, 2.0**-12, dtype, 2.0**-12, dtype)
        return fast(op, np.array([round(v * 2**12) for v in x]), dtype, dtype, constants).tolist()

    assert ends(ops.Log(), 0.0, -1.0, -7.0, dtype="int16") == [-32768] * 3
    assert ends(ops.Reciprocal(), 0.0, 1 / 4096, -1 / 4096, dtype="int16") == [32767, 32767, -32767]  # odd
    assert ends(ops.Rsqrt(), 0.0, -1.0, dtype="int16") == [32767] * 2
    assert ends(ops.Sqrt(), 0.0, -1.0, -8.0, dtype="int16") == [0] * 3
    assert ends(ops.Acosh(), 1.0, 0.0, -8.0, dtype="int16") == [0] * 3
    assert ends(ops.Atanh(), 1.5, -1.5, dtype="int16") == [32767, -32767]
    assert ends(ops.Pow(exponent=0.5), -3.0, dtype="int16") == [0]
    assert ends(ops.Log(), 0.0, -1 / 4096, dtype="int8") == [-128] * 2
    assert ends(ops.Asin(), 7.0, dtype="int16") == [round(np.pi / 2 * 2**12)]


@pytest.mark.parametrize(
    "op", [ops.Gelu(), ops.Rsqrt(epsilon=0.01), ops.Sin(), ops.Selu(), *(ops.Tanh(table=o) for o in OPTIONS[::2])]
)
def test_the_same_bits_inside_jit(op: jq.ops.Op) -> None:
    for x_dtype in ("int8", "int16"):

        def build(x_scale: jax.Array, y_scale: jax.Array, x_dtype: str = x_dtype) -> dict:
            return table_constants(op, x_scale, x_dtype, y_scale, "int16", FORM)

        scales = jnp.float32(2.3e-4), jnp.float32(4.5e-5)
        outside, inside = build(*scales), jax.jit(build)(*scales)
        assert outside.keys() == inside.keys()
        for role, constant in outside.items():
            np.testing.assert_array_equal(constant, inside[role], err_msg=role)


def test_no_float_enters_the_integers() -> None:
    for op in (ops.Sin(), ops.Exp()):
        constants = program_of(op).constants["y"]
        text = str(
            jax.make_jaxpr(lambda x, c: table_integers(x, "int16", FORM, **c))(jnp.zeros(8, jnp.int16), constants)
        )
        assert "f32" not in text
        assert "i16" in text


@pytest.mark.parametrize("op", [ops.Sin(), ops.Gelu(approximate="tanh"), *(ops.Tanh(table=o) for o in OPTIONS[1:])])
def test_saved_and_loaded(op: jq.ops.Op, tmp_path) -> None:
    assert graph_from_json(graph_to_json(graph_of(op))) == graph_of(op)
    program = program_of(op)
    jq.save(tmp_path / "table.jq", program)
    loaded = jq.load(tmp_path / "table.jq")
    x = jnp.linspace(-9, 9, 64).reshape(8, 8)
    assert loaded.graph == program.graph
    np.testing.assert_array_equal(jq.run(loaded, x), jq.run(program, x))
    np.testing.assert_array_equal(jq.run(program, x), jq.reference.run(program, np.asarray(x))[0][0])


def test_options_from_a_damaged_file_are_a_format_error() -> None:
    text = resealed_text(graph_to_json(graph_of(ops.Tanh())).replace('"num_tables": null', '"num_tables": 0'))
    with pytest.raises(jq.FormatError, match="num_tables must be at least 1, not 0"):
        graph_from_json(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tables": 0}, "not 0"),
        ({"placement": "random"}, "'evenly', 'curvature', 'balanced', 'geometric', or a tuple"),
        ({"placement": (0.0,)}, "placement gives 1 points"),
        ({"num_tables": 6, "placement": (0.0, 1.0)}, "6 tables have 7 boundaries; placement gives 2"),
        ({"placement": (0.0, 1.0, 2.0, 2.0, 3.0, 4.0, 5.0)}, "strictly increasing"),
        ({"input_range": (1.0, 1.0)}, "low < high"),
        ({"left_slope": float("nan")}, "must be finite"),
    ],
)
def test_options_that_make_no_table_are_refused(options: dict, message: str) -> None:
    with pytest.raises(jq.QConfigError, match=message):
        ops.TableOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tables": 8}, "multiple of 6 from 6 to 126, not 8"),
        ({"num_tables": 132}, "from 6 to 126, not 132"),
        ({"placement": (0.0, 1.0)}, "not 1"),
    ],
)
def test_numbers_of_tables_that_the_march_has_not_are_refused(options: dict, message: str) -> None:
    graph = graph_of(ops.Tanh(table=ops.TableOptions(**options)))
    with pytest.raises(jq.QConfigError, match=message):
        jq.prepare(graph, {}, jq.QConfig({"*": jq.Policy(output=jq.int16())}), target="nash-e")


def test_options_are_short_in_a_printed_graph() -> None:
    assert "table=least_error" in str(graph_of(ops.Tanh()))
    assert str(OPTIONS[1]) == "balanced on [-1.5, 2] left slope 0.25"
    assert str(OPTIONS[2]) == "at given points not mirrored right slope 0"


def test_what_has_no_table_is_refused() -> None:
    with pytest.raises(jq.LoweringError, match="tables take int8 or int16, and the input is int32"):
        lowered(ops.Exp(), 1.0, "int32", 1.0, "int8")
    with pytest.raises(jq.LoweringError, match="tables give int8 or int16, and the output is int32"):
        lowered(ops.Exp(), 1.0, "int8", 1.0, "int32")
    points = (-1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0)
    with pytest.raises(jq.LoweringError, match="the function is odd: its tables cover"):
        lowered(ops.Tanh(table=ops.TableOptions(placement=points)), 1.0, "int16", 1.0, "int8")


@pytest.mark.parametrize("formats", [("int8", "int16"), ("int16", "int8")])
def test_a_table_in_float_is_the_table(formats: tuple[str, str]) -> None:
    op, (x_dtype, y_dtype), s_x, s_y = ops.Silu(), formats, np.float32(1e-3), np.float32(0.02)
    x = inputs_of(x_dtype)
    y = jax.jit(lambda v, a, b: ops.table_float(op, v, a, x_dtype, b, y_dtype, target=jq.targets.NASH_E))(
        jnp.asarray(x * s_x), s_x, s_y
    )
    expected = fast(op, x, x_dtype, y_dtype, lowered(op, s_x, x_dtype, s_y, y_dtype))
    np.testing.assert_array_equal(y, expected.astype(np.float32) * s_y)


def test_a_function_of_ones_own() -> None:
    @ops.as_table
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Square(jq.ops.Op):
        table: ops.TableOptions = OPTIONS[0]

    jq.ops.eval_float.register(Square)(lambda op, x: x * x)
    case = TableCase(Square(), lambda x: x * x, 4.0, 0.0)
    s_x, s_y = scales_of(case, "int16", "int16")
    y = fast(Square(), x := inputs_of("int16"), "int16", "int16", lowered(Square(), s_x, "int16", s_y, "int16"))
    np.testing.assert_allclose(y, np.clip((x * np.float64(s_x)) ** 2 / s_y, -32768, 32767), atol=4)


def test_training_through_a_table_function_inside_jit() -> None:
    graph = graph_of(ops.Silu())
    config = jq.QConfig({"*": jq.Policy(output=jq.int16(quantizer=jq.lsq))})
    model = jq.prepare(graph, {}, config, target=jq.targets.NASH_E)
    x = jnp.linspace(-3, 3, 64).reshape(8, 8)
    model = jq.calibrate(model, [x])
    grads = jax.grad(lambda q: jnp.sum(jq.apply(model.replace(qparams=q), x, mode="bit_true") ** 2))(model.qparams)
    assert all(np.isfinite(g).all() for g in grads.values())
    exact = jq.apply(model, x, mode="bit_true")
    np.testing.assert_array_equal(exact, jq.run(jq.lower(model), x))
