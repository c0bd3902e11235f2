"""The graph as data: validation, printing, JSON, the evaluation loop, and passes from graph to graph."""
