"""Functions of JAX: traced to graphs, quantized as a whole, or in their weights.

The functions here are for code of JAX that is to be traced: each becomes one operator of the graph, where `jax.lax`
would become many.
"""

from jquant.functions.files import load, save
from jquant.functions.kinds import labels
from jquant.functions.quantized import QuantizedFunction
from jquant.functions.weights import quantize_params, weight_qparams
from jquant.ops.functional import (
    affine_grid,
    bgr_to_centred_yuv444,
    channel_shuffle,
    grid_sample,
    interpolate,
    nv12_to_centred_yuv444,
    pixel_shuffle,
    pixel_unshuffle,
    rgb_to_centred_yuv444,
    roi_align,
    warp,
)

__all__ = [
    "QuantizedFunction",
    "affine_grid",
    "bgr_to_centred_yuv444",
    "channel_shuffle",
    "grid_sample",
    "interpolate",
    "labels",
    "load",
    "nv12_to_centred_yuv444",
    "pixel_shuffle",
    "pixel_unshuffle",
    "quantize_params",
    "rgb_to_centred_yuv444",
    "roi_align",
    "save",
    "warp",
    "weight_qparams",
]
