"""The opset that a file is written in: which ones there are, and operators that came later."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from jquant.types import ConversionError

# Scales by channel came with 13; 28 is the last one that is read, too.
OPSETS = range(13, 29)
# The first opset whose QuantizeLinear has int16 and int4.
NARROW_AND_WIDE_OPSET = 21


def ir_version(opset: int) -> int:
    """The oldest IR version that may have the opset."""
    found: int = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    return found


def check_opset(wanted: int | None, narrow_or_wide: bool) -> None:
    """Refuses an opset that is not written, or that has no form of int16 and int4.

    Raises:
      ConversionError: as said.
    """
    if wanted is None:
        return
    if wanted not in OPSETS:
        raise ConversionError(f"opset {wanted}; {OPSETS[0]} to {OPSETS[-1]} can be written")
    if narrow_or_wide and wanted < NARROW_AND_WIDE_OPSET:
        raise ConversionError(
            f"opset {wanted} has no int16 and int4 in QuantizeLinear, and the model has; opset {NARROW_AND_WIDE_OPSET} "
            "is the first that has"
        )


def check_operators(nodes: Sequence[onnx.NodeProto], opset: int) -> None:
    """Refuses operators that are not in the opset yet.

    Raises:
      ConversionError: it names them all.
    """
    lacking = {}
    for node in nodes:
        if node.domain in ("", "ai.onnx") and not onnx.defs.has(node.op_type, max_inclusive_version=opset):
            first = min(
                s.since_version for s in onnx.defs.get_all_schemas_with_history()
                if s.name == node.op_type and s.domain == ""
            )  # fmt: skip
            lacking[node.op_type] = (f"{node.op_type} of {node.name!r} came with opset {first}", first)
    if lacking:
        needed = max(first for _, first in lacking.values())
        names = "; ".join(text for text, _ in lacking.values())
        raise ConversionError(f"opset {opset} is too old: {names}. Write opset {needed} or later")
