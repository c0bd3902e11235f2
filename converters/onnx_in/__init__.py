"""The table from ONNX operators to jquant's: one handler an operator, a family a file.

A handler takes a `Call` and returns what its node makes: values, constants, or a list for several results.
"""

from . import elementwise, images, layers, movement, newer, quantize, recurrent, reduce, scatter
from .call import Call, Handler, result_of
from .folding import FOLDS, OF_SHAPES, fold
from .load import INPUT_TYPES, MAX_ELEMENTS, OPSETS, TYPES, array_of, load_model
from .values import BATCHES, Grid, Integers, Known, Refused, Result, Unsupported, Value, known

_FAMILIES = (elementwise, layers, movement, reduce, scatter, images, recurrent, quantize, newer)

TABLE: dict[str, Handler] = {kind: handler for family in _FAMILIES for kind, handler in family.TABLE.items()}

__all__ = [
    "BATCHES",
    "Call",
    "FOLDS",
    "Grid",
    "Handler",
    "INPUT_TYPES",
    "Integers",
    "Known",
    "MAX_ELEMENTS",
    "OF_SHAPES",
    "OPSETS",
    "Refused",
    "Result",
    "TABLE",
    "TYPES",
    "Unsupported",
    "Value",
    "array_of",
    "fold",
    "known",
    "load_model",
    "result_of",
]
