"""What a net costs grows with its depth, and not with the square of it: counted in XLA's own instructions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq


def residual_chain(params: list[jax.Array], x: jax.Array) -> jax.Array:
    for w in params:
        x = x + jnp.maximum(x @ w, 0)
    return x


def program_of(depth: int) -> tuple[jq.Model, jq.Program, np.ndarray]:
    rng = np.random.default_rng(0)
    weights = [jax.device_put(0.1 * rng.normal(size=(4, 4)).astype(np.float32)) for _ in range(depth)]
    x = rng.normal(size=(2, 4)).astype(np.float32)
    graph, params = jq.trace(residual_chain, weights, x)[:2]
    model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target=jq.targets.NASH_E)
    model = jq.calibrate(model, [x])
    return model, jq.lower(model), x


@pytest.mark.parametrize("verb", ["run", "apply"])
def test_twice_the_depth_takes_about_twice_the_instructions(verb: str) -> None:
    lines = []
    for depth in (12, 24):
        model, program, x = program_of(depth)
        if verb == "run":
            lowered = jax.jit(jq.run).lower(program, x)
        else:
            lowered = jax.jit(jq.apply).lower(model, x)
        lines.append(lowered.compile().as_text().count("\n"))
    assert lines[1] <= 2.2 * lines[0], lines


def test_a_branch_that_is_always_taken_changes_no_integer() -> None:
    _, program, x = program_of(8)
    assert "conditional" in jax.jit(jq.run).lower(program, x).compile().as_text()  # what this test is about is there
    _, expected = jq.reference.run(program, x)
    found = jq.run_with_taps(program, x)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
