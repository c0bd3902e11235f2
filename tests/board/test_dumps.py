"""Dumps in every declared form hold the same integers; what cannot be read is named, and the rest goes on."""

from pathlib import Path

import numpy as np
import pytest
from support import graphs

import jquant as jq
import jquant.types


@pytest.fixture(scope="module")
def program() -> jq.types.Program:
    build = graphs.Builder(3)
    build.shapes["x"] = (3, 6, 5)
    y = build.conv("x", 4, 3)
    y = build.add(jq.ops.Relu(), (y,), (4, 6, 5))
    y = build.conv(y, 5, 1)
    graph = jq.Graph((jq.Input("x", (None, 3, 6, 5)),), tuple(build.nodes), (y,))
    config = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8())})
    model = jq.prepare(graph, build.params, config, target=jq.targets.NASH_E, high_precision_outputs=False)
    return jq.lower(jq.calibrate(model, [graphs.images(0, graph)]))


@pytest.fixture
def values(program) -> dict[str, np.ndarray]:
    _, found = jq.reference.run(program, np.asarray(graphs.images(1, program.graph)))
    return found


def write(folder: Path, values: dict[str, np.ndarray]) -> None:
    for name, value in values.items():
        np.save(folder / f"{name}.npy", value.astype(np.int32))


def test_equal_dumps_are_equal(program, values, tmp_path: Path) -> None:
    write(tmp_path, values)
    found = jq.board.compare(program, jq.board.read_dumps(tmp_path))
    assert found.is_equal
    assert found.problems == ()
    assert [row.name for row in found.rows] == [node.name for node in program.graph.nodes]
    for row in found.rows:
        assert row.alone is not None
        assert row.accumulated is not None
        assert row.alone.is_equal
        assert row.accumulated.is_equal
        assert row.alone.size == values[row.name].size


def test_one_wrong_node_does_not_blame_those_behind_it(program, values, tmp_path: Path) -> None:
    """The board's first convolution is 1 LSB higher at one place, and the rest of the board is right on that."""
    first, *_ = (node.name for node in program.graph.nodes if isinstance(node.op, jq.ops.Conv))
    changed = {"x": values["x"]}
    for node in program.graph.nodes:
        made = jq.reference.interpreter.evaluate(program, node, {**values, **changed})
        changed[node.name] = made.copy()
        if node.name == first:
            changed[node.name][0, 2, 3, 1] += 1
            changed[node.name][1, 0, 0, 0] -= 3
    write(tmp_path, changed)
    found = jq.board.compare(program, jq.board.read_dumps(tmp_path))
    assert found.first is not None
    assert found.first.name == first
    assert [row.name for row in found.rows if row.alone and not row.alone.is_equal] == [first]
    alone = found.row(first).alone
    assert alone is not None
    assert (alone.histogram, alone.largest, alone.size - alone.equal) == ({-1: 1, 3: 1}, 3, 2)
    assert alone.first == (0, 2, 3, 1)
    assert alone.board == alone.program + 1
    assert f"first node that differs: {first}" in found.table()
    behind = found.row(found.rows[-1].name)
    assert behind.alone is not None
    assert behind.alone.is_equal
    picture = found.picture()
    assert picture.startswith(b"\x89PNG")


def test_layouts_and_padding_and_blocks_and_reals(program, values, tmp_path: Path) -> None:
    """Every form holds the same integers: NCHW, padded channels, blocks of columns, raw bytes, real numbers."""
    first, second = (node.name for node in program.graph.nodes if isinstance(node.op, jq.ops.Conv))
    wanted = values[first]  # [N, H, W, C]
    n, h, w, c = wanted.shape
    np.save(tmp_path / "x.npy", values["x"].astype(np.int8))
    padded = np.full((n, 16, h, w + 3), 77, np.int8)
    padded[:, :c, :, :w] = wanted.transpose(0, 3, 1, 2)
    np.save(tmp_path / "first_padded.npy", padded)
    n, h, w, c = values[second].shape
    raw = values[second].astype("<i2").reshape(n, h, w, c).transpose(0, 2, 1, 3)
    raw.tofile(tmp_path / "second.bin")
    last = program.graph.outputs[0]
    scale = float(program.scales[last])
    np.save(tmp_path / "last.npy", values[last].astype(np.float32) * np.float32(scale))
    declared = {
        "values": {
            first: {"file": "first_padded.npy", "layout": "NCHW", "padded": True},
            second: {
                "file": "second.bin",
                "dtype": "int16",
                "shape": [n, h, w, c],
                "blocks": [n, w, h, c],
                "order": [0, 2, 1, 3],
            },
            last: {"file": "last.npy", "scale": scale},
        }
    }
    dumps = jq.board.read_dumps(tmp_path, declared, names=program.graph.values)
    found = jq.board.compare(program, dumps)
    compared = [row.name for row in found.rows if row.alone is not None]
    assert {first, last} <= set(compared)
    assert all(row.alone.is_equal for row in found.rows if row.alone is not None)
    np.testing.assert_array_equal(dumps.values[second].array, values[second])


def test_what_is_wrong_with_files_is_named(program, values, tmp_path: Path) -> None:
    write(tmp_path, values)
    first, second = (node.name for node in program.graph.nodes if isinstance(node.op, jq.ops.Conv))
    (tmp_path / f"{second}.npy").unlink()
    np.save(tmp_path / f"{first}.npy", values[first].transpose(0, 3, 1, 2))
    np.save(tmp_path / "n0.cnov.npy", values[first])
    (tmp_path / "broken.npy").write_bytes(b"no array")
    found = jq.board.compare(program, jq.board.read_dumps(tmp_path))
    text = "\n".join(found.problems)
    assert f"{second}: missing" in text
    assert f"{first}: its shape is" in text
    assert "another order of axes? declare its layout" in text
    assert "n0.cnov: no value of the program; did you mean" in text
    assert "broken: broken.npy cannot be read" in text
    assert not found.is_equal
    assert any(row.alone is not None and row.alone.is_equal for row in found.rows)


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        ({"default": {"layuot": "NHWC"}}, "no entry 'layuot'; did you mean 'layout'"),
        ({"default": {"layout": "CHW"}}, "it can be 'NCHW' or 'NHWC'"),
        ({"default": {"dtype": "int7"}}, "it can be int8"),
        ({"default": {"scale": 0.0}}, "positive and finite"),
        ({"values": []}, "a table of tables"),
        ({"files": {}}, "has the tables"),
    ],
)
def test_a_wrong_declaration_is_refused(declared: dict, says: str, tmp_path: Path) -> None:
    with pytest.raises(jq.FormatError, match=says):
        jq.board.read_dumps(tmp_path, declared)


def test_nothing_to_compare_is_an_error(program, tmp_path: Path) -> None:
    np.save(tmp_path / "other.npy", np.zeros(3, np.int8))
    with pytest.raises(jq.InputError, match="no value of the program"):
        jq.board.compare(program, jq.board.read_dumps(tmp_path))
    with pytest.raises(FileNotFoundError, match="no folder of dumps"):
        jq.board.read_dumps(tmp_path / "none")
