"""The jitted interpreter against the executable specification, bit for bit and layer by layer, on random networks."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from support import graphs

import jquant as jq
from jquant.program.integers import run_integers
from jquant.program.lower import lower_traced

# A random layer may have a table that six segments cannot bring near its function; `tests/faults/test_tables.py` is
# about that.
pytestmark = pytest.mark.filterwarnings("ignore::jquant.calibration.TableWarning")


def int8_config(observer: jq.observers.Observer | None = None) -> jq.QConfig:
    return jq.QConfig(
        {
            "*": jq.Policy(
                weight=jq.int8(axis="out", quantizer=jq.lsq),
                output=jq.int8(quantizer=jq.lsq, observer=observer),
            )
        }
    )


CONFIGS = {
    "w8a8": int8_config(),
    "w4a8": jq.QConfig({"*": jq.Policy(weight=jq.int4(axis="out"), output=jq.int8())}),
    "w8a8 per tensor, pow2": jq.QConfig({"*": jq.Policy(weight=jq.int8(), output=jq.int8(scale_form="pow2"))}),
    "w8a16": jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int16())}),
    "w16a8": jq.QConfig({"*": jq.Policy(weight=jq.int16(axis="out"), output=jq.int8())}),
}
TARGETS = {
    "nash-e": jq.targets.NASH_E,
    "every other rounding": jq.targets.NASH_E.with_fields(
        {
            "quantize_rounding": "half_up",
            "rescale.pre_rounding": "half_up",
            "rescale.average_pre_rounding": "floor",
            "rescale.post_rounding": "half_even",
        }
    ),
    "high precision": jq.targets.NASH_E.with_fields({"rescale.high_precision": True}),
}


def lower_or_skip(model: jq.Model) -> jq.Program:
    """A random layer may calibrate to all zeros; an addend beside it is then refused, which is not what is tested."""
    try:
        return jq.lower(model)
    except jq.LoweringError as error:
        assume("fused addend" not in str(error))
        raise


def programs(graph: jq.Graph, params: dict, config: jq.QConfig, target: jq.Target) -> jq.Model:
    model = jq.prepare(graph, params, config, target=target)
    return jq.calibrate(model, [graphs.images(0, graph)])


def assert_equals_reference(program: jq.Program, x: jax.Array) -> None:
    fast = jq.run_with_taps(program, x)
    _, slow = jq.reference.run(program, np.asarray(x))
    for name in program.graph.values:
        np.testing.assert_array_equal(np.asarray(fast[name]), slow[name], err_msg=name)


# Every configuration on one target and every target with one configuration; the other pairs in the slow run.
PAIRS = [
    pytest.param(config, target, marks=[] if target == "nash-e" or config == "w8a8" else pytest.mark.slow)
    for config in CONFIGS
    for target in TARGETS
]


@pytest.mark.parametrize(("config", "target"), PAIRS)
@settings(max_examples=3)
@given(network=graphs.networks())
def test_run_equals_the_reference_layer_by_layer(config: str, target: str, network: tuple) -> None:
    graph, params = network
    model = programs(graph, params, CONFIGS[config], TARGETS[target])
    program = lower_or_skip(model)
    assert_equals_reference(program, 2 * graphs.images(1, graph))  # beyond the calibrated range, so that it saturates


@settings(max_examples=3)
@given(network=graphs.networks())
def test_bit_true_is_the_program(network: tuple) -> None:
    graph, params = network
    model = programs(graph, params, int8_config(), jq.targets.NASH_E)
    x = graphs.images(1, graph)
    exact = jq.run(lower_or_skip(model), x)
    np.testing.assert_array_equal(jq.apply(model, x, mode="bit_true"), exact)


@settings(max_examples=6)
@given(network=graphs.networks())
def test_the_jaxpr_of_the_integers_has_no_float(network: tuple) -> None:
    graph, params = network
    model = programs(graph, params, int8_config(), jq.targets.NASH_E)
    program = lower_or_skip(model)
    inputs = {"x": jnp.zeros((2, *graph.inputs[0].shape[1:]), jnp.int8)}
    text = str(
        jax.make_jaxpr(lambda c, x: run_integers(dataclasses.replace(program, constants=c), x))(
            program.constants, inputs
        )
    )
    assert "f32" not in text
    assert "f16" not in text
    assert "i8[" in text


@pytest.fixture(scope="module")
def network() -> tuple[jq.Model, jax.Array]:
    build = graphs.Builder(7)
    build.shapes["x"] = (3, 12, 12)
    x = build.add(jq.ops.Relu(), (build.batch_norm(build.conv("x", 8, 3)),), (8, 12, 12))
    y = build.batch_norm(build.conv(x, 8, 3, groups=8))
    x = build.add(jq.ops.Add(), (y, x), (8, 12, 12))
    x = build.add(jq.ops.Mean(axes=(2, 3)), (build.pool(jq.ops.MaxPool, x, 2, 2, 0),), (8,))
    x = build.add(
        jq.ops.Linear(), (x,), (5,), weight=build.array("head.weight", 5, 8), bias=build.array("head.bias", 5)
    )
    graph = build.graph(x, size=12)
    model = programs(graph, build.params, int8_config(), jq.targets.NASH_E)
    return model, graphs.images(1, graph, batch=8)


def test_the_same_bits_lowered_inside_jit(network: tuple) -> None:
    model, _ = network
    outside = jq.lower(model)
    inside = jax.jit(lower_traced)(model)
    for node, roles in outside.constants.items():
        for role, constant in roles.items():
            np.testing.assert_array_equal(constant, inside.constants[node][role], err_msg=f"{node} {role}")
    assert {f.accumulator for f in outside.formats.values()} == {"int32"}
    assert "pair" in {f.accumulator for f in inside.formats.values()}  # a bias that is traced may be anything


def test_the_same_bits_however_it_is_run(network: tuple) -> None:
    model, x = network
    program = jq.lower(model)
    y = np.asarray(jq.run(program, x))
    np.testing.assert_array_equal(np.concatenate([jq.run(program, x[:3]), jq.run(program, x[3:])]), y)
    np.testing.assert_array_equal(jax.vmap(lambda v: jq.run(program, v[None])[0])(x), y)
    _, scanned = jax.lax.scan(lambda c, v: (c, jq.run(program, v)), 0, x.reshape(4, 2, *x.shape[1:]))
    np.testing.assert_array_equal(scanned.reshape(y.shape), y)
    with jax.disable_jit():
        np.testing.assert_array_equal(jq.run(program, x[:1]), y[:1])


def test_nash_m_has_the_integers_of_nash_e(network: tuple) -> None:
    model, x = network
    other = dataclasses.replace(model.plan, target=jq.targets.NASH_M)
    np.testing.assert_array_equal(
        jq.run(jq.lower(jq.Model(other, model.params, model.qparams)), x, raw=False), jq.run(jq.lower(model), x)
    )


@pytest.mark.parametrize("output", [jq.int8(), jq.int16()])
def test_pre_export_runs_the_tables_of_the_program(output: jq.QuantSpec) -> None:
    graph = jq.Graph((jq.Input("x", (None, 64)),), (jq.Node("y", jq.ops.Gelu(), ("x",)),), ("y",))
    output = dataclasses.replace(output, observer=jq.observers.min_max())  # saturated values have another gradient
    model = jq.prepare(graph, {}, jq.QConfig({"*": jq.Policy(output=output)}), target=jq.targets.NASH_E)
    x = jnp.linspace(-5.0, 5.0, 640, dtype=jnp.float32).reshape(10, 64)
    model = jq.calibrate(model, [x])
    exact = jq.run(jq.lower(model), x)
    np.testing.assert_array_equal(jq.apply(model, x, mode="tables"), exact)
    fake = jq.apply(model, x)
    assert bool((fake != exact).any()) == (output.dtype == "int16")  # an int8 table is exact, segments are not
    gradient = jax.grad(lambda v: jq.apply(model, v, mode="tables").sum())(x)
    np.testing.assert_array_equal(gradient, jax.grad(lambda v: jq.apply(model, v).sum())(x))


def test_raw_is_integers_in_integers_out(network: tuple) -> None:
    model, x = network
    program = jq.lower(model)
    xq = jq.run_with_taps(program, x)["x"]
    raw = jq.run(program, xq, raw=True)
    assert (xq.dtype, raw.dtype) == (jnp.int8, jnp.int32)
    np.testing.assert_array_equal(
        raw.astype(jnp.float32) * program.scales[program.graph.outputs[0]], jq.run(program, x)
    )
    with pytest.raises(jq.InputError, match="is float32, expected int8"):
        jq.run(program, x, raw=True)


def test_the_worst_case_is_recorded_and_is_a_bound(network: tuple) -> None:
    model, _ = network
    program = jq.lower(model)
    name = program.graph.outputs[0]
    weight, bias = program.constants[name]["weight"].astype(jnp.int32), program.constants[name]["bias"]
    worst = np.where(np.asarray(weight) > 0, 127, -128)
    reached = max(abs(int((worst[:, c] * weight[:, c]).sum() + bias[c])) for c in range(5))
    assert reached <= float(program.accumulators[name].worst_case) < 2**31


def test_a_printed_program_names_every_node_and_what_passes_int32(network: tuple) -> None:
    model, _ = network
    program = jq.lower(model)
    text = str(program)
    assert all(node.name in text for node in program.graph.nodes)
    assert "beyond int32" not in text
    huge = dict(model.params) | {"head.bias": model.params["head.bias"] * 1e9}
    assert re.search(r"Linear .* pair \(beyond int32\) +2\^31\.", str(jq.lower(model.replace(params=huge))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unlowered(jq.ops.Op):
    """An operator with a float rule alone."""


@jq.ops.eval_float.register
def _(op: Unlowered, x: jax.Array) -> jax.Array:
    return x


def test_an_operator_without_integers_is_refused_by_name() -> None:
    graph = jq.Graph((jq.Input("x", (None, 4)),), (jq.Node("odd", Unlowered(), ("x",)),), ("odd",))
    model = jq.prepare(graph, {}, int8_config(), target=jq.targets.NASH_E)
    model = jq.calibrate(model, [jnp.ones((2, 4))])
    with pytest.raises(jq.LoweringError, match=r"node 'odd' \(Unlowered\): .* no integer form yet"):
        jq.lower(model)


def test_an_accumulator_beyond_int32_stays_exact(network: tuple) -> None:
    model, x = network
    params = dict(model.params) | {k: v * 3e7 for k, v in model.params.items() if k.endswith("bias")}
    assert_equals_reference(jq.lower(model.replace(params=params)), x)


def test_saved_and_loaded_programs_are_equal(network: tuple, tmp_path) -> None:
    model, x = network
    program = jq.lower(model)
    jq.save(tmp_path / "net.jq", program)
    loaded = jq.load(tmp_path / "net.jq")
    assert (loaded.graph, loaded.formats, loaded.inputs, loaded.target) == (
        program.graph,
        program.formats,
        program.inputs,
        program.target,
    )
    np.testing.assert_array_equal(jq.run(loaded, x), jq.run(program, x))
    assert [p.name for p in tmp_path.iterdir()] == ["net.jq"]


@pytest.mark.parametrize("cut", [0, 7, 100, 1000, -1])
def test_a_truncated_file_is_refused(network: tuple, tmp_path, cut: int) -> None:
    model, _ = network
    jq.save(tmp_path / "net.jq", jq.lower(model))
    content = (tmp_path / "net.jq").read_bytes()
    (tmp_path / "net.jq").write_bytes(content[:cut])
    with pytest.raises(jq.FormatError, match=r"net\.jq"):
        jq.load(tmp_path / "net.jq")


def test_a_failed_save_keeps_the_old_file(network: tuple, tmp_path, monkeypatch) -> None:
    model, _ = network
    program = jq.lower(model)
    jq.save(tmp_path / "net.jq", program)
    before = (tmp_path / "net.jq").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        jq.save(tmp_path / "net.jq", program)
    assert (tmp_path / "net.jq").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["net.jq"]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA makes of a CPU's loops")
@pytest.mark.parametrize("join", ["concatenate", "stack"])
def test_no_loop_joins_values_in_its_middle(join: str) -> None:
    """XLA would compute the sum of a and the joined values in one loop that decides at each element what it reads."""
    rng = np.random.default_rng(0)
    x, a = (jnp.asarray(rng.normal(size=(2, 8, *rest)), jnp.float32) for rest in ((16, 6), (16, 18)))

    def net(p, x, a):
        parts = [jax.nn.relu(x) * 0.5, jnp.abs(x), -x]
        joined = jnp.concatenate(parts, -1) if join == "concatenate" else jnp.stack(parts, -1).reshape(a.shape)
        return jnp.maximum(joined + a, 0.25)

    graph, params = jq.trace(net, {}, x, a)
    config = jq.QConfig(jq.templates.int8_default())
    model = jq.prepare(graph, params, config, target="nash-e", high_precision_outputs=False)
    program = jq.lower(jq.calibrate(model, [(x, a)]))
    compiled = jax.jit(jq.run).lower(program, x, a).compile()
    bodies = re.findall(r"^%fused_computation\S* .*?^}", compiled.as_text(), re.MULTILINE | re.DOTALL)
    joining = [body for body in bodies if re.search(r"\bconcatenate\(", body)]
    assert joining or re.search(r"\bconcatenate\(", compiled.as_text())
    for body in joining:
        root = re.search(r"ROOT \S+ = \S+ (\w[\w-]*)\(", body)
        assert root is not None
        assert root.group(1) in ("concatenate", "bitcast", "convert", "copy", "transpose"), body
    found = jq.run_with_taps(program, x, a)
    _, expected = jq.reference.run(program, np.asarray(x), np.asarray(a))
    for name in program.graph.values:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
