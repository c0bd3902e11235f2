"""The functions of `jquant.ops` inside a model: a jit with their name is the operator that it carries."""

from __future__ import annotations

from typing import Any

import jax

from jquant.drafts.values import Known, Value
from jquant.functions.trace.primitives.common import DTYPES
from jquant.functions.trace.reader import Reader
from jquant.ops.functional import NAME, carried_operator, jquant_operator
from jquant.types import JQuantError


def named_operator(reader: Reader, equation: Any, operands: list[Value]) -> Value | None:
    """The node of an operator, or None where the jit is another one, or a transformation has changed what is in it."""
    if equation.params.get("name") != NAME:
        return None
    op = carried_operator(equation.params["jaxpr"].jaxpr)
    if op is None or all(isinstance(v, Known) for v in operands) or any(str(v.dtype) not in DTYPES for v in operands):
        return None
    arrays = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in operands]
    try:
        (plain,) = jax.make_jaxpr(jquant_operator, static_argnums=0)(op, *arrays).eqns
    except (JQuantError, TypeError, ValueError, IndexError):  # of operands with an axis more, as under vmap
        return None
    if str(plain.params["jaxpr"]) != str(equation.params["jaxpr"]):
        return None
    var = equation.outvars[0]
    return reader.draft(op, *operands, shape=var.aval.shape, dtype=var.aval.dtype)
