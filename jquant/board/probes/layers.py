"""Questions about what surrounds the rescale: quantization, numbers and biases, fused addends, additions, slopes."""

from collections.abc import Iterator

import numpy as np

from jquant.board.probes.build import Net, Probe
from jquant.board.probes.groups import EXACT_NARROW, NARROW, wide
from jquant.board.probes.rescale import images, spread
from jquant.ops.activation import PRelu
from jquant.ops.conv import Conv
from jquant.ops.elementwise import Add, Clamp, Sub
from jquant.ops.movement import Pad

# Every pair of roundings differs on one of these, of both signs.
BETWEEN = np.array([v + d for v in (-3, -2, -1, 0, 1, 2) for d in (0.25, 0.5, 0.75)])
_POINTWISE = Conv(strides=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1))


def _one(values: np.ndarray) -> np.ndarray:
    """[1, 1, 1, n]."""
    return values.reshape(1, 1, 1, -1)


def quantization() -> Probe:
    """An input between grid points; weights between grid points, whose sums keep all 32 bits."""
    net = Net("quantization", "An input and weights half way between two integers: how real numbers are quantized.")
    net.input("x", _one(BETWEEN), "int8", 0.25, asks=("quantize_rounding",))
    net.input("u", _one(np.arange(-8, 8)), "int8", 0.25)
    net.node("shown", Clamp(minimum=-32.0, maximum=31.75), ("x",), None, ("number_rounding",))
    net.weight("y.weight", BETWEEN.reshape(-1, 1, 1, 1), 0.5)
    net.node("y", _POINTWISE, ("u",), "int32", ("quantize_rounding",), weight="y.weight")
    return net.done()


def numbers() -> Probe:
    """Fills and bounds half way between two integers."""
    net = Net("numbers", "Paddings and bounds half way between two integers: how numbers become integers.")
    net.input("x", _one(np.arange(-8, 8)), "int8", 0.25)
    for i, value in enumerate(BETWEEN):
        side = ((0, 0), (0, 0), (0, 0), (1, 0))
        net.node(f"pad_{i}", Pad(padding=side, value=float(value) * 0.25), ("x",), None, ("number_rounding",))
    net.node("clamp", Clamp(minimum=-0.625, maximum=0.375), ("x",), None, ("number_rounding",))
    return net.done()


def biases() -> Probe:
    net = Net("biases", "A convolution whose biases are half way between two steps of its sum, with 32-bit outputs.")
    net.input("x", _one(np.arange(-4, 4)), "int8", 0.5)
    net.weight("y.weight", np.full((len(BETWEEN), 1, 1, 1), 3), 0.25)
    net.param("y.bias", BETWEEN * 0.125)
    net.node("y", _POINTWISE, ("x",), "int32", ("bias_rounding",), weight="y.weight", bias="y.bias")
    return net.done()


ADDEND = ("addend.multiplier_bits", "addend.max_shift", "addend.rounding", "addend.multiplier_rounding")


def _addends(name: str, says: str, ratios: list[float]) -> Probe:
    """A convolution with an addend, whose output channels each see it at another ratio of scales."""
    net = Net(name, says)
    values = images(spread(11, 128, -32768, 32767))
    net.input("x", images(np.arange(-64, 64)), "int8", 1.0)
    net.input("e", np.tile(values, (1, len(ratios), 1, 1)), "int16", 2.0**-4)
    net.weight("conv.weight", np.ones((len(ratios), 1, 1, 1)), [2.0**-4 / ratio for ratio in ratios])
    net.node("conv", _POINTWISE, ("x",), "int32", weight="conv.weight")
    net.node("y", Add(), ("conv", "e"), "int32", ADDEND)
    return net.done()


def addends() -> Iterator[Probe]:
    says = "A convolution and an addition behind it, with 32-bit outputs: the addend at ratios of scales that are "
    yield _addends("addend_shifts", says + "powers of two.", [2.0**-k for k in (-2, -1, *range(0, 18, 2))])
    ratios = [(2**14 + 5 + 2 * i + 0.5) / 2**15 for i in range(3)] + [1 / 3, 0.7, 3.1, 0.0123, 2.0**-9 * 1.37]
    ratios += [(2 ** (b - 1) + 3 + i + 0.5) / 2**b for b in range(4, 15, 2) for i in (0, 1)]
    yield _addends("addend_multipliers", says + "others.", ratios)
    for k in (5, 7, 9, 11, 13):
        yield _addends(f"addend_large_{k}", says + f"2^{k}, which not every march can hold.", [2.0**k])


def additions(dtype: str) -> Iterator[Probe]:
    """The smaller operand is multiplied by a rounded ratio: seen where the result is in fine steps."""
    most, low = (127, -128) if dtype == "int8" else (32767, -32768)
    rng = np.random.default_rng(12)
    a, b = rng.integers(low, most + 1, size=(2, 128))
    a[:80], b[:24] = 0, [low, most, *range(-11, 11)]
    own = (f"addition.max_shift_{dtype}", "addition.multiplier_bits", "addition.multiplier_rounding")
    exact_asks = (*own, *EXACT_NARROW, *wide("int16"))
    other_asks = (*own, *NARROW, "rescale.ratio_bits", *wide("int16"))
    exact = {f"exact_{k}": 2.0**-k for k in (0, 1, 3, 6, 9, 12, 15, 18, 21)}
    others = {f"other_{i}": r for i, r in enumerate((0.9, 1 / 3, 0.0712, 0.01234, 0.7071, 0.00271, 0.5005, 0.62503))}
    for kind, ratios in (("shifts", exact), ("multipliers", others)):
        net = Net(f"addition_{kind}_{dtype}", f"Sums and differences of {dtype} operands of two scales: the {kind}.")
        for label, ratio in ratios.items():
            net.input(f"a_{label}", images(a), dtype, 4.0)
            net.input(f"b_{label}", images(b), dtype, 4.0 * ratio)
            op = Sub() if label.endswith("1") else Add()
            step = max(4.0 * ratio * most / 32767, 2.0**-22)
            step = 2.0 ** np.ceil(np.log2(step)) if kind == "shifts" else step
            plain = kind == "shifts" and ratio >= 2.0**-6  # ratios are powers of two, and none is clamped
            step, asks = (max(step, 2.0**-4), exact_asks) if plain else (step, other_asks)
            net.node(label, op, (f"a_{label}", f"b_{label}"), ("int16", float(step)), asks)
        yield net.done()


def slopes() -> Probe:
    """One channel a slope: the integers of a slope and their scale follow from its dtype."""
    net = Net("slopes", "A PReLU whose slopes need more than 8 bits.")
    net.input("x", np.tile(images(np.arange(-128, 128)), (1, 4, 1, 1)), "int8", 0.5)
    net.param("y.weight", [1.0, 0.3, 0.0117, -0.7071])
    asks = ("slope_dtype", "quantize_rounding", *NARROW, *wide("int16"), "rescale.ratio_bits")
    net.node("y", PRelu(), ("x",), ("int16", 2.0**-9), asks, weight="y.weight")
    return net.done()


def layer_probes() -> Iterator[Probe]:
    yield quantization()
    yield numbers()
    yield biases()
    yield from addends()
    for dtype in ("int8", "int16"):
        yield from additions(dtype)
    yield slopes()
