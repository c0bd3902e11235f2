"""Joint values are left out exactly where nothing explains them: against all products, one by one."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jquant.board import boxes
from jquant.board.boxes import Boxes, Space
from jquant.board.worlds import Worlds, split

DOMAINS = {"a": (0, 1, 2), "b": ("x", "y"), "c": (False, True), "d": (5, 6, 7, 8)}


def positions(fields: tuple[str, ...], world: dict) -> tuple[int, ...]:
    return tuple(DOMAINS[field].index(world[field]) for field in fields)


rules = st.tuples(
    st.lists(st.sampled_from(sorted(DOMAINS)), min_size=1, max_size=3, unique=True), st.integers(0, 2**16 - 1)
)


@pytest.mark.parametrize("kind", [Worlds, Space])
@settings(max_examples=80)
@given(asked=st.lists(rules, max_size=5))
def test_what_is_left_is_what_every_rule_explains(
    kind: type[Worlds | Space], asked: list[tuple[list[str], int]]
) -> None:
    worlds = kind(DOMAINS)
    left = [dict(zip(DOMAINS, values, strict=True)) for values in product(*DOMAINS.values())]
    for names, seed in asked:
        fields = tuple(names)
        good = np.random.default_rng(seed).random(tuple(len(DOMAINS[f]) for f in fields)) < 0.6
        kept = [world for world in left if good[positions(fields, world)]]
        assert worlds.keep(fields, lambda rows, good=good: good[tuple(rows.T)]) == bool(kept)
        left = kept or left
        if kind is Worlds and len(left) % 3 == 0:  # some of them go on as boxes
            worlds, kind = worlds.boxed(), Space
    for field in DOMAINS:
        assert worlds.values(field) == tuple(v for v in DOMAINS[field] if any(w[field] == v for w in left))
    for fields in (("a", "b"), ("d", "a", "c"), tuple(DOMAINS)):
        found = {tuple(row) for row in worlds.rows(fields).tolist()}
        assert found == {positions(fields, world) for world in left}
        assert worlds.count(fields) == len(found) or worlds.count(fields) >= len(found)


def test_independent_fields_stand_apart() -> None:
    worlds = Worlds(DOMAINS)
    worlds.keep(("a", "b"), lambda rows: rows[:, 0] == rows[:, 1])
    assert set(worlds.tied("a")) == {"a", "b"}
    assert worlds.tied("c") == ("c",)
    worlds.keep(("a", "c"), lambda rows: rows[:, 0] == 1)
    assert all(worlds.tied(field) == (field,) for field in DOMAINS)
    assert worlds.nearest({"a": 1, "b": "x", "c": True, "d": 9}) == {"a": 1, "b": "y", "c": True, "d": 5}


def test_nothing_goes_where_nothing_explains() -> None:
    worlds = Worlds(DOMAINS)
    assert not worlds.keep(("a",), lambda rows: np.zeros(len(rows), bool))
    assert worlds.values("a") == (0, 1, 2)


def test_boxes_that_are_too_many_leave_all_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    space = Space(DOMAINS)
    assert space.keep_rows(("a", "b"), np.array([[0, 0], [1, 1]]))
    monkeypatch.setattr(boxes, "MOST_KEPT", 1)
    tied = Boxes(("b", "d"), np.array([[1, 3], [2, 4]], np.uint64))
    assert space.keep_boxes(tied) is None
    assert space.count(("a", "b", "d")) == 8
    monkeypatch.undo()
    assert space.keep_boxes(tied)
    assert sorted(map(tuple, space.rows(("a", "b", "d")).tolist())) == [(0, 0, 0), (0, 0, 1), (1, 1, 2)]
    assert space.keep_boxes(Boxes(("a", "d"), np.array([[2, 3]], np.uint64))) is False
    assert {tuple(row) for row in space.some(("d", "a"), 20).tolist()} == {(0, 0), (1, 0), (2, 1)}


def test_a_split_is_a_product() -> None:
    worlds = Worlds(DOMAINS)
    table = worlds._tables[0]
    assert [part.fields for part in split(table)] == [("a",)]
