"""Mutants of the integer code: which of 400 changes of single expressions the tests notice.

    make mutants                                    # goes on where it was; writes docs/reliability.md
    .venv-mutants/bin/python tests/mutants/run.py --count 40 --first 120
    .venv-mutants/bin/python tests/mutants/run.py --show survived

cosmic-ray finds the places and makes the mutants, in a copy of the tracked files. The sample follows from the text of
the lines: of each place one mutant, annotations left out. Where a line changes, its mutants do, and no others. At first
all tests run once, and coverage notes which of them reach which line. The tests of a mutant are those that reach its
line: QUICK seconds of them, then MORE. A line that runs when its module is imported has the tests of the module. They
end at the first failure:

  killed     a test failed, or the module does not import
  survived   all of them passed
  slow       no answer in LIMIT seconds of a processor: the tests are too slow to notice

`tests/mutants/results.jsonl` holds a line for each mutant, and `tests/mutants/survivors.toml` the reason of each that
cannot be told from the original by any integer.
"""

import argparse
import ast
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import cosmic_ray.plugins
import coverage
from cosmic_ray.ast import ast_nodes, get_ast_from_path
from cosmic_ray.mutating import mutate_code

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS, SURVIVORS = HERE / "results.jsonl", HERE / "survivors.toml"
COPY = ROOT / "out" / "mutants"
PAGE = ROOT / "docs" / "reliability.md"
MARKS = ("<!-- made: mutants -->", "<!-- end: mutants -->")

COUNT, SEED, LIMIT = 400, 11, 300
QUICK, MORE = 20, 60  # seconds of tests that reach the line, and of further ones where these notice nothing
WAIT = 1200  # seconds for one run of pytest beside other work; a test that hangs
LIGHT = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false", "CI": "true"}
PARTS = ("numerics", "ops", "program")
# What `lower` and `run` never use: lists of names, the meanings in float, and an operator without integers.
LEFT_OUT = {"jquant/ops/__init__.py", "jquant/ops/functional.py", "jquant/ops/names.py", "jquant/program/cache.py"}
LEFT_OUT |= {"jquant/ops/resample_weights.py"}

# Beside the cases of tests/conformance for the operators of a module, the files of tests that look at it closest.
TESTS = {
    "jquant/numerics/placement.py": "numerics/test_tables.py ops/test_tables.py ops/test_table_bytes.py",
    "jquant/numerics/tables.py": "numerics/test_tables.py ops/test_tables.py ops/test_table_bytes.py",
    "jquant/numerics/rescale.py": "numerics/test_rescale.py faults/test_bias.py targets/test_made_up_marches.py",
    "jquant/numerics/": "numerics",
    "jquant/program/insert/": "program/test_insert.py faq/test_insertion.py",
    "jquant/program/candidates.py": "program/test_candidates.py",
    "jquant/program/files.py": "program/test_program_files.py",
    "jquant/program/lower.py": "program/test_integers.py quantizers/test_quantizers_in_jax.py",
    "jquant/program/paths.py": "program/test_paths.py",
    "jquant/program/": "program/test_integers.py",
    "jquant/ops/activation.py": "ops/test_elementwise.py",
    "jquant/ops/attention.py": "ops/test_composites.py faults/test_masks.py",
    "jquant/ops/batch_norm.py": "plan/test_batch_norm.py",
    "jquant/ops/bits.py": "ops/test_elementwise.py",
    "jquant/ops/compare.py": "ops/test_elementwise.py faults/test_joined_values.py faults/test_exact_operators.py",
    "jquant/ops/composite.py": "ops/test_composites.py faults/test_masks.py",
    "jquant/ops/conv.py": "ops/test_gemm.py plan/test_accumulators.py numerics/test_parts.py",
    "jquant/ops/elementwise.py": "ops/test_elementwise.py faults/test_joined_values.py",
    "jquant/ops/grid": "ops/test_sampling.py",
    "jquant/ops/image.py": "ops/test_images.py",
    "jquant/ops/indexing.py": "ops/test_movement.py faults/test_indices_out_of_range.py faults/test_exact_operators.py",
    "jquant/ops/lookup.py": "ops/test_tables.py",
    "jquant/ops/matmul.py": "ops/test_gemm.py",
    "jquant/ops/movement.py": "ops/test_movement.py faults/test_exact_operators.py",
    "jquant/ops/on_grid.py": "faults/test_exact_operators.py faults/test_one_scale.py",
    "jquant/ops/pool.py": "ops/test_pool.py",
    "jquant/ops/recurrent.py": "ops/test_composites.py",
    "jquant/ops/reduce.py": "ops/test_reduce.py faults/test_exact_operators.py",
    "jquant/ops/regions.py": "ops/test_sampling.py",
    "jquant/ops/resample": "ops/test_sampling.py faults/test_resize.py",
    "jquant/ops/rounding.py": "ops/test_elementwise.py",
    "jquant/ops/scatter.py": "ops/test_scatter.py faults/test_exact_operators.py",
    "jquant/ops/shuffle.py": "ops/test_movement.py faults/test_exact_operators.py",
    "jquant/ops/sorting.py": "ops/test_reduce.py ops/test_movement.py faults/test_exact_operators.py",
    "jquant/ops/table.py": "ops/test_tables.py",
    "jquant/ops/": "ops/test_elementwise.py",
}
# Of numerics and the program: what the operators of these names compute with.
WIDELY_USED = ("Conv", "Linear", "Add", "Mean", "AvgPool", "GridSample", "Interpolate", "Sigmoid", "MatMul")


@dataclass(frozen=True)
class Mutant:
    """One change: the `occurrence`-th place of an operator of cosmic-ray in a module.

    `key`  the module, the text of the line, the place in it, and which of equal ones it is
    """

    module: str
    operator: str
    occurrence: int
    line: int
    key: str


def modules() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "jquant"], cwd=ROOT, capture_output=True, text=True, check=True)
    found = [name for name in listed.stdout.split() if name.split("/")[1] in PARTS and name not in LEFT_OUT]
    return sorted(name for name in found if (ROOT / name).stat().st_size and not name.endswith("__init__.py"))


def annotations(path: Path) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where annotations stand: no program computes with them."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        for name in ("annotation", "returns"):
            part = getattr(node, name, None)
            if isinstance(part, ast.AST):
                found.append(((part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)))
    return found


def mutants() -> list[Mutant]:
    """One of each place, in the order of the sample."""
    places: dict[tuple[str, tuple[int, int], tuple[int, int]], list[tuple[str, int]]] = {}
    for module in modules():
        tree, spans = get_ast_from_path(ROOT / module), annotations(ROOT / module)
        nodes = list(ast_nodes(tree))
        for name in cosmic_ray.plugins.operator_names():
            operator_class = cosmic_ray.plugins.get_operator(name)
            if operator_class.arguments():
                continue
            operator = operator_class()
            positions = [place for node in nodes for place in operator.mutation_positions(node)]
            for occurrence, (start, end) in enumerate(positions):
                if not any(first <= start and end <= last for first, last in spans):
                    found = (name.removeprefix("core/"), occurrence)
                    places.setdefault((module, start, end), []).append(found)
    seen: Counter[str] = Counter()
    chosen = []
    for (module, start, end), found in sorted(places.items()):
        text = (ROOT / module).read_text().splitlines()[start[0] - 1].strip()
        place = f"{module}: {text} [{end[1] - start[1]} at {len(text) - start[1]}]"
        seen[place] += 1
        key = f"{place} {seen[place]}"
        operator, occurrence = random.Random(f"{SEED} {key}").choice(sorted(found))
        chosen.append(Mutant(module, operator, occurrence, start[0], key))
    return sorted(chosen, key=lambda mutant: hashlib.blake2b(f"{SEED} {mutant.key}".encode()).digest())


def operators_of(module: str, line: int) -> list[str]:
    """The operator classes whose rule a line belongs to; all of the module where it belongs to none."""
    tree = ast.parse((ROOT / module).read_text())
    names = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    for node in tree.body:
        inside = node.lineno - 8 <= line <= (node.end_lineno or node.lineno)
        if isinstance(node, ast.FunctionDef) and inside and node.args.args and node.args.args[0].annotation is not None:
            asked = ast.unparse(node.args.args[0].annotation).replace(" ", "").split("|")
            names = [name for name in asked if name in names] or names
    return names


PYTEST = (str(ROOT / ".venv" / "bin" / "python"), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header")
CONFORMANCE = "tests/conformance/test_conformance.py"


def environment(folder: Path) -> dict[str, str]:
    return os.environ | LIGHT | {"PYTHONPATH": f"{folder}:{folder}/tests:{folder}/link"}


class Reached:
    """The tests that reach a line, from one run of all tests under coverage (a quarter of an hour)."""

    def __init__(self, folder: Path, jobs: int = 2):
        self.seconds: dict[str, float] = {}
        self.lines: dict[tuple[str, str], list[str]] = {}
        self.texts = folder / "texts.json"
        texts = {module: (ROOT / module).read_text() for module in modules()}
        if not (folder / "done").is_file():
            make_copy(folder)
            files = {name for names in TESTS.values() for name in names.split()}
            command = [
                *PYTEST,
                "-n",
                str(jobs),
                "-p",
                "mutants.reached",
                CONFORMANCE,
                *sorted(f"tests/{f}" for f in files),
            ]
            print(" ".join(command), flush=True)
            subprocess.run(command, cwd=folder, env=environment(folder) | {"REACHED": str(folder)}, check=True)
            self.texts.write_text(json.dumps(texts))
            (folder / "done").write_text(" ".join(files))
        self.files = set((folder / "done").read_text().split())
        # A module that changed since has other lines: all tests of it run.
        known = {module for module, text in json.loads(self.texts.read_text()).items() if texts.get(module) == text}
        for path in folder.glob("gw*.json"):
            found = json.loads(path.read_text())
            self.seconds |= found["tests"]
            for module in known & set(found["lines"]):
                for line, tests in found["lines"][module].items():
                    self.lines.setdefault((module, line), []).extend(tests)

    def of(self, mutant: Mutant) -> Iterator[list[str]]:
        """Those that take QUICK seconds together, then MORE: of every function of tests in turn, the quickest first."""
        left: dict[str, list[str]] = {}
        for test in sorted(self.lines.get((mutant.module, str(mutant.line)), []), key=lambda t: self.seconds.get(t, 0)):
            left.setdefault(test.partition("[")[0], []).append(test)
        for seconds in (QUICK, MORE):
            chosen: list[str] = []
            while left and seconds > 0:
                for name in list(left):
                    test = left[name].pop(0)
                    if not left[name]:
                        del left[name]
                    chosen.append(test)
                    seconds -= self.seconds.get(test, 0)
                    if seconds <= 0:
                        break
            if chosen:
                yield chosen


def commands(mutant: Mutant, reached: Reached) -> Iterator[list[str]]:
    """The runs of pytest, the quickest first."""
    pytest = [*PYTEST, "-x"]
    found = list(reached.of(mutant))
    yield from ([*pytest, *tests] for tests in found)
    files = next(files for start, files in TESTS.items() if mutant.module.startswith(start)).split()
    if found:
        if later := [f"tests/{name}" for name in files if not {name, name.split("/")[0]} & reached.files]:
            yield [*pytest, *later]
        return
    is_operator = mutant.module.startswith("jquant/ops/")
    names = operators_of(mutant.module, mutant.line) if is_operator else WIDELY_USED
    if names and not mutant.module.startswith("jquant/program/insert/"):
        yield [*pytest, CONFORMANCE, "-k", " or ".join(f"[{name}" for name in names)]
    yield [*pytest, *(f"tests/{name}" for name in files)]


def make_copy(folder: Path) -> None:
    """The tracked files and those not ignored, in a folder of their own."""
    shutil.rmtree(folder, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / "link").mkdir()
    (folder / "link" / "jquant_converters").symlink_to(folder / "converters")
    (folder / "link" / "coverage").symlink_to(Path(coverage.__file__).parent)


def judge(mutant: Mutant, folder: Path, reached: Reached) -> dict[str, object]:
    """What the tests say about a mutant."""
    path = folder / mutant.module
    original = path.read_text()
    operator = cosmic_ray.plugins.get_operator(f"core/{mutant.operator}")()
    mutated = mutate_code(original, operator, mutant.occurrence)
    start, outcome, by = _processor(), "survived", ""
    env = environment(folder)
    path.write_text(mutated)
    try:
        for command in commands(mutant, reached):
            done = subprocess.run(
                command, cwd=folder, env=env, capture_output=True, text=True, timeout=WAIT, check=False
            )
            if done.returncode not in (0, 5):  # 5: no test was selected
                outcome = "killed"
                failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
                by = failed[0].split(" - ")[0] if failed else "the module does not import"
                break
            if _processor() - start > LIMIT:
                outcome = "slow"
                break
    except subprocess.TimeoutExpired:
        outcome = "slow"
    finally:
        path.write_text(original)
    before, after = original.splitlines()[mutant.line - 1], mutated.splitlines()[mutant.line - 1]
    seconds = round(_processor() - start, 1)
    return asdict(mutant) | {
        "outcome": outcome, "by": by, "seconds": seconds, "was": before.strip(), "became": after.strip()
    }  # fmt: skip


def _processor() -> float:
    """Seconds of a processor that the processes started here have taken, so that other work does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def results() -> dict[str, dict[str, object]]:
    """{key: line} of those that were judged."""
    lines = RESULTS.read_text().splitlines() if RESULTS.is_file() else []
    return {one["key"]: one for one in map(json.loads, lines)}


def table(found: list[dict[str, object]]) -> str:
    """Counts by package, and each that was not killed."""
    reasons = tomllib.loads(SURVIVORS.read_text()) if SURVIVORS.is_file() else {}
    rows = ["| part | mutants | killed | survived | slow | killed, % |", "|---|---:|---:|---:|---:|---:|"]
    parts = {name: [one for one in found if str(one["module"]).startswith(f"jquant/{name}/")] for name in PARTS}
    for name, own in (*parts.items(), ("all", found)):
        counts = Counter(one["outcome"] for one in own)
        share = 100 * counts["killed"] / max(len(own), 1)
        cells = (len(own), counts["killed"], counts["survived"], counts["slow"], f"{share:.1f}")
        rows.append(f"| {name} | " + " | ".join(map(str, cells)) + " |")
    left = [one for one in found if one["outcome"] != "killed"]
    rows += ["", "Those that were not killed:", ""] if left else []
    for one in sorted(left, key=lambda one: (str(one["module"]), int(str(one["line"])))):
        reason = reasons.get(f"{one['module']}: {one['was']} -> {one['became']}", "not looked at yet")
        rows.append(f"- {one['module']}: `{one['was']}` became `{one['became']}` ({one['outcome']}): {reason}.")
    return "\n".join(rows)


def write_page(found: list[dict[str, object]]) -> None:
    text = PAGE.read_text()
    start, end = (text.index(mark) for mark in MARKS)
    PAGE.write_text(text[: start + len(MARKS[0])] + "\n\n" + table(found) + "\n\n" + text[end:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="of the sample")
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--show", choices=("killed", "survived", "slow"), help="print these, and run nothing")
    parser.add_argument("--again", action="store_true", help="judge once more those that were not killed")
    parser.add_argument("--write", action="store_true", help="write the table into docs/reliability.md")
    given = parser.parse_args()
    known = results()
    if given.show:
        for one in known.values():
            if one["outcome"] == given.show:
                print(f"{one['module']}:{one['line']} {one['operator']}  {one['by']}")
                print(f"  - {one['was']}\n  + {one['became']}")
        return
    sample = mutants()[given.first : given.first + given.count]
    folder = COPY / f"tree-{given.first}"
    left = [m for m in sample if m.key not in known or (given.again and known[m.key]["outcome"] != "killed")]
    reached = Reached(COPY / "reached")
    if left:
        make_copy(folder)
    start = time.time()
    for i, mutant in enumerate(left, 1):
        line = judge(mutant, folder, reached)
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
        rest = (time.time() - start) / i * (len(left) - i) / 60
        print(f"{i}/{len(left)} {line['outcome']} {mutant.key} {line['seconds']} s, {rest:.0f} min left", flush=True)
    found = [one for key, one in results().items() if key in {m.key for m in sample}]
    print(table(found))
    if given.write:
        write_page(found)


if __name__ == "__main__":
    sys.exit(main())
