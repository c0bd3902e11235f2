"""Text for people: tables, graphs as tables, suggestions for mistyped names."""

import math
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'a' or 'b'?" for near names, else an empty string."""
    near = get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def format_table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """Columns padded to their widest cell, two spaces apart."""
    cells = [tuple(str(c) for c in row) for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def format_node(node: Any) -> tuple[str, str, str, str]:
    fields = ", ".join(f"{k}={v}" for k, v in vars(node.op).items())
    return node.name, type(node.op).__name__, ", ".join(node.inputs), fields


def format_graph(graph: Any) -> str:
    """The graph as a table, a row a node."""
    inputs: list[tuple[str, ...]] = [(i.name, "Input", "", f"shape={i.shape}, dtype={i.dtype}") for i in graph.inputs]
    table = format_table(("name", "operator", "operands", "attributes"), inputs + [format_node(n) for n in graph.nodes])
    return f"{table}\noutputs: {', '.join(graph.outputs)}"


def format_program(program: Any) -> str:
    """An integer program as a table: formats and accumulators by node, and the worst case of each accumulator."""
    rows = []
    for node in program.graph.nodes:
        entry = program.formats[node.name]
        worst = "-" if entry.worst_case is None else f"2^{math.log2(max(entry.worst_case, 1)):.1f}"
        beyond = entry.worst_case is not None and entry.worst_case >= 2**31
        accumulator = entry.accumulator + (" (beyond int32)" if beyond else "")
        formats = f"{', '.join(entry.inputs)} -> {entry.output}"
        operator = type(node.op).__name__
        rows.append((node.name, operator, ", ".join(node.inputs), formats, entry.kernel or "-", accumulator, worst))
    table = format_table(("name", "operator", "operands", "formats", "kernel", "accumulator", "worst case"), rows)
    islands = [name for name, entry in program.formats.items() if entry.output == "float16"]
    floats = f"\nfloat islands, evaluated in float: {', '.join(islands)}" if islands else ""
    return f"{program.target.name}\n{table}\noutputs: {', '.join(program.graph.outputs)}{floats}"
