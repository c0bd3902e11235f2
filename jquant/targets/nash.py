"""The Nash marches as data.

`docs/targets.md` says of each value whether the vendor's public documents give it or it is an assumption.
P, H and B post-process in a way that is not public: fake-quant and calibration work for them, `lower` refuses. Their
formats are those of E and M, which fake-quant takes its roundings from.
"""

from dataclasses import replace

from jquant.types import (
    AddendFormat,
    AdditionFormat,
    GridFormat,
    RescaleFormat,
    ResizeFormat,
    TableFormat,
    Target,
)

NASH_E = Target(  # S100, J6E
    name="nash-e",
    default_dtype="int8",
    integer=True,
    activation_dtypes=("int8", "int16"),
    weight_dtypes=("int4", "int8", "int16"),
    quantize_rounding="half_even",
    number_rounding="half_up",
    bias_rounding="half_even",
    slope_dtype="int16",
    rescale=RescaleFormat(
        mantissa_bits=15,
        mantissa_rounding="half_up",
        mantissa_overflow="clamp",
        ratio_bits=15,
        inner_bits=16,
        max_pre_shift=31,
        max_post_shift=31,
        post_shift_int8=22,
        post_shift_int16=14,
        pre_rounding="floor",
        average_pre_rounding="half_up",
        post_rounding="half_up",
        high_precision=False,
    ),
    addend=AddendFormat(multiplier_bits=15, multiplier_rounding="half_up", max_shift=31, rounding="half_up"),
    addition=AdditionFormat(max_shift_int8=23, max_shift_int16=15, multiplier_bits=15, multiplier_rounding="half_up"),
    tables=TableFormat(
        entries=64,
        fraction_bits=8,
        count=6,
        multiple=6,
        max_count=126,
        outer="line",
        entry_rounding="half_even",
        coefficient_bits=15,
        coefficient_rounding="half_even",
        max_shift=30,
        index_rounding="half_up",
        line_rounding="half_up",
        interpolation_rounding="half_up",
        angle_rounding="half_up",
    ),
    resize=ResizeFormat(
        step_bits=16,
        step_rounding="half_up",
        weight_bits=8,
        weight_rounding="floor",
        rounding="half_up",
        nearest_index="exact",
    ),
    grid=GridFormat(
        coordinate_bits=15,
        max_fraction_bits=8,
        nearest_rounding="half_even",
        rounding="half_up",
        map_bits=15,
        map_constant_rounding="half_up",
        max_map_shift=16,
        map_rounding="half_up",
        affine_bits=14,
        affine_rounding="half_even",
        point_bits=15,
        point_fraction_rounding="half_up",
        point_rounding="half_up",
    ),
    max_kernel=31,
    max_conv_inputs=65535,
    max_reduced=65535,
    max_searched=32767,
    max_rank=10,
)
NASH_M = replace(NASH_E, name="nash-m")  # S100P, J6M
NASH_P = replace(NASH_E, name="nash-p", default_dtype="float16", integer=False)  # J6P
NASH_H = replace(NASH_E, name="nash-h", default_dtype="float16", integer=False)  # J6H
NASH_B = replace(NASH_E, name="nash-b", integer=False)  # J6B
