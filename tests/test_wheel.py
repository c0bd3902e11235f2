"""The wheel holds every file of the packages, imports where the checkout is out of sight, and installs by pip alone."""

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"jquant": "jquant", "converters": "jquant_converters"}  # folder in the checkout: name once installed

IGNORED = shutil.ignore_patterns("__pycache__", ".*", "*~")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the wheel is made of: no build/ or *.egg-info of an earlier build that could fill a gap."""
    copy = tmp_path_factory.mktemp("source")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=IGNORED)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    build = subprocess.run([*pip, "--wheel-dir", folder, source], capture_output=True, text=True, check=False)
    assert build.returncode == 0, build.stdout + build.stderr
    (wheel,) = folder.glob("jquant-*.whl")
    return wheel


def test_wheel_holds_exactly_the_files_of_the_packages(source: Path, wheel: Path) -> None:
    """Modules, py.typed, templates: a package or a kind of data forgotten in pyproject.toml shows up here."""
    # setuptools writes build/ and *.egg-info beside the folders, never into them, so the copy is still the truth.
    expected = {
        f"{installed}/{path.relative_to(source / folder).as_posix()}"
        for folder, installed in FOLDERS.items()
        for path in (source / folder).rglob("*")
        if path.is_file()
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected
    assert "jquant/py.typed" in held


def test_wheel_imports_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """-I and -S keep out cwd, PYTHONPATH and the .pth files, thereby the editable install, which would fill any gap."""
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)  # what installing a pure wheel comes to
    dependencies = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    modules = sorted(
        ".".join(path.relative_to(installed).parent.parts)
        for name in FOLDERS.values()
        for path in (installed / name).rglob("__init__.py")
    )
    code = "\n".join(
        [
            "import sys",
            f"sys.path[:0] = {[str(installed), *dependencies]}",
            *(f"import {module}" for module in modules),
            f"print(*(sys.modules[name].__file__ for name in {modules}), sep='\\n')",
        ]
    )
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [str(installed / module.replace(".", "/") / "__init__.py") for module in modules]


# ---------------------------------------------------------------------------------------------------------------------
# Fresh environments


def installed(folder: Path, *requirements: str) -> Path:
    """The Python of a new environment with what pip installs."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return python


def output(python: Path, *arguments: str, folder: Path) -> str:
    done = subprocess.run(
        [python, "-I", *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def readme(*sections: str) -> str:
    """The code blocks of sections of the README, in order."""
    parts = re.split(r"^## (.+)$", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M)
    texts = dict(zip(parts[1::2], parts[2::2], strict=True))
    return "\n".join(
        block for name in sections for block in re.findall(r"^```python\n(.*?)^```", texts[name], flags=re.S | re.M)
    )


@pytest.mark.slow
def test_a_minimal_install_runs_the_example_for_jax(wheel: Path, tmp_path: Path) -> None:
    """jax, numpy and chex come with it, and neither torch nor onnx."""
    python = installed(tmp_path / "env", str(wheel))
    head = "import jax.numpy as jnp\nimport jquant as jq\nint8 = jq.QConfig(jq.templates.int8_default())\n"
    tail = "\nimport sys\nprint({'torch', 'onnx', 'flax'} & set(sys.modules), y.shape)"
    code = head + readme("From JAX, flax or equinox") + tail
    assert output(python, "-c", code, folder=tmp_path).split("\n")[-2] == "set() (32, 4)"
    assert (tmp_path / "net.jq").is_file()
    export = "import jquant as jq\njq.to_stablehlo('net.hlo', jq.load('net.jq'))\nprint(jq.from_stablehlo('net.hlo'))"
    assert "PjitFunction" in output(python, "-c", export, folder=tmp_path)
    without = "from jquant_converters import from_torch"
    done = subprocess.run([python, "-I", "-c", without], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "pip install 'jquant[torch]'" in done.stderr


@pytest.mark.slow
def test_an_install_with_all_extras_runs_the_readme_and_the_commands(wheel: Path, tmp_path: Path) -> None:
    pinned = re.findall(r"^torch==\S+", (ROOT / "requirements-dev.txt").read_text(encoding="utf-8"), flags=re.M)
    python = installed(tmp_path / "env", f"jquant[all] @ {wheel.as_uri()}", *pinned)
    code = readme("From PyTorch", "From JAX, flax or equinox") + "\nprint(y.shape)"
    assert "(32, 4)" in output(python, "-c", code, folder=tmp_path)
    assert "0.2.0" in output(python, "-m", "jquant", "doctor", folder=tmp_path)
    assert "jquant report jquant-demo" in output(python, "-m", "jquant", "demo", folder=tmp_path)
