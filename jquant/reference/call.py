"""What the rule of an operator is given."""

from typing import Any, NamedTuple

import numpy as np

from jquant.reference.arithmetic import rescale
from jquant.types import NodeFormat, Target


class Call(NamedTuple):
    """One evaluation of a node. All arrays are int64; `op` holds the attributes, `constants` maps role to array."""

    op: Any
    operands: list[np.ndarray]
    constants: dict[str, np.ndarray]
    format: NodeFormat
    target: Target

    def rescaled(self, accumulator: np.ndarray, *, average: bool = False) -> np.ndarray:
        """Section 3 with the node's constants mantissa, pre and post, to the node's output type."""
        mantissa, pre, post = (self.constants[role] for role in ("mantissa", "pre", "post"))
        return rescale(accumulator, mantissa, pre, post, self.format.output, self.target, average)


def channels_to_last(x: np.ndarray, channels_last: bool) -> np.ndarray:
    """[N, C, *S] -> [N, *S, C]; unchanged where the channels are last already."""
    return x if channels_last else np.moveaxis(x, 1, -1)


def channels_back(y: np.ndarray, channels_last: bool) -> np.ndarray:
    """The inverse of `channels_to_last`."""
    return y if channels_last else np.moveaxis(y, -1, 1)
