"""Which tensor is quantized how: an ordered mapping from name patterns to policies."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from jquant import observers, quantizers
from jquant.config.patterns import MODULE, Patterns
from jquant.config.patterns import matches as matches
from jquant.text import did_you_mean, near_or_known
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


def _as_policy(given: Any) -> str:
    """The policy for a format that stands alone in a rule."""
    dtype = given.dtype if isinstance(given, QuantSpec) else given
    known = ("int4", "int8", "int16")
    return f"; write jq.Policy(output=jq.{dtype}(), weight=jq.{dtype}(axis='out'))" if dtype in known else ""


def _constructor(dtype: str, place: str = "jq") -> Callable[..., QuantSpec]:
    def spec(
        *,
        axis: Literal["out"] | None = None,
        quantizer: Quantizer | str | None = None,
        observer: Observer | str | None = None,
        scale: float | None = None,
        threshold: float | None = None,
        scale_form: Literal["real", "pow2"] = "real",
    ) -> QuantSpec:
        if scale is not None and threshold is not None:
            raise QConfigError(f"{dtype}: give a scale or a threshold, not both")
        if threshold is not None:
            scale = threshold / 2 ** (QuantSpec(dtype=dtype).bits - 1)
        quantizer = quantizer_named(quantizer) if isinstance(quantizer, str) else quantizer
        observer = observer_named(observer) if isinstance(observer, str) else observer
        return QuantSpec(
            dtype=dtype, axis=axis, quantizer=quantizer, observer=observer, fixed_scale=scale, scale_form=scale_form
        )

    spec.__name__ = spec.__qualname__ = dtype
    spec.__doc__ = f"""A {dtype} `QuantSpec`.

    Args:
      axis: "out" for one scale per output channel, None for one per tensor.
      quantizer: `jq.fake_quant` (default), `jq.lsq`, `jq.lsq_plus` or `jq.pact`; or its name, such as "lsq".
      observer: its name, such as "mse", for its default options; or a value of `jq.observers`: `nmse()` (the default of
        values), `min_max()` (of weights), `mean_of_maxima()`, `mse()`, `percentile()`, `kl()`, `norm()`, `mix()`,
        `moving_average()`.
      scale: a fixed scale, real per LSB.
      threshold: a fixed range in real units; the scale is threshold / 2^(bits - 1).
      scale_form: "real" or "pow2".

    Raises:
      QConfigError: both a scale and a threshold, an unknown name, or values out of range.

    Example:
      >>> import jquant as jq
      >>> {place}.{dtype}(axis="out", quantizer="lsq").quantizer.name
      'lsq'
    """
    return spec


def quantizer_named(name: str) -> Quantizer:
    """The quantizer of a name, such as "lsq".

    Raises:
      QConfigError: an unknown name, with near ones.
    """
    known = {n: v for n, v in vars(quantizers).items() if isinstance(v, Quantizer)}
    if name not in known:
        raise QConfigError(f"unknown quantizer {name!r}{did_you_mean(name, known)}")
    return known[name]


def observer_named(name: str, /, **options: Any) -> Observer:
    """The observer of a name, such as "mse", with its options.

    Raises:
      QConfigError: an unknown name, with near ones, or options that it does not have.
    """
    known = [n for n in observers.__all__ if n.islower()]
    if name not in known:
        raise QConfigError(f"unknown observer {name!r}{did_you_mean(name, known)}; known: {', '.join(sorted(known))}")
    try:
        found = getattr(observers, name)(**options)
    except TypeError as error:
        raise QConfigError(f"observer {name!r}: {error}") from error
    if not isinstance(found, Observer):
        raise QConfigError(f"{name!r} is no observer")
    return found


int2, int3, int4, int8, int16 = map(_constructor, ("int2", "int3", "int4", "int8", "int16"))
uint8, uint4 = (_constructor(dtype, "jq.config") for dtype in ("uint8", "uint4"))
high_precision = QuantSpec(dtype="int32")


def float16() -> QuantSpec:
    """A float16 value: a float island between quantized ones, evaluated in float. Only where a rule asks for it.

    Example:
      >>> import jquant as jq
      >>> qconfig = jq.QConfig(jq.templates.int8_default() | {"norm": jq.Policy(output=jq.float16())})
    """
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

    Patterns are globs on names ("stage4.*"), regular expressions ("re:layer[12]\\..*"), globs on operator types
    ("type:Conv"), or a module with all that is inside it ("module:stage4"). A name or pattern that selects the first
    call of a module selects its later calls too (`ff`, `ff_1`); a rule behind it, for `ff_1`, overrides one of them.
    None is short for a policy that keeps everything float.

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
                raise QConfigError(
                    f"qconfig rule {pattern!r} must be a jq.Policy or None, not {policy!r}{_as_policy(policy)}"
                )
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise QConfigError(f"qconfig rule {pattern!r} is no regular expression: {error}") from error
            checked[pattern] = FLOAT if policy is None else policy
        object.__setattr__(self, "rules", FrozenMap(checked))

    def policy(
        self,
        name: str,
        operator: str,
        base: Requested | None = None,
        *,
        call_of: str = "",
        unless: Iterable[str] = (),
    ) -> Requested:
        """What is asked for a value, all matching rules merged; what no rule sets is `base`, or float.

        `call_of` is that of the node. Rules that match a name in `unless` as well are left out: those that mean a
        composite, not this part of it.
        """
        asked = base or Requested()
        ranks = self._patterns.matching(name, operator, call_of)
        for other in filter(None, unless):
            ranks -= self._patterns.matching(other)
        for rank in sorted(ranks):
            pattern, rule = self._ordered[rank]
            if not isinstance(rule.output, Inherit):
                high = rule.output is not None and rule.output.is_high_precision
                narrow = (asked.narrow or _narrow(asked.output)) if high else None
                explicit = pattern.removeprefix(MODULE) in (name, call_of)
                asked = replace(asked, output=rule.output, explicit=explicit, rank=rank, narrow=narrow)
            asked = asked if isinstance(rule.weight, Inherit) else replace(asked, weight=rule.weight)
            asked = asked if isinstance(rule.input, Inherit) else replace(asked, input=FrozenMap(rule.input))
        return asked

    def check_matches(self, *graphs: Graph) -> None:
        """Raises QConfigError for a rule that matches nothing in any of the graphs, with near names."""
        named = [(i.name, "Input", "") for graph in graphs for i in graph.inputs]
        named += [(n.name, type(n.op).__name__, n.call_of) for graph in graphs for n in graph.nodes]
        found: set[int] = set()
        for value in named:
            found |= self._patterns.matching(*value)
        for rank, pattern in enumerate(self.rules):
            if rank not in found:
                names, operators = [name for name, _, _ in named], {operator for _, operator, _ in named}
                raise QConfigError(_matches_nothing(pattern, names, operators))

    @cached_property
    def _patterns(self) -> Patterns:
        return Patterns(self.rules)

    @cached_property
    def _ordered(self) -> tuple[tuple[str, Policy], ...]:
        return tuple(self.rules.items())


def _narrow(spec: QuantSpec | None) -> QuantSpec | None:
    return None if spec is None or spec.is_high_precision or spec.is_float else spec


def _matches_nothing(pattern: str, names: Iterable[str], operators: Iterable[str]) -> str:
    """The text of the error for a pattern that selects nothing, with what may have been meant."""
    if pattern.startswith(MODULE):
        path = pattern.removeprefix(MODULE)
        near = near_or_known(path, [n.removesuffix(".*") for n in _with_parents(names)])
        glob = " (a path stands for all that is inside it, and is no glob)" if set("*?[") & set(path) else ""
        return f"qconfig: there is no module {path!r}{near}{glob}"
    if pattern.startswith("type:"):  # the names are compared without what all of them begin with
        near = re.sub(r"'(\w+)'", r"'type:\1'", near_or_known(pattern.removeprefix("type:"), sorted(operators)))
    else:
        near = near_or_known(pattern.removeprefix("re:"), _with_parents(names))
    return f"qconfig rule {pattern!r} matches nothing{near}"


def _with_parents(names: Iterable[str]) -> list[str]:
    """Names and their dotted prefixes as globs, for suggestions."""
    known: dict[str, None] = {}
    for name in names:
        known[name] = None
        parts = name.split(".")
        known |= dict.fromkeys(".".join(parts[:i]) + ".*" for i in range(1, len(parts)))
    return list(known)
