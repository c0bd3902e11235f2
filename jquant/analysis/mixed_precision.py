"""Which values and weights get how many bits, under a budget: a knapsack with one choice for each of them.

The error of a choice is the one measured with it alone; errors of different quantizers are taken to add up, which holds
for mean squared errors of independent roundings and is a guess for anything else. The search is exact for that sum.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple

from jquant.analysis.cost import passes
from jquant.analysis.ranking import Ranking, SensitivityRow
from jquant.text import format_table
from jquant.types import JQuantError, Model, Plan, Policy, QuantSpec

Cost = Literal["bytes", "macs"]

LIMIT = 20_000  # partial choices kept at once


@dataclass(frozen=True)
class MixedPrecision:
    """The cheapest error within a budget.

    `choices`  {value or weight: dtype}
    `error`    the sum of the errors of the choices; `cost` the sum of their costs, in the unit of the budget
    `lowest`, `highest`  the cost of the cheapest and of the dearest choice of all
    `exact`    False where partial choices were thinned out: the error may be above the least one
    """

    choices: Mapping[str, str]
    error: float
    cost: float
    lowest: float
    highest: float
    exact: bool
    plan: Plan
    ranking: Ranking

    def rules(self) -> dict[str, Policy | None]:
        """Rules for a `QConfig`, to be put behind those that the plan was made with.

        Each has the spec of the plan in another dtype; a format that stays as it was has no rule.
        """
        found: dict[str, Policy | None] = {}
        for name, dtype in self.choices.items():
            own = self.plan.spec(name)
            row = next(r for r in self.ranking.rows if r.name == name)
            if own.dtype == dtype or row.rule is None:
                continue
            spec = QuantSpec(
                dtype=dtype,
                axis=own.axis,
                scale_form=own.scale_form,
                quantizer=own.quantizer,
                observer=own.observer,
            )
            before = found.get(row.rule) or Policy()
            port = "output" if row.kind == "activation" else "weight"
            fields = {"output": before.output, "weight": before.weight, "input": before.input} | {port: spec}
            found[row.rule] = Policy(**fields)  # type: ignore[arg-type]
        return found

    def table(self) -> str:
        rows = [(name, dtype, self.plan.spec(name).dtype) for name, dtype in self.choices.items()]
        text = format_table(("name", "dtype", "before"), rows)
        return f"{text}\ncost {self.cost:g} of {self.lowest:g} to {self.highest:g}, error {self.error:.4g}"


class _Partial(NamedTuple):
    """A choice for the first few names: what it costs, its error, and the dtypes as a linked list."""

    cost: float
    error: float
    chosen: tuple


def search_mixed_precision(
    model: Model, ranking: Ranking, *, budget: float, cost: Cost = "bytes", limit: int = LIMIT
) -> MixedPrecision:
    """The dtypes with the least error whose cost fits the budget.

    Args:
      model: what `prepare` or `calibrate` returned.
      ranking: of `sensitivity(..., activations=("int8", "int16"), weights=("int4", "int8"))`: every dtype to choose
        from, measured with mode "one_on". Names with one dtype stay as they are and count.
      budget: in the unit of the cost.
      cost: "bytes": of values and weights, for one sample. "macs": int8 multiply-accumulates as a share of those of the
        plan, an int16 operand counting twice: 1.0 with everything at 8 bits or fewer.
      limit: partial choices kept at once; beyond it they are thinned, and `exact` says so.

    Returns:
      A `MixedPrecision`; `rules()` gives what to add to the qconfig.

    Raises:
      JQuantError: a budget below the cheapest choice, a ranking of mode "one_off", or int16 weights under "macs", whose
        cost depends on the operand's dtype as well.

    Example:
      ranking = jq.analysis.sensitivity(model, batches, metric="mse", activations=("int8", "int16"))
      found = jq.analysis.search_mixed_precision(model, ranking, budget=1.1, cost="macs")
      qconfig = jq.QConfig({**rules, **found.rules()})
    """
    if ranking.mode != "one_on":
        raise JQuantError("the search needs a ranking of mode 'one_on': errors of single quantizers")
    if cost not in ("bytes", "macs"):
        raise JQuantError(f"unknown cost {cost!r}; known: bytes, macs")
    plan = model.plan
    groups = _groups(plan, ranking)
    priced = {name: [(row.dtype, _price(row, cost), row.error) for row in rows] for name, rows in groups.items()}
    lowest, highest = (sum(pick(p for _, p, _ in rows) for rows in priced.values()) for pick in (min, max))
    if not budget >= lowest:
        raise JQuantError(
            f"the budget of {budget:g} {cost} is below the cheapest choice, {lowest:g}; the dearest is {highest:g}"
        )
    best, exact = _search(list(priced.values()), budget, limit)
    choices = dict(zip(priced, _unlink(best.chosen), strict=True))
    return MixedPrecision(choices, best.error, best.cost, lowest, highest, exact, plan, ranking)


def _groups(plan: Plan, ranking: Ranking) -> dict[str, list[SensitivityRow]]:
    """The formats of each name. A conversion that no rule names keeps its own."""
    rows = sorted(ranking.rows, key=lambda row: row.name)
    found = {}
    for name, of_name in groupby(rows, key=lambda row: row.name):
        formats = list(of_name)
        fixed = [row for row in formats if row.dtype == plan.spec(name).dtype]
        movable = formats[0].rule is not None and plan.spec(name).fixed_scale is None
        found[name] = formats if movable or not fixed else fixed
        if any(math.isnan(row.error) for row in formats):
            raise JQuantError(f"the sensitivity of {name!r} is NaN: look for it with jq.training.find_nan first")
    return found


def _price(row: SensitivityRow, cost: Cost) -> float:
    if cost == "bytes":
        return float(row.bytes)
    if row.kind == "weight":
        if passes(row.dtype) > 1:
            raise JQuantError(
                f"{row.name!r} as {row.dtype}: the multiply-accumulates of a wide weight depend on the operand's dtype "
                "too; search with cost='bytes', or without such weights"
            )
        return 0.0  # counted with the operand
    return row.macs * passes(row.dtype)


def _search(groups: Sequence[Sequence[tuple[str, float, float]]], budget: float, limit: int) -> tuple[_Partial, bool]:
    """Dynamic programming over names: of partial choices only those that no other beats in cost and error."""
    cheapest_rest = [0.0]
    for choices in reversed(groups):
        cheapest_rest.append(cheapest_rest[-1] + min(price for _, price, _ in choices))
    cheapest_rest.reverse()
    tolerance = 1e-9 * max(1.0, abs(budget))  # a sum of floats that should be the budget
    states, exact = [_Partial(0.0, 0.0, ())], True
    for i, choices in enumerate(groups):
        room = budget + tolerance - cheapest_rest[i + 1]
        grown = [
            _Partial(s.cost + price, s.error + error, (dtype, s.chosen))
            for s in states
            for dtype, price, error in choices
            if s.cost + price <= room
        ]
        states = _undominated(grown)
        if len(states) > limit:
            states, exact = _thin(states, limit), False
    return min(states, key=lambda s: (s.error, s.cost)), exact


def _undominated(states: list[_Partial]) -> list[_Partial]:
    kept: list[_Partial] = []
    for state in sorted(states, key=lambda s: (s.cost, s.error)):
        if not kept or state.error < kept[-1].error:
            kept.append(state)
    return kept


def _thin(states: list[_Partial], limit: int) -> list[_Partial]:
    """The cheapest, and of each of `limit` ranges of cost the one with the least error: the last of its range."""
    low, high = states[0].cost, states[-1].cost
    width = (high - low) / limit or 1.0
    ranges = {int((s.cost - low) / width): s for s in states}
    return [states[0], *(s for s in ranges.values() if s is not states[0])]


def _unlink(chosen: tuple) -> list[str]:
    found = []
    while chosen:
        dtype, chosen = chosen
        found.append(dtype)
    return found[::-1]
