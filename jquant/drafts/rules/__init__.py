"""Groups of operators that are one: small rules, a family a file.

A rule looks at one draft and backwards through its operands. Drafts come in the order of evaluation, so that operands
have their final form already; a rule that applies makes the draft look again from the start of the table.
"""

from jquant.drafts.rules import activations, images, layers, norms, shapes, softmax
from jquant.drafts.rules.match import Rule

RULES: tuple[Rule, ...] = (
    *shapes.RULES,
    *images.RULES,
    *activations.RULES,
    *norms.RULES,
    *softmax.RULES,
    *layers.RULES,
)
