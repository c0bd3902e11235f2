"""The error of every value of a graph, as metrics of `jq.evaluate`: what adds up over batches, devices and processes.

On the devices a value is cut down to some numbers in one pass over it. A sum is two float32 numbers, of which the
second holds the bits that the first one lost (two-sum): each term is rounded to float32, and the number of terms adds
nothing to that. Sums are in units of a power of two near the scale of the value, so that squares do not overflow.

Source: D. Knuth, The Art of Computer Programming, volume 2, 4.2.2, theorem B.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.analysis.meanings import Side, alone_of, values_of
from jquant.analysis.metrics import BINS, Histogram, difference, places
from jquant.analysis.statistics import Statistics
from jquant.graph.float import value_shapes
from jquant.meanings.meaning import Mode
from jquant.ops.composite import MASKED
from jquant.ops.table import Exp
from jquant.types import Array, Params, Plan

COUNTS = ("size", "saturated", "differing")
EXTREMES = (
    "-minimum", "maximum", "-b_minimum", "b_maximum", "max_error", "max_lsb", "own_max_error", "own_max_lsb",
)  # fmt: skip
SUMS = ("signal", "b_signal", "product", "noise", "off", "own_signal", "own_noise")


@dataclass(frozen=True)
class Layer:
    """One value of a plan.

    Attributes:
      axis: that of the batch; None where it has none.
      joins: whether the batch is no axis of its own, so that it does not show where padding lies.
      limits: integers, of a value that is rounded and saturated.
      masked_as: the value whose masked elements are those of this one, too.
    """

    name: str
    axis: int | None
    joins: bool
    limits: tuple[int, int] | None
    masked_as: str | None


def layers_of(plan: Plan, params: Params, steps: Mapping[str, Array | None]) -> tuple[Layer, ...]:
    """The values of a plan that are numbers, in graph order. `steps`: real per LSB, of those that are rounded."""
    two, three = (value_shapes(plan.graph, params, batch) for batch in (2, 3))
    found = []
    for name in steps:
        moved = [i for i, pair in enumerate(zip(two[name], three[name], strict=True)) if pair[0] != pair[1]]
        own = len(moved) == 1 and (two[name][moved[0]], three[name][moved[0]]) == (2, 3)
        node, spec = plan.graph.by_name.get(name), plan.values[name]
        found.append(
            Layer(
                name,
                moved[0] if own else None,
                bool(moved) and not own,
                None if steps[name] is None or spec is None else spec.range,
                node.inputs[0] if node is not None and isinstance(node.op, Exp) else None,
            )
        )
    return tuple(found)


def units_of(steps: Mapping[str, Array | None]) -> np.ndarray:
    """[values] float32: the power of two of each value's sums, real."""
    largest = [1.0 if step is None else float(np.max(np.asarray(step))) for step in steps.values()]
    return np.exp2(np.round(np.log2(largest))).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Both sides of a batch


class Bins(NamedTuple):
    """Of each value: `low` and `high` [values] real, over all of the data, and whether a mask leaves out all of it."""

    low: Any
    high: Any
    is_masked: Any


class Given(NamedTuple):
    """What both sides are computed from, beside what the metrics read; `bins` in the pass that counts histograms."""

    sides: tuple[Side, Side]
    steps: dict[str, Array | None]
    units: Any
    bins: Bins


class Seen(NamedTuple):
    """Values of a batch by name, real, of both sides."""

    first: dict[str, Array]
    second: dict[str, Array]
    given: Given


@dataclass(frozen=True)
class Both:
    """`(given, inputs by name) -> Seen`."""

    a: Mode
    b: Mode

    def __call__(self, given: Given, inputs: Mapping[str, Array]) -> Seen:
        first, second = given.sides
        return Seen(values_of(first, self.a, inputs), values_of(second, self.b, inputs), given)


class _Value(NamedTuple):
    """A value of a batch, or several of one form, along a first axis of every array.

    Attributes:
      a, b: real. `alone`: the node of the first side on operands of the second, or None.
      masked_by: both sides of the value whose masked elements are those of this one; None for itself.
      step: real per LSB, broadcastable to a; `limits` [2] integers; None where the value is not rounded.
      unit: of the sums, real. `bins`: low, high and is_masked.
    """

    a: Array
    b: Array
    alone: Array | None
    masked_by: tuple[Array, Array] | None
    step: Array | None
    limits: Array | None
    unit: Array
    bins: Bins


def _by_form(
    measure: Callable[[_Value, Array | None], Any],
    layers: tuple[Layer, ...],
    seen: Seen,
    alone: Mapping[str, Array],
    mask: Array,
) -> Any:
    """`measure(value, mask)` of each value, stacked; None as the mask of a value without a batch.

    Values of one form are measured as one: XLA would compile the same reduction for each of a thousand layers.
    """
    forms: dict[Any, list[tuple[int, _Value]]] = {}
    for place, layer in enumerate(layers):
        value = _value(place, layer, seen, alone)
        form = layer.axis, jax.tree.structure(value), tuple(leaf.shape for leaf in jax.tree.leaves(value))
        forms.setdefault(form, []).append((place, value))
    found = []
    for (axis, *_), members in forms.items():
        stacked = jax.tree.map(lambda *v: jnp.stack(v), *(value for _, value in members))
        rank = members[0][1].a.ndim
        along = None if axis is None else mask.reshape([-1 if i == axis else 1 for i in range(rank)])
        found.append(jax.vmap(measure, in_axes=(0, None))(stacked, along))
    order = np.argsort([place for members in forms.values() for place, _ in members])
    return jax.tree.map(lambda *v: jnp.concatenate(v)[order], *found)


def _value(place: int, layer: Layer, seen: Seen, alone: Mapping[str, Array]) -> _Value:
    def sides(name: str) -> tuple[Array, Array]:
        return seen.first[name].astype(jnp.float32), seen.second[name].astype(jnp.float32)

    step = seen.given.steps[layer.name]
    return _Value(
        *sides(layer.name),
        alone[layer.name].astype(jnp.float32) if layer.name in alone else None,
        None if layer.masked_as is None else sides(layer.masked_as),
        None if step is None else jnp.asarray(step),
        None if layer.limits is None else jnp.float32(layer.limits),
        jnp.asarray(seen.given.units[place]),
        Bins(*(jnp.asarray(of[place]) for of in seen.given.bins)),
    )


def _kept(value: _Value, mask: Array | None) -> tuple[Array, Array]:
    """Bool of the shape of a: no padding, and in the mask unless it leaves out all of them; and whether it does."""
    one, other = value.masked_by or (value.a, value.b)
    masked = (one <= MASKED / 2) | (other <= MASKED / 2)
    real = jnp.ones(one.shape, bool) if mask is None else jnp.broadcast_to(mask, one.shape)
    is_masked = jnp.all(masked | ~real)
    return real & (~masked | is_masked), is_masked


# ---------------------------------------------------------------------------------------------------------------------
# Errors


class Errors(NamedTuple):
    """Of all values.

    Attributes:
      is_masked: bool [values], of what a mask leaves out as a whole: it counts only where all batches are so.
      counts: [values, COUNTS]; extremes: [values, EXTREMES] real, -inf where there is none.
      sums: [values, SUMS, 2], in units of each value or their squares: a number and what it lost.
    """

    is_masked: Any
    counts: Any
    extremes: Any
    sums: Any


@dataclass(frozen=True)
class LayerErrors:
    """The errors of every value, and of each node of mode `a` alone: on operands of the second side."""

    compiled_alone: ClassVar = True
    layers: tuple[Layer, ...]
    a: Mode

    def measure(self, outputs: Seen, batch: Any, mask: Array) -> Errors:
        alone = alone_of(outputs.given.sides[0], self.a, outputs.second)
        return errors_of(self.layers, outputs, alone, mask)

    def merge(self, one: Errors, other: Errors) -> Errors:
        one, other = _wide(one), _wide(other)
        joined = Errors(
            one.is_masked,
            one.counts + other.counts,
            np.maximum(one.extremes, other.extremes),
            one.sums + other.sums,
        )
        takes_one, takes_other = other.is_masked & ~one.is_masked, one.is_masked & ~other.is_masked

        def chosen(a: np.ndarray, b: np.ndarray, both: np.ndarray) -> np.ndarray:
            shape = (-1,) + (1,) * (both.ndim - 1)
            return np.where(takes_one.reshape(shape), a, np.where(takes_other.reshape(shape), b, both))

        return Errors(*map(chosen, one, other, joined))

    def compute(self, errors: Errors) -> Errors:
        return _wide(errors)


def _wide(errors: Errors) -> Errors:
    """Counts as int64, and sums as float64 beside zeros."""
    sums = np.asarray(errors.sums, np.float64).sum(-1)
    sums = np.stack((sums, np.zeros_like(sums)), axis=-1)
    return Errors(np.asarray(errors.is_masked), np.asarray(errors.counts, np.int64), np.asarray(errors.extremes), sums)


def statistics_by_layer(
    layers: tuple[Layer, ...], errors: Errors, steps: Mapping[str, Array | None], units: np.ndarray
) -> dict[str, Statistics]:
    """{name: statistics}, real."""
    found = {}
    for i, layer in enumerate(layers):
        unit = np.float64(units[i])
        sums: dict[str, Any] = {
            name: total * (unit if name == "off" else unit**2)
            for name, total in zip(SUMS, errors.sums[i].sum(-1), strict=True)
        }
        extremes: dict[str, Any] = {
            name.removeprefix("-"): -value if name.startswith("-") else None if value == -np.inf else value
            for name, value in zip(EXTREMES, errors.extremes[i], strict=True)
        }
        counts: dict[str, Any] = dict(zip(COUNTS, errors.counts[i], strict=True))
        if extremes["own_max_error"] is None:
            sums |= {"own_signal": None, "own_noise": None}
        if layer.limits is None:
            counts["saturated"] = None
        found[layer.name] = Statistics(is_masked=bool(errors.is_masked[i]), **counts, **extremes, **sums)
    return found


def errors_of(layers: tuple[Layer, ...], seen: Seen, alone: Mapping[str, Array], mask: Array) -> Errors:
    """Of a batch, `mask` [N] where no padding is; `alone`: nodes of the first side on operands of the second."""
    found: Errors = _by_form(_errors, layers, seen, alone, mask)
    return found


def _errors(value: _Value, mask: Array | None) -> Errors:
    a, b, step, unit = value.a, value.b, value.step, value.unit
    error = jnp.abs(difference(a, b))
    counts = {"size": jnp.ones(a.shape, bool), "differing": error > (0.0 if step is None else step * 0.5)}
    extremes = {"-minimum": -a, "maximum": a, "-b_minimum": -b, "b_maximum": b, "max_error": error}
    x, y, off = a / unit, b / unit, error / unit
    sums = {"signal": x * x, "b_signal": y * y, "product": x * y, "noise": off * off, "off": off}
    if step is not None and value.limits is not None:
        low, high = value.limits[0], value.limits[1]
        counts["saturated"] = (a < (low - 0.5) * step) | (a > (high + 0.5) * step)
    if step is not None:
        extremes["max_lsb"] = error / step
    if value.alone is not None:
        own = jnp.abs(difference(value.alone, b))
        extremes["own_max_error"] = own
        sums |= {"own_signal": jnp.square(value.alone / unit), "own_noise": jnp.square(own / unit)}
        if step is not None:
            extremes["own_max_lsb"] = own / step
    kept, is_masked = _kept(value, mask)
    return Errors(is_masked, *_reduced(kept, counts, extremes, sums))


def _reduced(
    kept: Array, counts: dict[str, Array], extremes: dict[str, Array], sums: dict[str, Array]
) -> tuple[Array, Array, Array]:
    """Counts [COUNTS], extremes [EXTREMES] and sums [SUMS, 2] of what is kept, all in one reduction."""
    n, m = len(counts), len(counts) + len(extremes)
    lowest, zero = jnp.float32(-jnp.inf), jnp.float32(0.0)
    values = [(kept & v).astype(jnp.int32) for v in counts.values()]
    values += [jnp.where(kept, v, lowest) for v in extremes.values()]
    values += [jnp.where(kept, v, zero) for v in sums.values()] + [jnp.zeros(kept.shape, jnp.float32)] * len(sums)
    begin = [jnp.int32(0)] * n + [lowest] * len(extremes) + [zero] * (2 * len(sums))

    def join(x: tuple[Array, ...], y: tuple[Array, ...]) -> tuple[Array, ...]:
        highs = [_two_sum(p, q) for p, q in zip(x[m : m + len(sums)], y[m:], strict=False)]
        lost = [p + q + e for p, q, (_, e) in zip(x[m + len(sums) :], y[m + len(sums) :], highs, strict=True)]
        joined = [*map(jnp.add, x[:n], y[:n]), *map(jnp.maximum, x[n:m], y[n:m])]
        return (*joined, *(total for total, _ in highs), *lost)

    found = jax.lax.reduce(tuple(values), tuple(begin), join, tuple(range(kept.ndim)))
    pairs = map(jnp.stack, zip(found[m : m + len(sums)], found[m + len(sums) :], strict=True))
    by_name = dict(zip((*counts, *extremes, *sums), (*found[:m], *pairs), strict=True))
    return (
        jnp.stack([by_name.get(name, jnp.int32(0)) for name in COUNTS]),
        jnp.stack([by_name.get(name, lowest) for name in EXTREMES]),
        jnp.stack([by_name.get(name, jnp.zeros(2, jnp.float32)) for name in SUMS]),
    )


def _two_sum(x: Array, y: Array) -> tuple[Array, Array]:
    """x + y, and what rounding took from it."""
    total = x + y
    of_y = total - x
    return total, (x - (total - of_y)) + (y - of_y)


# ---------------------------------------------------------------------------------------------------------------------
# Histograms


@dataclass(frozen=True)
class LayerHistograms:
    """Counts [values, 2, BINS] of both sides over the range of all of the data."""

    compiled_alone: ClassVar = True
    layers: tuple[Layer, ...]

    def measure(self, outputs: Seen, batch: Any, mask: Array) -> Array:
        found: Array = _by_form(_counts, self.layers, outputs, {}, mask)
        return found

    def compute(self, counts: np.ndarray) -> np.ndarray:
        return counts


def _counts(value: _Value, mask: Array | None) -> Array:
    low, high, is_masked = value.bins
    kept, all_are = _kept(value, mask)
    weight = (kept & (all_are == is_masked)).astype(jnp.int32)
    both = places(jnp.stack((value.a, value.b)), low, high)
    sides = jnp.broadcast_to(jnp.arange(2).reshape(2, *[1] * value.a.ndim), both.shape)
    return jnp.zeros((2, BINS), jnp.int32).at[sides, both].add(weight)


def no_bins(layers: tuple[Layer, ...]) -> Bins:
    """Bins for a pass that counts none, so that both sides are one program in every pass."""
    nothing = np.zeros(len(layers), np.float32)
    return Bins(nothing, nothing, np.zeros(len(layers), bool))


def bins_of(errors: Errors) -> Bins:
    """The range of both sides of each value."""
    of = dict(zip(EXTREMES, errors.extremes.T, strict=True))
    low, high = -np.maximum(of["-minimum"], of["-b_minimum"]), np.maximum(of["maximum"], of["b_maximum"])
    return Bins(low.astype(np.float32), high.astype(np.float32), errors.is_masked)


def histograms_by_layer(layers: tuple[Layer, ...], bins: Bins, counts: np.ndarray) -> dict[str, Histogram]:
    """{name: histogram}."""
    return {x.name: Histogram(bins.low[i], bins.high[i], *counts[i]) for i, x in enumerate(layers)}
