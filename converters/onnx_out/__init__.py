"""How a graph becomes ONNX nodes: one rule an operator, a family a file. `emit.register` adds a rule of one's own."""

from . import elementwise, images, layers, movement, recurrent, reduce
from .layout import channels_first, channels_last_values, framework_layout
from .writer import TYPES, Call, Operand, Unsupported, Writer, emit, format_shape, refuse

_FAMILIES = (elementwise, images, layers, movement, recurrent, reduce)

__all__ = [
    "TYPES",
    "Call",
    "Operand",
    "Unsupported",
    "Writer",
    "channels_first",
    "channels_last_values",
    "emit",
    "format_shape",
    "framework_layout",
    "refuse",
]
