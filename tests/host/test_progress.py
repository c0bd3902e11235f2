"""How long work takes: the time left by the steps that are done, and what a terminal sees of stages."""

import pytest
from support.terminal import on_terminal

from jquant.host.progress import stages, time_left, track

STAGES = """
import time
from jquant.host.progress import stages, track
with stages("comparing", ("float", "integers")) as begin:
    begin("float")
    time.sleep(1.4)
    begin("integers")
    list(track(range(3), "inner", after=0.1))
    time.sleep({seconds})
print("done")
"""


@pytest.mark.parametrize(
    ("ends", "total", "first_is_long", "now", "expected"),
    [
        ([10.0], 4, False, 12.0, (None, False)),  # nothing is done: nothing is known
        ([10.0, 12.0], None, False, 13.0, (None, False)),
        ([10.0, 12.0], 4, False, 13.0, (5.0, False)),  # 3 stages of 2 s, one of them a second old
        ([10.0, 12.0], 4, False, 19.0, (None, False)),  # it takes longer than the others did
        ([10.0, 30.0], 4, True, 31.0, (59.0, True)),  # the first step compiled: the others take no longer
        ([10.0, 30.0, 31.0], 4, True, 31.0, (2.0, False)),
    ],
)
def test_the_time_left(ends, total, first_is_long, now, expected) -> None:
    assert time_left(ends, total, first_is_long, now) == expected


def test_without_a_terminal_there_is_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with stages("comparing", ("float",)) as begin:
        begin("float")
    assert list(track(range(3), "counting", after=0.0)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_stages_are_shown_with_their_times() -> None:
    out, seen = on_terminal(STAGES.format(seconds=0.7))
    assert out == b"done\n"
    assert b"comparing: float" in seen
    assert b"comparing: integers" in seen
    assert b"0:01 left" in seen


def test_short_work_shows_nothing() -> None:
    code = "from jquant.host.progress import track; print(sum(track(range(3), 'counting', after=5.0)))"
    assert on_terminal(code) == (b"3\n", b"")
