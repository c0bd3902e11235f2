"""Composite operators: the float meaning here, the integer one as a chain of operators that the chip has.

`decompose` gives the chain (specification, section 6, last item). `prepare` puts it in the place of a composite that is
to be quantized; its inner values are int16. Where softmax, layer_norm and the like stay float, they stay whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jquant.graph.checks import check_epsilon
from jquant.graph.operator import Parts, decompose, eval_float
from jquant.ops.compare import LogicalAnd, LogicalNot, MaskedFill
from jquant.ops.elementwise import Abs, Add, Clamp, Constant, Mul, Requantize, Scale, Sub
from jquant.ops.movement import Reshape
from jquant.ops.reduce import Mean, ReduceAll, ReduceMax, Sum
from jquant.ops.table import Exp, Log, Reciprocal, Rsqrt, Sqrt
from jquant.types import Array, FrozenMap, Node, Op, QuantSpec

Shapes = Mapping[str, tuple[int, ...]]

MASKED = -1e30  # of a masked element: finite, where -inf would be NaN in a row of nothing else
# exp(x - max) is nothing in int16 below -12.
EXP_RANGE = 12.0
SHIFTED = QuantSpec(dtype="int16", fixed_scale=EXP_RANGE / 32768)
UNIT = QuantSpec(dtype="int16", fixed_scale=1 / 32767)


@dataclass(frozen=True, kw_only=True)
class Softmax(Op):
    """exp(x) / sum(exp(x)) along `axis`. Where a second operand, bool, is True, an element is left out and gives 0.

    `empty`: what a row gives that is masked everywhere. "zero": zeros. "mean": 1 / n each, as where a finite number is
    filled in. "scores": the softmax of x, as where a finite number is added. "nan": NaN, as of minus infinity; integers
    have none, and give zeros.
    """

    bounded: ClassVar = True
    reduces: ClassVar = True
    takes_exact: ClassVar = True
    ports: ClassVar = ("x", "masked")

    axis: int = -1
    empty: Literal["zero", "mean", "scores", "nan"] = "zero"


@dataclass(frozen=True, kw_only=True)
class LogSoftmax(Op):
    """x - log(sum(exp(x))) along `axis`."""

    reduces: ClassVar = True

    axis: int = -1


@dataclass(frozen=True, kw_only=True)
class Div(Op):
    """a / b with broadcasting: a times a reciprocal table of b. By a Python number it is `Scale`."""

    ports: ClassVar = ("a", "b")


@dataclass(frozen=True, kw_only=True)
class Variance(Op):
    """Mean square distance from the mean over `axes`; `correction` 1 divides by n - 1, as torch's default does."""

    reduces: ClassVar = True

    axes: tuple[int, ...]
    keepdims: bool = False
    correction: int = 1


@dataclass(frozen=True, kw_only=True)
class Norm(Op):
    """Vector norm over `axes`: the sum of magnitudes ("1"), the root of the sum of squares ("2"), or "max"."""

    reduces: ClassVar = True

    axes: tuple[int, ...]
    keepdims: bool = False
    order: Literal["1", "2", "max"] = "2"


@dataclass(frozen=True, kw_only=True)
class LayerNorm(Op):
    """(x - mean) / sqrt(var + epsilon) over the last `rank` axes. Optional parameters of their shape: weight, bias."""

    rank: int = 1
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        check_epsilon(self)


@dataclass(frozen=True, kw_only=True)
class RmsNorm(Op):
    """x / sqrt(mean(x^2) + epsilon) over the last `rank` axes. Parameter of their shape: weight (optional)."""

    rank: int = 1
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        check_epsilon(self)


@dataclass(frozen=True, kw_only=True)
class GroupNorm(Op):
    """Normalization of x [N, C, *S] (or [N, *S, C]) over each of `groups` groups of channels.

    Optional parameters [C]: weight, bias.
    """

    groups: int
    epsilon: float = 1e-5
    channels_last: bool = False

    def __post_init__(self) -> None:
        check_epsilon(self)


@dataclass(frozen=True, kw_only=True)
class InstanceNorm(Op):
    """Normalization of x [N, C, *S] over its spatial axes. Parameters [C]: weight, bias (optional)."""

    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        check_epsilon(self)


# ---------------------------------------------------------------------------------------------------------------------
# Float


@eval_float.register
def _(op: Softmax, x: Array, masked: Array | None = None) -> Array:
    if masked is None:
        return jax.nn.softmax(x, axis=op.axis)
    return masked_softmax(x, masked, op.axis, op.empty)


def masked_softmax(x: Array, masked: Array, axis: int, empty: str) -> Array:
    """The softmax of what is not masked; `empty` as in `Softmax`."""
    if empty == "scores":
        masked = jnp.broadcast_to(masked, x.shape)
        masked = masked & ~masked.all(axis, keepdims=True)
    if empty == "nan":
        return jax.nn.softmax(jnp.where(masked, -jnp.inf, x), axis=axis)
    y = jax.nn.softmax(jnp.where(masked, MASKED, x), axis=axis)
    return y if empty == "mean" else jnp.where(masked, 0.0, y)


@eval_float.register
def _(op: LogSoftmax, x: Array) -> Array:
    return jax.nn.log_softmax(x, axis=op.axis)


@eval_float.register
def _(op: Div, a: Array, b: Array) -> Array:
    return a / b


@eval_float.register
def _(op: Variance, x: Array) -> Array:
    return jnp.var(x, axis=op.axes, keepdims=op.keepdims, ddof=op.correction)


@eval_float.register
def _(op: Norm, x: Array) -> Array:
    magnitude = jnp.abs(x)
    if op.order == "max":
        return magnitude.max(op.axes, keepdims=op.keepdims)
    if op.order == "1":
        return magnitude.sum(op.axes, keepdims=op.keepdims)
    square = (x * x).sum(op.axes, keepdims=op.keepdims)
    positive = square > 0  # the root has no finite gradient at 0; torch's is 0 there
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def _normalized(x: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    centred = x - x.mean(axes, keepdims=True)
    return centred * jax.lax.rsqrt((centred * centred).mean(axes, keepdims=True) + epsilon)


def _affine(y: Array, weight: Array | None, bias: Array | None, shape: tuple[int, ...]) -> Array:
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


@eval_float.register
def _(op: LayerNorm, x: Array, *, weight: Array | None = None, bias: Array | None = None) -> Array:
    y = _normalized(x, _last_axes(op.rank), op.epsilon)
    return _affine(y, weight, bias, x.shape[x.ndim - op.rank :])


@eval_float.register
def _(op: RmsNorm, x: Array, *, weight: Array | None = None) -> Array:
    square = (x * x).mean(_last_axes(op.rank), keepdims=True)
    return _affine(x * jax.lax.rsqrt(square + op.epsilon), weight, None, x.shape[x.ndim - op.rank :])


@eval_float.register
def _(op: GroupNorm, x: Array, *, weight: Array | None = None, bias: Array | None = None) -> Array:
    shape, axes = _grouped(op, x.shape)
    y = _normalized(x.reshape(x.shape[0], *shape), axes, op.epsilon).reshape(x.shape)
    return _affine(y, weight, bias, x.shape[-1:] if op.channels_last else _channel_shape(x.shape))


def _grouped(op: GroupNorm, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of an example in which groups have axes of their own, and the axes (with the batch) to normalize."""
    if op.channels_last:
        return (prod(shape[1:-1]), op.groups, shape[-1] // op.groups), (1, 3)
    return (op.groups, prod(shape[1:]) // op.groups), (2,)


@eval_float.register
def _(op: InstanceNorm, x: Array, *, weight: Array | None = None, bias: Array | None = None) -> Array:
    y = _normalized(x, tuple(range(2, x.ndim)), op.epsilon)
    return _affine(y, weight, bias, _channel_shape(x.shape))


def _last_axes(rank: int) -> tuple[int, ...]:
    return tuple(range(-rank, 0))


def _channel_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[1], *(1,) * (len(shape) - 2))


# ---------------------------------------------------------------------------------------------------------------------
# Chains


@dataclass
class Chain:
    """Collects the nodes of a composite, named `node.name.part`."""

    node: Node
    nodes: list[Node] = field(default_factory=list)
    specs: dict[str, QuantSpec] = field(default_factory=dict)

    def add(
        self,
        part: str,
        op: Op,
        *operands: str,
        spec: QuantSpec | None = None,
        params: Mapping[str, str] | None = None,
    ) -> str:
        name = f"{self.node.name}.{part}"
        self.nodes.append(Node(name, op, operands, FrozenMap(params)))
        if spec is not None:
            self.specs[name] = spec
        return name

    def constant(self, role: str) -> str:
        """A parameter of the composite as a value."""
        return self.add(role, Constant(), params={"value": self.node.params[role]})

    def parts(self) -> Parts:
        """The last node takes the name of the composite, and must have a scale of its own for its format."""
        if self.nodes[-1].op.scale_rule != "own":
            self.add("output", Requantize(), self.nodes[-1].name)
        *inner, last = self.nodes
        self.specs.pop(last.name, None)
        return Parts([*inner, Node(self.node.name, last.op, last.inputs, last.params)], self.specs)


@decompose.register
def _(op: Softmax, node: Node, shapes: Shapes) -> Parts:
    chain = Chain(node)
    exp, total, count = _exponentials(chain, op.axis, shapes)
    inverse = chain.add("reciprocal", Reciprocal(), total)
    y = chain.add("mul", Mul(), exp, inverse)
    x, *masks = node.inputs
    if masks and op.empty == "mean":
        chain.add("mean", MaskedFill(value=1 / count), y, _empty_rows(chain, op.axis, x, masks[0], shapes))
    return chain.parts()


@decompose.register
def _(op: LogSoftmax, node: Node, shapes: Shapes) -> Parts:
    chain = Chain(node)
    _, total, _ = _exponentials(chain, op.axis, shapes)
    log = chain.add("log", Log(), total)
    # The distance to the maximum again, in a scale of its own: what softmax may cut at -12 counts here.
    distance = chain.add("distance", Sub(), node.inputs[0], f"{node.name}.max")
    chain.add("sub", Sub(), distance, log)
    return chain.parts()


def _exponentials(chain: Chain, axis: int, shapes: Shapes) -> tuple[str, str, int]:
    """exp(x - max), its sum along the axis, and the number of terms.

    A masked element is the smallest integer for the maximum, which may still be near the others: hence 0 after exp.
    """
    x, *masks = chain.node.inputs
    if masks and getattr(chain.node.op, "empty", "") == "scores":
        others = chain.add("others", LogicalNot(), _empty_rows(chain, axis, x, masks[0], shapes))
        masks = [chain.add("left_out", LogicalAnd(), masks[0], others)]
    for mask in masks:
        x = chain.add("filled", MaskedFill(value=MASKED), x, mask)
    largest = chain.add("max", ReduceMax(axes=(axis,), keepdims=True), x)
    shifted = chain.add("shift", Sub(), x, largest, spec=SHIFTED)
    exp = chain.add("exp", Exp(), shifted, spec=UNIT)
    for mask in masks:
        exp = chain.add("masked", MaskedFill(value=0.0), exp, mask)
    total = chain.add("sum", Sum(axes=(axis,), keepdims=True), exp)
    if masks:  # the largest exp is 1, but in a row that is masked as a whole
        total = chain.add("total", Clamp(minimum=1.0), total)
    return exp, total, shapes[chain.node.inputs[0]][axis]


def _empty_rows(chain: Chain, axis: int, x: str, mask: str, shapes: Shapes) -> str:
    """A mask of the rows that are masked everywhere, one element along the axis."""
    axis = axis % len(shapes[x]) - len(shapes[x])
    if -axis > len(shapes[mask]):
        return mask  # which is the same along the axis
    return chain.add("empty", ReduceAll(axes=(axis,), keepdims=True), mask)


@decompose.register
def _(op: Div, node: Node, shapes: Shapes) -> Parts:
    chain = Chain(node)
    a, b = node.inputs
    chain.add("mul", Mul(), a, chain.add("reciprocal", Reciprocal(), b))
    return chain.parts()


@decompose.register
def _(op: Variance, node: Node, shapes: Shapes) -> Parts:
    chain = Chain(node)
    (x,) = node.inputs
    square = _square(chain, _centred(chain, x, op.axes))
    mean = chain.add("variance", Mean(axes=op.axes, keepdims=op.keepdims), square)
    count = prod(shapes[x][axis] for axis in op.axes)
    if op.correction:
        chain.add("correction", Scale(factor=count / max(count - op.correction, 1)), mean)
    return chain.parts()


@decompose.register
def _(op: Norm, node: Node, shapes: Shapes) -> Parts:
    chain = Chain(node)
    (x,) = node.inputs
    axes, keepdims = op.axes, op.keepdims
    if op.order == "2":
        chain.add("sqrt", Sqrt(), chain.add("sum", Sum(axes=axes, keepdims=keepdims), _square(chain, x)))
    else:
        reduce = ReduceMax(axes=axes, keepdims=keepdims) if op.order == "max" else Sum(axes=axes, keepdims=keepdims)
        chain.add("reduce", reduce, chain.add("abs", Abs(), x))
    return chain.parts()


@decompose.register
def _(op: LayerNorm, node: Node, shapes: Shapes) -> Parts:
    chain = Chain(node)
    _normalize(chain, node.inputs[0], _last_axes(op.rank), op.epsilon)
    return _scaled(chain, ())


@decompose.register
def _(op: RmsNorm, node: Node, shapes: Shapes) -> Parts:
    chain = Chain(node)
    _divide_by_root(chain, node.inputs[0], _last_axes(op.rank), op.epsilon)
    return _scaled(chain, ())


@decompose.register
def _(op: InstanceNorm, node: Node, shapes: Shapes) -> Parts:
    chain = Chain(node)
    shape = shapes[node.inputs[0]]
    _normalize(chain, node.inputs[0], tuple(range(2, len(shape))), op.epsilon)
    return _scaled(chain, _channel_shape(shape))


@decompose.register
def _(op: GroupNorm, node: Node, shapes: Shapes) -> Parts:
    chain = Chain(node)
    shape = shapes[node.inputs[0]]
    inner, axes = _grouped(op, shape)
    grouped = chain.add("group", Reshape(shape=(-1, *inner)), node.inputs[0])
    y = _normalize(chain, grouped, axes, op.epsilon)
    chain.add("ungroup", Reshape(shape=(-1, *shape[1:])), y)
    return _scaled(chain, () if op.channels_last else _channel_shape(shape))


def _centred(chain: Chain, x: str, axes: tuple[int, ...]) -> str:
    return chain.add("centre", Sub(), x, chain.add("mean", Mean(axes=axes, keepdims=True), x))


def _square(chain: Chain, x: str) -> str:
    return chain.add("square", Mul(), x, x)


def _normalize(chain: Chain, x: str, axes: tuple[int, ...], epsilon: float) -> str:
    return _divide_by_root(chain, _centred(chain, x, axes), axes, epsilon)


def _divide_by_root(chain: Chain, x: str, axes: tuple[int, ...], epsilon: float) -> str:
    variance = chain.add("variance", Mean(axes=axes, keepdims=True), _square(chain, x))
    # A variance is positive, and the pole at 0 is where the data begin: 6 tables by a factor each.
    root = chain.add("rsqrt", Rsqrt(epsilon=epsilon), variance)
    return chain.add("normalize", Mul(), x, root)


def _scaled(chain: Chain, shape: tuple[int, ...]) -> Parts:
    """The last value times weight plus bias, where the composite has them; `shape` of the two, () as they are."""

    def operand(role: str) -> str:
        value = chain.constant(role)
        return chain.add(f"{role}_shaped", Reshape(shape=shape), value) if shape else value

    for role, op in (("weight", Mul()), ("bias", Add())):
        if role in chain.node.params:
            y = chain.nodes[-1].name
            chain.add("scaled" if role == "weight" else "shifted", op, y, operand(role))
    return chain.parts()
