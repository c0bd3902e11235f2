"""The table from ATen overloads to jquant operators: to support another one, add a line to the table of its family.

A handler gets the output shape (a list of them for several results) and every argument of the schema in order (tensors
as fx nodes). It returns a `Call`, or one of its arguments where the operator is an identity, or a list of these with
one entry for each result, or raises `Unsupported` with the reason.
"""

from typing import Any

from . import (
    compare,
    elementwise,
    images,
    indexing,
    layers,
    movement,
    quantized,
    quotients,
    recurrent,
    reduce,
    scatter,
    windows,
)
from .call import BATCH, CONSTANT, EXAMPLES, FOLDED, ROW, Call, Handler, Unsupported, aten, format_shape, shape_of

_FAMILIES = (
    elementwise,
    compare,
    reduce,
    movement,
    indexing,
    scatter,
    windows,
    layers,
    images,
    recurrent,
    quotients,
    quantized,
)


def _in_place(table: dict[Any, Handler]) -> dict[Any, Handler]:
    """`add_.Tensor` has the handler of `add.Tensor`: `Reader` follows what a change in place changes."""
    found = {}
    for overload, handler in table.items():
        name = overload._schema.name.split("::")[-1]
        packet = None if name.startswith("__") else getattr(aten, f"{name}_", None)
        twin = getattr(packet, overload._overloadname, None)
        if twin is not None and _arguments(twin) == _arguments(overload):
            found[twin] = handler
    return found


def _arguments(overload: Any) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in overload._schema.arguments]


_ALIASES = {
    "absolute": "abs", "arccos": "acos", "arccosh": "acosh", "arcsin": "asin", "arcsinh": "asinh", "arctan": "atan",
    "arctanh": "atanh", "clip": "clamp", "concatenate": "cat", "divide": "div", "greater": "gt", "greater_equal": "ge",
    "less": "lt", "less_equal": "le", "multiply": "mul", "negative": "neg", "not_equal": "ne", "special_exp2": "exp2",
    "special_expit": "sigmoid", "special_expm1": "expm1", "special_log1p": "log1p",
    "special_log_softmax": "log_softmax", "special_logsumexp": "logsumexp", "special_softmax": "softmax",
    "subtract": "sub",
}  # fmt: skip


def _aliases(table: dict[Any, Handler]) -> dict[Any, Handler]:
    """Other names of torch for the same call: `torch.subtract`."""
    found = {}
    for alias, name in _ALIASES.items():
        for overload in getattr(aten, alias).overloads():
            same = table.get(getattr(getattr(aten, name), overload, None))
            if same is not None:
                found[getattr(getattr(aten, alias), overload)] = same
    return found


FUNCTIONAL: dict[Any, Handler] = {k: v for family in _FAMILIES for k, v in family.TABLE.items()} | scatter.COPIES
TABLE: dict[Any, Handler] = {
    **_in_place(elementwise.TABLE),
    **_in_place(compare.TABLE),
    **_in_place(quotients.TABLE),
    **_in_place(scatter.TABLE),
    **_aliases(FUNCTIONAL),
    **FUNCTIONAL,
}


def advice(target: Any, path: str) -> str:
    """The step that takes an operator without a handler out of a model, where one is known; else an empty string.

    Args:
      target: the overload.
      path: of the module that calls it; `parametrizations.weight.0` inside a parametrized layer.
    """
    layer, is_parametrized, rest = f".{path}".rpartition(".parametrizations.")
    if is_parametrized:
        owner, name = _layer(layer.removeprefix(".")), rest.partition(".")[0]
        return f"before the import call torch.nn.utils.parametrize.remove_parametrizations({owner}, {name!r})"
    return ""


def _layer(path: str) -> str:
    return f"model.{path}" if path else "model"


__all__ = [
    "BATCH",
    "CONSTANT",
    "EXAMPLES",
    "FOLDED",
    "FUNCTIONAL",
    "ROW",
    "TABLE",
    "Call",
    "Handler",
    "Unsupported",
    "advice",
    "format_shape",
    "shape_of",
]
