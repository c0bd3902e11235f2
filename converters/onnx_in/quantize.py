"""Handlers: QuantizeLinear and DequantizeLinear. A pair around a value is its format; of a constant, its grid."""

from __future__ import annotations

import numpy as np

from jquant.types import MIN_SCALE

from .call import Call, Handler
from .values import Grid, Integers, Known, Result, Unsupported, Value, require


def _scale(call: Call) -> np.ndarray:
    scale = call.known(1, "scale")
    require(
        scale.dtype == np.float32 and scale.ndim <= 1, f"a scale of {scale.dtype}{list(scale.shape)}; one a channel"
    )
    legal = np.isfinite(scale).all() and scale.size > 0 and (scale > np.float32(2.0**-126)).all()
    require(bool(legal), "a scale that is not a finite, positive number")
    require(call.integer("block_size", 0) == 0, "scales by block; quantize by channel")
    return scale


def _dtype(call: Call) -> str:
    """That of the zero point, which has to be 0."""
    if not call.given(2):
        wanted = call.integer("output_dtype", 0)
        return {0: "uint8", 3: "int8", 5: "int16", 6: "int32", 22: "int4"}.get(wanted, f"type {wanted}")
    found = call.inputs[2]
    require(isinstance(found, Known) and found.fixed, "its zero point is computed by the model; make it a constant")
    assert isinstance(found, Known)
    dtype = found.grid.dtype if found.grid else str(found.at[0].dtype)
    points = np.unique(found.at[0])
    if points.any():
        shown = ", ".join(map(str, points[:4]))
        raise Unsupported(
            f"the zero point {shown} of {dtype}; every integer here has zero point 0: quantize symmetrically "
            "(onnxruntime: ActivationSymmetric and WeightSymmetric)"
        )
    return dtype


def quantize(call: Call) -> Result:
    scale, dtype = _scale(call), _dtype(call)
    if dtype not in ("int8", "int16"):
        raise Unsupported(
            f"a value of {dtype}; quantize to int8 or int16 (onnxruntime: activation_type=QuantType.QInt8)"
        )
    x = call.operand(0)
    if isinstance(x, Known):
        require(x.fixed and x.at[0].dtype == np.float32, "a constant that is not float32")
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        shaped = _shaped(call, scale, x.at[0].ndim)
        integers = np.clip(np.rint(x.at[0] / shaped), low, high).astype(dtype)
        return Known((integers, integers), x.name)
    require(scale.size == 1, "a value with a scale for each channel; only weights have that")
    require(x.dtype == "float32", f"a quantization of {x.dtype}")
    step = float(scale.reshape(()))
    if step < MIN_SCALE:
        call.graph.note(x.name, f"scale {step:.6g}", f"scale {MIN_SCALE:.6g}", "no scale is smaller: 2^-23")
    return Integers(x, dtype, max(step, MIN_SCALE))


def dequantize(call: Call) -> Result:
    scale, found = _scale(call), call.inputs[0]
    if isinstance(found, Integers):
        dtype = _dtype(call) if call.given(2) else found.dtype
        step = max(float(scale.reshape(())), MIN_SCALE) if scale.size == 1 else None
        same = step == found.scale and dtype == found.dtype
        require(same, "another scale, zero point or dtype than that of its QuantizeLinear")
        return call.graph.on_grid(found, call.node.output[0])
    if isinstance(found, Value):
        raise Unsupported(
            f"integers that are computed or given ({found.name}); a model begins with QuantizeLinear, and has a "
            "QuantizeLinear before each DequantizeLinear"
        )
    require(isinstance(found, Known) and found.fixed, "integers that are computed by the model")
    assert isinstance(found, Known)
    zero = _dtype(call) if call.given(2) else str(found.at[0].dtype)
    dtype = found.grid.dtype if found.grid else zero
    require(np.issubdtype(found.at[0].dtype, np.integer), "a constant that is no integer")
    require(dtype in ("int4", "int8", "int16", "int32"), f"a constant of {dtype}; quantize it to int8")
    return _real(call, found, scale, dtype)


def _real(call: Call, found: Known, scale: np.ndarray, dtype: str) -> Known:
    integers = found.at[0]
    axis = _axis(call, integers.ndim) if scale.size > 1 else None
    require(axis is None or scale.shape[0] == integers.shape[axis], f"{scale.size} scales")
    steps = _shaped(call, scale, integers.ndim)
    array = (integers.astype(np.float64) * steps).astype(np.float32)  # int32 times float32 is exact in float64
    kept = scale.reshape(-1) if axis is not None else scale.reshape(())
    grid = Grid(dtype, kept, axis, integers if dtype == "int32" else None)
    return Known((array, array), found.name, grid)


def _axis(call: Call, rank: int) -> int:
    axis = call.integer("axis", 1)
    require(-rank <= axis < rank, f"axis {axis} of {rank}")
    return axis % rank


def _shaped(call: Call, scale: np.ndarray, rank: int) -> np.ndarray:
    if scale.size == 1:
        return scale.reshape(())
    axis = _axis(call, rank)
    return scale.reshape([-1 if i == axis else 1 for i in range(rank)])


def dynamic(call: Call) -> Result:
    raise Unsupported("a scale that follows from the data; quantize statically")


TABLE: dict[str, Handler] = {
    "DequantizeLinear": dequantize,
    "DynamicQuantizeLinear": dynamic,
    "QuantizeLinear": quantize,
}
