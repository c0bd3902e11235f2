"""Constants of tables have the same bytes at every optimization level of XLA, outside and inside jit."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant import ops
from jquant.ops.lookup import has_float64, table_constants

ROOT = Path(__file__).parents[2]
SCALES = ((3e-4, 2e-4), (2.0**-20, 1.0), (40.0, 1e-3))  # usual, and far from it at both ends
GOLDEN = "a2dd9d1035675941c14666ab876fc0af"  # in the order of `TABLE_FUNCTIONS`

FORM = jq.targets.NASH_E.tables


def functions() -> list[jq.ops.Op]:
    """Every table function with its defaults; those without a default exponent get one."""
    return [cls(exponent=1.5) if cls is ops.Pow else cls() for cls in ops.TABLE_FUNCTIONS]


def constants(scales: list[tuple[jax.Array, jax.Array]]) -> list[dict]:
    """Of all functions, scales and dtypes."""
    return [
        table_constants(op, x_scale, dtype, y_scale, dtype, FORM)
        for op in functions()
        for x_scale, y_scale in scales
        for dtype in ("int8", "int16")
    ]


def digest(inside_jit: bool) -> str:
    scales = [(np.float32(x), np.float32(y)) for x, y in SCALES]
    found = hashlib.blake2b(digest_size=16)
    for made in (jax.jit(constants) if inside_jit else constants)(scales):
        for role in sorted(made):
            found.update(np.ascontiguousarray(made[role]).tobytes())
    return found.hexdigest()


def test_every_function_has_a_float64_form() -> None:
    assert all(has_float64(op) for op in functions())


def test_the_bytes_are_those_of_the_record() -> None:
    """A change of this record changes what programs compute: say so in CHANGELOG.md."""
    assert digest(inside_jit=False) == GOLDEN


@pytest.mark.parametrize("level", [0, 3])
def test_inside_jit_at_each_optimization_level(level: int) -> None:
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_backend_optimization_level={level}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    code = "import test_table_bytes as t; print(t.digest(inside_jit=True))"
    made = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert made.split()[-1] == GOLDEN


def test_a_function_without_a_float64_form_is_evaluated_by_its_float_rule() -> None:
    from jquant.graph.operator import eval_float
    from jquant.ops.lookup import TableOptions, as_table

    class Halved(jq.ops.Op):
        table = TableOptions()

    as_table(Halved)
    eval_float.register(Halved)(lambda op, x: 0.5 * x)
    made = table_constants(Halved(), np.float32(0.5), "int8", np.float32(0.25), "int8", FORM)
    assert np.asarray(made["table"]).tolist() == list(range(-128, 128))  # 0.5 * (0.5 * i) / 0.25
    inside = jax.jit(lambda s: table_constants(Halved(), s, "int8", jnp.float32(0.25), "int8", FORM))(0.5)
    np.testing.assert_array_equal(inside["table"], made["table"])
