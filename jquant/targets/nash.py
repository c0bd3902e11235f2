"""The Nash marches as data. Numbers are from the vendor's public documents unless the field's comment says chosen.

P, H and B post-process in a way that is not public: fake-quant and calibration work for them, `lower` refuses.
"""

from jquant.types import Target

NASH_E = Target(name="nash-e", default_dtype="int8", integer=True)  # S100, J6E
NASH_M = Target(name="nash-m", default_dtype="int8", integer=True)  # S100P, J6M
NASH_P = Target(name="nash-p", default_dtype="float16", integer=False)  # J6P
NASH_H = Target(name="nash-h", default_dtype="float16", integer=False)  # J6H
NASH_B = Target(name="nash-b", default_dtype="int8", integer=False)  # J6B
