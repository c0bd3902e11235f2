"""The rescale over edge accumulators, all pairs of shifts and a sweep of mantissas: more than 10^8 cases."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from conformance.harness import Row

import jquant as jq
from jquant.numerics.rescale import Rescale, rescale
from jquant.reference.arithmetic import rescale as slow_rescale

CASES = ()

TARGETS = {
    "floor, half_up": jq.targets.NASH_E,
    "half_up, half_even": jq.targets.NASH_E.with_fields(
        {"rescale.pre_rounding": "half_up", "rescale.post_rounding": "half_even"}
    ),
    "high precision": jq.targets.NASH_E.with_fields({"rescale.high_precision": True}),
}


def edges() -> np.ndarray:
    """Accumulators around every power of two, both ends of int32, and halves of the int16 range."""
    powers = [sign * 2**k + near for k in range(32) for sign in (1, -1) for near in (-1, 0, 1)]
    return np.unique(np.clip([*powers, 0, 3 * 2**14, -3 * 2**14, 2**31 - 1, -(2**31)], -(2**31), 2**31 - 1))


def mantissas(count: int) -> np.ndarray:
    """From 2^14 to 32767, both ends, with their near ones; evenly in between."""
    ends = [2**14, 2**14 + 1, 32766, 32767]
    return np.unique([*ends, *np.linspace(2**14, 32767, count).astype(np.int64)])


@partial(jax.jit, static_argnames=("dtype", "target"))
def _fast(v: jax.Array, mantissa: jax.Array, pre: jax.Array, post: jax.Array, dtype: str, target: jq.Target):
    return rescale(v, Rescale(mantissa, pre, post), dtype, target)


def sweep(dtype: str, target: jq.Target, count: int) -> tuple[int, int]:
    """(cases, mismatches) over edges x pre-shift x post-shift x mantissa, one mantissa at a time."""
    shifts = np.arange(32)
    v, pre, post = np.meshgrid(edges(), shifts, shifts, indexing="ij")
    on_device = [jnp.asarray(a, jnp.int32) for a in (v, pre, post)]
    cases = wrong = 0
    for mantissa in mantissas(count):
        fast = _fast(on_device[0], jnp.int32(mantissa), *on_device[1:], dtype, target)
        wrong += int((np.asarray(fast) != slow_rescale(v, mantissa, pre, post, dtype, target)).sum())
        cases += v.size
    return cases, wrong


def rescale_exhaustive() -> Iterator[Row]:
    for dtype in ("int8", "int16"):
        for name, target in TARGETS.items():
            yield Row("rescale", f"int32 -> {dtype}", *sweep(dtype, target, 150), name)


EXHAUSTIVE = (rescale_exhaustive,)
