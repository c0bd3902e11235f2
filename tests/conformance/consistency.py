"""How far fake-quant and the integers are apart at each consistency level, layer by layer in a deep network."""

from typing import NamedTuple

from support import graphs

import jquant as jq

DEPTH = 8


class Level(NamedTuple):
    """Shares of elements at least one LSB apart, after the first convolution, after half of them, and after all."""

    level: int
    weights: str
    rounding: str
    first: float
    middle: float
    last: float
    largest: float  # LSB, over all layers


def network(seed: int = 0, channels: int = 16, size: int = 16) -> tuple[jq.Graph, dict]:
    """Eight 3x3 convolutions with batch norm and relu, and residual adds from the third on."""
    build = graphs.Builder(seed)
    build.shapes["x"] = (3, size, size)
    x, shape = "x", (channels, size, size)
    for depth in range(DEPTH):
        y = build.batch_norm(build.conv(x, channels, 3))
        y = build.add(jq.ops.Add(), (y, x), shape) if depth >= 2 else y
        x = build.add(jq.ops.Relu(), (y,), shape)
    return build.graph(x, size=size), build.params


def measure(level: int, dtype: str, rounding: str, batch: int = 16) -> Level:
    """One row: calibrated on one batch, compared on another. `rounding` is the target's `rescale.post_rounding`."""
    graph, params = network()
    weight = jq.QuantSpec(dtype=dtype, axis="out")
    config = jq.config.consistency(jq.QConfig({"*": jq.Policy(weight=weight, output=jq.int8())}), level)
    target = jq.targets.NASH_E.with_fields({"rescale.post_rounding": rounding})
    model = jq.prepare(graph, params, config, target=target, high_precision_outputs=False)
    model = jq.calibrate(model, [graphs.images(1, graph, batch)])
    found = jq.analysis.compare(model, graphs.images(2, graph, batch), "fake_quant", "bit_true")
    layers = [row for row in found.rows if row.operator == "Conv"]
    shares = [layers[i].differing for i in (0, DEPTH // 2 - 1, DEPTH - 1)]
    return Level(level, dtype, rounding, *shares, max(row.max_lsb or 0.0 for row in layers))


def levels() -> list[Level]:
    roundings = ("half_up", "half_even")
    return [measure(level, dtype, r) for dtype in ("int8", "int4") for r in roundings for level in (0, 1, 2)]


def markdown(rows: list[Level]) -> list[str]:
    lines = [
        f"A network of {DEPTH} convolutions with batch norm, relu and residual adds, random weights: the share of",
        "elements at which fake-quant and the integers are an LSB or more apart. At level 2 every ratio of scales is a",
        "power of two: a truncated pre-shift and half-up rounding after it are then the half-up rounding of the whole",
        "accumulator, and fake-quant, which rounds ties as the target does at that place, gives the same integers.",
        "What is left with int4 weights comes from the fused add: its operand is finer than the accumulator: rounded.",
        "",
        f"| level | weights | post_rounding | after 1 | after {DEPTH // 2} | after {DEPTH} | largest, LSB |",
        "|---:|---|---|---:|---:|---:|---:|",
    ]
    for r in rows:
        shares = " | ".join(f"{100 * v:.3f} %" for v in (r.first, r.middle, r.last))
        lines.append(f"| {r.level} | {r.weights} | {r.rounding} | {shares} | {r.largest:.1f} |")
    return lines


if __name__ == "__main__":
    print("\n".join(markdown(levels())))
