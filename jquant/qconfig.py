"""Which tensor is quantized how: an ordered mapping from name patterns to policies."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from jquant.text import did_you_mean
from jquant.types import (
    FLOAT,
    FrozenMap,
    Graph,
    Inherit,
    Observer,
    Policy,
    QConfigError,
    Quantizer,
    QuantSpec,
    Requested,
)


def _constructor(dtype: str) -> Callable[..., QuantSpec]:
    def spec(
        *,
        axis: Literal["out"] | None = None,
        quantizer: Quantizer | None = None,
        observer: Observer | None = None,
        scale: float | None = None,
        threshold: float | None = None,
        scale_form: Literal["real", "pow2"] = "real",
    ) -> QuantSpec:
        if scale is not None and threshold is not None:
            raise QConfigError(f"{dtype}: give a scale or a threshold, not both")
        if threshold is not None:
            scale = threshold / 2 ** (QuantSpec(dtype=dtype).bits - 1)
        return QuantSpec(
            dtype=dtype, axis=axis, quantizer=quantizer, observer=observer, fixed_scale=scale, scale_form=scale_form
        )

    spec.__name__ = spec.__qualname__ = dtype
    spec.__doc__ = f"""A {dtype} `QuantSpec`.

    Args:
      axis: "out" for one scale per output channel, None for one per tensor.
      quantizer: `jq.fake_quant` (default), `jq.lsq`, `jq.lsq_plus` or `jq.pact`.
      observer: `jq.min_max()` (default), `jq.moving_average()`, `jq.percentile()`, `jq.mse()`, `jq.kl()`, `jq.norm()`,
        `jq.mix()`, `jq.histogram()` or `jq.clip_std()`.
      scale: a fixed scale, real per LSB.
      threshold: a fixed range in real units; the scale is threshold / 2^(bits - 1).
      scale_form: "real" or "pow2".

    Raises:
      QConfigError: both a scale and a threshold, or values out of range.
    """
    return spec


int2, int3, int4, int8, int16 = map(_constructor, ("int2", "int3", "int4", "int8", "int16"))
uint4, uint8 = map(_constructor, ("uint4", "uint8"))
high_precision = QuantSpec(dtype="int32")


def float16() -> QuantSpec:
    """A float16 value: a float island between quantized ones, evaluated in float. Only where a rule asks for it."""
    return QuantSpec(dtype="float16")


def consistency(qconfig: "QConfig", level: Literal[0, 1, 2]) -> "QConfig":
    """The qconfig at a consistency level: how closely fake-quant follows the integers (specification, section 2).

    Level 0 leaves it as it is. Level 1 makes the scales of values powers of two, level 2 those of weights too. Fixed
    scales are snapped as well. Snapping costs up to one bit of resolution; `tests/conformance/RESULTS.md` has what it
    gains.

    Raises:
      QConfigError: another level.
    """
    if level not in (0, 1, 2):
        raise QConfigError(f"consistency level {level!r}; known: 0, 1, 2")

    def snapped(spec: QuantSpec | Inherit | None) -> QuantSpec | Inherit | None:
        if not isinstance(spec, QuantSpec) or spec.is_high_precision or spec.is_float:
            return spec
        return replace(spec, scale_form="pow2")

    def rule(policy: Policy) -> Policy:
        inputs = policy.input
        if not isinstance(inputs, Inherit):
            inputs = {port: spec for port, asked in inputs.items() if isinstance(spec := snapped(asked), QuantSpec)}
        weight = snapped(policy.weight) if level == 2 else policy.weight
        return Policy(output=snapped(policy.output), weight=weight, input=inputs)

    return qconfig if level == 0 else QConfig({pattern: rule(policy) for pattern, policy in qconfig.rules.items()})


@dataclass(frozen=True, init=False)
class QConfig:
    """An ordered mapping {pattern: Policy or None}; later rules override earlier ones, field by field.

    Patterns are globs on names ("stage4.*"), regular expressions ("re:layer[12]\\..*") or globs on operator types
    ("type:Conv"). None is short for a policy that keeps everything float.

    Example:
      >>> import jquant as jq
      >>> q = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8()), "head": None})
      >>> q.policy("stem.conv", "Conv").weight.dtype
      'int8'
    """

    rules: FrozenMap[Policy]

    def __init__(self, rules: Mapping[str, Policy | None]) -> None:
        if not isinstance(rules, Mapping) or not rules:
            raise QConfigError("QConfig takes a non-empty mapping of pattern to Policy, such as {'*': jq.Policy(...)}")
        checked: dict[str, Policy] = {}
        for pattern, policy in rules.items():
            if not isinstance(pattern, str):
                raise QConfigError(
                    f"qconfig key {pattern!r} is {type(pattern).__name__}; keys are strings, names as "
                    "print(graph) shows them. An index such as 0 is no name"
                )
            if policy is not None and not isinstance(policy, Policy):
                raise QConfigError(f"qconfig rule {pattern!r} must be a jq.Policy or None, not {policy!r}")
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise QConfigError(f"qconfig rule {pattern!r} is no regular expression: {error}") from error
            checked[pattern] = FLOAT if policy is None else policy
        object.__setattr__(self, "rules", FrozenMap(checked))

    def policy(self, name: str, operator: str, base: Requested | None = None, unless: str = "") -> Requested:
        """What is asked for a value, all matching rules merged; what no rule sets is `base`, or float.

        Rules that match the name `unless` as well are left out: those that mean a composite, not this part of it.
        """
        asked = base or Requested()
        for pattern, rule in self.rules.items():
            if not matches(pattern, name, operator) or (unless and matches(pattern, unless, "")):
                continue
            if not isinstance(rule.output, Inherit):
                asked = replace(asked, output=rule.output, explicit=pattern == name)
            asked = asked if isinstance(rule.weight, Inherit) else replace(asked, weight=rule.weight)
            asked = asked if isinstance(rule.input, Inherit) else replace(asked, input=FrozenMap(rule.input))
        return asked

    def check_matches(self, *graphs: Graph) -> None:
        """Raises QConfigError for a rule that matches nothing in any of the graphs, with near names."""
        named = [(i.name, "Input") for graph in graphs for i in graph.inputs]
        named += [(n.name, type(n.op).__name__) for graph in graphs for n in graph.nodes]
        for pattern in self.rules:
            if not any(matches(pattern, name, operator) for name, operator in named):
                known = (
                    {f"type:{t}" for _, t in named}
                    if pattern.startswith("type:")
                    else _with_parents(n for n, _ in named)
                )
                raise QConfigError(f"qconfig rule {pattern!r} matches nothing{did_you_mean(pattern, known)}")


def matches(pattern: str, name: str, operator: str) -> bool:
    """Whether a qconfig pattern selects a value."""
    if pattern.startswith("type:"):
        return fnmatch.fnmatchcase(operator, pattern[5:])
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def _with_parents(names: Iterable[str]) -> list[str]:
    """Names and their dotted prefixes as globs, for suggestions."""
    known: dict[str, None] = {}
    for name in names:
        known[name] = None
        parts = name.split(".")
        known |= dict.fromkeys(".".join(parts[:i]) + ".*" for i in range(1, len(parts)))
    return list(known)
