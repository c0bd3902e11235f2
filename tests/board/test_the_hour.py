"""The hour at a board from the command line: probe, "board", fit, load, lower, run: equal. The reference plays it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.board import played, write
from typer.testing import CliRunner

import jquant as jq
from jquant import ops
from jquant.cli import app

MARCH = jq.targets.NASH_E.with_fields(
    {
        "name": "hidden",
        "resize.step_bits": 11,
        "resize.weight_bits": 6,
        "resize.weight_rounding": "half_even",
        "resize.rounding": "half_away",
        "resize.nearest_index": "fixed",
        "resize.step_rounding": "floor",
    }
)


def call(*arguments: object, code: int = 0) -> str:
    found = CliRunner().invoke(app, [str(a) for a in arguments])
    assert found.exit_code == code, found.output
    return found.output


def network(march: jq.Target) -> jq.types.Program:
    """A net that no probe is: two resizes of pictures."""
    nodes = (
        jq.Node("up", ops.Interpolate(size=(11, 17), mode="bilinear"), ("x",)),
        jq.Node("y", ops.Interpolate(size=(40, 301), mode="nearest"), ("up",)),
    )
    graph = jq.Graph((jq.Input("x", (None, 2, 6, 7)),), nodes, ("y",))
    config = jq.QConfig({"*": jq.Policy(output=jq.int8()), "x": jq.Policy(output=jq.int8(scale=0.05))})
    return jq.lower(jq.prepare(graph, {}, config, target=march))


def test_from_probes_to_equal_integers(tmp_path: Path) -> None:
    call("board", "probe", "--family", "resize", "-o", tmp_path / "probes")
    probes = jq.board.probe(["resize"])
    for made in probes:  # what the person at the board gets
        for name, array in made.inputs.items():
            np.testing.assert_array_equal(np.load(tmp_path / "probes" / made.name / "inputs" / f"{name}.npy"), array)

    # The board: channels padded to 4, in the order NHWC, as raw bytes.
    dumps = tmp_path / "dumps"
    for made in probes:
        (dumps / made.name).mkdir(parents=True)
        values = {}
        for name, value in played(made, MARCH).items():
            images = value if value.shape[-1] == 1 and name not in made.inputs else value.transpose(0, 2, 3, 1)
            padded = np.pad(images, ((0, 0), (0, 0), (0, 0), (0, 3)), constant_values=99).astype("<i2")
            padded.tofile(dumps / made.name / f"{name}.bin")
            values[name] = {"shape": list(padded.shape)}
        default = {"file": "{name}.bin", "dtype": "int16", "layout": "NHWC", "padded": True}
        (dumps / made.name / "dumps.json").write_text(json.dumps({"default": default, "values": values}))

    text = call("board", "fit", dumps, "--family", "resize", "-o", tmp_path / "mine.toml")
    assert "resize.rounding" in text
    mine = jq.targets.load(tmp_path / "mine.toml")
    assert mine.resize.rounding == "half_away"
    assert mine.resize.nearest_index == "fixed"

    program, board = network(mine), network(MARCH)
    x = np.random.default_rng(0).normal(size=(2, 2, 6, 7)).astype(np.float32) * 4
    (wanted,), values = jq.reference.run(board, x)
    np.testing.assert_array_equal(jq.run(program, x), wanted)
    assert program.lowered_for == str(mine)

    # The same by `board check`, and what it says of the march that the board is not.
    (tmp_path / "net").mkdir()
    for name, value in values.items():
        np.save(tmp_path / "net" / f"{name}.npy", value.astype(np.int8))
    jq.save(tmp_path / "mine.jq", program)
    jq.save(tmp_path / "nash.jq", network(jq.targets.NASH_E))
    assert "every node that was dumped is equal" in call("board", "check", tmp_path / "mine.jq", tmp_path / "net")
    text = call("board", "check", tmp_path / "nash.jq", tmp_path / "net", "--picture", tmp_path / "d.png", code=3)
    assert "up is the first node that differs" in text
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_whole_march_is_fitted_and_runs_a_network(tmp_path: Path) -> None:
    """All probes, from files; then a network of many operators with the board's integers."""
    from hypothesis import given, settings
    from support import graphs

    march = jq.targets.NASH_E.with_fields(
        {
            "name": "hidden",
            "quantize_rounding": "half_up",
            "rescale.mantissa_bits": 14,
            "rescale.pre_rounding": "half_even",
            "rescale.post_rounding": "half_away",
            "rescale.inner_bits": 18,
            "addend.rounding": "floor",
            "tables.entry_rounding": "half_away",
        }
    )
    write(tmp_path / "dumps", march, jq.board.probe())
    call("board", "fit", tmp_path / "dumps", "-o", tmp_path / "mine.toml")
    mine = jq.targets.load(tmp_path / "mine.toml")
    config = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8())})

    @settings(max_examples=10)
    @given(network=graphs.networks())
    def equal(network: tuple) -> None:
        graph, params = network
        model = jq.calibrate(jq.prepare(graph, params, config, target=mine), [graphs.images(0, graph)])
        on_board = jq.lower(model.replace(plan=replace(model.plan, target=march)))
        x = graphs.images(1, graph)
        _, wanted = jq.reference.run(on_board, np.asarray(x))
        for name, value in jq.run_with_taps(jq.lower(model), x).items():
            np.testing.assert_array_equal(value, wanted[name], err_msg=name)

    equal()
