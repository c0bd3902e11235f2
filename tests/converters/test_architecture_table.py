"""The table of architectures: it has every network of the tests, and the page is what its rows say."""

import json

import pytest
from support import architecture_table as table
from support import jax_nets
from support.architectures import ARCHITECTURES
from support.architectures_other import OTHER
from support.architectures_vision import VISION


@pytest.fixture(scope="module")
def nets():
    return table.every_net()


def test_every_network_of_the_tests_has_a_row(nets):
    names = {net.name for net in nets}
    assert len(names) == len(nets) >= 130
    assert {f"torch/{name}" for name in (*ARCHITECTURES, *VISION, *OTHER)} <= names
    assert {f"jax/{name}" for name in jax_nets.NETS} <= names
    for package in ("torchvision", "timm", "transformers"):
        assert any(net.package == package and net.name.startswith(f"{package}/") for net in nets)


def test_the_page_is_what_the_rows_say(nets):
    assert table.PAGE.read_text() == table.page(nets)


def test_no_integers_differ_from_the_reference(nets):
    rows = table.rows()
    assert rows.keys() <= {net.name for net in nets}
    assert not [name for name, row in rows.items() if row.get("integers") == "no"]
    assert all(row.get("onnx", 0) < 1e-4 for row in rows.values() if isinstance(row.get("onnx", 0), float))


def test_a_run_goes_on_where_it_was_stopped(nets, tmp_path, monkeypatch):
    """A row that is there is not measured again; a network that fails has its reason."""
    monkeypatch.setattr(table, "ROWS", tmp_path / "rows.jsonl")
    calls = []

    def load():
        calls.append(1)
        raise ValueError("no such layer")

    some = [table.Net("test/a", load), table.Net("test/b", load, "a-package-that-is-not-there")]
    for redo in (False, False, True):
        table.run(some, redo=redo)
    assert len(calls) == 2
    first = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])
    assert (first["net"], first["import"]) == ("test/a", "ValueError: no such layer")
    assert table.rows().keys() == {"test/a"}


@pytest.mark.slow
def test_a_row_of_a_small_network(nets):
    row = table.measured(next(net for net in nets if net.name == "torch/lenet"))
    assert (row["import"], row["integers"]) == ("yes", "yes")
    assert row["fake_quant"] > 20
    assert row["onnx"] < 1e-5
