"""Programs of one plan: one static part, so one compilation for all of them, alone or stacked."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.compilations import counted

import jquant as jq
from jquant import ops
from jquant.graph.operator import Lowered
from jquant.program.lower import accumulator_of
from jquant.types import FrozenMap

INT8 = jq.QConfig({"*": jq.Policy(output=jq.int8(scale=0.05), weight=jq.int8(axis="out"))})


def model(shift: float = 0.0) -> jq.Model:
    """Convolution, table and linear, without and with high precision at the end."""
    rng = np.random.default_rng(0)
    conv = ops.Conv(strides=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1))
    nodes = (
        jq.Node("conv", conv, ("x",), {"weight": "cw", "bias": "cb"}),
        jq.Node("gelu", ops.Gelu(), ("conv",)),
        jq.Node("mean", ops.Mean(axes=(2, 3)), ("gelu",)),
        jq.Node("y", ops.Linear(), ("mean",), {"weight": "lw", "bias": "lb"}),
    )
    graph = jq.Graph((jq.Input("x", (None, 3, 6, 6)),), nodes, ("y",))
    sizes = {"cw": (4, 3, 3, 3), "cb": (4,), "lw": (5, 4), "lb": (5,)}
    params = {key: jnp.asarray(rng.normal(size=size) + shift, jnp.float32) for key, size in sizes.items()}
    prepared = jq.prepare(graph, params, INT8, target="nash-e")
    return jq.calibrate(prepared, [rng.normal(size=(2, 3, 6, 6)).astype(np.float32)])


X = np.random.default_rng(1).normal(size=(3, 3, 6, 6)).astype(np.float32)


def candidates(count: int) -> list[jq.Model]:
    made = model()
    return [made.replace(params=jax.tree.map(lambda p, k=k: p * (1 + k / 8), made.params)) for k in range(count)]


def test_programs_of_one_plan_have_one_structure_and_compile_once() -> None:
    programs = [jq.lower(entry) for entry in candidates(4)]
    structures = {jax.tree.structure(program) for program in programs}
    assert len(structures) == 1
    jq.run(programs[0], X)
    with counted() as compilations:
        found = [np.asarray(jq.run(program, X)) for program in programs]
    assert compilations == []
    assert all((found[0] != other).any() for other in found[1:])


def test_a_stack_gives_the_integers_of_each_program() -> None:
    programs = [jq.lower(entry) for entry in candidates(3)]
    stacked = jq.stack_programs(programs)
    found = jax.vmap(lambda program: jq.run(program, X))(stacked)
    assert found.shape == (3, 3, 5)
    for index, program in enumerate(programs):
        np.testing.assert_array_equal(found[index], jq.reference.run(program, X)[0][0])
    text = str(stacked)
    assert all(name in text for name in ("conv", "gelu", "mean", "y"))


def test_each_program_keeps_its_own_bounds() -> None:
    """int8 codes of the weights do not depend on their size, those of the bias do: worst cases differ."""
    first, second = (jq.lower(entry) for entry in candidates(2))
    for program in (first, second):
        weight, bias = (np.asarray(program.constants["y"][role]).astype(np.int64) for role in ("weight", "bias"))
        worst = (np.abs(weight).sum(0) * 128 + np.abs(bias)).max()
        assert int(program.accumulators["y"].worst_case) == worst
        assert program.accumulators["y"].saturating.tolist() == [False] * 5
    through_jit = jax.jit(lambda p: p)
    assert through_jit(first).accumulators["conv"].worst_case == first.accumulators["conv"].worst_case
    assert through_jit(second).accumulators["conv"].worst_case == second.accumulators["conv"].worst_case


def test_a_bound_beyond_float32_is_rounded_up() -> None:
    found = accumulator_of(jq.Node("y", ops.Relu(), ("x",)), Lowered({}, worst_case=2**31 + 1))
    assert int(found["y"].worst_case) == 2**31 + 256


def test_lower_maps_over_scales() -> None:
    made = model()
    qparams = [jax.tree.map(lambda q, k=k: q * (1 + k / 4), made.qparams) for k in range(3)]
    stacked = jax.tree.map(lambda *q: jnp.stack(q), *qparams)
    programs = jax.vmap(lambda q: jq.lower(made.replace(qparams=q)))(stacked)
    found = jax.vmap(lambda program: jq.run(program, X))(programs)
    for index, entry in enumerate(qparams):
        np.testing.assert_array_equal(found[index], jq.run(jq.lower(made.replace(qparams=entry)), X))


def test_the_widest_accumulator_of_a_stack_gives_the_same_integers() -> None:
    narrow = jq.lower(model())
    made = model()
    wide = jq.lower(made.replace(params=made.params | {"lb": made.params["lb"] * 1e9}))
    assert (narrow.formats["y"].accumulator, wide.formats["y"].accumulator) == ("int32", "pair")
    stacked = jq.stack_programs([narrow, wide])
    assert stacked.formats["y"].accumulator == "pair"
    found = jax.vmap(lambda program: jq.run(program, X))(stacked)
    np.testing.assert_array_equal(found[0], jq.run(narrow, X))
    np.testing.assert_array_equal(found[1], jq.run(wide, X))


def test_what_cannot_be_stacked_is_named() -> None:
    program = jq.lower(model())
    with pytest.raises(jq.LoweringError, match="no program to stack"):
        jq.stack_programs([])
    with pytest.raises(jq.LoweringError, match=r"program 1 is not a jq\.Program but Model"):
        jq.stack_programs([program, model()])  # type: ignore[list-item]
    with pytest.raises(jq.LoweringError, match="program 1 has another graph than program 0"):
        jq.stack_programs([program, replace(program, graph=replace(program.graph, outputs=("mean",)))])
    other = dict(program.formats) | {"gelu": replace(program.formats["gelu"], output="int16")}
    with pytest.raises(jq.LoweringError, match=r"program 1: node 'gelu' has the format .*int16"):
        jq.stack_programs([program, replace(program, formats=FrozenMap(other))])
    short = program.constants | {"y": program.constants["y"] | {"bias": program.constants["y"]["bias"][:3]}}
    with pytest.raises(jq.LoweringError, match=r"bias.* is int32\[3\], in program 0 int32\[5\]"):
        jq.stack_programs([program, replace(program, constants=short)])


def test_a_stack_is_neither_run_nor_saved_as_one_program(tmp_path: Path) -> None:
    stacked = jq.stack_programs([jq.lower(entry) for entry in candidates(2)])
    for use in (lambda: jq.run(stacked, X), lambda: jq.save(tmp_path / "stack.jq", stacked)):
        with pytest.raises(jq.LoweringError, match=r"several programs, stacked; run them with jax\.vmap"):
            use()
    assert not list(tmp_path.iterdir())
