"""Finding out where accuracy goes: comparison layer by layer, and reports of it."""

from jquant.analysis.compare import Comparison, LayerError, compare
from jquant.analysis.report import Report, write_report

__all__ = ["Comparison", "LayerError", "Report", "compare", "write_report"]
