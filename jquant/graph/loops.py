"""Finds steps that are alike, one after the other: of a recurrence that was unrolled, and the equal blocks of a net.

The steps of a recurrence have the same operators and weights, equal blocks the same operators and weights of their own.
A graph has every step, because each value of each step has a format and a scale of its own. What evaluates the graph
may still run the steps as one loop, whose program hardly grows with their number.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from jquant.types import Graph, Node

LEAST_STEPS = 6  # of a recurrence; fewer, in a program that is small anyway, stay one after the other
# Of equal blocks, whose weights a loop has to gather in each call: docs/decisions/equal-blocks-run-as-a-loop.md.
FEW_BLOCKS = 8  # where it runs a few times
LEAST_BLOCKS = 16
MANY_BLOCKS = 48  # where it is trained


@dataclass(frozen=True)
class Loop:
    """Steps that are alike. The step before them is like them too, so that its values can start the loop.

    `start`, `stop`  positions of the nodes of the steps in the graph
    `steps`          names of the nodes, a row a step; those of `before` are not among them
    `before`         nodes whose operators differ from step to step and need nothing of the loop, to be evaluated first
    `body`           the first step, with operands renamed where they come from elsewhere in each step:
    `carried`        {operand of the body: (node of the step before the first, index in a row of `steps`)}
    `given`          {operand of the body: its name in each step}
    `params`         {parameter of the body that is another one in each step: its name in each step}
    """

    start: int
    stop: int
    steps: tuple[tuple[str, ...], ...]
    before: tuple[Node, ...]
    body: tuple[Node, ...]
    carried: Mapping[str, tuple[str, int]]
    given: Mapping[str, tuple[str, ...]]
    params: Mapping[str, tuple[str, ...]]


def find_loops(
    graph: Graph, kind: Callable[[Node], Hashable], blocks: int = LEAST_BLOCKS, *, recurrences: bool = True
) -> list[Loop]:
    """The loops of a graph in order, none of which overlap.

    Args:
      graph: a valid graph.
      kind: what has to be equal for two nodes to be the same step of a computation, their operands and the names of
        their parameters apart.
      blocks: how many equal blocks make a loop.
      recurrences: False looks for equal blocks alone.
    """
    kinds = [kind(node) for node in graph.nodes]
    found: list[Loop] = []
    for first, length, count in sorted(_equal_blocks(graph, kinds, blocks), key=lambda run: -run[1] * run[2]):
        loop = _loop(graph, kinds, first, length, count)
        if loop is not None and _is_apart(loop, found):
            found.append(loop)
    for first, length, count in sorted(_recurrences(graph, kinds) if recurrences else (), key=lambda r: -r[1] * r[2]):
        # The first and the last step may be cut short; and a step may begin anywhere in the cycle.
        ends = ((0, 0), (0, 1), (1, 0), (1, 1))
        trials = (
            (first + front * length - back, count - front - rear) for front, rear in ends for back in range(length)
        )
        for start, steps in trials:
            if start < 0 or start + steps * length > len(kinds) or steps <= LEAST_STEPS:
                continue
            loop = _loop(graph, kinds, start, length, steps)
            if loop is not None:
                if _is_apart(loop, found):
                    found.append(loop)
                break
    return sorted(found, key=lambda loop: loop.start)


def _is_apart(loop: Loop, others: Sequence[Loop]) -> bool:
    return all(loop.stop <= other.start or other.stop <= loop.start for other in others)


def _equal_blocks(graph: Graph, kinds: Sequence[Hashable], least: int) -> Iterator[tuple[int, int, int]]:
    """(position, length, count) of runs of nodes whose kinds repeat, cut where the fewest values pass."""
    known: dict[Hashable, int] = {}
    numbers = np.asarray([known.setdefault(kind, len(known)) for kind in kinds])
    passing = _passing(graph)
    taken: list[tuple[int, int]] = []
    for length in range(1, len(numbers) // least + 1):
        same = np.concatenate([[False], numbers[length:] == numbers[:-length], [False]])
        edges = np.flatnonzero(same[1:] != same[:-1])
        for first, last in zip(edges[::2].tolist(), (edges[1::2] + length).tolist(), strict=True):
            if last - first < least * length or any(a <= first and last <= b for a, b in taken):
                continue  # too few, or a multiple of a shorter length
            taken.append((first, last))
            start = min(range(first, first + length), key=lambda position: passing[position])
            if (count := (last - start) // length) >= least:
                yield start, length, count


def _passing(graph: Graph) -> list[int]:
    """Of each position, the number of values from before it that are read at it or behind."""
    made = {node.name: position for position, node in enumerate(graph.nodes)}
    last = {name: position for position, node in enumerate(graph.nodes) for name in node.inputs if name in made}
    change = np.zeros(len(graph.nodes) + 1, np.int64)
    for name, position in last.items():
        change[made[name] + 1] += 1
        change[position + 1] -= 1
    passing: list[int] = np.cumsum(change).tolist()
    return passing


def _recurrences(graph: Graph, kinds: Sequence[Hashable]) -> Iterator[tuple[int, int, int]]:
    """(position, distance, count) of the uses of a weight by nodes of one kind, at equal distances."""
    uses = defaultdict(list)
    for position, node in enumerate(graph.nodes):
        if any(role in node.params for role in node.op.weight_roles):
            uses[kinds[position], node.params].append(position)
    for positions in uses.values():
        begin = 0
        gaps = [b - a for a, b in pairwise(positions)]
        for i in range(1, len(gaps) + 1):
            if i == len(gaps) or gaps[i] != gaps[begin]:
                if i - begin + 1 > LEAST_STEPS:
                    yield positions[begin], gaps[begin], i - begin + 1
                begin = i


def _loop(graph: Graph, kinds: Sequence[Hashable], start: int, length: int, count: int) -> Loop | None:
    """The loop of `count - 1` steps after the one at `start`, if that is what the nodes are."""
    cuts = [start + t * length for t in range(count)]
    columns = [{kinds[cut + i] for cut in cuts} for i in range(length)]
    alike = [i for i in range(length) if len(columns[i]) == 1]
    others = [i for i in range(length) if len(columns[i]) > 1]
    previous, *steps = [[graph.nodes[cut + i] for i in alike] for cut in cuts]
    place = {node.name: (t, i) for t, row in enumerate([previous, *steps]) for i, node in enumerate(row)}
    before = [graph.nodes[cut + i] for cut in cuts[1:] for i in others]
    if not alike or any(place.get(name, (0, 0))[0] > 0 for node in before for name in node.inputs):
        return None
    body: list[Node] = []
    carried: dict[str, tuple[str, int]] = {}
    given: dict[tuple[str, ...], str] = {}
    for i, node in enumerate(steps[0]):
        operands = []
        for port in range(len(node.inputs)):
            names = tuple(row[i].inputs[port] for row in steps)
            match _source(names, place):
                case "constant" | "inside":
                    operands.append(names[0])
                case "given":
                    operands.append(given.setdefault(names, f"{names[0]}, given {len(given)}"))
                case "carried":
                    operands.append(f"{names[0]}, carried")
                    carried[operands[-1]] = names[0], place[names[0]][1]
                case _:
                    return None
        body.append(replace(node, inputs=tuple(operands)))
    if not _recurs(body, carried):
        return None  # steps that could run side by side
    params = _params(steps)
    if params is None:
        return None
    rows = tuple(tuple(node.name for node in row) for row in steps)
    names_of = {key: names for names, key in given.items()}
    if not (carried.keys() | names_of.keys()).isdisjoint(graph.values):
        return None  # a name of ours that is taken
    return Loop(cuts[1], cuts[-1] + length, rows, tuple(before), tuple(body), carried, names_of, params)


def _params(steps: Sequence[Sequence[Node]]) -> dict[str, tuple[str, ...]] | None:
    """`Loop.params`; None where a parameter has a place of its own in some node and is shared by others."""
    found: dict[str, tuple[str, ...]] = {}
    for column in zip(*steps, strict=True):
        for role, key in column[0].params.items():
            keys = tuple(node.params[role] for node in column)
            if found.setdefault(key, keys) != keys:
                return None
    return {key: keys for key, keys in found.items() if len(set(keys)) > 1}


def _source(names: Sequence[str], place: Mapping[str, tuple[int, int]]) -> str:
    """Where an operand comes from, given its names in all steps and (step, node) of what is computed in them.

    "constant": the same value from before the loop; "given": another one in each step; "inside": the step itself;
    "carried": the step before; "": nothing that a loop can do.
    """
    if len(set(names)) == 1 and place.get(names[0], (0, 0))[0] == 0:
        return "constant"
    if not any(name in place for name in names):
        return "given"
    sources = {(t - place[name][0], place[name][1]) if name in place else None for t, name in enumerate(names, 1)}
    if len(sources) > 1 or None in sources:
        return ""
    ((back, _),) = [source for source in sources if source is not None]
    return {0: "inside", 1: "carried"}.get(back, "")


def _recurs(body: Sequence[Node], carried: Mapping[str, tuple[str, int]]) -> bool:
    """Whether some carried value is computed from itself, so that a step has to wait for the one before."""
    needs = {key: {key} for key in carried}
    for node in body:
        needs[node.name] = set[str]().union(*(needs.get(name, set()) for name in node.inputs))
    waiting = {key: needs[body[i].name] for key, (_, i) in carried.items()}
    while free := [key for key, others in waiting.items() if others.isdisjoint(waiting)]:
        for key in free:
            del waiting[key]
    return bool(waiting)
