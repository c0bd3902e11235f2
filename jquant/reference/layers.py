"""Convolution, linear layers and pooling: nash-arithmetic sections 4 and 5.

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
        acc = acc + round_shift(addend * c["sumin_scale"], c["sumin_rshift"])
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


def linear(call: Call) -> np.ndarray:
    """Section 4. x [..., I], weight [I, O], bias [O]."""
    x, *addends = call.operands
    return post_process(call, x @ call.constants["weight"], addends[0] if call.op.addend else None)


def max_pool(call: Call) -> np.ndarray:
    """Section 5: exact, scale kept. The padding is the smallest integer of the format, so that it never wins."""
    op, x = call.op, channels_to_last(call.operands[0], call.op.channels_last)
    lowest = saturate(np.iinfo(np.int64).min, call.format.output)
    taps = window_taps(x, op.kernel, op.strides, op.padding, op.dilation, ceil=op.ceil_mode, fill=lowest)
    return channels_back(np.maximum.reduce([elements for _, elements in taps]), op.channels_last)


def window_mean(call: Call, kernel, strides, padding, ceil: bool) -> np.ndarray:
    """Section 5: exact sum, rescale from s_x / N. The constants are [1] or, where N varies, [*S_out, 1]."""
    x = channels_to_last(call.operands[0], call.op.channels_last)
    taps = window_taps(x, kernel, strides, padding, (1,) * len(kernel), ceil=ceil)
    total = reduce(np.add, (elements for _, elements in taps))
    return channels_back(call.rescaled(total, average=True), call.op.channels_last)


def avg_pool(call: Call) -> np.ndarray:
    op = call.op
    return window_mean(call, op.kernel, op.strides, op.padding, op.ceil_mode)


def adaptive_avg_pool(call: Call) -> np.ndarray:
    """Windows of n / m elements for n inputs and m outputs, which must divide n."""
    sizes = channels_to_last(call.operands[0], call.op.channels_last).shape[1:-1]
    outputs = call.op.output_size
    if len(sizes) != len(outputs) or any(n % m for n, m in zip(sizes, outputs, strict=True)):
        raise GraphError(f"output size {outputs} does not divide the input size {sizes}")
    kernel = tuple(n // m for n, m in zip(sizes, outputs, strict=True))
    return window_mean(call, kernel, kernel, ((0, 0),) * len(kernel), ceil=False)


def mean(call: Call) -> np.ndarray:
    """Section 5: exact sum, rescale from s_x / N."""
    (x,), op = call.operands, call.op
    return call.rescaled(x.sum(axis=tuple(op.axes), keepdims=op.keepdims))
