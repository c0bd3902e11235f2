"""Questions about section 6, lookup tables: entries, outer lines, what lies between two entries, periods, placement."""

from collections.abc import Iterator

import numpy as np

from jquant.board.probes.build import Net, Probe
from jquant.board.probes.groups import LINES, SEGMENTS
from jquant.board.probes.rescale import images
from jquant.ops.lookup import TableOptions
from jquant.ops.table import LeakyRelu, Sigmoid, Sin, Tanh

_POINTS = (-4.0, -2.5, -1.0, 0.5, 2.0, 3.0, 4.0)  # real; six tables
_STEP = 2.0**-12  # of an operand that reaches from -8 to 8
_OUTER = ("tables.outer", "tables.line_rounding")


def entries() -> Probe:
    """All integers, half of which lie half way between two of the result."""
    net = Net("table_entries", "A function of an int8 operand whose exact results lie half way between two integers.")
    net.input("x", images(np.arange(-128, 128)), "int8", 0.25)
    net.node("y", LeakyRelu(negative_slope=0.5), ("x",), ("int8", 0.5), ("tables.entry_rounding",))
    return net.done()


def outer_lines() -> Probe:
    net = Net("table_lines", "Functions of an int16 operand beyond their outer boundaries, by lines of given slopes.")
    beyond = np.concatenate([np.arange(-32768, -16384, 331), np.arange(16385, 32768, 331)])[:96]
    net.input("x", images(beyond), "int16", _STEP)
    asks = (*LINES, *_OUTER, "tables.entry_rounding")
    for i, (left, right) in enumerate(((0.0731, 0.031), (0.0047, 0.00093), (0.41, 0.00011))):
        table = TableOptions(placement=_POINTS, symmetric=False, left_slope=left, right_slope=right)
        net.node(f"y_{i}", Sigmoid(table=table), ("x",), ("int16", 2.0**-14), asks)
    return net.done()


def segments() -> Probe:
    net = Net("table_segments", "A function of an int16 operand between given boundaries of its tables.")
    inside = np.concatenate([np.arange(-16384, 16384, 97), np.arange(-16384, -16300), np.arange(2040, 2080)])
    net.input("x", images(inside[: len(inside) // 8 * 8]), "int16", _STEP)
    table = TableOptions(placement=_POINTS, symmetric=False)
    net.node("y", Tanh(table=table), ("x",), ("int16", 2.0**-15), SEGMENTS)
    return net.done()


def angles() -> Probe:
    net = Net("table_angles", "A sine of an int16 operand over several periods.")
    net.input("x", images(np.arange(-32768, 32768, 128)), "int16", 2.0**-10)
    table = TableOptions(placement=(-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0), symmetric=False)
    net.node("y", Sin(table=table), ("x",), ("int16", 2.0**-15), (*SEGMENTS, *_OUTER, "tables.angle_rounding"))
    return net.done()


def counts() -> Probe:
    net = Net("table_counts", "A function of an int16 operand in tables of equal width, as many as the march makes.")
    net.input("x", images(np.arange(-32768, 32768, 97)[:672]), "int16", _STEP)
    table = TableOptions(placement="evenly", symmetric=False)
    net.node("y", Tanh(table=table), ("x",), ("int16", 2.0**-15), (*SEGMENTS, *_OUTER, "tables.count"))
    return net.done()


def table_probes() -> Iterator[Probe]:
    yield entries()
    yield outer_lines()
    yield segments()
    yield angles()
    yield counts()
