"""Pages with code: every block runs as it stands there, and prints what stands behind it."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.pages import PICTURES, ROOT, code_lines, differences, pictures_of, run_page

from jquant.config import qconfig_from_toml

DOCS = ROOT / "docs"
TUTORIALS = sorted(p for p in (DOCS / "tutorials").glob("*.md") if "```python" in p.read_text(encoding="utf-8"))
BRIDGES = sorted((DOCS / "coming-from").glob("*.md"))
OWN_PROCESS = {"mesh.md"}  # it sets the number of devices
LONG = {p.name for p in TUTORIALS} - {"detector.md", "mesh.md"} | {"plugin.md"}


def cases(pages: list[Path]) -> list:
    return [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.name in LONG else []) for p in pages]


@pytest.mark.parametrize("page", cases([*TUTORIALS, *BRIDGES]))
def test_a_page_prints_what_it_shows(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    text = page.read_text(encoding="utf-8")
    if page.name in OWN_PROCESS:
        found = in_own_process(page, tmp_path)
    else:
        found = run_page(text, str(page), tmp_path)
    assert not differences(text, found), "\n".join(differences(text, found))
    for name in pictures_of(text):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def in_own_process(page: Path, folder: Path) -> str:
    code = (
        "import sys\nfrom pathlib import Path\nfrom support.pages import run_page\n"
        "page = Path(sys.argv[1])\nsys.stdout.write(run_page(page.read_text(), str(page), Path(sys.argv[2])))"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-W", "error", "-c", code, str(page), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda p: p.stem)
def test_a_tutorial_is_short_shown_and_listed(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert code_lines(text) < 80
    assert "```text" in text
    assert all((PICTURES / name).is_file() for name in pictures_of(text))
    assert f"({page.name})" in (DOCS / "tutorials" / "README.md").read_text(encoding="utf-8")
    assert page.name in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_the_figures_of_the_tutorials_stand_on_their_pages() -> None:
    folder = DOCS / "tutorials"
    text = (folder / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[[^]]*\]\((\S+\.md)\)[^|]*\|[^|]*\|(.*\d\.\d.*)\|$", text, flags=re.MULTILINE)
    assert len(rows) == 9
    for name, figures in rows:
        printed = "".join(re.findall(r"```text\n(.*?)```", (folder / name).read_text(encoding="utf-8"), flags=re.S))
        for figure in re.findall(r"\d+\.\d+(?: %| dB)?", figures):
            assert figure in printed, f"{name}: {figure}"


def test_the_readme_runs_and_fits(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert {"make demo", "make test"} <= set(re.findall(r"make \w+", text))
    run_page(text, "README.md", tmp_path)
    assert (tmp_path / "net.jq").is_file()


def test_the_first_hour_runs(tmp_path: Path) -> None:
    run_page((DOCS / "first-hour.md").read_text(encoding="utf-8"), "first-hour.md", tmp_path)
    assert (tmp_path / "model.jq").is_file()


@pytest.mark.parametrize("page", ["onnx.md", "other-tools.md", "targets.md"])
def test_a_page_of_calls_runs(page: str, tmp_path: Path) -> None:
    """The lines of a reader who has a model and files: every call is one that there is, and takes the arguments."""
    foreign = ROOT / "tests" / "foreign"
    for name, source in {
        "net.onnx": "onnxruntime/qdq_residual.onnx", "net.pt2": "torchao/pt2e_symmetric_residual.pt2",
        "float.onnx": "aimet/float_residual.onnx", "float.encodings": "aimet/float_residual_1.0.0.json",
    }.items():  # fmt: skip
        shutil.copy(foreign / source, tmp_path / name)
    text = (DOCS / page).read_text(encoding="utf-8")
    if page == "other-tools.md":  # that tool's values are asymmetric
        text = text.replace('"float.encodings", ', '"float.encodings", zero_point="widen", ')
    run_page(f"```python\n{READER}```\n{text}", page, tmp_path)
    written = {"onnx.md": "ptq.json", "other-tools.md": "back.encodings", "targets.md": "mine.toml"}
    assert (tmp_path / written[page]).stat().st_size > 0


def run_importing(folder: Path) -> str:
    """Runs the blocks of docs/importing.md, and gives its commands."""
    text = (DOCS / "importing.md").read_text(encoding="utf-8")
    run_page(text, "importing.md", folder)
    (folder / "net.py").write_text(re.findall(r"```python\n(.*?)\n\n\nstate = ", text, flags=re.S)[0])
    return "\n".join(re.findall(r"```sh\n(.*?)```", text, flags=re.S))


def test_a_checkpoint_of_a_training_script_is_imported_as_the_page_says(tmp_path: Path) -> None:
    commands = run_importing(tmp_path)
    assert (tmp_path / "weights.pth").is_file()
    assert commands.count("jquant ") == 2
    assert "def make()" in (tmp_path / "net.py").read_text()


@pytest.mark.slow
def test_the_commands_for_a_checkpoint_run(tmp_path: Path) -> None:
    from PIL import Image

    commands = run_importing(tmp_path)
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.effect_noise((32, 32), 40 * i + 10).convert("RGB").save(tmp_path / "images" / f"{i}.png")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    for line in commands.splitlines():
        command = [sys.executable, "-m", *line.split()]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "net.jqs").is_file()


READER = """
import jax.numpy as jnp
import jquant as jq
qconfig = jq.QConfig(jq.templates.int8_default())
graph, params = jq.trace(lambda p, x: x @ p["w"], {"w": jnp.eye(3)}, jnp.ones((2, 3)))
model = jq.calibrate(jq.prepare(graph, params, qconfig, target="nash-e"), [jnp.ones((2, 3))])
"""


def test_a_difference_is_seen() -> None:
    """Words and integers count exactly, decimals by a twentieth."""
    assert not differences("error 0.0123, 0 differ", "error 0.0125, 0 differ")
    assert differences("error 0.0123, 0 differ", "error 0.0190, 0 differ")
    assert differences("error 0.0123, 0 differ", "error 0.0123, 1 differ")
    assert differences("near", "near\nfar")


@pytest.mark.slow
def test_the_recipe_of_the_command_line(tmp_path: Path) -> None:
    """Its TOML file is saved under the name that the commands use; each command succeeds."""
    text = (DOCS / "tutorials" / "command-line.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"```toml\n(.*?)```", text, flags=re.S)
    (tmp_path / "recipe.toml").write_text(recipe)
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, flags=re.S) for line in block.splitlines()]
    assert len(lines) == 8
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    for line in lines:
        command = [sys.executable, "-m", *line.split()]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"
    assert (tmp_path / "report" / "report.html").is_file()


def test_the_recipe_is_a_recipe() -> None:
    """The quick sibling: the TOML of the page is read, and its rules are those that the page names."""
    text = (DOCS / "tutorials" / "command-line.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"```toml\n(.*?)```", text, flags=re.S)
    rules = tomllib.loads(recipe)
    rules_alone = recipe.partition("[train]")[0].replace('[target]\nmarch = "nash-e"\n', "")
    qconfig = qconfig_from_toml(rules_alone)
    assert set(qconfig.rules) == set(rules["rules"]) == {"*", "head"}
    assert qconfig.policy("head", "Linear").weight.dtype == "int8"
    assert qconfig.policy("stem", "Conv").weight.dtype == "int4"
