"""The integer program: lowered from a plan, run, stored, and extended in front."""

from jquant.program.insert import (
    insert_image_convert,
    insert_image_preprocess,
    insert_op,
    insert_op_behind,
    insert_roi_resize,
)
from jquant.program.paths import NodePath, node_paths, path_table
from jquant.types import Accumulator, NodeFormat

__all__ = [
    "Accumulator",
    "NodeFormat",
    "NodePath",
    "insert_image_convert",
    "insert_image_preprocess",
    "insert_op",
    "insert_op_behind",
    "insert_roi_resize",
    "node_paths",
    "path_table",
]
