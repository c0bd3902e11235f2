"""Operators that join operands at one scale: fake-quant rounds where the integers round, and a scale still learns.

Seen: a number 40 times the data made a scale at which 20 LSB of the data are half an LSB. The march's mantissa of 1/40
is a little below it, so the integers gave 0 and fake-quant gave 1.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults.test_one_scale import at_scale, drawn
from support.meanings import meanings

import jquant as jq
from jquant import ops
from jquant.quantizers import lsq

SHAPE = (64, 33)
MASK = np.random.default_rng(10).random(SHAPE) < 0.5
INDEX = np.random.default_rng(11).integers(0, SHAPE[1], SHAPE).astype(np.int32)
JOINS = {
    "where": (ops.Where(), lambda a, b: (MASK, a, b)),
    "cat": (ops.Cat(axis=1), lambda a, b: (a, b)),
    "stack": (ops.Stack(axis=1), lambda a, b: (a, b)),
    "scatter": (ops.Scatter(axis=1), lambda a, b: (a, INDEX, b)),
    "scatter_add": (ops.Scatter(axis=1, reduce="add"), lambda a, b: (a, INDEX, b)),
    "slice_scatter": (
        ops.SliceScatter(starts=(0, 3), stops=(None, 30), steps=(1, 3)),
        lambda a, b: (a, b[:, 3:30:3]),
    ),
}
# The last of each is the scale of the result. 1/40 makes ties; 15 bits are off by half an LSB where data have 16.
SCALES = ((1.0, 40.0, 40.0), (0.013, 0.05, 0.05), (0.013, 0.05, 0.031), (0.25, 1.0, 0.5), (3e-4, 2.0, 2.0))


@pytest.mark.parametrize("name", JOINS)
@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_fake_quant_gives_the_bits_of_the_integers(name: str, dtype: str) -> None:
    op, operands = JOINS[name]
    for *scales, output in SCALES:
        meanings(op, *operands(drawn(dtype, 0), drawn(dtype, 1)), scales=scales, output=output).agree()


def test_a_choice_and_a_concatenation_are_those_of_exact_rationals() -> None:
    a, b = drawn("int8", 2), drawn("int8", 3)
    for *scales, output in SCALES:
        left, right = (np.clip(at_scale(q, s, output), -128, 127) for q, s in zip((a, b), scales, strict=True))
        for name, wanted in (("where", np.where(MASK, left, right)), ("cat", np.concatenate((left, right), axis=1))):
            op, operands = JOINS[name]
            found = meanings(op, *operands(a, b), scales=scales, output=output).fake
            np.testing.assert_array_equal(found, wanted.astype(np.float32) * np.float32(output))


def test_a_scale_behind_a_concatenation_learns_as_its_quantizer_says() -> None:
    """Values on thirds of a step, of which none lies on a tie, and one that saturates: the gradient is that of LSQ."""
    inputs = tuple(jq.Input(name, (None, 3)) for name in "ab")
    graph = jq.Graph(inputs, (jq.Node("y", ops.Cat(axis=1), ("a", "b")),), ("y",))
    rules = {
        "a": jq.Policy(output=jq.int8(scale=0.25)),
        "b": jq.Policy(output=jq.int8(scale=1.0)),
        "y": jq.Policy(output=jq.int8(quantizer=lsq)),
    }
    model = jq.prepare(graph, {}, jq.QConfig({"*": None} | rules), target=jq.targets.NASH_E)
    a, b = jnp.array([[0.75, -3.25, 5.0]]), jnp.array([[0.0, 7.0, 100.0]])
    scale = jnp.float32(0.75)

    def total(scale: jax.Array) -> jax.Array:
        return jq.apply(model.replace(qparams={"y": scale}), a, b).sum()

    def alone(scale: jax.Array) -> jax.Array:
        return lsq(jnp.concatenate((a, b), axis=1), scale, model.plan.values["y"]).sum()

    assert alone(scale) == total(scale) == 0.75 * (1 - 4 + 7 + 0 + 9 + 127)
    assert jax.grad(total)(scale) == jax.grad(alone)(scale) != 0
