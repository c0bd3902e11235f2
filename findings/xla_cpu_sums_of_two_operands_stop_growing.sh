#!/usr/bin/env bash
# jax 0.10.2, CPU: jax.lax.reduce of one float32 operand adds up in parts. The same reduction of two operands at once
# adds one entry after the other, so the sum of 2^25 ones stops at 2^24, where float32 has no odd numbers.
# Seen: "2^25 ones: jnp.sum 33554432, reduce of one 33554432, reduce of two 16777216 and 16777216".
# What follows: two sums in one pass (a mean and a variance, errors for several scales) lose accuracy that the same
# sums have apart, and say nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp


def add(a, b):
    return tuple(p + q for p, q in zip(a, b))


x, zero = jnp.ones(2**25, jnp.float32), jnp.float32(0)
whole = int(jax.jit(jnp.sum)(x))
one = int(jax.jit(lambda x: jax.lax.reduce(x, zero, jax.lax.add, (0,)))(x))
two = tuple(int(y) for y in jax.jit(lambda x: jax.lax.reduce((x, x), (zero, zero), add, (0,)))(x))
print("2^25 ones: jnp.sum %d, reduce of one %d, reduce of two %d and %d" % (whole, one, *two))
assert (whole, one, two) == (2**25, 2**25, (2**24, 2**24)), "changed"
PY
