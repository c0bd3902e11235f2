"""Operators, one family a file: dataclass, float rule, integer rule, lowering and constraints side by side."""

from jquant.ops.activation import Dropout, LeakyRelu, PRelu, Relu, Relu6, Sigmoid, Softmax
from jquant.ops.base import (
    Lowered,
    Operand,
    constraints,
    derived_scale,
    eval_float,
    eval_integer,
    lower_op,
    to_channels_last,
)
from jquant.ops.conv import BatchNorm, Conv, Linear
from jquant.ops.elementwise import Add, Constant, Mul, Requantize, Scale
from jquant.ops.movement import Cat, Flatten, Pad, Permute, Reshape
from jquant.ops.pool import AdaptiveAvgPool, AvgPool, MaxPool, Mean

__all__ = [
    "AdaptiveAvgPool",
    "Add",
    "AvgPool",
    "BatchNorm",
    "Cat",
    "Constant",
    "Conv",
    "Dropout",
    "Flatten",
    "LeakyRelu",
    "Linear",
    "Lowered",
    "MaxPool",
    "Mean",
    "Mul",
    "Operand",
    "PRelu",
    "Pad",
    "Permute",
    "Relu",
    "Relu6",
    "Requantize",
    "Reshape",
    "Scale",
    "Sigmoid",
    "Softmax",
    "constraints",
    "derived_scale",
    "eval_float",
    "eval_integer",
    "lower_op",
    "to_channels_last",
]
