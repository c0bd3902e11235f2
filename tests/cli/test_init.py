"""`jquant init` writes the settings there are and no others: each reads as the default, switched off and on."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from support.marches import NARROW
from typer.testing import CliRunner

import jquant as jq
from jquant.cli import demo
from jquant.cli.application import app
from jquant.cli.init import settings_text
from jquant.cli.settings import ImageSettings, Settings, TrainSettings, read_settings
from jquant.cli.state import State, save_state
from jquant.config.qconfig import observer_named, quantizer_named

DOCS = Path(__file__).parents[2] / "docs"


def read(text: str, tmp_path: Path) -> Settings:
    (tmp_path / "q.toml").write_text(text)
    return read_settings(tmp_path / "q.toml")


def switched_on(text: str) -> str:
    return re.sub(r"^#(?=\S)", "", text, flags=re.M)


def test_what_is_written_is_the_default(tmp_path: Path) -> None:
    graph, _ = demo.network()
    for text in (settings_text(jq.targets.NASH_E, None), settings_text(jq.targets.NASH_E, graph)):
        found = read(text, tmp_path)
        assert found == Settings(qconfig=jq.QConfig(jq.templates.int8_default()))


def test_every_setting_is_there_with_its_default(tmp_path: Path) -> None:
    text = switched_on(settings_text(jq.targets.NASH_M, None))
    found = read(text, tmp_path)
    assert found.march == jq.targets.NASH_M
    for cls, own in ((ImageSettings, found.image), (TrainSettings, found.train)):
        table = text[text.index(f"[{'image' if cls is ImageSettings else 'train'}]") :]
        for field in fields(cls):
            if isinstance(field.default, jq.FrozenMap):
                assert getattr(own, field.name) == jq.FrozenMap({"*": True})
                continue
            assert re.search(rf"^{field.name} = ", table, flags=re.M), field.name
            assert getattr(own, field.name) == (256 if field.default is None else field.default)
    assert found.train.switched


def test_every_layer_has_a_rule_and_pictures_have_their_size(tmp_path: Path) -> None:
    graph, _ = demo.network()
    text = settings_text(jq.targets.NASH_E, graph)
    found = read(switched_on(text), tmp_path)
    assert set(found.qconfig.rules) == {"*", "x", *(node.name for node in graph.nodes)}
    assert found.qconfig.rules["stem"].weight.axis == "out"
    assert found.qconfig.rules["add"].output.dtype == "int16"
    assert found.qconfig.rules["add"].weight == jq.Policy().weight
    assert (found.image.resize, found.image.color, found.image.layout) == ((16, 16), "gray", "nchw")
    assert "# input x: float32 [batch, 1, 16, 16]" in text


def test_the_names_in_its_comments_are_those_there_are(tmp_path: Path) -> None:
    text = settings_text(jq.targets.NASH_E, None)
    named = {key: re.search(rf"#   {key} +[^:]*: ([\w, \n#]+?)\n#   ?[a-z]", text) for key in ("observer", "quantizer")}
    observers = re.findall(r"\w+", named["observer"][1])
    quantizers = re.findall(r"\w+", named["quantizer"][1])
    assert len(observers) >= 9
    assert len(quantizers) >= 4
    for name in observers:
        assert observer_named(name).name == name
        assert read(text.replace('dtype = "int8"', f'dtype = "int8"\nobserver = "{name}"', 1), tmp_path).qconfig
    for name in quantizers:
        assert quantizer_named(name).name == name


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["init", *map(str, arguments)])
    return done.exit_code, done.output


def test_the_command_writes_and_refuses(tmp_path: Path) -> None:
    graph, params = demo.network()
    state, file = tmp_path / "net.jqs", tmp_path / "q.toml"
    save_state(state, State(graph, params))
    code, out = run(state, "-o", file, "--march", "S100")
    assert code == 0
    assert f"next: jquant calibrate {state} --config {file}" in out
    assert '[rules."stem.relu".output]' in file.read_text()
    before = file.read_bytes()
    assert run(state, "-o", file) == (2, f"error: {file} is there; --force replaces it, --output names another file\n")
    assert file.read_bytes() == before
    assert run("-o", file, "--force")[0] == 0
    assert "stem.relu" not in file.read_text()
    assert run("-o", tmp_path / "q.json")[0] == 2
    code, out = run("-o", tmp_path / "other.toml", "--march", "S1000")
    assert code == 1
    assert "S100" in out
    assert not (tmp_path / "other.toml").exists()


def test_a_march_of_ones_own_is_written_by_its_file(tmp_path: Path) -> None:
    jq.targets.dump(NARROW, tmp_path / "mine.toml")
    assert run("-o", tmp_path / "q.toml", "--march", tmp_path / "mine.toml")[0] == 0
    assert read_settings(tmp_path / "q.toml").march == NARROW


def test_the_page_shows_the_file() -> None:
    page = (DOCS / "settings.md").read_text()
    (shown,) = re.findall(r"```toml\n(.*?)```", page, flags=re.S)
    assert shown == settings_text(jq.targets.NASH_E, None)


@pytest.mark.parametrize("cls", [ImageSettings, TrainSettings])
def test_every_setting_has_words(cls: type) -> None:
    lines = settings_text(jq.targets.NASH_E, None).splitlines()
    bare = [line for line in lines if re.match(r"#\w+ = ", line) and " # " not in line]
    assert {line[1:].split(" = ")[0] for line in bare} <= {"std", "epochs"}  # which say it themselves
