"""The declarations of every operator, from the cases of the conformance suite, which a new operator has."""

from collections.abc import Iterator
from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _pytest.mark import ParameterSet
from conformance.harness import Case
from support import any_graphs

from jquant.graph.operator import eval_float, to_channels_last
from jquant.graph.serialize import operators

OPERATORS = {name: cls for name, cls in operators().items() if cls.__module__.startswith("jquant.")}


@pytest.mark.parametrize("name", sorted(n for n, cls in OPERATORS.items() if fields(cls)))
def test_attributes_are_given_by_name(name: str) -> None:
    """So that an attribute may be added between two others."""
    with pytest.raises(TypeError, match="positional argument"):
        OPERATORS[name](*[0 for _ in fields(OPERATORS[name])])


@pytest.mark.parametrize("name", sorted(OPERATORS.keys() - {"Opaque", "Resample"}))  # those have no cases
def test_operators_are_values(name: str) -> None:
    """Keys of plans and caches: equal where their attributes are, also when they were made apart."""
    found = [case.op for case in any_graphs.cases().get(name, ())] or [OPERATORS[name]()]
    for op in found:
        again = OPERATORS[name](**{field.name: getattr(op, field.name) for field in fields(op)})
        assert again is not op
        assert again == op
        assert hash(again) == hash(op)


@pytest.mark.parametrize("name", sorted(any_graphs.cases()))
def test_what_has_a_scale_of_its_own_asks_for_statistics(name: str) -> None:
    """Masks, indices and pixels have the scale 1, and what keeps the scale of its operand has that one."""
    case = any_graphs.cases()[name][0]
    operands, params = arrays_of(case, 0)
    result = jax.eval_shape(lambda xs, ps: eval_float(case.op, *xs, **ps), operands, params)
    if result.dtype != jnp.float32 or case.op.scale_rule == "same_as_input":
        assert not case.op.needs_stats


def arrays_of(case: Case, seed: int) -> tuple[list[jnp.ndarray], dict[str, jnp.ndarray]]:
    """Operands with a batch of 2, and parameters by role."""
    rng = np.random.default_rng(seed)
    operands = []
    for form, shape in zip(case.operands, case.shapes, strict=True):
        kind, _, most = form.partition(":")
        if kind == "index":
            operands.append(rng.integers(0, int(most), (2, *shape)).astype(np.int32))
        elif kind in ("bool", "uint8"):
            operands.append(rng.integers(0, 2 if kind == "bool" else 256, (2, *shape)).astype(kind))
        else:
            operands.append(rng.uniform(0.25, 1.0, (2, *shape)).astype(np.float32) * rng.choice([-1, 1], (2, *shape)))
    operands = [jnp.asarray(x, jnp.float32 if x.dtype == np.float64 else x.dtype) for x in operands]
    return operands, {role: jnp.asarray(rng.uniform(0.5, 1, s), jnp.float32) for role, s in case.params.items()}


def converted_cases() -> Iterator[ParameterSet]:
    for name, cases in any_graphs.cases().items():
        for i, case in enumerate(cases[:: max(1, len(cases) // 3)]):
            rank = 1 + len(case.shapes[0]) if case.shapes else 0
            if rank < 3 or case.op.layout not in ("spatial", "axes", "elementwise"):
                continue
            if getattr(case.op, "channels_last", False) or to_channels_last(case.op, rank) is None:
                continue
            yield pytest.param(case, id=f"{name}-{i}")


@pytest.mark.parametrize("case", list(converted_cases()))
def test_channels_last_is_the_same_operator(case: Case) -> None:
    """As `prepare` puts it into a graph: operands of three axes and more are moved, and so is the result."""
    operands, params = arrays_of(case, 0)
    rank = operands[0].ndim
    converted = to_channels_last(case.op, rank)
    assert converted is not None
    expected = np.asarray(eval_float(case.op, *operands, **params))
    moved = [jnp.moveaxis(x, 1, -1) if x.ndim >= 3 else x for x in operands]
    found = np.asarray(eval_float(converted, *moved, **params))
    if found.ndim == rank:
        found = np.moveaxis(found, -1, 1)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)  # sums of other orders


@pytest.mark.parametrize("name", sorted(n for n, cls in OPERATORS.items() if cls.bounded))
def test_bounded_values_lie_between_minus_one_and_one(name: str) -> None:
    for case in any_graphs.cases()[name]:
        operands, _ = arrays_of(case, 0)
        y = eval_float(case.op, *(x if x.dtype == jnp.bool_ else 1e6 * x for x in operands))
        assert float(jnp.abs(y).max()) <= 1


def test_functions_that_are_bounded_say_so() -> None:
    """At 0, and far from it, on both sides."""
    x = jnp.float32([-1e30, -1e4, -3.0, -1e-30, 0.0, 1e-30, 3.0, 1e4, 1e30])
    for name, cases in any_graphs.cases().items():
        case = cases[0]
        if len(case.shapes) == 1 and not case.params and case.op.layout == "elementwise" and hasattr(case.op, "table"):
            y = np.asarray(eval_float(case.op, x))
            assert bool((np.abs(y) <= 1).all()) == case.op.bounded, name
