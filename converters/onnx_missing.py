"""Scales that a QDQ file does not have: of what it leaves float between integers, and inside softmax and norms.

Without data they follow from what is known: the range of an operator on the ranges of its operands, and the part of
that range which the rounded result of the next function still tells apart. With batches they are calibrated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

import jquant as jq
import jquant.ops as ops
from jquant.graph.float import value_shapes
from jquant.graph.operator import eval_float
from jquant.types import MIN_SCALE, Array, ConversionError, Model, Node, Op, Plan

Range = tuple[float, float]  # real
SAMPLES = 4097
_MOVES = (
    ops.AdaptiveAvgPool, ops.AdaptiveMaxPool, ops.AvgPool, ops.ChannelShuffle, ops.Dropout, ops.Expand, ops.Flatten,
    ops.Flip, ops.Gather, ops.IndexSelect, ops.MaxPool, ops.Mean, ops.Permute, ops.PixelShuffle, ops.PixelUnshuffle,
    ops.ReduceMax, ops.ReduceMin, ops.Requantize, ops.Reshape, ops.Roll, ops.Slice, ops.Sort, ops.StopGradient,
    ops.Tile, ops.TopK,
)  # fmt: skip
_WITH_ZERO = (ops.GridSample, ops.Interpolate, ops.MaskedFill, ops.Pad, ops.RoiAlign, ops.Warp)
_UNIONS = (ops.Cat, ops.Maximum, ops.Minimum, ops.Stack, ops.Where)
_UNARY = (ops.Abs, ops.Clamp, ops.Neg, ops.Relu, ops.Relu6, ops.Scale)


def calibrate_missing(model: Model, batches: Iterable[Any]) -> Model:
    """The model with the scales that it does not have yet, from batches; those that it has stay, bit for bit.

    Args:
      model: what `model_from_onnx` returned for a file without the scales of its values.
      batches: as for `jq.calibrate`.

    Raises:
      CalibrationError, InputError: as `jq.calibrate`.
    """
    found = jq.calibrate(model, batches)
    return model.replace(qparams={**found.qparams, **model.qparams})


def missing_scales(plan: Plan, params: Mapping[str, Array], known: Mapping[str, Any]) -> dict[str, float]:
    """{value: real per LSB} for every value of `plan.trained` that `known` lacks.

    Raises:
      ConversionError: values whose range does not follow from their operands; batches then tell.
    """
    wanted = [name for name in plan.trained if name not in known and name not in plan.weights]
    if not wanted:
        return {}
    ranges = _Ranges(plan, params, known)
    ranges.walk()
    lost = [name for name in wanted if ranges.found.get(name) is None]
    if lost:
        raise ConversionError(
            "the file has no scale for "
            + ", ".join(map(repr, lost[:8]))
            + (f" and {len(lost) - 8} more" if len(lost) > 8 else "")
            + ", and none follows from the operands: give batches=[...], which these scales are then calibrated on, or "
            "import the float model with from_onnx and calibrate it"
        )
    scales: dict[str, float] = {}
    for name in reversed(wanted):
        scales[name] = _scale(ranges.reached(name, {**known, **scales}), plan.spec(name).range[1])
    return scales


def _scale(bounds: Range, largest: int) -> float:
    return max(float(np.float32(max(-bounds[0], bounds[1], 0.0) / largest)), MIN_SCALE)


class _Ranges:
    """The range of every value, as intervals."""

    def __init__(self, plan: Plan, params: Mapping[str, Array], known: Mapping[str, Any]) -> None:
        self.plan, self.params, self.known = plan, params, known
        self.shapes = value_shapes(plan.graph, params)
        self.found: dict[str, Range | None] = {}

    def walk(self) -> None:
        graph = self.plan.graph
        for entry in graph.inputs:
            self.found[entry.name] = self.grid(entry.name) or self.readers_grid(entry.name)
        for node in graph.nodes:
            try:
                computed = self.of(node)
            except (ArithmeticError, ValueError, TypeError):
                computed = None
            if computed is not None and not np.isfinite(computed).all():
                computed = None
            self.found[node.name] = _both(computed, self.grid(node.name))

    def grid(self, name: str) -> Range | None:
        """What the integers of a value with a scale reach."""
        spec = self.plan.values[name]
        if spec is None or spec.is_float or spec.is_high_precision or name not in self.plan.owned:
            return None
        scale = spec.fixed_scale if spec.fixed_scale is not None else self.known.get(name)
        return None if scale is None else (spec.range[0] * float(scale), spec.range[1] * float(scale))

    def readers_grid(self, name: str) -> Range | None:
        """Of an input without a scale: the widest of what its readers round it to."""
        found = [self.grid(r.name) for r in self.plan.graph.consumers[name] if isinstance(r.op, ops.Requantize)]
        ranges = [f for f in found if f is not None]
        return (min(f[0] for f in ranges), max(f[1] for f in ranges)) if ranges else None

    def of(self, node: Node) -> Range | None:
        op = node.op
        if isinstance(op, ops.Constant | ops.Embedding):
            array = np.asarray(self.params[next(iter(node.params.values()))])
            return float(array.min()), float(array.max())
        number = [name for name in node.inputs if name not in self.plan.exact]
        operands = [self.found.get(name) for name in number]
        if not operands or any(r is None for r in operands):
            return None
        ranges = [r for r in operands if r is not None]
        if isinstance(op, ops.Conv | ops.ConvTranspose | ops.Linear):
            return self.layer(node, ranges)
        if special := self.known_pattern(node):
            return special
        if isinstance(op, _MOVES):
            return ranges[0]
        if isinstance(op, _WITH_ZERO):
            value = float(getattr(op, "value", 0.0) or 0.0)
            return min(ranges[0][0], 0.0, value), max(ranges[0][1], 0.0, value)
        if isinstance(op, _UNIONS):
            return min(r[0] for r in ranges), max(r[1] for r in ranges)
        if len(node.inputs) == 1 and (isinstance(op, _UNARY) or hasattr(op, "table")):
            return _sampled(op, ranges[0])
        return self.arithmetic(node, ranges)

    def arithmetic(self, node: Node, ranges: list[Range]) -> Range | None:
        op, a, b = node.op, ranges[0], ranges[-1]
        if isinstance(op, ops.Add):
            return a[0] + b[0], a[1] + b[1]
        if isinstance(op, ops.Sub):
            return a[0] - b[1], a[1] - b[0]
        if isinstance(op, ops.Mul):
            products = [x * y for x in a for y in b]
            return (0.0 if node.inputs[0] == node.inputs[1] else min(products)), max(products)
        if isinstance(op, ops.Sum):
            count = _elements(self.shapes[node.inputs[0]], op.axes)
            return min(a[0] * count, a[0]), max(a[1] * count, a[1])
        if isinstance(op, ops.MatMul):
            shape = self.shapes[node.inputs[0]]
            inner = shape[-2] if getattr(op, "transpose_a", False) else shape[-1]
            products = [x * y * inner for x in a for y in b]
            return min(products), max(products)
        if isinstance(op, ops.PRelu):
            slope = np.asarray(self.params[node.params["weight"]])
            ends = [a[0] * float(slope.min()), a[0] * float(slope.max())]
            return min(*ends, 0.0), max(*ends, a[1])
        return None

    def known_pattern(self, node: Node) -> Range | None:
        """The sum of a softmax is 1 at least; a normalized value is sqrt(n) at most."""
        op, graph = node.op, self.plan.graph

        def maker(name: str) -> Node | None:
            return graph.by_name.get(name)

        if isinstance(op, ops.Sum):
            exp = maker(node.inputs[0])
            if exp is not None and isinstance(exp.op, ops.Exp) and self.plan.spec(exp.inputs[0]).fixed_scale:
                return 1.0, float(_elements(self.shapes[node.inputs[0]], op.axes))
        if isinstance(op, ops.Mul):
            for value, other in (node.inputs, node.inputs[::-1]):
                inverse = maker(other)
                mean = maker(inverse.inputs[0]) if inverse is not None and isinstance(inverse.op, ops.Rsqrt) else None
                square = maker(mean.inputs[0]) if mean is not None and isinstance(mean.op, ops.Mean) else None
                if square is not None and isinstance(square.op, ops.Mul) and square.inputs == (value, value):
                    count = float(np.sqrt(_elements(self.shapes[value], mean.op.axes)))  # type: ignore[union-attr]
                    return -count, count
        return None

    def layer(self, node: Node, ranges: list[Range]) -> Range:
        """A convolution or linear layer at its worst case by channel, with what it takes in."""
        op: Any = node.op
        key = node.params["weight"]
        weight = np.asarray(self.params[key], np.float64)
        axis = self.plan.weight_axis.get(key, op.weight_axis)
        weight = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
        low, high = min(ranges[0][0], 0.0), max(ranges[0][1], 0.0)
        above, below = np.maximum(weight, 0).sum(1), np.minimum(weight, 0).sum(1)
        least, most = above * low + below * high, above * high + below * low
        if "bias" in node.params:
            bias = np.asarray(self.params[node.params["bias"]], np.float64)
            if bias.shape == least.shape:
                least, most = least + bias, most + bias
            else:
                least, most = least.min() + bias.min(), most.max() + bias.max()
        found = float(np.min(least)), float(np.max(most))
        if getattr(op, "addend", False):
            found = found[0] + ranges[1][0], found[1] + ranges[1][1]
        activation = getattr(op, "activation", "none")
        if activation != "none":
            top = 6.0 if activation == "relu6" else np.inf
            found = max(found[0], 0.0), min(max(found[1], 0.0), top)
        return found

    def reached(self, name: str, scales: Mapping[str, Any]) -> Range:
        """The part of a range that the rounded results of all readers tell apart."""
        bounds = self.found[name]
        assert bounds is not None
        readers = self.plan.graph.consumers[name]
        if not readers or name in self.plan.graph.outputs:
            return bounds
        parts = [self.told_apart(reader, bounds, scales) for reader in readers]
        return max(bounds[0], min(p[0] for p in parts)), min(bounds[1], max(p[1] for p in parts))

    def told_apart(self, reader: Node, bounds: Range, scales: Mapping[str, Any]) -> Range:
        spec = self.plan.values[reader.name]
        scale = None if spec is None or spec.is_float else scales.get(reader.name, spec.fixed_scale)
        plain = isinstance(reader.op, ops.Requantize) or hasattr(reader.op, "table")
        if spec is None or scale is None or not plain or len(reader.inputs) != 1 or spec.is_high_precision:
            return bounds
        low, high = spec.range

        def edge(end: float) -> float:
            """Beyond which the rounded result is as at the end."""
            if end == 0:
                return 0.0
            x = np.concatenate([[0.0], np.geomspace(abs(end) * 1e-6, abs(end), SAMPLES - 1)]) * np.sign(end)
            y = _evaluate(reader.op, x)
            steps = np.clip(np.rint(y / float(scale)), low, high)
            other = np.flatnonzero(steps != steps[-1])
            return float(x[min(other[-1] + 1, len(x) - 1)]) if len(other) else 0.0

        if not bounds[0] <= 0 <= bounds[1]:
            return bounds
        found = edge(bounds[0]), edge(bounds[1])
        return found if np.isfinite(found).all() and found[1] > found[0] else bounds


def _both(a: Range | None, b: Range | None) -> Range | None:
    if a is None or b is None:
        return a or b
    found = max(a[0], b[0]), min(a[1], b[1])
    return found if found[0] <= found[1] else b


def _elements(shape: tuple[int, ...], axes: Iterable[int]) -> int:
    return int(np.prod([shape[axis] for axis in axes]))


def _evaluate(op: Op, x: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        result = op if not isinstance(op, ops.Requantize) else None
        return x if result is None else np.asarray(eval_float(op, jnp.asarray(x, jnp.float32)), np.float64)


def _sampled(op: Op, bounds: Range) -> Range | None:
    """The range of a function of one value: of 1/x and 1/sqrt(x), the domain is the operand's."""
    x = np.unique(np.concatenate([np.linspace(*bounds, SAMPLES), np.clip([0.0], *bounds)]))
    if isinstance(op, ops.Rsqrt | ops.Sqrt | ops.Log):
        x = x[x >= 0]
    y = _evaluate(op, x)
    if not np.isfinite(y).all() or not y.size:
        return None
    return float(y.min()), float(y.max())
