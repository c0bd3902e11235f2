#!/usr/bin/env bash
# jax 0.10.2: jax.make_mesh makes meshes with explicit axes by default. table[x], for an x that is divided over such a
# mesh and a table on one device, raises "ValueError: Resource axis: data of P('data', None) is not found in mesh: ()",
# with jax.set_mesh around it as without. jnp.where, jnp.sort and arithmetic of the same x run. With
# axis_types=(AxisType.Auto,), and on jax.sharding.Mesh, the lookup runs.
# Seen: "explicit ValueError, set ValueError, auto (8, 8)".
# What follows: a lookup table or an embedding, divided over devices as the page of make_mesh shows, fails.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 "$folder/venv/bin/python" - <<'PY'
from contextlib import nullcontext

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

explicit = jax.make_mesh((8,), ("data",))
automatic = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
assert explicit.axis_types == (AxisType.Explicit,), "changed"
table = jnp.arange(256, dtype=jnp.int8)


def lookup(mesh, context):
    x = jax.device_put(jnp.arange(64).reshape(8, 8), NamedSharding(mesh, PartitionSpec("data")))
    try:
        with context:
            return str(table[x].shape)
    except ValueError as error:
        assert "not found in mesh: ()" in str(error), error
        return "ValueError"


found = lookup(explicit, nullcontext()), lookup(explicit, jax.set_mesh(explicit)), lookup(automatic, nullcontext())
print("explicit %s, set %s, auto %s" % found)
assert found == ("ValueError", "ValueError", "(8, 8)"), "changed"
PY
