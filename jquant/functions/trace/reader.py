"""Reads a jaxpr: calls are inlined, what depends on no input is folded, every other primitive becomes an operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jquant.drafts import values
from jquant.drafts.maker import Maker
from jquant.drafts.values import Draft, Entry, Known, Value
from jquant.ops.movement import Permute, Stack
from jquant.ops.names import FUNCTIONS
from jquant.ops.opaque import Opaque, OpaqueCall, equation_function
from jquant.types import ConversionError, JQuantError

MAX_UNROLLED = 1024  # steps of a scan; each one becomes nodes of its own

# Primitives that compute every element from the elements at its place, so that repeated operands may stay repeated.
ELEMENTWISE = frozenset(
    ("add", "and", "atan2", "clamp", "convert_element_type", "copy", "div", "eq", "erfc", "exp2", "ge", "gt",
     "integer_pow", "is_finite", "le", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow", "rem", "round",
     "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical", "square", "stop_gradient", "sub", "xor",
     *(row.jax for row in FUNCTIONS if row.jax))
)  # fmt: skip


class UnsupportedError(JQuantError):
    """Why a primitive is no operator here: it becomes an `Opaque` node."""


class Reader(Maker):
    """Walks the jaxprs of one function. A handler gets the reader, the equation and the operands."""

    def __init__(
        self, table: dict[str, Callable[..., Any]], named: Callable[..., Any], meet: Callable[..., Any]
    ) -> None:
        super().__init__()
        self.table, self.named, self.meet = table, named, meet
        self.masks: set[Known] = set()  # the random masks that became dropouts
        self.unscaled: dict[Draft, float] = {}  # dropouts whose scaling is still to be read, and the factor so far
        self.random: dict[Known, bool] = {}

    # -- jaxprs

    def read(self, jaxpr: Any, consts: Sequence[Any], operands: Sequence[Value]) -> list[Value]:
        """The values of a jaxpr's results."""
        found: dict[Any, Value] = dict(zip(jaxpr.invars, operands, strict=True))
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            found[var] = const if isinstance(const, Known | Draft | Entry) else values.constant(_as_array(const))

        def value_of(atom: Any) -> Value:
            if isinstance(atom, core.Literal):  # may be a Python number, which has another dtype in numpy
                return values.constant(np.asarray(atom.val, atom.aval.dtype))  # type: ignore[attr-defined]
            return found[atom]

        outer = self.scope
        for equation in jaxpr.eqns:
            inner = str(equation.source_info.name_stack)
            self.scope = f"{outer}/{inner}" if outer and inner else outer or inner
            results = self.read_equation(equation, [value_of(atom) for atom in equation.invars])
            found.update(zip(equation.outvars, results, strict=True))
        self.scope = outer
        return [value_of(atom) for atom in jaxpr.outvars]

    def read_closed(self, closed: Any, operands: Sequence[Value]) -> list[Value]:
        return self.read(closed.jaxpr, closed.consts, operands)

    def read_equation(self, equation: Any, operands: list[Value]) -> list[Value]:
        name = equation.primitive.name
        if not equation.outvars:
            return []  # a print, or another effect without a value
        if name in INLINED:
            recognised = self.named(self, equation, operands)
            return [recognised] if recognised else INLINED[name](self, equation, operands)
        if all(isinstance(v, Known) for v in operands):
            return self.fold(equation, [cast(Known, v) for v in operands])
        try:
            if any(isinstance(v, Known) and self.is_random(v) for v in operands):
                dropped = self.meet(self, equation, operands)
                if dropped is not None:
                    return [dropped]
            if name not in self.table:
                raise UnsupportedError("no operator")
            result = self.table[name](self, equation, *operands)
        except UnsupportedError:
            return self.opaque(equation, operands)
        return result if isinstance(result, list) else [result]

    # -- values

    def is_random(self, known: Known) -> bool:
        """Whether it is computed from random numbers that the function draws."""
        pending = [known]
        while pending:  # operands first, each once
            value = pending[-1]
            unknown = [v for v in value.operands if v not in self.random]
            if value.primitive == "random_bits" or not unknown:
                self.random[value] = value.primitive == "random_bits" or any(self.random[v] for v in value.operands)
                pending.pop()
            else:
                pending += unknown
        return self.random[known]

    def fold(self, equation: Any, operands: list[Known]) -> list[Value]:
        """The results of an equation on known values."""
        name, params = equation.primitive.name, equation.params
        shapes = [tuple(v.aval.shape) for v in equation.outvars]
        key = (name, str(params), *operands)
        if any(k.is_trained for k in operands) and key in self.shared:
            return [self.shared[key]]
        compute = equation_function(equation)
        if name == "broadcast_in_dim" and len(operands) == 1:
            results = [values.broadcast_in(operands[0], shapes[0], params["broadcast_dimensions"])]
        elif name in ("reshape", "squeeze", "expand_dims"):
            results = [values.reshaped(operands[0], shapes[0])]
        elif name == "tile" and all(1 in pair for pair in zip(operands[0].shape, params["reps"], strict=True)):
            results = [values.broadcast_in(operands[0], shapes[0], range(len(shapes[0])))]
        elif name == "transpose":
            results = [values.transposed(operands[0], params["permutation"])]
        elif name in ("slice", "split"):
            results = self.fold_slices(equation, operands[0])
        elif name == "dot_general":
            numbers = equation.params["dimension_numbers"]
            results = [values.product(lambda *arrays: compute(*arrays)[0], numbers, operands, shapes[0])]
        elif name in ELEMENTWISE and all(not k.shape or len(k.shape) == len(shapes[0]) for k in operands):
            results = [values.elementwise(name, lambda *arrays: compute(*arrays)[0], operands, shapes[0])]
        else:
            whole = [values.full(k) for k in operands]
            results = [
                values.known_from(name, lambda *arrays, i=i: compute(*arrays)[i], whole) for i in range(len(shapes))
            ]
        if len(results) == 1 and results[0].is_trained:
            self.shared[key] = results[0]
        return list(results)

    def fold_slices(self, equation: Any, x: Known) -> list[Known]:
        params = equation.params
        if equation.primitive.name == "slice":
            steps = params["strides"] or (1,) * len(x.shape)
            return [self.cut(x, params["start_indices"], params["limit_indices"], steps)]
        axis, found = params["axis"], []
        ends = [int(n) for n in np.cumsum(params["sizes"])]
        for start, stop in zip([0, *ends], ends, strict=False):
            starts, stops = [0] * len(x.shape), list(x.shape)
            starts[axis], stops[axis] = start, stop
            found.append(self.cut(x, starts, stops, [1] * len(starts)))
        return found

    def opaque(self, equation: Any, operands: list[Value]) -> list[Value]:
        """A node for each result that computes the primitive as it is."""
        call = OpaqueCall(equation)
        return [
            self.draft(Opaque(call=call, index=i), *operands, shape=var.aval.shape, dtype=var.aval.dtype)
            for i, var in enumerate(equation.outvars)
        ]


def _as_array(constant: Any) -> Any:
    """A constant of a jaxpr; a key of random numbers is no array of numpy."""
    is_key = isinstance(constant, jax.Array) and jnp.issubdtype(constant.dtype, jax.dtypes.prng_key)
    return constant if is_key else np.asarray(constant)


# ---------------------------------------------------------------------------------------------------------------------
# Calls


def _call(key: str) -> Callable[..., list[Value]]:
    return lambda reader, equation, operands: reader.read_closed(_closed(equation.params[key]), operands)


def _closed(jaxpr: Any) -> Any:
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


def _cond(reader: Reader, equation: Any, operands: list[Value]) -> list[Value]:
    """A branch that is known is taken; one that depends on an input stays opaque."""
    index, *rest = operands
    if not isinstance(index, Known) or index.is_trained:
        return reader.opaque(equation, operands)
    if reader.is_random(index):
        raise ConversionError(
            f"{reader.scope or 'the function'}: a branch is taken by a random number that the function draws, and "
            "would be the same one in every step. Multiply what it adds by "
            "jax.random.bernoulli(key, p, (batch, 1, ...)) / p"
        )
    branches = equation.params["branches"]
    return reader.read_closed(branches[int(np.clip(int(index.number), 0, len(branches) - 1))], rest)


def _scan(reader: Reader, equation: Any, operands: list[Value]) -> list[Value]:
    """A loop of known length, step by step."""
    params = equation.params
    length, (constants, carries) = params["length"], _operand_counts(params)
    if all(isinstance(v, Known) for v in operands):
        return reader.fold(equation, [cast(Known, v) for v in operands])
    if length > MAX_UNROLLED:
        raise ConversionError(
            f"a scan of {length} steps would become as many copies of its body; {MAX_UNROLLED} is the most. Trace a "
            "shorter sequence, or keep the loop outside of the traced function"
        )
    fixed = operands[:constants]
    state, stacks = operands[constants : constants + carries], operands[constants + carries :]
    made: list[list[Value]] = []
    order = range(length - 1, -1, -1) if params["reverse"] else range(length)
    for i in order:
        results = reader.read_closed(_closed(params["jaxpr"]), [*fixed, *state, *(_part(reader, s, i) for s in stacks)])
        state, parts = results[:carries], results[carries:]
        made.append(parts)
    if params["reverse"]:
        made.reverse()
    return [*state, *(_stacked(reader, list(parts)) for parts in zip(*made, strict=True))]


def _operand_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried; jax has them as trees from 0.11 on."""
    if "ft_in" in params:
        constants, carried, _ = params["ft_in"].unpack()
        return len(constants), len(carried)
    return params["num_consts"], params["num_carry"]


def _part(reader: Reader, stack: Value, i: int) -> Value:
    """Element i of axis 0. Of a permuted value it is taken before the permutation, so that the batch stays in front."""
    if isinstance(stack, Known):
        return reader.share(stack, ("part", i), lambda: values.part_of_stack(stack, i))
    axis, rest, source = 0, None, stack
    if isinstance(stack, Draft) and isinstance(stack.op, Permute):
        (source,), (axis, *rest) = stack.operands, stack.op.axes
    starts, stops = [0] * len(source.shape), list(source.shape)
    starts[axis], stops[axis] = i, i + 1
    piece = reader.slice(source, starts, stops, (1,) * len(starts))
    piece = reader.reshape(piece, (*source.shape[:axis], *source.shape[axis + 1 :]))
    return piece if rest is None else reader.permute(piece, [a - (a > axis) for a in rest])


def _stacked(reader: Reader, parts: list[Value]) -> Value:
    if all(isinstance(part, Known) for part in parts):
        known = [cast(Known, part) for part in parts]
        return values.known_from("stack", lambda *arrays: jnp.stack(arrays), [values.full(k) for k in known])
    if len(parts) == 1:
        return reader.reshape(parts[0], (1, *parts[0].shape))
    return reader.draft(Stack(axis=0), *parts, shape=(len(parts), *parts[0].shape), dtype=parts[0].dtype)


INLINED: dict[str, Callable[[Reader, Any, list[Value]], list[Value]]] = {
    "jit": _call("jaxpr"),
    "pjit": _call("jaxpr"),  # the name of jit before jax 0.7
    "closed_call": _call("call_jaxpr"),
    "core_call": _call("call_jaxpr"),
    "custom_jvp_call": _call("call_jaxpr"),
    "custom_vjp_call": _call("call_jaxpr"),
    "custom_vjp_call_jaxpr": _call("fun_jaxpr"),
    "remat2": _call("jaxpr"),
    "checkpoint": _call("jaxpr"),
    "cond": _cond,
    "scan": _scan,
}
