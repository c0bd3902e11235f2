"""One value alone: what a node makes of given operands under a march, or how an input is quantized.

The constants come from lowering, and the integers from the reference, which is the definition.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jquant.graph.float import value_shapes
from jquant.graph.operator import Operand
from jquant.numerics.namespace import real, to_host
from jquant.plan.batch_norm import fold_kept
from jquant.plan.scales import value_scales
from jquant.program.lower import dtype_of, lower_node
from jquant.reference.arithmetic import quantize
from jquant.reference.interpreter import evaluate
from jquant.types import FrozenMap, Graph, Model, Node, NodeFormat, Program, Target

Constants = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Lone:
    """A value of a model with all that its integers depend on, but for the march and the operands.

    `operands`  the names of the values that it is made of: those of the node, or of an input its own name
    """

    name: str
    model: Model
    node: Node | None
    inputs: tuple[Operand, ...]
    output: Operand

    @property
    def operands(self) -> tuple[str, ...]:
        return (self.name,) if self.node is None else self.node.inputs

    @property
    def operator(self) -> str:
        return "Input" if self.node is None else type(self.node.op).__name__

    def constants(self, target: Target) -> Constants:
        """The constants of the node under a march.

        Raises:
          LoweringError: the node has no form there.
        """
        if self.node is None:
            return {}
        plan = replace(self.model.plan, target=target)
        lowered = lower_node(plan, self.model.params, self.model.qparams, self.node, self.inputs, self.output)
        return lowered.constants

    def evaluate(self, target: Target, constants: Constants, operands: Sequence[np.ndarray]) -> np.ndarray:
        """int64 for operands in integers; of an input, real ones."""
        if self.node is None:
            return quantize(operands[0], self.output.scale, self.output.dtype, target.quantize_rounding)
        return evaluate(self._program(target, constants), self.node, dict(zip(self.operands, operands, strict=True)))

    def accumulator(self, target: Target, operands: Sequence[np.ndarray]) -> np.ndarray | None:
        """What the rescale is given, in acc; None where the operator has none."""
        constants = self.constants(target)
        if "mantissa" not in constants or self.node is None:
            return None
        plain = {"mantissa": 1, "pre": 0, "post": 0}  # v * 1 >> 0, which nothing saturates below 32 bits
        row = {role: np.full_like(constants[role], value) for role, value in plain.items()}
        whole = replace(self, output=replace(self.output, dtype="int32"))
        return whole.evaluate(target.with_fields({"rescale.high_precision": True}), {**constants, **row}, operands)

    def _program(self, target: Target, constants: Constants) -> Program:
        assert self.node is not None
        made = NodeFormat(tuple(x.dtype for x in self.inputs), self.output.dtype)
        graph = Graph((), (self.node,), (self.name,))
        formats = FrozenMap({self.name: made})
        # `lowered_for` is not said: a fingerprint takes as long as the evaluation, which does not look at it.
        return Program({self.name: dict(constants)}, {}, {}, graph, formats, FrozenMap(), target, "")


def lone_values(model: Model) -> dict[str, Lone]:
    """Every input and node of a calibrated model, by name, in the order of the graph."""
    model = fold_kept(Model(model.plan, to_host(model.params), to_host(model.qparams)))
    plan, graph = model.plan, model.plan.graph
    scales = value_scales(plan, model.qparams)
    shapes = {name: (None, *shape[1:]) for name, shape in value_shapes(graph, model.params).items()}

    def operand(name: str) -> Operand:
        scale = scales[name]
        return Operand(dtype_of(name, plan), real(1) if scale is None else scale, shapes[name])

    found = {entry.name: Lone(entry.name, model, None, (), operand(entry.name)) for entry in graph.inputs}
    for node in graph.nodes:
        inputs = tuple(operand(value) for value in node.inputs)
        found[node.name] = Lone(node.name, model, node, inputs, operand(node.name))
    return found
