#!/usr/bin/env bash
# jax 0.10.2, CPU with FMA: jit(a * b + c) rounds once (a fused multiply-add), the same code run eagerly rounds twice.
# Neither lax.optimization_barrier nor lax.reduce_precision(x, 8, 23) around the product keeps the two apart; a division
# by a 1 that is data does. With XLA_FLAGS=--xla_cpu_max_isa=AVX, which has no FMA, all of them round twice.
# Seen: "rounded once: jit True, barrier True, reduce_precision True, division False, eager False", and all False without FMA.
# What follows: equal bits of one sum in two programs need more than a barrier in front of the addition.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
grep -qw fma /proc/cpuinfo || { echo "this CPU has no FMA: nothing to see"; exit 0; }
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat > "$folder/look.py" <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

rng = np.random.default_rng(0)
a, b, c = (rng.normal(size=10_000).astype(np.float32) for _ in range(3))
once = (a.astype(np.float64) * b + c).astype(np.float32)
twice = (a * b) + c
assert (once != twice).any()
forms = {
    "jit": jax.jit(lambda a, b, c: a * b + c),
    "barrier": jax.jit(lambda a, b, c: jax.lax.optimization_barrier(a * b) + c),
    "reduce_precision": jax.jit(lambda a, b, c: jax.lax.reduce_precision(a * b, 8, 23) + c),
    "division": jax.jit(lambda a, b, c: (a * b) / jnp.where(jnp.isnan(a), a, 1.0) + c),
    "eager": lambda a, b, c: jnp.asarray(a) * jnp.asarray(b) + jnp.asarray(c),
}
found = {}
for name, form in forms.items():
    y = np.asarray(form(a, b, c))
    assert (y == once).all() or (y == twice).all(), name
    found[name] = bool((y == once).all())
print(", ".join(f"{name} {value}" for name, value in found.items()))
PY
seen=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/look.py")
without=$(XLA_FLAGS=--xla_cpu_max_isa=AVX JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/look.py")
echo "rounded once: $seen; without FMA: $without"
[ "$seen" = "jit True, barrier True, reduce_precision True, division False, eager False" ] || { echo changed; exit 1; }
[[ "$without" != *True* ]] || { echo changed; exit 1; }
