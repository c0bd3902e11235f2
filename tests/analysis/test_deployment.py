"""Plans against documented constraints of operators: by hand, one limit at a time."""

import jax.numpy as jnp
import pytest

import jquant as jq
from jquant import ops
from jquant.analysis import operator_support, support_table
from jquant.targets.constraints import CONSTRAINTS, WHAT, constraints_of


def model_of(*nodes, shape=(None, 4, 6, 6), params=None, rules=None, target=jq.targets.NASH_E):
    graph = jq.Graph((jq.Input("x", shape),), nodes, (nodes[-1].name,))
    config = jq.QConfig({"*": jq.Policy(output=jq.int8(), weight=jq.int8(axis="out")), **(rules or {})})
    return jq.prepare(graph, params or {}, config, target=target)


def node(name, op, *inputs, **params):
    return jq.Node(name, op, inputs, jq.FrozenMap(params))


def test_states_of_nodes():
    conv = ops.Conv(strides=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1))
    params = {"w": jnp.ones((4, 4, 3, 3), jnp.float32)}
    nodes = (node("conv", conv, "x", weight="w"), node("a", ops.Abs(), "conv"), node("s", ops.Sort(axis=1), "a"))
    entries = operator_support(model_of(*nodes, params=params))
    assert {e.where: e.state for e in entries} == {"conv": "within", "a": "within", "s": "unknown"}
    conv_entry = next(e for e in entries if e.where == "conv")
    assert "side of the kernel 1 to 31; products in one sum 1 to 65535" in conv_entry.reason
    assert conv_entry.source == "docs/nash-arithmetic.md, sections 4 and 5"
    text = support_table(entries)
    assert "no public row is known for: Sort (1)" in text
    assert "within what is documented: Abs (1), Conv (1)" in text


def test_a_float_island_is_beyond():
    nodes = (node("a", ops.Abs(), "x"), node("b", ops.Sigmoid(), "a"))
    found = {e.where: e for e in operator_support(model_of(*nodes, rules={"a": jq.Policy(output=jq.float16())}))}
    entry, other = found["a"], found["b"]
    assert entry.state == "beyond"
    assert entry.reason == "dtype of the result: float16, documented is int8 or int16"
    assert "torch_operator_constraints_list_j6em" in entry.source
    assert other.state == "unknown"
    assert "beyond what is documented" in support_table([entry, other])


@pytest.mark.parametrize(("size", "state"), [(32767, "within"), (32768, "beyond")])
def test_the_axis_that_argmax_searches(size, state):
    """On a march that would take more, so that prepare does not refuse it before."""
    march = jq.targets.NASH_E.with_fields({"max_searched": 100_000})
    model = model_of(node("m", ops.ArgMax(axis=1), "x"), shape=(None, size), target=march)
    (entry,) = operator_support(model)
    assert entry.state == state
    if state == "beyond":
        assert entry.reason == "elements of the axis that is searched: 32768, documented is 1 to 32767"


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_kernels_and_products(transposed, groups):
    """A kernel of 33 where the march would take it; products are of the channels of one group."""
    march = jq.targets.NASH_E.with_fields({"max_kernel": 64, "max_conv_inputs": 65536})
    window = {"strides": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1), "groups": groups}
    op = ops.ConvTranspose(output_padding=(0, 0), **window) if transposed else ops.Conv(**window)
    weight = jnp.ones((4, 4 // groups, 33, 3), jnp.float32)
    model = model_of(node("c", op, "x", weight="w"), shape=(None, 4, 40, 6), params={"w": weight}, target=march)
    (entry,) = operator_support(model)
    assert entry.reason == "side of the kernel: 33, documented is 1 to 31"


def test_a_march_of_which_nothing_is_known():
    model = model_of(node("a", ops.Abs(), "x"), target=jq.targets.NASH_B)
    assert [e.state for e in operator_support(model)] == ["unknown"]


def test_every_row_has_a_source_and_names_operators():
    for march, rows in CONSTRAINTS.items():
        assert constraints_of(march, "Nothing") == ()
        for row in rows:
            assert all(row.page)
            assert row.quantity in WHAT
            assert bool(row.allowed) != (row.most > 0)
            assert row.least <= row.most
            assert all(hasattr(ops, kind) for kind in row.operators)


def test_documented_sizes_are_those_of_the_march():
    sizes = {row.quantity: row.most for row in CONSTRAINTS["nash-e"] if row.most}
    march = jq.targets.NASH_E
    assert sizes == {
        "rank": march.max_rank, "reduced": march.max_reduced, "searched": march.max_searched,
        "kernel": march.max_kernel, "products": march.max_conv_inputs,
    }  # fmt: skip
