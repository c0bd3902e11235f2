"""Handlers: operators that came with opset 23 and later."""

from __future__ import annotations

import jquant.ops as ops

from .call import Call, Handler, axis_of
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


TABLE: dict[str, Handler] = {
    "Attention": attention,
    "RMSNormalization": rms_norm,
    "SwiGLU": swiglu,
    "Swish": swish,
}
