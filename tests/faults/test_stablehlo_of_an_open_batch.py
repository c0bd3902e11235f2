"""`to_stablehlo` with its default open batch, against the program itself at several batch sizes."""

import jax.numpy as jnp
import numpy as np
import pytest
from support.onnx_helpers import CASES, graph_of

import jquant as jq

# int16 has tables of segments, alone and in chains; scatter writes at places counted by the batch.
TABLES = ("Sigmoid", "Exp", "Gelu", "Softmax", "LayerNorm", "Div", "Rsqrt", "LogSoftmax", "GroupNorm", "Scatter")
# Not by jquant.reference and not lowered with one dtype for all: coordinates need int16, convolutions an int8 weight.
NOT_ON_TARGET = {"DeQuantStub", "Dequantize", "Pad by reflection", "AdaptiveAvgPool, uneven"}


def check(name, dtype, folder):
    op, operands, roles = CASES[name]
    graph, params = graph_of((op, operands, roles))
    qconfig = jq.QConfig({"*": jq.Policy(output=jq.QuantSpec(dtype=dtype), weight=jq.int8(axis="out"))})
    model = jq.prepare(graph, params, qconfig, target=jq.targets.NASH_E)
    inputs = tuple(map(jnp.asarray, operands))
    program = jq.lower(jq.calibrate(model, [inputs]))
    jq.to_stablehlo(folder / "net", program)
    run = jq.from_stablehlo(folder / "net")
    batches = (1, 2, 3) if all(entry.shape[0] is None for entry in graph.inputs) and inputs else (2,)
    for batch in batches:
        resized = [jnp.concatenate([x, x])[:batch] if batch != 2 else x for x in inputs]
        np.testing.assert_array_equal(run(*resized), jq.run(program, *resized))


@pytest.mark.parametrize("name", TABLES)
def test_int16_tables_of_an_open_batch(name, tmp_path):
    check(name, "int16", tmp_path)


def test_a_large_picture_of_an_open_batch(tmp_path):
    """More elements an example than int16 has values: the other way through the table."""
    graph = jq.Graph((jq.Input("x", (None, 300, 300)),), (jq.Node("y", jq.ops.Sigmoid(), ("x",)),), ("y",))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 300, 300)), jnp.float32)
    model = jq.prepare(graph, {}, jq.QConfig({"*": jq.Policy(output=jq.int16())}), target=jq.targets.NASH_E)
    program = jq.lower(jq.calibrate(model, [x]))
    jq.to_stablehlo(tmp_path / "net", program)
    np.testing.assert_array_equal(jq.from_stablehlo(tmp_path / "net")(x), jq.run(program, x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jquant.calibration.TableWarning")  # of tan, whose six tables are far from it
@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("name", sorted(set(CASES) - NOT_ON_TARGET))
def test_every_operator_of_an_open_batch(name, dtype, tmp_path):
    try:
        check(name, dtype, tmp_path)
    except jq.QConfigError:
        pytest.skip("the target has no such formats")
    except jq.LoweringError as error:
        if "has no integers" not in str(error):
            raise
        pytest.skip(f"float only: {str(error)[:200]}")
