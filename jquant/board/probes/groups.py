"""Fields that are read together, by what reads them."""

# A ratio that is a power of two has a mantissa without rounding, whatever its bits.
EXACT_ROW = ("rescale.mantissa_bits", "rescale.max_post_shift")
ROW = (*EXACT_ROW, "rescale.mantissa_rounding", "rescale.mantissa_overflow")
# From int8 or int16: no pre-shift, and nothing for the inner saturation to cut.
EXACT_NARROW = (*EXACT_ROW, "rescale.post_rounding")
NARROW = (*ROW, "rescale.post_rounding")


def small(output: str, *, average: bool = False) -> tuple[str, ...]:
    """What the rescale of an accumulator within 16 bits reads, beyond a row and its last rounding."""
    rounding = "rescale.average_pre_rounding" if average else "rescale.pre_rounding"
    return "rescale.max_pre_shift", f"rescale.post_shift_{output}", rounding, "rescale.high_precision"


def wide(output: str, *, average: bool = False) -> tuple[str, ...]:
    """What the rescale of any accumulator reads, beyond a row and its last rounding."""
    return (*small(output, average=average), "rescale.inner_bits")


LINES = ("tables.coefficient_bits", "tables.coefficient_rounding", "tables.max_shift")
# Of a table of an int16 input, between the outer lines.
SEGMENTS = (
    *LINES,
    "tables.entries",
    "tables.fraction_bits",
    "tables.entry_rounding",
    "tables.index_rounding",
    "tables.interpolation_rounding",
)
FRACTION = ("grid.coordinate_bits", "grid.max_fraction_bits")  # the fraction bits of absolute coordinates
MAP = ("grid.map_bits", "grid.map_constant_rounding", "grid.max_map_shift", "grid.map_rounding")
