"""Convolutions, linear layers, matrix products and pooling: nash-arithmetic sections 4 and 5.

Inside, every array is [N, *S, C]. A window operator is a loop over the taps of its kernel: at each tap, `window_taps`
gives the elements that the tap meets at every output position.
"""

from collections.abc import Iterator
from functools import reduce

import numpy as np

from jquant.reference.arithmetic import round_shift, saturate
from jquant.reference.call import Call, channels_back, channels_to_last
from jquant.types import GraphError


def window_count(size: int, kernel: int, stride: int, padding: tuple[int, int], dilation: int, ceil: bool) -> int:
    """Output positions along an axis, as in torch: with `ceil` the last window may overhang the padded input, but it
    must start inside the input or the left padding."""
    free = size + sum(padding) - dilation * (kernel - 1) - 1
    count = (-(-free // stride) if ceil else free // stride) + 1
    if ceil and (count - 1) * stride >= size + padding[0]:
        count -= 1
    if count < 1:
        raise GraphError(f"a window of {kernel}, dilation {dilation}, does not fit into {size} + padding {padding}")
    return count


def window_taps(x, kernel, strides, padding, dilation, *, ceil=False, fill=0) -> Iterator[tuple[tuple, np.ndarray]]:
    """Yields (tap, elements [N, *S_out, C]) for every position `tap` in the kernel. x [N, *S, C]."""
    sizes = x.shape[1:-1]
    axes = list(zip(sizes, kernel, strides, padding, dilation, strict=True))
    counts = [window_count(*axis, ceil) for axis in axes]
    # Windows that overhang (ceil) need more on the right than the padding; what no window reaches is never read.
    needed = [(count - 1) * stride + d * (k - 1) + 1 for count, (_, k, stride, _, d) in zip(counts, axes, strict=True)]
    right = [max(n - lo - size, hi) for n, size, (lo, hi) in zip(needed, sizes, padding, strict=True)]
    margins = [(0, 0), *((lo, r) for (lo, _), r in zip(padding, right, strict=True)), (0, 0)]
    padded = np.pad(x, margins, constant_values=fill)
    for tap in np.ndindex(*kernel):
        index = [slice(None)]
        for i, d, stride, count in zip(tap, dilation, strides, counts, strict=True):
            index.append(slice(i * d, i * d + (count - 1) * stride + 1, stride))
        yield tap, padded[tuple(index)]


def grouped_product(x: np.ndarray, weight: np.ndarray, groups: int) -> np.ndarray:
    """x [..., C] times weight [C / groups, O]: output channels of group g see only the input channels of group g."""
    inputs, outputs = weight.shape[0], weight.shape[1] // groups
    if x.shape[-1] != inputs * groups or weight.shape[1] != outputs * groups:
        raise GraphError(f"channels {x.shape[-1]}, weight {weight.shape} and groups {groups} do not fit together")
    products = [
        x[..., g * inputs : (g + 1) * inputs] @ weight[:, g * outputs : (g + 1) * outputs] for g in range(groups)
    ]
    return np.concatenate(products, axis=-1)


def post_process(call: Call, acc: np.ndarray, addend: np.ndarray | None) -> np.ndarray:
    """Section 4: bias, fused add, rescale, activation. acc and addend [..., O]; an int32 output is not rescaled."""
    c = call.constants
    acc = acc + c["bias"]
    if addend is not None:
        acc = acc + round_shift(addend * c["sumin_scale"], c["sumin_rshift"], call.target.addend.rounding)
    y = saturate(acc, "int32") if call.format.output == "int32" else call.rescaled(acc)
    match call.op.activation:
        case "none":
            return y
        case "relu":
            return np.maximum(y, 0)
        case "relu6":
            return np.minimum(np.maximum(y, 0), c["upper"])
    raise GraphError(f"unknown activation {call.op.activation!r}")


def conv(call: Call) -> np.ndarray:
    """Section 4. weight [*K, C / groups, O], bias [O]; any number of spatial axes, none included."""
    op, weight = call.op, call.constants["weight"]
    x, *addends = (channels_to_last(operand, op.channels_last) for operand in call.operands)
    products = (
        grouped_product(elements, weight[tap], op.groups)
        for tap, elements in window_taps(x, weight.shape[:-2], op.strides, op.padding, op.dilation)
    )
    y = post_process(call, reduce(np.add, products), addends[0] if op.addend else None)
    return channels_back(y, op.channels_last)


def conv_transpose(call: Call) -> np.ndarray:
    """Section 4. weight [*K, C / groups, O], bias [O]; x[i] * weight[k] is added at i * stride + k * dilation.

    That is the whole sum; padding then cuts it at both ends, output_padding extends it at the high end.
    """
    op, weight = call.op, call.constants["weight"]
    x, *addends = (channels_to_last(operand, op.channels_last) for operand in call.operands)
    kernel, sizes = weight.shape[:-2], x.shape[1:-1]
    reach = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(sizes, op.strides, op.dilation, kernel, strict=True)]
    whole = np.zeros((x.shape[0], *map(sum, zip(reach, op.output_padding, strict=True)), weight.shape[-1]), np.int64)
    for tap in np.ndindex(*kernel):
        at = [
            slice(k * d, k * d + (n - 1) * s + 1, s)
            for k, d, n, s in zip(tap, op.dilation, sizes, op.strides, strict=True)
        ]
        whole[(slice(None), *at)] += grouped_product(x, weight[tap], op.groups)
    kept = [slice(low, n - high) for n, (low, high) in zip(whole.shape[1:-1], op.padding, strict=True)]
    y = post_process(call, whole[(slice(None), *kept)], addends[0] if op.addend else None)
    return channels_back(y, op.channels_last)


def linear(call: Call) -> np.ndarray:
    """Section 4. x [..., I], weight [I, O], bias [O]."""
    x, *addends = call.operands
    return post_process(call, x @ call.constants["weight"], addends[0] if call.op.addend else None)


def matmul(call: Call) -> np.ndarray:
    """Section 4, without a bias: [..., M, K] @ [..., K, N]; an int32 output is not rescaled."""
    a, b = call.operands
    a = np.swapaxes(a, -1, -2) if call.op.transpose_a else a
    b = np.swapaxes(b, -1, -2) if call.op.transpose_b else b
    acc = np.matmul(a, b)
    return saturate(acc, "int32") if call.format.output == "int32" else call.rescaled(acc)


def embedding(call: Call) -> np.ndarray:
    """Rows of the table, which is on the grid of the output. weight [rows, dim]."""
    (index,), table = call.operands, call.constants["weight"]
    if call.op.from_end:
        index = np.where(index < 0, index + len(table), index)
    if index.size and (index.min() < 0 or index.max() >= len(table)):
        raise GraphError(f"indices [{index.min()}, {index.max()}] leave the {len(table)} rows of the table")
    return table[index]
