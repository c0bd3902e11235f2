"""Hidden marches drawn at random, played by the reference and fitted: `python tests/board/hidden.py --count 200`.

Writes a line of JSON for each march. With --summary, prints what all lines of a file come to. With --witnesses, plays a
march for values that stay undecided, as many a field as are given: its dumps have to be those of the hidden one.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.board import board_of, hidden, played

import jquant as jq
from jquant.board.fitting import Fit, fit_asked
from jquant.board.questions import Asked


def near(seed: int) -> jq.Target:
    """NASH_E with six fields at random: what a board may be if the specification is nearly right."""
    rng, values = random.Random(seed), jq.board.domains()
    while True:
        changes = {field: rng.choice(list(values[field])) for field in rng.sample(sorted(values), 6)}
        try:
            return jq.targets.NASH_E.with_fields({"name": f"near-{seed}", **changes})
        except jq.QConfigError:
            continue


def told_apart(found: Fit, march: jq.Target, asked: list[Asked], most: int) -> tuple[int, list[str]]:
    """How many values of undecided fields were played again in full, and those with other dumps than the board's."""
    board = [(one.probe, values) for one in asked if (values := played(one.probe, march))]
    rng, told, count = random.Random(march.name), [], 0
    for field in found.of("undecided"):
        others = [v for v in found.fields[field].values if v != jq.targets.value_of(march, field)]
        for value in rng.sample(others, min(most, len(others))):
            witness, count = found.march_with(field, value), count + 1
            assert jq.targets.value_of(witness, field) == value
            other = next((probe.name for probe, values in board if not _same(played(probe, witness), values)), "")
            told += [f"{field} {value} by {other}"] if other else []
    return count, told


def _same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def line(march: jq.Target, asked: list[Asked], witnesses: int) -> dict:
    """What a fit to a hidden march found."""
    start = time.time()
    found = fit_asked(asked, board_of(march, [one.probe for one in asked]))
    seconds = round(time.time() - start, 1)
    count, told = told_apart(found, march, asked, witnesses) if witnesses else (0, [])
    true = {field: jq.targets.value_of(march, field) for field in found.fields}
    return {
        "march": march.name,
        "states": {field: of.state for field, of in found.fields.items()},
        "too_many": [field for field, of in found.fields.items() if of.probes],
        "wrong": [f for f, of in found.fields.items() if of.state == "decided" and of.values != (true[f],)],
        "lost": [f for f, of in found.fields.items() if of.state != "not asked" and true[f] not in of.values],
        "suspects": [str(suspect) for suspect in found.suspects],
        "witnesses": count,
        "told_apart": told,
        "seconds": seconds,
    }


def summary(lines: list[dict]) -> str:
    """Totals, and by field how often it was decided."""
    states = Counter(state for one in lines for state in one["states"].values())
    too_many = sum(len(one["too_many"]) for one in lines)
    wrong, lost, odd = (sum(len(one[key]) for one in lines) for key in ("wrong", "lost", "suspects"))
    rows = [f"{len(lines)} marches, {len(lines[0]['states'])} fields each"]
    rows += [f"{state}: {count}" for state, count in states.items()]
    rows += [f"undecided as too many values together: {too_many}", f"wrong values named decided: {wrong}"]
    rows += [f"true values left out: {lost}", f"dumps suspected: {odd}"]
    again, told = sum(one.get("witnesses", 0) for one in lines), sum(len(one.get("told_apart", ())) for one in lines)
    rows += [f"other values of undecided fields played again: {again}, with other dumps: {told}"]
    for field, state in lines[0]["states"].items():
        if state == "not asked":
            continue
        decided = sum(one["states"][field] == "decided" for one in lines)
        late = sum(field in one["too_many"] for one in lines)
        rows.append(f"{field}: decided {decided}, too many together {late}")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--near", action="store_true", help="NASH_E with six fields at random, in place of all fields")
    parser.add_argument("--probes", default="", help="names with commas; all of them where left out")
    parser.add_argument("--output", type=Path, default=Path("hidden_marches.jsonl"))
    parser.add_argument("--witnesses", type=int, default=0, help="values a field that are played again")
    parser.add_argument("--summary", action="store_true")
    given = parser.parse_args()
    if not given.summary:
        chosen = given.probes.split(",") if given.probes else []
        asked = [Asked(probe) for probe in jq.board.probe() if not chosen or probe.name in chosen]
        for seed in range(given.first, given.first + given.count):
            march = near(seed) if given.near else hidden(seed)
            with given.output.open("a") as file:
                file.write(json.dumps(line(march, asked, given.witnesses)) + "\n")
    print(summary([json.loads(text) for text in given.output.read_text().splitlines()]))


if __name__ == "__main__":
    main()
