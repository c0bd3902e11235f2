"""Patterns at once are patterns one by one, and many of them take no longer a rule than few."""

import fnmatch
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jquant as jq
from jquant import ops
from jquant.config.patterns import Patterns, matches

text = st.text("ab.?*", max_size=7)
names = st.text("ab.", min_size=1, max_size=7)
kinds = st.sampled_from(["", "", "", "module:", "type:", "re:", "[a]", "a[!b]", "["])


def is_pattern(pattern: str) -> bool:
    if not pattern.startswith("re:"):
        return True
    try:
        re.compile(pattern[3:])
    except re.error:
        return False
    return True


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(kinds, text).map("".join).filter(is_pattern), max_size=8), names, names, names)
def test_all_at_once(patterns: list[str], name: str, operator: str, call_of: str) -> None:
    found = Patterns(patterns).matching(name, operator, call_of)
    assert found == {i for i, p in enumerate(patterns) if matches(p, name, operator, call_of)}
    plain = {i for i, p in enumerate(patterns) if not p.startswith(("module:", "type:", "re:"))}
    assert found & plain == {
        i for i in plain if fnmatch.fnmatchcase(name, patterns[i]) or fnmatch.fnmatchcase(call_of, patterns[i])
    }


def chain(count: int) -> jq.Graph:
    made = [f"block{i:02d}.some_layer_{i:02d}" for i in range(count)]
    nodes = [jq.Node(name, ops.Sigmoid(), (before,)) for before, name in zip(["x", *made], made, strict=False)]
    return jq.Graph((jq.Input("x", (None, 4)),), tuple(nodes), (made[-1],))


def rules(graph: jq.Graph, each: int) -> dict[str, jq.Policy]:
    """Globs that match one name each: letters of it as question marks, by the bits of a number."""
    found = {"*": jq.Policy(output=jq.int8())}
    for node in graph.nodes:
        for mask in range(1, each + 1):
            letters = list(node.name)
            for bit in range(13):
                if mask >> bit & 1:
                    letters[-1 - bit] = "?"
            found["".join(letters)] = jq.Policy(output=jq.int16())
    return found


@pytest.mark.parametrize("each", [50, pytest.param(5000, marks=pytest.mark.slow)])
def test_many_rules(each: int) -> None:
    """100,000 rules in the slow run; the last of them wins. 2 s are wanted on a machine that does nothing else."""
    graph = chain(20)
    asked = rules(graph, each)
    start = time.process_time()
    model = jq.prepare(graph, {}, jq.QConfig(asked), target=jq.targets.NASH_E)
    assert time.process_time() - start < 8.0
    assert {model.plan.spec(node.name).dtype for node in graph.nodes} == {"int16"}
    with pytest.raises(jq.QConfigError, match="matches nothing"):
        jq.prepare(graph, {}, jq.QConfig(asked | {"blick*": jq.Policy(output=jq.int8())}), target=jq.targets.NASH_E)
