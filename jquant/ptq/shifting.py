"""Shifted relus: a value behind a relu uses all integers of its format, and not only those that are not negative."""

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, count
from typing import Any, cast

import numpy as np

from jquant.graph.passes import param_uses, with_params
from jquant.meanings.fake_quant import weight_on_grid
from jquant.numerics.namespace import to_device, to_host
from jquant.ops.activation import Dropout
from jquant.ops.conv import Conv, ConvTranspose, Linear
from jquant.ops.elementwise import Clamp
from jquant.ops.indexing import Slice
from jquant.ops.movement import Flatten, Pad, Permute, Reshape
from jquant.ops.pool import AdaptiveAvgPool, AdaptiveMaxPool, AvgPool, MaxPool
from jquant.ops.reduce import Mean, ReduceMax
from jquant.plan.batch_norm import check_folded, raise_collapsed
from jquant.plan.scales import check_model, quantizer_of, scale_of
from jquant.ptq.channels import Layer, layers, rows
from jquant.text import format_table
from jquant.types import Array, FrozenMap, Graph, Model, Node, Op, QuantSpec, Resolution

UPPER = {"relu": None, "relu6": 6.0}
KEEPS_SCALE = (Dropout, Slice, Flatten, Permute, Reshape, MaxPool, AdaptiveMaxPool, ReduceMax)


@dataclass(frozen=True)
class Shift:
    """A layer with a relu; or, with a reason, one whose values stay as they are.

    `readers`  layers whose biases take up the constant
    `padded`   those of them that need a node that pads, since the zeros around their operand are no zeros any more
    `through`  nodes between that move the constant along: pools, means, movement of data
    """

    name: str
    reason: str = ""
    readers: tuple[str, ...] = ()
    padded: tuple[str, ...] = ()
    through: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shifts:
    """Every layer with a relu; `print` shows which values can be shifted, and what keeps the others from it."""

    all: tuple[Shift, ...]

    @property
    def possible(self) -> tuple[Shift, ...]:
        return tuple(shift for shift in self.all if not shift.reason)

    @property
    def padded(self) -> tuple[str, ...]:
        """The convolutions that would need a node that pads."""
        return tuple(name for shift in self.possible for name in shift.padded)

    def __str__(self) -> str:
        rows = [(s.name, ", ".join(s.readers) or "-", ", ".join(s.padded) or "-", s.reason) for s in self.all]
        return format_table(("layer", "readers", "padded", "reason"), rows)


class _RefusedError(Exception):
    """Why a value stays as it is."""


def find_shifts(model: Model, *, pads: bool = False) -> Shifts:
    """Which values behind a relu can be shifted: those that only layers read, through pools and movement of data.

    Args:
      model: calibrated, batch norm folded.
      pads: as for `shift_relus`.
    """
    search = _Search(_on_host(model), pads)
    return Shifts(tuple(search.shift(node) for node, op in layers(model.plan.graph) if op.activation != "none"))


def shift_relus(model: Model, *, pads: bool = False) -> Model:
    """Halves the steps of values behind a relu, on the same symmetric grid.

    Behind a relu a signed format leaves half of its integers unused. Here the layer subtracts c = 128 s in its bias, s
    = 127 / 255 of the scale that was there, so that the values 0 to 255 s become -128 s to 127 s. The saturation of the
    integers is then the relu: the `Clamp` that takes its place has no effect on them. Every reader adds c times the sum
    of its weights to its bias. With weights on their grid that is exact, so weights of readers are put there, as
    `adaround` does. A convolution that pads its operand with zeros would need another number there: with `pads` a node
    in front of it pads with -c, otherwise such values stay as they are.

    Call it last: behind `search_weight_scales` and `correct_bias`. The shifted values have fixed scales, so that
    another calibration leaves them alone. Nodes that pad cost bandwidth on a chip.

    Args:
      model: calibrated, batch norm folded.
      pads: whether nodes that pad may be added.

    Returns:
      The model with other biases, weights of readers and scales; as it was where `find_shifts` finds nothing.

    Raises:
      CalibrationError: scales that are missing. JQuantError: a batch norm that was kept for training.

    References:
      Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
      section 2.3: the terms of a zero point, all of which are constants here.

    Example:
      model = jq.ptq.correct_bias(jq.ptq.search_weight_scales(jq.calibrate(model, batches)), batches)
      model = jq.ptq.shift_relus(model)
    """
    found = find_shifts(model, pads=pads).possible
    return _Rewriting(_on_host(model)).shifted(found) if found else model


def _on_host(model: Model) -> Model:
    """The model with numpy arrays: what happens once compiles nothing."""
    check_folded(model.plan, "shift_relus")
    check_model(model)
    return Model(model.plan, to_host(model.params), to_host(model.qparams))


# ---------------------------------------------------------------------------------------------------------------------
# Where it is possible


class _Search:
    """What reads the value of a relu."""

    def __init__(self, model: Model, pads: bool) -> None:
        self._model, self._pads = model, pads
        self._graph = model.plan.graph
        self._uses = param_uses(self._graph)

    def shift(self, node: Node) -> Shift:
        try:
            self._check_format(node.name)
            self._check_bias(node)
            readers: list[str] = []
            padded: list[str] = []
            through: list[str] = []
            self._follow(node.name, offset_of(self._model, node.name), readers, padded, through)
        except _RefusedError as reason:
            return Shift(node.name, str(reason))
        return Shift(node.name, "", *(tuple(dict.fromkeys(each)) for each in (readers, padded, through)))

    def _check_format(self, value: str) -> None:
        plan = self._model.plan
        spec = plan.values[value]
        if spec is None or spec.is_float or spec.is_high_precision:
            raise _RefusedError(f"{value} is {'float' if spec is None else spec.dtype}")
        if value not in plan.owned or spec.fixed_scale is not None:
            raise _RefusedError(f"{value} has the scale of another value, or a fixed one")
        if spec.bits > 8 or spec.dtype.startswith("u"):
            raise _RefusedError(f"{value} is {spec.dtype}: a shift would win nothing that counts")
        if quantizer_of(spec).has_offset or np.ndim(scale_of(value, plan, self._model.qparams)):
            raise _RefusedError(f"{value} has an offset, or a scale for each channel")
        if not _narrower(self._model, value) < float(scale_of(value, plan, self._model.qparams)):
            raise _RefusedError(f"{value} has no smaller scale")

    def _check_bias(self, node: Node) -> None:
        if "bias" in node.params and self._uses[node.params["bias"]] > 1:
            raise _RefusedError(f"{node.name} shares its bias")

    def _follow(self, value: str, c: float, *found: list[str]) -> None:
        readers, padded, through = found
        if value in self._graph.outputs:
            raise _RefusedError(f"{value} is an output of the graph")
        for reader in self._graph.consumers[value]:
            if isinstance(reader.op, Conv | ConvTranspose | Linear):
                self._check_reader(reader, reader.op, value)
                readers.append(reader.name)
                if reader.inputs[0] == value and _pads(reader.op):
                    padded.append(reader.name)
                continue
            self._check_through(reader, c)
            through.append(reader.name)
            self._follow(reader.name, c, *found)

    def _check_reader(self, reader: Node, op: Layer, value: str) -> None:
        self._check_bias(reader)
        key = reader.params["weight"]
        if self._uses[key] > 1:
            raise _RefusedError(f"{reader.name} shares its weight")
        if reader.inputs[0] == value:
            if isinstance(op, ConvTranspose):
                raise _RefusedError(f"{reader.name} is a transposed convolution: its borders have fewer terms")
            if _pads(op) and not self._pads:
                raise _RefusedError(f"{reader.name} pads with zeros (`pads` allows a node for that)")
        if self._model.plan.values[reader.name] is None:
            raise _RefusedError(f"{reader.name} is float")

    def _check_through(self, node: Node, c: float) -> None:
        plan = self._model.plan
        if not _passes_constants(node.op):
            raise _RefusedError(f"{node.name} ({type(node.op).__name__}) has no bias that could take up the constant")
        if isinstance(node.op, Pad) and node.op.mode == "constant" and node.op.value < 0:
            raise _RefusedError(f"{node.name} pads with {node.op.value:g}, which a shifted value cannot hold")
        if node.name not in plan.owned:
            return
        spec = self._checked_through(node.name)
        scale = float(scale_of(node.name, plan, self._model.qparams))
        if _scale_behind(scale, spec, c) > scale:
            raise _RefusedError(f"{node.name} ({type(node.op).__name__}) has a range below the constant")

    def _checked_through(self, value: str) -> QuantSpec:
        spec = self._model.plan.values[value]
        if spec is None or spec.is_float or spec.fixed_scale is not None or spec.is_high_precision:
            raise _RefusedError(f"{value} is float, or has a fixed scale")
        if quantizer_of(spec).has_offset or spec.scale_form != "real" or spec.dtype.startswith("u"):
            raise _RefusedError(f"{value} has an offset, or a scale of another form")
        return spec


def _pads(op: Layer) -> bool:
    return isinstance(op, Conv) and any(map(any, op.padding))


def _passes_constants(op: Op) -> bool:
    """Whether f(x + c) = f(x) + c."""
    match op:
        case Pad() | Mean() | AdaptiveAvgPool():
            return True
        case AvgPool():
            inside = not any(map(any, op.padding)) and not op.ceil_mode
            return op.divisor is None and (inside or not op.count_include_pad)
    return isinstance(op, KEEPS_SCALE)


def _narrower(model: Model, value: str) -> float:
    """The scale under which all integers of the format cover what those from 0 on did."""
    spec = model.plan.spec(value)
    low, high = spec.range
    wanted: Any = scale_of(value, model.plan, model.qparams) * np.float32(high / (high - low))
    return float(quantizer_of(spec).scale(quantizer_of(spec).init(wanted, spec), spec))


def offset_of(model: Model, value: str) -> float:
    """The constant that a shift subtracts from a value, real."""
    return -model.plan.spec(value).range[0] * _narrower(model, value)


def _scale_behind(scale: float, spec: QuantSpec, c: float) -> float:
    """The scale of a mean whose range [0, top] becomes [-c, top - c]."""
    low, high = spec.range
    return float(np.float32(max(c / -low, (scale * high - c) / high)))


# ---------------------------------------------------------------------------------------------------------------------
# The rewriting


@dataclass
class _Rewriting:
    """The parts of a model as they become."""

    model: Model
    nodes: dict[str, Node] = field(init=False)
    values: dict[str, QuantSpec | None] = field(init=False)
    params: dict[str, Any] = field(init=False)
    qparams: dict[str, Any] = field(init=False)
    notes: list[Resolution] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        plan = self.model.plan
        self.nodes = {node.name: node for node in plan.graph.nodes}
        self.values, self.params, self.qparams = dict(plan.values), dict(self.model.params), dict(self.model.qparams)

    def shifted(self, shifts: tuple[Shift, ...]) -> Model:
        plan = self.model.plan
        behind: dict[str, tuple[str, float]] = {}  # {value: (what is read in its place, its offset)}
        for shift in shifts:
            c = offset_of(self.model, shift.name)
            clamp = self._unused(f"{shift.name}.clamp", self.values)
            self.values[clamp] = None
            behind |= {shift.name: (clamp, c)} | {name: (name, c) for name in shift.through}
            self._set_scale(shift.name, _narrower(self.model, shift.name))
            for name in shift.through:
                if name in plan.owned:
                    scale = float(scale_of(name, plan, self.model.qparams))
                    self._set_scale(name, _scale_behind(scale, plan.spec(name), c))
        # With smaller steps of its operand, the accumulator of a layer may no longer hold what is added to it.
        self.qparams = raise_collapsed(plan, self.params, self.qparams)
        for key in {self.nodes[name].params["weight"] for shift in shifts for name in shift.readers}:
            self._put_on_grid(key)
        for shift in shifts:
            self._fix_scale(shift.name)
        firsts = {shift.name for shift in shifts}
        graph = replace(plan.graph, nodes=tuple(self._all_nodes(plan.graph, firsts, behind)))
        made = replace(
            plan,
            graph=graph,
            values=FrozenMap({name: self.values[name] for name in graph.values}),
            resolutions=(*plan.resolutions, *self.notes),
        )
        return to_device(Model(made, {key: self.params[key] for key in graph.param_names}, self.qparams))

    @staticmethod
    def _unused(name: str, known: Container[str]) -> str:
        return next(each for each in chain([name], (f"{name}.{i}" for i in count(2))) if each not in known)

    def _set_scale(self, name: str, scale: float) -> None:
        spec, wanted = self.model.plan.spec(name), np.asarray(scale, np.float32)
        self.qparams[name] = quantizer_of(spec).init(cast(Array, wanted), spec)

    def _put_on_grid(self, key: str) -> None:
        if key in self.model.plan.weights:
            self.params[key] = weight_on_grid(key, self.model.replace(qparams=self.qparams))

    def _fix_scale(self, name: str) -> None:
        scale = _narrower(self.model, name)
        self.values[name] = replace(self.model.plan.spec(name), fixed_scale=scale, quantizer=None, observer=None)
        del self.qparams[name]

    def _all_nodes(self, graph: Graph, firsts: set[str], behind: Mapping[str, tuple[str, float]]) -> Iterator[Node]:
        for node in graph.nodes:
            made = replace(node, inputs=tuple(behind.get(v, (v, 0.0))[0] for v in node.inputs))
            if isinstance(node.op, Conv | ConvTranspose | Linear):
                yield from self._layer(made, node, behind, shifts=node.name in firsts)
                continue
            self._follow_format(made)
            if isinstance(node.op, Pad) and node.op.mode == "constant" and node.name in behind:
                made = replace(made, op=replace(node.op, value=node.op.value - behind[node.name][1]))
            yield made

    def _follow_format(self, node: Node) -> None:
        """A value that keeps its producer's scale carries its spec."""
        spec = self.values.get(node.name)
        if spec is not None and node.name not in self.model.plan.owned and node.inputs:
            before = self.values.get(node.inputs[0])
            if node.op.scale_rule != "own" and before is not None and before.fixed_scale is not None:
                self.values[node.name] = before

    def _layer(self, made: Node, old: Node, behind: Mapping[str, tuple[str, float]], *, shifts: bool) -> Iterator[Node]:
        op: Any = old.op
        constants = [behind.get(value, ("", 0.0))[1] for value in old.inputs]
        bias = constants[0] * self._row_sums(old.params["weight"], op) + sum(constants[1:])
        if constants[0] and _pads(op):
            pad = self._pad(made, op, -constants[0])
            yield pad
            made = replace(made, inputs=(pad.name, *made.inputs[1:]))
            op = replace(op, padding=((0, 0),) * len(op.padding))
        activation, c = op.activation, behind[old.name][1] if shifts else 0.0
        if shifts:
            op, bias = replace(op, activation="none"), bias - c
        yield self._with_bias(replace(made, op=op), bias)
        if shifts:
            upper = UPPER[activation]
            clamp = Clamp(minimum=-c, maximum=None if upper is None else upper - c)
            yield self._added(behind[old.name][0], clamp, old.name, "the relu of a shifted value")

    def _row_sums(self, key: str, op: Layer) -> np.ndarray:
        """The sum of the weights of each output channel, [out]."""
        weight: Any = np.asarray(self.params[key], np.float64)
        return np.asarray(rows(op, weight)).sum(-1).reshape(-1)

    def _pad(self, node: Node, op: Conv, value: float) -> Node:
        spatial = op.padding
        padding = ((0, 0), *spatial, (0, 0)) if op.channels_last else ((0, 0), (0, 0), *spatial)
        name = self._unused(f"{node.name}.pad", self.values)
        return self._added(name, Pad(padding=padding, value=value), node.inputs[0], "what zeros became by a shift")

    def _added(self, name: str, op: Op, operand: str, reason: str) -> Node:
        spec = self.values[operand]
        self.values[name] = spec
        self.notes.append(Resolution(name, "output", "-", str(spec), reason))
        return Node(name, op, (operand,))

    def _with_bias(self, node: Node, added: np.ndarray) -> Node:
        if not added.any():
            return node
        key = node.params.get("bias") or self._unused(f"{node.name}.bias", self.params)
        before = np.asarray(self.params[key], np.float64) if "bias" in node.params else 0.0
        self.params[key] = np.asarray(before + added, np.float32)
        return with_params(node, {**node.params, "bias": key})
