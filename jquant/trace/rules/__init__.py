"""Groups of operators that are one: small rules, a family a file.

A rule looks at one draft and backwards through its operands. Drafts come in the order of evaluation, so that operands
have their final form already; a rule that applies makes the draft look again from the start of the table.
"""

from __future__ import annotations

from collections.abc import Sequence

from jquant.trace.reader import Reader
from jquant.trace.rules import activations, images, layers, norms, shapes, softmax
from jquant.trace.rules.match import Context, Rule
from jquant.trace.values import Draft, Value

RULES: tuple[Rule, ...] = (
    *shapes.RULES,
    *images.RULES,
    *activations.RULES,
    *norms.RULES,
    *softmax.RULES,
    *layers.RULES,
)


def simplify(reader: Reader, outputs: Sequence[Value]) -> list[Value]:
    """Applies the rules to everything that the outputs need; returns the outputs, some of them replaced."""
    reader.made = None
    found, changed = list(outputs), True
    while changed:  # a second time, since what was found the first time leaves values with fewer readers
        found, changed = _simplify_once(reader, found)
    return found


def _simplify_once(reader: Reader, outputs: Sequence[Value]) -> tuple[list[Value], bool]:
    order = evaluation_order(outputs)
    readers: dict[Value, int] = {}
    for value in (*outputs, *(operand for draft in order for operand in draft.operands)):
        readers[value] = readers.get(value, 0) + 1
    context, changed = Context(reader, readers), False
    for draft in order:
        draft.operands = tuple(context.resolve(v) for v in draft.operands)
        while draft not in context.replaced and any(rule(context, draft) for rule in RULES):
            changed = True
    return [context.resolve(v) for v in outputs], changed


def evaluation_order(outputs: Sequence[Value]) -> list[Draft]:
    """The drafts that outputs need, operands first."""
    found: dict[Draft, None] = {}  # in the order of evaluation
    pending: list[tuple[Value, bool]] = [(v, False) for v in reversed(outputs)]
    while pending:  # a long chain is deeper than the stack of calls
        value, ready = pending.pop()
        if not isinstance(value, Draft) or value in found:
            continue
        if ready:
            found[value] = None
        else:
            pending.append((value, True))
            pending += [(v, False) for v in reversed(value.operands)]
    return list(found)
