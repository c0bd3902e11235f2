"""The way of each operator on a GPU and a TPU, read from its trace; no such device is here."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance.harness import Case, integers, program_of

import jquant as jq

CONFORMANCE = Path(__file__).parents[1] / "conformance"
FAMILIES = sorted(path.stem for path in CONFORMANCE.glob("*_cases.py"))


def cases_of(family: str) -> list[Case]:
    """The first case of each operator and kind of product."""
    found: dict[tuple[str, bool], Case] = {}
    for case in importlib.import_module(f"conformance.{family}").CASES:
        found.setdefault((case.operator, "int16" in case.formats and "weight" in case.params), case)
    return list(found.values())


def drawn(case: Case) -> jq.Program:
    """A program of the case; scales that do not lower are drawn again."""
    for seed in range(20):
        rng = np.random.default_rng([seed, *case.operator.encode()])
        data = [integers(rng, fmt, (2, *s)) for fmt, s in zip(case.operands, case.shapes, strict=True)]
        data = [np.where(d == 0, d.dtype.type(1), d) for d in data] if case.nonzero else data
        try:
            return program_of(rng, case, data)
        except jq.LoweringError as error:
            if "fused addend" not in str(error):
                raise
    raise AssertionError(case)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_operator_lowers_for_a_gpu_and_a_tpu(family: str) -> None:
    """Matrix units multiply bytes: as float32 on a GPU, as int8 on a TPU. A gather is no larger than what it makes."""
    products = {"cuda": {"product f32 x f32 -> f32"}, "tpu": {"product s8 x s8 -> s32"}}
    for case in cases_of(family):
        program = drawn(case)
        for platform, allowed in products.items():
            for path in jq.program.node_paths(program, platform, batch=2):
                assert set(path.products) <= allowed, f"{case.operator} on {platform}: {path}"
                assert path.gathered <= 1, f"{case.operator} on {platform}: {path}"
                assert path.largest > 0


@pytest.fixture(scope="module")
def program() -> jq.Program:
    rng = np.random.default_rng(0)
    weights = {"c": jnp.asarray(rng.normal(size=(8, 3, 3, 3)), jnp.float32), "d": jnp.ones((8, 1, 3, 3))}
    names = ("NCHW", "OIHW", "NCHW")

    def net(p, x):
        y = jax.lax.conv_general_dilated(x, p["c"], (1, 1), "SAME", dimension_numbers=names)
        y = jax.lax.conv_general_dilated(y, p["d"], (1, 1), "SAME", dimension_numbers=names, feature_group_count=8)
        return jax.nn.sigmoid(y).mean((2, 3)) @ jnp.eye(8)

    x = jnp.asarray(rng.normal(size=(2, 3, 8, 8)), jnp.float32)
    graph, params = jq.trace(net, weights, x)
    model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target="nash-e")
    return jq.lower(jq.calibrate(model, [x]))


def test_paths_say_how_a_net_computes(program: jq.Program) -> None:
    texts = {
        platform: {path.operator: path.text for path in jq.program.node_paths(program, platform)}
        for platform in ("cpu", "cuda", "tpu")
    }
    assert texts["cpu"]["Linear"] == texts["tpu"]["Linear"] == "product s8 x s8 -> s32"
    assert texts["cuda"]["Linear"] == "product f32 x f32 -> f32"
    assert texts["cpu"]["Sigmoid"] == "gather, 1 x the larger of operand and result"
    kinds = {p: [path for path in jq.program.node_paths(program, p) if path.operator == "Conv"] for p in texts}
    assert [path.text for path in kinds["cpu"]] == ["product s8 x s8 -> s32", "sum of shifted products"]
    assert [path.text for path in kinds["tpu"]] == ["product s8 x s8 -> s32", "sum of shifted products"]
    assert [path.kernel for path in kinds["cuda"]] == ["dense", "depthwise"]
    assert kinds["cpu"][1].largest == 4 * 8 * 8 * 8  # an accumulator in int32
    table = jq.program.path_table(kinds["cpu"])
    assert "computed as" in table
    assert len(table.splitlines()) == 4


def test_a_large_batch_has_large_arrays(program: jq.Program) -> None:
    one, four = (jq.program.node_paths(program, "cpu", batch)[1].largest for batch in (1, 4))
    assert four == 4 * one


def test_an_unknown_platform_is_named(program: jq.Program) -> None:
    with pytest.raises(jq.LoweringError, match="platform 'abacus' is none of cpu, cuda, rocm, tpu"):
        jq.program.node_paths(program, "abacus")
