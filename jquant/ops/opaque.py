"""A primitive of JAX that has no operator here: it runs in float and in fake-quant, and no program can hold it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jquant.graph.operator import Lowered, Operand, eval_float, lower_op
from jquant.types import Array, LoweringError, Op, Target


class OpaqueCall:
    """An equation of a jaxpr as a function; two are equal where their primitives and printed parameters are."""

    __slots__ = ("function", "name", "text")

    def __init__(self, equation: Any) -> None:
        self.name = str(equation.primitive.name)
        self.function = equation_function(equation)
        shown = (f"{key}={_shown(value)}" for key, value in sorted(equation.params.items()))
        self.text = f"{self.name}[{', '.join(shown)}]"

    def __call__(self, *operands: Array) -> list[Array]:
        return self.function(*operands)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OpaqueCall) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return self.name


def equation_function(equation: Any) -> Callable[..., list[Array]]:
    """What an equation of a jaxpr computes: arrays in the order of its operands to the list of its results."""
    primitive, found = equation.primitive, equation.primitive.get_bind_params(equation.params)
    functions, params = found if isinstance(found, tuple) else ((), found)  # of one value since jax 0.10

    def run(*operands: Array) -> list[Array]:
        result = primitive.bind(*functions, *operands, **params)
        return list(result) if primitive.multiple_results else [result]

    return run


def _shown(value: Any) -> str:
    """A parameter as text; functions by their name, since their address says nothing."""
    return getattr(value, "__qualname__", "function") if callable(value) else str(value)


@dataclass(frozen=True, kw_only=True)
class Opaque(Op):
    """Result `index` of a primitive that jquant has no operator for. `trace` makes it; a file cannot hold it."""

    call: OpaqueCall
    index: int = 0


@eval_float.register
def _(op: Opaque, *operands: Array) -> Array:
    return op.call(*operands)[op.index]


@lower_op.register
def _(op: Opaque, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    shapes = ", ".join(str(["batch" if n is None else n for n in x.shape]) for x in inputs)
    raise LoweringError(
        f"the primitive {op.call!r} on {shapes} has no operator, so it stays float and cannot be deployed; replace it "
        "in the model (jquant.ops has functions for what lax would shred), or end the deployed part before it with "
        "jq.lower(..., outputs=[...])"
    )
