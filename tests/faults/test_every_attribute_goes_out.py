"""`to_onnx` and `to_torch` write every attribute of every operator: each is changed, and the results are compared."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
import torch
from support.onnx_helpers import CASES, graph_of

import jquant as jq
import jquant.ops as ops
from jquant_converters import to_onnx, to_torch


def draw(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return (3 * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


X, Y, IMAGE, MASK = draw((2, 3, 6)), draw((2, 3, 6), 1), draw((2, 4, 6, 7)), draw((2, 3, 6), 2) > 0
POSITIVE, WHOLE = np.abs(X) + 0.1, np.random.default_rng(3).integers(-40, 40, (2, 3, 6)).astype(np.int32)
GRID = np.random.default_rng(4).uniform(-1.2, 1.2, (2, 5, 4, 2)).astype(np.float32)
SAME = np.repeat(X[:, :, :3], 2, axis=2)  # with equal elements
ROWS, TABLE = np.array([[0, 3, 2], [4, 1, 1]], np.int32), draw((5, 4), 5)
WEIGHT, BIAS = draw((6,), 6), draw((6,), 7)
EMPTY_ROW = MASK | (np.arange(3) == 1)[:, None]  # masked everywhere in row 1

# {operator with one attribute changed: operands, parameters}. What the attribute was before is in `before`.
CHANGED: list[tuple[jq.types.Op, tuple[np.ndarray, ...], dict[str, np.ndarray]]] = [
    (ops.AffineGrid(size=(4, 5), align_corners=True), (draw((2, 2, 3)),), {}),
    (ops.ArgMax(axis=1, keepdims=True), (X,), {}),
    (ops.BitShift(bits=2), (WHOLE,), {}),
    (ops.BitShift(bits=-3), (WHOLE,), {}),
    (ops.Celu(alpha=0.4), (X,), {}),
    (ops.ConvTranspose(strides=(2, 1), padding=((0, 0),) * 2, output_padding=(0, 0), dilation=(1, 1),
                       activation="relu"), (IMAGE,), {"weight": draw((4, 2, 3, 3), 8), "bias": draw((2,), 9)}),
    (ops.Cos(single_period=False), (X,), {}),
    (ops.Sin(single_period=False), (X,), {}),
    (ops.Elu(alpha=0.4), (X,), {}),
    (ops.Flatten(start=2), (IMAGE,), {}),
    (ops.Flatten(start=1, end=2), (IMAGE,), {}),
    (ops.Greater(value=0.5), (X,), {}),
    (ops.GreaterEqual(value=float(X[0, 0, 0])), (X,), {}),
    (ops.LessEqual(value=float(X[0, 0, 0])), (X,), {}),
    (ops.NotEqual(value=float(X[0, 0, 0])), (X,), {}),
    (ops.GridSample(mode="nearest"), (IMAGE, GRID), {}),
    (ops.GroupNorm(groups=2, epsilon=0.5), (IMAGE,), {"weight": draw((4,)), "bias": draw((4,), 1)}),
    (ops.InstanceNorm(epsilon=0.5), (IMAGE,), {"weight": draw((4,)), "bias": draw((4,), 1)}),
    (ops.LayerNorm(epsilon=0.5), (X,), {"weight": WEIGHT, "bias": BIAS}),
    (ops.RmsNorm(epsilon=0.5), (X,), {"weight": WEIGHT}),
    (ops.RmsNorm(rank=2), (X,), {"weight": draw((3, 6), 4)}),
    (ops.IntegerConstant(shape=(3,), values=(1, 0, 1), dtype="bool"), (), {}),
    (ops.Interpolate(scale_factor=(1.7, 1.4), mode="bilinear", recompute_scale_factor=True), (IMAGE,), {}),
    (ops.Interpolate(size=(9, 4), mode="bilinear", coordinates="asymmetric"), (IMAGE,), {}),
    (ops.Resample(size=(3, 4), scale_factor=(0.55, 0.6)), (IMAGE,), {}),
    (ops.Resample(size=(9, 4), coordinates="asymmetric"), (IMAGE,), {}),
    (ops.Resample(size=(9, 4), mode="linear"), (IMAGE,), {}),
    (ops.Resample(size=(3, 4), antialias=True), (IMAGE,), {}),
    (ops.Resample(size=(9, 4), coefficient=-0.5), (IMAGE,), {}),
    (ops.Resample(size=(9, 4), exclude_outside=True), (IMAGE,), {}),
    (ops.LeakyRelu(negative_slope=0.3), (X,), {}),
    (ops.LogSoftmax(axis=1), (X,), {}),
    (ops.MatMul(transpose_a=True), (X, draw((2, 3, 5), 1)), {}),
    (ops.Mean(axes=(1,), keepdims=True), (X,), {}),
    (ops.Norm(axes=(2,), keepdims=True), (X,), {}),
    (ops.ReduceMax(axes=(1,), keepdims=True), (X,), {}),
    (ops.ReduceMin(axes=(1,), keepdims=True), (X,), {}),
    (ops.Reciprocal(epsilon=0.7), (POSITIVE,), {}),
    (ops.Sqrt(epsilon=0.7), (POSITIVE,), {}),
    (ops.Rsqrt(epsilon=0.7), (POSITIVE,), {}),
    (ops.Log(epsilon=0.7), (POSITIVE,), {}),
    (ops.SliceScatter(starts=(0, 1, 0), stops=(None, None, 5), steps=(1, 1, 2)), (X, draw((2, 2, 3))), {}),
    (ops.SliceScatter(starts=(0, 0, 1), stops=(None, 2, None), steps=(1, 1, 2)), (X, draw((2, 2, 3))), {}),
    (ops.Softplus(threshold=1.5), (X,), {}),
    (ops.Softplus(beta=2.0, threshold=1.5), (X,), {}),
    (ops.Softplus(beta=0.25), (X,), {}),
    (ops.Softmax(empty="mean"), (X, EMPTY_ROW), {}),
    (ops.Attention(mask="bool", empty="mean"), (X, X, Y, ~EMPTY_ROW[:, :, :3]), {}),
    (ops.Sort(axis=1, descending=True), (X,), {}),
    (ops.SortIndices(axis=2), (SAME,), {}),
    (ops.SortIndices(axis=2, descending=True), (SAME,), {}),
    (ops.TopK(axis=2, k=2, largest=False), (X,), {}),
    (ops.Warp(mode="nearest"), (IMAGE, draw((2, 2, 6, 7))), {}),
    (ops.Warp(padding="border"), (IMAGE, draw((2, 2, 6, 7))), {}),
    (ops.ThresholdedRelu(threshold=-0.5, value=2.0), (X,), {}),
    (ops.Embedding(padding_index=2), (ROWS,), {"weight": TABLE}),
    (ops.Embedding(from_end=True), (ROWS - 5,), {"weight": TABLE}),
    (ops.CumSum(axis=1, exclusive=True), (X,), {}),
    (ops.CumSum(axis=1, reverse=True), (X,), {}),
]  # fmt: skip

# Attributes that no result in these two forms depends on, and why.
WITHOUT_RESULT = {
    ("BatchNorm", "momentum"), ("BatchNorm", "unbiased"), ("BatchNorm", "running"),  # training only
    ("Dropout", "rate"), ("Dropout", "shared_axes"),  # training only
    ("Embedding", "padding_index"),  # the gradient of a row
    ("ConvTranspose", "addend"), ("Linear", "addend"),  # set by `prepare`: an operand more
}  # fmt: skip
# Their default has another number or shape of operands, or only other integers (single_period) or gradients.
NO_DEFAULT = (
    ops.Attention, ops.Cos, ops.Embedding, ops.Greater, ops.GreaterEqual, ops.IntegerConstant, ops.Interpolate,
    ops.LessEqual, ops.MatMul, ops.NotEqual, ops.Resample, ops.RmsNorm, ops.Sin,
)  # fmt: skip
# Operators with no form in both, which are refused.
REFUSED = {"Opaque", "RoiAlign", "RoiResize", "Nv12ToCentredYuv444", "RgbToCentredYuv444"}
REFUSED_BY_ONNX: tuple[type, ...] = ()


def results(op, operands, roles) -> dict[str, np.ndarray]:
    graph, params = graph_of((op, operands, roles))
    arrays = [jnp.asarray(x) for x in operands]
    found = {"jquant": np.asarray(jq.graph.evaluate_float(graph, params, *arrays)[0])}
    if isinstance(op, REFUSED_BY_ONNX):
        with pytest.raises(jq.ConversionError, match="no ONNX form"):
            to_onnx(graph, params)
    else:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        model = to_onnx(graph, params).SerializeToString()
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        found["onnx"] = session.run(None, {i.name: x for i, x in zip(graph.inputs, operands, strict=True)})[0]
    with torch.no_grad():
        found["torch"] = to_torch(graph, params)(*map(torch.from_numpy, operands)).numpy()
    return found


def before(op: Any) -> list[Any]:
    """The operator with each changed attribute at its default, where that computes something else and not a refusal."""
    found = []
    for entry in dataclasses.fields(op):
        if entry.default is not dataclasses.MISSING and getattr(op, entry.name) != entry.default:
            found.append(dataclasses.replace(op, **{entry.name: entry.default}))
    return found


@pytest.mark.parametrize(
    ("op", "operands", "roles"), CHANGED, ids=[f"{i}-{type(c[0]).__name__}" for i, c in enumerate(CHANGED)]
)
def test_an_attribute_that_is_changed_changes_what_goes_out(op, operands, roles):
    found = results(op, operands, roles)
    want = found.pop("jquant")
    for form, got in found.items():
        np.testing.assert_allclose(got.astype(np.float64), want.astype(np.float64), rtol=1e-5, atol=1e-5, err_msg=form)
    # The operands tell the attribute from its default, so that a form without it would fail.
    if isinstance(op, NO_DEFAULT):
        return
    for other in before(op):
        graph, params = graph_of((other, operands, roles))
        y = np.asarray(jq.graph.evaluate_float(graph, params, *map(jnp.asarray, operands))[0])
        assert y.shape != want.shape or np.abs(y.astype(np.float64) - want).max() > 1e-3, other


def test_every_attribute_of_every_operator_is_changed_somewhere():
    seen: dict[tuple[str, str], set[Any]] = {}
    for op in [*(case[0] for case in CASES.values()), *(op for op, _, _ in CHANGED)]:
        for entry in dataclasses.fields(op):
            seen.setdefault((type(op).__name__, entry.name), set()).add(getattr(op, entry.name))
    missing = []
    for name in dir(ops):
        kind: Callable[..., Any] = getattr(ops, name)
        if not (isinstance(kind, type) and issubclass(kind, jq.types.Op) and dataclasses.is_dataclass(kind)):
            continue
        for entry in dataclasses.fields(kind):
            if entry.name in ("channels_last", "table", "batch_norm") or name in REFUSED:
                continue  # set by `prepare`, or of integers
            if (name, entry.name) in WITHOUT_RESULT:
                continue
            if not seen.get((name, entry.name), set()) - {entry.default}:
                missing.append((name, entry.name))
    assert missing == []
