"""Commands on a model that was prepared in Python and saved by `jq.plan.save`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.terminal import run_all

import jquant as jq
from jquant import ops


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3, 5)), jnp.float32), "b": jnp.asarray(rng.normal(size=3), jnp.float32)}
    node = jq.Node("y", ops.Linear(), ("x",), jq.FrozenMap({"weight": "w", "bias": "b"}))
    graph = jq.Graph((jq.Input("x", (None, 5)),), (node,), ("y",))
    x = rng.normal(size=(32, 5)).astype(np.float32)
    qconfig = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out", quantizer=jq.lsq), output=jq.int8())})
    model = jq.prepare(graph, params, qconfig, target=jq.targets.NASH_M)
    jq.plan.save(folder / "raw.jqm", model)
    model = jq.calibrate(model, [jnp.asarray(x)])
    jq.plan.save(folder / "net.jqm", model.replace(params=jax.tree.map(lambda v: v * 1.125, model.params)))
    labels = (x @ np.asarray(params["w"]).T + np.asarray(params["b"])).argmax(1).astype(np.int32)
    np.savez(folder / "data.npz", x=x, y=labels)
    (folder / "other.toml").write_text('[jquant]\nschema = 1\n[rules."*".output]\ndtype = "int16"\n')
    (folder / "train.toml").write_text("[jquant]\nschema = 1\n[train]\nepochs = 1\nlearning_rate = 0.01\n")
    return folder


def test_commands_take_it(folder: Path) -> None:
    """Each says what the model is, and what `quantize` writes has the integers of `jq.lower`."""
    commands = [
        "inspect net.jqm",
        "inspect raw.jqm",
        "check net.jqm",
        "eval net.jqm --data data.npz",
        "compare net.jqm --data data.npz",
        "sensitivity net.jqm --data data.npz",
        "sensitivity net.jqm --data data.npz --budget 1.2",
        "report net.jqm --data data.npz -o report",
        "quantize net.jqm -o net.jq",
        "calibrate raw.jqm --data data.npz -o calibrated.jqm",
        "train net.jqm --config train.toml --data data.npz -o trained.jqm",
        "export net.jqm --to onnx -o net.onnx",
    ]
    for command, result in run_all(folder, dict(zip(commands, commands, strict=True))).items():
        assert result.code == 0, f"{command}: {result.err[-2000:]}"
        if command == "inspect net.jqm":
            assert "int8" in result.out
    model = jq.plan.load(folder / "net.jqm")
    x = jnp.asarray(np.load(folder / "data.npz")["x"])
    np.testing.assert_array_equal(jq.run(jq.load(folder / "net.jq"), x), jq.run(jq.lower(model), x))
    again = jq.calibrate(jq.plan.load(folder / "raw.jqm"), [x])
    for name, scale in jq.plan.load(folder / "calibrated.jqm").qparams.items():
        np.testing.assert_array_equal(scale, again.qparams[name])
    trained = jq.plan.load(folder / "trained.jqm")
    assert trained.plan == model.plan
    assert (np.asarray(trained.params["w"]) != np.asarray(model.params["w"])).any()


def test_another_qconfig_is_refused(folder: Path) -> None:
    commands = {
        "eval": "eval net.jqm --config other.toml --data data.npz",
        "rank": "sensitivity net.jqm --data data.npz --budget 1.2 -o mixed.toml",
    }
    refused, ranked = run_all(folder, commands).values()
    assert refused.code != 0
    assert "prepared in Python" in refused.err
    assert ranked.code != 0
    assert "jq.analysis.search_mixed_precision" in ranked.err


def test_a_recipe_from_the_shell_is_that_of_the_library(folder: Path) -> None:
    """Its steps are printed, and what it writes goes on as a model."""
    tuned, again = (
        "calibrate raw.jqm --data data.npz --batch 8 --recipe default -o tuned.jqm",
        "quantize tuned.jqm -o a.jq",
    )
    straight = "quantize raw.jqm --data data.npz --batch 8 --recipe default -o b.jq"
    done = run_all(folder, {each: each for each in (tuned, again, straight)})
    for command, result in done.items():
        assert result.code == 0, f"{command}: {result.err[-2000:]}"
    x = np.load(folder / "data.npz")["x"]
    batches = [jnp.asarray(x[i : i + 8]) for i in range(0, len(x), 8)]
    wanted = jq.ptq.recipe("default", jq.plan.load(folder / "raw.jqm"), batches)
    for trial in wanted.trials:
        assert trial.step in done[tuned].out
    for name, scale in jq.plan.load(folder / "tuned.jqm").qparams.items():
        np.testing.assert_array_equal(scale, wanted.model.qparams[name])
    for file in ("a.jq", "b.jq"):
        np.testing.assert_array_equal(jq.run(jq.load(folder / file), x), jq.run(jq.lower(wanted.model), x))


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("calibrate raw.jqm --data data.npz --recipe bets -o no.jqm", "did you mean 'best'?"),
        (
            "calibrate raw.jqm --data data.npz --recipe best --devices 1 -o no.jqm",
            "leave out --microbatch and --devices",
        ),
        ("quantize net.jqm --recipe best -o no.jq", "--recipe needs calibration data: give --data"),
    ],
)
def test_a_recipe_that_cannot_run_is_a_wrong_argument(folder: Path, command: str, text: str) -> None:
    (result,) = run_all(folder, {command: command}).values()
    assert result.code == 2
    assert text in result.err
    assert not list(folder.glob("no.*"))
