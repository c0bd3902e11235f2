"""One operator in its three meanings on operands that lie on given grids, for tests that compare meanings exactly."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jquant as jq

NARROW = {"int8": jq.int8, "int16": jq.int16}


class Found(NamedTuple):
    """The output in fake-quant (real), of the integer program (LSB), and of the numpy reference (LSB)."""

    fake: np.ndarray
    integers: np.ndarray
    reference: np.ndarray
    scale: np.ndarray | None
    plan: jq.Plan
    qparams: dict[str, jax.Array]

    def agree(self) -> None:
        """Every meaning has the same output, to the last bit; a mask is its own number."""
        np.testing.assert_array_equal(self.integers, self.reference)
        real = self.integers if self.scale is None else self.integers.astype(np.float32) * self.scale
        np.testing.assert_array_equal(self.fake, real)


def meanings(
    op: jq.ops.Op,
    *operands: np.ndarray,
    scales: Sequence[float],
    output: float = 1.0,
    target: jq.Target = jq.targets.NASH_E,
) -> Found:
    """`operands` are integers: int8 and int16 with the next of `scales`; bool, int32 and uint8 are exact.

    Scales are data of the compiled programs, so that another pair of them compiles nothing.
    """
    qparams: dict[str, Any] = {}
    rules: dict[str, jq.Policy | None] = {"*": None}
    inputs, real, given = [], [], iter(scales)
    dtype = next((str(x.dtype) for x in operands if str(x.dtype) in NARROW), "int8")
    for i, x in enumerate(operands):
        exact = str(x.dtype) not in NARROW
        inputs.append(jq.Input(f"x{i}", (None, *x.shape[1:]), str(x.dtype) if exact else "float32"))
        if exact:
            real.append(jnp.asarray(x))
            continue
        qparams[f"x{i}"] = np.float32(next(given))
        rules[f"x{i}"] = jq.Policy(output=NARROW[str(x.dtype)]())
        real.append(jnp.asarray(x.astype(np.float32) * qparams[f"x{i}"]))
    rules["y"], qparams["y"] = jq.Policy(output=NARROW[dtype]()), np.float32(output)
    graph = jq.Graph(tuple(inputs), (jq.Node("y", op, tuple(entry.name for entry in inputs)),), ("y",))
    model = jq.prepare(graph, {}, jq.QConfig(rules), target=target)
    qparams = {name: jax.device_put(qparams[name]) for name in model.plan.trained}
    program = jq.lower(model.replace(qparams=qparams))
    (name,) = model.plan.graph.outputs
    fake = jq.apply(model.replace(qparams=qparams), *real)
    integers = np.asarray(jq.run(program, *map(jnp.asarray, operands), raw=True))
    (reference,), _ = jq.reference.run(program, *operands, raw=True)
    scale = np.asarray(program.scales[name]) if name in program.scales else None
    return Found(np.asarray(fake), integers, reference, scale, model.plan, qparams)
