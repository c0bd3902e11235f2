"""Mixed int8 and int16 in one call: each format measured with the scales that it would have, then the best choice."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp

from jquant.analysis.cost import elements, macs, passes
from jquant.analysis.metrics import FLOOR, mse
from jquant.analysis.mixed_precision import Cost, MixedPrecision, search_mixed_precision
from jquant.analysis.ranking import Ranking, SensitivityRow, multiplied_by, sensitivity
from jquant.calibration.collection import calibrate
from jquant.calibration.tables import TableWarning
from jquant.config.qconfig import QConfig
from jquant.plan.prepare import prepare
from jquant.ptq.recipes import judge_of, split_batches
from jquant.text import format_table
from jquant.types import (
    Array,
    Graph,
    InputError,
    JQuantError,
    Model,
    OutlierWarning,
    Params,
    Plan,
    Policy,
    Target,
    bit_width,
)

WIDE = "int16"


@dataclass(frozen=True)
class Mixed:
    """A model with int16 where it pays; `print` shows what that wins and the values that have it.

    `model`     calibrated, for `jq.apply`, `jq.lower` and the steps of `jq.ptq`
    `search`    the formats that were chosen, and the ranking that they were chosen by
    `share`     what the int16 values of the model take of the cost: of the bytes of all values and weights for one
                sample, or of the multiply-accumulates
    `narrow`, `mixed`, `wide`  SQNR of the outputs on data held back, dB: as given, as chosen, all values at int16
    """

    model: Model = field(repr=False)
    search: MixedPrecision = field(repr=False)
    cost: Cost
    share: float
    narrow: float
    mixed: float
    wide: float
    held_back: int

    def rules(self) -> dict[str, Policy | None]:
        """Rules for a `QConfig`, to be put behind those that were given."""
        return self.search.rules()

    @property
    def names(self) -> tuple[str, ...]:
        """The values that were given int16."""
        before = self.search.plan
        return tuple(n for n, dtype in self.search.choices.items() if dtype == WIDE != before.spec(n).dtype)

    def __str__(self) -> str:
        rows = [("as given", self.narrow), (f"{WIDE} for {len(self.names)} values", self.mixed)]
        rows += [(f"{WIDE} for all values", self.wide)]
        table = format_table(("values", "SQNR of outputs, dB"), [(name, f"{sqnr:.2f}") for name, sqnr in rows])
        return (
            f"{table}\n{self.share:.1%} of the {self.cost} at {WIDE}: {', '.join(self.names) or '-'}\n"
            f"{self.held_back} samples held back to judge"
        )


def mix_precision(
    graph: Graph,
    params: Params,
    qconfig: QConfig,
    batches: Iterable[Any],
    *,
    target: Target | str,
    share: float = 0.1,
    cost: Cost = "bytes",
    samples: int = 16,
    held_back: float = 0.25,
    lanes: int = 8,
) -> Mixed:
    """Gives int16 to the values where it lowers the error of the outputs most, for at most a share of the cost.

    The model is prepared and calibrated as given, and once more with int16 for all values, so that each format has the
    scale that suits it. Every value is measured in both alone (`sensitivity`); errors are taken to add up, and the
    choice is the best one under that sum (`search_mixed_precision`). What is chosen is prepared, calibrated and
    measured on data held back. Weights keep their formats.

    Args:
      graph, params, qconfig, target: as for `jq.prepare`.
      batches: calibration data, as for `jq.calibrate`, all of it in memory.
      share: of the cost, more than 0 and at most 1, that values at int16 may take.
      cost: "bytes" of all values and weights for one sample, or "macs": multiply-accumulates with an int16 operand.
      samples: that formats are measured on.
      held_back: the share of the data that judges, as for `jq.ptq.recipe`.
      lanes: as for `sensitivity`.

    Returns:
      `Mixed`: the calibrated model, what was chosen, and what it wins.

    Raises:
      JQuantError: a share out of range, an unknown cost, or no value that may have int16. CalibrationError: no
      batches, or too little to hold anything back.

    Example:
      found = jq.analysis.mix_precision(graph, params, qconfig, batches, target=jq.targets.NASH_E, share=0.1)
      print(found)
      program = jq.lower(found.model)
    """
    if not 0 < share <= 1:
        raise JQuantError(f"share must be more than 0 and at most 1, not {share!r}")

    def prepared(rules: Mapping[str, Policy | None]) -> Model:
        return prepare(graph, params, QConfig({**qconfig.rules, **rules}), target=target, strict=False)

    model = prepare(graph, params, qconfig, target=target)
    seen, judged_by = split_batches(model.plan, batches, held_back)
    few = first_samples(seen, samples)
    narrow = _quietly_calibrated(model, seen)
    ranking = sensitivity(narrow, few, metric=relative_noise, kinds=["activation"], lanes=lanes)
    movable = {r.name: r for r in ranking.rows if _is_movable(narrow.plan, r)}
    wide = _quietly_calibrated(prepared(_wide_rules(narrow.plan, movable.values())), seen)
    finer = sensitivity(wide, few, metric=relative_noise, kinds=["activation"], lanes=lanes)
    others = [row for row in finer.rows if row.name in movable and row.dtype == WIDE]
    if not others:
        raise JQuantError(f"no value of the plan can have {WIDE} in the place of 8 bits; jq.explain shows why")
    ranking = replace(ranking, rows=(*ranking.rows, *others))
    search = search_mixed_precision(narrow, ranking, budget=budget_of(narrow, ranking, share, cost), cost=cost)
    found = calibrate(prepared(search.rules()), seen)
    judge = judge_of(narrow, judged_by)
    return Mixed(
        model=found,
        search=search,
        cost=cost,
        share=wide_share(found, cost),
        narrow=judge(narrow),
        mixed=judge(found),
        wide=judge(wide),
        held_back=sum(len(batch[0]) for batch in judged_by),
    )


def relative_noise(baseline: Array, other: Array) -> Array:
    """The power of the error over that of the signal: of outputs in several units, each counts the same."""
    return mse(baseline, other) / jnp.maximum(jnp.mean(jnp.square(baseline)), FLOOR)


def first_samples(batches: Sequence[tuple[Array, ...]], count: int) -> list[tuple[Array, ...]]:
    """The first samples of all batches, in one batch."""
    if count < 1:
        raise InputError(f"samples must be at least 1, not {count!r}")
    joined = [jnp.concatenate(arrays)[:count] for arrays in zip(*batches, strict=True)]
    return [tuple(joined)]


def _quietly_calibrated(model: Model, batches: Sequence[Any]) -> Model:
    """A model to compare with, whose faults are what the search is there to mend."""
    with warnings.catch_warnings():
        for kind in (OutlierWarning, TableWarning):
            warnings.simplefilter("ignore", kind)
        return calibrate(model, batches)


def _is_movable(plan: Plan, row: SensitivityRow) -> bool:
    return row.rule is not None and bit_width(row.dtype) <= 8 and plan.spec(row.name).fixed_scale is None


def _wide_rules(plan: Plan, rows: Iterable[SensitivityRow]) -> dict[str, Policy]:
    return {row.rule: Policy(output=replace(plan.spec(row.name), dtype=WIDE)) for row in rows if row.rule is not None}


def budget_of(model: Model, ranking: Ranking, share: float, cost: Cost) -> float:
    """What the values of a ranking may cost for a share of the whole at int16.

    With T bytes at 8 bits and b of them moved to 16, the share is 2 b / (T + b).
    """
    narrow = [row for row in ranking.rows if row.dtype != WIDE]
    if cost == "macs":
        return sum(row.macs * passes(row.dtype) for row in narrow) + share
    total = sum(row.bytes for row in narrow) + _weight_bytes(model)
    return sum(row.bytes for row in narrow) + share * total / (2 - share)


def _weight_bytes(model: Model) -> float:
    sizes = elements(model)
    return sum(sizes[key] * bit_width(spec.dtype) / 8 for key, spec in model.plan.weights.items())


def wide_share(model: Model, cost: Cost) -> float:
    """The share of the cost that int16 values of a plan take."""
    plan, sizes = model.plan, elements(model)
    wide = [name for name in plan.owned if plan.spec(name).dtype == WIDE]
    if cost == "macs":
        products = macs(model)
        nodes = {node for name in wide for node in multiplied_by(plan, name)}
        return sum(products[node] for node in nodes) / max(1, sum(products.values()))
    total = _weight_bytes(model) + sum(sizes[n] * bit_width(plan.spec(n).dtype) / 8 for n in plan.owned)
    return sum(sizes[name] * 2 for name in wide) / total
