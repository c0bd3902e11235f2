"""The integer program: lowered from a plan, run, stored, and extended in front."""

from jquant.program.insert import (
    insert_image_convert,
    insert_image_preprocess,
    insert_op,
    insert_op_behind,
    insert_roi_resize,
)
from jquant.types import Accumulator, NodeFormat

__all__ = [
    "Accumulator",
    "NodeFormat",
    "insert_image_convert",
    "insert_image_preprocess",
    "insert_op",
    "insert_op_behind",
    "insert_roi_resize",
]
