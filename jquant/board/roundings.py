"""Every rounding of a shift at once."""

import numpy as np

ORDER = {rounding: i for i, rounding in enumerate(("floor", "half_up", "half_even", "half_away", "toward_zero"))}


def rounded_all(v: np.ndarray, shift: np.ndarray | np.int64) -> np.ndarray:
    """v / 2^shift by every rounding, [5, *v.shape] in the order of `ORDER`; as `round_shift`, which has one."""
    floor = v >> shift
    rest, half = v - (floor << shift), (np.int64(1) << shift) >> 1
    more, tie = 2 * rest > np.int64(1) << shift, (rest == half) & (shift > 0)
    up = (
        np.zeros_like(more),
        more | tie,
        more | (tie & (floor % 2 == 1)),
        more | (tie & (v >= 0)),
        (v < 0) & (rest > 0),
    )
    return floor + np.stack(up)
