"""Applies the rules to what outputs need."""

from __future__ import annotations

from collections.abc import Sequence

from jquant.drafts.maker import Maker
from jquant.drafts.rules import RULES
from jquant.drafts.rules.match import Context
from jquant.drafts.values import Draft, Value


def simplify(maker: Maker, outputs: Sequence[Value]) -> list[Value]:
    """Applies the rules to everything that the outputs need; returns the outputs, some of them replaced."""
    maker.made = None
    found, changed = list(outputs), True
    while changed:  # a second time, since what was found the first time leaves values with fewer readers
        found, changed = _simplify_once(maker, found)
    return found


def _simplify_once(maker: Maker, outputs: Sequence[Value]) -> tuple[list[Value], bool]:
    order = evaluation_order(outputs)
    readers: dict[Value, int] = {}
    for value in (*outputs, *(operand for draft in order for operand in draft.operands)):
        readers[value] = readers.get(value, 0) + 1
    context, changed = Context(maker, readers), False
    for draft in order:
        maker.scope = draft.scope
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
