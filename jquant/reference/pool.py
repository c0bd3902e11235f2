"""Pooling: nash-arithmetic section 5. Inside, every array is [N, *S, C]."""

from functools import reduce

import numpy as np

from jquant.reference.arithmetic import saturate
from jquant.reference.call import Call, channels_back, channels_to_last
from jquant.reference.layers import window_taps
from jquant.types import GraphError


def max_pool(call: Call) -> np.ndarray:
    """Exact, scale kept. The padding is the smallest integer of the format, so that it never wins."""
    op, x = call.op, channels_to_last(call.operands[0], call.op.channels_last)
    lowest = saturate(np.iinfo(np.int64).min, call.format.output)
    taps = window_taps(x, op.kernel, op.strides, op.padding, op.dilation, ceil=op.ceil_mode, fill=lowest)
    return channels_back(np.maximum.reduce([elements for _, elements in taps]), op.channels_last)


def adaptive_max_pool(call: Call) -> np.ndarray:
    """Exact, scale kept. Output i of m sees the inputs from floor(i * n / m) to ceil((i + 1) * n / m), exclusive."""
    op, x = call.op, channels_to_last(call.operands[0], call.op.channels_last)
    y = np.empty((x.shape[0], *op.output_size, x.shape[-1]), np.int64)
    for position in np.ndindex(*op.output_size):
        window = [
            slice(i * n // m, ((i + 1) * n + m - 1) // m)
            for i, m, n in zip(position, op.output_size, x.shape[1:-1], strict=True)
        ]
        elements = x[(slice(None), *window)]
        y[(slice(None), *position)] = elements.max(axis=tuple(range(1, x.ndim - 1)))
    return channels_back(y, op.channels_last)


def window_mean(call: Call, kernel, strides, padding, ceil: bool) -> np.ndarray:
    """Exact sum, rescale from s_x / N. The constants are [1] or, where N varies, [*S_out, 1]."""
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
