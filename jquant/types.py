"""Every core type of jquant. Reading this file teaches the domain.

A model is a static, hashable `Graph` of operators plus a flat dictionary of parameters. What is static (graphs, specs,
policies, targets) is a frozen dataclass; what carries arrays (`QParams`, `Program`) is a pytree. One name string, the
path of a module or a value, is the key everywhere: in the qconfig, params, qparams, taps and program constants.

Units: *real* is the value a model means, *LSB* one step of a quantized integer, *acc* one step of an accumulator.
"""

from __future__ import annotations

import hashlib
import json
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from dataclasses import fields as dataclass_fields
from functools import cache, cached_property
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import chex
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


class OutlierWarning(UserWarning):
    """Values whose largest entries are far beyond nearly all others, so that 8 bits cannot hold both."""


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
    """The array dtype that holds a dtype of a program: narrow types are stored in the next larger machine type."""
    if dtype in ("bool", "float16", "float32"):
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

    `twin`          the same for `jax.jvp` and Hessian-vector products: a custom_jvp
    `both_ways`     True where `apply` itself can be differentiated in both directions
    `has_offset`    True where the parameter is [2, ...], a scale and the offset of the grid
    `trains_scale`  True where the parameter has a gradient
    `to_nearest`    True where `apply` is `quantize(x, scale) * scale`, without an offset or a rounding of its own
    `any_order`     True where the order of axes does not matter to `apply`
    `source`        "package.module:name" of one of your own: how files name it, and `own=` of their readers knows it
    """

    apply: Callable[[Array, Array, QuantSpec], Array] = field(repr=False)
    init: Callable[[Array, QuantSpec], Array] = field(repr=False)
    scale: Callable[[Array, QuantSpec], Array] = field(repr=False)
    name: str = "custom"
    twin: Quantizer | None = field(default=None, repr=False)
    both_ways: bool = False
    has_offset: bool = False
    trains_scale: bool = True
    to_nearest: bool = False
    any_order: bool = False
    source: str = ""

    def __call__(self, x: Array, parameter: Array, spec: QuantSpec) -> Array:
        x_hat = self.apply(x, parameter, spec)
        try:
            chex.assert_equal_shape((x, x_hat))
        except AssertionError as error:
            raise InputError(
                f"the quantizer {self.name!r} makes {list(x_hat.shape)} of {list(x.shape)}; its apply keeps the shape"
            ) from error
        return x_hat


@dataclass(frozen=True)
class Observer:
    """How a scale is estimated from data, as four pure functions over a state pytree.

    Data arrives as `[channels, entries]` float32 (one channel for a per-tensor scale), so an observer never sees axes.
    With `per_sample` it arrives as `[channels, samples, entries]`, the entries of each sample of the batch apart.
    `init(channels) -> state`, `update(state, x) -> state`, `merge(state, state) -> state` (associative and commutative,
    or None where the order of batches matters), `finalize(state, spec) -> scale` of shape [channels].
    `source` is "package.module:name" of one of your own: how files name it, and `own=` of their readers knows it.
    """

    init: Callable[[int], Any] = field(repr=False)
    update: Callable[[Any, Array], Any] = field(repr=False)
    merge: Callable[[Any, Any], Any] | None = field(repr=False)
    finalize: Callable[[Any, QuantSpec], Array] = field(repr=False)
    name: str = "custom"
    options: tuple[tuple[str, float], ...] = ()
    per_sample: bool = False
    source: str = ""


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
    `observer`      the calibration statistic; None takes the default of the role (nmse for values, min-max for weights)
    `fixed_scale`   real per LSB; set, it is neither observed nor trained
    `rounding`      to an integer; `prepare` sets it to what the target's integers do at this place
    """

    dtype: str
    axis: Literal["out"] | None = None
    scale_form: Literal["real", "pow2"] = "real"
    quantizer: Quantizer | None = None
    observer: Observer | None = None
    fixed_scale: float | None = None
    rounding: Rounding = "half_even"

    def __post_init__(self) -> None:
        bit_width(self.dtype)
        if self.axis not in (None, "out"):
            raise QConfigError(f"axis must be None or 'out', not {self.axis!r}")
        if self.scale_form not in ("real", "pow2"):
            raise QConfigError(f"scale_form must be 'real' or 'pow2', not {self.scale_form!r}")
        for port, kind, example in (
            ("quantizer", Quantizer, "jq.lsq"),
            ("observer", Observer, "jq.observers.mse()"),
        ):
            given = getattr(self, port)
            if given is not None and not isinstance(given, kind):
                shown = _describe(given, f"jq.{port}s")
                raise QConfigError(f"{port} must be a jq.{port}s.{kind.__name__} such as {example}, not {shown}")
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


def _describe(given: Any, room: str) -> str:
    """A wrong quantizer or observer; of a function of its room that makes one, how to call it."""
    name = getattr(given, "__name__", "")
    return f"the function {name!r}; call it: {room}.{name}()" if callable(given) and name else repr(given)


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

    `explicit`  the output was asked for by the full name of the node or of its module, not by a pattern
    `rank`      the number of the rule that asked for the output, later ones being higher; -1: no rule did
    `narrow`    the int8 or int16 output that earlier rules ask for, where the last one asks for high precision
    """

    output: QuantSpec | None = None
    weight: QuantSpec | None = None
    input: FrozenMap[QuantSpec] = FrozenMap()
    explicit: bool = False
    rank: int = -1
    narrow: QuantSpec | None = None


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
    `bounded`      True where the output lies in [-1, 1] whatever the operand
    `takes_exact`  True where an exact operand (mask, index, pixel) has a meaning, in float and in integers
    `reduces`      True where the output is over all elements along `axes` or `axis`
    `moves`        True where each element of the output is one of the first operand, so that an accumulator passes
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
    moves: ClassVar[bool] = False
    bounded: ClassVar[bool] = False
    takes_exact: ClassVar[bool] = False
    reduces: ClassVar[bool] = False
    layout: ClassVar[Literal["framework", "elementwise", "spatial", "axes"]] = "framework"


@dataclass(frozen=True)
class Input:
    """A graph input: its shape, with None for the symbolic batch. One that is not float32 is exact: never quantized."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class Node:
    """One operator call. `inputs` are value names; `params` maps the operator's parameter roles to keys of params.

    `call_of` is the module of which this is a later call, "" for the first: `Node("ff_1", ..., call_of="ff")`. Rules
    for the module reach all its calls.
    """

    name: str
    op: Op
    inputs: tuple[str, ...]
    params: FrozenMap[str] = FrozenMap()
    call_of: str = ""


@dataclass(frozen=True)
class Structure:
    """How leaves are nested: `keys` of a dict or of the fields of an object, `parts` in order, `type` of an object."""

    kind: Literal["leaf", "none", "tuple", "list", "dict", "object"]
    keys: tuple[str, ...] = ()
    parts: tuple[Structure, ...] = ()
    type: str = ""


@dataclass(frozen=True, eq=True)
class Graph:
    """Nodes in evaluation order. A value is named by the input or the node that makes it; one output a node.

    `takes`, `gives`  how the model that it came from nests its arguments and its result; None: one after the other
    """

    inputs: tuple[Input, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    takes: Structure | None = None
    gives: Structure | None = None

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

Rounding = Literal["half_up", "half_even", "half_away", "floor", "toward_zero"]
ROUNDINGS: tuple[Rounding, ...] = typing.get_args(Rounding)


@dataclass(frozen=True, kw_only=True)
class RescaleFormat:
    """Section 3 of the specification: y = sat(rsh(sat_inner(v >> pre) * mantissa, post)).

    `mantissa_bits`        of the magnitude: the mantissa is below 2^bits, 15 for an int16
    `mantissa_rounding`    of the exact ratio to a mantissa
    `mantissa_overflow`    of a mantissa that rounds up to 2^bits: "clamp" to 2^bits - 1, or "renormalize": half of it,
                           with an exponent one higher
    `ratio_bits`           a ratio is clamped to at most 2^bits - 1
    `inner_bits`           of the saturation between pre-shift and product, the sign included; 32: as an int32
    `max_pre_shift`, `max_post_shift`  the largest shifts that a row of constants holds
    `post_shift_int8`, `post_shift_int16`  the right shift, by width of the output, from which on the rest is pre-shift
    `pre_rounding`, `average_pre_rounding`  of the pre-shift; that of averages (pools, RoIAlign)
    `post_rounding`        of the post-shift
    `high_precision`       no pre-shift and no inner saturation: the product of the whole accumulator is shifted once
    """

    mantissa_bits: Annotated[int, (4, 15)]
    mantissa_rounding: Rounding
    mantissa_overflow: Literal["clamp", "renormalize"]
    ratio_bits: Annotated[int, (8, 15)]
    inner_bits: Annotated[int, (16, 32)]
    max_pre_shift: Annotated[int, (0, 31)]
    max_post_shift: Annotated[int, (0, 31)]
    post_shift_int8: Annotated[int, (0, 31)]
    post_shift_int16: Annotated[int, (0, 31)]
    pre_rounding: Rounding
    average_pre_rounding: Rounding
    post_rounding: Rounding
    high_precision: bool

    def __post_init__(self) -> None:
        check_fields(self)

    def post_shift(self, bits: int) -> int:
        """The right shift beyond which an output of `bits` bits takes the rest as pre-shift."""
        return self.post_shift_int8 if bits <= 8 else self.post_shift_int16


@dataclass(frozen=True, kw_only=True)
class AddendFormat:
    """The operand fused into a convolution, section 4: rsh(e * sumin_scale, sumin_rshift).

    `multiplier_bits`, `multiplier_rounding`  the multiplier is below 2^bits, rounded from the exact ratio of scales
    `max_shift`  the largest shift of the multiplier
    `rounding`   of the product's shift
    """

    multiplier_bits: Annotated[int, (4, 15)]
    multiplier_rounding: Rounding
    max_shift: Annotated[int, (0, 31)]
    rounding: Rounding

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class AdditionFormat:
    """Add and sub, section 5: (a << sh) +- b * multiplier, rescaled from s_a / 2^sh.

    `max_shift_int8`, `max_shift_int16`  the largest sh, where both operands have at most 8 bits, and else
    `multiplier_bits`, `multiplier_rounding`  the multiplier is below 2^bits, rounded from the exact ratio of scales
    """

    max_shift_int8: Annotated[int, (0, 23)]
    max_shift_int16: Annotated[int, (0, 15)]
    multiplier_bits: Annotated[int, (4, 15)]
    multiplier_rounding: Rounding

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class TableFormat:
    """Lookup tables, section 6.

    `entries`                of one table of an int16 input
    `fraction_bits`          of the index into a table
    `count`, `multiple`, `max_count`  tables of a function unless its options say otherwise; their number is a multiple
                             of `multiple`, and at most `max_count`
    `outer`                  left and right of the tables: a "line", or the "constant" of the nearest entry
    `entry_rounding`         of the function to the grid of the output
    `coefficient_bits`, `coefficient_rounding`  alpha and beta of a line are below 2^bits, rounded from the exact ones
    `max_shift`              the largest r, the right shift of a line
    `index_rounding`, `line_rounding`  of that shift, for the index and for an outer line
    `interpolation_rounding` of the product of difference and fraction
    `angle_rounding`         of an angle to its period of 2^16 steps
    """

    entries: Annotated[int, (4, 256)]
    fraction_bits: Annotated[int, (0, 12)]
    count: Annotated[int, (1, 1024)]
    multiple: Annotated[int, (1, 1024)]
    max_count: Annotated[int, (1, 1024)]
    outer: Literal["line", "constant"]
    entry_rounding: Rounding
    coefficient_bits: Annotated[int, (8, 15)]
    coefficient_rounding: Rounding
    max_shift: Annotated[int, (0, 30)]
    index_rounding: Rounding
    line_rounding: Rounding
    interpolation_rounding: Rounding
    angle_rounding: Rounding

    def __post_init__(self) -> None:
        check_fields(self)
        if self.last_index >= 2**self.coefficient_bits:
            raise QConfigError(
                f"TableFormat: the last index, {self.entries - 1} * 2^{self.fraction_bits}, must be below "
                f"2^coefficient_bits = 2^{self.coefficient_bits}; take fewer entries or fraction_bits"
            )
        if self.count % self.multiple or self.count > self.max_count:
            raise QConfigError(
                f"TableFormat: count {self.count} must be a multiple of {self.multiple} up to {self.max_count}"
            )

    @property
    def last_index(self) -> int:
        """The index of the last entry, in units of 2^-fraction_bits."""
        return (self.entries - 1) << self.fraction_bits


@dataclass(frozen=True, kw_only=True)
class ResizeFormat:
    """Resizing by steps, section 7.

    `step_bits`, `step_rounding`      fraction bits of step and offset, and how the exact ones are rounded to them
    `weight_bits`, `weight_rounding`  fraction bits of the bilinear weights, and how a coordinate is cut to them
    `rounding`                        of the sum of the products
    `nearest_index`                   "exact": the pixel of the float rule; "fixed": by steps of `step_bits`
    """

    step_bits: Annotated[int, (4, 16)]
    step_rounding: Rounding
    weight_bits: Annotated[int, (0, 14)]
    weight_rounding: Rounding
    rounding: Rounding
    nearest_index: Literal["exact", "fixed"]

    def __post_init__(self) -> None:
        check_fields(self)
        if self.weight_bits > self.step_bits:
            raise QConfigError(f"ResizeFormat: weight_bits {self.weight_bits} are above step_bits {self.step_bits}")


@dataclass(frozen=True, kw_only=True)
class GridFormat:
    """Sampling at computed coordinates (grid_sample, warp, RoIAlign, affine_grid), section 7.

    `coordinate_bits`, `max_fraction_bits`  absolute coordinates have clip(coordinate_bits - ceil(log2(n + 1)), 0,
                             max_fraction_bits) fraction bits, n being the longest side
    `nearest_rounding`       of a coordinate to a pixel
    `rounding`               of the sum of the four products
    `map_bits`, `map_constant_rounding`, `max_map_shift`  from normalized coordinates to pixels, (a * g + b) >> k: a is
                             below 2^bits, a and b are rounded from the exact ones, and k is the largest one
    `map_rounding`           of that shift
    `affine_bits`, `affine_rounding`  fraction bits of the base grid of affine_grid, and how it is rounded
    `point_bits`, `point_fraction_rounding`, `point_rounding`  of the parts that RoIAlign cuts a side into, and of their
                             products with it
    """

    coordinate_bits: Annotated[int, (8, 15)]
    max_fraction_bits: Annotated[int, (0, 8)]
    nearest_rounding: Rounding
    rounding: Rounding
    map_bits: Annotated[int, (4, 15)]
    map_constant_rounding: Rounding
    max_map_shift: Annotated[int, (0, 16)]
    map_rounding: Rounding
    affine_bits: Annotated[int, (1, 14)]
    affine_rounding: Rounding
    point_bits: Annotated[int, (1, 15)]
    point_fraction_rounding: Rounding
    point_rounding: Rounding

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A march as data. Nothing outside `targets/` knows a chip, and no field has a default.

    Each field is a number of public documents, or a decision of `docs/nash-arithmetic.md` where they are silent;
    `docs/targets.md` says which. A person with a board changes it in `targets/` or in a file (`jq.targets.load`).

    `name`                 as in "nash-e"
    `default_dtype`        of values, in templates
    `integer`              False: the integer post-processing is not public, and `lower` refuses
    `activation_dtypes`, `weight_dtypes`  that an integer program can have
    `quantize_rounding`    of real numbers to integers: inputs, weights, constants
    `number_rounding`      of numbers that enter integers: fills, bounds of clamp and ReLU6, the modulus of a remainder
    `bias_rounding`        of a bias to the grid of its accumulator
    `slope_dtype`          of the slope of PReLU
    `rescale`, `addend`, `addition`, `tables`, `resize`, `grid`  how each unit computes
    `max_kernel`           the largest side of a kernel
    `max_conv_inputs`      products in one sum: KH * KW * C / groups
    `max_reduced`          elements of a reduced window or axis
    `max_searched`         elements of an axis that argmax and argmin search
    `max_rank`             axes of a value

    Raises:
      QConfigError: a value that a field cannot have, or that is not implemented; all of them are named.
    """

    name: str
    default_dtype: Literal["int8", "int16", "float16"]
    integer: bool
    activation_dtypes: tuple[str, ...]
    weight_dtypes: tuple[str, ...]
    quantize_rounding: Rounding
    number_rounding: Rounding
    bias_rounding: Rounding
    slope_dtype: Literal["int8", "int16"]
    rescale: RescaleFormat
    addend: AddendFormat
    addition: AdditionFormat
    tables: TableFormat
    resize: ResizeFormat
    grid: GridFormat
    max_kernel: Annotated[int, (1, 2**15)]
    max_conv_inputs: Annotated[int, (1, 2**16)]
    max_reduced: Annotated[int, (1, 2**23)]
    max_searched: Annotated[int, (1, 2**31 - 1)]
    max_rank: Annotated[int, (1, 32)]

    def __post_init__(self) -> None:
        check_fields(self)
        known = {"activation_dtypes": {"int8", "int16"}, "weight_dtypes": {"int4", "int8", "int16"}}
        for port, dtypes in known.items():
            given = getattr(self, port)
            if not given or not set(given) <= dtypes or len(set(given)) < len(given):
                raise QConfigError(f"Target: {port} is {given!r}; it holds some of {', '.join(sorted(dtypes))}")

    def with_fields(self, changes: Mapping[str, Any]) -> Target:
        """The same march with other values of some fields.

        Args:
          changes: {path: value}; a field of a group is named after it, as in "rescale.post_rounding".

        Returns:
          A `Target`. It has the name of this one unless `changes` holds one, and another fingerprint.

        Raises:
          QConfigError: a field that does not exist, or a value that it cannot have.

        Example:
          >>> import jquant as jq
          >>> exact = jq.targets.NASH_E.with_fields({"rescale.high_precision": True})
          >>> exact.rescale.high_precision, exact.fingerprint == jq.targets.NASH_E.fingerprint
          (True, False)
        """
        grouped: dict[str, dict[str, Any]] = {}
        for path, value in changes.items():
            group, _, name = path.rpartition(".")
            owner: Any = getattr(self, group, None) if group else self
            if not hasattr(owner, "__dataclass_fields__") or name not in owner.__dataclass_fields__:
                raise QConfigError(f"a Target has no field {path!r}; `jq.targets.fields()` lists them")
            grouped.setdefault(group, {})[name] = value
        own = grouped.pop("", {})
        return replace(self, **{g: replace(getattr(self, g), **of) for g, of in grouped.items()}, **own)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the SHA-256 of all fields but the name: what a program was lowered for."""
        fields = {name: value for name, value in asdict(self).items() if name != "name"}
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def _hash(self) -> int:
        return hash((self.name, self.fingerprint))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return f"{self.name} ({self.fingerprint})"


def check_fields(value: Any) -> None:
    """Raises one QConfigError for every field of a format with a value that it cannot have."""
    broken = []
    for name, kind in field_kinds(type(value)).items():
        given, choices = getattr(value, name), typing.get_args(kind)
        if typing.get_origin(kind) is Literal:
            if not isinstance(given, str) or given not in choices:
                broken.append(f"{name} is {given!r}; it can be {', '.join(map(repr, choices))}")
        elif typing.get_origin(kind) is Annotated:
            low, high = choices[1]
            if type(given) is not int or not low <= given <= high:
                broken.append(f"{name} is {given!r}; it can be {low} to {high}")
        elif typing.get_origin(kind) is tuple:
            if not isinstance(given, tuple) or not all(isinstance(item, str) for item in given):
                broken.append(f"{name} is {given!r}; it is a tuple of dtypes")
        elif type(given) is not kind:
            broken.append(f"{name} is {given!r}; it is a {kind.__name__}")
    if broken:
        raise QConfigError(f"{type(value).__name__}: " + "; ".join(broken))


def field_kinds(cls: Any) -> dict[str, Any]:
    """The annotated types of the fields of a target or format: most are `Literal` or `Annotated[int, (low, high)]`."""
    return _field_kinds(cls)


@cache
def _field_kinds(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {entry.name: hints[entry.name] for entry in dataclass_fields(cls)}


# ---------------------------------------------------------------------------------------------------------------------
# What the verbs hand on


@dataclass(frozen=True)
class Resolution:
    """One row of `explain`: what the qconfig asked for a value, what applies, and why the two differ.

    `rule` is the name whose rule decides the output, where that is another node of the same fused group.
    """

    name: str
    port: Literal["output", "weight", "input"]
    requested: str
    applied: str
    reason: str
    rule: str = ""


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
    `moved`     {value: shape of its operand, without the batch} of data movement behind an int32 accumulator: scales of
                channels move along
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
    moved: FrozenMap[tuple[int, ...]] = FrozenMap()

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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Model:
    """A model with a decision for every value and weight: a pytree whose leaves are its parameters and scales.

    `prepare` makes it, `calibrate` gives it scales; `apply`, `lower` and everything else takes it. Gradients of a loss
    over it, labels and the moments of an optimizer have its form: `jax.grad(loss)(model)`.

    `plan`     what is static
    `params`   {name: float32 array, real} of the plan's graph
    `qparams`  {value or weight: the trainable leaf that its quantizer makes of a scale}; {} before calibration
    """

    plan: Plan = field(metadata={"static": True})
    params: Params
    qparams: QParams = field(default_factory=dict)

    def replace(self, **changes: Any) -> Model:
        """The model with other fields: `model.replace(params=trained)`."""
        return replace(self, **changes)

    def __repr__(self) -> str:  # arrays would fill the screen, and what jax maps over has other leaves
        graph, scales = self.plan.graph, f"{len(self.qparams)} scales" if self.qparams else "not calibrated"
        return f"Model({len(graph.nodes)} nodes for {self.plan.target.name}, {len(self.params)} parameters, {scales})"


@dataclass(frozen=True)
class NodeFormat:
    """The integer formats around one node of a program, and how it accumulates; "float32" behind a `Dequantize`.

    `accumulator`  "int32" where the worst case fits; "pair" where all but the bias fits, and the two are kept apart;
                   "limbs" where the sum is carried in base-2^16 limbs
    `kernel`       the implementation of a convolution or matrix product; "" where there is nothing to choose
    """

    inputs: tuple[str, ...]
    output: str
    accumulator: Literal["int32", "pair", "limbs"] = "int32"
    kernel: str = ""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Accumulator:
    """How far the accumulator of a node gets. It is for the reader of a program; no integer rule uses it.

    The numbers depend on the weights. So they are leaves, and programs of one plan have one static part.

    `worst_case`  bound on |accumulator| in acc: float32, rounded up
    `saturating`  bool [O], for an int32 output alone: the channels whose sum leaves 32 bits for some operands. The
                  output saturates there, once.
    """

    worst_case: Array
    saturating: Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Program:
    """An integer program: a static graph, integer constants, and the scales of its values.

    `constants`  {node: {role: integer array}}
    `scales`     {value: float32 scale, real per LSB}: scalar, or broadcastable per channel for high-precision values.
                 Only the borders use them; no integer rule reads a scale. Exact, float16 and float32 values have none.
    `accumulators` {node: Accumulator}; of a node with weights only where they are known, which is not inside jit
    `lowered_for`  name and fingerprint of the march that the constants were made for: `run` refuses another target
    """

    constants: dict[str, dict[str, Array]]
    scales: dict[str, Array]
    accumulators: dict[str, Accumulator]
    graph: Graph = field(metadata={"static": True})
    formats: FrozenMap[NodeFormat] = field(metadata={"static": True})
    inputs: FrozenMap[str] = field(metadata={"static": True})  # {graph input: quantized or exact dtype}
    target: Target = field(metadata={"static": True})
    lowered_for: str = field(metadata={"static": True})

    def check_single(self) -> None:
        """Raises LoweringError for a stack of programs, as its accumulators show."""
        if any(a.worst_case.ndim for a in self.accumulators.values()):
            raise LoweringError(
                "these are several programs, stacked; run them with jax.vmap(jq.run, in_axes=(0, None)), and save each "
                "one before jq.stack_programs"
            )

    def check_target(self) -> None:
        """Raises LoweringError where the target is not the march that the constants were made for."""
        if self.lowered_for != str(self.target):
            raise LoweringError(
                f"the program was lowered for {self.lowered_for}, and its target is {self.target}: constants of one "
                "march have no meaning on another; prepare and lower the model for it"
            )

    def __str__(self) -> str:
        return format_program(self)
