"""A bias is the exact quotient by the step of its accumulator, rounded once: on the host, inside jit and in fake-quant.

Seen: the float32 product of two scales and the float32 quotient by it gave an integer 1 off at 10^6 steps.
"""

from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onnx import numpy_helper

import jquant as jq
from jquant import ops
from jquant.numerics.rescale import quantize_exactly
from jquant.program.lower import lower_traced
from jquant_converters import to_onnx


def exact(bias: np.ndarray, a: np.ndarray, b: np.ndarray) -> list[int]:
    """sat_32(rhe(bias / (a * b))) in rational numbers; Python rounds a Fraction half to even."""
    quotients = [
        Fraction(float(x)) / (Fraction(float(p)) * Fraction(float(q))) for x, p, q in zip(bias, a, b, strict=True)
    ]
    return [max(-(2**31), min(2**31 - 1, round(v))) for v in quotients]


def draws(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Biases of all magnitudes and steps from 2^-46; a quarter are ties, the first ones the ends of the range."""
    rng = np.random.default_rng(seed)
    bias = rng.normal(size=count) * np.exp2(rng.uniform(-30, 40, size=count))
    a, b = np.exp2(rng.uniform(-23, 3, size=(2, count)))
    ties = slice(count // 4)
    a[ties], b[ties] = np.exp2(rng.integers(-20, 3, size=(2, count // 4)))
    bias[ties] = (rng.integers(-(2**22), 2**22, size=count // 4) + 0.5) * a[ties] * b[ties]
    ends = [0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38, 2.0**31, -(2.0**31), 2.0**31 - 128, -(2.0**31) - 256, 0.5, 1.5]
    bias[: len(ends)], a[: len(ends)], b[: len(ends)] = ends, 1, 1
    return bias.astype(np.float32), a.astype(np.float32), b.astype(np.float32)


def test_the_quotient_is_exact_on_the_host_and_inside_jit() -> None:
    bias, a, b = draws(20_000, 0)
    wanted = exact(bias, a, b)
    half_even = partial(quantize_exactly, rounding="half_even")
    for function in (half_even, jax.jit(half_even)):
        found = np.asarray(function(bias, a, b))
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, wanted)


def layers() -> dict[str, tuple[jq.ops.Op, tuple[int, ...], tuple[int, ...]]]:
    """{name: operator, shape of the operand, shape of the weight} with six outputs."""
    window = {"strides": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1)}
    return {
        "linear": (ops.Linear(), (3,), (6, 3)),
        "conv": (ops.Conv(**window), (3, 4, 4), (6, 3, 2, 2)),
        "transposed": (ops.ConvTranspose(**window, output_padding=(0, 0), groups=2), (4, 3, 3), (4, 3, 2, 2)),
    }


def net(name: str, bias: np.ndarray) -> jq.Model:
    """A layer with such a bias, and scales that are no powers of two; its accumulator is the output."""
    op, shape, weight = layers()[name]
    node = jq.Node("y", op, ("x",), jq.FrozenMap({"weight": "y.weight", "bias": "y.bias"}))
    graph = jq.Graph((jq.Input("x", (None, *shape)),), (node,), ("y",))
    rng = np.random.default_rng(1)
    params = {"y.weight": jnp.asarray(rng.normal(size=weight), jnp.float32), "y.bias": jnp.asarray(bias)}
    config = jq.QConfig({"*": jq.Policy(output=jq.int8(), weight=jq.int8(axis="out"))})
    model = jq.prepare(graph, params, config, target=jq.targets.NASH_E)
    scales = jax.tree.map(jnp.asarray, {"x": np.float32(0.0123), "y.weight": np.float32([3e-3, 0.7, 1.1e-2] * 2)})
    channels = weight[1] if name == "transposed" else 6
    return model.replace(qparams={"x": scales["x"], "y.weight": scales["y.weight"][:channels]})


@pytest.mark.parametrize("name", layers())
def test_every_layer_has_the_exact_bias_in_every_meaning(name: str) -> None:
    """Of a zero operand: the program's accumulator, inside jit and outside, fake-quant, and the file for ONNX."""
    steps = np.float32([0.0123]) * np.tile(np.float32([3e-3, 0.7, 1.1e-2]), 2)
    bias = (np.array([1000003.5, -1000001.5, 999999.5, -12345677.5, 7654321.5, 0.5]) * steps).astype(np.float32)
    model = net(name, bias)
    program = jq.lower(model)
    scale = np.tile(np.float32([3e-3, 0.7, 1.1e-2]), 2)
    wanted = np.array(exact(bias, np.full(6, np.float32(0.0123)), scale))
    np.testing.assert_array_equal(program.constants["y"]["bias"], wanted)
    inside = jax.jit(lower_traced)(model)
    np.testing.assert_array_equal(inside.constants["y"]["bias"], wanted)
    x = jnp.zeros((1, *model.plan.graph.inputs[0].shape[1:]))
    fake = np.asarray(jq.apply(model, x))
    np.testing.assert_array_equal(fake, jq.run(program, x))
    stored = {t.name: numpy_helper.to_array(t) for t in to_onnx(model).graph.initializer}
    np.testing.assert_array_equal(stored["y.bias"], wanted)


def test_the_gradient_of_a_bias_is_one_where_it_does_not_saturate() -> None:
    model = net("linear", np.float32([0.5, -0.5, 1e30, -1e30, 3e-7, 0.0]))

    def total(bias: jax.Array) -> jax.Array:
        return jq.apply(model.replace(params=model.params | {"y.bias": bias}), jnp.zeros((1, 3))).sum()

    np.testing.assert_array_equal(jax.grad(total)(model.params["y.bias"]), [1, 1, 0, 0, 1, 1])
