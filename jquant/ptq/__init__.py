"""Post-training quantization beyond calibration: functions from params or qparams to better ones.

    plan, params = jq.prepare(graph, params, qconfig, target=...)
    params = jq.ptq.equalize(plan, params)                           # the same function, even channel ranges
    qparams = jq.ptq.search_weight_scales(plan, params, jq.calibrate(plan, params, batches))
    params = jq.ptq.adaround(plan, params, qparams, batches)         # weights on the grid, rounded as learned
    params = jq.ptq.correct_bias(plan, params, qparams, batches, reference=...)

Each step is optional. `equalize` comes before calibration, the others keep the scales that they are given.
"""

from jquant.ptq.bias import correct_bias
from jquant.ptq.equalization import Pair, Pairs, equalize, find_pairs
from jquant.ptq.rounding import adaround
from jquant.ptq.scales import search_weight_scales

__all__ = ["Pair", "Pairs", "adaround", "correct_bias", "equalize", "find_pairs", "search_weight_scales"]
