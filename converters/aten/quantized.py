"""Handlers: pairs of quantize and dequantize, and fake-quantization. A pair is a node until its scale is read."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
from torch.fx import Node

from jquant.graph.operator import eval_float
from jquant.types import Array, Op

from .call import CONSTANT, Call, Handler, Shape, Unsupported, aten


@dataclass(frozen=True, kw_only=True)
class Pair(Op):
    """x rounded to integers from `low` to `high`, which stand for (integer - zero) * scale.

    `model_from_torch` gives the scale to the value; no plan has this operator.
    """

    scale: float
    zero: int
    low: int
    high: int


@eval_float.register
def _(op: Pair, x: Array) -> Array:
    return x


def quantize(out: Shape, x: Node, *_: Any) -> Any:
    """The dequantize behind it makes the pair."""
    from ..drafts import Refused

    return Refused("integers; dequantize them before")


def dequantize(out: Shape, x: Node, scale: Any, zero: Any, low: int, high: int, *_: Any) -> Call:
    if not (isinstance(x, Node) and str(x.target).startswith("quantized_decomposed.quantize_per_tensor")):
        raise Unsupported("integers that no quantize_per_tensor makes; quantize each value that is dequantized")
    return Call(_pair(scale, zero, low, high), (x.args[0],))


def fake_quantize(out: Shape, x: Node, scale: Any, zero: Any, low: int, high: int) -> Call:
    return Call(_pair(scale, zero, low, high), (x,))


def _pair(scale: Any, zero: Any, low: int, high: int) -> Pair:
    step, point = _number(scale, "scale"), _number(zero, "zero point")
    if not isfinite(step) or step <= 0 or point % 1:
        raise Unsupported(f"a scale of {step} and a zero point of {point}")
    return Pair(scale=step, zero=int(point), low=int(low), high=int(high))


def _number(value: Any, what: str) -> float:
    if isinstance(value, Node):
        tensor = value.meta.get(CONSTANT)
        if not isinstance(tensor, torch.Tensor) or tensor.numel() != 1:
            raise Unsupported(f"a {what} that the model computes, or one a channel; values have one scale")
        value = tensor.reshape(()).item()
    return float(value)


_decomposed = torch.ops.quantized_decomposed

TABLE: dict[Any, Handler] = {
    _decomposed.quantize_per_tensor.default: quantize,
    _decomposed.quantize_per_tensor.tensor: quantize,
    _decomposed.dequantize_per_tensor.default: dequantize,
    _decomposed.dequantize_per_tensor.tensor: dequantize,
    aten.fake_quantize_per_tensor_affine.default: fake_quantize,
    aten.fake_quantize_per_tensor_affine.tensor_qparams: fake_quantize,
}
