"""A convolution of int8 whose accumulator never leaves the chip: 3 x 3 products and what follows them in one kernel.

XLA writes the int32 accumulator of a convolution to memory and reads it again for the rescale: eight times the bytes of
the int8 output. This kernel, in Pallas, holds the accumulator of a tile in registers (GPU, by Triton) or in the memory
of the core (TPU, by Mosaic), and stores int8 alone.

`pays` decides by trial on the device at hand, once for each shape: the kernel has to compile there, to give the
integers of the other way, and to take less time. It was not run on a device yet; on a CPU the tests run it in
interpret mode, and lower it for both devices.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from math import prod
from time import perf_counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.numerics.convolution import Window, convolve, pad_spatial
from jquant.numerics.platform import is_traced_for_another, platform
from jquant.types import Array

# What becomes of products [..., O] int32, an addend [..., O] or None, and constants {name: int32 [O]}. Hashable.
Finish = Callable[[Array, Array | None, Mapping[str, Array]], Array]

_KERNEL = (3, 3)
_TILES = ((1, 64), (2, 32), (4, 16), (8, 8))  # rows and columns, 64 pixels together
_CHANNELS = 32  # a product on a matrix unit takes bytes by so many
_ROUNDS = 5  # of the trial


class Layer(NamedTuple):
    """What the kernel is compiled for. `x`, `weight`: shapes; `constants`: names."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    window: Window
    finish: Finish
    output: str
    addend: str
    constants: tuple[str, ...]


def fits(x: Array, weight: Array, window: Window, groups: int) -> bool:
    """Whether the kernel knows this form: int8, 3 x 3, one group, steps of 1 or 2, no dilation, a known batch."""
    return (
        isinstance(x.shape[0], int)
        and x.dtype == jnp.int8 and weight.dtype == jnp.int8
        and weight.shape[:-2] == _KERNEL and groups == 1
        and set(window.strides) <= {1, 2} and set(window.dilation) == {1}
    )  # fmt: skip


def layer_of(
    x: Array,
    weight: Array,
    window: Window,
    finish: Finish,
    output: str,
    addend: Array | None,
    constants: Mapping[str, Any],
) -> Layer:
    added = "" if addend is None else str(addend.dtype)
    return Layer(x.shape, weight.shape, window, finish, output, added, tuple(sorted(constants)))


def is_chosen(layer: Layer) -> bool:
    """Whether the kernel runs here: on one GPU or TPU where it pays.

    Over several devices XLA divides a convolution, and not a kernel. A trace for an exported file takes no kernel
    either, since its form is not kept from one version of JAX to the next.
    """
    alone = jax.device_count() == 1 and not is_traced_for_another()
    return alone and platform() in ("gpu", "tpu") and pays(layer)


# ---------------------------------------------------------------------------------------------------------------------
# The kernel


class _Tiling(NamedTuple):
    """Sizes of an output [N, *size, O] in tiles: `tile` rows and columns, `tiles` of them, channels in blocks."""

    size: tuple[int, int]
    tile: tuple[int, int]
    tiles: tuple[int, int]
    inputs: int
    block_in: int
    outputs: int
    block_out: int


def _power_of_two(n: int, least: int, most: int) -> int:
    return min(max(1 << (n - 1).bit_length(), least), most)


def _tiling(layer: Layer) -> _Tiling:
    padded = [n + sum(p) for n, p in zip(layer.x[1:-1], layer.window.padding, strict=True)]
    height, width = ((n - 3) // s + 1 for n, s in zip(padded, layer.window.strides, strict=True))
    tile = min(_TILES, key=lambda t: (-(-height // t[0]) * -(-width // t[1]), t))
    *_, channels, out = layer.weight
    lanes = 128 if platform() == "tpu" else 64
    block_in, block_out = _power_of_two(channels, _CHANNELS, 128), _power_of_two(out, _CHANNELS, lanes)
    block_out = lanes if platform() == "tpu" else block_out  # blocks there are whole rows of lanes
    return _Tiling(
        (height, width), tile, (-(-height // tile[0]), -(-width // tile[1])),
        -(-channels // block_in) * block_in, block_in, -(-out // block_out) * block_out, block_out,
    )  # fmt: skip


def _phases(x: Array, layer: Layer, tiling: _Tiling) -> Array:
    """[N, *S, C] as [N, s * s, *S / s, C]: with steps of s, what a tap reads is contiguous in one of them."""
    steps = layer.window.strides
    x = pad_spatial(x, layer.window.padding)
    wanted = [count * side * s + 2 for count, side, s in zip(tiling.tiles, tiling.tile, steps, strict=True)]
    wanted = [-(-n // s) * s for n, s in zip(wanted, steps, strict=True)]
    x = x[:, : wanted[0], : wanted[1]]
    extra = [(0, want - have) for want, have in zip(wanted, x.shape[1:3], strict=True)]
    x = jnp.pad(x, [(0, 0), *extra, (0, tiling.inputs - x.shape[-1])])
    parts = [x[:, i :: steps[0], j :: steps[1]] for i in range(steps[0]) for j in range(steps[1])]
    return jnp.stack(parts, axis=1)


def fused_convolution(
    layer: Layer,
    x: Array,
    weight: Array,
    addend: Array | None,
    constants: Mapping[str, Array],
    *,
    interpret: bool = False,
) -> Array:
    """`finish` of the convolution of x [N, *S, C] with weight [3, 3, C, O], int8: [N, *S_out, O] in `layer.output`.

    Args:
      layer: of these shapes, as `layer_of` makes it.
      addend: [N, *S_out, O], an integer, or None.
      constants: {name: int32, a scalar or [O]}, for `finish`.
      interpret: run the kernel step by step on any device, for tests.
    """
    from jax.experimental import pallas

    tiling = _tiling(layer)
    n, out = x.shape[0], weight.shape[-1]
    (rows, columns), (high, wide), block = tiling.tile, tiling.tiles, tiling.block_out
    phases = _phases(x, layer, tiling)
    more_in, more_out = tiling.inputs - weight.shape[2], tiling.outputs - out
    taps = jnp.pad(weight, [(0, 0), (0, 0), (0, more_in), (0, more_out)]).reshape(9, tiling.inputs, tiling.outputs)
    lines = [jnp.pad(jnp.broadcast_to(constants[name], (out,)), (0, more_out)) for name in layer.constants]

    whole = (n, high * rows, wide * columns, tiling.outputs)
    a_tile = pallas.BlockSpec((1, rows, columns, block), lambda b, i, j, o: (b, i, j, o))
    in_specs = [
        pallas.BlockSpec((1, *phases.shape[1:]), lambda b, i, j, o: (b, 0, 0, 0, 0)),
        pallas.BlockSpec((9, tiling.inputs, block), lambda b, i, j, o: (0, 0, o)),
        *(pallas.BlockSpec((block,), lambda b, i, j, o: (o,)) for _ in lines),
    ]
    operands = [phases, taps, *lines]
    if addend is not None:
        extra = [(0, a - b) for a, b in zip(whole, addend.shape, strict=True)]
        in_specs, operands = [*in_specs, a_tile], [*operands, jnp.pad(addend, extra)]
    found = pallas.pallas_call(
        partial(_tile, layer=layer, tiling=tiling),
        out_shape=jax.ShapeDtypeStruct(whole, jnp.dtype(layer.output)),
        grid=(n, high, wide, tiling.outputs // block),
        in_specs=in_specs,
        out_specs=a_tile,
        interpret=interpret,
        compiler_params=None if interpret else _compiler_params(),
    )(*operands)
    return found[:, : tiling.size[0], : tiling.size[1], :out]


def _compiler_params() -> Any:
    """Triton on a GPU, which JAX no longer takes by itself; on a TPU there is one way."""
    if platform() != "gpu":
        return None
    from jax.experimental.pallas import triton

    return triton.CompilerParams(num_warps=4, num_stages=2)


def _tile(*refs: Any, layer: Layer, tiling: _Tiling) -> None:
    """One tile of pixels and one block of output channels, from nine taps and blocks of input channels."""
    from jax.experimental import pallas

    x, weight, *others, output = refs
    addend = others.pop() if layer.addend else None
    (rows, columns), block = tiling.tile, tiling.block_in
    first = [pallas.program_id(axis) * side for axis, side in ((1, rows), (2, columns))]
    down, across = layer.window.strides
    total = jnp.zeros((rows * columns, tiling.block_out), jnp.int32)
    for tap, (i, j) in enumerate(np.ndindex(3, 3)):
        phase = (i % down) * across + j % across
        above, left = first[0] + i // down, first[1] + j // across
        for start in range(0, tiling.inputs, block):
            pixels = x[0, phase, pallas.ds(above, rows), pallas.ds(left, columns), pallas.ds(start, block)]
            factors = weight[tap, pallas.ds(start, block), :]
            total += jax.lax.dot_general(
                pixels.reshape(rows * columns, block), factors, (((1,), (0,)), ((), ())),
                preferred_element_type=jnp.int32,
            )  # fmt: skip
    added = None if addend is None else addend[0].reshape(rows * columns, tiling.block_out)
    constants = {name: ref[...] for name, ref in zip(layer.constants, others, strict=True)}
    output[0] = layer.finish(total, added, constants).reshape(rows, columns, tiling.block_out)


# ---------------------------------------------------------------------------------------------------------------------
# The choice


def unfused_convolution(
    layer: Layer, x: Array, weight: Array, addend: Array | None, constants: Mapping[str, Array]
) -> Array:
    """The same by XLA: the accumulator as an array, then `finish`."""
    return layer.finish(convolve(x, weight, layer.window), addend, constants)


@lru_cache
def pays(layer: Layer, *, interpret: bool = False) -> bool:
    """Whether the kernel compiles on this device, gives the integers of the other way, and takes less time.

    The trial runs in a thread of its own, since a trace that is under way here would take its calls in.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_try, layer, interpret).result()


def _try(layer: Layer, interpret: bool) -> bool:
    arguments = _drawn(layer)
    other = _compiled(partial(unfused_convolution, layer), arguments)
    try:
        own = _compiled(partial(fused_convolution, layer, interpret=interpret), arguments)
        is_same = bool(jnp.array_equal(own(*arguments), other(*arguments)))
    except Exception:  # a compiler raises whatever it meets; the other way is always there
        return False
    return is_same and _seconds(own, arguments) < _seconds(other, arguments)


def _compiled(function: Callable[..., Array], arguments: tuple[Any, ...]) -> Callable[..., Array]:
    return jax.jit(function).lower(*arguments).compile()


def _seconds(run: Callable[..., Array], arguments: tuple[Any, ...]) -> float:
    """The shortest of some rounds."""
    found = []
    for _ in range(_ROUNDS):
        start = perf_counter()
        jax.block_until_ready(run(*arguments))
        found.append(perf_counter() - start)
    return min(found)


def _drawn(layer: Layer) -> tuple[Any, ...]:
    """Bytes over their whole range; shifts as a net of these sizes has them."""
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.integers(-128, 128, shape, np.int8)) for shape in (layer.x, layer.weight))
    spread = max(prod(layer.weight[:-1]) ** 0.5 * 5461, 1.0)  # the standard deviation of the sums
    shift = int(np.ceil(np.log2(spread)))
    numbers = {"post": shift, "pre": 0, "mantissa": 100}
    size = (layer.x[0], *_tiling(layer).size, layer.weight[-1])
    addend = jnp.asarray(rng.integers(-128, 128, size), layer.addend) if layer.addend else None
    constants = {name: jnp.full(layer.weight[-1], numbers.get(name, 1), jnp.int32) for name in layer.constants}
    return x, weight, addend, constants
