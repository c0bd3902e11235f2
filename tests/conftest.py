"""What every test runs under: one CPU device, strict dtype promotion, one profile for hypothesis."""

import gc
import os
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # read when jax is imported; set it to cuda,cpu to test on a GPU
# The suite runs one process a core: torch and OpenBLAS, which start a thread a core in each and in every process that a
# test starts, would wait for each other: training in torch took 12 times the work. Read when they are imported.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import jax
import pytest
from support.compilations import EVENT

# A silent int8 + float32 -> float32 is the bug that this library exists to prevent.
jax.config.update("jax_numpy_dtype_promotion", "strict")

# An accelerator would multiply float32 with 8 to 11 bits of each factor; the bounds of the tests are those of float32.
if jax.default_backend() != "cpu":
    jax.config.update("jax_default_matmul_precision", "highest")

# The first call of a jitted function compiles, so a deadline would fail at random. CI draws the same examples every
# time; elsewhere they vary, and print_blob tells how to replay a failure.
hypothesis.settings.register_profile("jquant", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True)
hypothesis.settings.load_profile("jquant")


def pytest_collection_finish() -> None:
    """Tracing makes millions of objects that stay: the collector looked through them for a sixth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_go_with_their_module() -> Iterator[None]:
    """Thousands of small programs are compiled here; kept for the whole session they fill gigabytes."""
    yield
    _forget_compiled_programs()


# A compiled program is about 25 ranges of memory, and Linux gives a process 65,530 (vm.max_map_count); XLA ends the
# process where it gets no more. The hundred random graphs of tests/fuzz compile more than 2,500 programs.
MOST_PROGRAMS = 600
_since_then = 0


def _count(event: str, _seconds: float, **_: object) -> None:
    global _since_then
    _since_then += event == EVENT


jax.monitoring.register_event_duration_secs_listener(_count)


def _forget_compiled_programs() -> None:
    global _since_then
    jax.clear_caches()
    _since_then = 0


@pytest.fixture(autouse=True)
def _compiled_programs_stay_below_the_limit_of_the_system() -> Iterator[None]:
    yield
    if _since_then > MOST_PROGRAMS:
        _forget_compiled_programs()
