"""Fake-quantizers: a tensor is put on its integer grid in the forward, and a rule of a paper replaces the backward.

The forward of every quantizer is `quantize(x, scale) * scale` with the scale that lowering will use, so that a
fake-quantized value and the integer of the program are the same number. Quantizers differ in what the trainable
parameter means and in the gradients. Values are float32: the scale in real per LSB, `x / scale` in LSB.

Each is a custom_vjp; `forward_mode` gives its custom_jvp twin. `scale_form="pow2"` of a spec makes any of them the
power-of-two variant: the scale is snapped up in the forward, and straight through in the backward.
"""

from jquant.quantizers.clipping import pact
from jquant.quantizers.learned_rounding import (
    adaround,
    adaround_parameter,
    rectified_sigmoid,
    rounding_regularizer,
)
from jquant.quantizers.learned_step import lsq, lsq_plus
from jquant.quantizers.straight_through import fake_quant, float16_cast
from jquant.types import InputError, Quantizer

__all__ = [
    "Quantizer",
    "adaround",
    "adaround_parameter",
    "fake_quant",
    "float16_cast",
    "forward_mode",
    "lsq",
    "lsq_plus",
    "pact",
    "rectified_sigmoid",
    "rounding_regularizer",
]


def forward_mode(quantizer: Quantizer) -> Quantizer:
    """The twin of a quantizer for `jax.jvp`, `jax.jacfwd` and Hessian-vector products: a custom_jvp.

    Values and derivative are the same, in forward and in reverse; a second derivative is 0, since the straight-through
    rule makes every slope a constant. It saves a mask and the slopes for the backward, where the other saves x.

    Args:
      quantizer: one with a `twin`, or with `both_ways`, which is returned as it is.

    Raises:
      InputError: a quantizer of your own that has neither.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jquant.quantizers import fake_quant, forward_mode
      >>> from jquant.types import QuantSpec
      >>> def f(x):
      ...     return forward_mode(fake_quant)(x, 0.5, QuantSpec(dtype="int4"))
      >>> [v.tolist() for v in jax.jvp(f, (jnp.array([0.6, 9.0]),), (jnp.array([2.0, 2.0]),))]
      [[0.5, 3.5], [2.0, 0.0]]
    """
    if quantizer.both_ways:
        return quantizer
    if quantizer.twin is None:
        raise InputError(
            f"the quantizer {quantizer.name!r} has no forward-mode twin; write its apply with jax.custom_jvp, which "
            "can be differentiated in both directions, and say so: Quantizer(..., both_ways=True)"
        )
    return quantizer.twin
