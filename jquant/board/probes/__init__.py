"""Small nets whose integers differ from one value of a field to another: a family a file."""

from collections.abc import Sequence

from jquant.board.probes.build import Probe
from jquant.board.probes.grid import grid_probes
from jquant.board.probes.layers import layer_probes
from jquant.board.probes.rescale import rescale_probes
from jquant.board.probes.resize import resize_probes
from jquant.board.probes.tables import table_probes
from jquant.targets import fields
from jquant.text import did_you_mean
from jquant.types import QConfigError

FAMILIES = {
    "rescale": rescale_probes,
    "layers": layer_probes,
    "tables": table_probes,
    "resize": resize_probes,
    "grid": grid_probes,
}
# What a board refuses, or a compiler chooses, rather than how integers are made: no dump shows it.
LIMITS = (
    "tables.multiple",
    "tables.max_count",
    "max_kernel",
    "max_conv_inputs",
    "max_reduced",
    "max_searched",
    "max_rank",
)
# Of the tables, fewer values than a march may have: more would be too many together.
CANDIDATES = {"tables.entries": (4, 8, 16, 32, 64, 128, 256), "tables.count": tuple(range(6, 127, 6))}


def domains() -> dict[str, Sequence[object]]:
    """The values among which a fit decides, by field."""
    return {field: CANDIDATES.get(field, tuple(values)) for field, values in fields().items() if field not in LIMITS}


def probe(families: Sequence[str] = tuple(FAMILIES)) -> list[Probe]:
    """Small nets with inputs that separate the values of the fields of a march.

    Args:
      families: of "rescale", "layers", "tables", "resize" and "grid". A rescale is part of most operators, so the
        others are of little use without it.

    Raises:
      QConfigError: an unknown family.

    Example:
      >>> import jquant as jq
      >>> [probe.name for probe in jq.board.probe(["resize"])]
      ['resize_nearest', 'resize_doubled', 'resize_bilinear']
    """
    for name in families:
        if name not in FAMILIES:
            raise QConfigError(
                f"no family of probes {name!r}{did_you_mean(name, FAMILIES)}; there are {', '.join(FAMILIES)}"
            )
    return [made for name in FAMILIES if name in families for made in FAMILIES[name]()]


__all__ = ["CANDIDATES", "FAMILIES", "LIMITS", "Probe", "domains", "probe"]
