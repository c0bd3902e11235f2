"""Networks of one's own, fitted to boards that the reference plays: each node on the board's operands."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from support.board import hidden
from typer.testing import CliRunner

import jquant as jq
from jquant import ops
from jquant.board.fitting import Fit
from jquant.cli import app
from jquant.cli.state import State, save_state

NASH = jq.targets.NASH_E
_CONV = ops.Conv(strides=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1))
# What a fit of these nets is not asked, so that the tests take seconds: the march below has the values of NASH_E.
HELD = ("rescale.max_*", "rescale.ratio_bits", "rescale.mantissa_overflow", "resize.step_*")
BOARD = NASH.with_fields(
    {
        "name": "board",
        "quantize_rounding": "half_up",
        "bias_rounding": "floor",
        "rescale.mantissa_bits": 12,
        "rescale.post_shift_int8": 9,
        "rescale.pre_rounding": "half_even",
        "rescale.average_pre_rounding": "half_even",
        "rescale.post_rounding": "half_away",
        "addend.rounding": "half_even",
        "tables.entry_rounding": "half_away",
        "tables.interpolation_rounding": "floor",
        "resize.weight_bits": 6,
        "resize.rounding": "half_even",
    }
)


def state() -> State:
    """A convolution, another with a residual addition, an int16 table, an average pool and a resize."""
    rng = np.random.default_rng(0)
    shapes = {"first": (3, 2, 3, 3), "second": (3, 3, 3, 3)}
    params = {f"{name}.weight": jnp.asarray(rng.normal(size=s) * 0.3, jnp.float32) for name, s in shapes.items()}
    params |= {f"{name}.bias": jnp.asarray(rng.normal(size=s[0]) * 0.3, jnp.float32) for name, s in shapes.items()}
    roles = {name: jq.FrozenMap({r: f"{name}.{r}" for r in ("weight", "bias")}) for name in shapes}
    pool = ops.AvgPool(kernel=(3, 3), strides=(1, 1), padding=((0, 0), (0, 0)))
    nodes = (
        jq.Node("first", _CONV, ("x",), roles["first"]),
        jq.Node("relu", ops.Relu(), ("first",)),
        jq.Node("pool", pool, ("relu",)),
        jq.Node("up", ops.Interpolate(size=(9, 11), mode="bilinear"), ("pool",)),
        jq.Node("second", _CONV, ("relu",), roles["second"]),
        jq.Node("sum", ops.Add(), ("second", "relu")),
        jq.Node("table", ops.Tanh(), ("sum",)),
    )
    graph = jq.Graph((jq.Input("x", (None, 2, 6, 8)),), nodes, ("up", "table"))
    wide = jq.Policy(output=jq.int16())
    config = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8()), "sum": wide, "table": wide})
    model = jq.calibrate(jq.prepare(graph, params, config, target=NASH), [jnp.asarray(picture())])
    return State(graph, params, config, NASH, model.qparams)


def picture() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(1, 2, 6, 8)).astype(np.float32)


def played(model: jq.types.Model, march: jq.Target) -> dict[str, np.ndarray]:
    """What a board of the march dumps: permutations of jquant are none of its values."""
    _, values = jq.reference.run(jq.lower(model.replace(plan=replace(model.plan, target=march))), picture())
    return {name: value for name, value in values.items() if not name.endswith((".to_last", ".to_first"))}


def assert_right(found: Fit, march: jq.Target) -> None:
    for field, of in found.fields.items():
        true = jq.targets.value_of(march, field)
        assert of.state in ("decided", "undecided", "held", "not asked"), field
        assert of.state == "not asked" or true in of.values, field
        if of.state == "undecided":
            assert len(of.values) > 1
    assert found.suspects == ()


STATE = state()
MODEL = STATE.calibrated()
DUMPS = played(MODEL, BOARD)


def some(*names: str) -> Mapping[str, np.ndarray]:
    return {name: DUMPS[name] for name in names}


def test_a_network_decides_what_its_values_tell_apart() -> None:
    found = jq.board.fit(MODEL, some("x", "first", "pool", "up"), inputs={"x": picture()}, held=HELD)
    assert_right(found, BOARD)
    decided = {name: found.fields[name].values for name in found.of("decided")}
    for name in ("resize.weight_bits", "resize.rounding", "rescale.high_precision"):
        assert decided[name] == (jq.targets.value_of(BOARD, name),)
    for proof in found.fields["resize.rounding"].evidence:
        assert proof.where == ("up", "Interpolate")
    assert found.fields["tables.outer"].state == "not asked"
    assert set(found.of("held")) == {
        "rescale.max_pre_shift",
        "rescale.max_post_shift",
        "rescale.ratio_bits",
        "rescale.mantissa_overflow",
        "resize.step_bits",
        "resize.step_rounding",
    }
    again = played(MODEL, found.target)
    assert all(np.array_equal(again[name], DUMPS[name]) for name in ("first", "pool", "up"))


def test_a_residual_addition_and_a_table() -> None:
    """With what is known of the march held: too many values together otherwise, which is said."""
    names = ("first", "second", "table")
    held = ("rescale.*", "quantize_rounding", "bias_rounding", "addend.m*", "tables.[cfm]*", "tables.entries")
    found = jq.board.fit(MODEL, some(*names), base=BOARD, held=held)
    assert_right(found, BOARD)
    assert found.fields["addend.rounding"].values == ("half_even",)
    assert found.fields["tables.interpolation_rounding"].values == ("floor", "toward_zero")  # of magnitudes
    assert "half_away" in found.fields["tables.entry_rounding"].values
    assert "floor" not in found.fields["tables.entry_rounding"].values
    late = jq.board.fit(MODEL, some("second", "table"), base=BOARD).fields["tables.entries"]
    assert (late.state, late.probes, late.ask) == ("undecided", ("table",), "table_segments")
    assert len(late.values) == len(jq.board.domains()["tables.entries"])


def test_a_program_alone_says_less_and_nothing_wrong() -> None:
    """Of its convolution it has integers: what would have made others for another march keeps all its values."""
    program = jq.lower(MODEL)
    found = jq.board.fit(program, some("x", "first", "pool", "up"), held=HELD)
    assert_right(found, BOARD)
    assert found.fields["resize.rounding"].values == ("half_even",)
    assert "floor" not in found.fields["rescale.average_pre_rounding"].values
    assert found.fields["quantize_rounding"].state == "undecided"
    assert found.fields["quantize_rounding"].ask == "quantization"
    assert "the probe quantization would tell" in found.table()
    assert found.fields["rescale.pre_rounding"].state == "undecided"
    own = NASH.with_fields({"name": "own", "rescale.pre_rounding": "half_even", "rescale.post_rounding": "half_away"})
    values = {name: played(MODEL, own)[name] for name in ("x", "first")}
    made = ("quantize_rounding", "bias_rounding", "rescale.m*", "rescale.ratio_bits", "rescale.post_shift*")
    known = jq.board.fit(program, values, held=made)
    assert_right(known, own)
    assert known.fields["rescale.post_rounding"].state != "not asked"
    assert "floor" not in known.fields["rescale.post_rounding"].values


def test_a_damaged_dump_is_named_and_its_smallest_case_shown() -> None:
    values = {name: value.copy() for name, value in some("x", "first", "pool", "up").items()}
    values["pool"][0, 1, 2, 0] ^= 32
    held = (
        *HELD,
        "quantize_rounding",
        "bias_rounding",
        "rescale.post_shift_int8",
        "rescale.mantissa_*",
        "resize.weight_*",
    )
    found = jq.board.fit(MODEL, values, base=BOARD, held=held)
    (suspect,) = found.suspects
    assert (suspect.where, suspect.kind) == (("pool", "AvgPool"), "damaged")
    (case,) = found.cases
    assert (case.index, case.wanted) == ((0, 1, 2, 0), int(values["pool"][0, 1, 2, 0]))
    assert case.found == int(DUMPS["pool"][0, 1, 2, 0])
    assert case.accumulator is not None
    assert "up: nothing explains it, nor its operand pool" in found.problems
    assert "half_away" in found.fields["rescale.post_rounding"].values


def test_another_formula_is_contradicted() -> None:
    """A board that adds 5 to every average."""
    values = {**some("x", "first"), "pool": np.clip(DUMPS["pool"] + 5, -128, 127)}
    found = jq.board.fit(MODEL, values, base=BOARD, held=(*HELD, "*_rounding", "rescale.mantissa_bits"))
    (suspect,) = found.suspects
    assert (suspect.where, suspect.kind) == (("pool", "AvgPool"), "unexplained")
    assert "rescale.average_pre_rounding" not in found.of("decided")
    (case,) = found.cases
    assert case.wanted != case.found


def test_what_is_given_is_checked() -> None:
    with pytest.raises(jq.QConfigError, match=r"no field 'rescale.pre_roundin'; did you mean 'rescale.pre_rounding'"):
        jq.board.fit(MODEL, DUMPS, held=["rescale.pre_roundin"])
    with pytest.raises(jq.InputError, match=r"no graph input 'y'; there are x"):
        jq.board.fit(MODEL, DUMPS, inputs={"y": picture()})
    with pytest.raises(jq.InputError, match="no dumps that tell anything"):
        jq.board.fit(MODEL, {"other": np.zeros(3, np.int8)})
    with pytest.raises(jq.InputError, match="belong to a network"):
        jq.board.fit(jq.board.probe(["resize"]), {}, held=["resize.rounding"])


def test_from_the_command_line(tmp_path: Path) -> None:
    jq.save(tmp_path / "net.jq", jq.lower(MODEL))
    (tmp_path / "dumps").mkdir()
    for name in ("pool", "up"):
        np.save(tmp_path / "dumps" / f"{name}.npy", DUMPS[name].astype(np.int8))
    arguments = ["board", "fit", tmp_path / "net.jq", tmp_path / "dumps", "-o", tmp_path / "mine.toml"]
    arguments += ["--held", "resize.step_*", "--held", "resize.weight_bits", "--base", tmp_path / "base.toml"]
    jq.targets.dump(BOARD, tmp_path / "base.toml")
    found = CliRunner().invoke(app, [str(a) for a in arguments])
    assert found.exit_code == 0, found.output
    assert jq.targets.load(tmp_path / "mine.toml").resize.rounding == "half_even"


def test_what_is_too_many_together_is_said_on_the_command_line(tmp_path: Path) -> None:
    """A model as `jquant calibrate` writes it: a fused addend, and an int16 table that places its own boundaries."""
    save_state(tmp_path / "net.jqs", STATE)
    (tmp_path / "dumps").mkdir()
    for name in ("first", "second", "table"):
        np.save(tmp_path / "dumps" / f"{name}.npy", DUMPS[name].astype(np.int16))
    jq.targets.dump(BOARD, tmp_path / "base.toml")

    files = [str(tmp_path / name) for name in ("net.jqs", "dumps", "base.toml", "fit.json", "mine.toml")]
    net, dumps, base, report, output = files
    options = ["--base", base, "--held", "rescale.*", "--report", report, "-o", output]
    made = CliRunner().invoke(app, ["board", "fit", net, dumps, *options])
    assert made.exit_code == 0, made.output
    text, fields = made.output, json.loads(Path(report).read_text())["fields"]
    for field, of in fields.items():
        true = jq.targets.value_of(BOARD, field)
        assert true in of["values"] or of["state"] == "not asked", field
    assert fields["tables.entries"]["probes"] == ["table"]
    assert fields["addend.multiplier_bits"]["probes"] == ["second"]
    assert "too many values together in table; the probe table_segments would tell" in text
    assert "too many values together in second; the probe addend_multipliers would tell" in text


def test_a_table_between_given_boundaries_is_solved() -> None:
    """Of a network too: its fields are tried together."""
    table = ops.TableOptions(placement=(-4.0, -2.5, -1.0, 0.5, 2.0, 3.0, 4.0), symmetric=False)
    graph = jq.Graph((jq.Input("x", (None, 4096)),), (jq.Node("y", ops.Tanh(table=table), ("x",)),), ("y",))
    scales = {"x": 2.0**-12, "y": 2.0**-15}
    config = jq.QConfig({name: jq.Policy(output=jq.int16(scale=scale)) for name, scale in scales.items()})
    model = jq.prepare(graph, {}, config, target=NASH)
    march = NASH.with_fields({"tables.entries": 32, "tables.fraction_bits": 6, "tables.index_rounding": "floor"})
    x = np.random.default_rng(2).uniform(-8, 8, size=(1, 4096)).astype(np.float32)
    _, values = jq.reference.run(jq.lower(model.replace(plan=replace(model.plan, target=march))), x)
    found = jq.board.fit(model, values)
    assert_right(found, march)
    assert {"tables.entries", "tables.fraction_bits", "tables.outer"} <= set(found.of("decided"))
    assert set(found.fields["tables.index_rounding"].values) <= {"floor", "toward_zero"}
    assert not any(of.probes for of in found.fields.values())
    for field in found.of("undecided"):
        for value in found.fields[field].values:
            witness = found.march_with(field, value)
            program = jq.lower(model.replace(plan=replace(model.plan, target=witness)))
            np.testing.assert_array_equal(jq.reference.run(program, x)[1]["y"], values["y"], err_msg=f"{field} {value}")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_any_march_keeps_its_values(seed: int) -> None:
    march = hidden(seed)
    assert_right(jq.board.fit(MODEL, played(MODEL, march), inputs={"x": picture()}), march)
