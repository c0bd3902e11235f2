"""Damaged and hostile ONNX files: one clear error each, in bounded time and memory."""

import random
import resource
import time
from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pytest
from onnx import TensorProto, helper
from support import architectures
from support.mutants import HUGE, in_onnx
from support.onnx_helpers import draw, model_of, quantized_conv

import jquant as jq
from jquant.types import JQuantError
from jquant_converters import from_onnx, from_torch, model_from_onnx, to_onnx

SECONDS = 5.0  # for one file of a few kilobytes
GIGABYTES = 1.5  # that the resident memory of this process may grow by over all of them


def read(content):
    """Either function; what is wrong with a file is the same for both."""
    try:
        return from_onnx(content)
    except jq.ConversionError as error:
        if "model_from_onnx" not in str(error):
            raise
    return model_from_onnx(content, target=jq.targets.NASH_E)


def seeds():
    """Files to damage: a QDQ model, a recurrent net, a net of many operators."""
    found = [quantized_conv()[0].SerializeToString()]
    for name in ("gru", "shufflenet", "mobilenet_v3"):
        graph, params = from_torch(architectures.build(name), architectures.inputs(name, 1, seed=0))
        found.append(to_onnx(graph, params).SerializeToString())
    return found


def mutated(rng, content, others):
    """A file with damage of one of several kinds."""
    data = bytearray(content)
    kind = rng.randrange(6)
    if kind == 0:
        return bytes(data[: rng.randrange(len(data))])
    if kind == 1:
        for _ in range(rng.randint(1, 12)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)
    if kind == 2:
        at = rng.randrange(len(data))
        return bytes(data[:at] + rng.randbytes(rng.randint(1, 9)) + data[at:])
    if kind == 3:
        start = rng.randrange(len(data))
        return bytes(data[:start] + data[start + rng.randint(1, 40) :])
    if kind == 4:
        other = rng.choice(others)
        return bytes(data[: rng.randrange(len(data))]) + other[rng.randrange(len(other)) :]
    return in_onnx(content, rng)


def check_mutated(count, seed):
    rng, files = random.Random(seed), seeds()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read_well, slowest, unclear = 0, 0.0, []
    for i in range(count):
        content = mutated(rng, rng.choice(files), files)
        start = time.process_time()
        try:
            read(content)
            read_well += 1
        except JQuantError as error:
            unclear += [f"file {i}: {error!r}"] if len(str(error)) < 16 else []
        slowest = max(slowest, time.process_time() - start)
    assert not unclear
    assert slowest < SECONDS
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    assert grown < GIGABYTES
    assert 0 < read_well < count  # some damage leaves a model, as a changed weight does


def test_mutated_files():
    check_mutated(250, seed=1)


@pytest.mark.slow
def test_many_mutated_files():
    check_mutated(3000, seed=2)


# ---------------------------------------------------------------------------------------------------------------------
# One kind of attack each


def relu(**changes):
    return model_of([helper.make_node("Relu", ["x"], ["y"], "relu")], {"x": draw(2, 3)}, {"y": TensorProto.FLOAT})


def claims(dims, raw=b"\0" * 12):
    model = model_of([helper.make_node("Add", ["x", "w"], ["y"])], {"x": draw(2, 3)}, {"y": TensorProto.FLOAT})
    model.graph.initializer.append(TensorProto(name="w", data_type=1, dims=dims, raw_data=raw))
    return model


def cycle():
    nodes = [helper.make_node("Add", ["x", "b"], ["a"], "first"), helper.make_node("Relu", ["a"], ["b"], "second")]
    return model_of(nodes, {"x": draw(2, 3)}, {"b": TensorProto.FLOAT})


def expansion():
    shape = np.asarray([HUGE, 3], np.int64)
    return model_of(
        [helper.make_node("Expand", ["x", "s"], ["y"])], {"x": draw(1, 3)}, {"y": 1}, initializers={"s": shape}
    )


def bomb():
    """Doubles a constant in each of 60 nodes."""
    names = ["c", *(f"c{i}" for i in range(60))]
    nodes = [helper.make_node("Concat", [a, a], [b], axis=0) for a, b in pairwise(names)]
    nodes.append(helper.make_node("Add", ["x", names[-1]], ["y"]))
    return model_of(nodes, {"x": draw(1, 3)}, {"y": 1}, initializers={"c": np.zeros((8, 3), np.float32)})


def growing():
    """Doubles a value in each of 60 nodes."""
    names = ["x", *(f"c{i}" for i in range(60))]
    nodes = [helper.make_node("Concat", [a, a], [b], axis=0) for a, b in pairwise(names)]
    return model_of(nodes, {"x": draw(2, 3)}, {names[-1]: 1})


def kernel():
    nodes = [helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[HUGE, HUGE])]
    return model_of(nodes, {"x": draw(1, 2, 4, 4)}, {"y": 1})


def resized():
    sizes = np.asarray([1, 2, 2**30, 2**30], np.int64)
    nodes = [helper.make_node("Resize", ["x", "", "", "s"], ["y"], mode="linear")]
    return model_of(nodes, {"x": draw(1, 2, 4, 4)}, {"y": 1}, initializers={"s": sizes})


def external(location):
    model = claims([3])
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return model


def nested(depth):
    inner = helper.make_graph([], "leaf", [], [])
    for i in range(depth):
        node = helper.make_node("If", ["x"], ["y"], f"level{i}", then_branch=inner)
        inner = helper.make_graph([node], f"level{i}", [], [])
    return helper.make_model(inner, opset_imports=[helper.make_opsetid("", 21)])


def operand_left_out():
    """Only the axes of a squeeze of constants."""
    nodes = [helper.make_node("Squeeze", ["", "axes"], ["c"]), helper.make_node("Add", ["x", "c"], ["y"])]
    return model_of(nodes, {"x": draw(1, 3)}, {"y": 1}, initializers={"axes": np.asarray([0], np.int64)})


ATTACKS = {
    "operand left out": (operand_left_out, "an operand is missing"),
    "claims more than it has": (lambda: claims([3, HUGE]), "claims"),
    "negative size": (lambda: claims([-3]), "has the shape"),
    "overflowing size": (lambda: claims([2**33, 2**33]), "claims"),
    "cycle": (cycle, "before a node makes it: the graph has a cycle"),
    "expansion": (expansion, "the shape"),
    "constants that double": (bomb, "elements is computed"),
    "values that double": (growing, "is too large"),
    "window": (kernel, "a window of"),
    "resize": (resized, "a result of"),
    "control flow": (lambda: nested(3), "If 'level2'"),
    "not finite": (lambda: claims([3], np.float32([np.nan, 1, 2]).tobytes()), "not finite"),
    "external data of bytes": (lambda: external("weights.bin"), "give the path of the model"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(name):
    make, message = ATTACKS[name]
    model = make().SerializeToString()
    start = time.process_time()
    with pytest.raises(jq.ConversionError, match=message):
        from_onnx(model)
    assert time.process_time() - start < SECONDS


def test_deep_nesting_is_refused_while_parsing():
    """Nested by hand: protobuf itself will not write it so deep."""
    content = b""
    for _ in range(
        500
    ):  # field 6 of an attribute is a graph, field 5 of a node an attribute, field 1 of a graph a node
        for tag in (b"\x32", b"\x2a", b"\x0a"):
            size = len(content)
            varint = b""
            while size >= 128:
                varint += bytes([size & 127 | 128])
                size >>= 7
            content = tag + varint + bytes([size]) + content
    with pytest.raises(jq.ConversionError, match="no ONNX model, or damaged"):
        from_onnx(b"\x3a" + _length(content) + content)


def _length(content):
    size, varint = len(content), b""
    while size >= 128:
        varint += bytes([size & 127 | 128])
        size >>= 7
    return varint + bytes([size])


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "sub/../../secret", "", ".", "a\0b", "link"])
def test_external_data_stays_in_the_folder(tmp_path, location):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"\0" * 12)
    (folder / "link").symlink_to(tmp_path / "secret")
    path = folder / "net.onnx"
    path.write_bytes(external(location).SerializeToString())
    with pytest.raises(jq.ConversionError, match="no file in the folder of the model"):
        from_onnx(path)


def test_external_data_beside_the_model_is_read(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(external("weights.bin").SerializeToString())
    (tmp_path / "weights.bin").write_bytes(np.float32([1, 2, 3]).tobytes())
    _, params = from_onnx(path)
    np.testing.assert_array_equal(params["w"], np.float32([1, 2, 3]))
    (tmp_path / "weights.bin").write_bytes(b"\0" * 8)
    with pytest.raises(jq.ConversionError, match=r"beyond the end of 'weights\.bin'"):
        from_onnx(path)


def test_names_are_only_names(tmp_path, monkeypatch):
    """A path as the name of a node or weight names a node or weight, and no file is touched."""
    monkeypatch.chdir(tmp_path)
    nodes = [helper.make_node("Add", ["x", "../../w"], ["/etc/y"], "../../../node")]
    weights = {"../../w": np.float32([1, 2, 3])}
    graph, params = from_onnx(model_of(nodes, {"x": draw(2, 3)}, {"/etc/y": 1}, initializers=weights))
    assert set(params) == {"../../w"}
    assert graph.outputs == ("../../../node",)
    assert not list(tmp_path.iterdir())
    x = jnp.asarray(draw(2, 3))
    np.testing.assert_allclose(jq.graph.evaluate_float(graph, params, x)[0], x + jnp.float32([1, 2, 3]))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "0 opsets"),
        (b"not a model", "no ONNX model, or damaged"),
        (7, "reads a path, bytes or a ModelProto, not int"),
        (lambda: model_of([], {"x": draw(2, 3)}, {"y": 1}), "'y' is made by no node"),
    ],
)
def test_no_model(source, message):
    with pytest.raises(jq.ConversionError, match=message):
        from_onnx(source() if callable(source) else source)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no ONNX file at"):
        from_onnx(tmp_path / "nothing.onnx")


@pytest.mark.parametrize("opset", [9, 29])
def test_other_opsets(opset):
    model = relu()
    model.opset_import[0].version = opset
    with pytest.raises(jq.ConversionError, match=f"the model has opset {opset}; opset 10 to 28 can be read"):
        from_onnx(model)
