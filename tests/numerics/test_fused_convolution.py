"""The kernel that keeps the accumulator on the chip: its integers, its lowering for absent devices, its choice.

The kernel runs in interpret mode. The right values are those of `jquant.reference`, which shares no code with it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant import ops
from jquant.numerics import fused_convolution
from jquant.numerics.convolution import Window
from jquant.numerics.fused_convolution import Layer, fits, is_chosen, layer_of, pays
from jquant.numerics.platform import tracing_for
from jquant.ops import conv

SAME = ((1, 1), (1, 1))


def halved(products: jax.Array, addend: jax.Array | None, constants: dict[str, jax.Array]) -> jax.Array:
    """A rescale by hand."""
    del addend
    return ((products + constants["bias"]) >> constants["post"]).clip(-128, 127).astype(jnp.int8)


def layer(size=(6, 5), channels=5, out=7, strides=(1, 1), batch=2, finish=halved) -> tuple[Layer, tuple]:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-128, 128, (batch, *size, channels), np.int8))
    weight = jnp.asarray(rng.integers(-128, 128, (3, 3, channels, out), np.int8))
    constants = {"bias": jnp.asarray(rng.integers(-999, 999, out), jnp.int32), "post": jnp.int32(10)}
    window = Window(strides, SAME, (1, 1))
    return layer_of(x, weight, window, finish, "int8", None, constants), (x, weight, None, constants)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[Layer]:
    """Every convolution that fits runs by the kernel; the layers that did."""
    used: list[Layer] = []
    run = partial(fused_convolution.fused_convolution, interpret=True)
    monkeypatch.setattr(conv, "is_chosen", lambda layer: True)
    monkeypatch.setattr(conv, "fused_convolution", lambda layer, *rest: (used.append(layer), run(layer, *rest))[1])
    return used


def net(x: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
    """[N, C, H, W]: a stem of stride 2, a residual block, and a step of 2 by 1."""

    def convolved(x, name, strides=(1, 1)):
        names = ("NCHW", "OIHW", "NCHW")
        y = jax.lax.conv_general_dilated(x, p[name], strides, SAME, dimension_numbers=names)
        return y + p[name + "_bias"][:, None, None]

    y = jax.nn.relu(convolved(x, "stem", (2, 2)))
    y = jax.nn.relu(y + convolved(jax.nn.relu6(convolved(y, "first")), "second"))
    return convolved(y, "last", (2, 1))


@pytest.mark.parametrize(("size", "batch", "output"), [((19, 21), 1, "int16"), ((8, 34), 3, "int8")])
def test_a_net_gives_the_integers_of_the_reference(kernel: list, size: tuple, batch: int, output: str) -> None:
    rng = np.random.default_rng(1)
    shapes = {"stem": (40, 3, 3, 3), "first": (24, 40, 3, 3), "second": (40, 24, 3, 3), "last": (70, 40, 3, 3)}
    params = {name: jnp.asarray(rng.normal(size=shape) * 0.2, jnp.float32) for name, shape in shapes.items()}
    params |= {f"{n}_bias": jnp.asarray(rng.normal(size=s[0]), jnp.float32) for n, s in shapes.items()}
    x = jnp.asarray(rng.normal(size=(batch, 3, *size)), jnp.float32)
    graph, raw = jq.trace(lambda p, x: net(x, p), params, x)
    last = jq.Policy(output=jq.int16() if output == "int16" else jq.int8(), weight=jq.int8(axis="out"))
    rules = {"*": jq.Policy(output=jq.int8(), weight=jq.int8(axis="out")), graph.nodes[-1].name: last}
    model = jq.prepare(graph, raw, jq.QConfig(rules), target="nash-e", high_precision_outputs=False)
    program = jq.lower(jq.calibrate(model, [x]))
    integers = rng.integers(-128, 128, x.shape, np.int8)
    found = jq.run_with_taps(program, integers, raw=True)
    _, expected = jq.reference.run(program, integers, raw=True)
    for name in program.graph.values:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert len(kernel) == 4
    assert sum(bool(one.addend) for one in kernel) == 1
    assert [one.output for one in kernel][-1] == output


def test_forms_that_the_kernel_does_not_know_take_the_other_way(kernel: list) -> None:
    x, weight = jnp.zeros((1, 9, 9, 8), jnp.int8), jnp.zeros((3, 3, 8, 8), jnp.int8)
    window = Window((1, 1), SAME, (1, 1))
    assert fits(x, weight, window, 1)
    assert not fits(x.astype(jnp.int16), weight, window, 1)
    (batch,) = jax.export.symbolic_shape("batch")
    assert not fits(jax.ShapeDtypeStruct((batch, 9, 9, 8), jnp.int8), weight, window, 1)
    assert not fits(x, weight.astype(jnp.int16), window, 1)
    assert not fits(x, weight[:, :, :4], window, 2)
    assert not fits(x, weight[:, :1], window, 1)
    assert not fits(x, weight, window._replace(strides=(3, 1)), 1)
    assert not fits(x, weight, window._replace(dilation=(1, 2)), 1)
    wide = jq.Graph(
        (jq.Input("x", (None, 8, 6, 6)),),
        (jq.Node("y", ops.Conv(strides=(1, 1), padding=SAME, dilation=(1, 1)), ("x",), jq.FrozenMap({"weight": "w"})),),
        ("y",),
    )
    config = jq.QConfig({"*": jq.Policy(output=jq.int8(), weight=jq.int8())})
    model = jq.prepare(wide, {"w": jnp.ones((8, 8, 3, 3))}, config, target="nash-e")  # its output is an accumulator
    x = jnp.ones((1, 8, 6, 6))
    assert jq.run(jq.lower(jq.calibrate(model, [x])), x).shape == (1, 8, 6, 6)
    assert kernel == []


@contextmanager
def a_tpu() -> Iterator[None]:
    """Pallas asks the mesh for the kind of TPU where none is here."""
    device = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
    with (
        tracing_for(["tpu"]),
        jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)),
    ):
        yield


DEVICES = {"cuda": (lambda: tracing_for(["cuda"]), "xla.gpu.triton"), "tpu": (a_tpu, "tpu_custom_call")}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_the_kernel_lowers_for_devices_that_are_not_here(device: str, strides: tuple[int, int]) -> None:
    tracing, name = DEVICES[device]
    own, arguments = layer((14, 15), 20, 140, strides)
    with tracing():
        run = jax.jit(partial(fused_convolution.fused_convolution, own))
        text = run.trace(*arguments).lower(lowering_platforms=(device,)).as_text()
    assert text.count(f"@{name}") + text.count(f'"{name}') + text.count(f"${name}") >= 1
    assert "stablehlo.convolution" not in text


# ---------------------------------------------------------------------------------------------------------------------
# The choice


def faster(monkeypatch: pytest.MonkeyPatch, own: float, other: float) -> None:
    """The kernel is timed first."""
    times = iter([own, other])
    monkeypatch.setattr(fused_convolution, "_seconds", lambda *_: next(times))
    pays.cache_clear()


@pytest.mark.parametrize("addend", ["", "int8"])
def test_the_kernel_pays_where_it_is_exact_and_faster(monkeypatch: pytest.MonkeyPatch, addend: str) -> None:
    own = layer()[0]._replace(addend=addend)
    faster(monkeypatch, 1.0, 2.0)
    assert pays(own, interpret=True)
    assert pays(own, interpret=True)  # kept: it is timed once
    faster(monkeypatch, 2.0, 1.0)
    assert not pays(own, interpret=True)


@pytest.mark.parametrize("fault", ["one integer is another", "it does not compile"])
def test_a_kernel_that_is_wrong_or_does_not_compile_is_not_chosen(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    own, _ = layer()
    right = fused_convolution.fused_convolution

    def wrong(*args, **options) -> jax.Array:
        if fault == "it does not compile":
            raise NotImplementedError("no rule for this primitive")
        return right(*args, **options).at[0, 0, 0, 0].add(1)

    monkeypatch.setattr(fused_convolution, "fused_convolution", wrong)
    faster(monkeypatch, 1.0, 2.0)
    assert not pays(own, interpret=True)


def test_the_trial_runs_inside_of_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    own, arguments = layer()
    faster(monkeypatch, 1.0, 2.0)

    @jax.jit
    def run(x: jax.Array, *rest) -> jax.Array:
        return x + 1 if pays(own, interpret=True) else x

    np.testing.assert_array_equal(run(*arguments), arguments[0] + 1)


def test_one_device_that_is_a_gpu_or_tpu_takes_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    own, _ = layer()
    monkeypatch.setattr(fused_convolution, "pays", lambda layer: True)
    assert not is_chosen(own)  # a CPU
    for name in ("gpu", "tpu"):
        monkeypatch.setattr(jax, "default_backend", lambda name=name: name)
        assert is_chosen(own)
        with tracing_for(["cuda"]):  # a file
            assert not is_chosen(own)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert not is_chosen(own)


def test_tiles_cover_every_size(kernel: list) -> None:
    """Each pixel and channel, against int64, where the last tiles and blocks are not full."""
    for size, channels, out, strides in (((1, 1), 1, 1, (1, 1)), ((9, 65), 33, 65, (1, 2)), ((17, 7), 129, 3, (2, 1))):
        own, (x, weight, _, constants) = layer(size, channels, out, strides)
        found = jax.jit(partial(fused_convolution.fused_convolution, own, interpret=True))(x, weight, None, constants)
        padded = np.pad(np.asarray(x, np.int64), [(0, 0), (1, 1), (1, 1), (0, 0)])
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, :: strides[0], :: strides[1]]
        total = np.einsum("nhwcij,ijco->nhwo", windows, np.asarray(weight, np.int64))
        expected = ((total + np.asarray(constants["bias"])) // 1024).clip(-128, 127)
        np.testing.assert_array_equal(found, expected)
