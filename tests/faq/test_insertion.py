"""Rows 37 and 38: operators in a finished program, where no statistics are needed, and refused elsewhere."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant import ops

INT8 = {"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8())}
X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 4, 6)), jnp.float32)


def lowered(rules: dict) -> jq.Program:
    rng = np.random.default_rng(1)
    conv = ops.Conv(strides=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1))
    params = {f"{n}.weight": jnp.asarray(rng.normal(size=(4, c, 3, 3)), jnp.float32) for n, c in (("a", 3), ("b", 4))}
    nodes = (
        jq.Node("a", conv, ("x",), jq.FrozenMap({"weight": "a.weight"})),
        jq.Node("act", ops.Sigmoid(), ("a",)),
        jq.Node("b", conv, ("act",), jq.FrozenMap({"weight": "b.weight"})),
    )
    graph = jq.Graph((jq.Input("x", (None, 3, 4, 6)),), nodes, ("b",))
    model = jq.prepare(graph, params, jq.QConfig(INT8 | rules), target="S100")
    return jq.lower(jq.calibrate(model, [X]))


@pytest.fixture(scope="module")
def narrow() -> jq.Program:
    """Its output is int8."""
    return lowered({"b": jq.Policy(output=jq.int8())})


@pytest.fixture(scope="module")
def wide() -> jq.Program:
    """Its output is an accumulator, with a scale for each channel."""
    return lowered({})


def integers(program: jq.Program, x: jnp.ndarray = X) -> np.ndarray:
    scale = np.asarray(program.scales["x"])
    raw = jnp.asarray(np.clip(np.rint(np.asarray(x) / scale), -128, 127), jnp.int8)
    return np.asarray(jq.run(program, raw, raw=True)).astype(np.int64)


def test_row_37_the_position_of_the_largest_element(narrow: jq.Program, tmp_path) -> None:
    found = jq.program.insert_op_behind(narrow, "b", ops.ArgMax(axis=1))
    np.testing.assert_array_equal(integers(found), integers(narrow).argmax(1))
    np.testing.assert_array_equal(jq.run(found, X), jq.reference.run(found, np.asarray(X))[0][0])
    jq.save(tmp_path / "p.jq", found)
    np.testing.assert_array_equal(integers(jq.load(tmp_path / "p.jq")), integers(found))
    assert narrow.graph.outputs != found.graph.outputs


def test_row_37_permutations_and_reshapes_of_an_accumulator_keep_its_scales(wide: jq.Program) -> None:
    first = jq.program.insert_op_behind(wide, "b", ops.Permute(axes=(0, 2, 3, 1)))
    both = jq.program.insert_op_behind(first, first.graph.outputs[0], ops.Reshape(shape=(-1, 24 * 4)))
    want = np.moveaxis(np.asarray(jq.run(wide, X)), 1, -1)
    np.testing.assert_array_equal(jq.run(first, X), want)
    np.testing.assert_array_equal(jq.run(both, X), want.reshape(3, 96))
    np.testing.assert_array_equal(integers(both), np.moveaxis(integers(wide), 1, -1).reshape(3, 96))


def test_row_37_a_resize_behind_an_output(narrow: jq.Program) -> None:
    found = jq.program.insert_op_behind(narrow, "b", ops.Interpolate(size=(8, 12), mode="nearest"))
    np.testing.assert_array_equal(integers(found), integers(narrow).repeat(2, 2).repeat(2, 3))
    smooth = jq.program.insert_op_behind(narrow, "b", ops.Interpolate(size=(7, 9), mode="bilinear"))
    np.testing.assert_array_equal(integers(smooth), jq.reference.run(smooth, np.asarray(X))[1][smooth.graph.outputs[0]])


def test_row_37_a_format_that_the_caller_knows() -> None:
    """int16 to int8 at a scale that is given: real values rounded to its grid, an LSB for the mantissa."""
    program = lowered({"b": jq.Policy(output=jq.int16())})
    real = np.asarray(jq.run(program, X), np.float64)
    scale = float(np.abs(real).max()) / 127
    output = ops.Operand("int8", jnp.float32(scale), (None, 4, 4, 6))
    found = jq.program.insert_op_behind(program, "b", ops.Requantize(), output=output)
    assert np.abs(integers(found) - np.clip(np.rint(real / scale), -128, 127)).max() <= 1
    np.testing.assert_array_equal(integers(found), jq.reference.run(found, np.asarray(X))[1][found.graph.outputs[0]])


def test_row_37_at_an_inner_value_where_nothing_changes_for_its_readers(narrow: jq.Program) -> None:
    found = jq.program.insert_op_behind(narrow, "act", ops.Flip(axes=(2,)))
    _, raw = jq.reference.run(found, np.asarray(X))
    np.testing.assert_array_equal(raw["act.flip"], np.flip(raw["act"], 2))
    np.testing.assert_array_equal(integers(found), raw[found.graph.outputs[0]])
    assert found.graph.by_name["b"].inputs[0] == "act.flip"


def test_row_38_an_inner_value_whose_readers_were_calibrated_for_another_one(narrow: jq.Program) -> None:
    with pytest.raises(
        jq.LoweringError, match=r"Permute at the inner value 'act' makes int8 .*and b was calibrated for"
    ):
        jq.program.insert_op_behind(narrow, "act", ops.Permute(axes=(0, 3, 1, 2)))
    with pytest.raises(jq.LoweringError, match=r"Scale at the inner value 'act'.*scale .*was calibrated for"):
        jq.program.insert_op_behind(narrow, "act", ops.Scale(factor=2.0))


@pytest.mark.parametrize("op", [ops.Cat(axis=1), ops.Add(), ops.Sigmoid(), ops.Linear()])
def test_row_38_what_needs_statistics_is_refused(narrow: jq.Program, op: jq.ops.Op) -> None:
    for insert, value in ((jq.program.insert_op_behind, "b"), (jq.program.insert_op, "x")):
        with pytest.raises(jq.LoweringError, match=f"{type(op).__name__} cannot be inserted after calibration"):
            insert(narrow, value, op)


def test_row_38_channels_with_scales_of_their_own_are_not_compared(wide: jq.Program) -> None:
    for op in (ops.ArgMax(axis=1), ops.Interpolate(size=(8, 12), mode="bilinear")):
        with pytest.raises(jq.LoweringError, match=r"channels have scales of their own, and .* compares or mixes them"):
            jq.program.insert_op_behind(wide, "b", op)


def test_row_38_no_such_value(narrow: jq.Program) -> None:
    with pytest.raises(jq.InputError, match="no node 'ack'; did you mean 'act'"):
        jq.program.insert_op_behind(narrow, "ack", ops.Flip(axes=(2,)))
    with pytest.raises(jq.InputError, match=r"no node 'x'; before an input goes jq\.program\.insert_op"):
        jq.program.insert_op_behind(narrow, "x", ops.Flip(axes=(2,)))
    with pytest.raises(jq.InputError, match="does not take 'b"):
        jq.program.insert_op_behind(narrow, "b", ops.Permute(axes=(0, 1)))


# -- dequantize: real numbers at the end of a program


@pytest.mark.parametrize("which", ["narrow", "wide"])
def test_row_37_dequantize_makes_an_output_real_with_raw_as_well(which: str, request, tmp_path) -> None:
    """int8 with one scale, and an accumulator with one for each channel: integers times scale, in numpy float32."""
    program: jq.Program = request.getfixturevalue(which)
    found = jq.program.insert_op_behind(program, "b", ops.Dequantize())
    (name,), (before,) = found.graph.outputs, program.graph.outputs
    want = integers(program).astype(np.float32) * np.asarray(program.scales[before], np.float32)
    real = np.asarray(jq.run(found, X))
    assert real.dtype == np.float32
    np.testing.assert_array_equal(real, want)
    np.testing.assert_array_equal(jq.run(program, X), want)
    raw = jnp.asarray(np.clip(np.rint(np.asarray(X) / np.asarray(program.scales["x"])), -128, 127), jnp.int8)
    np.testing.assert_array_equal(jq.run(found, raw, raw=True), want)
    # the definition, a file, and StableHLO say the same
    (reference,), values = jq.reference.run(found, np.asarray(X))
    np.testing.assert_array_equal(reference, want)
    np.testing.assert_array_equal(values[before], integers(program))
    np.testing.assert_array_equal(jq.reference.run(found, np.asarray(raw), raw=True)[0][0], want)
    jq.save(tmp_path / "p.jq", found)
    np.testing.assert_array_equal(jq.run(jq.load(tmp_path / "p.jq"), X), want)
    jq.to_stablehlo(tmp_path / "p.hlo", found, raw=True)
    np.testing.assert_array_equal(jq.from_stablehlo(tmp_path / "p.hlo")(raw), want)
    # formats and scale are seen
    smallest = f"{np.asarray(program.scales[before]).min():.4g}"
    assert found.formats[name].output == "float32"
    assert name not in found.scales
    assert f"outputs: {name} (real: {before} times {smallest}" in str(found)
    assert "-> float32" in str(found)


def test_row_37_dequantize_of_one_of_two_outputs_behind_other_operators(wide: jq.Program) -> None:
    moved = jq.program.insert_op_behind(wide, "b", ops.Permute(axes=(0, 2, 3, 1)))
    found = jq.program.insert_op_behind(moved, moved.graph.outputs[0], ops.Dequantize())
    np.testing.assert_array_equal(np.asarray(jq.run(found, X)), np.moveaxis(np.asarray(jq.run(wide, X)), 1, -1))
    with pytest.raises(
        jq.LoweringError, match=r"is float32 behind a Dequantize.*; insert the operator at 'b.*permute' f"
    ):
        jq.program.insert_op_behind(found, found.graph.outputs[0], ops.ArgMax(axis=1))


def test_row_38_dequantize_of_what_has_no_scale_or_is_read_as_integers(narrow: jq.Program) -> None:
    index = jq.program.insert_op_behind(narrow, "b", ops.ArgMax(axis=1))
    with pytest.raises(jq.LoweringError, match=r"behind 'b.*argmax': it is int32 without a scale \(an index"):
        jq.program.insert_op_behind(index, index.graph.outputs[0], ops.Dequantize())
    with pytest.raises(jq.LoweringError, match=r"at the inner value 'act': b reads integers. Outputs are b"):
        jq.program.insert_op_behind(narrow, "act", ops.Dequantize())
    with pytest.raises(jq.LoweringError, match=r"last node behind an output .*DeQuantStub ends what is quantized"):
        jq.program.insert_op(narrow, "x", ops.Dequantize())


def test_row_38_dequantize_in_a_float_graph_is_refused_by_prepare() -> None:
    nodes = (jq.Node("a", ops.Relu(), ("x",)), jq.Node("y", ops.Dequantize(), ("a",)))
    graph = jq.Graph((jq.Input("x", (None, 4)),), nodes, ("y",))
    with pytest.raises(jq.QConfigError, match=r"y \(Dequantize\): .*DeQuantStub ends what is quantized"):
        jq.prepare(graph, {}, jq.QConfig(INT8), target="nash-e")


def test_row_38_a_file_with_another_scale_than_that_of_the_value(narrow: jq.Program, tmp_path) -> None:
    found = jq.program.insert_op_behind(narrow, "b", ops.Dequantize())
    (name,) = found.graph.outputs
    wrong = replace(found, constants={**found.constants, name: {"scale": jnp.float32(2.0)}})
    jq.save(tmp_path / "p.jq", wrong)
    with pytest.raises(jq.FormatError, match=r"makes real numbers by another scale than that of its operand"):
        jq.load(tmp_path / "p.jq")
