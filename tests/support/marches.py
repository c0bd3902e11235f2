"""Made-up marches: no chip has these widths and roundings. What is a literal somewhere shows as a difference."""

import random

import jquant as jq

NARROW = jq.targets.NASH_E.with_fields(
    {
        "name": "made-up-narrow",
        "quantize_rounding": "half_away",
        "number_rounding": "toward_zero",
        "bias_rounding": "floor",
        "slope_dtype": "int8",
        "rescale.mantissa_bits": 11,
        "rescale.mantissa_rounding": "half_even",
        "rescale.mantissa_overflow": "renormalize",
        "rescale.ratio_bits": 12,
        "rescale.inner_bits": 18,
        "rescale.max_pre_shift": 20,
        "rescale.max_post_shift": 24,
        "rescale.post_shift_int8": 17,
        "rescale.post_shift_int16": 10,
        "rescale.pre_rounding": "half_even",
        "rescale.average_pre_rounding": "toward_zero",
        "rescale.post_rounding": "half_away",
        "addend.multiplier_bits": 13,
        "addend.multiplier_rounding": "floor",
        "addend.max_shift": 20,
        "addend.rounding": "toward_zero",
        "addition.max_shift_int8": 17,
        "addition.max_shift_int16": 11,
        "addition.multiplier_bits": 12,
        "addition.multiplier_rounding": "half_even",
        "tables.entries": 32,
        "tables.fraction_bits": 6,
        "tables.count": 4,
        "tables.multiple": 2,
        "tables.max_count": 64,
        "tables.outer": "constant",
        "tables.entry_rounding": "floor",
        "tables.coefficient_bits": 12,
        "tables.coefficient_rounding": "half_up",
        "tables.max_shift": 25,
        "tables.index_rounding": "floor",
        "tables.line_rounding": "half_even",
        "tables.interpolation_rounding": "half_away",
        "tables.angle_rounding": "half_even",
        "resize.step_bits": 12,
        "resize.step_rounding": "half_even",
        "resize.weight_bits": 5,
        "resize.weight_rounding": "half_up",
        "resize.rounding": "half_away",
        "resize.nearest_index": "fixed",
        "grid.coordinate_bits": 13,
        "grid.max_fraction_bits": 6,
        "grid.nearest_rounding": "half_up",
        "grid.rounding": "half_even",
        "grid.map_bits": 12,
        "grid.map_constant_rounding": "half_even",
        "grid.max_map_shift": 13,
        "grid.map_rounding": "half_away",
        "grid.affine_bits": 11,
        "grid.affine_rounding": "half_up",
        "grid.point_bits": 10,
        "grid.point_fraction_rounding": "floor",
        "grid.point_rounding": "toward_zero",
    }
)

# The widest that is implemented: products that leave int32, and outer lines with a rounding of their own.
WIDE = jq.targets.NASH_E.with_fields(
    {
        "name": "made-up-wide",
        "quantize_rounding": "floor",
        "number_rounding": "half_even",
        "bias_rounding": "half_away",
        "rescale.mantissa_rounding": "floor",
        "rescale.inner_bits": 32,
        "rescale.max_pre_shift": 9,
        "rescale.pre_rounding": "toward_zero",
        "rescale.average_pre_rounding": "half_away",
        "rescale.post_rounding": "floor",
        "addend.rounding": "half_even",
        "tables.entries": 128,
        "tables.multiple": 3,
        "tables.entry_rounding": "half_away",
        "tables.coefficient_rounding": "floor",
        "tables.index_rounding": "half_away",
        "tables.line_rounding": "toward_zero",
        "tables.interpolation_rounding": "floor",
        "tables.angle_rounding": "half_away",
        "resize.step_bits": 15,
        "resize.step_rounding": "toward_zero",
        "resize.weight_bits": 11,
        "resize.weight_rounding": "half_even",
        "resize.rounding": "floor",
        "grid.nearest_rounding": "floor",
        "grid.rounding": "toward_zero",
        "grid.map_rounding": "toward_zero",
        "grid.affine_rounding": "toward_zero",
    }
)
PRECISE = NARROW.with_fields({"name": "made-up-precise", "rescale.high_precision": True})
MADE_UP = {march.name: march for march in (NARROW, WIDE, PRECISE)}


def drawn(seed: int) -> jq.Target:
    """A march with every field that computes at random; limits of sizes stay."""
    rng = random.Random(seed)
    while True:
        values = {p: rng.choice(v) for p, v in jq.targets.fields().items() if not p.startswith("max_")}
        # Options in the cases name 6, 12, 24 and 126 tables, and regions have weights of at most 11 bits.
        values |= {"tables.multiple": rng.choice([1, 2, 3, 6]), "tables.count": 6, "tables.max_count": 126}
        values["resize.weight_bits"] = rng.randrange(12)
        try:
            return jq.targets.NASH_E.with_fields({"name": f"made-up-{seed}", **values})
        except jq.QConfigError:  # two values that do not go together
            continue
