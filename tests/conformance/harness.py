"""Conformance of single operators: the jitted interpreter against `jquant.reference`, bit for bit, in bulk.

A family file `<family>_cases.py` beside this one has `CASES: tuple[Case, ...]`. A case is an operator with attributes,
the shapes and formats of its operands, and its parameters. `check(case, outputs=...)` draws scales, parameters and
integers, lowers the one-node graph, runs it both ways on the same integers, and counts what differs: all values of the
plan count, those that layout or decomposition added too.

    CASES = (
        Case(op=ops.Relu(), shapes=((3, 5, 5),)),                                          # int8 -> int8
        Case(op=ops.Conv(...), shapes=((4, 9, 9),), params={"weight": (8, 4, 3, 3), "bias": (8,)}, output="int32"),
        Case(op=ops.Gather(axis=1), shapes=((10, 4), (6, 4)), inputs=("int16", "index:10")),
        *both(op=ops.Add(), shapes=((6, 7), (6, 7))),                                      # int8 and int16
    )

A family may also have `EXHAUSTIVE: tuple[Callable[[], Iterable[Row]], ...]` for domains that can be enumerated.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

import jquant as jq
from jquant.plan.fills import entering_numbers
from jquant.types import integer_range


class Row(NamedTuple):
    """One line of the results. `note` holds an error bound or other remark."""

    operator: str
    formats: str
    outputs: int
    mismatches: int
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operator with everything that is static.

    `op`        the operator with its attributes
    `shapes`    of the operands, without the batch, which is axis 0 everywhere
    `inputs`    a format for each operand, the last one repeats: int8, int16, bool, uint8, "index:N" (int32 in [0, N))
    `output`    int8, int16 or int32 (high precision); ignored where the operator keeps a scale or is exact
    `params`    {role: shape}; `weight` is the format of the quantized ones
    `input_scales` fixed scales of the operands; None draws them from 2^-12 to 2^2
    `output_scale` fixed scale of the output; None draws one around that at which the range of operand 0 fits
    `calibrated`   scales of the output and of inner values come from `jq.calibrate` on the drawn data: for composites
    `nonzero`      no zeros in the operands: for a quotient, whose float value calibrates it
    """

    op: jq.ops.Op
    shapes: tuple[tuple[int, ...], ...]
    inputs: tuple[str, ...] = ("int8",)
    output: str = "int8"
    params: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    weight: str = "int8"
    input_scales: tuple[float, ...] | None = None
    output_scale: float | None = None
    calibrated: bool = False
    nonzero: bool = False
    target: jq.Target = jq.targets.NASH_E

    @property
    def operator(self) -> str:
        return type(self.op).__name__

    @property
    def operands(self) -> tuple[str, ...]:
        return (*self.inputs, *(self.inputs[-1],) * (len(self.shapes) - len(self.inputs)))[: len(self.shapes)]

    @property
    def formats(self) -> str:
        narrow = [name.split(":")[0] for name in dict.fromkeys(self.operands)]
        weight = [f"w {self.weight}"] if "weight" in self.op.weight_roles else []
        return f"{', '.join(narrow + weight)} -> {self.output}"


def both(**options) -> tuple[Case, Case]:
    """The case with int8 operands and output, and with int16 ones."""
    return Case(**options), Case(**options | {"inputs": ("int16",), "output": "int16"})


def integers(rng: np.random.Generator, fmt: str, shape: tuple[int, ...]) -> np.ndarray:
    """[batch, ...]: each example has a pattern of its own, extremes among them."""
    if fmt == "bool":
        return rng.random(shape) < rng.choice([0.0, 0.1, 0.5, 1.0], size=(shape[0], *(1,) * (len(shape) - 1)))
    if fmt.startswith("index:"):
        return rng.integers(0, int(fmt[6:]), size=shape).astype(np.int32)
    low, high = (0, 255) if fmt == "uint8" else integer_range(fmt)
    data = rng.integers(low, high + 1, size=shape)
    for example, pattern in enumerate(rng.integers(0, 9, size=shape[0])):
        one = shape[1:]
        match pattern:
            case 0:
                data[example] = low
            case 1:
                data[example] = high
            case 2:
                data[example] = rng.choice([low, high], size=one)
            case 3:
                data[example] = rng.integers(-2, 3, size=one).clip(low, high)
            case 4:
                data[example] = np.where(rng.random(one) < 0.05, data[example], 0)
            case 5:
                data[example] = np.rint(rng.normal(size=one) * (high - low) / 8).clip(low, high)
    return data.astype("uint8" if fmt == "uint8" else fmt)


def draw_params(rng: np.random.Generator, case: Case) -> dict[str, jnp.ndarray]:
    """Parameters whose output channels have magnitudes from 2^-20 to 2^10, some constant at the largest value.

    Within a composite they stay near 1, as a fused add needs scales within 2^15 of each other.
    """
    found, spread = {}, (-2, 1) if case.calibrated else (-20, 10)
    for role, shape in case.params.items():
        value = rng.normal(size=shape)
        if role in case.op.weight_roles and len(shape) > 1:
            axis = case.op.weight_axis
            constant = rng.random(shape[axis]) < 0.3
            channel = [1] * len(shape)
            channel[axis] = -1
            value = np.where(constant.reshape(channel), rng.choice([-1.0, 1.0]), value)
            value = value * np.exp2(rng.uniform(*spread, size=shape[axis])).reshape(channel)
        found[f"y.{role}"] = jnp.asarray(value, jnp.float32)
    return found


def config(rng: np.random.Generator, case: Case) -> jq.QConfig:
    spec = {"int8": jq.int8, "int16": jq.int16}
    rules: dict[str, jq.Policy | None] = {"*": jq.Policy(output=jq.int8(), weight=jq.int8())}
    scales = []
    for i, fmt in enumerate(case.operands):
        scale = case.input_scales[i] if case.input_scales else float(np.float32(np.exp2(rng.uniform(-12, 2))))
        scales.append(scale)
        if fmt in spec:
            rules[f"x{i}"] = jq.Policy(output=spec[fmt](scale=scale))
    weight = jq.QuantSpec(dtype=case.weight, axis="out") if case.params else None
    if case.output == "int32":
        return jq.QConfig(rules | {"y": jq.Policy(output=jq.high_precision, weight=weight)})
    output = spec[case.output]
    if not case.calibrated:
        reach = scales[0] * (2.0 ** (int(case.operands[0][3:]) - 1) if case.operands[0] in spec else 128.0)
        drawn = case.output_scale or reach / 2.0 ** (int(case.output[3:]) - 1) * np.exp2(rng.normal() * 1.5)
        fixed = max(float(np.float32(drawn)), 2.0**-23)
        return jq.QConfig(rules | {"y": jq.Policy(output=output(scale=fixed), weight=weight)})
    return jq.QConfig(rules | {"y": jq.Policy(output=output(), weight=weight)})


def program_of(rng: np.random.Generator, case: Case, data: list[np.ndarray]) -> jq.Program:
    return jq.lower(prepared(rng, case, data))


def prepared(rng: np.random.Generator, case: Case, data: list[np.ndarray]) -> jq.Model:
    """The model of the one-node graph."""
    exact = {"bool": "bool", "uint8": "uint8", "index": "int32"}
    names = [f"x{i}" for i in range(len(case.shapes))]
    inputs = [
        jq.Input(name, (None, *shape), exact.get(fmt.split(":")[0], "float32"))
        for name, shape, fmt in zip(names, case.shapes, case.operands, strict=True)
    ]
    node = jq.Node("y", case.op, tuple(names), jq.FrozenMap({role: f"y.{role}" for role in case.params}))
    graph, params = jq.Graph(tuple(inputs), (node,), ("y",)), draw_params(rng, case)
    qconfig, scale = config(rng, case), {}
    if entering_numbers(case.op):  # `prepare` refuses a number beyond a fixed scale, and a trained one may shrink to it
        scale = {"x0": qconfig.rules["x0"].output} if "x0" in qconfig.rules else {}
        free = {name: jq.Policy(output=replace(spec, fixed_scale=None)) for name, spec in scale.items()}
        qconfig = jq.QConfig(dict(qconfig.rules) | free)
    model = jq.prepare(graph, params, qconfig, target=case.target, high_precision_outputs=False)
    model = model.replace(plan=replace(model.plan, values=jq.FrozenMap(dict(model.plan.values) | scale)))
    return jq.calibrate(model, [real_inputs(model.plan, data)]) if model.plan.trained else model


def real_inputs(plan: jq.Plan, data: list[np.ndarray]) -> tuple[jnp.ndarray, ...]:
    """Integers as the real values that they stand for; exact ones as they are."""
    return tuple(
        jnp.asarray(d if entry.name in plan.exact else d * np.float32(plan.spec(entry.name).fixed_scale))
        for entry, d in zip(plan.graph.inputs, data, strict=True)
    )


MOST_READ = 2**27  # integers drawn for a case: a sum of 65,535 elements gives one output for all of them


def rounds(case: Case, outputs: int, seed: int) -> Iterator[tuple[int, int]]:
    """(outputs, mismatches) of each round; a round has scales and parameters of its own."""
    rng = np.random.default_rng([seed, *case.operator.encode()])
    largest = max([prod(shape) for shape in case.shapes] or [1])
    batch = int(np.clip(2**18 // largest, 2, 4096))
    done, first, read = 0, True, 0
    while done < outputs and read < MOST_READ:
        if first:  # learn the size of an output with a small batch
            batch, full, first = min(batch, 8), batch, False
        else:
            batch = full
        data = [integers(rng, fmt, (batch, *shape)) for fmt, shape in zip(case.operands, case.shapes, strict=True)]
        data = [np.where(d == 0, d.dtype.type(1), d) for d in data] if case.nonzero else data
        try:
            program = program_of(rng, case, data)
        except jq.LoweringError as error:
            # Data of a tiny example may put a fused addend beyond 2^15 times its accumulator: refused, and drawn again.
            if "fused addend" not in str(error):
                raise
            continue
        fast = jq.run_with_taps(program, *map(jnp.asarray, data), raw=True)
        _, slow = jq.reference.run(program, *data, raw=True)
        wrong = sum(int((np.asarray(fast[name]) != slow[name]).sum()) for name in program.graph.values)
        made = [node.name for node in program.graph.nodes if not node.name.endswith((".to_last", ".to_first"))]
        size = sum(slow[name].size for name in made)  # those inside a composite count too
        full = int(np.clip((outputs - done) // max(size // batch, 1) + 1, 2, full))
        read += sum(d.size for d in data)
        done += size if case.shapes else outputs  # a constant has nothing to draw: once is all
        yield size, wrong


def check(case: Case, *, outputs: int, seed: int = 0) -> Row:
    """Compares at least `outputs` output values of a case."""
    sizes, wrong = zip(*rounds(case, outputs, seed), strict=True)
    return Row(case.operator, case.formats, sum(sizes), sum(wrong))


def deviation(case: Case, *, seed: int = 0) -> float:
    """The largest distance between the integers and fake-quant on the same quantized operands, in LSB of the output.

    For an exact output it is the share of elements that differ. Fake-quant is the float operator with its result on the
    grid; both saturate. Where the float operator has no value (log of a negative number) there is nothing to compare.
    """
    rng = np.random.default_rng([seed, *case.operator.encode()])
    batch = int(np.clip(2**12 // max([prod(shape) for shape in case.shapes] or [1]), 2, 64))
    data = [integers(rng, fmt, (batch, *shape)) for fmt, shape in zip(case.operands, case.shapes, strict=True)]
    model = prepared(rng, case, data)
    plan, program = model.plan, jq.lower(model)
    (output,) = plan.graph.outputs
    _, fake = jq.apply_with_taps(model, *real_inputs(plan, data))
    whole = np.asarray(jq.run_with_taps(program, *map(jnp.asarray, data), raw=True)[output])
    if output in plan.exact:
        return float(np.mean(np.asarray(fake[output]) != whole))
    grid = np.asarray(fake[output], np.float64) / np.asarray(program.scales[output], np.float64)
    distance = np.abs(np.clip(grid, *integer_range(program.formats[output].output)) - whole)
    return float(np.nanmax(distance))


def with_target(case: Case, fields: dict) -> Case:
    """The case under other decisions of the target."""
    return replace(case, target=case.target.with_fields(fields))
