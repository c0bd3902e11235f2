"""How a probe is made: a small net with every scale given, its inputs, and what each of its values depends on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jquant.config.qconfig import QConfig, high_precision, int8, int16
from jquant.plan.prepare import prepare
from jquant.targets import NASH_E
from jquant.types import FrozenMap, Graph, Input, Model, Node, Op, Policy

SPECS = {"int8": int8, "int16": int16}
Format = tuple[str, float] | str  # (dtype, real per LSB); "int32" for an accumulator; a dtype where a scale is kept


@dataclass(frozen=True, eq=False)
class Probe:
    """A question to a board: a net, its inputs, and for each value that is to be dumped the fields that it depends on.

    `says`    one sentence for the person at the board
    `graph`, `params`  the float net
    `model`   the same with a format and a scale for every value and weight
    `inputs`  {graph input: float32, real}
    `asks`    {value: paths of fields}: with the dumped operands given, no other field changes its integers
    """

    name: str
    says: str
    graph: Graph
    params: Mapping[str, Any]
    model: Model
    inputs: Mapping[str, np.ndarray]
    asks: Mapping[str, tuple[str, ...]]

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(field for asked in self.asks.values() for field in asked))


class Net:
    """A probe in the making."""

    def __init__(self, name: str, says: str) -> None:
        self.name, self.says = name, says
        self.entries: list[Input] = []
        self.nodes: list[Node] = []
        self.formats: dict[str, Format] = {}
        self.inputs: dict[str, np.ndarray] = {}
        self.params: dict[str, Any] = {}
        self.weights: dict[str, Any] = {}
        self.asks: dict[str, tuple[str, ...]] = {}
        self.outputs: list[str] = []

    def input(
        self, name: str, integers: Any, dtype: str, scale: float, *, asks: tuple[str, ...] = (), batched: bool = True
    ) -> str:
        """An input whose real values are integers (any number, to lie between two grid points) times its scale."""
        real = np.asarray(integers).astype(np.float32) * np.float32(scale)
        self.entries.append(Input(name, (None if batched else len(real), *real.shape[1:])))
        self.formats[name], self.inputs[name] = (dtype, scale), real
        if asks:
            self.asks[name] = asks
        return name

    def weight(self, key: str, integers: Any, scale: Any) -> str:
        """An int8 weight [O, ...] of integers (any numbers) times a scale, one for the tensor or one per channel."""
        steps = np.asarray(scale, np.float32)
        shaped = steps.reshape(-1, *(1,) * (np.ndim(integers) - 1)) if steps.ndim else steps
        self.params[key] = jnp.asarray(np.asarray(integers).astype(np.float32) * shaped)
        self.weights[key] = steps
        return key

    def param(self, key: str, value: Any) -> str:
        self.params[key] = jnp.asarray(value, jnp.float32)
        return key

    def node(
        self,
        name: str,
        op: Op,
        inputs: tuple[str, ...],
        made: Format | None = None,
        asks: tuple[str, ...] = (),
        **params: str,
    ) -> str:
        """A node with a format of its own, or with None that of its operand."""
        self.nodes.append(Node(name, op, inputs, FrozenMap(params)))
        kept = self.formats[inputs[0]]
        self.formats[name] = made or (kept if isinstance(kept, str) else kept[0])
        if asks:
            self.asks[name] = asks
            self.outputs.append(name)
        return name

    def done(self) -> Probe:
        graph = Graph(tuple(self.entries), tuple(self.nodes), tuple(self.outputs))
        model = prepare(graph, self.params, self._qconfig(), target=NASH_E)
        qparams = {name: jnp.asarray(scale) for name, scale in self.weights.items()}
        asks = {model.plan.renamed.get(name, name): asked for name, asked in self.asks.items()}
        return Probe(self.name, self.says, graph, self.params, model.replace(qparams=qparams), self.inputs, asks)

    def _qconfig(self) -> QConfig:
        rules = {name: {"output": _spec(made)} for name, made in self.formats.items()}
        for node in self.nodes:
            for role in node.op.weight_roles:
                per_channel = np.ndim(self.weights[node.params[role]]) > 0
                rules[node.name]["weight"] = int8(axis="out" if per_channel else None)
        return QConfig({name: Policy(**rule) for name, rule in rules.items()})


def _spec(made: Format) -> Any:
    match made:
        case "int32":
            return high_precision
        case str():
            return SPECS[made]()
        case dtype, scale:
            return SPECS[dtype](scale=scale)
