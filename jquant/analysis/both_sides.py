"""The values of both sides of a comparison, of one batch."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jquant.analysis.meanings import Side, alone_of, stacked_values_of
from jquant.graph.rolled import parted
from jquant.host.progress import stages
from jquant.numerics.namespace import to_host
from jquant.types import Array

Arrays = Mapping[str, Any]


class Values(NamedTuple):
    """Of a batch, by name: in both modes, and each node of `a` alone on the operands of `b`."""

    first: Arrays
    second: Arrays
    alone: Arrays


_values = jax.jit(stacked_values_of, static_argnames=("mode",))


_alone = jax.jit(alone_of, static_argnames=("mode",))


def _all_of(side: Side, mode: Any, inputs: dict[str, Array]) -> dict[str, Any]:
    return parted(jax.block_until_ready(_values(side, mode, inputs)), side.model.plan.graph.values)


def evaluated(
    modes: Sequence[Any], sides: Sequence[Side], inputs: dict[str, Array], given: Sequence[Arrays | None]
) -> Values:
    """The values of one batch: those of one device on the host, where the rest needs no program for each shape."""
    names = (f"baseline, {modes[0]}", f"against it, {modes[1]}", "each node alone")
    with stages("comparing", names) as begin:
        both = []
        for name, mode, side, arrays in zip(names, modes, sides, given, strict=False):
            begin(name)
            both.append(_all_of(side, mode, inputs) if arrays is None else arrays)
        begin(names[2])
        alone = to_host(_alone(sides[0], modes[0], dict(both[1])) if given[0] is None else {})
        return Values(to_host(both[0]), to_host(both[1]), alone)
