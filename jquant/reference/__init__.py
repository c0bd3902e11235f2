"""The executable specification of the integer side: nash-arithmetic sections 1 to 6 in numpy int64 and Python integers.

It is slow and obvious, and shares no code with the JAX side that it checks: it imports `jquant.types`, numpy and the
standard library, and finds the rule of an operator by its class name.

    outputs, values = run(program, images)                # real float32 in, real float32 out
    outputs, values = run(program, integers, raw=True)    # integers in, integers out
"""

from jquant.reference.arithmetic import dequantize, quantize, rescale, rescale_unsaturated, round_shift, saturate
from jquant.reference.interpreter import RULES, rule_of, run
from jquant.reference.lowering import add_constants, bias_constant, observer_scale, rescale_constants, sumin_constants

__all__ = [
    "RULES",
    "rule_of",
    "add_constants",
    "bias_constant",
    "dequantize",
    "observer_scale",
    "quantize",
    "rescale",
    "rescale_constants",
    "rescale_unsaturated",
    "round_shift",
    "run",
    "saturate",
    "sumin_constants",
]
