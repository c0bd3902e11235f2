"""Makes a folder of golden files: one small file of every own format, as this release writes it.

    python tests/golden/make.py NAME

`NAME` is that of a folder beside this file, such as "2": the version of the formats. A folder that is there is never
written again, for its files are those of an earlier release; a new version of any format gets a new folder. The
expected outputs in `expected.json` are those of the numpy reference, and of the float graph.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jquant as jq
from jquant import ops, training
from jquant.cli.settings import ImageSettings
from jquant.cli.state import State, save_state

HERE = Path(__file__).parent
SIXTEENTHS = 16.0  # parameters and inputs are multiples of 1/16, so that sums of them are exact

QCONFIG = jq.QConfig(
    {
        "*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8()),
        "act": jq.Policy(output=jq.int16(scale=2.0**-12)),
        "fc": jq.Policy(weight=jq.int4(axis="out", quantizer=jq.lsq)),
    }
)


def numbers(seed: int, *shape: int) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(seed).integers(-16, 17, shape) / SIXTEENTHS, jnp.float32)


def make_graph() -> tuple[jq.Graph, dict[str, jnp.ndarray]]:
    """A convolution with batch norm, an activation by a table, a pool, an addition and a linear layer."""
    conv = ops.Conv(strides=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1))
    pool = ops.MaxPool(kernel=(2, 2), strides=(2, 2), padding=((0, 0), (0, 0)), dilation=(1, 1))
    norm = {role: f"norm.{role}" for role in ("running_mean", "running_var", "weight", "bias")}
    nodes = (
        jq.Node("conv", conv, ("x",), jq.FrozenMap({"weight": "conv.weight", "bias": "conv.bias"})),
        jq.Node("norm", ops.BatchNorm(), ("conv",), jq.FrozenMap(norm)),
        jq.Node("act", ops.Sigmoid(), ("norm",)),
        jq.Node("sum", ops.Add(), ("act", "conv")),
        jq.Node("pool", pool, ("sum",)),
        jq.Node("flat", ops.Flatten(), ("pool",)),
        jq.Node("fc", ops.Linear(), ("flat",), jq.FrozenMap({"weight": "fc.weight", "bias": "fc.bias"})),
    )
    params = {
        "conv.weight": numbers(1, 3, 2, 3, 3),
        "conv.bias": numbers(2, 3),
        "norm.running_mean": numbers(3, 3),
        "norm.running_var": jnp.abs(numbers(4, 3)) + 0.5,
        "norm.weight": numbers(5, 3),
        "norm.bias": numbers(6, 3),
        "fc.weight": numbers(7, 2, 12),
        "fc.bias": numbers(8, 2),
    }
    return jq.Graph((jq.Input("x", (None, 2, 4, 4)),), nodes, ("fc",)), params


def images() -> jnp.ndarray:
    return numbers(9, 3, 2, 4, 4)


def make_model() -> jq.Model:
    graph, params = make_graph()
    model = jq.prepare(graph, params, QCONFIG, target=jq.targets.NASH_E)
    return jq.calibrate(model, [images()])


def function(params: Any, x: jnp.ndarray) -> jnp.ndarray:
    """Two layers; of what a file of a quantized function does not have, this is all."""
    hidden = jax.nn.relu(x @ params["first"]["kernel"] + params["first"]["bias"])
    return hidden @ params["second"]["kernel"]


def function_params() -> dict[str, Any]:
    return {"first": {"kernel": numbers(10, 4, 6), "bias": numbers(11, 6)}, "second": {"kernel": numbers(12, 6, 2)}}


def rows() -> jnp.ndarray:
    return numbers(13, 3, 4)


def save_function(path: Path) -> None:
    qconfig = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out", quantizer=jq.lsq), output=jq.int8())})
    jq.functions.save(path, *jq.quantize(function, function_params(), qconfig, [rows()]))


def fresh_state(model: jq.Model) -> jq.TrainState:
    return jq.TrainState.create(model, tx=training.make_optimizer(model, learning_rate=0.125))


def make(folder: Path) -> None:
    """All files of a folder, which must not be there yet."""
    folder.mkdir()
    graph, params = make_graph()
    model = make_model()
    program = jq.lower(model)
    state = State(graph, params, QCONFIG, jq.targets.NASH_E, model.qparams, None, ImageSettings(crop=4))
    jq.save(folder / "program.jq", program, metadata={"note": "golden"})
    save_state(folder / "state.jqs", state)
    jq.plan.save(folder / "model.jqm", model)
    save_function(folder / "function.jqf")
    texts = {
        "graph.json": jq.graph.graph_to_json(graph),
        "plan.json": jq.plan.plan_to_json(model.plan),
        "qconfig.json": jq.config.qconfig_to_json(QCONFIG),
        "qconfig.toml": jq.config.qconfig_to_toml(QCONFIG),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    for name in ("march.toml", "march.json"):
        jq.targets.dump(jq.targets.NASH_E, folder / name)
    jq.analysis.cases.BadCases(
        {"x": np.asarray(images())}, np.array([2, 0]), np.array([0.5, 0.25]), "float", "bit_true", "l1", "fc"
    ).save(folder / "cases.npz")
    checkpoints = training.open_checkpoints(folder / "checkpoint", model)
    checkpoints.save(fresh_state(model), position={"batch": 3}, key=jax.random.key(5))
    checkpoints.close()
    (folder / "expected.json").write_text(json.dumps(expected(folder, graph, params, program), indent=1) + "\n")


def expected(folder: Path, graph: jq.Graph, params: dict[str, Any], program: jq.Program) -> dict[str, Any]:
    _, values = jq.reference.run(program, np.asarray(images()))
    (floats,) = jq.graph.evaluate_float(graph, params, images())
    qfn, variables = jq.functions.load(folder / "function.jqf", function, function_params(), rows())
    _, of_function = jq.reference.run(qfn.lower(variables), np.asarray(rows()))
    return {
        "function": {name: np.asarray(value).reshape(-1).tolist() for name, value in of_function.items()},
        "integers": {name: np.asarray(value).reshape(-1).tolist() for name, value in values.items()},
        "floats": np.asarray(floats).tolist(),
        "march": str(jq.targets.NASH_E),
        "params": {name: float(np.asarray(value, np.float64).sum()) for name, value in params.items()},
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:  # a checkpoint says where it was written
        make(Path(temporary) / "golden")
        shutil.copytree(Path(temporary) / "golden", HERE / sys.argv[1], ignore=shutil.ignore_patterns(".lock"))
