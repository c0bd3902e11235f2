"""Scales from data, on one device or many."""

from jquant.calibration.collection import collect, finalize_stats
from jquant.calibration.devices import gather_stats
from jquant.calibration.observe import init_stats, merge_stats, reset_scale, update_stats
from jquant.calibration.outliers import find_outliers
from jquant.calibration.tables import TableWarning
from jquant.types import OutlierWarning

__all__ = [
    "OutlierWarning",
    "TableWarning",
    "collect",
    "finalize_stats",
    "find_outliers",
    "gather_stats",
    "init_stats",
    "merge_stats",
    "reset_scale",
    "update_stats",
]
