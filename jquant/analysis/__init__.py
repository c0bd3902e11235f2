"""Finding out where accuracy goes, and what to do about it: comparison, sensitivity, checks, advice, and reports."""

from jquant.analysis.advice import advise, layer_advice
from jquant.analysis.cases import BadCases, find_bad_cases, load_bad_cases
from jquant.analysis.checks import auxiliary_branches, check_model, check_plan, graph_difference
from jquant.analysis.comparison import Comparison, LayerError, compare
from jquant.analysis.convergence import judge_losses
from jquant.analysis.deployment import OperatorSupport, operator_support, support_table
from jquant.analysis.findings import Finding, findings_table
from jquant.analysis.many_batches import compare_batches
from jquant.analysis.mixed_precision import MixedPrecision, search_mixed_precision
from jquant.analysis.mixing import Mixed, mix_precision
from jquant.analysis.nan import nan_checklist
from jquant.analysis.plots import plot_graph, plot_observers, plot_table
from jquant.analysis.ranking import Ranking, SensitivityRow, sensitivity
from jquant.analysis.report import Report, write_report
from jquant.analysis.settings import training_advice
from jquant.analysis.steps import NextStep, next_steps
from jquant.analysis.tables import TableCost, table_costs
from jquant.analysis.training import overfitting_signs

__all__ = [
    "BadCases",
    "Comparison",
    "Finding",
    "LayerError",
    "Mixed",
    "MixedPrecision",
    "NextStep",
    "OperatorSupport",
    "Ranking",
    "Report",
    "SensitivityRow",
    "TableCost",
    "advise",
    "auxiliary_branches",
    "check_model",
    "check_plan",
    "compare",
    "compare_batches",
    "find_bad_cases",
    "findings_table",
    "graph_difference",
    "judge_losses",
    "layer_advice",
    "load_bad_cases",
    "mix_precision",
    "nan_checklist",
    "next_steps",
    "operator_support",
    "overfitting_signs",
    "plot_graph",
    "plot_observers",
    "plot_table",
    "search_mixed_precision",
    "sensitivity",
    "support_table",
    "table_costs",
    "training_advice",
    "write_report",
]
