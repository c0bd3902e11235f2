"""Draws graphs over every operator, and checks what has to hold of each.

    python tests/fuzz/graphs.py --count 2000              # on all cores; a run that was stopped goes on
    python tests/fuzz/graphs.py --count 2000 --write      # and writes the figures into docs/reliability.md
    python tests/fuzz/graphs.py --seed 17                 # one graph, in this process
    python tests/fuzz/graphs.py --optimized               # with XLA as users have it, which takes twice as long

A graph follows from its seed. `FOLDER/graphs.jsonl` has a line for each that was checked. A graph that fails is made
smaller by leaving out steps, and printed as a script of its own, which is in `FOLDER/failed_SEED.py` as well.
"""

import argparse
import json
import os
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parents[1] / "out" / "fuzz"
sys.path.insert(0, str(HERE.parent))

SCRIPT = '''"""A graph that fails; run it from the checkout: python {name}"""

import sys

sys.path.insert(0, "tests")
from support.any_graphs import build
from support.properties import check

STEPS = {steps}
print(build(STEPS).graph)
print(check(STEPS))
'''


def outcome(steps: list[Any]) -> tuple[str, str]:
    """ "checked", "refused", "no graph" or "failed", and what was checked or went wrong."""
    from support.properties import check

    try:
        found = check(steps)
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}"[:600]
    return ("refused" if "refused" in found else "checked" if found else "no graph"), found[:300]


def smaller(steps: list[Any]) -> list[Any]:
    """The steps without those that the failure does not need."""
    i = 0
    while i < len(steps) and len(steps) > 1:
        rest = steps[:i] + steps[i + 1 :]
        if outcome(rest)[0] == "failed":
            steps = rest
        else:
            i += 1
    return steps


def one(seed: int) -> dict[str, Any]:
    from support.any_graphs import build, steps_of

    steps = steps_of(seed)
    start = time.monotonic()
    drawn = build(steps)
    kind, text = outcome(steps)
    names = [] if drawn is None else [type(node.op).__name__ for node in drawn.graph.nodes]
    row: dict[str, Any] = {"seed": seed, "outcome": kind, "text": text, "operators": names}
    if kind == "failed":
        row["steps"] = smaller(steps)
    return row | {"seconds": round(time.monotonic() - start, 2)}


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:  # the last line of a run that was killed
                continue


def in_parts(seeds: list[int], jobs: int) -> Iterator[dict[str, Any]]:
    """The row of each seed. A process checks about fifty graphs: the programs of thousands would fill the memory.

    A pool for each part, since `max_tasks_per_child` of Python 3.11 may start no process after the last one.
    """
    for first in range(0, len(seeds), 50 * jobs):
        with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
            futures = [pool.submit(one, seed) for seed in seeds[first : first + 50 * jobs]]
            yield from (future.result() for future in as_completed(futures))


def figures(rows: list[dict[str, Any]]) -> list[str]:
    from support.any_graphs import INTERNAL, cases

    counts = Counter(row["outcome"] for row in rows)
    drawn = {name for row in rows for name in row["operators"]}
    refused = Counter(row["text"].partition("refused: ")[2][:60] for row in rows if row["outcome"] == "refused")
    text = (
        f"{len(rows)} graphs, {sum(len(r['operators']) for r in rows)} nodes, {len(drawn)} of {len(cases())} operators "
        f"(left out: {', '.join(sorted(INTERNAL))}). {counts['checked']} held in every property, {counts['refused']} "
        f"were refused with a reason on the way to integers, {counts['no graph']} had no node that fits, "
        f"{counts['failed']} failed."
    )
    return [
        *textwrap.wrap(text, 120),
        "",
        f"Seconds of work: {sum(r['seconds'] for r in rows):.0f}. Kinds of refusals: {len(refused)}.",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--optimized", action="store_true")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    if not given.optimized:  # before JAX is imported, here or in a process that starts
        os.environ |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false"}
    if given.seed is not None:
        print(one(given.seed))
        return 0
    given.folder.mkdir(parents=True, exist_ok=True)
    path = given.folder / "graphs.jsonl"
    done = {row["seed"] for row in rows_of(path)}
    left = [seed for seed in range(given.count) if seed not in done]
    start, checked = time.monotonic(), 0
    with path.open("a") as file:
        for row in in_parts(left, given.jobs):
            checked += 1
            rest = (time.monotonic() - start) / checked * (len(left) - checked) / 60
            print(f"\r{checked}/{len(left)}, {rest:.0f} min left ", end="", file=sys.stderr, flush=True)
            file.write(json.dumps(row) + "\n")
            file.flush()
            if row["outcome"] == "failed":
                script = given.folder / f"failed_{row['seed']}.py"
                script.write_text(SCRIPT.format(name=script, steps=row["steps"]))
                print(f"# seed {row['seed']}: {row['text']}\n{script.read_text()}", flush=True)
    rows = [row for row in rows_of(path) if row["seed"] < given.count]
    print("\n".join(figures(rows)))
    if given.write:
        from support.reliability import write_section

        write_section("graphs", f"python tests/fuzz/graphs.py --count {given.count} --write", figures(rows))
    return int(any(row["outcome"] == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
