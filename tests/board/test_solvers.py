"""Questions that are solved for all joint values together: against the reference, joint value by joint value."""

import random

import numpy as np
import pytest
from support.board import board_of, hidden

import jquant as jq
from jquant.board.asking import Question
from jquant.board.boxes import Boxes, Space
from jquant.board.probes.layers import additions, slopes
from jquant.board.questions import Asked, questions_of
from jquant.board.rows import rescaled_of
from jquant.board.sifting import Sifted
from jquant.board.worlds import Worlds

ASKED = [Asked(probe) for probe in [*jq.board.probe(["tables", "grid"]), slopes(), *additions("int8")]]
SOLVED = [f"table_{name}" for name in ("lines", "segments", "angles", "counts")] + ["grid_normalized", "grid_regions"]


def question_of(name: str, march: jq.Target) -> Question:
    asked = [one for one in ASKED if one.probe.name == name]
    questions, _ = questions_of(asked, board_of(march, [one.probe for one in asked]))
    return questions[0]


def drawn(question: Question, march: jq.Target, rng: random.Random) -> dict[str, tuple]:
    """A few values of each field, with that of the march among them."""
    domains = jq.board.domains()
    return {
        f: tuple(
            v
            for v in domains[f]
            if v in {jq.targets.value_of(march, f), *rng.sample(list(domains[f]), rng.choice((0, 1, 1)))}
        )
        for f in question.asks
    }


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["slopes", "addition_multipliers_int8"])
def test_a_rescaled_sum_is_what_explains_one_by_one(name: str, seed: int) -> None:
    """The slopes of PReLU have a row for each sign."""
    march, rng = hidden(seed), random.Random(seed)
    question = question_of(name, march)
    assert rescaled_of(question) is not None
    left = drawn(question, march, rng)
    sifted = Sifted(Space(left))
    good = sifted._solved(question)
    assert isinstance(good, Boxes)
    every = sifted.worlds.rows(question.asks)
    rows = every[rng.sample(range(len(every)), min(len(every), 400))]
    explains = question.differing(rows, [left[f] for f in question.asks]) == 0
    found = {tuple(row) for row in good.project(question.asks).rows().tolist()}
    assert tuple(left[f].index(jq.targets.value_of(march, f)) for f in question.asks) in found
    for row, one in zip(rows.tolist(), explains, strict=True):
        assert (tuple(row) in found) == one, dict(zip(question.asks, row, strict=True))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", SOLVED)
def test_what_is_solved_is_what_explains_one_by_one(name: str, seed: int) -> None:
    march, rng = hidden(seed), random.Random(seed)
    question = question_of(name, march)
    assert question.answers.solver is not None
    left = drawn(question, march, rng)
    sifted = Sifted(Worlds(left))
    good = sifted._solved(question)
    assert good is not None
    every = sifted.worlds.rows(question.asks)
    rows = every[rng.sample(range(len(every)), min(len(every), 400))]
    domains = [left[f] for f in question.asks]
    explains = question.differing(rows, domains) == 0
    rows_of = good.rows() if isinstance(good, Boxes) else good
    found = {tuple(row) for row in rows_of.tolist()}
    assert tuple(left[f].index(jq.targets.value_of(march, f)) for f in question.asks) in found
    for row, one in zip(rows.tolist(), explains, strict=True):
        assert (tuple(row) in found) == one, dict(zip(question.asks, row, strict=True))


def test_a_question_of_millions_of_joint_values_is_decided() -> None:
    march = hidden(0)
    question = question_of("table_segments", march)
    domains = jq.board.domains()
    sifted = Sifted(Worlds({f: domains[f] for f in question.asks}))
    assert sifted.worlds.count(question.asks) > 10**7
    sifted.put(question)
    assert not sifted.unexplained
    assert not sifted.late
    for field in question.asks:
        assert jq.targets.value_of(march, field) in sifted.values(field)
    assert sifted.values("tables.entries") == (march.tables.entries,)
    for (field, value), why in sifted.exclusions.items():
        assert value not in sifted.values(field)
        assert why.differing is None or why.wanted == int(question.wanted[why.index]) != why.found


def test_joint_values_that_are_kept_join_what_is_tied() -> None:
    worlds = Worlds({"a": (0, 1, 2), "b": (0, 1), "c": (0, 1)})
    worlds.keep(("a", "b"), lambda rows: rows[:, 0] % 2 == rows[:, 1])
    assert worlds.keep_rows(("b", "c"), np.array([[0, 1], [1, 0], [1, 1]]))
    assert {tuple(row) for row in worlds.rows(("a", "b", "c")).tolist()} == {
        (0, 0, 1),
        (2, 0, 1),
        (1, 1, 0),
        (1, 1, 1),
    }
    assert not worlds.keep_rows(("a", "b"), np.array([[0, 1]]))
    assert worlds.values("a") == (0, 1, 2)
