"""Whether two graphs are the same up to names: operators, edges and the numbers of their parameters."""

from collections.abc import Mapping
from itertools import dropwhile
from typing import Any

import numpy as np

from jquant.ops import Constant
from jquant.types import Graph


def unnamed(graph: Graph, params: Mapping[str, Any]) -> tuple[Any, ...]:
    """The outputs of a graph as nested tuples, in which inputs are numbers and parameters arrays as bytes.

    The shape of a constant is without the leading axes of size 1, which broadcasting would put in.
    """
    made: dict[str, Any] = {entry.name: (i, entry.shape, entry.dtype) for i, entry in enumerate(graph.inputs)}
    for node in graph.nodes:
        roles = {role: np.asarray(params[key]) for role, key in node.params.items()}
        if isinstance(node.op, Constant):
            roles = {role: a.reshape(list(dropwhile(lambda n: n == 1, a.shape))) for role, a in roles.items()}
        arrays = tuple((role, a.shape, str(a.dtype), a.tobytes()) for role, a in sorted(roles.items()))
        made[node.name] = (node.op, tuple(made[name] for name in node.inputs), arrays)
    return tuple(made[name] for name in graph.outputs)
