"""Imports go down to packages that are listed, and optional and heavy dependencies load only where they are used."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Every package of jquant and the two modules above the ground, the lowest floor first, with the packages that each may
# import. Those are on lower floors.
FLOORS = {
    "numerics": set(),
    "targets": set(),
    "graph": {"numerics"},
    "images": {"numerics", "graph"},
    "quantizers": {"numerics"},
    "observers": {"numerics"},
    "config": {"quantizers", "observers"},
    "ops": {"numerics", "graph"},
    "plan": {"numerics", "targets", "graph", "quantizers", "observers", "config", "ops"},
    "drafts": {"graph", "ops", "plan"},
    "calibration": {"numerics", "graph", "config", "observers", "ops", "plan"},
    "program": {"numerics", "targets", "graph", "ops", "plan"},
    "meanings": {"numerics", "graph", "quantizers", "config", "ops", "plan", "program"},
    "evaluation": {"graph", "plan", "program", "meanings"},
    "training": {"numerics", "calibration", "config", "graph", "ops", "plan", "meanings"},
    "ptq": {"numerics", "graph", "quantizers", "observers", "ops", "plan", "calibration", "meanings"},
    "functions": {"targets", "graph", "drafts", "config", "ops", "plan"}
    | {"calibration", "program", "meanings", "training"},
    "flax": {"functions"},
    "analysis": {"numerics", "targets", "graph", "quantizers", "observers", "config", "ops", "plan", "program"}
    | {"meanings", "evaluation", "calibration", "training", "ptq"},
    "reference": set(),
    "board": {"numerics", "targets", "graph", "config", "ops", "plan", "program", "reference"},
    "cli": {"numerics", "targets", "graph", "images", "config", "ops", "plan", "calibration", "program", "meanings"}
    | {"evaluation", "training", "functions", "analysis", "board"},
    "__main__": {"cli"},
}

# The ground: what every package may import. Of each other they may import what stands here.
GROUND = {"text": set(), "types": {"text"}, "host": set()}

ROOTS = {"jquant", "jquant.api"}  # the roof: they may import everything, and nothing imports them

# Plain modules beside the packages, __init__ among them.
MOST_PLAIN_MODULES = 7

# Folders of tests that are not named after a package of jquant.
OTHER_TESTS = {
    "benchmarks",
    "conformance",
    "converters",
    "device",
    "examples",
    "faq",
    "faults",
    "foreign",
    "fuzz",
    "golden",
}

# `reference` is an independent second implementation: it may lean on nothing that it is there to check.
REFERENCE_MAY_IMPORT = {"jquant.types", "jquant.reference", "numpy"}

# Third-party modules that jquant may import at the top of a module; others only inside the function that needs them.
EAGER = {"chex", "jax", "numpy"}
EAGER_IN_CLI = EAGER | {"typer"}

# Never in jquant, not even inside a function: jquant_converters is the only place that knows them.
CONVERTERS_ONLY = {"torch", "onnx"}

HEAVY = {"flax", "jinja2", "matplotlib", "onnx", "optax", "orbax", "rich", "safetensors", "torch"}


def module_name(path: Path, root: Path) -> str:
    """`root/jquant/ops/conv.py` -> `jquant.ops.conv`; a package is named by its folder."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, package: str, lazy: bool = False) -> Iterator[tuple[str, int, bool]]:
    """Yields (absolute dotted name, line, inside a function) for every import below `tree`.

    `from a import b` yields `a.b`: whether b is a module or a name in one, the layer of the first parts is the same.
    """
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.Import():
                yield from ((alias.name, node.lineno, lazy) for alias in node.names)
            case ast.ImportFrom():
                base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                base += [node.module] if node.module else []
                yield from ((".".join([*base, alias.name]), node.lineno, lazy) for alias in node.names)
            case ast.Call(func=ast.Name(id=f) | ast.Attribute(attr=f), args=[ast.Constant(value=str(target)), *_]):
                if f in ("import_module", "__import__"):
                    yield target, node.lineno, lazy
        yield from imports(node, package, lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def is_within(name: str, allowed: set[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in allowed)


def rule_broken(importer: str, target: str, lazy: bool) -> str | None:
    """Says which rule `importer` breaks by importing `target`, or None. Both are absolute dotted names."""
    top = target.split(".")[0]
    is_root = importer in ROOTS
    package = None if is_root else importer.split(".")[1]
    if top in sys.stdlib_module_names:
        return None
    if package == "reference" and not is_within(target, REFERENCE_MAY_IMPORT):
        return f"jquant.reference may import only {', '.join(sorted(REFERENCE_MAY_IMPORT))} and the standard library"
    if top in CONVERTERS_ONLY:
        return f"only jquant_converters may import {top}"
    if top != "jquant":
        eager = EAGER_IN_CLI if package == "cli" else EAGER
        return None if lazy or top in eager else f"import {top} inside the function that needs it"
    if is_root:
        return None
    wanted = package_of(target)
    if wanted not in FLOORS | GROUND:
        return None if package == "cli" else "import from the module that defines the name, not from jquant itself"
    allowed = GROUND.get(package) if package in GROUND else FLOORS[package] | GROUND.keys()
    if wanted != package and wanted not in allowed:
        return f"{package} may import {', '.join(sorted(allowed)) or 'nothing'}, and not {wanted}"
    return None


def package_of(name: str) -> str:
    """`jquant.ops.conv.Conv` -> `ops`; `jquant` itself -> ``."""
    return name.removeprefix("jquant").removeprefix(".").split(".")[0]


def modules(root: Path) -> Iterator[tuple[Path, str, Iterator[tuple[str, int, bool]]]]:
    """(path, dotted name, imports) of every module of jquant."""
    for path in sorted((root / "jquant").rglob("*.py")):
        name = module_name(path, root)
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        yield path, name, imports(ast.parse(path.read_bytes(), filename=str(path)), package)


def violations(root: Path) -> list[str]:
    found = []
    for path, name, targets in modules(root):
        where = path.relative_to(root).as_posix()
        if name not in ROOTS and package_of(name) not in FLOORS | GROUND:
            found.append(
                f"{where}: jquant.{package_of(name)} has no floor: add it to FLOORS in tests/test_layers.py, or put "
                "the module into a package"
            )
            continue
        for target, line, lazy in targets:
            if reason := rule_broken(name, target, lazy):
                found.append(f"{where}:{line}: imports {target}: {reason}")
    return found


def test_imports_go_down_to_the_packages_that_are_listed() -> None:
    assert not (found := violations(ROOT)), "\n" + "\n".join(found)


def test_a_package_may_import_lower_floors_only() -> None:
    below: set[str] = set()
    for package, allowed in FLOORS.items():
        assert allowed <= below, f"{package}: {', '.join(sorted(allowed - below))} must stand above it in FLOORS"
        below.add(package)


def test_no_permission_is_left_over() -> None:
    used: dict[str, set[str]] = {package: set() for package in FLOORS}
    for _, name, targets in modules(ROOT):
        if (package := package_of(name)) in FLOORS:
            used[package] |= {package_of(target) for target, _, _ in targets if target.split(".")[0] == "jquant"}
    left = {package: sorted(allowed - used[package]) for package, allowed in FLOORS.items() if allowed - used[package]}
    assert not left, f"take out of FLOORS what is not imported any more: {left}"


def test_few_modules_lie_beside_the_packages() -> None:
    plain = sorted(path.stem for path in (ROOT / "jquant").glob("*.py"))
    assert len(plain) <= MOST_PLAIN_MODULES, plain


def test_tests_lie_as_the_packages_do() -> None:
    tests = ROOT / "tests"
    folders = {path.parent.relative_to(tests).as_posix() for path in tests.rglob("test_*.py")} - {"."} - OTHER_TESTS
    assert {folder for folder in folders if not (ROOT / "jquant" / folder / "__init__.py").exists()} == set()
    helpers = {path.stem for path in tests.glob("*.py") if not path.stem.startswith("test_")}
    assert helpers == {"conftest"}, "what tests share lies in tests/support"


@pytest.mark.parametrize(
    ("path", "source", "reason"),
    [
        ("types.py", "from jquant.ops.conv import Conv", "types may import text, and not ops"),
        ("types.py", "from . import plan", "and not plan"),
        ("types.py", "def f():\n    from .program.lower import lower", "and not program"),
        ("text.py", "from .types import Op", "text may import nothing, and not types"),
        ("ops/conv.py", "from .. import plan", "and not plan"),
        ("ops/conv.py", "from jquant.quantizers import lsq", "and not quantizers"),  # on a lower floor, but not listed
        ("ops/__init__.py", "from ..analysis.report import html", "and not analysis"),
        ("ops/conv.py", "if TYPE_CHECKING:\n    import jquant.cli", "and not cli"),
        ("program/insert/front.py", "from jquant.meanings import apply", "and not meanings"),
        ("program/lower.py", "import jquant as jq", "not from jquant itself"),
        ("program/lower.py", "from .. import __version__", "not from jquant itself"),
        ("program/lower.py", "def f():\n    import torch.nn", "only jquant_converters may import torch"),
        ("plan/lower.py", "def f():\n    importlib.import_module('onnx')", "only jquant_converters may import onnx"),
        ("training/state.py", "from optax import adam", "import optax inside the function"),
        ("analysis/report.py", "class A:\n    import jinja2", "import jinja2 inside the function"),
        ("cli/report.py", "import rich.table", "import rich inside the function"),
        ("reference/run.py", "import jax", "jquant.reference may import only"),
        ("reference/run.py", "from ..numerics import rescale", "jquant.reference may import only"),
        ("helpers.py", "", "has no floor"),
        ("helpers/files.py", "", "has no floor"),
    ],
)
def test_a_violation_is_reported(tmp_path: Path, path: str, source: str, reason: str) -> None:
    plant(tmp_path, path, source)
    (only,) = violations(tmp_path)
    assert only.startswith(f"jquant/{path}:")
    assert reason in only


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("__init__.py", "from jquant import cli\nfrom .types import QuantSpec"),
        ("types.py", "from . import text\nimport jax.numpy as jnp, numpy as np, chex, dataclasses"),
        ("ops/conv.py", "from ..types import Op\nfrom .linear import Linear\nfrom jquant.graph import operator"),
        ("program/insert/front.py", "from ...numerics import rescale\nfrom ..lower import lower"),
        ("program/lower.py", "def f():\n    import optax, orbax.checkpoint\n    from safetensors.numpy import save"),
        ("cli/app.py", "import typer, jquant as jq\ndef f():\n    from jquant_converters import from_torch"),
        ("reference/run.py", "import math, numpy as np\nfrom ..types import Op\nfrom . import conv"),
    ],
)
def test_a_good_import_is_not_reported(tmp_path: Path, path: str, source: str) -> None:
    plant(tmp_path, path, source)
    assert violations(tmp_path) == []


def plant(root: Path, path: str, source: str) -> None:
    file = root / "jquant" / path
    file.parent.mkdir(parents=True)
    file.write_text(source)


def test_import_jquant_loads_no_heavy_dependency() -> None:
    """Beyond what its eager dependencies load on their own, which is theirs to decide."""
    assert heavy_after("import jquant; jquant.prepare") <= heavy_after(f"import {', '.join(sorted(EAGER))}")


def test_import_jquant_alone_loads_nothing() -> None:
    """The command line has its help before jax is there; every public name is there once it is asked for."""
    code = "import jquant, sys; jquant.__version__; print(*({'jax', 'numpy', 'jquant.ops'} & {*sys.modules}))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split() == []
    code = "from jquant import *; from jquant import load, types; import jquant as jq; print(len(dir(jq)), jq.ops.Conv)"
    assert "jquant.ops.conv.Conv" in subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    code = "import jquant; jquant.prepaer"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "AttributeError: module 'jquant' has no attribute 'prepaer'" in found.stderr


def heavy_after(statement: str) -> set[str]:
    """The heavy modules that a fresh interpreter has loaded once it has run `statement`."""
    code = f"{statement}\nimport sys\nprint(*(name for name in {sorted(HEAVY)} if name in sys.modules))"
    return set(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split())


def test_only_meanings_and_training_make_a_rule_of_fake_quant() -> None:
    """All else asks `meaning_of`, which folds a kept batch norm; training keeps it live by `training_meaning`."""
    found = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "jquant").rglob("*.py")
        if any(word in path.read_text() for word in ("fake_quant_rule(", "with_tables("))
    }
    meanings = {f"jquant/meanings/{name}.py" for name in ("fake_quant", "meaning", "rolled")}
    assert found == meanings | {"jquant/training/state.py"}
