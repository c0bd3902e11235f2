#!/usr/bin/env bash
# jax 0.10.2: the bytes of jax.export depend on the line that calls it. The same function, exported on two lines of one
# file, gives two files, since locations hold the frames of the caller, with the absolute paths of its sources. Seen:
# "two lines: the same bytes False, names of sources True; limit 0: the same bytes True, names of sources False".
# What follows: a digest of an exported model changes with the script that wrote it, and a file that is given away names
# folders of the machine that made it. The setting jax_traceback_in_locations_limit = 0 takes both away.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 flatbuffers==25.12.19
cat > "$folder/exporting.py" <<'PY'
import jax
import jax.export
import jax.numpy as jnp


def f(x):
    return jnp.tanh(x) * 2


def export():
    return bytes(jax.export.export(jax.jit(lambda x: f(x)))(jax.ShapeDtypeStruct((3,), jnp.float32)).serialize())


def elsewhere():
    return export()


def both():
    first = export()
    second = elsewhere()
    return f"the same bytes {first == second}, names of sources {b'exporting.py' in first}"


found = f"two lines: {both()}"
jax.config.update("jax_traceback_in_locations_limit", 0)
found += f"; limit 0: {both()}"
print(found)
expected = (
    "two lines: the same bytes False, names of sources True; limit 0: the same bytes True, names of sources False"
)
assert found == expected, "changed"
PY
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/exporting.py"
