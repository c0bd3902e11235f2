"""Finding out where accuracy goes, and what to do about it: comparison, sensitivity, checks, advice, and reports."""

from jquant.analysis.advice import advise, layer_advice
from jquant.analysis.cases import BadCases, find_bad_cases, load_bad_cases
from jquant.analysis.checks import auxiliary_branches, check_model, check_plan, graph_difference
from jquant.analysis.compare import Comparison, LayerError, compare
from jquant.analysis.findings import Finding, findings_table
from jquant.analysis.mixed_precision import MixedPrecision, search_mixed_precision
from jquant.analysis.report import Report, write_report
from jquant.analysis.sensitivity import Ranking, SensitivityRow, sensitivity
from jquant.analysis.tables import TableCost, table_costs
from jquant.analysis.training import find_nan, nan_checklist, overfitting_signs, training_advice

__all__ = [
    "BadCases",
    "Comparison",
    "Finding",
    "LayerError",
    "MixedPrecision",
    "Ranking",
    "Report",
    "SensitivityRow",
    "TableCost",
    "advise",
    "auxiliary_branches",
    "check_model",
    "check_plan",
    "compare",
    "find_bad_cases",
    "find_nan",
    "findings_table",
    "graph_difference",
    "layer_advice",
    "load_bad_cases",
    "nan_checklist",
    "overfitting_signs",
    "search_mixed_precision",
    "sensitivity",
    "table_costs",
    "training_advice",
    "write_report",
]
