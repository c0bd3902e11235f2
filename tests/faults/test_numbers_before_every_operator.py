"""A number in front of any operator: integers, reference, fake-quant and ONNX have it, and no scale cuts it.

Random data and a random mask for every operator of the converters' tests, with a fill far outside of the data, just
outside, and inside. Some operators run with `make test`, all of them with `make test-slow`.
"""

import zlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from support.onnx_helpers import CASES, graph_of, run_onnxruntime

import jquant as jq
from jquant import ops
from jquant_converters import to_onnx

TARGET = jq.targets.NASH_E
WIDE = ("GridSample", "Warp")  # coordinates need int16
NOT_ON_TARGET = {"QuantStub", "DeQuantStub", "Pad by reflection", "AdaptiveAvgPool, uneven"}
FILLS = {"far outside": 40.0, "just outside": 1.02, "inside": 0.37}  # of the largest entry of the operand
WAYS = ("mask", "choice", "bound")
NAMES = sorted(
    name
    for name, (_, operands, _) in CASES.items()
    if operands and operands[0].dtype == np.float32 and name not in NOT_ON_TARGET
)


def filled_net(name: str, way: str, times: float) -> tuple[jq.Graph, dict, list[np.ndarray], float]:
    """The case behind a number in its first operand; graph, params, inputs and the number."""
    graph, params = graph_of(CASES[name])
    x, *others = (np.asarray(v) for v in CASES[name][1])
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    value = float(np.float32(times * max(np.abs(x).max(), 0.1)))
    shape = graph.inputs[0].shape
    mask = rng.random(x.shape) < 0.25
    mask.flat[0] = True
    inputs, nodes, given = list(graph.inputs), [], [x, *others]
    if way == "bound":  # lifts everything below it, and data are made to have some there
        value = min(value, float(np.abs(x).max()))
        nodes = [jq.Node("filled", ops.Clamp(minimum=value), ("x0",))]
    else:
        inputs.append(jq.Input("mask", shape, "bool"))
        given.append(mask)
    if way == "mask":
        nodes = [jq.Node("filled", ops.MaskedFill(value=value), ("x0", "mask"))]
    if way == "choice":
        params["number"] = jnp.full((1,) * x.ndim, value, jnp.float32)
        nodes = [
            jq.Node("number", ops.Constant(), (), jq.FrozenMap({"value": "number"})),
            jq.Node("filled", ops.Where(), ("mask", "number", "x0")),
        ]
    (layer,) = graph.nodes
    behind = jq.Node("layer", layer.op, ("filled", *layer.inputs[1:]), layer.params)
    return jq.Graph(tuple(inputs), (*nodes, behind), ("filled", "layer")), params, given, value


def check(name: str, way: str, times: float) -> None:
    graph, params, given, value = filled_net(name, way, times)
    dtype = "int16" if name.startswith(WIDE) else "int8"
    policy = jq.Policy(output=getattr(jq, dtype)(observer="min_max"), weight=jq.int8(axis="out"))
    try:
        model = jq.prepare(graph, params, jq.QConfig({"*": policy}), target=TARGET)
    except jq.QConfigError as error:
        pytest.skip(f"not with {dtype} in front: {str(error)[:200]}")
    batch: Any = tuple(jnp.asarray(v) for v in given)
    if not all(np.isfinite(v).all() for v in jq.apply(model, *batch, mode="float")):  # exp(160), asin(8)
        with pytest.raises(jq.CalibrationError, match="'layer' are not finite"):
            jq.calibrate(model, [batch])
        return
    model = jq.calibrate(model, [batch])
    try:
        program = jq.lower(model)
    except jq.LoweringError as error:
        if "has no integers" not in str(error):
            raise
        pytest.skip(f"float only: {str(error)[:200]}")
    whole = [np.asarray(v) for v in jq.run(program, *batch)]
    slow, _ = jq.reference.run(program, *batch)
    for fast, exact in zip(whole, slow, strict=True):
        np.testing.assert_array_equal(fast, exact)
    fake = np.asarray(jq.apply(model, *batch)[0])
    np.testing.assert_allclose(fake, whole[0], rtol=2**-21, atol=1e-30)
    step = float(program.scales["filled"])
    (onnx_filled, *_) = run_onnxruntime(to_onnx(model), *given)
    other = np.abs(onnx_filled - whole[0]) > 1e-6 * np.abs(whole[0])
    # A rescaled operand: the march's mantissa is off by 2^-16, which is half an LSB at 2^15, and ONNX divides.
    off = 0.5 if way == "choice" and dtype == "int16" else 0.0
    assert other.sum() <= max(2, (0.05 + off) * other.size)  # data on a tie, which ONNX divides in float32
    products = 2**-22 * np.abs(whole[0]).max()  # two float32 products, each rounded
    assert np.abs(onnx_filled - whole[0]).max() <= 1.001 * step + products
    wanted = np.maximum(given[0], value) if way == "bound" else np.where(given[-1], np.float32(value), given[0])
    # What enters is rounded on its own grid, which is the coarser one where the number covers the largest value.
    own = max(float(program.scales[v]) for v in model.plan.graph.by_name["filled"].inputs if v in program.scales)
    assert np.abs(whole[0] - wanted).max() <= 0.5 * max(own, step) + (0.51 + off) * step
    own_number = float(getattr(graph.by_name["layer"].op, "value", 0.0) or 0.0)  # a fill keeps the scale of its operand
    largest = max(np.abs(given[0]).max(), abs(value), abs(own_number))
    assert step * 2 ** (int(dtype[3:]) - 1) <= 1.05 * largest  # and no range is wasted


SOME = ("Conv", "Linear", "MaxPool", "Softmax", "Concat", "Sigmoid", "Sum", "Reshape")


@pytest.mark.parametrize("name", [n for n in NAMES if n in SOME])
def test_a_number_in_front_of_an_operator(name: str) -> None:
    drawn = zlib.crc32(name.encode())
    check(name, WAYS[drawn % 3], list(FILLS.values())[drawn // 3 % 3])


@pytest.mark.slow
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_every_number_in_front_of_any_operator(name: str, way: str, fill: str) -> None:
    check(name, way, FILLS[fill])
