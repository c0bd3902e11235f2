"""StableHLO: written, read in a process without jquant, and equal."""

import os
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from support import graphs

import jquant as jq
from jquant.types import FormatError

QCONFIG = jq.QConfig({"*": jq.Policy(output=jq.int8(), weight=jq.int8(axis="out"))})


@pytest.fixture(scope="module")
def network():
    build = graphs.Builder(3)
    build.shapes["x"] = (3, 8, 8)
    x = build.add(jq.ops.Relu(), (build.conv("x", 6, 3, 2),), (6, 4, 4))
    x = build.add(jq.ops.Add(), (build.conv(x, 6, 3, groups=6), x), (6, 4, 4))
    x = build.add(jq.ops.Sigmoid(), (build.pool(jq.ops.AvgPool, x, 3, 1, 1),), (6, 4, 4))
    x = build.add(jq.ops.Mean(axes=(2, 3)), (x,), (6,))
    head = build.add(
        jq.ops.Linear(), (x,), (5,), weight=build.array("head.weight", 5, 6), bias=build.array("head.bias", 5)
    )
    graph = build.graph(head, size=8)
    model = jq.prepare(graph, build.params, QCONFIG, target=jq.targets.NASH_E)
    model = jq.calibrate(model, [graphs.images(s, graph) for s in range(2)])
    return model, jq.lower(model)


def on_cpu():
    """Whatever the tests run on: files are for a CPU unless they say otherwise."""
    return jax.default_device(jax.devices("cpu")[0])


def test_a_program_serves_any_batch_and_gives_its_bits(network, tmp_path):
    model, program = network
    jq.to_stablehlo(tmp_path / "net.stablehlo", program)
    call = jq.from_stablehlo(tmp_path / "net.stablehlo")
    for batch in (1, 5):
        x = graphs.images(batch, model.plan.graph, batch)
        with on_cpu():
            found = call(x)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(jq.run(program, x)))
    assert os.listdir(tmp_path) == ["net.stablehlo"]


def test_a_file_for_a_gpu_asks_for_no_integer_product(network, tmp_path):
    """XLA has no integer convolution there, and its integer matrix product is not exact: see numerics/convolution."""
    model, program = network
    x = graphs.images(0, model.plan.graph, 2)
    expected = np.asarray(jq.run(program, x))
    for platforms in (("cuda",), ("cpu", "cuda")):
        jq.to_stablehlo(tmp_path / "net", program, platforms=platforms)
        text = jax.export.deserialize(bytearray((tmp_path / "net").read_bytes())).mlir_module()
        assert "stablehlo.convolution" not in text
        assert "xi8>, tensor" not in "".join(line for line in text.splitlines() if "dot_general" in line)
        assert "dot_general" in text
    np.testing.assert_array_equal(jq.from_stablehlo(tmp_path / "net")(x), expected)


def test_raw_is_integers_and_has_no_float(network, tmp_path):
    program = network[-1]
    jq.to_stablehlo(tmp_path / "raw", program, raw=True, batch=2)
    x = jnp.asarray(np.random.default_rng(0).integers(-128, 128, (2, 3, 8, 8)), jnp.int8)
    call = jq.from_stablehlo(tmp_path / "raw")
    with on_cpu():
        found = call(x)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(jq.run(program, x, raw=True)))
    text = jax.export.deserialize(bytearray((tmp_path / "raw").read_bytes())).mlir_module()
    assert "stablehlo" in text
    assert "f32" not in text


def test_fake_quant_is_what_apply_computes(network, tmp_path):
    model, _ = network
    jq.to_stablehlo(tmp_path / "fake", model)
    x = graphs.images(7, model.plan.graph, 4)
    with on_cpu():
        found, expected = jq.from_stablehlo(tmp_path / "fake")(x), jq.apply(model, x)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_a_process_without_jquant_runs_it(network, tmp_path):
    model, program = network
    jq.to_stablehlo(tmp_path / "net", program)
    x = graphs.images(1, model.plan.graph, 2)
    np.save(tmp_path / "x.npy", np.asarray(x))
    code = (
        "import sys, jax, jax.export, numpy as np\n"
        f"call = jax.export.deserialize(bytearray(open({str(tmp_path / 'net')!r}, 'rb').read())).call\n"
        f"np.save({str(tmp_path / 'y.npy')!r}, np.asarray(call(np.load({str(tmp_path / 'x.npy')!r}))))\n"
        "assert 'jquant' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}, timeout=300)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), np.asarray(jq.run(program, x)))


def test_what_is_refused(network, tmp_path):
    model, _ = network
    with pytest.raises(FormatError, match="takes a Program or a Model, not Plan"):
        jq.to_stablehlo(tmp_path / "a", model.plan)
    with pytest.raises(FormatError, match="raw is for programs"):
        jq.to_stablehlo(tmp_path / "a", model, raw=True)
    with pytest.raises(FileNotFoundError):
        jq.from_stablehlo(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"no module")
    with pytest.raises(FormatError, match="not a StableHLO module"):
        jq.from_stablehlo(tmp_path / "a")


@pytest.mark.parametrize("handling", ["live", "frozen", "reverse_fold"])
def test_a_kept_batch_norm_is_folded_as_in_apply(handling, tmp_path):
    rng = np.random.default_rng(0)
    params = {
        "w": rng.normal(size=(4, 3)).astype(np.float32),
        "mean": rng.normal(size=4).astype(np.float32),
        "var": rng.uniform(0.5, 2, size=4).astype(np.float32),
    }
    keys = {"running_mean": "mean", "running_var": "var"}
    layer = jq.Node("fc", jq.ops.Linear(), ("x",), jq.FrozenMap({"weight": "w"}))
    norm = jq.Node("bn", jq.ops.BatchNorm(), ("fc",), jq.FrozenMap(keys))
    graph = jq.Graph((jq.Input("x", (None, 3)),), (layer, norm), ("bn",))
    model = jq.prepare(graph, params, QCONFIG, target=jq.targets.NASH_E, batch_norm=handling)
    x = rng.normal(size=(5, 3)).astype(np.float32)
    model = jq.calibrate(model, [x])
    jq.to_stablehlo(tmp_path / "net", model)
    expected = np.asarray(jq.apply(model, x))
    float_values = np.asarray(
        jq.graph.evaluate_float(graph, model.params | {k: model.params[k] for k in keys.values()}, x)[0]
    )
    assert np.abs(expected - float_values).max() < 0.05  # what the two are compared with is the net
    with on_cpu():
        np.testing.assert_array_equal(np.asarray(jq.from_stablehlo(tmp_path / "net")(x)), expected)


@pytest.mark.parametrize("kind", ["program", "model"])
def test_the_bytes_do_not_depend_on_who_writes_them(network, tmp_path, kind):
    """Nor does a file say where the sources of jquant, or those of its user, are on this machine."""
    source = network[1] if kind == "program" else network[0]
    before = jax.config.jax_traceback_in_locations_limit
    jq.to_stablehlo(tmp_path / "a", source)

    def elsewhere() -> None:
        jq.to_stablehlo(tmp_path / "b", source)

    jax.clear_caches()
    elsewhere()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert b".py" not in (tmp_path / "a").read_bytes()
    assert jax.config.jax_traceback_in_locations_limit == before
