#!/usr/bin/env bash
# jax 0.10.2, on a machine with a CPU alone: a Pallas kernel lowered for "tpu", as jax.export lowers everything else.
# 1. With blocks of two axes it lowers. With one more operand of one axis, such as a bias, it raises "ValueError:
#    Unsupported TPU device kind: cpu", since the check of such blocks asks the default device for its kind. Under
#    jax.sharding.use_abstract_mesh of a mesh with an AbstractDevice of a TPU the same kernel lowers.
# 2. A kernel that is called with concrete arrays inside jax.ensure_compile_time_eval() raises "NotImplementedError:
#    Evaluation rule for 'program_id' not implemented", in interpret mode too. Outside it runs.
# Seen: "two axes lowers, a bias ValueError, abstract device lowers; compile-time eval NotImplementedError".
# What follows: a test on a CPU that a kernel lowers needs an abstract device; and a kernel cannot be tried out in that
# context while a trace is under way. A thread of its own, which has no trace, is a way.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat > "$folder/run.py" <<'PY'
from contextlib import nullcontext

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

SHAPE = jax.ShapeDtypeStruct((256, 128), jnp.float32)
a, bias = jnp.ones((256, 128)), jnp.ones((128,))
rows, line = pl.BlockSpec((64, 128), lambda i: (i, 0)), pl.BlockSpec((128,), lambda i: (0,))


def doubled(a, out):
    out[...] = a[...] + a[...]


def added(a, bias, out):
    out[...] = a[...] + bias[...]


def indexed(a, out):
    out[...] = a[...] + pl.program_id(0)


def lowers(kernel, specs, operands, context=None):
    call = pl.pallas_call(kernel, out_shape=SHAPE, grid=(4,), in_specs=specs, out_specs=rows)
    try:
        with context or nullcontext():
            jax.jit(call).trace(*operands).lower(lowering_platforms=("tpu",))
        return "lowers"
    except ValueError as error:
        assert "Unsupported TPU device kind: cpu" in str(error), error
        return "ValueError"


device = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
found = (
    lowers(doubled, [rows], (a,)),
    lowers(added, [rows, line], (a, bias)),
    lowers(added, [rows, line], (a, bias), jax.sharding.use_abstract_mesh(mesh)),
)
add = pl.pallas_call(indexed, out_shape=jax.ShapeDtypeStruct((8,), jnp.int32), grid=(1,), interpret=True)
assert add(jnp.arange(8))[7] == 7
try:
    with jax.ensure_compile_time_eval():
        add(jnp.arange(8))
    evaluated = "runs"
except NotImplementedError as error:
    assert "program_id" in str(error), error
    evaluated = "NotImplementedError"
print("two axes %s, a bias %s, abstract device %s; compile-time eval %s" % (*found, evaluated))
assert (*found, evaluated) == ("lowers", "ValueError", "lowers", "NotImplementedError"), "changed"
PY
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/run.py"
