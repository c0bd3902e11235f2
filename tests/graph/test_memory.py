"""A batch that memory cannot hold is refused before it runs, with the node, the bytes and a batch that fits."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.graph import memory

SIZE = (64, 64)
CHANNELS = 32
# By hand: a 3 x 3 convolution of [N, 3, 64, 64] to [N, 32, 64, 64] in float32.
OPERAND, RESULT = 3 * 64 * 64 * 4, CHANNELS * 64 * 64 * 4


def network(params, x):
    y = jax.lax.conv_general_dilated(x, params["w"], (1, 1), "SAME")
    return jax.nn.relu(y)[:, :, ::16, ::16].mean((2, 3)) @ params["head"]


@pytest.fixture(scope="module")
def prepared():
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.normal(size=(CHANNELS, 3, 3, 3)), jnp.float32),
        "head": jnp.asarray(rng.normal(size=(CHANNELS, 4)), jnp.float32),
    }
    x = jnp.asarray(rng.normal(size=(8, 3, *SIZE)), jnp.float32)
    qconfig = jq.QConfig(jq.templates.int8_default(observer=jq.observers.min_max()))
    graph, params = jq.trace(network, params, x)
    return jq.prepare(graph, params, qconfig, target="nash-e"), x


@pytest.fixture(scope="module")
def calibrated(prepared):
    return jq.calibrate(prepared[0], [prepared[1]])


@pytest.fixture
def machine(monkeypatch):
    """A machine with a given number of free bytes, on which nothing is too small for a look."""

    def give(free):
        monkeypatch.setattr(memory, "free_memory", lambda: free)
        monkeypatch.setattr(memory, "_SMALL", 0)

    return give


def test_the_need_is_that_of_the_largest_contraction(prepared):
    model, _ = prepared
    need = memory.largest_need(model.plan.graph, memory.value_types(model.plan.graph, model.params, 8), 8)
    assert (need.value, need.together) == (8 * RESULT, 8 * (OPERAND + RESULT))
    assert (need.shape, need.dtype, type(need.node.op).__name__) == ((8, *SIZE, CHANNELS), "float32", "Conv")


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 bytes"), (999, "999 bytes"), (2048, "2.05 kB"), (3221225472, "3.2 GB")]
)
def test_bytes_are_written_in_the_largest_unit(count, shown):
    assert memory.in_bytes(count) == shown


def test_calibration_names_the_value_its_bytes_and_a_batch_that_fits(prepared, machine):
    model, x = prepared
    machine(3 * (OPERAND + RESULT) + 1)
    words = r"node '\w+' \(Conv\) makes float32 \[8, 64, 64, 32\], 4.19 MB, and with its operands needs 4.59 MB"
    with pytest.raises(jq.InputError, match=words) as error:
        jq.calibrate(model, [x])
    assert "at a batch of 8; 1.72 MB of memory are free" in str(error.value)
    assert "microbatch=3" in str(error.value)
    assert jq.calibrate(model, [x], microbatch=3).qparams


def test_calibration_that_fits_exactly_is_not_refused(prepared, machine):
    model, x = prepared
    machine(8 * (OPERAND + RESULT))
    assert jq.calibrate(model, [x]).qparams


def test_one_sample_that_does_not_fit_has_no_smaller_batch(prepared, machine):
    model, x = prepared
    machine(OPERAND + RESULT - 1)
    with pytest.raises(jq.InputError, match="One sample does not fit"):
        jq.calibrate(model, [x])


def test_apply_and_evaluate_look_too(calibrated, prepared, machine):
    model, x = calibrated, prepared[1]
    machine(3 * (OPERAND + RESULT))
    with pytest.raises(jq.InputError, match="Give 3 samples a call"):
        jq.apply(model, x)
    metrics = {"top-1": jq.evaluation.Accuracy()}
    with pytest.raises(jq.InputError, match="Give batches of 3 a device"):
        jq.evaluate(model, [(x, jnp.zeros(8, jnp.int32))], metrics)
    assert jq.apply(model, x[:3]).shape == (3, 4)


def test_a_trace_is_never_refused(calibrated, prepared, machine):
    """It may be compiled for another machine."""
    machine(1)
    assert jax.eval_shape(jq.apply, calibrated, prepared[1]).shape == (8, 4)


def test_an_allocation_that_fails_is_named(calibrated, prepared, monkeypatch):
    def exhausted(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")

    monkeypatch.setattr("jquant.meanings.apply.evaluate_mode", exhausted)
    with pytest.raises(
        jq.InputError, match=r"memory ran out: node .* at a batch of 8\. Give 4 samples a call"
    ) as error:
        jq.apply(calibrated, prepared[1])
    assert isinstance(error.value.__cause__, jax.errors.JaxRuntimeError)


def test_a_program_names_its_largest_node(calibrated, prepared, monkeypatch):
    integers = sys.modules[jq.run.__module__]
    program, run = jq.lower(calibrated), integers._run

    def exhausted(*_, **options):
        if options["tapped"]:  # the shapes of all values
            return run(*_, **options)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")

    monkeypatch.setattr(integers, "_run", exhausted)
    with pytest.raises(jq.InputError, match=r"makes int8 \[8, 64, 64, 32\], 1.05 MB, .* Give 4 samples a call"):
        jq.run(program, prepared[1])


def test_other_errors_of_the_runtime_pass():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory.naming_memory(lambda: None, ""):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


UNDER_A_LIMIT = """
import resource, sys
import jax.numpy as jnp, numpy as np
import jquant as jq
from jquant.graph.memory import free_memory
sys.path.insert(0, sys.argv[1])
from test_memory import network
params = {"w": jnp.zeros((CHANNELS := 32, 3, 3, 3)), "head": jnp.zeros((32, 4))}
graph, params = jq.trace(network, params, jnp.zeros((2, 3, 512, 512)))
model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target="nash-e")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, used + 2**31))
assert free_memory() <= 2**31
try:
    jq.calibrate(model, [np.zeros((96, 3, 512, 512), np.float32)])
except jq.InputError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_3_gb_under_a_limit_of_the_process_are_refused_with_a_reason():
    from pathlib import Path

    command = [sys.executable, "-c", UNDER_A_LIMIT, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "makes float32 [96, 512, 512, 32], 3.2 GB" in done.stdout
    assert "microbatch=" in done.stdout
