"""Operators in front of a finished program: colour conversion, the pyramid input (NV12) and the resizer input.

They need no statistics: every scale is known. Each call returns a new program, and compares the inserted integers with
the float pipeline before it does (`insert.parity`). From the network outwards, for one trained on RGB and fed by
NV12:

    program = insert_image_preprocess(program, "x", mode="yuvbt601full2rgb", divisor=255, mean=mean, std=std)
    program = insert_image_convert(program, "x", "nv12")
    y = jq.run(program, luma, chroma)              # uint8 [N, H, W, 1] and [N, H/2, W/2, 2]

and for one trained on centred YUV / 128, whose input has the scale 1/128 (`mode=None, divisor=1, mean=128, std=128`),
nothing but a permutation is inserted before the pyramid input.

Names. Behind `insert_image_preprocess` the input keeps its name and is centred pixels, int8 [N, H, W, C] at scale 1: as
real numbers they are pixel - 128. The old input is the value of the last inserted node, `x.preprocess` or
`x.preprocess.to_first`. The pyramid input replaces `x` by `x_y` and `x_uv`, the resizer by `x_y`, `x_uv` and `x_roi`;
`x.convert` or `x.resize` is what `x` was. A name that is taken gets a number.
"""

from jquant.program.insert.behind import insert_op_behind
from jquant.program.insert.camera import insert_image_convert, insert_roi_resize
from jquant.program.insert.colour import Mode, insert_image_preprocess
from jquant.program.insert.operator import insert_op
from jquant.program.insert.parity import YUV_LOSS

__all__ = [
    "YUV_LOSS",
    "Mode",
    "insert_image_convert",
    "insert_image_preprocess",
    "insert_op",
    "insert_op_behind",
    "insert_roi_resize",
]
