"""What to do about the values that lose most: the rule of a settings file, or the words where no rule helps."""

import json
from dataclasses import dataclass

import numpy as np

from jquant.analysis.advice import covering_scale, layer_advice
from jquant.analysis.comparison import Comparison, LayerError
from jquant.analysis.findings import Finding
from jquant.analysis.ranking import rule_names
from jquant.types import Plan


@dataclass(frozen=True, kw_only=True)
class NextStep:
    """One value that loses accuracy, and the change to try first.

    `where`  the value, and `level` the signal to noise of its node alone, dB
    `why`    what is so; `do` what to do about it
    `rule`   TOML of a settings file that does it; "" where no rule can
    """

    where: str
    level: float
    why: str
    do: str
    rule: str = ""


def next_steps(comparison: Comparison, plan: Plan, *, limit: int = 3) -> list[NextStep]:
    """The changes to try first: for the worst values of a comparison, one rule each.

    A rule is what the diagnosis suggests and no promise: put it at the end of the settings file, calibrate, and compare
    again.

    Args:
      comparison: of "float" against a quantized meaning of the plan.
      plan: names the rules.
      limit: how many values.

    Returns:
      The worst values first; none where every value is close to float.

    Example:
      >>> import jax.numpy as jnp, jquant as jq
      >>> def model(params, x):
      ...     return x @ params["w"]
      >>> x = jnp.linspace(-1.0, 1.0, 64).reshape(8, 8).at[0, 0].set(500.0)  # one number sets the scale of all
      >>> qconfig = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8())})
      >>> qfn, variables = jq.quantize(model, {"w": jnp.eye(8)}, qconfig, [x])
      >>> found = jq.analysis.compare(qfn.model(variables), x, "float", "fake_quant")
      >>> [step.why for step in jq.analysis.next_steps(found, qfn.plan)]
      ['1.56 % of the values lie beyond what the scale covers']
    """
    rows = {row.name: row for row in comparison.rows}
    names = rule_names(plan)
    worst = layer_advice(comparison)[:limit]
    return [_step(finding, rows[finding.where], names.get(finding.where), plan) for finding in worst]


def _step(finding: Finding, row: LayerError, name: str | None, plan: Plan) -> NextStep:
    rule = "" if name is None else _rule(finding, row, name, plan)
    return NextStep(where=row.name, level=finding.numbers["dB"], why=finding.message, do=finding.fix, rule=rule)


def _rule(finding: Finding, row: LayerError, name: str, plan: Plan) -> str:
    if finding.check == "rounding error" and row.dtype == "int8":
        return _table(name, "output", 'dtype = "int16"')
    if finding.check == "clamp error":
        scale = np.format_float_positional(np.float32(covering_scale(row)), trim="0")
        return _table(name, "output", f'dtype = "{row.dtype}"\nfixed_scale = {scale}')
    node = plan.graph.by_name.get(row.name)
    weights = [key for key in node.params.values() if key in plan.weights] if node is not None else []
    if finding.check == "error of the operator" and weights and weights[0] not in plan.weight_axis:
        return _table(name, "weight", f'dtype = "{plan.weights[weights[0]].dtype}"\naxis = "out"')
    return ""


def _table(name: str, part: str, lines: str) -> str:
    return f"[rules.{json.dumps(name)}.{part}]\n{lines}"
