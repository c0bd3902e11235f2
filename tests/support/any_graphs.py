"""Random graphs over every operator that there is.

The operators are those of the conformance cases, each with attributes, operand shapes, formats and parameters with
which it is declared there; a new operator has a case, and is drawn from then on. A step of a graph takes a case, and
for each of its operands a value that is there already, brought to the shape by real operators (flatten, cat, slice,
reshape), or a new input. One operator more is a loop: an unrolled recurrence with one set of weights. Steps are
numbers, so that hypothesis and the fuzz runner shrink them alike.
"""

import importlib
import typing
from dataclasses import dataclass, field, fields, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from conformance.harness import Case
from hypothesis import strategies as st
from support import marches

import jquant as jq
from jquant import ops
from jquant.graph.checks import check_operands
from jquant.graph.float import result_type
from jquant.graph.serialize import operators
from jquant.types import JQuantError

LARGEST = 2048  # elements of an operand of a drawn case
BATCH = 2
BATCH_NORM = ("fold", "live", "frozen", "reverse_fold", "reverse_fold")
INTERNAL = {
    "Dequantize": "made by lowering alone",
    "Opaque": "holds a function of JAX, which no step can be made of",
    "QuantStub": "leaves the rest of the graph in float",
    "DeQuantStub": "leaves the rest of the graph in float",
    "Resample": "has no integers: a float island, drawn in tests/converters/test_resizes.py",
}
NORM = dict.fromkeys(("running_mean", "running_var", "weight", "bias"), (3,))
OTHERS = (
    Case(op=ops.BatchNorm(), shapes=((3, 4, 4),), params=NORM),
    Case(op=ops.BatchNorm(epsilon=1e-3), shapes=((3, 4, 4),), params=dict(list(NORM.items())[:2])),
    Case(op=ops.Constant(), shapes=(), params={"value": (2, 3)}),
)  # fmt: skip

Step = tuple[int, int, int]  # the operator by its place among their names, one of its cases, and all other choices


@cache
def cases() -> dict[str, tuple[Case, ...]]:
    """{operator: its cases}."""
    found: dict[str, list[Case]] = {}
    folder = Path(__file__).parents[1] / "conformance"
    modules = [importlib.import_module(f"conformance.{path.stem}") for path in sorted(folder.glob("*_cases.py"))]
    for case in (*OTHERS, *(case for module in modules for case in module.CASES)):
        if all(prod(shape) <= LARGEST and len(shape) > 0 for shape in case.shapes):
            found.setdefault(case.operator, []).append(case)
    return {name: tuple(found[name]) for name in sorted(found)}


def missing() -> set[str]:
    """Operators that are never drawn, and should be."""
    ours = {name for name, cls in operators().items() if cls.__module__.startswith("jquant.")}
    return ours - set(cases()) - set(INTERNAL)


@dataclass
class Draft:
    """A graph that is being built. `kinds` {value: (shape without the batch, dtype)}; `bounds` of index inputs."""

    inputs: list[jq.Input] = field(default_factory=list)
    nodes: list[jq.Node] = field(default_factory=list)
    params: dict[str, Any] = field(default_factory=dict)
    kinds: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    bounds: dict[str, int] = field(default_factory=dict)
    rules: dict[str, jq.Policy] = field(default_factory=dict)

    def input(self, shape: tuple[int, ...], dtype: str) -> str:
        name = f"x{len(self.inputs)}"
        self.inputs.append(jq.Input(name, (None, *shape), dtype))
        self.kinds[name] = (shape, dtype)
        return name

    def add(self, op: ops.Op, operands: tuple[str, ...], params: dict[str, Any] | None = None, shared: str = "") -> str:
        """A node; raises what its float rule raises for operands that it does not take. `shared`: whose params."""
        kinds = tuple(((BATCH, *self.kinds[x][0]), self.kinds[x][1]) for x in operands)
        made = result_type(op, kinds, tuple((role, array.shape) for role, array in (params or {}).items()))
        is_constant = isinstance(op, ops.Constant | ops.IntegerConstant)
        if not is_constant and (not made.shape or made.shape[0] != BATCH):
            raise ValueError("the result has no batch")
        if operands and _joins_examples(op, 1 + len(self.kinds[operands[0]][0])):
            raise ValueError("it works along the batch")
        name = f"n{len(self.nodes)}"
        keys = {role: f"{shared or name}.{role}" for role in params or {}}
        node = jq.Node(name, op, operands, jq.FrozenMap(keys))
        check_operands(node)
        self.params |= {keys[role]: array for role, array in (params or {}).items()}
        self.nodes.append(node)
        if not is_constant:
            self.kinds[name] = (tuple(made.shape[1:]), str(made.dtype))
        return name

    def brought(self, value: str, shape: tuple[int, ...]) -> str:
        """A float value in another shape, by operators that move elements."""
        own = self.kinds[value][0]
        if own == shape:
            return value
        size, wanted = prod(own), prod(shape)
        if len(own) > 1:
            value = self.add(ops.Flatten(), (value,))
        while size < wanted:
            value = self.add(ops.Cat(axis=1), (value, value))
            size *= 2
        if self.kinds[value][0] != (wanted,):
            value = self.add(ops.Slice(starts=(0, 0), stops=(None, wanted), steps=(1, 1)), (value,))
        return value if len(shape) == 1 else self.add(ops.Reshape(shape=(-1, *shape)), (value,))

    def operand(self, rng: np.random.Generator, shape: tuple[int, ...], fmt: str) -> str:
        dtype = {"bool": "bool", "uint8": "uint8"}.get(fmt, "int32" if fmt.startswith("index:") else "float32")
        if fmt.startswith("index:"):
            bound = int(fmt.removeprefix("index:"))
            found = [x for x, most in self.bounds.items() if most <= bound and self.kinds[x][0] == shape]
            name = rng.choice(found) if found and rng.random() < 0.5 else self.input(shape, dtype)
            self.bounds.setdefault(name, bound)
            return str(name)
        same = [x for x, kind in self.kinds.items() if kind[1] == dtype and (kind[0] == shape or dtype == "float32")]
        same = [x for x in same if prod(self.kinds[x][0])]
        if not same or rng.random() < 0.15:
            return self.input(shape, dtype)
        value = str(same[-1] if rng.random() < 0.5 else rng.choice(same))
        return value if dtype != "float32" else self.brought(value, shape)


def _joins_examples(op: ops.Op, rank: int) -> bool:
    """Whether an operator works along the batch, axis 0 of `rank`."""
    if isinstance(op, ops.Permute):
        return op.axes[0] % rank != 0
    rank += isinstance(op, ops.Stack)
    return any(axis in (0, -rank) for axis in (getattr(op, "axis", None), *getattr(op, "axes", ())))


def varied(op: ops.Op, rng: np.random.Generator) -> ops.Op:
    """The operator with another value of one attribute, by the type of the attribute; as it is where there is none."""
    hints = typing.get_type_hints(type(op))
    found = [f.name for f in fields(op)]
    if not found:
        return op
    name = str(rng.choice(found))
    kind, value = hints[name], getattr(op, name)
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        return replace(op, **{name: choices[rng.integers(len(choices))]})
    if isinstance(value, bool):
        return replace(op, **{name: not value})
    if isinstance(value, int):
        return replace(op, **{name: value + int(rng.integers(-1, 2))})
    if isinstance(value, float):
        return replace(op, **{name: value * float(rng.choice([-1, 0.5, 2.0, 0.0]))})
    if isinstance(value, tuple) and value and all(type(v) is int for v in value):
        changed = list(value)
        changed[rng.integers(len(value))] += int(rng.integers(-1, 2))
        return replace(op, **{name: tuple(changed)})
    return op


def parameters(rng: np.random.Generator, case: Case) -> dict[str, jnp.ndarray]:
    found = {}
    for role, shape in case.params.items():
        value = rng.normal(size=shape) * np.exp2(rng.uniform(-3, 2))
        found[role] = jnp.asarray(np.abs(value) + 0.3 if role == "running_var" else value, jnp.float32)
    return found


def add_loop(draft: Draft, rng: np.random.Generator) -> str:
    """h = f(W x[t] + U h + b) over a sequence [N, T, size], of as many steps as make a loop, or of fewer."""
    size, width, count = (int(rng.integers(*ends)) for ends in ((2, 5), (2, 6), (4, 12)))
    activation = (ops.Tanh(), ops.Relu(), ops.Sigmoid())[rng.integers(3)]
    weights = {
        "enter": {"weight": rng.normal(size=(width, size)), "bias": rng.normal(size=width)},
        "stay": {"weight": rng.normal(size=(width, width)) / width},
    }
    params = {k: {r: jnp.asarray(v, jnp.float32) for r, v in w.items()} for k, w in weights.items()}
    sequence, state = (draft.operand(rng, shape, "int8") for shape in ((count, size), (width,)))
    begin = f"n{len(draft.nodes)}"
    for t in range(count):
        chosen = draft.add(ops.IndexSelect(axis=1, indices=(t,)), (sequence,))
        entered = draft.add(ops.Linear(), (draft.add(ops.Flatten(), (chosen,)),), params["enter"], f"{begin}.enter")
        stayed = draft.add(ops.Linear(), (state,), params["stay"], f"{begin}.stay")
        state = draft.add(activation, (draft.add(ops.Add(), (entered, stayed)),))
    return state


def add_step(draft: Draft, step: Step) -> bool:
    """Adds the node of a step, and what it takes to bring its operands there; False where they do not fit."""
    operator, chosen, seed = step
    rng, place = np.random.default_rng(seed), operator % (len(cases()) + 1)
    case = None
    before = (len(draft.inputs), len(draft.nodes))
    try:
        if place == len(cases()):
            name = add_loop(draft, rng)
        else:
            found = list(cases().values())[place]
            case = found[chosen % len(found)]
            operands = tuple(draft.operand(rng, s, fmt) for s, fmt in zip(case.shapes, case.operands, strict=True))
            name = _added(draft, rng, case, operands)
    except (JQuantError, ValueError, TypeError, IndexError, ZeroDivisionError):
        del draft.inputs[before[0] :], draft.nodes[before[1] :]
        names = {entry.name for entry in draft.inputs} | {node.name for node in draft.nodes}
        draft.kinds = {x: kind for x, kind in draft.kinds.items() if x in names}
        draft.bounds = {x: bound for x, bound in draft.bounds.items() if x in names}
        return False
    if case is None:
        return True
    wide = [i for i, fmt in enumerate(case.operands) if fmt == "int16" and draft.kinds[operands[i]][1] == "float32"]
    policy = jq.Policy(input={case.op.ports[i]: jq.int16() for i in wide if i < len(case.op.ports)}) if wide else None
    if case.output == "int16" and draft.kinds.get(name, ((), ""))[1] == "float32":
        policy = replace(policy or jq.Policy(), output=jq.int16())
    if policy is not None:
        draft.rules[name] = policy
    return True


def _added(draft: Draft, rng: np.random.Generator, case: Case, operands: tuple[str, ...]) -> str:
    params = parameters(rng, case)
    if isinstance(case.op, ops.Constant | ops.IntegerConstant):  # with a value beside it: alone it has no batch
        is_exact = isinstance(case.op, ops.IntegerConstant)
        shape = case.op.shape if isinstance(case.op, ops.IntegerConstant) else case.params["value"]
        constant = draft.add(case.op, (), params)
        value = draft.operand(rng, shape, "index:8" if is_exact else "int8")
        name = f"n{len(draft.nodes)}"
        draft.nodes.append(jq.Node(name, ops.Maximum() if is_exact else ops.Add(), (value, constant)))
        draft.kinds[name] = draft.kinds[value]
        return name
    if rng.random() < 0.3:
        try:
            return draft.add(varied(case.op, rng), operands, params)
        except (JQuantError, ValueError, TypeError, IndexError, ZeroDivisionError):
            pass
    return draft.add(case.op, operands, params)


@dataclass(frozen=True)
class Drawn:
    """A graph, its parameters and qconfig, and `inputs` for it: three batches of two.

    `target`, `batch_norm`: the march, real or made up, and what becomes of batch norm
    """

    graph: jq.Graph
    params: dict[str, Any]
    qconfig: jq.QConfig
    inputs: tuple[tuple[jnp.ndarray, ...], ...]
    target: jq.Target
    batch_norm: str


def build(steps: list[Step], seed: int = 0) -> Drawn | None:
    """The graph of some steps; those that do not fit are left out. None where no step fits."""
    draft, rng = Draft(), np.random.default_rng(seed)
    for step in steps:
        add_step(draft, step)
    used = {x for node in draft.nodes for x in node.inputs}
    outputs = [node.name for node in draft.nodes if node.name not in used]
    inner = [node.name for node in draft.nodes if node.name in used and node.name in draft.kinds]
    if inner and rng.random() < 0.3:
        outputs.append(str(rng.choice(inner)))
    if not outputs or not draft.inputs:
        return None
    graph = jq.Graph(tuple(draft.inputs), tuple(draft.nodes), tuple(dict.fromkeys(outputs)))
    qconfig, inputs = _qconfig(draft, rng), tuple(_inputs(draft, rng) for _ in range(3))
    return Drawn(graph, draft.params, qconfig, inputs, _target(rng), str(rng.choice(BATCH_NORM)))


def _target(rng: np.random.Generator) -> jq.Target:
    """Mostly a real march; the limits of sizes are those of NASH_E in all of them."""
    known = [jq.targets.NASH_E, jq.targets.NASH_E, jq.targets.NASH_M, *marches.MADE_UP.values()]
    return known[rng.integers(len(known))] if rng.random() < 0.8 else marches.drawn(int(rng.integers(2**16)))


def _qconfig(draft: Draft, rng: np.random.Generator) -> jq.QConfig:
    weight = [jq.int8(axis="out"), jq.int8(), jq.int4(axis="out"), jq.int8(axis="out", quantizer=jq.lsq)]
    output = [jq.int8(), jq.int8(quantizer=jq.lsq), jq.int8(scale_form="pow2"), jq.int8(), jq.int16()]
    rules: dict[str, jq.Policy | None] = {
        "*": jq.Policy(weight=weight[rng.integers(len(weight))], output=output[rng.integers(len(output))])
    }
    return jq.QConfig(rules | draft.rules)


def _inputs(draft: Draft, rng: np.random.Generator) -> tuple[jnp.ndarray, ...]:
    found = []
    for entry in draft.inputs:
        shape = (BATCH, *(size or BATCH for size in entry.shape[1:]))
        match entry.dtype:
            case "bool":
                found.append(jnp.asarray(rng.random(shape) < 0.5))
            case "uint8":
                found.append(jnp.asarray(rng.integers(0, 256, shape), jnp.uint8))
            case "int32":
                found.append(jnp.asarray(rng.integers(0, draft.bounds[entry.name], shape), jnp.int32))
            case _:
                found.append(jnp.asarray(rng.normal(size=shape) * np.exp2(rng.uniform(-2, 2)), jnp.float32))
    return tuple(found)


def steps_of(seed: int) -> list[Step]:
    """Some steps, for a run that counts seeds."""
    rng = np.random.default_rng(seed)
    return [tuple(int(n) for n in rng.integers(0, 2**16, 3)) for _ in range(rng.integers(1, 6))]  # type: ignore[misc]


def any_networks() -> st.SearchStrategy[list[Step]]:
    """Steps for `build`."""
    number = st.integers(0, 2**16 - 1)
    return st.lists(st.tuples(number, number, number), min_size=1, max_size=5)
