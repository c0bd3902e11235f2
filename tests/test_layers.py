"""Imports go downward only, optional and heavy dependencies load only when used: ARCHITECTURE.md, checked."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = (
    {"types", "text", "progress", "numerics"},
    {"quantizers", "observers", "qconfig", "templates", "qconfig_file", "ir", "targets"},
    {"ops"},
    {
        "accumulators",
        "adapt",
        "apply",
        "batch_norm",
        "bit_true",
        "calibrate",
        "checkpoint",
        "describe",
        "images",
        "insert",
        "integer",
        "lower",
        "migrate",
        "optimizer_state",
        "plan_file",
        "prepare",
    }
    | {
        "flax",
        "ptq",
        "qat",
        "quantize",
        "quantize_params",
        "region",
        "rolled",
        "simulate",
        "stablehlo",
        "states",
        "trace",
    }
    | {"training"},
    {"analysis", "reference"},
    {"cli", "__main__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

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
    is_root = importer == "jquant"
    layer = None if is_root else importer.split(".")[1]
    if top in sys.stdlib_module_names:
        return None
    if layer == "reference" and not is_within(target, REFERENCE_MAY_IMPORT):
        return f"jquant.reference may import only {', '.join(sorted(REFERENCE_MAY_IMPORT))} and the standard library"
    if top in CONVERTERS_ONLY:
        return f"only jquant_converters may import {top}"
    if top != "jquant":
        eager = EAGER_IN_CLI if layer == "cli" else EAGER
        return None if lazy or top in eager else f"import {top} inside the function that needs it"
    if is_root or layer in ("cli", "__main__"):
        return None
    target_layer = target.removeprefix("jquant").removeprefix(".").split(".")[0]
    if target_layer not in LEVEL:
        return "import from the module that defines the name, not from jquant itself"
    if LEVEL[target_layer] > LEVEL[layer]:
        return f"{layer} is in layer {LEVEL[layer]}, {target_layer} above it in layer {LEVEL[target_layer]}"
    return None


def violations(root: Path) -> list[str]:
    found = []
    for path in sorted((root / "jquant").rglob("*.py")):
        name, where = module_name(path, root), path.relative_to(root).as_posix()
        if name != "jquant" and name.split(".")[1] not in LEVEL:
            found.append(f"{where}: jquant.{name.split('.')[1]} has no layer: add it to LAYERS in tests/test_layers.py")
            continue
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for target, line, lazy in imports(ast.parse(path.read_bytes(), filename=where), package):
            if reason := rule_broken(name, target, lazy):
                found.append(f"{where}:{line}: imports {target}: {reason}")
    return found


def test_imports_follow_the_layers() -> None:
    assert not (found := violations(ROOT)), "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "reason"),
    [
        ("types.py", "from jquant.ops.conv import Conv", "types is in layer 0, ops above it in layer 2"),
        ("types.py", "from . import lower", "lower above it"),
        ("types.py", "def f():\n    from .lower import lower", "lower above it"),
        ("ops/conv.py", "from .. import prepare", "prepare above it"),
        ("ops/__init__.py", "from ..analysis.report import html", "analysis above it"),
        ("ops/conv.py", "if TYPE_CHECKING:\n    import jquant.cli", "cli above it"),
        ("lower.py", "import jquant as jq", "not from jquant itself"),
        ("lower.py", "from . import __version__", "not from jquant itself"),
        ("lower.py", "def f():\n    import torch.nn", "only jquant_converters may import torch"),
        ("lower.py", "def f():\n    importlib.import_module('onnx')", "only jquant_converters may import onnx"),
        ("qat.py", "from optax import adam", "import optax inside the function"),
        ("analysis/report.py", "class A:\n    import jinja2", "import jinja2 inside the function"),
        ("cli.py", "import rich.table", "import rich inside the function"),
        ("reference/run.py", "import jax", "jquant.reference may import only"),
        ("reference/run.py", "from ..numerics import rescale", "jquant.reference may import only"),
        ("helpers.py", "", "add it to LAYERS"),
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
        ("types.py", "from . import numerics\nimport jax.numpy as jnp, numpy as np, chex, dataclasses"),
        ("ops/conv.py", "from ..types import Op\nfrom .linear import Linear\nfrom jquant.ir import graph"),
        ("lower.py", "def f():\n    import optax, orbax.checkpoint\n    from safetensors.numpy import save"),
        ("cli.py", "import typer, jquant as jq\ndef f():\n    from jquant_converters import from_torch"),
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
    assert heavy_after("import jquant") <= heavy_after(f"import {', '.join(sorted(EAGER))}")


def heavy_after(statement: str) -> set[str]:
    """The heavy modules that a fresh interpreter has loaded once it has run `statement`."""
    code = f"{statement}\nimport sys\nprint(*(name for name in {sorted(HEAVY)} if name in sys.modules))"
    return set(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split())
