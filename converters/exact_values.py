"""Exact values: masks, indices and pixels, which are never quantized. Who takes them."""

import jquant.ops as ops
from jquant.types import Op

_MOVES = (
    ops.Cat, ops.ChannelShuffle, ops.Expand, ops.Flatten, ops.Flip, ops.Gather, ops.IndexSelect, ops.Pad, ops.Permute,
    ops.PixelShuffle, ops.PixelUnshuffle, ops.Reshape, ops.Roll, ops.Scatter, ops.Slice, ops.Stack, ops.Tile,
)  # fmt: skip
_COMPARES = (
    ops.ArgMax, ops.ArgMin, ops.Equal, ops.Greater, ops.GreaterEqual, ops.Less, ops.LessEqual, ops.LogicalAnd,
    ops.LogicalNot, ops.LogicalOr, ops.LogicalXor, ops.MaskedFill, ops.NotEqual, ops.ReduceAll, ops.ReduceAny,
    ops.Where,
)  # fmt: skip
_ORDERS = (
    ops.Clamp, ops.Maximum, ops.Minimum, ops.ReduceMax, ops.ReduceMin, ops.Sort, ops.SortIndices, ops.TopK,
    ops.TopKIndices,
)  # fmt: skip
_ARITHMETIC = (ops.Abs, ops.Add, ops.CumSum, ops.Mod, ops.Mul, ops.Neg, ops.Sub, ops.Sum)
_BITS = (ops.BitwiseAnd, ops.BitwiseNot, ops.BitwiseOr, ops.BitwiseXor)
_MASKED = (ops.Attention, ops.Softmax)  # their mask
_TAKES_EXACT = (*_MOVES, *_COMPARES, *_ORDERS, *_ARITHMETIC, *_BITS, *_MASKED, ops.Embedding)


def takes_exact(op: Op) -> bool:
    """Whether an operator has a meaning, in float and in integers, on an exact operand."""
    return isinstance(op, _TAKES_EXACT)
