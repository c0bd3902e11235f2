"""Quantizers and observers from outside of jquant: files, checkpoints and derivatives take them as any other."""

import dataclasses
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jquant as jq
from jquant.quantizers import forward_mode
from jquant.training import open_checkpoints
from jquant.types import Array, FormatError, InputError, Observer, QConfigError, Quantizer, QuantSpec


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def soft(x: Array, scale: Array, spec: QuantSpec) -> Array:
    """To the grid; straight through everywhere, and the scale's slope by hand: 1."""
    return jnp.clip(jnp.round(x / scale), *spec.range) * scale


@soft.defjvp
def _(spec: QuantSpec, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    return soft(*primals, spec), tangents[0] + tangents[1]


def same(value: Array, spec: QuantSpec) -> Array:
    return value


SOFT = Quantizer(soft, same, same, name="soft", both_ways=True, source="outside.quantizers:SOFT")
LARGEST = Observer(
    init=lambda channels: jnp.zeros(channels),
    update=lambda state, x: jnp.maximum(state, jnp.abs(x).max(1)),
    merge=jnp.maximum,
    finalize=lambda state, spec: state / spec.range[1],
    name="largest",
    source="outside.observers:LARGEST",
)
OWN = (SOFT, LARGEST)
QCONFIG = jq.QConfig(
    {"*": jq.Policy(output=jq.int8(quantizer=SOFT, observer=LARGEST), weight=jq.int8(axis="out", quantizer=SOFT))}
)
GRAPH = jq.Graph(
    (jq.Input("x", (None, 4)),),
    (jq.Node("fc", jq.ops.Linear(), ("x",), jq.types.FrozenMap({"weight": "fc.weight"})),),
    ("fc",),
)
X = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)


def calibrated() -> jq.Model:
    params = {"fc.weight": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)}
    return jq.calibrate(jq.prepare(GRAPH, params, QCONFIG, target="nash-e"), [X])


@pytest.mark.parametrize("form", ["json", "toml"])
def test_a_qconfig_names_them_and_is_read_with_consent(form: str) -> None:
    text = getattr(jq.config, f"qconfig_to_{form}")(QCONFIG)
    read = getattr(jq.config, f"qconfig_from_{form}")
    assert read(text, own=OWN) == QCONFIG
    with pytest.raises(FormatError, match=r"'outside.quantizers:SOFT' is of the writer's own.*own=\[\.\.\.\]"):
        read(text)
    with pytest.raises(FormatError, match=r"outside\.observers:LARGEST"):
        read(text, own=(SOFT,))


def test_a_plan_names_them_and_is_read_with_consent() -> None:
    plan = calibrated().plan
    text = jq.plan.plan_to_json(plan)
    assert jq.plan.plan_from_json(text, own=OWN) == plan
    with pytest.raises(FormatError, match="is of the writer's own"):
        jq.plan.plan_from_json(text)


def test_one_without_a_source_says_what_a_file_needs() -> None:
    nameless = Quantizer(soft, same, same, name="soft")
    qconfig = jq.QConfig({"*": jq.Policy(output=jq.int8(quantizer=nameless))})
    with pytest.raises(QConfigError, match=r'source="package\.module:soft"'):
        jq.config.qconfig_to_json(qconfig)


def test_scales_are_those_of_the_observer_and_integers_run() -> None:
    model = calibrated()
    np.testing.assert_allclose(model.qparams["x"], np.abs(X).max() / 127, rtol=1e-6)  # one float32 division
    program = jq.lower(model)
    (expected,), _ = jq.reference.run(program, X)
    np.testing.assert_array_equal(jq.run(program, X), expected)


def test_training_moves_the_scale_and_a_checkpoint_keeps_it(tmp_path: Path) -> None:
    model = calibrated()
    gradients = jax.grad(lambda m: jq.apply(m, X).sum())(model)
    assert float(gradients.qparams["x"]) != 0
    state = jq.TrainState.create(model, tx=optax.sgd(1e-3))
    checkpoints = open_checkpoints(tmp_path / "run", model)
    checkpoints.save(state, position=3)
    found = checkpoints.restore(state)
    checkpoints.close()
    chex.assert_trees_all_equal(found.state.model, model)


def test_both_derivatives_of_one_that_says_so() -> None:
    assert forward_mode(SOFT) is SOFT
    spec, scale = QuantSpec(dtype="int8"), jnp.float32(0.5)
    _, slope = jax.jvp(lambda s: forward_mode(SOFT)(jnp.float32(0.7), s, spec), (scale,), (jnp.float32(1),))
    assert float(slope) == 1.0 == float(jax.grad(lambda s: SOFT(jnp.float32(0.7), s, spec))(scale))
    with pytest.raises(InputError, match="both_ways=True"):
        forward_mode(Quantizer(soft, same, same, name="soft"))


def test_an_observer_whose_update_changes_its_state_is_refused() -> None:
    grows = dataclasses.replace(LARGEST, update=lambda state, x: jnp.abs(x), name="grows")
    qconfig = jq.QConfig({"*": jq.Policy(output=jq.int8(observer=grows))})
    params = {"fc.weight": np.ones((3, 4), np.float32)}
    model = jq.prepare(GRAPH, params, qconfig, target="nash-e")
    said = r"'grows' changes the form of its state: its update gives float32\[1, 20\], its init gave float32\[1\]"
    with pytest.raises(jq.CalibrationError, match=said):
        jq.calibrate(model, [X])


def test_a_quantizer_that_changes_the_shape_is_refused() -> None:
    flat = dataclasses.replace(SOFT, apply=lambda x, scale, spec: x.reshape(-1), name="flat")
    with pytest.raises(InputError, match=r"'flat' makes \[20\] of \[5, 4\]; its apply keeps the shape"):
        flat(jnp.asarray(X), jnp.float32(0.5), QuantSpec(dtype="int8"))


class Variants(chex.TestCase):
    """Quantizers of one's own give the same values outside and inside jit, and on a device."""

    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    def test_one_value(self) -> None:
        spec, x = QuantSpec(dtype="int4"), np.array([-9.0, -0.75, 0.25, 0.6, 9.0], np.float32)
        found = self.variant(lambda x: SOFT(x, jnp.float32(0.5), spec))(x)
        chex.assert_trees_all_equal(found, jnp.array([-4.0, -1.0, 0.0, 0.5, 3.5]))  # by hand; ties to even
