"""LSTM and GRU layers: composites, unrolled over time into linear layers, tables and products."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jquant.graph.operator import Parts, decompose, eval_float
from jquant.ops.composite import Chain, Shapes
from jquant.ops.conv import Linear
from jquant.ops.elementwise import Add, Constant, Mul, Requantize, Sub
from jquant.ops.indexing import Slice
from jquant.ops.movement import Cat, Reshape
from jquant.ops.table import Sigmoid, Tanh
from jquant.types import Array, Node, Op

Output = Literal["sequence", "hidden", "cell"]


@dataclass(frozen=True, kw_only=True)
class Lstm(Op):
    """One direction of one LSTM layer, gates in torch's order: input, forget, cell, output.

    Operands: x [N, T, I], and the state before it, hidden [N, H] and cell [N, H], zeros if both are left out.
    Parameters: weight_ih [4H, I], weight_hh [4H, H], bias_ih [4H] and bias_hh [4H] (optional).
    `output`: the "sequence" [N, T, H] of hidden states, or the last "hidden" or "cell" state [N, H].
    """

    ports: ClassVar = ("x", "hidden", "cell")
    weight_roles: ClassVar = ("weight_ih", "weight_hh")

    reverse: bool = False
    output: Output = "sequence"


@dataclass(frozen=True, kw_only=True)
class Gru(Op):
    """One direction of one GRU layer, gates in torch's order: reset, update, new.

    Operands: x [N, T, I], and hidden [N, H], zeros if it is left out. Parameters as those of `Lstm`, with 3H.
    """

    ports: ClassVar = ("x", "hidden")
    weight_roles: ClassVar = ("weight_ih", "weight_hh")

    reverse: bool = False
    output: Literal["sequence", "hidden"] = "sequence"


# ---------------------------------------------------------------------------------------------------------------------
# Float: a scan over time


def _scan(op: Lstm | Gru, step: Callable, x: Array, weight: Array, bias: Array | None, state: tuple) -> tuple:
    """`step(gates of x at a time, state) -> state` along axis 1; returns the last state and the hidden states."""
    gates = x @ weight.T if bias is None else x @ weight.T + bias

    def forward(before: tuple, at: Array) -> tuple:
        after = step(at, *before)
        return after, after[0]

    states: Any = jax.lax.scan(forward, state, jnp.moveaxis(gates, 1, 0), reverse=op.reverse)
    return states[0], jnp.moveaxis(states[1], 0, 1)


def _zeros(x: Array, weight_hh: Array) -> Array:
    return jnp.zeros((x.shape[0], weight_hh.shape[1]), x.dtype)


@eval_float.register
def _(
    op: Lstm,
    x: Array,
    hidden: Array | None = None,
    cell: Array | None = None,
    *,
    weight_ih: Array,
    weight_hh: Array,
    bias_ih: Array | None = None,
    bias_hh: Array | None = None,
) -> Array:
    def step(gates: Array, h: Array, c: Array) -> tuple[Array, Array]:
        gates = gates + h @ weight_hh.T + (0.0 if bias_hh is None else bias_hh)
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(c), c

    zeros = _zeros(x, weight_hh)
    state = (zeros if hidden is None else hidden, zeros if cell is None else cell)
    last, sequence = _scan(op, step, x, weight_ih, bias_ih, state)
    return {"sequence": sequence, "hidden": last[0], "cell": last[1]}[op.output]


@eval_float.register
def _(
    op: Gru,
    x: Array,
    hidden: Array | None = None,
    *,
    weight_ih: Array,
    weight_hh: Array,
    bias_ih: Array | None = None,
    bias_hh: Array | None = None,
) -> Array:
    def step(gates: Array, h: Array) -> tuple[Array]:
        r, z, n = jnp.split(gates, 3, axis=-1)
        hr, hz, hn = jnp.split(h @ weight_hh.T + (0.0 if bias_hh is None else bias_hh), 3, axis=-1)
        new = jnp.tanh(n + jax.nn.sigmoid(r + hr) * hn)
        return (new + jax.nn.sigmoid(z + hz) * (h - new),)

    state = (_zeros(x, weight_hh) if hidden is None else hidden,)
    last, sequence = _scan(op, step, x, weight_ih, bias_ih, state)
    return sequence if op.output == "sequence" else last[0]


# ---------------------------------------------------------------------------------------------------------------------
# Chains: the gates of all inputs by one linear layer, then step by step


def _split(chain: Chain, part: str, value: str, count: int, size: int, rank: int = 2) -> list[str]:
    """A value [N, count * size] (or [count * size]) in pieces along its last axis."""

    def columns(i: int) -> Slice:
        rest = rank - 1
        return Slice(starts=(*(0,) * rest, i * size), stops=(*(None,) * rest, (i + 1) * size), steps=(1,) * rank)

    return [chain.add(f"{part}{i}", columns(i), value) for i in range(count)]


def _input_gates(chain: Chain, steps: int, size: int) -> list[str]:
    """W_ih x_t + b_ih, [N, size] for each step."""
    node = chain.node
    gates = chain.add("input", Linear(), node.inputs[0], params=_linear_params(node, "ih"))
    found = []
    for t in range(steps):
        step = Slice(starts=(0, t, 0), stops=(None, t + 1, size), steps=(1, 1, 1))
        found.append(chain.add(f"{t}.gates", Reshape(shape=(-1, size)), chain.add(f"{t}.input", step, gates)))
    return found


def _linear_params(node: Node, which: str) -> dict[str, str]:
    found = {"weight": node.params[f"weight_{which}"]}
    return found | ({"bias": node.params[f"bias_{which}"]} if f"bias_{which}" in node.params else {})


def _state_gates(chain: Chain, part: str, hidden: str | None) -> str | None:
    """W_hh h + b_hh: [N, size], without a state the bias [size] alone, without a bias nothing."""
    if hidden is not None:
        return chain.add(f"{part}.state", Linear(), hidden, params=_linear_params(chain.node, "hh"))
    if "bias_hh" not in chain.node.params:
        return None
    return chain.add(f"{part}.state", Constant(), params={"value": chain.node.params["bias_hh"]})


def _order(op: Lstm | Gru, steps: int) -> list[int]:
    return list(range(steps))[:: -1 if op.reverse else 1]


def _collect(chain: Chain, op: Lstm | Gru, hidden: dict[int, str], size: int) -> Parts:
    """The sequence [N, T, H], or the last state, as the last node."""
    if op.output == "sequence":
        steps = [chain.add(f"{t}.step", Reshape(shape=(-1, 1, size)), hidden[t]) for t in sorted(hidden)]
        chain.add("sequence", Cat(axis=1), *steps)
    else:
        chain.add("last", Requantize(), hidden[_order(op, len(hidden))[-1]])
    return chain.parts()


@decompose.register
def _(op: Lstm, node: Node, shapes: Shapes) -> Parts:
    chain, (_, steps, _) = Chain(node), shapes[node.inputs[0]]
    size = shapes[node.name][-1]
    inputs = _input_gates(chain, steps, 4 * size)
    h, c = node.inputs[1:] if len(node.inputs) == 3 else (None, None)
    hidden: dict[int, str] = {}
    for t in _order(op, steps):
        gates, state = inputs[t], _state_gates(chain, str(t), h)
        gates = gates if state is None else chain.add(f"{t}.sum", Add(), gates, state)
        i, f, g, o = _split(chain, f"{t}.gate", gates, 4, size)
        i, f, o = (chain.add(f"{t}.{n}", Sigmoid(), v) for n, v in (("input_gate", i), ("forget", f), ("output", o)))
        new = chain.add(f"{t}.new", Mul(), i, chain.add(f"{t}.candidate", Tanh(), g))
        if c is None:
            c = new
        else:
            c = chain.add(f"{t}.cell", Add(), chain.add(f"{t}.kept", Mul(), f, c), new)
        h = hidden[t] = chain.add(f"{t}.hidden", Mul(), o, chain.add(f"{t}.squashed", Tanh(), c))
    if op.output == "cell":
        assert c is not None  # there is at least one step
        chain.add("last", Requantize(), c)
        return chain.parts()
    return _collect(chain, op, hidden, size)


@decompose.register
def _(op: Gru, node: Node, shapes: Shapes) -> Parts:
    chain, (_, steps, _) = Chain(node), shapes[node.inputs[0]]
    size = shapes[node.name][-1]
    inputs = _input_gates(chain, steps, 3 * size)
    h = node.inputs[1] if len(node.inputs) > 1 else None
    hidden: dict[int, str] = {}
    for t in _order(op, steps):
        r, z, n = _split(chain, f"{t}.gate", inputs[t], 3, size)
        state = _state_gates(chain, str(t), h)
        if state is not None:
            pieces = _split(chain, f"{t}.part", state, 3, size, rank=2 if h else 1)
            r, z = (chain.add(f"{t}.{k}", Add(), a, b) for k, a, b in (("r", r, pieces[0]), ("z", z, pieces[1])))
        reset = chain.add(f"{t}.reset", Sigmoid(), r)
        update = chain.add(f"{t}.update", Sigmoid(), z)
        if state is not None:
            n = chain.add(f"{t}.n", Add(), n, chain.add(f"{t}.through", Mul(), reset, pieces[2]))
        new = chain.add(f"{t}.new", Tanh(), n)
        if h is None:  # new + update * (0 - new)
            h = chain.add(f"{t}.hidden", Sub(), new, chain.add(f"{t}.kept", Mul(), update, new))
        else:
            kept = chain.add(f"{t}.kept", Mul(), update, chain.add(f"{t}.change", Sub(), h, new))
            h = chain.add(f"{t}.hidden", Add(), new, kept)
        hidden[t] = h
    return _collect(chain, op, hidden, size)
