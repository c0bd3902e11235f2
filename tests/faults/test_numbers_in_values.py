"""Numbers that enter a value (fills, padding, bounds): one meaning, and a scale that holds them.

Seen: a fill of 100 was 2.3 in the program and 100 in fake-quant; padding with a number before a convolution left 6 dB.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.onnx_helpers import run_onnxruntime

import jquant as jq
from jquant import ops
from jquant_converters import from_torch, to_onnx

SHAPE = (3, 4, 5)
PADDING = ((0, 0), (0, 0), (1, 2), (0, 1))
FILLS = (100.0, -77.7, 2.05, -2.05, 0.333, 0.0)  # far outside, just outside and inside of data in [-2, 2]


def of_number(kind: str, value: float) -> jq.ops.Op:
    made: dict[str, jq.ops.Op] = {
        "pad": ops.Pad(padding=PADDING, value=value),
        "fill": ops.MaskedFill(value=value),
        "lower bound": ops.Clamp(minimum=value),
        "upper bound": ops.Clamp(maximum=value),
    }
    return made[kind]


KINDS = ("pad", "fill", "lower bound", "upper bound")


def net(op: jq.ops.Op, dtype: str, observer: jq.observers.Observer | None = None) -> tuple[jq.Model, tuple]:
    """A relative of x with the number in it, calibrated on data in [-2, 2]."""
    masked = isinstance(op, ops.MaskedFill)
    inputs = (jq.Input("x", (None, *SHAPE)), *((jq.Input("m", (None, *SHAPE), "bool"),) if masked else ()))
    nodes = (
        jq.Node("moved", ops.Flip(axes=(1,)), ("x",)),
        jq.Node("halved", ops.Scale(factor=-0.5), ("moved",)),
        jq.Node("y", op, ("halved", "m") if masked else ("halved",)),
    )
    policy = jq.Policy(output=getattr(jq, dtype)(observer=observer))
    model = jq.prepare(jq.Graph(inputs, nodes, ("y",)), {}, jq.QConfig({"*": policy}), target=jq.targets.NASH_E)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(-4, 4, (6, *SHAPE)), jnp.float32)
    batch = (x, jnp.asarray(rng.random((6, *SHAPE)) < 0.3)) if masked else (x,)
    return jq.calibrate(model, [batch]), batch


@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_meaning_has_the_number_and_the_scale_holds_it(kind: str, dtype: str) -> None:
    for value in FILLS:
        model, batch = net(of_number(kind, value), dtype)
        program = jq.lower(model)
        real = np.asarray(jq.apply(model, *batch, mode="float"))
        whole, fake = np.asarray(jq.run(program, *batch)), np.asarray(jq.apply(model, *batch))
        (slow,), _ = jq.reference.run(program, *batch)
        np.testing.assert_array_equal(whole, slow)
        np.testing.assert_allclose(fake, whole, rtol=2**-22)  # x * -0.5 and integer * (0.5 * scale)
        (y,) = run_onnxruntime(to_onnx(model), *map(np.asarray, batch))
        np.testing.assert_allclose(y, whole, rtol=2**-22)
        scale = float(program.scales["y"])
        assert np.abs(whole - real).max() <= 1.001 * scale  # nothing is cut: x and the number are each rounded once
        if abs(value) > 2.0 and not (kind == "lower bound" and value < 0) and not (kind == "upper bound" and value > 0):
            assert scale * 2 ** (int(dtype[3:]) - 1) <= abs(value) * 1.02  # and the scale is no wider than that


def test_an_observer_that_cuts_a_tail_keeps_the_number() -> None:
    for observer in (jq.observers.percentile(99.0), jq.observers.mse(), jq.observers.moving_average()):
        model, batch = net(of_number("fill", 50.0), "int8", observer)
        y = np.asarray(jq.run(jq.lower(model), *batch))
        assert abs(y.max() - 50.0) < 0.3


def test_scales_that_hold_the_number_stay_as_they_are() -> None:
    model, _ = net(of_number("pad", 1.5), "int8")
    bare, _ = net(ops.Flip(axes=(1,)), "int8")
    assert model.qparams["x"] == bare.qparams["x"]
    for op in (ops.Clamp(minimum=-100.0), ops.Clamp(maximum=100.0)):  # a bound beyond the range has no effect
        assert net(op, "int8")[0].qparams["x"] == bare.qparams["x"]
    assert (model.plan.owned, bare.plan.owned, model.params, bare.params) == (("x",), ("x",), {}, {})


def test_both_scales_are_widened_where_operands_meet_at_the_larger_one() -> None:
    graph = jq.Graph(
        (jq.Input("a", (None, 3)), jq.Input("b", (None, 3))),
        (
            jq.Node("larger", ops.Maximum(), ("a", "b")),
            jq.Node("y", ops.Pad(padding=((0, 0), (1, 0)), value=40.0), ("larger",)),
        ),
        ("y",),
    )
    model = jq.prepare(graph, {}, jq.QConfig({"*": jq.Policy(output=jq.int8())}), target=jq.targets.NASH_E)
    a, b = jnp.array([[1.0, -2.0, 0.5]]), jnp.array([[4.0, -4.0, 0.25]])
    model = jq.calibrate(model, [(a, b)])
    np.testing.assert_allclose(jq.run(jq.lower(model), a, b)[:, 0], 40.0, atol=0.2)


def test_a_fixed_scale_that_does_not_hold_a_number_is_refused_with_both() -> None:
    nodes = (
        jq.Node("half", ops.Scale(factor=0.5), ("x",)),
        jq.Node("y", ops.Pad(padding=PADDING, value=3.0), ("half",)),
    )
    graph = jq.Graph((jq.Input("x", (None, *SHAPE)),), nodes, ("y",))
    config = {"*": jq.Policy(output=jq.int8()), "x": jq.Policy(output=jq.int8(scale=2.0**-6))}
    with pytest.raises(jq.QConfigError, match=r"y \(Pad\): 3 leaves the range \[-1, 0.992188\] of its fixed scale"):
        jq.prepare(graph, {}, jq.QConfig(config), target=jq.targets.NASH_E)
    config["x"] = jq.Policy(output=jq.int8(scale=2.0**-4))
    jq.prepare(graph, {}, jq.QConfig(config), target=jq.targets.NASH_E)


@pytest.mark.parametrize("value", [-1e9, float("-inf"), 1e5, float(np.finfo(np.float32).min)])
def test_a_number_beside_which_nothing_fits_is_refused_with_the_remedy(value: float) -> None:
    graph = jq.Graph(
        (jq.Input("x", (None, *SHAPE)), jq.Input("m", (None, *SHAPE), "bool")),
        (jq.Node("y", ops.MaskedFill(value=value), ("x", "m")),),
        ("y",),
    )
    config = jq.QConfig({"*": jq.Policy(output=jq.int8())})
    with pytest.raises(
        jq.QConfigError, match=r"y \(MaskedFill\): .* has no place in int8.*operand; else take a number"
    ):
        jq.prepare(graph, {}, config, target=jq.targets.NASH_E)


@pytest.mark.parametrize("value", [float("-inf"), -1e9])
def test_padding_in_front_of_a_maximum_is_the_smallest_integer(value: float) -> None:
    """Padding that a maximum alone reads never wins, so it costs no range: TensorFlow's padded pooling, by hand."""

    class Pool(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=value), 2)

    x = torch.from_numpy(np.random.default_rng(0).integers(-128, 128, (2, 3, 5, 5)).astype(np.float32))
    graph, params = from_torch(Pool(), x)
    config = jq.QConfig({"*": jq.Policy(output=jq.int8(scale=1.0))})
    model = jq.prepare(graph, params, config, target=jq.targets.NASH_E)
    program, given = jq.lower(model), jnp.asarray(x.numpy())
    for found in (jq.run(program, given), jq.apply(model, given)):
        np.testing.assert_array_equal(found, Pool()(x))


def test_padding_with_a_number_before_a_convolution() -> None:
    """Fake-quant had 57 dB and the integers 6 dB."""

    class Padded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(F.pad(x, (1, 1, 1, 1), value=9.0))

    torch.manual_seed(0)
    model = Padded().eval()
    x = torch.rand(4, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        wanted = model(x).numpy()
    graph, params = from_torch(model, x)
    config = jq.QConfig({"*": jq.Policy(output=jq.int16(), weight=jq.int8(axis="out"))})
    model = jq.prepare(graph, params, config, target=jq.targets.NASH_E)
    given = jnp.asarray(x.numpy())
    model = jq.calibrate(model, [(given,)])
    for found in (jq.run(jq.lower(model), given), jq.apply(model, given)):
        noise = np.sum((np.asarray(found) - wanted) ** 2) / np.sum(wanted**2)
        assert -10 * np.log10(noise) > 40  # int8 weights


def test_the_gradient_of_a_bound_stays_that_of_the_float_operator() -> None:
    model, (x,) = net(of_number("upper bound", 0.7), "int8")

    def total(mode: str, x: jax.Array) -> jax.Array:
        return jq.apply(model, x, mode=mode).sum()

    far = jnp.where(jnp.abs(-0.5 * x - 0.7) < 0.05, 0.0, x)  # where rounding does not move x over the bound
    found = jax.grad(lambda x: total("fake_quant", x))(far)
    np.testing.assert_array_equal(found, jax.grad(lambda x: total("float", x))(far))
