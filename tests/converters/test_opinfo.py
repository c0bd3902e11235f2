"""The importer on torch's own samples. A sample passes or is refused: no mismatch. Run with -s to see the numbers."""

from collections import Counter

import pytest

pytest.importorskip("expecttest")  # torch.testing._internal needs it

from support import opinfo

QUICK = 8  # every eighth operator
OPERATORS = opinfo.operators()


def run(operators, limit):
    counts: Counter[str] = Counter()
    notes = []
    for op in operators:
        found, said = opinfo.sweep(op, limit)
        counts += found
        notes += said
    print(f"\n{len(operators)} operators: {dict(counts)}", *notes, sep="\n  ")
    return counts, [note for note in notes if note.startswith("mismatch")]


@pytest.mark.filterwarnings("ignore")
def test_some_operators():
    counts, wrong = run(OPERATORS[::QUICK], 4)
    assert wrong == []
    assert counts["pass"] > counts["refused"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_all_operators():
    counts, wrong = run(OPERATORS, 20)
    assert wrong == []
    assert counts["pass"] > 1000
