#!/usr/bin/env bash
# optax 0.2.8 with jax 0.10.2: under jax_numpy_dtype_promotion="strict" the update of adam and adamw raises
# TypePromotionError, since the bias correction raises a Python float to the power of an int32 count. sgd, rmsprop and
# lion update. Seen: "adam refused, adamw refused, sgd ok, rmsprop ok, lion ok".
# What follows: a training loop that runs under strict promotion has to leave it for the update of adam.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check optax==0.2.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
seen=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import optax

jax.config.update("jax_numpy_dtype_promotion", "strict")
params = {"w": jnp.ones(3)}
makers = {"adam": optax.adam, "adamw": optax.adamw, "sgd": optax.sgd, "rmsprop": optax.rmsprop, "lion": optax.lion}
found = []
for name, make in makers.items():
    tx = make(1e-3)
    try:
        tx.update(params, tx.init(params), params)
        found.append(f"{name} ok")
    except Exception as error:
        if type(error).__name__ != "TypePromotionError":
            raise
        found.append(f"{name} refused")
print(", ".join(found))
PY
)
echo "$seen"
[ "$seen" = "adam refused, adamw refused, sgd ok, rmsprop ok, lion ok" ] || { echo changed; exit 1; }
