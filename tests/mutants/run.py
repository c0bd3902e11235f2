"""Mutants of the integer code: which of 400 changes of single expressions the tests notice.

    make mutants                                    # goes on where it was; writes docs/reliability.md
    .venv-mutants/bin/python tests/mutants/run.py --count 40 --first 120
    .venv-mutants/bin/python tests/mutants/run.py --show survived

cosmic-ray finds the places and makes the mutants, in a copy of the tracked files. The sample follows from the text of
the lines: of each place one mutant, annotations left out. Where a line changes, its mutants do, and no others. At first
all tests run once, and coverage notes which of them reach which line. The tests of a mutant are those that reach its
line: QUICK seconds of them, then MORE, then the file of tests with the name of the module. A line that runs when its
module is imported has the tests of the module, first those with the name of its operator. The first failure ends them:

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
import re
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

# Folders of tests that run under coverage: those that compute integers, or float meanings of operators.
RUN = {"calibration", "config", "conformance", "converters", "faq", "faults", "foreign", "functions", "fuzz", "graph"}
RUN |= {"meanings", "numerics", "observers", "ops", "plan", "program", "quantizers", "reference", "targets"}

COUNT, SEED, LIMIT = 400, 11, 400
QUICK, MORE = 20, 120  # seconds of tests that reach the line, and of further ones where these notice nothing
NO_SUCH_TEST = 4  # a return code of pytest
WAIT = 1200  # seconds for one run of pytest beside other work; a test that hangs
LIGHT = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false", "CI": "true"}
PARTS = ("numerics", "ops", "program")
# What `lower` and `run` never use: lists of names, the meanings in float, and an operator without integers.
LEFT_OUT = {"jquant/ops/__init__.py", "jquant/ops/functional.py", "jquant/ops/names.py", "jquant/program/cache.py"}
LEFT_OUT |= {"jquant/ops/resample_weights.py"}


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
    """The operator classes that a line declares, or whose rule it belongs to; all of the module where there is none."""
    tree = ast.parse((ROOT / module).read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for name, node in classes.items():
        if min([node.lineno, *(d.lineno for d in node.decorator_list)]) <= line <= (node.end_lineno or node.lineno):
            derived = [n for n, c in classes.items() if name in map(ast.unparse, c.bases)]
            return [name, *derived]
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and "jquant.ops" in str(node.module)]
    names = [*classes, *(alias.name for node in imports for alias in node.names if alias.name[0].isupper())]
    for function in tree.body:  # of the rules of operators
        if not isinstance(function, ast.FunctionDef) or not function.args.args:
            continue
        first = min([function.lineno, *(d.lineno for d in function.decorator_list)])
        kind = function.args.args[0].annotation
        if first <= line <= (function.end_lineno or function.lineno) and kind is not None:
            asked = [*ast.unparse(kind).replace(" ", "").split("|"), *map(_registered, function.decorator_list)]
            names = [name for name in asked if name in names] or names
    return names


def function_of(module: str, line: int) -> range:
    """The lines of the function that a line belongs to, with its decorators."""
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if first <= line <= (node.end_lineno or node.lineno):
                return range(first, 1 + (node.end_lineno or node.lineno))
    return range(line, line + 1)


def _registered(decorator: ast.expr) -> str:
    """The class of `@rule.register(Class)`."""
    return ast.unparse(decorator.args[0]) if isinstance(decorator, ast.Call) and decorator.args else ""


PYTEST = (str(ROOT / ".venv" / "bin" / "python"), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header")


def environment(folder: Path) -> dict[str, str]:
    """Most programs of a mutant are those of the original: their compiled forms are kept."""
    kept = {"JAX_COMPILATION_CACHE_DIR": str(COPY / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    kept |= {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    return os.environ | LIGHT | kept | {"PYTHONPATH": f"{folder}:{folder}/tests:{folder}/link"}


class Reached:
    """The tests that reach a line, from runs of the tests under coverage (half an hour of two processors).

    `folder` holds a run in each of its folders, with the texts of the modules and of the files of tests at that time.
    Files of tests that are new since, or changed, run once more.
    """

    def __init__(self, folder: Path, jobs: int = 2):
        self.seconds: dict[str, float] = {}
        self.lines: dict[tuple[str, str], list[str]] = {}
        self.files = {str(path.relative_to(ROOT)): path.read_text() for path in sorted(ROOT.glob("tests/**/test_*.py"))}
        self.files = {name: text for name, text in self.files.items() if name.split("/")[1] in RUN}
        runs = [path.parent for path in sorted(folder.glob("*/done"))]
        left = set(self.files)
        for run in reversed(runs):
            left -= self.add(run, left)
        if left:
            run = folder / str(len(runs))
            self.run(run, sorted(left), jobs)
            self.add(run, left)

    def run(self, folder: Path, files: list[str], jobs: int) -> None:
        make_copy(folder / "tree")
        texts = {name: (ROOT / name).read_text() for name in modules()}
        command = [*PYTEST, "-n", str(jobs), "--dist", "worksteal", "-p", "mutants.reached", *files]
        print(f"{len(files)} files of tests run under coverage", flush=True)
        env = environment(folder / "tree") | {"REACHED": str(folder)}
        subprocess.run(command, cwd=folder / "tree", env=env, check=False)  # a test that fails is left out
        if len(list(folder.glob("gw*.json"))) != jobs:
            raise RuntimeError(f"a process of pytest wrote nothing to {folder}")
        (folder / "done").write_text(json.dumps({"modules": texts, "tests": {n: self.files[n] for n in files}}))

    def add(self, run: Path, wanted: set[str]) -> set[str]:
        """Takes over what a run found of these files, where they are as they were; returns which."""
        texts = json.loads((run / "done").read_text())
        files = {name for name in wanted if texts["tests"].get(name) == self.files[name]}
        # A module that changed since has other lines: the tests of its names run.
        known = {name for name in modules() if texts["modules"].get(name) == (ROOT / name).read_text()}
        for path in run.glob("gw*.json"):
            found = json.loads(path.read_text())
            passed = {t: seconds for t, seconds in found["tests"].items() if t.partition("::")[0] in files}
            self.seconds |= passed
            for module in known & set(found["lines"]):
                for line, tests in found["lines"][module].items():
                    self.lines.setdefault((module, line), []).extend(t for t in tests if t in passed)
        return files

    def tests(self, mutant: Mutant) -> list[str]:
        """Those that reach the line; of one that runs when its module is imported those of its function, else of all.

        First come those with the name of an operator that stands in the line, then of one that it belongs to, then
        those of the folder that mirrors the module's, then those that also reach the lines of its function that fewest
        tests reach, and the quickest.
        """
        module, line = mutant.module, mutant.line
        names = operators_of(module, line) if module.startswith("jquant/ops/") else []
        named = re.compile("|".join(rf"\b{name}\b" for name in names) or "(?!)")
        around = function_of(module, line)
        reached = {n: self.lines.get((module, str(n)), []) for n in around}
        found = set(reached[line])
        if not found:
            found = {test for tests in reached.values() for test in tests}
        if not found:
            found = {test for (name, _), tests in self.lines.items() if name == module for test in tests}
            found |= {test for test in self.seconds if named.search(test)}
        fewest = dict.fromkeys(found, len(found))
        for tests in reached.values():
            fewest |= {test: min(fewest[test], len(tests)) for test in tests if test in fewest}
        mirror = f"tests/{module.split('/')[1]}/"
        text = (ROOT / module).read_text().splitlines()[line - 1]
        own = re.compile("|".join(rf"\b{name}\b" for name in names if re.search(rf"\b{name}\b", text)) or "(?!)")

        def rank(test: str) -> tuple[bool, bool, bool, int, float]:
            of_line, of_rule = own.search(test) is not None, named.search(test) is not None
            return not of_line, not of_rule, not test.startswith(mirror), fewest[test], self.seconds[test]

        return sorted(found, key=rank)

    def of(self, mutant: Mutant, more: int) -> Iterator[list[str]]:
        """Those that take QUICK seconds together, then MORE, of every function of tests in turn; last the file of tests
        that has the name of the module."""
        left: dict[str, list[str]] = {}
        for test in self.tests(mutant):
            left.setdefault(test.partition("[")[0], []).append(test)
        for seconds in (QUICK, more):
            chosen: list[str] = []
            while left and seconds > 0:
                for name in list(left):
                    test = left[name].pop(0)
                    if not left[name]:
                        del left[name]
                    chosen.append(test)
                    seconds -= self.seconds[test]
                    if seconds <= 0:
                        break
            if chosen:
                yield chosen
        _, part, *_, file = mutant.module.split("/")
        if (own := f"tests/{part}/test_{file}") in self.files:
            yield [own]


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


def run_tests(tests: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Those that there are: a mutant may change the parameters of a test, and so its name, which says nothing."""

    def pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*PYTEST, *arguments],
            cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=WAIT, check=False,
        )  # fmt: skip

    done = pytest("-x", *tests)
    if done.returncode != NO_SUCH_TEST:
        return done
    collected = pytest("--collect-only", *{name.partition("::")[0] for name in tests})
    there = [name for name in tests if name in set(collected.stdout.splitlines())]
    return collected if collected.returncode else pytest("-x", *there) if there else collected


def judge(mutant: Mutant, folder: Path, reached: Reached, more: int) -> dict[str, object]:
    """What the tests say about a mutant."""
    path = folder / mutant.module
    original = path.read_text()
    operator = cosmic_ray.plugins.get_operator(f"core/{mutant.operator}")()
    mutated = mutate_code(original, operator, mutant.occurrence)
    start, outcome, by = _processor(), "survived", ""
    path.write_text(mutated)
    try:
        for tests in reached.of(mutant, more):
            done = run_tests(tests, folder)
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


def reasons() -> dict[str, str]:
    return tomllib.loads(SURVIVORS.read_text()) if SURVIVORS.is_file() else {}


def named(one: dict[str, object]) -> str:
    return f"{one['module']}: {one['was']} -> {one['became']}"


def is_open(one: dict[str, object]) -> bool:
    """Not killed, without a reason."""
    return one["outcome"] != "killed" and named(one) not in reasons()


def table(found: list[dict[str, object]]) -> str:
    """Counts by package, and each that was not killed."""
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
        reason = reasons().get(named(one), "not looked at yet")
        rows.append(f"- {one['module']}: `{one['was']}` became `{one['became']}` ({one['outcome']}): {reason}.")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="of the sample")
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--show", choices=("killed", "survived", "slow"), help="print these, and run nothing")
    parser.add_argument("--more", type=int, default=MORE, help="seconds of further tests")
    parser.add_argument("--again", action="store_true", help="judge once more those that survived without a reason")
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
    left = [m for m in sample if m.key not in known or (given.again and is_open(known[m.key]))]
    reached = Reached(COPY / "reached")
    if left:
        make_copy(folder)
    start = time.time()
    for i, mutant in enumerate(left, 1):
        line = judge(mutant, folder, reached, given.more)
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
        rest = (time.time() - start) / i * (len(left) - i) / 60
        print(f"{i}/{len(left)} {line['outcome']} {mutant.key} {line['seconds']} s, {rest:.0f} min left", flush=True)
    found = [one for key, one in results().items() if key in {m.key for m in sample}]
    print(table(found))
    if given.write:
        sys.path.insert(0, str(ROOT / "tests"))
        from support.reliability import write_section

        write_section("mutants", "make mutants", table(found).splitlines())


if __name__ == "__main__":
    sys.exit(main())
