"""Post-training quantization beyond calibration: functions from params or qparams to better ones.

    model = jq.ptq.equalize(jq.prepare(graph, params, qconfig, target=...))  # the same function, even channel ranges
    model = before = jq.ptq.search_weight_scales(jq.calibrate(model, batches))
    model = jq.ptq.adaround(model, batches)            # weights on the grid, rounded as learned: layer by layer
    model = jq.ptq.reconstruct_blocks(before, batches)               # or block by block, values' scales as well
    model = jq.ptq.correct_bias(model, batches, reference=before)
    model = jq.ptq.finetune(model, batches, reference=before)  # weights, biases and scales of all layers, for few bits
    model = jq.ptq.shift_relus(model)                  # half the step behind a relu, on the same symmetric grid

Each step is optional. `equalize` comes before calibration, the others keep the scales that they are given. `recipe`
does all of it in one call, and keeps of each step only what helps:

    tuned = jq.ptq.recipe("default", model, batches)
    program = jq.lower(tuned.model)
"""

from jquant.ptq.bias import correct_bias
from jquant.ptq.blocks import Block, Blocks, find_blocks
from jquant.ptq.equalization import Pair, Pairs, equalize, find_pairs
from jquant.ptq.finetuning import finetune
from jquant.ptq.recipes import RECIPES, Trial, Tuned, recipe
from jquant.ptq.reconstruction import reconstruct_blocks
from jquant.ptq.rounding import adaround
from jquant.ptq.scales import search_weight_scales
from jquant.ptq.shifting import Shift, Shifts, find_shifts, shift_relus
from jquant.ptq.values import search_value_scales

__all__ = [
    "RECIPES",
    "Block",
    "Blocks",
    "Pair",
    "Pairs",
    "Shift",
    "Shifts",
    "Trial",
    "Tuned",
    "adaround",
    "correct_bias",
    "equalize",
    "find_blocks",
    "find_pairs",
    "find_shifts",
    "finetune",
    "recipe",
    "reconstruct_blocks",
    "search_value_scales",
    "search_weight_scales",
    "shift_relus",
]
