"""Marches by name."""

import re
from typing import Any

from jquant.targets.files import load
from jquant.targets.nash import NASH_B, NASH_E, NASH_H, NASH_M, NASH_P
from jquant.text import did_you_mean
from jquant.types import QConfigError, Target

MARCHES = {target.name: target for target in (NASH_B, NASH_E, NASH_H, NASH_M, NASH_P)}
CHIPS = {
    "S100": NASH_E,
    "J6E": NASH_E,
    "S100P": NASH_M,
    "J6M": NASH_M,
    "J6P": NASH_P,
    "J6H": NASH_H,
    "J6B": NASH_B,
}


def find_target(name: Target | str) -> Target:
    """The march of a name, of a chip or in a file; a `Target` is returned as it is.

    Args:
      name: "nash-e" (also "nash_e", "NASH_E"), the chip that it is in, such as "S100" or "J6E", or the path of a file
        that `jq.targets.load` reads, which ends in ".toml" or ".json".

    Raises:
      QConfigError: an unknown name, with near ones. FormatError, FileNotFoundError: as for `load`.

    Example:
      >>> import jquant as jq
      >>> jq.targets.find_target("S100") is jq.targets.NASH_E
      True
    """
    if isinstance(name, Target):
        return name
    if not isinstance(name, str):
        raise QConfigError(f"a march is a jq.Target such as jq.targets.NASH_E, or its name, not {_shown(name)}")
    if name.endswith((".toml", ".json")):
        return load(name)
    known = {_plain(key): target for key, target in (MARCHES | CHIPS).items()}
    if _plain(name) not in known:
        near = did_you_mean(name.lower().replace("_", "-"), MARCHES) or did_you_mean(name.upper(), CHIPS)
        raise QConfigError(f"unknown march {name!r}{near}; known: {', '.join(MARCHES)}; by chip: {', '.join(CHIPS)}")
    return known[_plain(name)]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _shown(given: Any) -> str:
    return "None" if given is None else type(given).__name__
