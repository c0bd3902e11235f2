"""Text for people: tables, graphs as tables, suggestions for mistyped names."""

import math
from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np

_LONGEST_MESSAGE = 600
_LONGEST_VALUE = 60
_NARROWEST = 12  # characters of a column that is cut


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'a' or 'b'?" for near names, else an empty string."""
    near = get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def cut(text: str, longest: int = _LONGEST_MESSAGE) -> str:
    """A text that is not longer than that: its beginning and three dots."""
    return text if len(text) <= longest else text[: longest - 3] + "..."


def short(value: Any) -> str:
    """A value of a file for a message."""
    if isinstance(value, int) and not -(2**64) < value < 2**64:
        return f"an integer of {math.ceil(abs(value).bit_length() * math.log10(2))} digits"
    try:
        return cut(repr(value), _LONGEST_VALUE)
    except (RecursionError, ValueError):
        return f"a {type(value).__name__} that is nested deeply"


def near_or_known(pattern: str, known: Iterable[str]) -> str:
    """`did_you_mean`, also of a glob without its wildcards; where nothing is near, some of the names that there are."""
    known = list(dict.fromkeys(known))
    near = did_you_mean(pattern, known) or did_you_mean(pattern.replace("*", "").strip("."), known)
    if near or not known:
        return near
    rest = f" and {len(known) - 5} more" if len(known) > 5 else ""
    return f"; there are {', '.join(map(repr, known[:5]))}{rest}"


def format_table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """Columns padded to their widest cell, two spaces apart."""
    cells = [tuple(str(c) for c in row) for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def fitted(text: str, width: int, keep: Collection[str] = ()) -> str:
    """A text whose tables, as `format_table` makes them, are cut to a width.

    The widest columns lose characters first, shown by "~": names in the middle, numbers at the end. Where that is not
    enough, columns at the right are left out, and named below; those of `keep` the last ones.
    """
    lines = text.splitlines()
    found: list[str] = []
    at = 0
    while at < len(lines):
        is_table = at + 1 < len(lines) and len(lines[at + 1]) > 3 and set(lines[at + 1]) == {"-"}
        if not is_table or len(lines[at + 1]) <= width:
            found.append(lines[at])
            at += 1
            continue
        starts = [i for i in range(len(lines[at])) if lines[at][i] != " " and (i == 0 or lines[at][:i].endswith("  "))]
        rows = [_cells(lines[at], starts)]
        at += 2
        while at < len(lines) and _is_row(lines[at], starts):
            rows.append(_cells(lines[at], starts))
            at += 1
        found += _narrow(rows, width, keep)
    return "\n".join(found)


def _is_row(line: str, starts: Sequence[int]) -> bool:
    """Whether a line has a second cell, and two spaces in front of each column: what follows a table has not."""
    return len(line.rstrip()) > starts[1] and all(line[at - 2 : at].isspace() for at in starts[1:] if at <= len(line))


def _cells(line: str, starts: Sequence[int]) -> list[str]:
    return [line[a:b].rstrip() for a, b in zip(starts, (*starts[1:], None), strict=True)]


def _narrow(rows: list[list[str]], width: int, keep: Collection[str]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left_out: list[str] = []
    while sum(widths) + 2 * (len(widths) - 1) > width:
        if max(widths) > _NARROWEST:
            widths[widths.index(max(widths))] -= 1
        else:
            at = next((i for i in range(len(widths) - 1, 0, -1) if rows[0][i] not in keep), len(widths) - 1)
            left_out.insert(0, rows[0][at])
            rows = [[*row[:at], *row[at + 1 :]] for row in rows]
            widths.pop(at)
    header, *others = (tuple(_shortened(c, n) for c, n in zip(row, widths, strict=True)) for row in rows)
    note = f"; left out: {', '.join(left_out)}" if left_out else ""
    return [*format_table(header, list(others)).splitlines(), f"(cut to {width} columns; a pipe has all{note})"]


def _shortened(cell: str, width: int) -> str:
    if len(cell) <= width:
        return cell
    head = width - 1 if cell[0].isdigit() else (width - 1) // 2
    return f"{cell[:head]}~{cell[len(cell) - (width - 1 - head) :]}"


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
        entry, found = program.formats[node.name], program.accumulators.get(node.name)
        bound = None if found is None else float(np.asarray(found.worst_case).max())
        worst = "-" if bound is None else f"2^{math.log2(max(bound, 1)):.1f}"
        wide = bound is not None and bound >= 2**31
        accumulator = entry.accumulator + (" (beyond int32)" if wide else "")
        formats = f"{', '.join(entry.inputs)} -> {entry.output}"
        operator = type(node.op).__name__
        rows.append((node.name, operator, ", ".join(node.inputs), formats, entry.kernel or "-", accumulator, worst))
    table = format_table(("name", "operator", "operands", "formats", "kernel", "accumulator", "worst case"), rows)
    islands = [name for name, entry in program.formats.items() if entry.output == "float16"]
    floats = f"\nfloat islands, evaluated in float: {', '.join(islands)}" if islands else ""
    beyond = "".join(
        f"\n{name}: the int32 output saturates for some operands in {_channels(indices)}; give the operand "
        "int8, or the node an output format"
        for name, indices in saturating_channels(program).items()
    )
    outputs = ", ".join(name + _real_by(program, name) for name in program.graph.outputs)
    return f"{program.target.name}\n{table}\noutputs: {outputs}{floats}{beyond}"


def saturating_channels(program: Any) -> dict[str, list[int]]:
    """{node: the channels of its int32 output that saturate for some operands}, of the nodes that have any."""
    masks = {
        n: np.atleast_1d(np.asarray(a.saturating)) for n, a in program.accumulators.items() if a.saturating is not None
    }
    found = {n: np.flatnonzero(mask.reshape(-1, mask.shape[-1]).any(0)).tolist() for n, mask in masks.items()}
    return {name: indices for name, indices in found.items() if indices}


def _real_by(program: Any, name: str) -> str:
    """Of an output behind a `Dequantize`: the value that it makes real, and by which scale; else nothing."""
    if name not in program.formats or program.formats[name].output != "float32":
        return ""
    source = program.graph.by_name[name].inputs[0]
    return f" (real: {source} times {format_scale(program.constants[name]['scale'])})"


def format_scale(scale: Any) -> str:
    """A scale (real per LSB), or the smallest and the largest of several with their number."""
    values = np.asarray(scale)
    low, high = f"{values.min():.4g}", f"{values.max():.4g}"
    return low if low == high else f"{low} .. {high} ({values.size})"


def _channels(indices: Sequence[int], shown: int = 8) -> str:
    """ "channel 3", "channels 0, 1, 5", or the first ones and a count."""
    more = f" and {len(indices) - shown} more" if len(indices) > shown else ""
    return f"channel{'s' if len(indices) > 1 else ''} {', '.join(map(str, indices[:shown]))}{more}"
