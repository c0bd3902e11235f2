"""Before training: signs that the float model overfits."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.analysis.findings import Finding
from jquant.meanings.apply import apply_with_taps
from jquant.types import Array, Model


def overfitting_signs(
    model: Model, *inputs: Array, noise: float = 0.02, amplification: float = 10.0, peak: float = 100.0
) -> list[Finding]:
    """Signs that the float model overfits, which makes it hostile to quantization.

    The three that the guides name: the output changes much under a slight change of the input (noise of a share of its
    standard deviation, a shift of one pixel, brightness), parameters are large, activations are large.

    Args:
      model, *inputs: as for `jq.apply`; the model needs no scales.
      noise: standard deviation of the noise, and change of brightness, as a share of the input's.
      amplification: relative change of an output over relative change of the input that is remarked on.
      peak: largest absolute weight or activation that is not.

    Returns:
      Findings. Weight decay, normalization or a clamp in the float training help; quantization cannot.
    """
    plan, found = model.plan, []
    base, values = apply_with_taps(model, *inputs, mode="float", taps="*")
    for name, changed in _disturbed(inputs, noise).items():
        moved = apply_with_taps(model, *changed, mode="float", taps=None)[0]
        ratio = _relative(base, moved) / max(_relative(inputs, changed), 1e-12)
        if ratio > amplification:
            message = f"{name} of the input changes the output {ratio:.3g} times as much, relatively"
            found.append(_overfit("", message, {"amplification": ratio}))
    for key in plan.weights:
        largest = float(jnp.max(jnp.abs(model.params[key])))
        if largest > peak:
            found.append(_overfit(key, f"weights up to {largest:.3g}", {"largest": largest}))
    for name, value in values.items():
        if name not in plan.exact and (largest := float(jnp.max(jnp.abs(value)))) > peak:
            found.append(_overfit(name, f"activations up to {largest:.3g}", {"largest": largest}))
    return found


def _disturbed(inputs: Sequence[Array], noise: float) -> dict[str, tuple[Array, ...]]:
    key = jax.random.key(0)

    def each(change: Any) -> tuple[Array, ...]:
        return tuple(change(x) if x.dtype == jnp.float32 else x for x in inputs)

    found = {
        "noise": each(lambda x: x + noise * jnp.std(x) * jax.random.normal(key, x.shape)),
        "brightness": each(lambda x: x * (1 + jnp.float32(noise))),
    }
    if all(x.ndim >= 3 for x in inputs):
        found["a shift by one pixel"] = each(lambda x: jnp.roll(x, 1, axis=-1))
    return found


def _relative(a: Any, b: Any) -> float:
    pairs = [
        (np.asarray(x, np.float64), np.asarray(y, np.float64))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]
    size = sum(float((x**2).sum()) for x, _ in pairs)
    return float(np.sqrt(sum(float(((x - y) ** 2).sum()) for x, y in pairs) / max(size, 1e-30)))


def _overfit(where: str, message: str, numbers: Mapping[str, float]) -> Finding:
    fix = "weight decay, normalization or a clamp in the float training; quantization cannot mend it"
    return Finding(level="warning", check="overfitting", where=where, message=message, fix=fix, numbers=numbers)
