"""An int32 output saturates once at 32 bits: `lower` names the channels where it can, and fake-quant agrees."""

import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant import ops

INPUTS = 600  # 600 products of 32767 * 127 pass 2^31
SCALE = 2.0**-10


def linear(weight: np.ndarray, bias: np.ndarray) -> jq.Model:
    """A linear layer on int16, whose accumulator is the output; integers of the weight are `weight`."""
    roles = {"weight": "y.weight", "bias": "y.bias"}
    graph = jq.Graph(
        (jq.Input("x", (None, INPUTS)),), (jq.Node("y", ops.Linear(), ("x",), jq.FrozenMap(roles)),), ("y",)
    )
    params = {"y.weight": jnp.asarray(weight * SCALE, jnp.float32), "y.bias": jnp.asarray(bias, jnp.float32)}
    config = jq.QConfig({"*": jq.Policy(output=jq.int16(scale=SCALE), weight=jq.int8(scale=SCALE))})
    model = jq.prepare(graph, params, config, target=jq.targets.NASH_E)
    return model


def sums(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    return x.astype(np.int64) @ weight.astype(np.int64).T


def weights() -> np.ndarray:
    """Channel 0 can pass 2^31 upwards and downwards, 1 is small, 2 and 3 are at the border with one operand each."""
    rng = np.random.default_rng(0)
    weight = np.stack([rng.choice([-127, 127], INPUTS), rng.integers(-9, 10, INPUTS), *np.zeros((2, INPUTS))])
    weight[2, :516], weight[2, 516] = 127, 4  # 65536 steps: 65536 * 32767 is below 2^31, and -65536 * 32768 is -2^31
    weight[3, :516], weight[3, 516] = 127, 5  # one more step, which passes -2^31
    return weight


def saturating(program: jq.Program) -> list[int]:
    return np.flatnonzero(program.accumulators["y"].saturating).tolist()


def test_lower_names_the_channels_whose_output_can_saturate() -> None:
    model = linear(weights(), np.zeros(4))
    program = jq.lower(model)
    assert saturating(program) == [0, 3]
    assert "y: the int32 output saturates for some operands in channels 0, 3; give the operand int8" in str(program)
    small = jq.lower(linear(weights() // 16, np.zeros(4)))
    assert saturating(small) == []
    assert "saturates" not in str(small)


def test_a_bias_counts() -> None:
    model = linear(weights() // 16, np.array([2.0**11 - 1, 0, 0, -(2.0**11)]) / 1.0)
    assert saturating(jq.lower(model)) == [0, 3]


def test_fake_quant_saturates_where_the_integers_do() -> None:
    model = linear(weights(), np.zeros(4))
    rng = np.random.default_rng(1)
    x = rng.integers(-(2**15), 2**15, size=(40, INPUTS)).astype(np.int16)
    x[0], x[1] = np.where(weights()[0] > 0, 32767, -32768), np.where(weights()[0] > 0, -32768, 32767)
    x[2], x[3] = 32767, -32768
    program = jq.lower(model)
    whole = np.asarray(jq.run(program, jnp.asarray(x), raw=True))
    exact = sums(weights(), x)
    np.testing.assert_array_equal(whole, exact.clip(-(2**31), 2**31 - 1))
    assert (np.abs(exact) > 2**31).sum() >= 3
    assert exact[3, 2] == -(2**31)  # which is in the range
    (reference,), _ = jq.reference.run(program, x, raw=True)
    np.testing.assert_array_equal(reference, whole)
    fake = np.asarray(jq.apply(model, jnp.asarray(x * np.float32(SCALE))))
    beyond = np.abs(exact) >= 2**31
    np.testing.assert_array_equal(fake[beyond], np.sign(exact[beyond]) * np.float32(2.0**31 * SCALE**2))
    # Float32 sums of 600 products up to 2^22: each addition is off by at most 2^-24 of 2^31.
    np.testing.assert_allclose(fake / SCALE**2, whole, atol=INPUTS * 2.0**7)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_of_two_activations_can_saturate_in_every_column(transposed: bool) -> None:
    shape = (5, INPUTS) if transposed else (INPUTS, 5)
    inputs = (jq.Input("a", (None, 2, INPUTS)), jq.Input("b", (None, *shape)))
    graph = jq.Graph(inputs, (jq.Node("y", ops.MatMul(transpose_b=transposed), ("a", "b")),), ("y",))
    rules = {"a": jq.Policy(output=jq.int16(scale=1.0)), "b": jq.Policy(output=jq.int8(scale=1.0))}
    model = jq.prepare(graph, {}, jq.QConfig({"*": jq.Policy(output=jq.int8())} | rules), target=jq.targets.NASH_E)
    program = jq.lower(model)
    assert saturating(program) == [0, 1, 2, 3, 4]
    a, b = np.full((1, 2, INPUTS), -32768, np.int16), np.full((1, *shape), 127, np.int8)
    assert (np.asarray(jq.run(program, jnp.asarray(a), jnp.asarray(b), raw=True)) == -(2**31)).all()
    real = jq.apply(model, jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    np.testing.assert_array_equal(real, np.full((1, 2, 5), -(2.0**31)))
