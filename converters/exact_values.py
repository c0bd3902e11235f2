"""Exact values: masks, indices and pixels, which are never quantized."""


def exact_divisor(divisor: int) -> tuple[int, int]:
    """How a multiple of a divisor is divided in int32: a shift to the right by `bits`, then a product by an inverse.

    The inverse is that of the odd part of the divisor modulo 2^32, as an int32.
    """
    bits = (divisor & -divisor).bit_length() - 1
    return bits, (pow(divisor >> bits, -1, 2**32) + 2**31) % 2**32 - 2**31
