"""Blocks of a graph: stretches of nodes between values that everything behind them is made of."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from jquant.graph.float import value_shapes
from jquant.plan.scales import check_is_model
from jquant.text import format_table
from jquant.types import FrozenMap, Graph, Input, Model, Node, Plan, QConfigError

T = TypeVar("T")
_WHOLE = 3  # a branched stretch stays whole up to so many times the layers of a straight one


@dataclass(frozen=True)
class Block:
    """Consecutive nodes: `inputs` are values that they read from outside, `outputs` those that others read of them."""

    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def params(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(key for node in self.nodes for key in node.params.values()))

    @property
    def layers(self) -> tuple[str, ...]:
        """The nodes with a weight."""
        return tuple(node.name for node in self.nodes if node.op.weight_roles)


@dataclass(frozen=True)
class Blocks:
    """The blocks of a plan in order, every node in one of them; `print` shows them."""

    all: tuple[Block, ...]

    def __str__(self) -> str:
        rows = [(", ".join(b.inputs), ", ".join(b.layers) or "-", ", ".join(b.outputs)) for b in self.all]
        return format_table(("reads", "layers", "makes"), rows)


def find_blocks(model: Model, *, layers: int = 3) -> Blocks:
    """Cuts a graph where one value is all that later nodes read: behind each residual block, and between single layers.

    A branched stretch (a residual block, an inverted residual with its shortcut) is one block, unless it has more than
    3 * `layers` layers, as between the ends of a long skip; then it is cut behind every `layers` of them, and its parts
    hand on several values. Straight runs of single layers are joined, up to `layers` of them. What has no layer, such
    as a mean, begins the block behind it. Cuts are at values with a scale of their own, or in float.

    Args:
      model: what `prepare` or `calibrate` returned.
      layers: at least 1.

    Raises:
      QConfigError: `layers` below 1.

    References:
      Li et al. 2021, BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction, section 3.2.

    Example:
      print(jq.ptq.find_blocks(model))
    """
    if layers < 1:
        raise QConfigError(f"layers must be at least 1, not {layers!r}")
    check_is_model(model)
    stretches = [part for whole in _stretches(model) for part in _within_limit(whole, layers)]
    joined = _joined(stretches, layers)
    return Blocks(tuple(_block(model.plan.graph, [n for run in nodes for n in run]) for nodes in joined))


_Run = tuple[Node, ...]  # consecutive nodes, behind which a cut is allowed


def _stretches(model: Model) -> list[list[_Run]]:
    """Stretches between cuts at one value; each as the runs between all the cuts that are allowed in it."""
    nodes, cuttable, live = model.plan.graph.nodes, _cuttable(model), _live_behind(model.plan.graph)
    found, runs, begin = list[list[_Run]](), list[_Run](), 0
    for i, node in enumerate(nodes):
        if i + 1 < len(nodes) and not live[node.name] <= cuttable:
            continue
        runs.append(nodes[begin : i + 1])
        begin = i + 1
        if len(live[node.name]) <= 1:
            found.append(runs)
            runs = []
    return [*found, runs] if runs else found


def _cuttable(model: Model) -> set[str]:
    """Values with a scale of their own, or in float, and with samples along the first axis."""
    plan, two, three = model.plan, *(value_shapes(model.plan.graph, model.params, n) for n in (2, 3))
    batched = {name for name in two if two[name][:1] == (2,) and three[name] == (3, *two[name][1:])}
    plain = {name for name in plan.graph.values if plan.values.get(name) is None and name not in plan.exact}
    return batched & (plain | set(plan.owned))


def _live_behind(graph: Graph) -> dict[str, set[str]]:
    """{node: the values of nodes up to it that later nodes read}."""
    found, live = {}, set[str]()
    made = set(graph.by_name)
    for node in reversed(graph.nodes):
        found[node.name] = set(live)
        live = (live - {node.name}) | (set(node.inputs) & made)
    return found


def _within_limit(runs: list[_Run], layers: int) -> list[list[_Run]]:
    if _layers_of(runs) <= _WHOLE * layers:
        return [runs]
    parts: list[list[_Run]] = [[]]
    for run in runs:
        if parts[-1] and _layers_of([*parts[-1], run]) > layers:
            parts.append([])
        parts[-1].append(run)
    return parts


def _joined(stretches: list[list[_Run]], layers: int) -> list[list[_Run]]:
    """Stretches of one layer joined up to `layers` of them; those without a layer go to the block behind.

    So what a block makes is seen before a pool or a mean, which few numbers would be left of.
    """
    found: list[list[_Run]] = []
    straight = False  # whether the last block is a run of single layers
    waiting: list[_Run] = []
    for runs in stretches:
        count, waiting = _layers_of(runs), waiting + runs
        if count == 0:
            continue
        if straight and count == 1 and _layers_of(found[-1]) < layers:
            found[-1] = found[-1] + waiting
        else:
            found.append(waiting)
            straight = count == 1
        waiting = []
    return [*found[:-1], found[-1] + waiting] if found else [waiting]


def _layers_of(runs: list[_Run]) -> int:
    return sum(bool(node.op.weight_roles) for run in runs for node in run)


def _block(graph: Graph, nodes: list[Node]) -> Block:
    own = {node.name for node in nodes}
    inputs = dict.fromkeys(name for node in nodes for name in node.inputs if name not in own)
    outputs = [
        node.name
        for node in nodes
        if node.name in graph.outputs or any(reader.name not in own for reader in graph.consumers[node.name])
    ]
    return Block(tuple(nodes), tuple(inputs), tuple(outputs))


# ---------------------------------------------------------------------------------------------------------------------
# A block as a model


@dataclass(frozen=True)
class Names:
    """{name in the block's model: name in the model that it is cut from}."""

    values: Mapping[str, str]
    params: Mapping[str, str]


def names_of(block: Block) -> Names:
    """Names by position, so that blocks of equal form have equal plans."""
    values = {f"x{i}": name for i, name in enumerate(block.inputs)}
    values |= {f"n{i}": node.name for i, node in enumerate(block.nodes)}
    return Names(values, {f"p{i}": key for i, key in enumerate(block.params)})


Shapes = Mapping[str, tuple[int, ...]]


def cut_out(model: Model, block: Block, shapes: Shapes) -> Model:
    """The block as a model of its own, its names those of `names_of`; `shapes` of the values of the whole model."""
    names = names_of(block)
    params = {new: model.params[old] for new, old in names.params.items()}
    named = {**names.values, **names.params}
    qparams = {new: model.qparams[old] for new, old in named.items() if old in model.qparams}
    return Model(_plan_of(model.plan, block, names, shapes), params, qparams)


def _plan_of(plan: Plan, block: Block, names: Names, shapes: Shapes) -> Plan:
    values = {old: new for new, old in names.values.items()}
    params = {old: new for new, old in names.params.items()}
    nodes = tuple(
        replace(
            node,
            name=values[node.name],
            inputs=tuple(values[name] for name in node.inputs),
            params=FrozenMap({role: params[key] for role, key in node.params.items()}),
            call_of="",
        )
        for node in block.nodes
    )
    dtypes = {entry.name: entry.dtype for entry in plan.graph.inputs}
    inputs = tuple(Input(values[name], (None, *shapes[name][1:]), dtypes.get(name, "float32")) for name in block.inputs)
    graph = Graph(inputs, nodes, tuple(values[name] for name in block.outputs))
    return replace(
        plan,
        graph=graph,
        values=_renamed(plan.values, values),
        weights=_renamed(plan.weights, params),
        weight_axis=_renamed(plan.weight_axis, params),
        owned=tuple(values[name] for name in plan.owned if name in values),
        resolutions=(),
        renamed=FrozenMap(),
        exact=_renamed(plan.exact, values),
        turned=_renamed(plan.turned, params),
        moved=_renamed(plan.moved, values),
    )


def _renamed(entries: Mapping[str, T], names: Mapping[str, str]) -> FrozenMap[T]:
    return FrozenMap({new: entries[old] for old, new in names.items() if old in entries})
