"""The names that functions of one operand have in torch, ONNX and JAX: one row for each.

The readers and the writers take their rows from here. A function with attributes that a library passes has a rule of
its own there.
"""

from typing import NamedTuple

import jquant.ops as ops
from jquant.types import Op


class Names(NamedTuple):
    """A function, by its names; "" where a library has none.

    `aten`   overloads `aten.NAME.default`, separated by spaces
    `torch`  the function to call, below `torch`
    `onnx`   the operator of the domain ""
    `jax`    the primitive
    """

    op: Op
    aten: str = ""
    torch: str = ""
    onnx: str = ""
    jax: str = ""


FUNCTIONS: tuple[Names, ...] = (
    Names(ops.Abs(), aten="abs", torch="abs", onnx="Abs", jax="abs"),
    Names(ops.Acos(), aten="acos", torch="acos", onnx="Acos", jax="acos"),
    Names(ops.Acosh(), aten="acosh", torch="acosh", onnx="Acosh", jax="acosh"),
    Names(ops.Asin(), aten="asin", torch="asin", onnx="Asin", jax="asin"),
    Names(ops.Asinh(), aten="asinh", torch="asinh", onnx="Asinh", jax="asinh"),
    Names(ops.Atan(), aten="atan", torch="atan", onnx="Atan", jax="atan"),
    Names(ops.Atanh(), aten="atanh", torch="atanh", onnx="Atanh", jax="atanh"),
    Names(ops.Ceil(), torch="ceil", onnx="Ceil", jax="ceil"),
    Names(ops.Cos(), aten="cos", torch="cos", onnx="Cos", jax="cos"),
    Names(ops.Cosh(), aten="cosh", torch="cosh", onnx="Cosh", jax="cosh"),
    Names(ops.Erf(), aten="erf special_erf", torch="erf", onnx="Erf", jax="erf"),
    Names(ops.Exp(), aten="exp", torch="exp", onnx="Exp", jax="exp"),
    Names(ops.Expm1(), aten="expm1", torch="expm1", jax="expm1"),
    Names(ops.Floor(), torch="floor", onnx="Floor", jax="floor"),
    Names(ops.HardSigmoid(), aten="hardsigmoid", torch="nn.functional.hardsigmoid"),
    Names(ops.HardSwish(), aten="hardswish", torch="nn.functional.hardswish", onnx="HardSwish"),
    Names(ops.Log(), aten="log", onnx="Log", jax="log"),
    Names(ops.Log(epsilon=1.0), aten="log1p", jax="log1p"),
    Names(ops.LogSigmoid(), aten="log_sigmoid", torch="nn.functional.logsigmoid"),
    Names(ops.Mish(), aten="mish", torch="nn.functional.mish", onnx="Mish"),
    Names(ops.Neg(), aten="neg", torch="neg", onnx="Neg"),
    Names(ops.Reciprocal(), aten="reciprocal", onnx="Reciprocal"),
    Names(ops.Relu(), aten="relu", torch="nn.functional.relu", onnx="Relu"),
    Names(ops.Relu6(), aten="relu6", torch="nn.functional.relu6"),
    Names(ops.Round(), torch="round", onnx="Round"),
    Names(ops.Rsqrt(), aten="rsqrt", jax="rsqrt"),
    Names(ops.Selu(), aten="selu", torch="nn.functional.selu"),
    Names(ops.Sigmoid(), aten="sigmoid", torch="sigmoid", onnx="Sigmoid", jax="logistic"),
    Names(ops.Sign(), aten="sign sgn", torch="sign", onnx="Sign", jax="sign"),
    Names(ops.Silu(), aten="silu", torch="nn.functional.silu"),
    Names(ops.Sin(), aten="sin", torch="sin", onnx="Sin", jax="sin"),
    Names(ops.Sinh(), aten="sinh", torch="sinh", onnx="Sinh", jax="sinh"),
    Names(ops.Softplus(), onnx="Softplus"),
    Names(ops.Softsign(), torch="nn.functional.softsign", onnx="Softsign"),
    Names(ops.Sqrt(), aten="sqrt", onnx="Sqrt", jax="sqrt"),
    Names(ops.Tan(), aten="tan", torch="tan", onnx="Tan", jax="tan"),
    Names(ops.Tanh(), aten="tanh", torch="tanh", onnx="Tanh", jax="tanh"),
)
