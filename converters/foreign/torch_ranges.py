"""Ranges that torch.onnx leaves out of its files: quant_min and quant_max of quantize_per_tensor and per_channel.

The exporter that follows torch.export writes QuantizeLinear with the range of the dtype, whatever the range was. The
call that it was made from stands beside the node as text, from which the range is known.
"""

from __future__ import annotations

import re
import warnings

import onnx

from .zero_points import RANGES

KEY = "pkg.torch.onnx.fx_node"
_CALL = re.compile(r"quantize_per_(?:tensor|channel)\S*\]\(args = \(.*, (-?\d+), (-?\d+), torch\.(\w+)\)")


class RangeWarning(UserWarning):
    """Ranges of integers that a file does not have, though the model had them."""


def lost_ranges(model: onnx.ModelProto) -> dict[str, tuple[int, int, str]]:
    """{result of a QuantizeLinear: the range and the dtype that torch had there}, where the file has a wider one."""
    found = {}
    for node in model.graph.node:
        if node.op_type != "QuantizeLinear" or not node.output:
            continue
        text = next((entry.value for entry in node.metadata_props if entry.key == KEY), "")
        call = _CALL.search(text)
        if call is None:
            continue
        low, high, dtype = int(call[1]), int(call[2]), call[3]
        if dtype in RANGES and (low, high) != RANGES[dtype]:
            found[node.output[0]] = (low, high, dtype)
    return found


def warn_of_lost_ranges(model: onnx.ModelProto) -> None:
    """Warns of every range that torch.onnx left out.

    Warns:
      RangeWarning: how many, and the first ones.
    """
    found = lost_ranges(model)
    if not found:
        return
    shown = ", ".join(f"{name!r} {low} to {high}" for name, (low, high, _) in list(found.items())[:5])
    warnings.warn(
        f"torch.onnx left out quant_min and quant_max of {len(found)} values and weights: {shown}"
        f"{' and others' if len(found) > 5 else ''}; the file has the range of the whole dtype there, and so has the "
        "model. model_from_torch reads the ranges from the module or from its ExportedProgram",
        RangeWarning,
        stacklevel=5,
    )
