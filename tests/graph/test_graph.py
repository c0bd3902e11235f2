"""Graphs as data: validation, JSON both ways, printing, and what a failing node says."""

import contextlib
import json
import re

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import graphs
from support.sealed import resealed_text, sealed_text

import jquant as jq
from jquant import ops

X = jq.Input("x", (None, 3))
A = jq.Node("a", ops.Relu(), ("x",))


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (jq.Graph((X, X), (A,), ("a",)), "'x' is used twice"),
        (jq.Graph((X,), (A, A), ("a",)), "'a' is used twice"),
        (jq.Graph((X,), (jq.Node("", ops.Relu(), ("x",)),), ("",)), "'' is empty"),
        (
            jq.Graph((X,), (jq.Node("a", ops.Relu(), ("b",)), jq.Node("b", ops.Relu(), ("x",))), ("a",)),
            "'b' is used before it is made",
        ),
        (jq.Graph((X,), (A, jq.Node("b", ops.Relu(), ("aa",))), ("b",)), "operand 'aa' is unknown; did you mean 'a'"),
        (jq.Graph((X,), (jq.Node("a", "relu", ("x",)),), ("a",)), "'relu' is not an operator"),
        (jq.Graph((X,), (A,), ()), "has no outputs"),
        (jq.Graph((X,), (A,), ("aa",)), "output 'aa' is made by no node; did you mean 'a'"),
    ],
)
def test_malformed_graphs_are_refused(graph: jq.Graph, message: str) -> None:
    with pytest.raises(jq.GraphError, match=re.escape(message)):
        jq.graph.validate(graph)


LINEAR = jq.Graph((X,), (jq.Node("fc", ops.Linear(), ("x",), jq.FrozenMap({"weight": "fc.weight"})),), ("fc",))


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({}, jq.GraphError, "parameter 'fc.weight' (weight) is missing"),
        ({"fc.wight": jnp.ones((2, 3))}, jq.GraphError, "did you mean 'fc.wight'"),
        ({"fc.weight": jnp.ones((2, 3), jnp.float16)}, jq.GraphError, "'fc.weight' is float16; convert it to float32"),
        ({"fc.weight": [[1.0]]}, jq.GraphError, "'fc.weight' is list"),
        ({"fc.weight": jnp.full((2, 3), jnp.nan)}, jq.CalibrationError, "'fc.weight' contains NaN or infinite"),
        ({"fc.weight": jnp.full((2, 3), -jnp.inf)}, jq.CalibrationError, "'fc.weight' contains NaN or infinite"),
    ],
)
def test_broken_parameters_are_refused_everywhere(params: dict, error: type, message: str) -> None:
    config = jq.QConfig({"*": None})
    for call in (
        lambda: jq.graph.validate(LINEAR, params),
        lambda: jq.prepare(LINEAR, params, config, target=jq.targets.NASH_E),
        lambda: jq.graph.evaluate_float(LINEAR, params, jnp.ones((1, 3))),
    ):
        with pytest.raises(error, match=re.escape(message)):
            call()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "the graph has 1 inputs (x), 0 were given"),
        ((jnp.ones((1, 3)),) * 2, "2 were given"),
        (([[1.0, 2.0, 3.0]],), "must be an array, not list"),
        ((jnp.ones((1, 3), jnp.int8),), "is int8, expected float32"),
        ((jnp.ones((1, 4)),), "has shape [1, 4], expected [batch, 3]"),
        ((jnp.ones(3),), "has shape [3], expected [batch, 3]"),
        ((jnp.ones((0, 3)),), "empty batch"),
        ((jnp.full((1, 3), jnp.nan),), "contains NaN or infinite"),
        ((jnp.full((1, 3), jnp.inf),), "contains NaN or infinite"),
    ],
)
def test_broken_inputs_are_refused(inputs: tuple, message: str) -> None:
    with pytest.raises(jq.InputError, match=re.escape(message)):
        jq.graph.evaluate_float(LINEAR, {"fc.weight": jnp.ones((2, 3))}, *inputs)


def test_unequal_batches_are_refused() -> None:
    graph = jq.Graph((X, jq.Input("y", (None, 3))), (jq.Node("a", ops.Add(), ("x", "y")),), ("a",))
    with pytest.raises(jq.InputError, match="input 'y' has batch 3, other inputs 2"):
        jq.graph.evaluate_float(graph, {}, jnp.ones((2, 3)), jnp.ones((3, 3)))


def test_a_failing_node_names_itself_its_operator_and_shapes() -> None:
    with pytest.raises(jq.GraphError, match=re.escape("node 'fc' (Linear) on x float32[1, 3]: ")):
        jq.graph.evaluate_float(LINEAR, {"fc.weight": jnp.ones((2, 5))}, jnp.ones((1, 3)))


@settings(max_examples=30)
@given(network=graphs.networks())
def test_json_round_trips(network: tuple) -> None:
    graph, _ = network
    text = jq.graph.graph_to_json(graph)
    again = jq.graph.graph_from_json(text)
    assert again == graph
    assert hash(again) == hash(graph)
    assert jq.graph.graph_to_json(again) == text


@settings(max_examples=10)
@given(network=graphs.networks())
def test_print_shows_every_node(network: tuple) -> None:
    graph, _ = network
    lines = str(graph).splitlines()
    for node in graph.nodes:
        (line,) = [row for row in lines if row.split()[0] == node.name]
        assert type(node.op).__name__ in line
        assert all(v in line for v in node.inputs)
    assert lines[-1] == f"outputs: {', '.join(graph.outputs)}"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([10**400, 1e999]) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["op", "name", "graph", "inputs", "x"]) | st.text(max_size=4), inner, max_size=3
        )
    ),
    max_leaves=8,
)


def refused_or_read(text: str) -> None:
    with contextlib.suppress(jq.FormatError):
        jq.graph.graph_from_json(text)


@given(st.text())
def test_garbage_text_is_refused(text: str) -> None:
    with pytest.raises(jq.FormatError):
        jq.graph.graph_from_json(text)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"jquant": 1, "graph": {}}', "[" * 100_000, "9" * 5000])
def test_what_is_no_graph_file_is_refused(text: str) -> None:
    with pytest.raises(jq.FormatError):
        jq.graph.graph_from_json(text)


@pytest.mark.parametrize(
    "data",
    [{"jquant": 2}, {"jquant": 2, "graph": None}, {"jquant": 2, "graph": {}}, {"jquant": 2, "graph": {"nodes": 3}}],
)
def test_a_version_without_a_graph_is_refused(data: dict) -> None:
    with pytest.raises(jq.FormatError, match="graph"):
        jq.graph.graph_from_json(sealed_text(data))


@given(json_values)
def test_garbage_json_is_refused(value: object) -> None:
    with pytest.raises(jq.FormatError):
        jq.graph.graph_from_json(sealed_text({"jquant": 2, "graph": value}))


def places(data: object, path: tuple = ()):
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


BASE = jq.Graph(
    (jq.Input("x", (None, 3, 8, 8)),),
    (
        jq.Node(
            "c",
            ops.Conv(strides=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1)),
            ("x",),
            jq.FrozenMap({"weight": "c.weight"}),
        ),
        jq.Node("s", ops.Scale(factor=0.5), ("c",)),
        jq.Node("m", ops.MaxPool(kernel=(2, 2), strides=(2, 2), padding=((0, 0), (0, 0)), dilation=(1, 1)), ("s",)),
    ),
    ("m",),
)
PLACES = [place for place in places(json.loads(jq.graph.graph_to_json(BASE))) if place]


@settings(max_examples=300)
@given(st.sampled_from(PLACES), json_values)
def test_a_damaged_graph_is_refused_or_well_formed(place: tuple, value: object) -> None:
    data = json.loads(jq.graph.graph_to_json(BASE))
    parent = data
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    refused_or_read(resealed_text(json.dumps(data, indent=1)))


def test_a_number_beyond_float64_is_refused() -> None:
    with pytest.raises(jq.FormatError, match=r"factor.*too large"):
        jq.graph.graph_from_json(resealed_text(jq.graph.graph_to_json(BASE).replace("0.5", str(10**400))))


def test_unknown_operators_and_fields_are_named() -> None:
    text = jq.graph.graph_to_json(BASE)
    with pytest.raises(jq.FormatError, match=r"unknown operator 'Convv'.*import its module"):
        jq.graph.graph_from_json(resealed_text(text.replace('"Conv"', '"Convv"')))
    with pytest.raises(jq.FormatError, match="Scale has no field 'fator'"):
        jq.graph.graph_from_json(resealed_text(text.replace('"factor"', '"fator"')))


# ---------------------------------------------------------------------------------------------------------------------
# What operators declare


CONV = {"strides": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1)}
POOL = {"kernel": (2, 2), "strides": (2, 2), "padding": ((0, 0), (0, 0))}


@pytest.mark.parametrize(
    ("op", "attributes", "message"),
    [
        (ops.Conv, CONV | {"strides": (1, -1)}, r"strides \(1, -1\) must be positive"),
        (ops.Conv, CONV | {"strides": (1,)}, r"padding .* and strides \(1,\) differ in length"),
        (ops.Conv, CONV | {"dilation": (0, 1)}, r"dilation \(0, 1\) must be positive"),
        (ops.Conv, CONV | {"groups": 0}, "groups 0 must be positive"),
        (ops.ConvTranspose, CONV | {"output_padding": (0,)}, "output_padding .* differ in length"),
        (ops.ConvTranspose, CONV | {"output_padding": (0, -1)}, r"output_padding \(0, -1\) must not be negative"),
        (ops.AffineGrid, {"size": (0, 5)}, r"size \(0, 5\) must be positive"),
        (ops.MaxPool, POOL | {"dilation": (1, 1, 1)}, "dilation .* differ in length"),
        (ops.AvgPool, POOL | {"kernel": (0, 2)}, r"kernel \(0, 2\) must be positive"),
        (ops.AdaptiveAvgPool, {"output_size": (0,)}, r"output_size \(0,\) must be positive"),
        (ops.Permute, {"axes": (0, 2, 2)}, r"axes \(0, 2, 2\) are no permutation"),
        (ops.Roll, {"shifts": (1,), "axes": (1, 2)}, "differ in length"),
        (ops.Tile, {"repeats": (1, 0)}, r"repeats \(1, 0\) must be positive"),
        (ops.Scale, {"factor": 0.0}, r"factor 0\.0 must be finite and not zero"),
        *(
            (
                op,
                {"epsilon": value} | ({"groups": 2} if op is ops.GroupNorm else {}),
                "epsilon .* must be finite and not",
            )
            for op in (ops.BatchNorm, ops.LayerNorm, ops.RmsNorm, ops.GroupNorm, ops.InstanceNorm)
            for value in (-1e-5, float("nan"))
        ),
        (ops.Dropout, {"rate": -0.5}, r"rate -0\.5 must be from 0 to 1"),
        (ops.CentrePixels, {"unit": 0.0}, r"unit 0\.0 must be positive"),
        (ops.Nv12ToCentredYuv444, {"unit": float("inf")}, "unit inf must be positive and finite"),
        (ops.RgbToCentredYuv444, {"unit": float("nan")}, "unit nan must be positive and finite"),
        (ops.RoiResize, {"size": (4, 4), "unit": -1.0}, r"unit -1\.0 must be positive"),
        (ops.Slice, {"starts": (0,), "stops": (1, 2), "steps": (1,)}, "differ in length"),
    ],
)
def test_attributes_that_do_not_fit_are_named(op: type[ops.Op], attributes: dict, message: str) -> None:
    with pytest.raises(jq.GraphError, match=rf"{op.__name__}: .*{message}"):
        op(**attributes)


def changed(name: str, **fields: object) -> str:
    data = json.loads(jq.graph.graph_to_json(BASE))
    next(part for part in (*data["graph"]["nodes"], *data["graph"]["inputs"]) if part["name"] == name).update(fields)
    return resealed_text(json.dumps(data, indent=1))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("c", {"inputs": ["x", "x"]}, r"node 'c' \(Conv\): 2 operands were given, and it has 1$"),
        ("c", {"inputs": []}, r"node 'c' \(Conv\): 0 operands were given, and it has 1$"),
        ("c", {"op": {"op": "Conv", **CONV, "addend": True}}, r"1 operands were given, and it has 2$"),
        ("c", {"params": {}}, r"node 'c' \(Conv\): the parameter 'weight' is missing"),
        ("s", {"params": {"wieght": "c.weight"}}, r"node 's' \(Scale\): it has no parameter 'wieght'"),
        ("s", {"op": {"op": "Attention"}}, r"1 operands were given, and it has 3 to 5"),
        ("s", {"op": {"op": "Cat", "axis": 1}, "inputs": ["c", "c", "c"]}, None),
        ("c", {"op": {"op": "Conv", **CONV, "strides": [1, -1]}}, r"nodes\[0\].op: Conv: strides \(1, -1\)"),
        ("x", {"dtype": "float64"}, "input 'x' is 'float64'; inputs are one of float32, bool, int32, uint8"),
        ("x", {"shape": [None, -3]}, r"input 'x' has the shape \(None, -3\)"),
        ("x", {"shape": [None, 2**31]}, "input 'x' has the shape"),
    ],
)
def test_graphs_that_operators_do_not_allow_are_refused(name: str, fields: dict, message: str | None) -> None:
    if message is None:
        jq.graph.graph_from_json(changed(name, **fields))
        return
    with pytest.raises(jq.FormatError, match=message):
        jq.graph.graph_from_json(changed(name, **fields))


def test_a_text_of_version_1_is_refused_by_its_version() -> None:
    text = json.dumps({"jquant": 1, "graph": json.loads(jq.graph.graph_to_json(BASE))["graph"]}, indent=1)
    with pytest.raises(jq.FormatError, match="graph: format version 1; this release reads version 2"):
        jq.graph.graph_from_json(text)


def test_a_text_with_a_newline_at_its_end_is_read() -> None:
    assert jq.graph.graph_from_json(jq.graph.graph_to_json(BASE) + "\n") == BASE


def test_a_plan_is_no_graph() -> None:
    with pytest.raises(jq.FormatError, match="graph: the text holds 'plan', no graph"):
        jq.graph.graph_from_json(sealed_text({"jquant": 2, "plan": {}}))


def test_long_values_are_cut_in_messages() -> None:
    for fields in ({"op": {"op": "x" * 9999}}, {"inputs": ["x" * 9999]}, {"params": {"x" * 9999: 3}}, {"y" * 9999: 0}):
        with pytest.raises(jq.FormatError) as caught:
            jq.graph.graph_from_json(changed("s", **fields))
        assert len(str(caught.value)) < 800
