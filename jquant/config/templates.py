"""Rules that people know by name, as plain functions: each returns a mapping for `QConfig`.

Mappings add up like any others, later ones over earlier ones:

    qconfig = jq.QConfig({
        **templates.int8_default(),
        **templates.conv_dtype(graph, weight=jq.int16(axis="out"), prefix="head"),
        **templates.sensitive(ranking, ratio=0.1, spec=jq.int16()),
    })

What follows from a format needs no rule: data movement keeps that of its operand, and the inside of softmax and of the
norms is int16. Outputs that feed nothing stay int32 (`prepare(high_precision_outputs=True)`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jquant.config.qconfig import int8, int16
from jquant.quantizers import fake_quant
from jquant.text import near_or_known
from jquant.types import INHERIT, Graph, Inherit, Node, Observer, Policy, QConfigError, Quantizer, QuantSpec

Rules = dict[str, Policy | None]

GEMM = ("Conv", "ConvTranspose", "Linear")


def int8_default(*, observer: Observer | str | None = None, quantizer: Quantizer | str | None = None) -> Rules:
    """int8 everywhere, weights per output channel; values by `observer`, None for `jq.observers.nmse()`."""
    return _everywhere(int8(observer=observer, quantizer=quantizer), quantizer)


def weight8_activation16(*, observer: Observer | str | None = None, quantizer: Quantizer | str | None = None) -> Rules:
    """int8 weights per output channel, int16 values: the upper bound that the guides try first."""
    return _everywhere(int16(observer=observer, quantizer=quantizer), quantizer)


def _everywhere(output: QuantSpec, quantizer: Quantizer | str | None) -> Rules:
    return {"*": Policy(weight=int8(axis="out", quantizer=quantizer), output=output)}


def fixed_activations(rules: Mapping[str, Policy | None]) -> Rules:
    """The same rules, with scales of values that training leaves alone: plain fake-quant gives them no gradient."""

    def fixed(spec: QuantSpec | Inherit | None) -> QuantSpec | Inherit | None:
        return replace(spec, quantizer=fake_quant) if isinstance(spec, QuantSpec) else spec

    return {
        pattern: rule and Policy(output=fixed(rule.output), weight=rule.weight, input=rule.input)
        for pattern, rule in rules.items()
    }


def by_module(specs: Mapping[str, Any]) -> Rules:
    """Rules by module path: {"": spec, "stage1": spec or {"output": ..., "weight": ..., "input": {port: ...}} or None}.

    A path stands for the module and all that is inside it, in all its calls; "" for everything. A lone spec is that of
    the output. A path of one layer is a request by name: what it asks for is applied or refused.

    Raises:
      QConfigError: a key that is no string, or a value that is neither a spec, a mapping of ports, nor None.
    """
    rules: Rules = {}
    for path, asked in specs.items():
        if not isinstance(path, str):
            raise QConfigError(f"module path {path!r} is {type(path).__name__}; paths are strings, an index is no path")
        rules[f"module:{path}" if path else "*"] = _policy(path, asked)
    return rules


def _policy(path: str, asked: Any) -> Policy | None:
    if asked is None or isinstance(asked, Policy):
        return asked
    if isinstance(asked, QuantSpec):
        return Policy(output=asked)
    if isinstance(asked, Mapping) and asked.keys() <= {"output", "weight", "input"}:
        return Policy(**asked)
    raise QConfigError(
        f"module {path!r}: {asked!r} is no QuantSpec, no mapping of output, weight and input, and not None"
    )


def conv_dtype(
    graph: Graph, *, input: QuantSpec | None = None, weight: QuantSpec | None = None, prefix: str = ""
) -> Rules:
    """The operand and weight of every convolution and linear layer, below a module path if one is given."""
    ports = INHERIT if input is None else {"x": input}
    policy = Policy(weight=INHERIT if weight is None else weight, input=ports)
    return {node.name: policy for node in _nodes(graph, lambda n: type(n.op).__name__ in GEMM, prefix)}


def matmul_dtype(graph: Graph, a: QuantSpec, b: QuantSpec | None = None, *, prefix: str = "") -> Rules:
    """Both operands of every matrix product of two values."""
    policy = Policy(input={"a": a, "b": b or a})
    return {node.name: policy for node in _nodes(graph, lambda n: type(n.op).__name__ == "MatMul", prefix)}


def _nodes(graph: Graph, wanted: Callable[[Node], bool], prefix: str) -> list[Node]:
    inside = [n for n in graph.nodes if not prefix or n.name == prefix or n.name.startswith(f"{prefix}.")]
    if not inside:
        raise QConfigError(f"no module {prefix!r}{near_or_known(prefix, [n.name for n in graph.nodes])}")
    return [node for node in inside if wanted(node)]


def sensitive(
    ranking: Sequence[str],
    *,
    spec: QuantSpec,
    topk: int | None = None,
    ratio: float | None = None,
    port: str = "output",
) -> Rules:
    """A finer format for the first values (port "output") or nodes (port "weight") of a ranking, most sensitive first.

    Args:
      ranking: names, for example of `jq.analysis.sensitivity`.
      spec: the format that they get.
      topk: how many; or `ratio`: which share, rounded up.

    Raises:
      QConfigError: neither or both of topk and ratio, values out of range, or an unknown port.
    """
    if (topk is None) == (ratio is None):
        raise QConfigError("sensitive takes topk or ratio, one of them")
    if port not in ("output", "weight"):
        raise QConfigError(f"port must be 'output' or 'weight', not {port!r}")
    count = topk if topk is not None else math.ceil(len(ranking) * (ratio or 0.0))
    if not 0 <= count <= len(ranking) or (ratio is not None and not 0 <= ratio <= 1):
        raise QConfigError(f"topk={topk}, ratio={ratio} does not fit a ranking of {len(ranking)} names")
    policy = Policy(output=spec) if port == "output" else Policy(weight=spec)
    return dict.fromkeys(ranking[:count], policy)


def grid_int16(graph: Graph) -> Rules:
    """int16 on the way to every sampling grid, flow and box, back to the convolution or linear layer that makes it."""
    found: dict[str, None] = {}
    for node in graph.nodes:
        if type(node.op).__name__ in ("GridSample", "Warp", "RoiAlign") and len(node.inputs) > 1:
            _walk_back(graph, node.inputs[1], found)
    return {name: Policy(output=int16()) for name in found}


def _walk_back(graph: Graph, value: str, found: dict[str, None]) -> None:
    if value in found:
        return
    found[value] = None
    node = graph.by_name.get(value)
    if node is not None and type(node.op).__name__ not in (*GEMM, "MatMul"):
        for operand in node.inputs:
            _walk_back(graph, operand, found)
