#!/usr/bin/env bash
# jax 0.10.2, CPU: x / 127.5 of float32 is x * (1 / 127.5), the reciprocal rounded first, in jit and outside of it, also
# where the one divisor of an array is an argument. It is the quotient, correctly rounded, where the divisor follows from
# x. Seen: "outside 74.3 %, constant 74.3 %, argument 74.3 %, from x 0.0 %" of all x differ from it in the last bit.
# What follows: a scale of max(|w|) / 127.5 puts the largest weight on a tie, half a step beyond the last integer. This
# bit decides how it is rounded, so that a jitted quantizer has other integers than numpy or torch.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

x = np.random.default_rng(0).uniform(0.5, 2, 1_000_000).astype(np.float32)
exact = x / np.float32(127.5)
found = (
    jnp.asarray(x) / 127.5,
    jax.jit(lambda v: v / 127.5)(x),
    jax.jit(lambda v, d: v / d)(x, np.float32(127.5)),
    jax.jit(lambda v: v / jnp.where(jnp.isnan(v), v, 127.5))(x),
)
assert np.array_equal(found[1], x * (np.float32(1) / np.float32(127.5)))
shares = [100 * float(np.mean(np.asarray(y) != exact)) for y in found]
print("outside %.1f %%, constant %.1f %%, argument %.1f %%, from x %.1f %%" % tuple(shares))
assert min(shares[:3]) > 50 and shares[3] == 0, "changed"
PY
