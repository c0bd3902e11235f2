"""Every table function on every input: int8 and int16 in, int8 and int16 out.

`tables_exhaustive()` compares the fast path with the reference on all 256 or 65,536 inputs, which must be equal, and
measures how far the table is from the function in float64, in LSB of the output. `CASES` draws scales at random, so
that tables saturate, degenerate and leave domains, where only the equality is asked for.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from conformance.harness import Case, Row

import jquant as jq
from jquant import ops
from jquant.ops import Operand
from jquant.reference.call import Call
from jquant.types import NodeFormat, integer_range

PAIRS = (("int8", "int8"), ("int8", "int16"), ("int16", "int8"), ("int16", "int16"))


@dataclass(frozen=True)
class TableCase:
    """A function, the range of its input, and how far its int16 -> int16 table may be from it.

    `exact`      the function in float64
    `reach`      real, the largest |x|: s_x = reach / 32767.5 or / 127.5
    `bound`      LSB of an int16 output, on `within`; int8 outputs and inputs have the general ones of `bound_of`
    `bound8`     LSB of an int8 output, on `within`, from an int16 input
    `within`     real, closed: the error is measured here (the functions are defined on more)
    `y_reach`    real, the output that is 32767.5 LSB; None: the largest on `within`
    """

    op: jq.ops.Op
    exact: Callable[[torch.Tensor], torch.Tensor]
    reach: float
    bound: float
    bound8: float = 1.0
    within: tuple[float, float] = (-inf, inf)
    y_reach: float | None = None

    @property
    def name(self) -> str:
        fields = {k: v for k, v in vars(self.op).items() if k != "table"}
        options = [f"{k}={v}" for k, v in fields.items()]
        options += [] if self.op.table == type(self.op)(**fields).table else ["own table"]
        return f"{type(self.op).__name__}({', '.join(options)})"


FUNCTIONS = (
    TableCase(ops.Acos(), torch.acos, 1.0, 45, 1.1),
    TableCase(ops.Acosh(), torch.acosh, 8.0, 55, within=(1, 8)),
    TableCase(ops.Asin(), torch.asin, 1.0, 70),
    TableCase(ops.Asinh(), torch.asinh, 8.0, 1.7),
    TableCase(ops.Atan(), torch.atan, 8.0, 2.5),
    TableCase(ops.Atanh(), torch.atanh, 0.95, 3.8),
    TableCase(ops.Celu(alpha=0.7), lambda x: F.celu(x, 0.7), 8.0, 2.2),
    TableCase(ops.Cos(), torch.cos, 3.0, 2.3),
    TableCase(ops.Cos(), torch.cos, 20.0, 4.0),
    TableCase(ops.Cos(single_period=False), torch.cos, 6.0, 4.3),
    TableCase(ops.Cosh(), torch.cosh, 4.0, 2.0),
    TableCase(ops.Elu(alpha=1.2), lambda x: F.elu(x, 1.2), 8.0, 2.3),
    TableCase(ops.Erf(), torch.erf, 4.0, 2.2),
    TableCase(ops.Exp(), torch.exp, 4.0, 2.8),
    TableCase(ops.Expm1(), torch.expm1, 4.0, 2.8),
    TableCase(
        ops.Exp(table=ops.TableOptions(input_range=(-12.0, 0.0))), torch.exp, 12.0, 7.0, within=(-12, 0), y_reach=1.0
    ),
    TableCase(ops.Gelu(), F.gelu, 8.0, 1.7),
    TableCase(ops.Gelu(approximate="tanh"), lambda x: F.gelu(x, approximate="tanh"), 8.0, 1.7),
    TableCase(ops.HardSigmoid(), F.hardsigmoid, 8.0, 1.8),
    TableCase(ops.HardSwish(), F.hardswish, 8.0, 11),
    TableCase(ops.LeakyRelu(negative_slope=0.1), lambda x: F.leaky_relu(x, 0.1), 8.0, 1.7),
    TableCase(ops.Log(epsilon=1.0), lambda x: torch.log(x + 1.0), 8.0, 38, within=(0, 8)),
    TableCase(ops.LogSigmoid(), F.logsigmoid, 8.0, 1.7),
    TableCase(ops.Mish(), F.mish, 8.0, 1.7),
    TableCase(ops.Pow(exponent=2.0), lambda x: x**2, 4.0, 2.0),
    TableCase(ops.Pow(exponent=3.0), lambda x: x**3, 4.0, 2.1),
    TableCase(ops.Pow(exponent=1.5), lambda x: x**1.5, 4.0, 2.7, within=(0, 4)),
    TableCase(ops.Pow(exponent=-1.0), lambda x: 1 / x, 8.0, 140, 1.5, within=(1, 8)),
    TableCase(ops.Reciprocal(), lambda x: 1 / x, 8.0, 16, within=(1, 8)),
    TableCase(
        ops.Reciprocal(epsilon=0.5, table=ops.TableOptions(input_range=(0.0, 8.0), placement="balanced")),
        lambda x: 1 / (x + 0.5),
        8.0,
        1.7,
        1.0,
        within=(0, 8),
    ),
    TableCase(ops.Rsqrt(epsilon=0.1), lambda x: torch.rsqrt(x + 0.1), 8.0, 270, 2.0, within=(0, 8)),
    TableCase(
        ops.Rsqrt(epsilon=0.1, table=ops.TableOptions(placement="balanced")),
        lambda x: torch.rsqrt(x + 0.1),
        8.0,
        14,
        within=(0, 8),
    ),
    TableCase(ops.Selu(), F.selu, 8.0, 2.8),
    TableCase(ops.Sigmoid(), torch.sigmoid, 8.0, 2.3),
    TableCase(ops.Sign(), torch.sign, 4.0, 0.6),
    TableCase(ops.Silu(), F.silu, 8.0, 1.7),
    TableCase(ops.Sin(), torch.sin, 3.0, 2.2),
    TableCase(ops.Sin(), torch.sin, 20.0, 3.5),
    TableCase(ops.Sin(single_period=False), torch.sin, 6.0, 4.0),
    TableCase(ops.Sinh(), torch.sinh, 4.0, 2.1),
    TableCase(ops.Softplus(beta=2.0), lambda x: F.softplus(x, 2.0), 8.0, 1.8),
    TableCase(ops.Softsign(), F.softsign, 8.0, 6.0),
    TableCase(ops.Sqrt(), torch.sqrt, 8.0, 45, 1.1, within=(0, 8)),
    TableCase(ops.Sqrt(epsilon=0.1), lambda x: torch.sqrt(x + 0.1), 8.0, 42, within=(0, 8)),
    TableCase(ops.Tan(), torch.tan, 1.3, 2.7),
    TableCase(ops.Tanh(), torch.tanh, 8.0, 3.4),
    TableCase(ops.Tanh(table=ops.TableOptions(num_tables=24)), torch.tanh, 8.0, 1.6),
    TableCase(ops.ThresholdedRelu(), lambda x: F.threshold(x, 1.0, 0.0), 8.0, 2.0, within=(1.01, 8)),
)


class Measured(NamedTuple):
    """One function at one pair of dtypes: how many inputs, how many where fast != reference, how far from float64."""

    function: str
    formats: str
    inputs: int
    mismatches: int
    max_error: float  # LSB of the output
    bound: float


def inputs_of(dtype: str) -> np.ndarray:
    """Every integer of the dtype, int64."""
    low, high = integer_range(dtype)
    return np.arange(low, high + 1)


def scales_of(case: TableCase, x_dtype: str, y_dtype: str) -> tuple[np.float32, np.float32]:
    """(s_x, s_y), real per LSB."""
    s_x = np.float32(case.reach / (integer_range(x_dtype)[1] + 0.5))
    y, measured = exact_values(case, x_dtype, s_x)
    reach = np.abs(y[measured]).max() if case.y_reach is None else case.y_reach
    return s_x, np.float32(reach / (integer_range(y_dtype)[1] + 0.5))


def exact_values(case: TableCase, x_dtype: str, s_x: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """The function in float64 of every input, and which of them count."""
    x = inputs_of(x_dtype) * np.float64(s_x)
    y = case.exact(torch.from_numpy(x)).numpy()
    low, high = case.within
    return y, np.isfinite(y) & (x >= low) & (x <= high)


def lowered(op: jq.ops.Op, s_x: np.ndarray, x_dtype: str, s_y: np.ndarray, y_dtype: str) -> dict[str, jax.Array]:
    """The constants of a table."""
    x, y = Operand(x_dtype, jnp.float32(s_x), (None,)), Operand(y_dtype, jnp.float32(s_y), (None,))
    return ops.lower_op(op, [x], y, {}, jq.targets.NASH_E).constants


def fast(op: jq.ops.Op, x: np.ndarray, x_dtype: str, y_dtype: str, constants: dict[str, jax.Array]) -> np.ndarray:
    y = ops.eval_integer(op, NodeFormat((x_dtype,), y_dtype), jq.targets.NASH_E, jnp.asarray(x, x_dtype), **constants)
    assert y.dtype == y_dtype
    return np.asarray(y).astype(np.int64)


def slow(op: jq.ops.Op, x: np.ndarray, x_dtype: str, y_dtype: str, constants: dict[str, jax.Array]) -> np.ndarray:
    integers = {role: np.asarray(v).astype(np.int64) for role, v in constants.items()}
    call = Call(op, [np.asarray(x, np.int64)], integers, NodeFormat((x_dtype,), y_dtype), jq.targets.NASH_E)
    return jq.reference.rule_of(op)(call)


def bound_of(case: TableCase, x_dtype: str, y_dtype: str) -> float:
    """A direct table rounds once; float32 functions may move a tie, and a few have an error of some ulp."""
    if x_dtype == "int8":
        return 0.5 + (0.001 if y_dtype == "int8" else 0.05)
    return case.bound if y_dtype == "int16" else case.bound8


def measure(case: TableCase, x_dtype: str, y_dtype: str) -> Measured:
    """Every input of one function at one pair of dtypes."""
    s_x, s_y = scales_of(case, x_dtype, y_dtype)
    x, constants = inputs_of(x_dtype), lowered(case.op, s_x, x_dtype, s_y, y_dtype)
    y = fast(case.op, x, x_dtype, y_dtype, constants)
    mismatches = int(np.sum(y != slow(case.op, x, x_dtype, y_dtype, constants)))
    values, measured = exact_values(case, x_dtype, s_x)
    error = np.abs(y - np.clip(values / np.float64(s_y), *integer_range(y_dtype)))[measured].max()
    formats = f"{x_dtype} -> {y_dtype}"
    return Measured(case.name, formats, x.size, mismatches, float(error), bound_of(case, x_dtype, y_dtype))


def tables_exhaustive() -> Iterator[Row]:
    """Every function at every pair of dtypes."""
    for case in FUNCTIONS:
        for pair in PAIRS:
            found = measure(case, *pair)
            low, high = max(case.within[0], -case.reach), min(case.within[1], case.reach)
            note = f"at most {found.max_error:.2f} LSB from float64 on [{low:g}, {high:g}]"
            yield Row(found.function, found.formats, found.inputs, found.mismatches, note)


def cases() -> Iterator[Case]:
    """Every function on int16 at random scales, every layout of the segments, and the other formats of a few."""
    for case in FUNCTIONS:
        yield Case(op=case.op, shapes=((500,),), inputs=("int16",), output="int16")
    for op in (ops.Tanh(), ops.Cos(), ops.Log()):
        for x_dtype, y_dtype in PAIRS[:3]:
            yield Case(op=op, shapes=((500,),), inputs=(x_dtype,), output=y_dtype)
    for options in LAYOUTS:
        for op in (ops.Tanh(table=options), ops.Exp(table=options), ops.Sin(table=options)):
            yield Case(op=op, shapes=((500,),), inputs=("int16",), output="int16")


LAYOUTS = (
    ops.TableOptions(placement="curvature"),
    ops.TableOptions(placement="balanced", num_tables=12),
    ops.TableOptions(placement=(0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 4.0), left_slope=-0.5, right_slope=0.0),
    ops.TableOptions(num_tables=126, symmetric=False),
    ops.TableOptions(input_range=(-2.0, 1.0), symmetric=False),
)
CASES = tuple(cases())
EXHAUSTIVE = (tables_exhaustive,)
