"""Questions about section 3, the rescale: the row of a ratio first, then what a wide accumulator adds to it."""

from collections.abc import Iterator

import numpy as np

from jquant.board.probes.build import Net, Probe
from jquant.board.probes.groups import EXACT_NARROW, NARROW, small, wide
from jquant.ops.conv import Conv
from jquant.ops.elementwise import Mul
from jquant.ops.movement import Cat
from jquant.ops.pool import AvgPool

_OUTPUT = 2.0**-4  # real per LSB of what operands are joined to
_SUM = 2.0**6  # of a convolution: its weights have scales from 2^-20 on


def spread(seed: int, count: int, low: int, high: int) -> np.ndarray:
    """Integers over a range: its ends, those around 0, powers of two with their neighbours, and random ones."""
    powers = [s * 2**k + d for k in range(16) for s in (1, -1) for d in (-1, 0, 1)]
    fixed = [v for v in dict.fromkeys((low, high, low + 1, high - 1, *range(-4, 5), *powers)) if low <= v <= high]
    rng = np.random.default_rng(seed)
    drawn = rng.integers(low, high + 1, size=max(count - len(fixed), 0))
    return np.concatenate([np.array(fixed[:count]), drawn])


def images(integers: np.ndarray) -> np.ndarray:
    """[1, 1, 8, n / 8]."""
    return integers.reshape(1, 1, 8, -1)


def _joined(name: str, says: str, ratios: list[float], dtype: str, values: np.ndarray, asks: tuple[str, ...]) -> Probe:
    """Operands with a scale each, joined to int16 at one scale: every operand has a row of its own."""
    net = Net(name, says)
    inputs = [net.input(f"x{i}", images(values), dtype, _OUTPUT * ratio) for i, ratio in enumerate(ratios)]
    net.node("y", Cat(axis=1), tuple(inputs), ("int16", _OUTPUT), asks)
    return net.done()


def powers_of_two() -> Probe:
    says = "Operands of a concatenation at scales that are powers of two: the shift of a row and its rounding."
    return _joined(
        "shifts", says, [2.0**-k for k in (1, 2, 8, 17)], "int16", spread(1, 192, -32768, 32767), EXACT_NARROW
    )


def mantissas() -> Probe:
    """For each width, a ratio half way between two mantissas, an even and an odd one; and others between."""
    ties = [(2 ** (bits - 1) + 5 + odd + 0.5) / 2**bits for bits in range(4, 16) for odd in (0, 1)]
    others = [0.5 + 1 / 3 * 0.5, 0.70710678, 0.9, 1 - 2.0**-20, 0.6180339, 0.55555]
    says = "Operands of a concatenation at scales that are no powers of two: the mantissa of a row."
    return _joined("mantissas", says, [*ties, *others], "int16", spread(2, 128, -32768, 32767), NARROW)


def large_ratios() -> Probe:
    says = "Operands of a concatenation at scales far above that of the result: where a ratio is clamped."
    ratios = [200.0, 300.0, 600.0, 1200.0, 2400.0, 4800.0, 9600.0, 19200.0]
    return _joined("large_ratios", says, ratios, "int8", spread(3, 64, -128, 127), (*NARROW, "rescale.ratio_bits"))


def _channels(
    name: str, says: str, x: np.ndarray, weight: np.ndarray, dtype: str, ratios: list[float], asks: tuple[str, ...]
) -> Probe:
    """A 1x1 convolution whose output channels all have the weight [C], each at a scale of its own."""
    net = Net(name, says)
    net.input("x", x, "int16", 1.0)
    net.weight("y.weight", np.tile(weight[:, None, None], (len(ratios), 1, 1, 1)), [_SUM * r for r in ratios])
    op = Conv(strides=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1))
    net.node("y", op, ("x",), (dtype, _SUM), asks, weight="y.weight")
    return net.done()


def small_sums(dtype: str) -> Probe:
    """Of 16 bits, so that the inner saturation has nothing to cut: the pre-shift."""
    x = images(spread(4, 160, -32768, 32767))
    says = f"A convolution of one channel by a weight of 1, to {dtype}, whose output channels have scales 2^-k."
    asks = (*EXACT_NARROW, *small(dtype))
    return _channels(
        f"small_sums_{dtype}", says, x, np.ones(1), dtype, [2.0**-k for k in (-6, -4, -2, *range(16))], asks
    )


def wide_sums(dtype: str) -> Probe:
    """Of all magnitudes up to 2^28, many next to a tie: the inner saturation, and pre-shifts that begin late."""
    says = f"A convolution of 65 channels with sums up to 2^28, to {dtype}, whose output channels have scales 2^-k."
    asks = (*EXACT_NARROW, *wide(dtype))
    ratios = [2.0**-k for k in range(0, 27, 2 if dtype == "int8" else 1)]
    x, weight = _summing(_near_ties())
    return _channels(f"wide_sums_{dtype}", says, x, weight, dtype, ratios, asks)


def generic_sums(dtype: str) -> Probe:
    """Ratios with a mantissa: everything about a row together."""
    ratios = [0.3, 0.0123, 7.7e-4, 3.3e-5, 1.1e-6, 9.1e-8]
    says = f"A convolution of 65 channels with sums up to 2^28, to {dtype}, whose output channels have any scales."
    x, weight = _summing(_near_ties()[::3])
    asks = ("quantize_rounding", *NARROW, *wide(dtype))  # the weights are not on their grids exactly
    return _channels(f"sums_{dtype}", says, x, weight, dtype, ratios, asks)


def _near_ties() -> np.ndarray:
    """Sums half way between two multiples of 2^k and one beside it, for every k, and sums of all magnitudes."""
    ties = [
        s * (2 * j + 1) * 2 ** (k - 1) + d for k in range(1, 27) for s in (1, -1) for j in (0, 1) for d in (-1, 0, 1)
    ]
    rng = np.random.default_rng(5)
    drawn = rng.choice([-1, 1], size=68) * 2.0 ** rng.uniform(0, 28, size=68)
    return np.array([v for v in ties if abs(v) < 2**28] + [-(2**28), 2**28 - 1, *drawn.astype(int)])


def _summing(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int16 operands [1, 65, 4, n / 4] and the weight [65] that make these sums."""
    sums = sums[: len(sums) // 4 * 4]
    each, rest = np.divmod(sums, 127 * 64)
    x = np.concatenate([np.tile(each, (64, 1)), rest[None]])
    return x.reshape(1, 65, 4, -1), np.array([127] * 64 + [1])


def products(dtype: str) -> Probe:
    """The same unit behind another operator."""
    rng = np.random.default_rng(8)
    net = Net(f"products_{dtype}", f"Products of two operands, to {dtype}.")
    for name in ("a", "b"):
        net.input(name, images(rng.integers(-32768, 32768, size=512) >> rng.integers(0, 15, size=512)), "int16", 0.125)
    for label, ratio in (("wide", 3.3e-5), ("narrow", 0.0123)):
        net.node(label, Mul(), ("a", "b"), (dtype, 2.0**-6 / ratio), (*NARROW, *wide(dtype)))
    return net.done()


def averages(dtype: str) -> Probe:
    """Sums of windows, which have a rounding of the pre-shift of their own."""
    rng = np.random.default_rng(7)
    net = Net(f"averages_{dtype}", f"Averages of windows to {dtype}: the pre-shift of a sum.")
    net.input("x", rng.integers(-32768, 32768, size=(1, 2, 24, 32)), "int16", 2.0**-10)
    asks = (*EXACT_NARROW, *wide(dtype, average=True))
    for side, scale in ((4, 2.0**-10), (4, 2.0**-3), (8, 2.0**-6), (16, 2.0**-2)):
        op = AvgPool(kernel=(side, side), strides=(side // 2, side // 2), padding=((0, 0), (0, 0)))
        net.node(f"mean_{side}_{round(-np.log2(scale))}", op, ("x",), (dtype, scale), asks)
    return net.done()


def rescale_probes() -> Iterator[Probe]:
    yield powers_of_two()
    yield mantissas()
    yield large_ratios()
    for dtype in ("int8", "int16"):
        yield small_sums(dtype)
        yield wide_sums(dtype)
        yield generic_sums(dtype)
        yield products(dtype)
        yield averages(dtype)
