"""The march whose values stand where a field does not matter."""

from jquant.targets import NASH_E

# Any valid march serves where a field does not matter. These values go with every value of the others.
NEUTRAL = NASH_E.with_fields(
    {
        "name": "candidate",
        "tables.entries": 4,
        "tables.fraction_bits": 0,
        "resize.weight_bits": 0,
        "grid.max_map_shift": 0,
    }
)
