"""Observers: how a scale is estimated from data. An observer is a value made of pure functions over a small state.

Data arrives as [channels, samples] float32, in real; `finalize` returns scales [channels], in real per LSB, at least
2^-23. Nothing here hides a NaN: it reaches the scale, and the caller refuses it. Subnormal numbers count as zero, since
a backend may flush them or not. All but `moving_average` give the same bits in any order and split of the samples.
"""

from jquant.observers.base import RangeState
from jquant.observers.divergence import kl
from jquant.observers.histograms import HistogramState
from jquant.observers.maxima import MaximaState, mean_of_maxima
from jquant.observers.moments import MomentState, clip_std
from jquant.observers.normalized import SampleHistogramState, nmse
from jquant.observers.ranges import MovingAverageState, min_max, moving_average
from jquant.observers.search import histogram, mix, mse, norm, percentile
from jquant.types import Observer

__all__ = [
    "HistogramState",
    "MaximaState",
    "MomentState",
    "MovingAverageState",
    "Observer",
    "RangeState",
    "SampleHistogramState",
    "clip_std",
    "histogram",
    "kl",
    "mean_of_maxima",
    "min_max",
    "mix",
    "moving_average",
    "mse",
    "nmse",
    "norm",
    "percentile",
]
