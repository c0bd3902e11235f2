"""Marches as values and as files: strict checks, the fingerprint, and programs that refuse another march."""

import ast
import dataclasses
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from support.marches import MADE_UP, NARROW, drawn
from support.sealed import change, resealed_text

import jquant as jq
from jquant import ops
from jquant.types import RescaleFormat, Target

ROOT = Path(__file__).parents[2]
NASH = jq.targets.NASH_E


def program_for(target: jq.Target) -> tuple[jq.Plan, jq.Program]:
    graph = jq.Graph((jq.Input("x", (None, 3)),), (jq.Node("y", ops.AvgPool(**WINDOW), ("x4",)),), ("y",))
    graph = dataclasses.replace(graph, inputs=(jq.Input("x4", (None, 2, 4, 4)),))
    model = jq.prepare(graph, {}, jq.QConfig({"*": jq.Policy(output=jq.int8(scale=0.1))}), target=target)
    return model.plan, jq.lower(model)


WINDOW = {"kernel": (2, 2), "strides": (2, 2), "padding": ((0, 0), (0, 0))}


# ---------------------------------------------------------------------------------------------------------------------
# Values


def test_no_field_has_a_default() -> None:
    for cls in (Target, *(type(v) for v in vars(NASH).values() if dataclasses.is_dataclass(v))):
        for entry in dataclasses.fields(cls):
            assert entry.default is dataclasses.MISSING is entry.default_factory, f"{cls.__name__}.{entry.name}"
        with pytest.raises(TypeError, match="missing"):
            cls()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rescale.mantissa_bits": 16}, "mantissa_bits is 16; it can be 4 to 15"),
        ({"rescale.mantissa_bits": 9.0}, "mantissa_bits is 9.0; it can be"),
        ({"rescale.high_precision": 1}, "high_precision is 1; it is a bool"),
        ({"tables.outer": "curve"}, "outer is 'curve'; it can be 'line', 'constant'"),
        ({"bias_rounding": "nearest"}, "bias_rounding is 'nearest'; it can be 'half_up', 'half_even', 'half_away'"),
        ({"tables.fraction_bits": 12}, "must be below 2^coefficient_bits"),
        ({"tables.count": 7}, "count 7 must be a multiple of 6 up to 126"),
        ({"resize.step_bits": 6}, "weight_bits 8 are above step_bits 6"),
        ({"activation_dtypes": ("int7",)}, "activation_dtypes is"),
        ({"weight_dtypes": ()}, "weight_dtypes is"),
        ({"rescale.mantisa_bits": 9}, "no field 'rescale.mantisa_bits'"),
        ({"units.x": 9}, "no field 'units.x'"),
    ],
    ids=str,
)
def test_values_that_are_not_implemented_are_refused_when_a_target_is_made(changes: dict, message: str) -> None:
    with pytest.raises(jq.QConfigError, match=re.escape(message)):
        NASH.with_fields(changes)


def test_all_broken_fields_of_a_format_are_named_together() -> None:
    with pytest.raises(jq.QConfigError, match=r"mantissa_bits is 99.*; pre_rounding is 'up'"):
        dataclasses.replace(NASH.rescale, mantissa_bits=99, pre_rounding="up")


def test_the_fingerprint_is_that_of_the_values() -> None:
    assert NASH.fingerprint == jq.targets.NASH_M.fingerprint == "ad7634b64277a33c"  # it is in files: it may not move
    assert NASH != jq.targets.NASH_M
    assert len({m.fingerprint for m in (NASH, *MADE_UP.values())}) == 1 + len(MADE_UP)
    assert NASH.with_fields({"name": "other"}).fingerprint == NASH.fingerprint
    for path, values in jq.targets.fields().items():
        now = jq.targets.value_of(NASH, path)
        assert now in values, path
    changed = jq.targets.differences(NASH, NASH.with_fields({"rescale.inner_bits": 20, "name": "x"}))
    assert changed == {"rescale.inner_bits": (16, 20)}


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_a_march_is_read_back_as_it_was(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"march{suffix}"
    for march in (NASH, jq.targets.NASH_P, *MADE_UP.values(), *map(drawn, range(5))):
        jq.targets.dump(march, path)
        assert jq.targets.load(path) == march == jq.targets.find_target(str(path))
        assert jq.targets.load(path).fingerprint == march.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_missing_and_unknown_fields_of_a_file_are_named_together(tmp_path: Path) -> None:
    data = jq.targets.to_dict(NASH)
    data["rescale"]["mantisa_bits"] = data["rescale"].pop("mantissa_bits")
    del data["grid"]
    data["colour"] = 3
    path = tmp_path / "march.json"
    path.write_text(json.dumps(data))
    with pytest.raises(jq.FormatError) as error:
        jq.targets.load(path)
    for part in (
        "march.json",
        "unknown field rescale.mantisa_bits; did you mean 'mantissa_bits'",
        "missing field rescale.mantissa_bits",
        "missing field grid",
        "unknown field colour",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "missing field name"),
        ("name = ", "march.toml"),
        ("rescale = 3", "rescale is 3, and should be a table of RescaleFormat"),
        (jq.targets.to_toml(NASH).replace("inner_bits = 16", "inner_bits = 8"), "inner_bits is 8; it can be 16 to 32"),
        (jq.targets.to_toml(NASH).replace('"half_even"', '"nearest"', 1), "is 'nearest'; it can be"),
        (jq.targets.to_toml(NASH).replace("max_rank = 10", "max_rank = true"), "max_rank is True; it can be"),
    ],
)
def test_files_that_hold_no_march_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "march.toml"
    path.write_text(text)
    with pytest.raises(jq.FormatError, match=re.escape(message)):
        jq.targets.load(path)
    with pytest.raises(FileNotFoundError, match="no march at"):
        jq.targets.load(tmp_path / "none.toml")


# ---------------------------------------------------------------------------------------------------------------------
# Programs and plans


def test_a_program_refuses_a_march_that_it_was_not_lowered_for(tmp_path: Path) -> None:
    plan, program = program_for(NARROW)
    assert program.lowered_for == f"made-up-narrow ({NARROW.fingerprint})"
    x = jnp.zeros((1, 2, 4, 4))
    other = dataclasses.replace(program, target=NASH)
    for run in (jq.run, jq.run_with_taps, jq.reference.run):
        run(program, x)
        with pytest.raises(jq.LoweringError, match=r"lowered for made-up-narrow \(.*\), and its target is nash-e"):
            run(other, np.asarray(x))
    jq.save(tmp_path / "p.jq", program)
    assert jq.load(tmp_path / "p.jq", target=NARROW).target == NARROW
    with pytest.raises(jq.LoweringError, match=r"p\.jq: the program was lowered for made-up-narrow .* not for nash-e"):
        jq.load(tmp_path / "p.jq", target="nash-e")
    assert jq.plan.plan_from_json(jq.plan.plan_to_json(plan)) == plan


def test_files_whose_march_was_edited_are_refused(tmp_path: Path) -> None:
    plan, program = program_for(NASH)
    jq.save(tmp_path / "p.jq", program)
    change(tmp_path / "p.jq", "program", lambda header: header["target"]["rescale"].update(inner_bits=20))
    with pytest.raises(jq.FormatError, match=r"lowered for 'nash-e \(ad.*\)', and the target in the file is nash-e \("):
        jq.load(tmp_path / "p.jq")
    text = jq.plan.plan_to_json(plan).replace('"inner_bits": 16', '"inner_bits": 20')
    with pytest.raises(jq.FormatError, match="the plan is for 'nash-e"):
        jq.plan.plan_from_json(resealed_text(text))


# ---------------------------------------------------------------------------------------------------------------------
# No literal is left: every field is read in the implementation and in the reference


def attributes(folder: str) -> set[str]:
    """The names of all attributes that the modules of a folder read."""
    trees = (ast.parse(path.read_bytes()) for path in (ROOT / "jquant" / folder).rglob("*.py"))
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_every_field_is_read_on_both_sides() -> None:
    fast, slow = attributes("ops") | attributes("numerics"), attributes("reference")
    by_property = {"post_shift_int8", "post_shift_int16", "count", "max_count", "multiple"}
    chosen_at_lowering = {"count", "max_count", "multiple"}  # the shapes of the constants say what they were
    assert {"post_shift", "count"} <= fast
    for path in jq.targets.fields():
        name = path.rpartition(".")[2]
        if path.startswith("max_"):
            assert name in fast | attributes("plan"), path
            continue
        assert name in fast | by_property, path
        assert name in slow | chosen_at_lowering, path


ROUNDING_WORDS = {"half_up", "half_even", "half_away", "floor", "toward_zero"}
# Where the word says what an operator means or what a number is, and not how the chip rounds.
MEANT = {
    "ops/names.py": "operators of other libraries",
    "numerics/rounding.py": "the roundings themselves, and half_steps, which compares exactly",
    "numerics/limbs.py": "the roundings themselves",
    "numerics/pairs.py": "the roundings themselves",
    "numerics/resample.py": "whether the half of a map is part of its offset",
    "numerics/crop.py": "a shorter form of the same rounding",
    "numerics/whole.py": "floor and ceil, the operators",
    "numerics/color.py": "the published integer form of BT.601, which pipelines of pictures have too",
    "ops/rounding.py": "floor, ceil and round, the operators",
}


def test_no_rounding_is_named_where_a_field_decides() -> None:
    for folder in ("ops", "numerics", "plan", "program"):
        for path in (ROOT / "jquant" / folder).rglob("*.py"):
            where = path.relative_to(ROOT / "jquant").as_posix()
            found = {
                node.value
                for node in ast.walk(ast.parse(path.read_bytes()))
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in ROUNDING_WORDS
            }
            assert not found or where in MEANT, f"{where} names {sorted(found)}: let a field of Target say it"


def test_a_rescale_format_says_what_it_is_for() -> None:
    for entry in dataclasses.fields(RescaleFormat):
        assert f"`{entry.name}`" in RescaleFormat.__doc__, entry.name


def test_the_page_lists_every_field_with_its_value() -> None:
    documented = (ROOT / "docs" / "targets.md").read_text(encoding="utf-8")
    for path in jq.targets.fields():
        assert f"| `{path}` | {jq.targets.value_of(NASH, path)} |" in documented, path
