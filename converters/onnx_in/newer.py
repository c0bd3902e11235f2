"""Handlers: operators that came with opset 23 and later."""

from __future__ import annotations

import numpy as np

import jquant.ops as ops

from .call import MAX_TAPS, Call, Handler, axis_of
from .layers import bias_of, weight_of
from .values import Known, Result, Value, require


def rms_norm(call: Call) -> Result:
    x = call.real(0)
    rank = x.rank - axis_of(call.integer("axis", -1), x.rank)
    weight = call.operand(1)
    require(isinstance(weight, Known) and weight.fixed, "its scale is computed by the model; make it a constant")
    assert isinstance(weight, Known)
    shape = x.shape[x.rank - rank :]
    require(weight.at[0].size == 1 or weight.at[0].shape == shape, f"a scale of shape {list(weight.at[0].shape)}")
    op = ops.RmsNorm(rank=rank, epsilon=call.number("epsilon", 1e-5))
    return call.make(op, x, params={"weight": weight})


def _swish(call: Call, x: Value, part: str) -> Value:
    """x * sigmoid(alpha * x), which is silu(alpha * x) / alpha."""
    alpha = call.number("alpha", 1.0)
    require(alpha != 0, "alpha is 0")
    if alpha == 1:
        return call.make(ops.Silu(), x, part=part)
    inner = call.make(ops.Silu(), call.scaled(x, alpha, f"{part or 'swish'}_scaled"), part=f"{part or 'swish'}_silu")
    return call.scaled(inner, 1 / alpha, part)


def swish(call: Call) -> Result:
    return _swish(call, call.real(0), "")


def swiglu(call: Call) -> Result:
    gate, value = call.real(0), call.real(1)
    require(gate.shapes == value.shapes, f"operands of shapes {list(gate.shape)} and {list(value.shape)}")
    return call.make(ops.Mul(), _swish(call, gate, "swish"), value)


_KNOWN = {"is_causal", "kv_num_heads", "q_num_heads", "qk_matmul_output_mode", "scale", "softcap", "softmax_precision"}


def attention(call: Call) -> Result:
    """Of queries, keys and values of one number of heads, without a cache."""
    unknown = sorted({a.name for a in call.node.attribute} - _KNOWN)
    require(not unknown, f"its attribute {', '.join(unknown)}")
    require(not any(call.given(i) for i in range(4, len(call.inputs))), "a cache of past keys and values")
    require(len([o for o in call.node.output if o]) == 1, "its scores or present keys as outputs")
    require(call.number("softcap", 0.0) == 0, "softcap")
    heads = (call.integer("q_num_heads", 0), call.integer("kv_num_heads", 0))
    operands = [call.real(i) for i in range(3)]
    ranks = {x.rank for x in operands}
    require(ranks in ({3}, {4}), f"operands of {', '.join(map(str, sorted(ranks)))} axes")
    require(ranks == {4} or heads[0] == heads[1] > 0, f"{heads[0]} heads of queries and {heads[1]} of keys")
    if ranks == {3}:
        operands = [_split(call, x, heads[0], part) for x, part in zip(operands, "qkv", strict=True)]
    require(len({x.shape[1] for x in operands}) == 1, "more heads of queries than of keys")
    mask, more = "none", []
    if call.given(3):
        found = call.value(3)
        require(found.dtype in ("bool", "float32"), f"a mask of {found.dtype}")
        mask, more = "bool" if found.dtype == "bool" else "add", [found]
    scale = call.attribute("scale", "float")
    op = ops.Attention(
        scale=None if scale is None else call.number("scale", 0.0),
        causal=call.flag("is_causal"),
        mask=mask,  # type: ignore[arg-type]
        empty="zero",
    )
    y = call.make(op, *operands, *more, part="" if ranks == {4} else "heads")
    if ranks == {4}:
        return y
    turned = call.make(ops.Permute(axes=(0, 2, 1, 3)), y, part="turned")
    _, length, count, size = turned.shape
    require(None not in (length, count, size), "a free number of positions")
    assert length is not None
    assert count is not None
    assert size is not None
    return call.make(ops.Reshape(shape=(-1, length, count * size)), turned)


def _split(call: Call, x: Value, heads: int, part: str) -> Value:
    """[N, L, heads * size] as [N, heads, L, size]."""
    _, length, size = x.shape
    require(length is not None and size is not None and size % heads == 0, f"{heads} heads of {list(x.shape)}")
    assert length is not None
    assert size is not None
    parts = call.make(ops.Reshape(shape=(-1, length, heads, size // heads)), x, part=f"{part}_split")
    return call.make(ops.Permute(axes=(0, 2, 1, 3)), parts, part=f"{part}_heads")


def rotary_embedding(call: Call) -> Result:
    """Pairs of features turned by the angles of their position: x1 cos - x2 sin and x1 sin + x2 cos."""
    x = call.real(0)
    require(x.rank in (3, 4), f"an operand of {x.rank} axes")
    heads = call.integer("num_heads", 0)
    require(x.rank == 4 or heads > 0, "num_heads, which an operand of three axes needs")
    split = x if x.rank == 4 else _by_head(call, x, heads)
    size = split.shape[3]
    width = call.integer("rotary_embedding_dim", 0) or size
    fits = width is not None and size is not None and width % 2 == 0 and 0 < width <= size
    require(fits, f"{width} of {size} features")
    assert width is not None
    cos, sin = (_angles(call, i, split, width // 2, by_head=x.rank == 4) for i in (1, 2))
    part = "" if x.rank == 4 and width == size else "turned"
    turned = _turned(call, split, (cos, sin), width, part)
    if width != size:
        rest = _features(call, split, width, None, 1, "rest")
        turned = call.make(ops.Cat(axis=3), turned, rest, part="" if x.rank == 4 else "whole")
    if x.rank == 4:
        return turned
    return call.make(ops.Reshape(shape=(-1, *x.shape[1:])), turned)  # type: ignore[arg-type]


def _by_head(call: Call, x: Value, heads: int) -> Value:
    """[N, L, heads * size] as [N, L, heads, size]."""
    _, length, size = x.shape
    require(length is not None and size is not None and size % heads == 0, f"{heads} heads of {list(x.shape)}")
    assert length is not None
    assert size is not None
    return call.make(ops.Reshape(shape=(-1, length, heads, size // heads)), x, part="split")


def _angles(call: Call, i: int, x: Value, half: int, by_head: bool) -> Value:
    """The cosines or sines of every position, [1, 1, L, half] or [1, L, 1, half]; one a batch where they are values."""
    length = x.shape[2 if by_head else 1]
    found = call.operand(i)
    if isinstance(found, Value):
        require(not call.given(3), "position_ids and a cache that the model computes")
        require(found.rank == 3 and found.shape[1:] == (length, half), f"a cache of shape {list(found.shape)}")
        require(length is not None, "a free number of positions")
        shape = (-1, 1, length, half) if by_head else (-1, length, 1, half)
        return call.make(ops.Reshape(shape=shape), found, part=f"angles_{i}")  # type: ignore[arg-type]
    cache = call.known(i, "cache")
    require(cache.dtype == np.float32 and cache.ndim == (2 if call.given(3) else 3), f"a cache of {list(cache.shape)}")
    if call.given(3):
        places = call.known(3, "position_ids")
        require(places.ndim == 2 and np.issubdtype(places.dtype, np.integer), "position_ids of another shape")
        require(bool(((places >= 0) & (places < len(cache))).all()), "position_ids beyond the cache")
        cache = cache[places]
    require(cache.shape[1:] == (length, half), f"a cache of shape {list(cache.shape)} for {length} positions")
    require(len(cache) > 0 and bool((cache == cache[:1]).all()), "a constant cache with other angles in each example")
    return call.constant(cache[:1, None] if by_head else cache[:1, :, None], f"angles_{i}")


def _features(call: Call, x: Value, start: int, stop: int | None, step: int, part: str) -> Value:
    op = ops.Slice(starts=(0, 0, 0, start), stops=(None, None, None, stop), steps=(1, 1, 1, step))
    return call.make(op, x, part=part)


def _turned(call: Call, x: Value, angles: tuple[Value, Value], width: int, last: str) -> Value:
    (cos, sin), interleaved, half = angles, call.flag("interleaved"), width // 2
    if interleaved:
        x1, x2 = (_features(call, x, i, width, 2, f"x{i + 1}") for i in (0, 1))
    else:
        x1, x2 = (_features(call, x, i * half, (i + 1) * half, 1, f"x{i + 1}") for i in (0, 1))

    def product(a: Value, b: Value, part: str) -> Value:
        return call.make(ops.Mul(), a, b, part=part)

    real = call.make(ops.Sub(), product(x1, cos, "x1_cos"), product(x2, sin, "x2_sin"), part="real")
    imaginary = call.make(ops.Add(), product(x1, sin, "x1_sin"), product(x2, cos, "x2_cos"), part="imaginary")
    if not interleaved:
        return call.make(ops.Cat(axis=3), real, imaginary, part=last)
    _, a, b, _ = x.shape
    require(a is not None and b is not None, "a free number of heads or positions")
    stacked = call.make(ops.Stack(axis=4), real, imaginary, part="pairs")
    return call.make(ops.Reshape(shape=(-1, a, b, width)), stacked, part=last)  # type: ignore[arg-type]


def causal_conv(call: Call) -> Result | list[Result]:
    """A convolution of each channel over this position and those before, [N, C, L]; the state is what came before."""
    x, weight = call.real(0), weight_of(call, 1)
    shape = weight.at[0].shape
    require(x.rank == 3 and len(shape) == 3 and shape[1] == 1, f"a weight of shape {list(shape)}")
    require(x.shape[1] == shape[0] and 1 <= shape[2] <= MAX_TAPS, f"{x.shape[1]} channels by a weight {list(shape)}")
    kind, behind = call.text("activation", "none"), shape[2] - 1
    require(kind in ("none", "silu", "swish"), f"activation={kind!r}")
    padding = behind
    if behind and (call.given(3) or _wants(call, 1)):
        first = (0, 0), (0, 0), (behind, 0)
        x = (
            call.make(ops.Cat(axis=2), call.real(3), x, part="with_past")
            if call.given(3)
            else call.make(ops.Pad(padding=first), x, part="with_past")
        )
        padding = 0
    op = ops.Conv(strides=(1,), padding=((padding, 0),), dilation=(1,), groups=shape[0])
    y = call.make(op, x, params={"weight": weight, **bias_of(call, 2)}, part="" if kind == "none" else "conv")
    y = y if kind == "none" else call.make(ops.Silu(), y)
    if not _wants(call, 1):
        return y
    require(behind > 0, "the state of a kernel of one position, which is empty")
    state = ops.Slice(starts=(0, 0, -behind), stops=(None, None, None), steps=(1, 1, 1))
    return [y, call.make(state, x, part="state")]


def _wants(call: Call, i: int) -> bool:
    return len(call.node.output) > i and bool(call.node.output[i])


TABLE: dict[str, Handler] = {
    "Attention": attention,
    "CausalConvWithState": causal_conv,
    "RotaryEmbedding": rotary_embedding,
    "RMSNormalization": rms_norm,
    "SwiGLU": swiglu,
    "Swish": swish,
}
