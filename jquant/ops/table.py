"""Functions of one operand that the chip looks up in tables: `jquant/ops/lookup.py` says how.

One declaration is all that a function needs: its two rules, its domain and symmetry. Integers, the reference, and the
checks of a march follow. The names that torch, ONNX and JAX have for it are a row in `jquant/ops/names.py`.

Every function has a field `table`: the layout of its segments for int16. The default, "least_error", follows the
scales that calibration found. In float they are torch's.
"""

import math
from collections.abc import Callable
from math import pi, sqrt
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jquant.ops.lookup import DECLARED, LEAST_ERROR, TableOptions, Traits, table_function, without_period
from jquant.types import Array, Op

ODD, EVEN = Traits(symmetry="odd"), Traits(symmetry="even")


def _by_element(function: Callable[[float], float]) -> Callable[[np.ndarray], np.ndarray]:
    return np.vectorize(function, otypes=[np.float64])


_erf, _erfc = _by_element(math.erf), _by_element(math.erfc)


def _softplus64(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, x)


def _elu64(x: np.ndarray, alpha: float, width: float = 1.0) -> np.ndarray:
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0.0) / width))


def _six64(x: np.ndarray) -> np.ndarray:
    return np.clip(x + 3.0, 0.0, 6.0) / 6.0


def _above_zero(op: Any) -> Traits:
    """Of a function of x + epsilon that is NaN below 0."""
    return Traits(low=-op.epsilon)


# ---------------------------------------------------------------------------------------------------------------------
# Trigonometric and hyperbolic functions


@table_function(jnp.arccos, np.arccos, Traits(low=-1.0, high=1.0))
class Acos(Op):
    """arccos(x), for -1 <= x <= 1."""

    table: TableOptions = LEAST_ERROR


@table_function(jnp.arccosh, np.arccosh, Traits(low=1.0))
class Acosh(Op):
    """arcosh(x), for x >= 1."""

    table: TableOptions = LEAST_ERROR


@table_function(jnp.arcsin, np.arcsin, Traits(low=-1.0, high=1.0, symmetry="odd"))
class Asin(Op):
    """arcsin(x), for -1 <= x <= 1."""

    table: TableOptions = LEAST_ERROR


@table_function(jnp.arcsinh, np.arcsinh, ODD)
class Asinh(Op):
    """arsinh(x)."""

    table: TableOptions = LEAST_ERROR


@table_function(jnp.arctan, np.arctan, ODD)
class Atan(Op):
    """arctan(x)."""

    table: TableOptions = LEAST_ERROR


@table_function(jnp.arctanh, np.arctanh, Traits(low=-1.0, high=1.0, symmetry="odd"))
class Atanh(Op):
    """artanh(x), for -1 <= x <= 1."""

    table: TableOptions = LEAST_ERROR


def _within_period(op: Any, x: Array) -> Array:
    return x - 2 * pi * jnp.floor(x / (2 * pi) + 0.5) if op.single_period else x


def _periodic(symmetry: Literal["even", "odd"]) -> Callable[[Any], Traits]:
    return lambda op: Traits(symmetry=symmetry, reduced=without_period(op) if op.single_period else None)


@table_function(lambda op, x: jnp.cos(_within_period(op, x)), lambda op, x: np.cos(x), _periodic("even"))
class Cos(Op):
    """cos(x). `single_period`: x - 2*pi*floor(x / (2*pi) + 1/2) first."""

    bounded: ClassVar = True

    single_period: bool = True
    table: TableOptions = LEAST_ERROR


@table_function(jnp.cosh, np.cosh, EVEN)
class Cosh(Op):
    """cosh(x)."""

    table: TableOptions = LEAST_ERROR


@table_function(lambda op, x: jnp.sin(_within_period(op, x)), lambda op, x: np.sin(x), _periodic("odd"))
class Sin(Op):
    """sin(x). `single_period`: x - 2*pi*floor(x / (2*pi) + 1/2) first."""

    bounded: ClassVar = True

    single_period: bool = True
    table: TableOptions = LEAST_ERROR


@table_function(jnp.sinh, np.sinh, ODD)
class Sinh(Op):
    """sinh(x)."""

    table: TableOptions = LEAST_ERROR


@table_function(jnp.tan, np.tan, ODD)
class Tan(Op):
    """tan(x)."""

    table: TableOptions = LEAST_ERROR


@table_function(jnp.tanh, np.tanh, ODD)
class Tanh(Op):
    """tanh(x)."""

    bounded: ClassVar = True

    table: TableOptions = LEAST_ERROR


# ---------------------------------------------------------------------------------------------------------------------
# Powers, roots, exponentials


@table_function(jax.scipy.special.erf, _erf, ODD)
class Erf(Op):
    """The error function."""

    bounded: ClassVar = True

    table: TableOptions = LEAST_ERROR


@table_function(jnp.exp, np.exp)
class Exp(Op):
    """exp(x)."""

    table: TableOptions = LEAST_ERROR


@table_function(jnp.expm1, np.expm1)
class Expm1(Op):
    """exp(x) - 1."""

    table: TableOptions = LEAST_ERROR


@table_function(lambda op, x: jnp.log(x + op.epsilon), lambda op, x: np.log(x + op.epsilon), _above_zero)
class Log(Op):
    """log(x + epsilon)."""

    epsilon: float = 0.0
    table: TableOptions = LEAST_ERROR


def _power(op: "Pow", x: Array) -> Array:
    return jax.lax.integer_pow(x, int(op.exponent)) if _is_whole(op) else jnp.power(x, op.exponent)


def _is_whole(op: "Pow") -> bool:
    return float(op.exponent).is_integer()


def _traits_of_power(op: "Pow") -> Traits:
    if not _is_whole(op):
        return Traits(low=0.0)
    return ODD if op.exponent % 2 else EVEN


@table_function(_power, lambda op, x: np.power(x, float(op.exponent)), _traits_of_power)
class Pow(Op):
    """x ** exponent."""

    exponent: float
    table: TableOptions = LEAST_ERROR


@table_function(
    lambda op, x: 1.0 / (x + op.epsilon),
    lambda op, x: 1.0 / (x + op.epsilon),
    lambda op: Traits() if op.epsilon else ODD,
)
class Reciprocal(Op):
    """1 / (x + epsilon)."""

    epsilon: float = 0.0
    table: TableOptions = LEAST_ERROR


@table_function(lambda op, x: jax.lax.rsqrt(x + op.epsilon), lambda op, x: 1.0 / np.sqrt(x + op.epsilon), _above_zero)
class Rsqrt(Op):
    """1 / sqrt(x + epsilon)."""

    epsilon: float = 0.0
    table: TableOptions = LEAST_ERROR


@table_function(lambda op, x: jnp.sqrt(x + op.epsilon), lambda op, x: np.sqrt(x + op.epsilon), _above_zero)
class Sqrt(Op):
    """sqrt(x + epsilon)."""

    epsilon: float = 0.0
    table: TableOptions = LEAST_ERROR


# ---------------------------------------------------------------------------------------------------------------------
# Activations


@table_function(lambda op, x: jax.nn.celu(x, op.alpha), lambda op, x: _elu64(x, op.alpha, op.alpha))
class Celu(Op):
    """max(x, 0) + min(0, alpha * (exp(x / alpha) - 1))."""

    alpha: float = 1.0
    table: TableOptions = LEAST_ERROR


@table_function(lambda op, x: jax.nn.elu(x, op.alpha), lambda op, x: _elu64(x, op.alpha))
class Elu(Op):
    """x above 0, alpha * (exp(x) - 1) below."""

    alpha: float = 1.0
    table: TableOptions = LEAST_ERROR


def _gelu(op: "Gelu", x: Array) -> Array:
    if op.approximate == "tanh":
        return jax.nn.gelu(x, approximate=True)
    return x * (0.5 + 0.5 * jax.lax.erf(x * sqrt(0.5)))  # as torch; the erfc of jax.nn takes more passes on a CPU


def _gelu64(op: "Gelu", x: np.ndarray) -> np.ndarray:
    """1 + tanh(u) is 2 / (1 + exp(-2 u)), and 1 + erf(u) is erfc(-u): without a difference of nearly equal numbers."""
    if op.approximate == "tanh":
        return x / (1.0 + np.exp(-2.0 * sqrt(2.0 / pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * _erfc(-x * sqrt(0.5))


@table_function(_gelu, _gelu64)
class Gelu(Op):
    """x * Phi(x), with the distribution function of a normal variable or its approximation by tanh."""

    approximate: Literal["none", "tanh"] = "none"
    table: TableOptions = LEAST_ERROR


@table_function(lambda x: jnp.clip(x + 3.0, 0.0, 6.0) / 6.0, _six64)
class HardSigmoid(Op):
    """clip(x + 3, 0, 6) / 6."""

    bounded: ClassVar = True

    table: TableOptions = LEAST_ERROR


@table_function(lambda x: x * (jnp.clip(x + 3.0, 0.0, 6.0) / 6.0), lambda x: x * _six64(x))
class HardSwish(Op):
    """x * clip(x + 3, 0, 6) / 6."""

    table: TableOptions = LEAST_ERROR


@table_function(
    lambda op, x: jnp.where(x > 0.0, x, op.negative_slope * x),
    lambda op, x: np.where(x > 0.0, x, op.negative_slope * x),
)
class LeakyRelu(Op):
    """max(x, 0) + negative_slope * min(x, 0)."""

    negative_slope: float = 0.01
    table: TableOptions = LEAST_ERROR


@table_function(jax.nn.log_sigmoid, lambda x: -_softplus64(-x))
class LogSigmoid(Op):
    """log(1 / (1 + exp(-x)))."""

    table: TableOptions = LEAST_ERROR


@table_function(jax.nn.mish, lambda x: x * np.tanh(_softplus64(x)))
class Mish(Op):
    """x * tanh(log(1 + exp(x)))."""

    table: TableOptions = LEAST_ERROR


@table_function(jax.nn.selu, lambda x: 1.0507009873554804934193349852946 * _elu64(x, 1.6732632423543772848170429916717))
class Selu(Op):
    """elu with the constants of self-normalizing networks (Klambauer et al. 2017)."""

    table: TableOptions = LEAST_ERROR


@table_function(jax.nn.sigmoid, lambda x: 1.0 / (1.0 + np.exp(-x)))
class Sigmoid(Op):
    """1 / (1 + exp(-x))."""

    bounded: ClassVar = True

    table: TableOptions = LEAST_ERROR


@table_function(jnp.sign, np.sign, ODD)
class Sign(Op):
    """-1, 0 or 1."""

    bounded: ClassVar = True

    table: TableOptions = LEAST_ERROR


@table_function(jax.nn.silu, lambda x: x / (1.0 + np.exp(-x)))
class Silu(Op):
    """x / (1 + exp(-x))."""

    table: TableOptions = LEAST_ERROR


def _softplus(op: "Softplus", x: Array) -> Array:
    scaled = op.beta * x
    return jnp.where(scaled > op.threshold, x, jax.nn.softplus(jnp.minimum(scaled, op.threshold)) / op.beta)


@table_function(_softplus, lambda op, x: np.where(op.beta * x > op.threshold, x, _softplus64(op.beta * x) / op.beta))
class Softplus(Op):
    """log(1 + exp(beta * x)) / beta; x where beta * x is above the threshold."""

    beta: float = 1.0
    threshold: float = 20.0
    table: TableOptions = LEAST_ERROR


@table_function(jax.nn.soft_sign, lambda x: x / (1.0 + np.abs(x)), ODD)
class Softsign(Op):
    """x / (1 + |x|)."""

    bounded: ClassVar = True

    table: TableOptions = LEAST_ERROR


@table_function(
    lambda op, x: jnp.where(x > op.threshold, x, op.value), lambda op, x: np.where(x > op.threshold, x, op.value)
)
class ThresholdedRelu(Op):
    """x above the threshold, `value` elsewhere."""

    threshold: float = 1.0
    value: float = 0.0
    table: TableOptions = LEAST_ERROR


TABLE_FUNCTIONS: tuple[type[Op], ...] = tuple(DECLARED)
