#!/usr/bin/env bash
# jax 0.10.2, CPU: jnp.asarray(numpy array) compiles an XLA program ("stage") for every new shape, about 10 ms each.
# jax.device_put of the same array compiles nothing. Seen: "asarray 5 of 5, device_put 0 of 5".
# What follows: code that moves hundreds of weights of different shapes to a device waits seconds in jnp.asarray.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

programs = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: programs.append(event) if event == "/jax/core/compile/backend_compile_duration" else None
)


def compiled_by(convert, first):
    before = len(programs)
    for size in range(first, first + 5):
        convert(np.ones((size, 3), np.float32)).block_until_ready()
    return len(programs) - before


found = compiled_by(jnp.asarray, 10), compiled_by(jax.device_put, 20)
print("asarray %d of 5, device_put %d of 5" % found)
assert found == (5, 0), "changed"
PY
