"""Marches that a model can be prepared for."""

from jquant.targets.files import differences, dump, fields, from_dict, load, to_dict, to_toml, value_of
from jquant.targets.find import CHIPS, MARCHES, find_target
from jquant.targets.nash import NASH_B, NASH_E, NASH_H, NASH_M, NASH_P

__all__ = [
    "CHIPS",
    "MARCHES",
    "NASH_B",
    "NASH_E",
    "NASH_H",
    "NASH_M",
    "NASH_P",
    "differences",
    "dump",
    "fields",
    "find_target",
    "from_dict",
    "load",
    "to_dict",
    "to_toml",
    "value_of",
]
