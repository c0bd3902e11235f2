"""Quantizers for tests: all of them, inputs that meet every case of a grid, parameters away from special values."""

import jax
import jax.numpy as jnp
import numpy as np

from jquant.quantizers import adaround, adaround_parameter, fake_quant, float16_cast, lsq, lsq_plus, pact
from jquant.types import integer_range

ALL = [fake_quant, lsq, pact]
EVERY = [*ALL, lsq_plus, adaround, float16_cast]


def draw(dtype, shape, scale, seed=0):
    """Values inside, outside and exactly on ties, edges and grid points of the grid of `scale`."""
    rng = np.random.default_rng(seed)
    low, high = integer_range(dtype)
    spread = rng.uniform(1.5 * low - 3, 1.5 * high + 3, shape)
    half_steps = np.round(2 * spread) / 2
    values = np.where(rng.random(shape) < 0.5, spread, half_steps)
    return (values * np.asarray(scale, np.float64)).astype(np.float32)


def bits(x):
    return np.asarray(x, np.float32).view(np.int32)


def gradients(quantizer, x, parameter, spec, upstream):
    def loss(x, parameter):
        return jnp.sum(quantizer(x, parameter, spec) * upstream)

    return jax.grad(loss, argnums=(0, 1))(jnp.asarray(x), jnp.asarray(parameter, jnp.float32))


def parameter_for(quantizer, x, scale, spec):
    """The trainable leaf of any quantizer, away from special values: an offset, logits on both sides."""
    scale = jnp.asarray(scale, jnp.float32)
    if quantizer is adaround:
        return adaround_parameter(x, scale, spec) + jnp.asarray([[0.0], [0.3]]).reshape(2, *(1,) * jnp.ndim(x))
    parameter = quantizer.init(scale, spec)
    return parameter.at[1].set(0.4 * scale) if quantizer is lsq_plus else parameter
