"""The front door from JAX: a function to a graph. `reader` walks the jaxpr, `primitives` and `rules` are tables."""

from jquant.functions.trace.function import trace

__all__ = ["trace"]
