"""Observers of a range: min_max and moving_average."""

from functools import cache, partial
from typing import NamedTuple, cast

import jax.numpy as jnp
import numpy as np

from jquant.observers.base import RangeState, empty_range, flush, limit_of, merge_range, range_of, scale_for
from jquant.types import Array, Observer, QConfigError, QuantSpec


def _min_max_update(state: RangeState, x: Array) -> RangeState:
    return merge_range(state, range_of(x))


@cache
def min_max() -> Observer:
    """The scale at which nothing saturates by more than half an LSB: max(-min, max, 0) / ((qmax - qmin) / 2).

    Returns:
      An observer whose state is a `RangeState`; the order of batches does not matter.

    References:
      Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference.

    Example:
      >>> import jax.numpy as jnp
      >>> from jquant.observers import min_max
      >>> from jquant.types import QuantSpec
      >>> observer = min_max()
      >>> state = observer.update(observer.init(2), jnp.array([[-1.0, 51.0], [0.0, 0.0]]))
      >>> scale = observer.finalize(state, QuantSpec(dtype="int8"))
      >>> [round(s, 6) for s in scale.tolist()]
      [0.4, 0.0]
    """

    def finalize(state: RangeState, spec: QuantSpec) -> Array:
        return scale_for(limit_of(state, spec), spec)

    return Observer(empty_range, _min_max_update, merge_range, finalize, name="min_max")


class MovingAverageState(NamedTuple):
    """Averaged range, real, [channels], and the number of batches so far, int32 scalar."""

    range: RangeState
    batches: Array


def moving_average(averaging_constant: float = 0.01) -> Observer:
    """The exponential moving average of each batch's minimum and maximum; the first batch is taken as it is.

    Args:
      averaging_constant: c of `new = (1 - c) * old + c * current`, in [0, 1]. With 1 the last batch counts alone, with
        0 the first one: the range is frozen from then on. 0.01 suits a hundred batches or more, 0.5 two of them.

    Returns:
      An observer whose state is a `MovingAverageState`; `merge` is None, since later batches weigh more.

    References:
      Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
      section 3.1.

    Example:
      >>> import jax.numpy as jnp
      >>> from jquant.observers import moving_average
      >>> observer = moving_average(0.5)
      >>> state = observer.update(observer.init(1), jnp.array([[-2.0, 4.0]]))
      >>> state = observer.update(state, jnp.array([[0.0, 8.0]]))
      >>> state.range.low.tolist(), state.range.high.tolist()
      ([-1.0], [6.0])
    """
    if not 0 <= averaging_constant <= 1:
        raise QConfigError(f"averaging_constant must be in [0, 1], not {averaging_constant!r}")
    return _moving_average(float(averaging_constant))


@cache
def _moving_average(constant: float) -> Observer:
    def init(channels: int) -> MovingAverageState:
        return MovingAverageState(empty_range(channels), cast(Array, np.zeros((), np.int32)))

    def average(first: Array, old: Array, new: Array) -> Array:
        old = jnp.where(first, new, old)  # not inf: inf * 0 is NaN where c is 1
        mixed = flush(old * (1.0 - constant)) + flush(new * constant)
        return jnp.where(first, new, mixed)

    def update(state: MovingAverageState, x: Array) -> MovingAverageState:
        mix = partial(average, state.batches == 0)
        return MovingAverageState(RangeState(*map(mix, state.range, range_of(x))), state.batches + 1)

    def finalize(state: MovingAverageState, spec: QuantSpec) -> Array:
        return scale_for(limit_of(state.range, spec), spec)

    options = (("averaging_constant", constant),)
    return Observer(init, update, None, finalize, name="moving_average", options=options)
