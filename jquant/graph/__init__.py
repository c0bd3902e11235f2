"""The graph as data: validation, printing, JSON, the evaluation loop, and passes from graph to graph."""

from jquant.graph.checks import validate
from jquant.graph.float import evaluate_float
from jquant.graph.serialize import graph_from_json, graph_to_json

__all__ = [
    "evaluate_float",
    "graph_from_json",
    "graph_to_json",
    "validate",
]
