"""Batch norm that `prepare` kept for training: what is trained of it, how it is frozen, and how it is folded.

A kept batch norm lies between the sum of products of its layer and the fused addend or activation, in one node. So a
plan has the same nodes, names and formats whether batch norm is folded or kept, and folding changes parameters alone.
Everything but training sees the folded plan: validation, comparison and integers are those of what ships.
"""

from jquant.plan.batch_norm.fold import (
    check_folded,
    fold_batch_norm,
    fold_kept,
    kept_batch_norm,
    kept_nodes,
    norm_params,
    raise_collapsed,
    raise_collapsed_scales,
    split_batch_stats,
    untrained,
    weights_to_quantize,
)
from jquant.plan.batch_norm.modes import (
    BatchNormHandling,
    check_kept,
    kept_batch_norms,
    set_batch_statistics,
    with_exact_ones,
    with_statistics,
)
from jquant.plan.batch_norm.statistics import statistics_rule

__all__ = [
    "BatchNormHandling",
    "check_folded",
    "check_kept",
    "fold_batch_norm",
    "fold_kept",
    "kept_batch_norm",
    "kept_batch_norms",
    "kept_nodes",
    "norm_params",
    "raise_collapsed",
    "raise_collapsed_scales",
    "set_batch_statistics",
    "split_batch_stats",
    "statistics_rule",
    "untrained",
    "weights_to_quantize",
    "with_exact_ones",
    "with_statistics",
]
