"""What public documents say of the operators that the compiler of a march takes: rows of data, each with its source.

The documents that could be read cover a few operators. Of all others nothing is known here, and a report says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

Quantity = Literal["operands", "result", "kernel", "products", "reduced", "searched", "rank"]
WHAT: Mapping[Quantity, str] = {
    "operands": "dtypes of the operands",
    "result": "dtype of the result",
    "kernel": "side of the kernel",
    "products": "products in one sum",
    "reduced": "elements that are reduced",
    "searched": "elements of the axis that is searched",
    "rank": "axes of a value",
}


class Page(NamedTuple):
    """Where a row stems from, and the version that the page states."""

    source: str
    version: str


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """One documented limit of operators.

    `operators`  names of classes of `jquant.ops`; () for every one
    `quantity`   what is limited, see `WHAT`
    `allowed`    names of dtypes
    `least`, `most`  for a number
    `page`  where it is documented
    """

    operators: tuple[str, ...]
    quantity: Quantity
    allowed: tuple[str, ...] = ()
    least: int = 0
    most: int = 0
    page: Page

    @property
    def limit(self) -> str:
        return " or ".join(self.allowed) if self.allowed else f"{self.least} to {self.most}"


_LISTS = "https://toolchain.d-robotics.cc/guide/appendix/supported_op_list/operator_constraints_bpu/"
# Of this page the public copy that was read has the rows from abs to argmax.
_TORCH = Page(f"{_LISTS}torch_operator_constraints_list_j6em.html", "S100, read in 2026, not dated")
_ARITHMETIC = Page("docs/nash-arithmetic.md, sections 4 and 5", "what is marked there as documented")
_NUMBERS = ("int8", "int16")

S100: tuple[Constraint, ...] = (
    Constraint(operators=(), quantity="rank", least=0, most=10, page=_ARITHMETIC),
    Constraint(operators=("Abs", "Acos", "Acosh"), quantity="operands", allowed=_NUMBERS, page=_TORCH),
    Constraint(operators=("Abs", "Acos", "Acosh"), quantity="result", allowed=_NUMBERS, page=_TORCH),
    # int32 too, where the addition is fused into a convolution: such a node is none of its own here.
    Constraint(operators=("Add",), quantity="operands", allowed=_NUMBERS, page=_TORCH),
    Constraint(operators=("Add",), quantity="result", allowed=_NUMBERS, page=_TORCH),
    Constraint(operators=("ReduceAll", "ReduceAny"), quantity="operands", allowed=("bool",), page=_TORCH),
    Constraint(operators=("ReduceAll", "ReduceAny"), quantity="reduced", least=1, most=65535, page=_TORCH),
    Constraint(operators=("ArgMax", "ArgMin"), quantity="operands", allowed=_NUMBERS, page=_TORCH),
    Constraint(operators=("ArgMax", "ArgMin"), quantity="searched", least=1, most=32767, page=_TORCH),
    Constraint(operators=("ArgMax", "ArgMin"), quantity="result", allowed=("int32", "int64"), page=_TORCH),
    Constraint(operators=("Conv", "ConvTranspose", "Linear"), quantity="operands", allowed=_NUMBERS, page=_ARITHMETIC),
    Constraint(
        operators=("Conv", "ConvTranspose", "Linear"),
        quantity="result",
        allowed=("int8", "int16", "int32"),
        page=_ARITHMETIC,
    ),
    Constraint(operators=("Conv", "ConvTranspose"), quantity="kernel", least=1, most=31, page=_ARITHMETIC),
    Constraint(operators=("Conv", "ConvTranspose"), quantity="products", least=1, most=65535, page=_ARITHMETIC),
)

# By the name of a march. The pages speak of S100 and S100P together.
CONSTRAINTS: Mapping[str, tuple[Constraint, ...]] = {"nash-e": S100, "nash-m": S100}


def constraints_of(march: str, operator: str) -> tuple[Constraint, ...]:
    """The documented rows of an operator on a march, () where none is known; rows of every operator are left out.

    Example:
      >>> from jquant.targets.constraints import constraints_of
      >>> [f"{row.quantity}: {row.limit}" for row in constraints_of("nash-e", "ArgMax")]
      ['operands: int8 or int16', 'searched: 1 to 32767', 'result: int32 or int64']
      >>> constraints_of("nash-e", "Sort")
      ()
    """
    return tuple(row for row in CONSTRAINTS.get(march, ()) if operator in row.operators)
