"""A board against the simulator: dumps compared node by node, probes of its arithmetic, and a march fitted to it."""

from jquant.board.cases import Case
from jquant.board.comparison import BoardComparison, Difference, ValueComparison, compare
from jquant.board.dumps import Declaration, Declared, Dump, Dumps, read_declaration, read_dumps
from jquant.board.fitting import FieldFit, Fit, fit
from jquant.board.noise import Suspect
from jquant.board.probes import CANDIDATES, FAMILIES, LIMITS, Probe, domains, probe
from jquant.board.separating import Separation, separation
from jquant.board.sifting import Exclusion

__all__ = [
    "CANDIDATES",
    "FAMILIES",
    "LIMITS",
    "BoardComparison",
    "Case",
    "Declaration",
    "Declared",
    "Difference",
    "Dump",
    "Dumps",
    "Exclusion",
    "FieldFit",
    "Fit",
    "Probe",
    "Separation",
    "Suspect",
    "ValueComparison",
    "compare",
    "domains",
    "fit",
    "probe",
    "read_declaration",
    "read_dumps",
    "separation",
]
