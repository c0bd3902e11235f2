"""Every core type of jquant. Reading this file teaches the domain.

A model is a static, hashable `Graph` of operators plus a flat dictionary of parameters. What is static (graphs, specs,
policies, targets) is a frozen dataclass; what carries arrays (`QParams`, `Program`) is a pytree. One name string, the
path of a module or a value, is the key everywhere: in the qconfig, params, qparams, taps and program constants.

Units: *real* is the value a model means, *LSB* one step of a quantized integer, *acc* one step of an accumulator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar

import jax

from jquant.text import format_graph, format_program

Array = jax.Array
Params = Mapping[str, Array]
QParams = Mapping[str, Array]

# ---------------------------------------------------------------------------------------------------------------------
# Errors: one hierarchy, so that callers can catch what they mean.


class JQuantError(Exception):
    """Base of every error that jquant raises on purpose."""


class GraphError(JQuantError):
    """A graph that is not well formed, or a node that cannot be evaluated."""


class QConfigError(JQuantError):
    """A qconfig that names nothing, has a wrong type, or asks for what the target does not have."""


class CalibrationError(JQuantError):
    """Missing, empty or broken calibration: no data, no scale, or a value that is not finite."""


class InputError(JQuantError):
    """An input of the wrong shape, dtype or content."""


class LoweringError(JQuantError):
    """A node that has no integer form on the target. Names the node, the operator and the next step."""


class FormatError(JQuantError):
    """A file that is not what it claims to be, or of a version this release cannot read."""


class ConversionError(JQuantError):
    """A foreign model that cannot be imported or exported."""


# ---------------------------------------------------------------------------------------------------------------------
# Small static containers

Value = TypeVar("Value")


class FrozenMap(Mapping[str, Value]):
    """An immutable, hashable mapping with string keys in a fixed order."""

    __slots__ = ("_hash", "_items")

    def __init__(self, items: Mapping[str, Value] | None = None) -> None:
        self._items: dict[str, Value] = dict(items or {})
        self._hash: int | None = None

    def __getitem__(self, key: str) -> Value:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(tuple(self._items.items()))
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, FrozenMap) and tuple(self._items.items()) == tuple(other._items.items())

    def __repr__(self) -> str:
        return f"FrozenMap({self._items!r})"


# ---------------------------------------------------------------------------------------------------------------------
# Quantized number formats

_SIGNED = ("int2", "int3", "int4", "int8", "int16", "int32")
_UNSIGNED = ("uint2", "uint3", "uint4", "uint8")
DTYPES = (*_SIGNED, *_UNSIGNED, "float16")
MIN_SCALE = 2.0**-23  # real per LSB; no scale is smaller
EXACT_DTYPES = ("bool", "int32", "uint8")  # of values that are not numbers on a grid: masks, indices, pixels


def bit_width(dtype: str) -> int:
    """Number of bits of a quantized dtype name: `bit_width("int4") == 4`."""
    if dtype not in DTYPES:
        raise QConfigError(f"unknown quantized dtype {dtype!r}; known: {', '.join(DTYPES)}")
    return int(dtype.lstrip("uintfloa"))


def integer_range(dtype: str) -> tuple[int, int]:
    """Smallest and largest integer of a quantized dtype: `integer_range("int8") == (-128, 127)`."""
    bits = bit_width(dtype)
    if dtype == "float16":
        raise QConfigError("float16 is no integer dtype")
    return (0, 2**bits - 1) if dtype.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def storage_dtype(dtype: str) -> str:
    """The array dtype that holds a quantized dtype: narrow types are stored in the next larger machine type."""
    if dtype in ("bool", "float16"):
        return dtype
    low, high = integer_range(dtype)
    return next(name for name, bits in (("int8", 8), ("int16", 16), ("int32", 32)) if high < 2 ** (bits - 1) >= -low)


# ---------------------------------------------------------------------------------------------------------------------
# Extension points: values made of pure functions


@dataclass(frozen=True)
class Quantizer:
    """How a tensor is fake-quantized in training, as three pure functions. Call it like its `apply`.

    `apply(x, parameter, spec) -> x_hat`, differentiable: x of any shape; parameter scalar, or [channels] for an axis.
    `init(scale, spec) -> parameter`: the trainable leaf that stands for an observed scale (real per LSB).
    `scale(parameter, spec) -> scale`: the scale that the integer program will use; the inverse of `init`, made legal.
    """

    apply: Callable[[Array, Array, QuantSpec], Array] = field(repr=False)
    init: Callable[[Array, QuantSpec], Array] = field(repr=False)
    scale: Callable[[Array, QuantSpec], Array] = field(repr=False)
    name: str = "custom"

    def __call__(self, x: Array, parameter: Array, spec: QuantSpec) -> Array:
        return self.apply(x, parameter, spec)


@dataclass(frozen=True)
class Observer:
    """How a scale is estimated from data, as four pure functions over a state pytree.

    Data arrives as `[channels, samples]` float32 (one channel for a per-tensor scale), so an observer never sees axes.
    `init(channels) -> state`, `update(state, x) -> state`, `merge(state, state) -> state` (associative and commutative,
    or None where the order of batches matters), `finalize(state, spec) -> scale` of shape [channels].
    """

    init: Callable[[int], Any] = field(repr=False)
    update: Callable[[Any, Array], Any] = field(repr=False)
    merge: Callable[[Any, Any], Any] | None = field(repr=False)
    finalize: Callable[[Any, QuantSpec], Array] = field(repr=False)
    name: str = "custom"
    options: tuple[tuple[str, float], ...] = ()


# ---------------------------------------------------------------------------------------------------------------------
# Policies: what is to be quantized, and how


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """The quantization of one tensor: symmetric, zero point 0.

    `dtype`         int2, int3, int4, int8, int16, int32 (an accumulator: high precision), uint2 - uint8 (training),
                    float16 (a float island on the vector unit: rounded to nearest even, clamped to +-65504, no scale)
    `axis`          None: one scale for the tensor. "out": one scale per output channel (weights)
    `scale_form`    "real", or "pow2": snapped to the nearest power of two not below the scale, in training as well
    `quantizer`     the fake-quantizer; None takes plain `fake_quant`
    `observer`      the calibration statistic; None takes the default of the role (min-max for weights and activations)
    `fixed_scale`   real per LSB; set, it is neither observed nor trained
    `rounding`      of ties; `prepare` sets it to what the target's integers do at this place
    """

    dtype: str
    axis: Literal["out"] | None = None
    scale_form: Literal["real", "pow2"] = "real"
    quantizer: Quantizer | None = None
    observer: Observer | None = None
    fixed_scale: float | None = None
    rounding: Literal["half_even", "half_up"] = "half_even"

    def __post_init__(self) -> None:
        bit_width(self.dtype)
        if self.axis not in (None, "out"):
            raise QConfigError(f"axis must be None or 'out', not {self.axis!r}")
        if self.scale_form not in ("real", "pow2"):
            raise QConfigError(f"scale_form must be 'real' or 'pow2', not {self.scale_form!r}")
        if self.fixed_scale is not None and not MIN_SCALE <= self.fixed_scale < float("inf"):
            raise QConfigError(f"fixed_scale must be positive and finite, and at least 2^-23, not {self.fixed_scale!r}")
        if self.is_float and (self.axis or self.fixed_scale is not None or self.scale_form != "real"):
            raise QConfigError("float16 has no scale: it takes no axis, fixed scale or scale form")

    @property
    def is_float(self) -> bool:
        return self.dtype == "float16"

    @property
    def range(self) -> tuple[int, int]:
        return integer_range(self.dtype)

    @property
    def bits(self) -> int:
        return bit_width(self.dtype)

    @property
    def is_high_precision(self) -> bool:
        return self.dtype == "int32"

    def __str__(self) -> str:
        parts = [self.dtype if not self.is_high_precision else "int32 (high precision)"]
        parts += ["per channel"] if self.axis else []
        parts += ["pow2"] if self.scale_form == "pow2" else []
        parts += [self.quantizer.name] if self.quantizer else []
        parts += [self.observer.name] if self.observer else []
        parts += [f"scale={self.fixed_scale:g}"] if self.fixed_scale is not None else []
        return " ".join(parts)


class Inherit:
    """The value of a policy field that a rule leaves to earlier rules."""

    def __repr__(self) -> str:
        return "INHERIT"


INHERIT = Inherit()


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a qconfig rule says about a node. A field left out inherits from earlier rules; None means float.

    `output`  spec of the value that the node makes
    `weight`  spec of the node's weight
    `input`   {port: spec} for a node that needs an operand in another format than its producer gives
    """

    output: QuantSpec | Inherit | None = INHERIT
    weight: QuantSpec | Inherit | None = INHERIT
    input: Mapping[str, QuantSpec] | Inherit = INHERIT

    def __post_init__(self) -> None:
        for port in ("output", "weight"):
            spec = getattr(self, port)
            if not (spec is None or spec is INHERIT or isinstance(spec, QuantSpec)):
                raise QConfigError(f"Policy.{port} must be a QuantSpec such as jq.int8(), or None; got {spec!r}")
        if self.input is not INHERIT:
            if not isinstance(self.input, Mapping):
                raise QConfigError(f"Policy.input must be a mapping of port name to QuantSpec; got {self.input!r}")
            object.__setattr__(self, "input", FrozenMap(self.input))


FLOAT = Policy(output=None, weight=None, input={})


@dataclass(frozen=True, kw_only=True)
class Requested:
    """What all rules together ask for one node: a `Policy` with nothing left to inherit.

    `explicit`  the output was asked for by the full name of the node, not by a pattern
    """

    output: QuantSpec | None = None
    weight: QuantSpec | None = None
    input: FrozenMap[QuantSpec] = FrozenMap()
    explicit: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# The graph


@dataclass(frozen=True, kw_only=True)
class Op:
    """Base of all operators. An operator is a frozen dataclass of attributes; its meanings are registered functions.

    `scale_rule`   own: the output has its own scale; same_as_input: integers pass through with the scale of input 0;
                   derived: the scale follows from the operands (`jquant.ops.derived_scale`)
    `needs_stats`  True where the output scale must come from data, so that it cannot be inserted after calibration
    `ports`        names of the operands, for `Policy.input` and error messages; the last one repeats
    `stochastic`   True where training needs a PRNG key
    `weight_roles` the parameters that `Policy.weight` quantizes
    `weight_axis`  the axis of output channels in them
    `keeps_accumulator` True where the int32 accumulator may be the output ("high precision", `derived_scale`)
    `layout`       framework: needs [N, C, *S]; elementwise: any order; spatial: runs on [N, *S, C]; axes: follows its
                   operands, its axes renumbered (the last two by `jquant.ops.to_channels_last`)
    """

    scale_rule: ClassVar[Literal["own", "same_as_input", "derived"]] = "own"
    needs_stats: ClassVar[bool] = True
    ports: ClassVar[tuple[str, ...]] = ("x",)
    stochastic: ClassVar[bool] = False
    weight_roles: ClassVar[tuple[str, ...]] = ()
    weight_axis: ClassVar[int] = 0
    keeps_accumulator: ClassVar[bool] = False
    layout: ClassVar[Literal["framework", "elementwise", "spatial", "axes"]] = "framework"


@dataclass(frozen=True)
class Input:
    """A graph input: its shape, with None for the symbolic batch. One that is not float32 is exact: never quantized."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class Node:
    """One operator call. `inputs` are value names; `params` maps the operator's parameter roles to keys of params."""

    name: str
    op: Op
    inputs: tuple[str, ...]
    params: FrozenMap[str] = FrozenMap()


@dataclass(frozen=True, eq=True)
class Graph:
    """Nodes in evaluation order. A value is named by the input or the node that makes it; one output a node."""

    inputs: tuple[Input, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]

    @cached_property
    def by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    @cached_property
    def consumers(self) -> dict[str, tuple[Node, ...]]:
        """The nodes that read each value, in order; an operand read twice by a node counts once."""
        readers: dict[str, list[Node]] = {value: [] for value in self.values}
        for node in self.nodes:
            for value in dict.fromkeys(node.inputs):
                readers[value].append(node)
        return {value: tuple(nodes) for value, nodes in readers.items()}

    @cached_property
    def values(self) -> tuple[str, ...]:
        """Names of all values: graph inputs, then nodes."""
        return (*(i.name for i in self.inputs), *(n.name for n in self.nodes))

    @cached_property
    def param_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(key for node in self.nodes for key in node.params.values()))

    @cached_property
    def _hash(self) -> int:
        return hash((self.inputs, self.nodes, self.outputs))

    def __hash__(self) -> int:  # a graph is a jit key at every call: hash it once
        return self._hash

    def __str__(self) -> str:
        return format_graph(self)


# ---------------------------------------------------------------------------------------------------------------------
# The chip


@dataclass(frozen=True, kw_only=True)
class Target:
    """A march as data. Nothing outside `targets/` knows a chip.

    Each rounding field is a decision of `docs/nash-arithmetic.md` where public documents are silent; a person with a
    board changes it in this one place.
    """

    name: str
    default_dtype: str
    integer: bool  # False: the integer post-processing is not public, `lower` refuses
    activation_dtypes: tuple[str, ...] = ("int8", "int16")
    weight_dtypes: tuple[str, ...] = ("int4", "int8", "int16")
    quantize_rounding: Literal["half_even", "half_up"] = "half_even"
    pre_rounding: Literal["floor", "half_up"] = "floor"
    average_pre_rounding: Literal["floor", "half_up"] = "half_up"
    post_rounding: Literal["half_up", "half_even"] = "half_up"
    high_precision_rescale: bool = False
    max_kernel: int = 31
    resample_fraction_bits: int = 8  # of the bilinear weights of interpolate
    max_conv_inputs: int = 65535  # KH * KW * C / groups
    max_reduced: int = 65535  # elements of a reduced window or axis
    max_rank: int = 10


# ---------------------------------------------------------------------------------------------------------------------
# What the verbs hand on


@dataclass(frozen=True)
class Resolution:
    """One row of `explain`: what the qconfig asked for a value, what applies, and why the two differ."""

    name: str
    port: Literal["output", "weight", "input"]
    requested: str
    applied: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What `prepare` returns: the fused, channels-last graph with a decision for every value and weight.

    `values`    {value: spec}, None for float. A value whose operator keeps the scale carries its producer's spec.
    `exact`     {value: dtype} of the values that are no numbers on a grid (masks, indices, pixels); their spec is None
    `weights`   {param: spec}, only quantized ones; `weight_axis` {param: channel axis} for per-channel specs
    `owned`     the values that have a scale of their own in qparams, in graph order
    `renamed`   {old node: fused node}
    `turned`    {param: axes} of weights that are transpositions of what is trained; they are fake-quantized as that
                lies, since XLA would copy every such weight and its gradient. It changes no number, and no file has it
    """

    graph: Graph
    values: FrozenMap[QuantSpec | None]
    weights: FrozenMap[QuantSpec]
    weight_axis: FrozenMap[int]
    owned: tuple[str, ...]
    target: Target
    resolutions: tuple[Resolution, ...] = ()
    renamed: FrozenMap[str] = FrozenMap()
    exact: FrozenMap[str] = FrozenMap()
    turned: FrozenMap[tuple[int, ...]] = FrozenMap()

    def spec(self, name: str) -> QuantSpec:
        """The spec of a quantized value or weight."""
        spec = self.weights[name] if name in self.weights else self.values[name]
        if spec is None:
            raise QConfigError(f"{name!r} is float: it has no quantization")
        return spec

    @cached_property
    def trained(self) -> tuple[str, ...]:
        """The names in qparams: every value and weight with a scale that is neither fixed nor another's."""
        named = (*self.owned, *self.weights)
        return tuple(n for n in named if self.spec(n).fixed_scale is None and not self.spec(n).is_float)

    @cached_property
    def _hash(self) -> int:
        return hash((self.graph, self.values, self.weights, self.owned, self.target, self.exact))

    def __hash__(self) -> int:
        return self._hash


@dataclass(frozen=True)
class NodeFormat:
    """The integer formats around one node of a program, and how it accumulates.

    `accumulator`  "int32" where the worst case fits; "pair" where all but the bias fits, and the two are kept apart;
                   "limbs" where the sum is carried in base-2^16 limbs
    `worst_case`   bound on |accumulator| in acc, computed from the weights; None where lowered inside jit
    `kernel`       the implementation of a convolution or matrix product; "" where there is nothing to choose
    """

    inputs: tuple[str, ...]
    output: str
    accumulator: Literal["int32", "pair", "limbs"] = "int32"
    worst_case: int | None = None
    kernel: str = ""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Program:
    """An integer program: a static graph, integer constants, and the scales of its values.

    `constants`  {node: {role: integer array}}
    `scales`     {value: float32 scale, real per LSB}: scalar, or broadcastable per channel for high-precision values.
                 Only the borders use them; no integer rule reads a scale. Exact and float16 values have none.
    """

    constants: dict[str, dict[str, Array]]
    scales: dict[str, Array]
    graph: Graph = field(metadata={"static": True})
    formats: FrozenMap[NodeFormat] = field(metadata={"static": True})
    inputs: FrozenMap[str] = field(metadata={"static": True})  # {graph input: quantized or exact dtype}
    target: Target = field(metadata={"static": True})

    def __str__(self) -> str:
        return format_program(self)
