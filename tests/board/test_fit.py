"""Fits to boards that the reference plays: what can be told is decided, nothing wrong is, and noise is named."""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from support.board import board_of, dumps_of, hidden, played

import jquant as jq
from jquant.board.fitting import Fit, fit_asked
from jquant.board.probes.layers import biases, numbers, quantization
from jquant.board.probes.rescale import large_ratios, mantissas, powers_of_two
from jquant.board.questions import Asked

NUMBERS = [Asked(probe) for probe in (quantization(), numbers(), biases())]
RESIZE = [Asked(probe) for probe in jq.board.probe(["resize"])]


def assert_right(found: Fit, march: jq.Target) -> None:
    """No value is named that is not the march's, and none that explains all is left out."""
    for field, of in found.fields.items():
        true = jq.targets.value_of(march, field)
        if of.state == "decided":
            assert of.values == (true,), field
        elif of.state == "undecided":
            assert true in of.values, field
        else:
            assert of.state == "not asked", field


def fitted(asked: list[Asked], march: jq.Target) -> Fit:
    return fit_asked(asked, board_of(march, [one.probe for one in asked]))


@pytest.mark.parametrize("seed", range(10))
def test_roundings_of_numbers_are_decided(seed: int) -> None:
    march = hidden(seed)
    found = fitted(NUMBERS, march)
    assert_right(found, march)
    assert found.of("decided") == ("quantize_rounding", "number_rounding", "bias_rounding")
    assert found.suspects == ()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_value_that_is_left_has_a_march_with_the_same_dumps(seed: int) -> None:
    """Played by the reference once more: no dump tells the values of an undecided field apart."""
    march, asked = hidden(seed), [*NUMBERS, *RESIZE]
    found, witnesses = fitted(asked, march), 0
    board = {one.probe.name: played(one.probe, march) for one in asked}
    for field in found.of("undecided"):
        assert not found.fields[field].probes
        for value in found.fields[field].values[:3]:
            witness = found.march_with(field, value)
            assert jq.targets.value_of(witness, field) == value
            for one in asked:
                for name, dumped in played(one.probe, witness).items():
                    np.testing.assert_array_equal(dumped, board[one.probe.name][name], err_msg=f"{field} {value}")
            witnesses += 1
    assert witnesses
    with pytest.raises(jq.InputError, match="quantize_rounding is not left with 'sideways'"):
        found.march_with("quantize_rounding", "sideways")


@pytest.mark.parametrize("seed", range(3))
def test_resizes_are_fitted(seed: int) -> None:
    """What is left explains every dump, whichever of the values is taken."""
    march = hidden(seed)
    found = fitted(RESIZE, march)
    assert_right(found, march)
    assert len(found.of("undecided")) < 5 or march.resize.weight_bits == 0
    for probe in (one.probe for one in RESIZE):
        wanted = played(probe, march)
        for name, value in played(probe, found.target).items():
            np.testing.assert_array_equal(value, wanted[name], err_msg=f"{probe.name}/{name}")


def test_values_that_make_no_march_say_nothing_of_others() -> None:
    """Weights of more bits than the steps have: the first rows that are tried are none, and those behind them are."""
    march = hidden(0).with_fields({"resize.step_bits": 16, "resize.weight_bits": 14})
    found = fitted([Asked(probe) for probe in jq.board.probe(["resize"])], march)
    assert_right(found, march)
    assert found.suspects == ()
    assert found.fields["resize.weight_bits"].values == (14,)


def test_a_row_is_fitted() -> None:
    """Of a concatenation: the mantissa and its shift, with evidence that says which integer excludes a value."""
    asked = [Asked(probe) for probe in (powers_of_two(), mantissas(), large_ratios())]
    march = jq.targets.NASH_E.with_fields({"rescale.post_rounding": "half_even"})
    found = fitted(asked, march)
    assert_right(found, march)
    decided = {"rescale.mantissa_bits", "rescale.mantissa_overflow", "rescale.ratio_bits", "rescale.post_rounding"}
    assert decided <= set(found.of("decided"))
    assert found.fields["rescale.mantissa_rounding"].values == ("half_up", "half_away")  # mantissas are positive
    assert found.fields["grid.rounding"].state == "not asked"
    for of in found.fields.values():
        if of.state in ("decided", "undecided"):
            assert {e.value for e in of.evidence} == set(jq.board.domains()[of.field]) - set(of.values)
    for proof in found.fields["rescale.post_rounding"].evidence:
        dumped = played(next(one.probe for one in asked if one.probe.name == proof.where[0]), march)[proof.where[1]]
        assert dumped[proof.index] == proof.wanted != proof.found
    assert golden_row(found.target) == {"bias": 0, "pre": 0, "mantissa": 32308, "post": 16}


def golden_row(march: jq.Target) -> dict[str, int]:
    """Of the documented row [0, 1, 0, 0, 32308, 16] what there is without an addend, for which it has 1 and 0."""
    conv = jq.ops.Conv(strides=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1))
    node = jq.Node("y", conv, ("x",), jq.FrozenMap({"weight": "w"}))
    graph = jq.Graph((jq.Input("x", (None, 1, 2, 2)),), (node,), ("y",))
    formats = {"output": jq.int8(scale=0.20284509658813477), "weight": jq.int8(axis="out")}
    config = jq.QConfig({"x": jq.Policy(output=jq.int8(scale=0.1)), "y": jq.Policy(**formats)})
    model = jq.prepare(graph, {"w": jnp.full((1, 1, 1, 1), 3.0)}, config, target=march)
    constants = jq.lower(model.replace(qparams={"w": jnp.ones(1)})).constants["y"]
    return {role: int(constants[role].ravel()[0]) for role in ("bias", "pre", "mantissa", "post")}


def test_a_march_that_is_written_is_the_one_that_is_loaded(tmp_path: Path) -> None:
    march = hidden(3)
    found = fitted(NUMBERS, march)
    found.dump(tmp_path / "mine.toml", "mine")
    loaded = jq.targets.load(tmp_path / "mine.toml")
    assert loaded.name == "mine"
    assert loaded.fingerprint == found.target.fingerprint
    assert loaded.bias_rounding == march.bias_rounding


# ---------------------------------------------------------------------------------------------------------------------
# Noise


@pytest.mark.parametrize("seed", range(5))
def test_swapped_names_are_found(seed: int) -> None:
    march = hidden(seed)
    values = {one.probe.name: played(one.probe, march) for one in NUMBERS}
    pads = values["numbers"]
    pads["pad_1"], pads["pad_16"] = pads["pad_16"], pads["pad_1"]
    found = fit_asked(NUMBERS, {name: dumps_of(made) for name, made in values.items()})
    assert {(s.where[1], s.kind, s.other[1]) for s in found.suspects if s.other} == {
        ("pad_1", "swapped", "pad_16"),
        ("pad_16", "swapped", "pad_1"),
    }
    assert_right(found, march)


@pytest.mark.parametrize("seed", range(5))
def test_a_damaged_file_is_found(seed: int) -> None:
    march = hidden(seed)
    values = {one.probe.name: played(one.probe, march) for one in NUMBERS}
    values["biases"]["y"] = values["biases"]["y"].copy()
    values["biases"]["y"][0, 0, 3, 5] ^= 1 << 12
    found = fit_asked(NUMBERS, {name: dumps_of(made) for name, made in values.items()})
    (suspect,) = found.suspects
    assert (suspect.where, suspect.kind) == (("biases", "y"), "damaged")
    (case,) = found.cases
    assert case.index == (0, 0, 3, 5)
    assert case.wanted == int(values["biases"]["y"][0, 0, 3, 5])
    assert "biases/y" in found.table()
    others = replace(found, fields={f: of for f, of in found.fields.items() if f != "bias_rounding"})
    assert_right(others, march)


def test_another_order_of_axes_is_found() -> None:
    march = hidden(4)
    values = {one.probe.name: played(one.probe, march) for one in NUMBERS}
    y = values["biases"]["y"]
    values["biases"]["y"] = y.transpose(0, 3, 1, 2).reshape(y.shape)  # the memory of NCHW, read as NHWC
    found = fit_asked(NUMBERS, {name: dumps_of(made) for name, made in values.items()})
    (suspect,) = found.suspects
    assert suspect.kind == "layout"
    assert found.fields["number_rounding"].values == (march.number_rounding,)


def test_what_nothing_explains_is_contradicted_in_full() -> None:
    """A board that adds 1 to everything: the smallest accumulator is shown, with what it should have become."""
    asked = [Asked(powers_of_two())]
    values = played(asked[0].probe, jq.targets.NASH_E)
    values["y"] = np.clip(values["y"] + 1, -32768, 32767)
    found = fit_asked(asked, {"shifts": dumps_of(values)})
    (case,) = found.cases
    _, channel, *place = case.index
    assert case.accumulator == int(values[f"x{channel}"][0, 0, *place])
    assert abs(case.accumulator) <= 1
    assert case.wanted == int(values["y"][case.index]) != case.found
    assert case.differing > case.size / 2
    assert str(case.accumulator) in str(case)
    assert set(found.of("contradicted")) == set(asked[0].probe.fields)
    assert found.of("decided") == ()


def test_missing_dumps_are_named_and_the_rest_goes_on() -> None:
    march = hidden(5)
    dumps = board_of(march, [one.probe for one in NUMBERS])
    del dumps["biases"]
    found = fit_asked(NUMBERS, dumps)
    assert "biases: no dumps" in found.problems
    assert found.fields["bias_rounding"].state == "not asked"
    assert found.fields["number_rounding"].state == "decided"
    with pytest.raises(jq.InputError, match="no dumps that tell anything"):
        fit_asked(NUMBERS, {})


# ---------------------------------------------------------------------------------------------------------------------
# Everything together


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_every_family_together(seed: int) -> None:
    march = hidden(seed)
    asked = [Asked(probe) for probe in jq.board.probe()]
    found = fitted(asked, march)
    assert_right(found, march)
    assert len(found.of("decided")) >= 15
    assert found.suspects == ()
