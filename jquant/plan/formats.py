"""Which format every value gets, from what the rules ask for.

A fused group makes one value. What is asked for at any of its nodes is asked for that value: by name before by pattern,
a later rule before an earlier one. An accumulator that leaves the integers as it is stays int32 ("high precision").
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jquant.ops.movement import carries_accumulator
from jquant.types import Graph, Node, QConfigError, QuantSpec, Requested

HIGH_PRECISION = QuantSpec(dtype="int32")
_ONLY_OUTPUTS = "high precision is for a conv, linear or matrix product that feeds only graph outputs"


def is_narrow(spec: Any) -> bool:
    """Whether a spec is of integers that are rescaled: neither float nor an accumulator."""
    return isinstance(spec, QuantSpec) and not spec.is_high_precision and not spec.is_float


def show(spec: QuantSpec | None) -> str:
    return "float" if spec is None else str(spec)


# ---------------------------------------------------------------------------------------------------------------------
# Fused groups


@dataclass(frozen=True)
class Group:
    """What is asked for the value of a fused group, and at which of its nodes."""

    asked: Requested
    rule: str


def decide_groups(policies: Mapping[str, Requested], renamed: Mapping[str, str], *, strict: bool) -> dict[str, Group]:
    """{fused node: what is asked for its value}, for every node that others went into (`renamed`).

    Raises:
      QConfigError: with `strict`, two nodes of a group for which different formats are asked by name.
    """
    members: dict[str, list[str]] = {}
    for name in policies:  # in the order of the graph: the last one makes the value
        final = renamed.get(name, name)
        members.setdefault(final, []).append(name)
    groups, broken = {}, []
    for final, names in members.items():
        if len(names) == 1 and names[0] == final:
            continue
        rule = _deciding(names, policies)
        groups[final] = Group(replace(policies[names[-1]], **_output_of(policies[rule])), rule)
        for name in names:
            asked, applied = policies[name], policies[rule].output
            if asked.explicit and asked.output is not None and asked.output != applied:
                broken.append(f"{name}: asked for {show(asked.output)}, and {rule} for {show(applied)}")
    if strict and broken:
        raise QConfigError(
            "layers that are fused make one value, and different formats are asked for it by name (ask for one, or "
            "pass strict=False, so that the later rule decides):\n  " + "\n  ".join(broken)
        )
    return groups


def _deciding(names: list[str], policies: Mapping[str, Requested]) -> str:
    """The node of a group whose request decides. What is float inside a group is not rounded there, as everything."""

    def order(position: int) -> tuple[bool, bool, int, int]:
        asked = policies[names[position]]
        last = position == len(names) - 1
        return asked.output is not None or last, asked.explicit, asked.rank, position

    return names[max(range(len(names)), key=order)]


def _output_of(asked: Requested) -> dict[str, Any]:
    return {"output": asked.output, "explicit": asked.explicit, "rank": asked.rank, "narrow": asked.narrow}


# ---------------------------------------------------------------------------------------------------------------------
# Values


@dataclass
class Formats:
    """`values` {value: spec}; `owned` and `moved` as in `Plan`; `reasons` {value: why it is not as asked for}."""

    values: dict[str, QuantSpec | None]
    owned: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    moved: dict[str, tuple[int, ...]] = field(default_factory=dict)


def resolve_values(
    graph: Graph,
    types: Mapping[str, Any],
    policies: Mapping[str, Requested],
    exact: Mapping[str, str],
    rules: Mapping[str, str],
    *,
    high_precision_outputs: bool,
    strict: bool,
) -> Formats:
    """The format of every value.

    `types` has their shapes, `rules` {fused node: the node whose request decides}.
    """
    found = Formats({i.name: policies[i.name].output for i in graph.inputs} | dict.fromkeys(exact))
    found.owned += [i.name for i in graph.inputs if found.values[i.name] is not None]
    ends = _Ends(graph, types, policies, exact)
    for node in graph.nodes:
        if node.name in exact:
            continue
        policy = policies.get(node.name)
        requested = policy.output if policy else None
        if requested is not None and requested.is_float:
            found.values[node.name] = requested
            found.owned.append(node.name)
        elif node.op.scale_rule != "own":
            _follow(node, policy, found, exact, types)
        elif policy is None or requested is None:
            found.values[node.name] = None
        else:
            keeps = node.op.keeps_accumulator and ends.deployed(node.name)
            _own(node, policy, found, keeps, high_precision_outputs, strict, rules.get(node.name, node.name))
    return found


def _follow(
    node: Node, policy: Requested | None, found: Formats, exact: Mapping[str, str], types: Mapping[str, Any]
) -> None:
    """A node that keeps the format of its first operand that is a number; a float rule cuts it off."""
    source = next((found.values[v] for v in node.inputs if v not in exact), None)
    requested = policy.output if policy else None
    found.values[node.name] = None if policy is not None and requested is None else source
    if requested != found.values[node.name]:
        found.reasons[node.name] = f"{type(node.op).__name__} keeps the format of its operand"
    if found.values[node.name] == HIGH_PRECISION:
        found.moved[node.name] = tuple(types[node.inputs[0]].shape[1:])


def _own(
    node: Node,
    policy: Requested,
    found: Formats,
    accumulator: bool,
    high_precision_outputs: bool,
    strict: bool,
    rule: str,
) -> None:
    """A node with a scale of its own, or with its accumulator as its value, where it may be."""
    requested = policy.output
    assert requested is not None
    if is_narrow(requested) and (policy.explicit or not (high_precision_outputs and accumulator)):
        found.values[node.name] = requested
        found.owned.append(node.name)
    elif is_narrow(requested):
        found.values[node.name] = HIGH_PRECISION
        found.reasons[node.name] = "feeds only graph outputs: the int32 accumulator is the output"
    elif accumulator:
        found.values[node.name] = requested
    elif policy.narrow is not None and not (strict and policy.explicit):
        found.values[node.name] = policy.narrow
        found.owned.append(node.name)
        found.reasons[node.name] = _ONLY_OUTPUTS
    else:
        at = f", asked at {rule!r}" if rule != node.name else ""
        raise QConfigError(f"node {node.name!r} ({type(node.op).__name__}{at}): {_ONLY_OUTPUTS}; give it int8 or int16")


@dataclass(frozen=True)
class _Ends:
    """Whether an accumulator leaves the integers as it is: behind it come graph outputs, through data movement alone.

    Readers that are float are not deployed, and do not count. Neither does movement that a rule gives a format by name:
    the layer before it has to make that.
    """

    graph: Graph
    types: Mapping[str, Any]
    policies: Mapping[str, Requested]
    exact: Mapping[str, str]

    def deployed(self, name: str) -> bool:
        readers = [r for r in self.graph.consumers[name] if not self._is_float(r)]
        if not all(self._moves(r) and self.deployed(r.name) for r in readers):
            return False
        return bool(readers) or name in self.graph.outputs

    def _is_float(self, reader: Node) -> bool:
        policy = self.policies.get(reader.name)
        return policy is not None and policy.output is None and reader.name not in self.exact

    def _moves(self, reader: Node) -> bool:
        policy = self.policies.get(reader.name)
        narrow = policy is not None and policy.explicit and is_narrow(policy.output)
        shapes = [self.types[v].shape for v in (reader.inputs[0], reader.name)]
        return not narrow and len(reader.inputs) == 1 and carries_accumulator(reader.op, *shapes)


def check_strict(policies: Mapping[str, Requested], found: Formats, rules: Mapping[str, str]) -> None:
    """Raises one QConfigError for every format that was asked for by name and is not applied."""
    broken = []
    for name, reason in found.reasons.items():
        asked, applied = policies.get(name, Requested()), found.values[name]
        if not asked.explicit or asked.output is None:
            continue
        if applied is None or applied.dtype != asked.output.dtype:
            broken.append(
                f"{rules.get(name, name)}: asked for {show(asked.output)}, but it would be {show(applied)}: {reason}"
            )
    if broken:
        raise QConfigError(
            "formats asked for by name cannot be applied (give them to the operand, ask for "
            'Policy(input={"x": ...}), or pass strict=False):\n  ' + "\n  ".join(broken)
        )
