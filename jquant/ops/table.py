"""Functions of one operand that the chip looks up in tables: `jquant/ops/lookup.py` says how.

Every one has a field `table`: the layout of its segments for int16. The default is what measured best on its usual
range. In float they are torch's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import pi, sqrt
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jquant.ops.base import eval_float
from jquant.ops.lookup import CURVATURE, EVENLY, TableOptions, Traits, as_table, traits, without_period
from jquant.types import Array, Op


@as_table
@dataclass(frozen=True, kw_only=True)
class Acos(Op):
    """arccos(x), for -1 <= x <= 1."""

    layout: ClassVar = "elementwise"

    table: TableOptions = CURVATURE


@as_table
@dataclass(frozen=True, kw_only=True)
class Acosh(Op):
    """arcosh(x), for x >= 1."""

    layout: ClassVar = "elementwise"

    table: TableOptions = CURVATURE


@as_table
@dataclass(frozen=True, kw_only=True)
class Asin(Op):
    """arcsin(x), for -1 <= x <= 1."""

    layout: ClassVar = "elementwise"

    table: TableOptions = CURVATURE


@as_table
@dataclass(frozen=True, kw_only=True)
class Asinh(Op):
    """arsinh(x)."""

    layout: ClassVar = "elementwise"

    table: TableOptions = EVENLY


@as_table
@dataclass(frozen=True, kw_only=True)
class Atan(Op):
    """arctan(x)."""

    layout: ClassVar = "elementwise"

    table: TableOptions = EVENLY


@as_table
@dataclass(frozen=True, kw_only=True)
class Atanh(Op):
    """artanh(x), for -1 <= x <= 1."""

    layout: ClassVar = "elementwise"

    table: TableOptions = EVENLY


@as_table
@dataclass(frozen=True, kw_only=True)
class Celu(Op):
    """max(x, 0) + min(0, alpha * (exp(x / alpha) - 1))."""

    layout: ClassVar = "elementwise"

    alpha: float = 1.0
    table: TableOptions = EVENLY


@as_table
@dataclass(frozen=True, kw_only=True)
class Cos(Op):
    """cos(x). `single_period`: x - 2*pi*floor(x / (2*pi) + 1/2) first."""

    layout: ClassVar = "elementwise"

    single_period: bool = True
    table: TableOptions = EVENLY


@as_table
@dataclass(frozen=True, kw_only=True)
class Cosh(Op):
    """cosh(x)."""

    layout: ClassVar = "elementwise"

    table: TableOptions = EVENLY


@as_table
@dataclass(frozen=True, kw_only=True)
class Elu(Op):
    """x above 0, alpha * (exp(x) - 1) below."""

    layout: ClassVar = "elementwise"

    alpha: float = 1.0
    table: TableOptions = EVENLY


@as_table
@dataclass(frozen=True, kw_only=True)
class Erf(Op):
    """The error function."""

    layout: ClassVar = "elementwise"

    table: TableOptions = EVENLY


@as_table
@dataclass(frozen=True, kw_only=True)
class Exp(Op):
    """exp(x)."""

    layout: ClassVar = "elementwise"

    table: TableOptions = EVENLY


@as_table
@dataclass(frozen=True, kw_only=True)
class Gelu(Op):
    """x * Phi(x), with the distribution function of a normal variable or its approximation by tanh."""

    layout: ClassVar = "elementwise"

    approximate: Literal["none", "tanh"] = "none"
    table: TableOptions = EVENLY


@as_table
@dataclass(frozen=True, kw_only=True)
class HardSigmoid(Op):
    """clip(x + 3, 0, 6) / 6."""

    layout: ClassVar = "elementwise"

    table: TableOptions = CURVATURE


@as_table
@dataclass(frozen=True, kw_only=True)
class HardSwish(Op):
    """x * clip(x + 3, 0, 6) / 6."""

    layout: ClassVar = "elementwise"

    table: TableOptions = EVENLY


@as_table
@dataclass(frozen=True, kw_only=True)
class LeakyRelu(Op):
    """max(x, 0) + negative_slope * min(x, 0)."""

    layout: ClassVar = "elementwise"

    negative_slope: float = 0.01
    table: TableOptions = EVENLY


@as_table
@dataclass(frozen=True, kw_only=True)
class Log(Op):
    """log(x + epsilon)."""

    layout: ClassVar = "elementwise"

    epsilon: float = 0.0
    table: TableOptions = CURVATURE


@as_table
@dataclass(frozen=True, kw_only=True)
class LogSigmoid(Op):
    """log(1 / (1 + exp(-x)))."""

    layout: ClassVar = "elementwise"

    table: TableOptions = EVENLY


@as_table
@dataclass(frozen=True, kw_only=True)
class Mish(Op):
    """x * tanh(log(1 + exp(x)))."""

    layout: ClassVar = "elementwise"

    table: TableOptions = EVENLY


@as_table
@dataclass(frozen=True, kw_only=True)
class Pow(Op):
    """x ** exponent."""

    layout: ClassVar = "elementwise"

    exponent: float
    table: TableOptions = EVENLY


@as_table
@dataclass(frozen=True, kw_only=True)
class Reciprocal(Op):
    """1 / (x + epsilon)."""

    layout: ClassVar = "elementwise"

    epsilon: float = 0.0
    table: TableOptions = CURVATURE


@as_table
@dataclass(frozen=True, kw_only=True)
class Rsqrt(Op):
    """1 / sqrt(x + epsilon)."""

    layout: ClassVar = "elementwise"

    epsilon: float = 0.0
    table: TableOptions = CURVATURE


@as_table
@dataclass(frozen=True, kw_only=True)
class Selu(Op):
    """elu with the constants of self-normalizing networks (Klambauer et al. 2017)."""

    layout: ClassVar = "elementwise"

    table: TableOptions = EVENLY


@as_table
@dataclass(frozen=True, kw_only=True)
class Sigmoid(Op):
    """1 / (1 + exp(-x))."""

    layout: ClassVar = "elementwise"

    table: TableOptions = EVENLY


@as_table
@dataclass(frozen=True, kw_only=True)
class Sign(Op):
    """-1, 0 or 1."""

    layout: ClassVar = "elementwise"

    table: TableOptions = CURVATURE


@as_table
@dataclass(frozen=True, kw_only=True)
class Silu(Op):
    """x / (1 + exp(-x))."""

    layout: ClassVar = "elementwise"

    table: TableOptions = EVENLY


@as_table
@dataclass(frozen=True, kw_only=True)
class Sin(Op):
    """sin(x). `single_period`: x - 2*pi*floor(x / (2*pi) + 1/2) first."""

    layout: ClassVar = "elementwise"

    single_period: bool = True
    table: TableOptions = EVENLY


@as_table
@dataclass(frozen=True, kw_only=True)
class Sinh(Op):
    """sinh(x)."""

    layout: ClassVar = "elementwise"

    table: TableOptions = EVENLY


@as_table
@dataclass(frozen=True, kw_only=True)
class Softplus(Op):
    """log(1 + exp(beta * x)) / beta; x where beta * x is above the threshold."""

    layout: ClassVar = "elementwise"

    beta: float = 1.0
    threshold: float = 20.0
    table: TableOptions = EVENLY


@as_table
@dataclass(frozen=True, kw_only=True)
class Softsign(Op):
    """x / (1 + |x|)."""

    layout: ClassVar = "elementwise"

    table: TableOptions = EVENLY


@as_table
@dataclass(frozen=True, kw_only=True)
class Sqrt(Op):
    """sqrt(x + epsilon)."""

    layout: ClassVar = "elementwise"

    epsilon: float = 0.0
    table: TableOptions = CURVATURE


@as_table
@dataclass(frozen=True, kw_only=True)
class Tan(Op):
    """tan(x)."""

    layout: ClassVar = "elementwise"

    table: TableOptions = EVENLY


@as_table
@dataclass(frozen=True, kw_only=True)
class Tanh(Op):
    """tanh(x)."""

    layout: ClassVar = "elementwise"

    table: TableOptions = EVENLY


@as_table
@dataclass(frozen=True, kw_only=True)
class ThresholdedRelu(Op):
    """x above the threshold, `value` elsewhere."""

    layout: ClassVar = "elementwise"

    threshold: float = 1.0
    value: float = 0.0
    table: TableOptions = CURVATURE


# ---------------------------------------------------------------------------------------------------------------------
# Meaning

_PLAIN: dict[type[Op], Callable[[Array], Array]] = {
    Acos: jnp.arccos,
    Acosh: jnp.arccosh,
    Asin: jnp.arcsin,
    Asinh: jnp.arcsinh,
    Atan: jnp.arctan,
    Atanh: jnp.arctanh,
    Cosh: jnp.cosh,
    Erf: jax.scipy.special.erf,
    Exp: jnp.exp,
    HardSigmoid: lambda x: jnp.clip(x + 3.0, 0.0, 6.0) / 6.0,
    HardSwish: lambda x: x * (jnp.clip(x + 3.0, 0.0, 6.0) / 6.0),
    LogSigmoid: jax.nn.log_sigmoid,
    Mish: jax.nn.mish,
    Selu: jax.nn.selu,
    Sigmoid: jax.nn.sigmoid,
    Sign: jnp.sign,
    Silu: jax.nn.silu,
    Sinh: jnp.sinh,
    Softsign: jax.nn.soft_sign,
    Tan: jnp.tan,
    Tanh: jnp.tanh,
}


def _register(cls: type[Op], function: Callable[[Array], Array]) -> None:
    eval_float.register(cls)(lambda op, x: function(x))


for _cls, _function in _PLAIN.items():
    _register(_cls, _function)


@eval_float.register
def _(op: Celu, x: Array) -> Array:
    return jax.nn.celu(x, op.alpha)


@eval_float.register
def _(op: Elu, x: Array) -> Array:
    return jax.nn.elu(x, op.alpha)


@eval_float.register
def _(op: Gelu, x: Array) -> Array:
    if op.approximate == "tanh":
        return jax.nn.gelu(x, approximate=True)
    return x * (0.5 + 0.5 * jax.lax.erf(x * sqrt(0.5)))  # as torch; the erfc of jax.nn takes more passes on a CPU


@eval_float.register
def _(op: LeakyRelu, x: Array) -> Array:
    return jnp.where(x > 0.0, x, op.negative_slope * x)


@eval_float.register
def _(op: Softplus, x: Array) -> Array:
    scaled = op.beta * x
    return jnp.where(scaled > op.threshold, x, jax.nn.softplus(jnp.minimum(scaled, op.threshold)) / op.beta)


@eval_float.register
def _(op: ThresholdedRelu, x: Array) -> Array:
    return jnp.where(x > op.threshold, x, op.value)


@eval_float.register
def _(op: Log, x: Array) -> Array:
    return jnp.log(x + op.epsilon)


@eval_float.register
def _(op: Sqrt, x: Array) -> Array:
    return jnp.sqrt(x + op.epsilon)


@eval_float.register
def _(op: Rsqrt, x: Array) -> Array:
    return jax.lax.rsqrt(x + op.epsilon)


@eval_float.register
def _(op: Reciprocal, x: Array) -> Array:
    return 1.0 / (x + op.epsilon)


@eval_float.register
def _(op: Pow, x: Array) -> Array:
    return jax.lax.integer_pow(x, int(op.exponent)) if _is_whole(op) else jnp.power(x, op.exponent)


@eval_float.register
def _(op: Sin, x: Array) -> Array:
    return jnp.sin(_within_period(x) if op.single_period else x)


@eval_float.register
def _(op: Cos, x: Array) -> Array:
    return jnp.cos(_within_period(x) if op.single_period else x)


def _within_period(x: Array) -> Array:
    return x - 2 * pi * jnp.floor(x / (2 * pi) + 0.5)


def _is_whole(op: Pow) -> bool:
    return float(op.exponent).is_integer()


# ---------------------------------------------------------------------------------------------------------------------
# Domain, symmetry, period

_TRAITS: dict[type[Op], Traits] = {
    Acos: Traits(low=-1.0, high=1.0),
    Acosh: Traits(low=1.0),
    Asin: Traits(low=-1.0, high=1.0, symmetry="odd"),
    Asinh: Traits(symmetry="odd"),
    Atan: Traits(symmetry="odd"),
    Atanh: Traits(low=-1.0, high=1.0, symmetry="odd"),
    Cosh: Traits(symmetry="even"),
    Erf: Traits(symmetry="odd"),
    Sign: Traits(symmetry="odd"),
    Sinh: Traits(symmetry="odd"),
    Softsign: Traits(symmetry="odd"),
    Tan: Traits(symmetry="odd"),
    Tanh: Traits(symmetry="odd"),
}


def _describe(cls: type[Op], found: Traits) -> None:
    traits.register(cls)(lambda op: found)


for _cls, _found in _TRAITS.items():
    _describe(_cls, _found)


@traits.register(Log)
@traits.register(Rsqrt)
@traits.register(Sqrt)
def _(op: Log | Rsqrt | Sqrt) -> Traits:
    return Traits(low=-op.epsilon)


@traits.register
def _(op: Reciprocal) -> Traits:
    return Traits(symmetry="none" if op.epsilon else "odd")


@traits.register
def _(op: Pow) -> Traits:
    if not _is_whole(op):
        return Traits(low=0.0)
    return Traits(symmetry="odd" if op.exponent % 2 else "even")


@traits.register(Cos)
@traits.register(Sin)
def _(op: Cos | Sin) -> Traits:
    reduced = without_period(op) if op.single_period else None
    return Traits(symmetry="odd" if isinstance(op, Sin) else "even", reduced=reduced)


TABLE_FUNCTIONS: tuple[type[Op], ...] = (
    Acos, Acosh, Asin, Asinh, Atan, Atanh, Celu, Cos, Cosh, Elu, Erf, Exp, Gelu, HardSigmoid, HardSwish, LeakyRelu,
    Log, LogSigmoid, Mish, Pow, Reciprocal, Rsqrt, Selu, Sigmoid, Sign, Silu, Sin, Sinh, Softplus, Softsign, Sqrt,
    Tan, Tanh, ThresholdedRelu,
)  # fmt: skip
