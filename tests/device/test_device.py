"""On a GPU or TPU: the integers of every operator, of the fused kernel and of nets. On a CPU all of it is skipped.

`benchmarks/device.sh` runs these and measures. The right values are those of `jquant.reference`, in numpy.
"""

import importlib
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance.harness import Case, check

import jquant as jq
from jquant.numerics.convolution import Window
from jquant.numerics.fused_convolution import fused_convolution, layer_of, unfused_convolution

pytestmark = pytest.mark.skipif(jax.default_backend() == "cpu", reason="no GPU or TPU is here")

CASES = Path(__file__).parents[1] / "conformance"


def first_cases() -> list[Case]:
    """One case of each operator: the first that it declares."""
    found: dict[str, Case] = {}
    for family in sorted(path.stem for path in CASES.glob("*_cases.py")):
        for case in importlib.import_module(f"conformance.{family}").CASES:
            found.setdefault(case.operator, case)
    return list(found.values())


@pytest.mark.parametrize("case", first_cases(), ids=lambda case: case.operator)
def test_an_operator_equals_the_reference(case: Case) -> None:
    row = check(case, outputs=5_000)
    assert row.mismatches == 0


@pytest.mark.parametrize("shape", [(8, 64, 64), (16, 256, 256), (3, 32, 48)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_integer_products_of_nets_equal_int64(shape: tuple[int, int, int], stride: int) -> None:
    """3 x 3 convolutions, by XLA and, where it compiles, by the kernel."""
    size, channels, out = shape
    rng = np.random.default_rng(size)
    x = jnp.asarray(rng.integers(-128, 128, (2, size, size, channels), np.int8))
    weight = jnp.asarray(rng.integers(-128, 128, (3, 3, channels, out), np.int8))
    layer = layer_of(
        x, weight, Window((stride, stride), ((1, 1), (1, 1)), (1, 1)), _shifted, "int16", None, {"post": 0}
    )
    padded = np.pad(np.asarray(x, np.int64), [(0, 0), (1, 1), (1, 1), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::stride, ::stride]
    expected = np.einsum("nhwcij,ijco->nhwo", windows, np.asarray(weight, np.int64)) >> 9
    constants = {"post": jnp.int32(9)}
    found = jax.jit(partial(unfused_convolution, layer))(x, weight, None, constants)
    np.testing.assert_array_equal(found, expected)
    try:
        kernel = jax.jit(partial(fused_convolution, layer)).lower(x, weight, None, constants).compile()
    except Exception as error:  # a device whose compiler refuses it runs the other way
        pytest.skip(f"the kernel does not compile here: {str(error)[:200]}")
    np.testing.assert_array_equal(kernel(x, weight, None, constants), expected)


def _shifted(products, addend, constants):
    del addend
    return (products >> constants["post"]).astype(jnp.int16)


@pytest.mark.parametrize("batch", [1, 8, 5])
def test_a_net_equals_the_reference(batch: int) -> None:
    rng = np.random.default_rng(batch)
    shapes = {"stem": (32, 3, 3, 3), "first": (64, 32, 3, 3), "second": (32, 64, 1, 1)}
    params = {name: jnp.asarray(rng.normal(size=shape) * 0.2, jnp.float32) for name, shape in shapes.items()}

    def net(p, x):
        names = ("NCHW", "OIHW", "NCHW")
        convolved = partial(jax.lax.conv_general_dilated, dimension_numbers=names)
        y = jax.nn.relu(convolved(x, p["stem"], (2, 2), ((1, 1), (1, 1))))
        y = jax.nn.relu(
            y + convolved(jax.nn.relu(convolved(y, p["first"], (1, 1), "SAME")), p["second"], (1, 1), "SAME")
        )
        return jax.nn.softmax(y.mean((2, 3)))

    x = jnp.asarray(rng.normal(size=(batch, 3, 32, 32)), jnp.float32)
    graph, raw = jq.trace(net, params, x)
    model = jq.prepare(graph, raw, jq.QConfig(jq.templates.int8_default()), target="nash-e")
    program = jq.lower(jq.calibrate(model, [x]))
    integers = rng.integers(-128, 128, x.shape, np.int8)
    found = jq.run_with_taps(program, integers, raw=True)
    _, expected = jq.reference.run(program, integers, raw=True)
    for name in program.graph.values:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
