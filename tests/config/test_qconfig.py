"""How rules select and merge, and what a wrong qconfig says."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import graphs

import jquant as jq
from jquant.config.qconfig import matches
from jquant.types import INHERIT

SPECS = (None, jq.int4(), jq.int8(), jq.int8(axis="out"), jq.int16())
NAMES = ("stem.conv", "stage1.0.conv", "stage1.1.conv", "stage2.0.bn", "head")
PATTERNS = ("*", "stem.*", "stage1.*", "head", "re:stage[12]\\.0\\..*", "type:Conv", "type:*Norm", "*.conv")

fields = st.sampled_from((INHERIT, *SPECS))
policies = st.none() | st.builds(
    lambda output, weight, given: jq.Policy(
        output=output, weight=weight, input={"x": jq.int16()} if given else INHERIT
    ),
    fields,
    fields,
    st.booleans(),
)
rule_sets = st.lists(st.tuples(st.sampled_from(PATTERNS), policies), min_size=1, unique_by=lambda rule: rule[0])


@given(rules=rule_sets, name=st.sampled_from(NAMES), operator=st.sampled_from(("Conv", "BatchNorm")))
def test_the_last_rule_that_sets_a_field_wins(rules: list, name: str, operator: str) -> None:
    got = jq.QConfig(dict(rules)).policy(name, operator)
    selected = [
        jq.Policy(output=None, weight=None, input={}) if p is None else p
        for pattern, p in rules
        if matches(pattern, name, operator)
    ]
    for field, default in (("output", None), ("weight", None), ("input", {})):
        values = [value for p in selected if (value := getattr(p, field)) is not INHERIT]
        want = values[-1] if values else default
        assert getattr(got, field) == (jq.FrozenMap(want) if field == "input" else want)


@pytest.mark.parametrize(
    ("pattern", "name", "operator", "selected"),
    [
        ("stem.*", "stem.conv", "Conv", True),
        ("stem.*", "stem", "Conv", False),
        ("Stem.*", "stem.conv", "Conv", False),
        ("layer?", "layer12", "Conv", False),
        ("re:layer[12]\\..*", "layer2.x", "Conv", True),
        ("re:layer[12]", "layer2.x", "Conv", False),  # the whole name
        ("type:Conv", "x", "Conv", True),
        ("type:*Pool", "x", "MaxPool", True),
        ("type:Conv", "Conv", "Linear", False),
    ],
)
def test_patterns(pattern: str, name: str, operator: str, selected: bool) -> None:
    assert matches(pattern, name, operator) is selected


def test_order_of_rules_matters_and_equal_rules_hash_alike() -> None:
    narrow, wide = jq.Policy(output=jq.int8()), jq.Policy(output=jq.int16())
    assert jq.QConfig({"*": narrow, "a": wide}).policy("a", "Conv").output == jq.int16()
    assert jq.QConfig({"a": wide, "*": narrow}).policy("a", "Conv").output == jq.int8()
    assert hash(jq.QConfig({"*": narrow})) == hash(jq.QConfig({"*": jq.Policy(output=jq.int8())}))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({}, "non-empty mapping"),
        (None, "non-empty mapping"),
        ([("*", None)], "non-empty mapping"),
        ({0: None}, "key 0 is int; keys are strings"),
        ({"*": jq.int8()}, "must be a jq.Policy or None"),
        ({"*": "int8"}, "must be a jq.Policy or None, not 'int8'"),
        ({"re:(": None}, "no regular expression"),
    ],
)
def test_wrong_rules_are_refused(rules: object, message: str) -> None:
    with pytest.raises(jq.QConfigError, match=re.escape(message)):
        jq.QConfig(rules)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jq.Policy(output="int8"), "Policy.output must be a QuantSpec"),
        (lambda: jq.Policy(weight=8), "Policy.weight must be a QuantSpec"),
        (lambda: jq.Policy(input=jq.int8()), "Policy.input must be a mapping"),
        (lambda: jq.QuantSpec(dtype="int7"), "unknown quantized dtype 'int7'"),
        (lambda: jq.int8(axis="in"), "axis must be None or 'out'"),
        (lambda: jq.int8(scale_form="pow3"), "scale_form must be"),
        (lambda: jq.int8(scale=0.0), "positive and finite"),
        (lambda: jq.int8(scale=-1.0), "positive and finite"),
        (lambda: jq.int8(scale=float("nan")), "positive and finite"),
        (lambda: jq.int8(threshold=float("inf")), "positive and finite"),
        (lambda: jq.int8(scale=1.0, threshold=1.0), "not both"),
    ],
)
def test_wrong_specs_are_refused(make: object, message: str) -> None:
    with pytest.raises(jq.QConfigError, match=re.escape(message)):
        make()


def test_a_threshold_is_a_scale_of_half_the_codes() -> None:
    assert jq.int8(threshold=1.0).fixed_scale == 1 / 128
    assert jq.int16(threshold=2.0).fixed_scale == 2 / 32768


@pytest.fixture(scope="module")
def net() -> tuple[jq.Graph, dict]:
    build = graphs.Builder(0)
    build.shapes["x"] = (3, 8, 8)
    x = build.conv("x", 4, 3)
    return build.graph(build.add(jq.ops.Relu(), (x,), (4, 8, 8)), size=8), build.params


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("n0.con", "'n0.conv'"), ("n0.cnv", "'n0.conv'"), ("type:Cnv", "'type:Conv'"), ("n.*", "'n0.*'")],
)
def test_a_rule_that_matches_nothing_names_near_ones(net: tuple, pattern: str, near: str) -> None:
    config = jq.QConfig({"*": jq.Policy(output=jq.int8()), pattern: None})
    with pytest.raises(
        jq.QConfigError, match=f"{re.escape(repr(pattern))} matches nothing.*did you mean.*{re.escape(near)}"
    ):
        jq.prepare(*net, config, target=jq.targets.NASH_E)


def test_prepare_wants_a_qconfig(net: tuple) -> None:
    with pytest.raises(jq.QConfigError, match=r"takes a jq\.QConfig, not dict"):
        jq.prepare(*net, {"*": None}, target=jq.targets.NASH_E)
