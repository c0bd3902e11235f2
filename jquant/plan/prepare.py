"""From a float graph and a qconfig to a plan: every value and weight gets its format, or one error says why not."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax.numpy as jnp

from jquant.config.qconfig import QConfig
from jquant.graph.checks import validate
from jquant.graph.float import value_types
from jquant.graph.operator import Operand, constraints
from jquant.graph.passes import prune
from jquant.numerics.namespace import real, to_device, to_host
from jquant.ops.conv import kernel_limits
from jquant.ops.elementwise import Constant
from jquant.ops.matmul import Embedding
from jquant.plan.batch_norm import BatchNormHandling, check_kept, kept_batch_norms, with_exact_ones
from jquant.plan.composites import expand
from jquant.plan.conversions import bounded_values, insert_conversions, insert_requantize
from jquant.plan.fills import check_fills
from jquant.plan.fold import fold_batch_norm
from jquant.plan.formats import Formats, Group, check_strict, decide_groups, is_narrow, resolve_values
from jquant.plan.fuse import fuse
from jquant.plan.layout import channels_last
from jquant.plan.masks import join_masks
from jquant.plan.resolutions import resolutions
from jquant.plan.stubs import mark_region
from jquant.targets import find_target
from jquant.text import did_you_mean
from jquant.types import (
    Array,
    FrozenMap,
    Graph,
    Model,
    Node,
    Params,
    Plan,
    QConfigError,
    QuantSpec,
    Requested,
    Target,
)


def prepare(
    graph: Graph,
    params: Params,
    qconfig: QConfig,
    *,
    target: Target | str,
    high_precision_outputs: bool = True,
    strict: bool = True,
    batch_norm: BatchNormHandling | Mapping[str, BatchNormHandling] = "fold",
    unfused: Collection[str] = (),
) -> Model:
    """Folds batch norm, fuses, and resolves the qconfig to a format for every value and weight.

    A format asked for by name is applied, or refused by name. So is int8 at a layer whose accumulator would else be the
    the output.

    Args:
      graph: a float graph, as `from_torch` makes it.
      params: {name: float32 array}.
      qconfig: names are those of `graph`, before fusion. A fused node takes the weight policy of its conv or linear,
        and the output that is asked for at one of its nodes by name, else by the latest rule.
      target: a march, such as `jq.targets.NASH_E`, or its name or chip, such as "nash-e" or "S100".
      high_precision_outputs: a conv or linear that feeds only graph outputs keeps its int32 accumulator, unless a rule
        asks for int8 or int16 by name. Data movement behind it is looked through; readers that are float do not count.
      strict: a format that a rule asks for by the full name of a node, and that the node cannot have, is an error. A
        pattern that covers a node among others gives way, and `explain` says why; with strict=False names do too.
      batch_norm: what training does with batch norm; or a mapping from patterns, as in a qconfig, on the names of batch
        norms, later ones overriding. All have the same integers in the end, see `jq.training.fold_batch_norm`.
        "fold": it goes into weight and bias now. "live": it stays behind the layer and normalizes with the statistics
        of the batch. "frozen": it stays, with its running statistics, its weight and bias trained. "reverse_fold": as
        live, and the weight is quantized as the running statistics scale it, the scaling undone after the layer.
      unfused: names of nodes whose result is rounded as itself: no add or activation behind them is fused with them. By
        default a convolution or linear takes in what follows, as the chip's convolution unit does.

    Returns:
      A model: the plan, and the parameters of its graph (batch norm folded, unless `batch_norm` keeps it). It has no
      scales yet.

    Raises:
      QConfigError: a rule that matches nothing, or a format that the target or the operator does not have.
      GraphError, CalibrationError: a graph or parameters that are not well formed.

    Example:
      >>> import jax.numpy as jnp, jquant as jq
      >>> x, weights = jnp.array([[1.0, 0.5], [-0.25, 0.75]]), {"w": jnp.array([[0.5, 1.0], [-1.0, 0.25]])}
      >>> graph, params = jq.trace(lambda p, x: x @ p["w"], weights, x)
      >>> jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target="nash-e")
      Model(1 nodes for nash-e, 1 parameters, not calibrated)
    """
    validate(graph, params)
    if not isinstance(qconfig, QConfig):
        raise QConfigError(f"prepare takes a jq.QConfig, not {type(qconfig).__name__}: jq.QConfig({{pattern: policy}})")
    if unknown := sorted(set(unfused) - set(graph.by_name)):
        raise QConfigError(f"unfused: the graph has no node {unknown[0]!r}{did_you_mean(unknown[0], graph.by_name)}")
    options = Options(high_precision_outputs, strict, batch_norm, tuple(unfused))
    made = Preparation(graph, graph, to_host(params), qconfig, find_target(target), options)
    for run in PASSES:
        made = run(made)
    plan = made.plan()
    if both := sorted(set(plan.owned) & plan.weights.keys()):
        raise QConfigError(
            f"{both[0]!r} is the name of a value and of a weight, whose scales would be one; rename the parameter or "
            "the input in the model"
        )
    kept = {key: params[key] if value is made.given.get(key) else value for key, value in made.params.items()}
    return Model(plan, to_device(kept))


# ---------------------------------------------------------------------------------------------------------------------
# The record, and the passes over it


@dataclass(frozen=True)
class Options:
    """The arguments of `prepare` that passes read."""

    high_precision_outputs: bool
    strict: bool
    batch_norm: BatchNormHandling | Mapping[str, BatchNormHandling]
    unfused: tuple[str, ...]


@dataclass(frozen=True)
class Preparation:
    """A plan so far. A pass takes one and returns one.

    `whole`     the graph that was given; `graph` the one so far; `given` and `params` likewise
    `policies`  {node or input: the formats asked for}
    `notes`     {node: why it has another format than the one asked for}
    `stubs`     {stub: the value that stands for it}
    `folded`    {batch norm: its layer}; `fused` {node: the node that makes its value}
    `groups`    {value: the rule that decides the format of its fused group}
    """

    whole: Graph
    graph: Graph
    params: Params
    qconfig: QConfig
    target: Target
    options: Options
    given: Params = field(default_factory=dict)
    policies: Mapping[str, Requested] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    stubs: Mapping[str, str] = field(default_factory=dict)
    folded: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, str] = field(default_factory=dict)
    groups: Mapping[str, Group] = field(default_factory=dict)
    formats: Formats | None = None
    weights: Mapping[str, QuantSpec] = field(default_factory=dict)
    axes: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def types(self) -> dict[str, Any]:
        return value_types(self.graph, self.params)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: kind.shape for name, kind in self.types.items()}

    @cached_property
    def exact(self) -> dict[str, str]:
        """{value: its dtype}, of masks, indices and pixels."""
        return {name: str(kind.dtype) for name, kind in self.types.items() if kind.dtype != jnp.float32}

    @cached_property
    def renamed(self) -> dict[str, str]:
        """{node: the node that makes its value}, of what is folded or fused."""
        return {old: self.fused.get(new, new) for old, new in self.folded.items()} | dict(self.fused)

    @cached_property
    def asked(self) -> dict[str, Requested]:
        """The policies, with the format of a fused group at the node that makes its value."""
        return {**self.policies, **{name: group.asked for name, group in self.groups.items()}}

    @cached_property
    def rules(self) -> dict[str, str]:
        return {name: group.rule for name, group in self.groups.items()}

    def plan(self) -> Plan:
        assert self.formats is not None
        rounding, moved = self.target.quantize_rounding, self.renamed
        values = {n: _with_rounding(spec, self.graph, n, self.target) for n, spec in self.formats.values.items()}
        return Plan(
            self.graph,
            FrozenMap(values),
            FrozenMap({key: replace(spec, rounding=rounding) for key, spec in self.weights.items()}),
            FrozenMap(self.axes),
            tuple(self.formats.owned),
            self.target,
            tuple(resolutions(self)),
            FrozenMap(moved | {old: moved.get(new, new) for old, new in self.stubs.items()}),
            FrozenMap(self.exact),
            moved=FrozenMap(self.formats.moved),
        )


def ask(made: Preparation) -> Preparation:
    """What the qconfig asks for, at every node that an output needs."""
    graph, policy = prune(made.whole), made.qconfig.policy
    policies = {i.name: policy(i.name, "Input") for i in graph.inputs}
    policies |= {n.name: policy(n.name, type(n.op).__name__, call_of=n.call_of) for n in graph.nodes}
    return replace(made, graph=graph, policies=policies, given=made.params)


def mark_stubs(made: Preparation) -> Preparation:
    graph, policies, stubs, notes = mark_region(made.graph, made.policies, strict=made.options.strict)
    return replace(made, graph=graph, policies=policies, stubs=stubs, notes=notes)


def join_mask_operands(made: Preparation) -> Preparation:
    graph, policies = join_masks(made.graph, made.params, made.policies)
    return replace(made, graph=graph, policies=policies)


def requantize_operands(made: Preparation) -> Preparation:
    graph, policies = insert_requantize(made.graph, made.policies)
    return replace(made, graph=graph, policies=policies)


def expand_composites(made: Preparation) -> Preparation:
    graph, policies = expand(made.graph, made.params, made.policies, made.qconfig)
    made.qconfig.check_matches(made.whole, graph)
    return replace(made, graph=graph, policies=policies)


def convert_formats(made: Preparation) -> Preparation:
    graph, policies, notes = insert_conversions(made.graph, made.policies, bounded_values(made.whole))
    return replace(made, graph=graph, policies=policies, notes={**notes, **made.notes})


def fold_norms(made: Preparation) -> Preparation:
    kept = kept_batch_norms(made.graph, made.options.batch_norm)
    graph, params, folded = fold_batch_norm(made.graph, made.params, made.shapes, kept)
    return replace(made, graph=graph, params=params, folded=folded)


def fuse_layers(made: Preparation) -> Preparation:
    """Takes additions and activations into the layers before them, where all are integers."""
    made_of = {new: old for old, new in reversed(list(made.folded.items()))}

    def asks_integers(name: str) -> bool:
        return name not in made.exact and _is_integer(made.policies[made_of.get(name, name)].output)

    def fusible(node: Node, role: str) -> bool:
        own = _is_integer(made.policies[node.name].output)
        return own and (role != "add" or all(map(asks_integers, node.inputs)))

    apart = {made.folded.get(name, name) for name in made.options.unfused}
    graph, fused = fuse(made.graph, made.shapes, fusible, apart)
    return replace(made, graph=graph, fused=fused)


def order_channels(made: Preparation) -> Preparation:
    return replace(made, graph=channels_last(made.graph, made.shapes))


def resolve_outputs(made: Preparation) -> Preparation:
    """A format for every value."""
    strict = made.options.strict
    made = replace(made, groups=decide_groups(made.policies, made.renamed, strict=strict))
    formats = resolve_values(
        made.graph,
        made.types,
        made.asked,
        made.exact,
        made.rules,
        high_precision_outputs=made.options.high_precision_outputs,
        strict=strict,
    )
    if strict:
        check_strict(made.asked, formats, made.rules)
    return replace(made, formats=formats)


def resolve_weights(made: Preparation) -> Preparation:
    """A format for every weight."""
    weights, axes = _resolve_weights(made.graph, made.policies)
    check_kept(made.graph, weights)
    return replace(made, weights=with_exact_ones(made.graph, weights), axes=axes)


def check_limits(made: Preparation) -> Preparation:
    """Raises for what the target cannot run."""
    assert made.formats is not None
    dtypes = {n: made.exact.get(n) or (spec.dtype if spec else "float") for n, spec in made.formats.values.items()}
    _check(made.graph, dtypes, made.weights, made.shapes, made.params, made.target)
    check_fills(made.plan(), made.params, {node.name for node in made.whole.nodes})
    return made


PASSES: tuple[Callable[[Preparation], Preparation], ...] = (
    ask,
    mark_stubs,
    join_mask_operands,
    requantize_operands,
    expand_composites,
    convert_formats,
    fold_norms,
    fuse_layers,
    order_channels,
    resolve_outputs,
    resolve_weights,
    check_limits,
)


def _is_integer(spec: Any) -> bool:
    return isinstance(spec, QuantSpec) and not spec.is_float


def _with_rounding(spec: QuantSpec | None, graph: Graph, name: str, target: Target) -> QuantSpec | None:
    """The spec with the rounding of ties where its integers are made: quantized from real numbers, or rescaled."""
    if spec is None or not is_narrow(spec):
        return spec
    op = graph.by_name[name].op if name in graph.by_name else None
    if hasattr(op, "table"):
        return replace(spec, rounding=target.tables.entry_rounding)
    quantized = op is None or isinstance(op, Constant | Embedding)
    return replace(spec, rounding=target.quantize_rounding if quantized else target.rescale.post_rounding)


def _resolve_weights(graph: Graph, policies: Mapping[str, Requested]) -> tuple[dict[str, QuantSpec], dict[str, int]]:
    weights: dict[str, QuantSpec] = {}
    axes: dict[str, int] = {}
    for node in graph.nodes:
        for role in node.op.weight_roles:
            key, spec = node.params[role], policies[node.name].weight
            if spec is None:
                continue
            if weights.setdefault(key, spec) != spec:
                raise QConfigError(
                    f"weight {key!r} is shared, and its users ask for {weights[key]} and {spec}; give one rule"
                )
            if spec.axis == "out":
                axes[key] = node.op.weight_axis
    return weights, axes


def _check(
    graph: Graph,
    dtypes: Mapping[str, str],
    weights: Mapping[str, QuantSpec],
    shapes: Mapping[str, tuple[int, ...]],
    params: Mapping[str, Array],
    target: Target,
) -> None:
    """Raises one QConfigError that names every node which breaks a limit of an integer target."""
    if not target.integer:
        return
    broken = []

    def operand(name: str) -> Operand:
        return Operand(dtypes[name], real(1), shapes[name])

    for node in graph.nodes:
        weight = next((weights[node.params[r]] for r in node.op.weight_roles if node.params[r] in weights), None)
        if dtypes[node.name] == "float" and weight is None:
            continue
        if dtypes[node.name] == "float16":
            continue  # an island is evaluated in float
        weight_dtype = weight.dtype if weight else None
        found = list(constraints(node.op, [operand(v) for v in node.inputs], operand(node.name), weight_dtype, target))
        if node.op.weight_roles:
            found += kernel_limits(params[node.params["weight"]].shape, target, node.op)
        if len(shapes[node.name]) > target.max_rank:
            found.append(f"rank {len(shapes[node.name])} is above {target.max_rank}")
        broken += [f"{node.name} ({type(node.op).__name__}): {text}" for text in found]
    if broken:
        raise QConfigError(f"{target.name} cannot run {len(broken)} nodes:\n  " + "\n  ".join(broken))
