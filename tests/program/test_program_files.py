"""Program files: what a digest covers, what other versions say, and which arrays a program can have."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from support.sealed import arrays_of, change, change_arrays, read_parts, resealed

import jquant as jq
from jquant import ops

CONFIG = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8())})


@pytest.fixture(scope="module")
def program() -> jq.Program:
    """A value with a scale that follows from that of its operand, and one with a scale of its own."""
    graph = jq.Graph(
        (jq.Input("x", (None, 2)),),
        (
            jq.Node("a", ops.Scale(factor=2.0**-30), ("x",)),
            jq.Node("b", ops.Sigmoid(), ("x",)),
            jq.Node("fc", ops.Linear(), ("b",), jq.FrozenMap({"weight": "fc.weight"})),
        ),
        ("a", "fc"),
    )
    params = {"fc.weight": jnp.asarray([[0.5, -0.25], [1.0, 2.0], [0.125, 0.0]])}
    model = jq.prepare(graph, params, CONFIG, target=jq.targets.NASH_E)
    return jq.lower(jq.calibrate(model, [jnp.asarray([[1.0, -1.0], [0.5, 0.25]])]))


@pytest.fixture
def path(program: jq.Program, tmp_path: Path) -> Path:
    jq.save(tmp_path / "net.jq", program, metadata={"image": "as it was", "by": "me"})
    return tmp_path / "net.jq"


def test_the_file_is_safetensors(path: Path, program: jq.Program) -> None:
    with safe_open(path, framework="numpy") as file:
        assert file.metadata()["image"] == "as it was"
        assert set(file.keys()) == set(arrays_of(path.read_bytes()))
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            np.testing.assert_array_equal(file.get_tensor(name), arrays_of(path.read_bytes())[name], strict=True)
    offsets = [v["data_offsets"] for k, v in read_parts(path.read_bytes())[0].items() if k != "__metadata__"]
    assert all(a[1] == b[0] for a, b in pairwise(offsets))


def test_the_digest_is_blake2b_of_the_file_with_zeros_in_its_place(path: Path) -> None:
    assert resealed(path.read_bytes()) == path.read_bytes()


def test_the_same_program_gives_the_same_bytes(path: Path, program: jq.Program) -> None:
    jq.save(path.with_name("again.jq"), program, metadata={"image": "as it was", "by": "me"})
    assert path.read_bytes() == path.with_name("again.jq").read_bytes()
    jq.save(path.with_name("again.jq"), jq.load(path), metadata={"image": "as it was", "by": "me"})
    assert path.read_bytes() == path.with_name("again.jq").read_bytes()


def test_one_file_is_read_in_one_order(path: Path) -> None:
    """safetensors gives arrays in another order each time: what is printed, or hashed, of a program did, too."""

    def order() -> str:
        program = jq.load(path)
        return str((list(program.scales), [(node, list(roles)) for node, roles in program.constants.items()]))

    assert len({order() for _ in range(20)}) == 1


@pytest.mark.parametrize("old", [b"as it was", b'"by":"me"', b"half_up", b"Sigmoid", b"scale:x"])
def test_the_digest_covers_metadata_header_and_names(path: Path, old: bytes) -> None:
    content = path.read_bytes()
    at = content.index(old) + len(old) // 2
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(jq.FormatError, match=r"net\.jq: its content differs from its digest"):
        jq.load(path)


def test_the_digest_covers_the_numbers(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 128]))
    with pytest.raises(jq.FormatError, match=r"net\.jq: its content differs from its digest"):
        jq.load(path)


def test_a_file_of_version_1_is_refused_by_its_version(path: Path) -> None:
    header = read_parts(path.read_bytes())[0]["__metadata__"]
    old = json.dumps(json.loads(header["program"]) | {"jquant": 1})
    save_file(arrays_of(path.read_bytes()), path, {"program": old})
    with pytest.raises(jq.FormatError, match=r"net\.jq: format version 1; this release reads version 2"):
        jq.load(path)


def test_a_file_without_its_digest_is_refused(path: Path) -> None:
    header = read_parts(path.read_bytes())[0]["__metadata__"]
    save_file(arrays_of(path.read_bytes()), path, {"program": header["program"]})
    with pytest.raises(jq.FormatError, match=r"net\.jq: its content differs from its digest, for it has none"):
        jq.load(path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\0" * 8, b"\xff" * 300, b"PK\x03\x04"])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "net.jq").write_bytes(content)
    with pytest.raises(jq.FormatError, match=r"net\.jq"):
        jq.load(tmp_path / "net.jq")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"program": "x"}, "'program' is that of the program"),
        ({"digest": "x"}, "'digest' is that of the digest"),
        ({"x": 3}, "'x' is int"),
        ({3: "x"}, "3 is str"),
        ({"x": None}, "'x' is NoneType"),
        ({"x": "\ud800"}, "no Unicode text"),
        ({"\ud800": "x"}, "no Unicode text"),
    ],
)
def test_metadata_that_no_file_can_hold_are_refused(
    program: jq.Program, tmp_path: Path, metadata: dict[Any, Any], message: str
) -> None:
    with pytest.raises(jq.FormatError, match=message):
        jq.save(tmp_path / "net.jq", program, metadata=metadata)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["ä", "\U0001f600", '"digest":"' + "0" * 64 + '"', "\0", "\\", "x" * 100_000])
def test_any_text_may_be_metadata(program: jq.Program, tmp_path: Path, text: str) -> None:
    jq.save(tmp_path / "net.jq", program, metadata={"a": text})
    jq.load(tmp_path / "net.jq")
    assert read_parts((tmp_path / "net.jq").read_bytes())[0]["__metadata__"]["a"] == text


def test_pixels_as_an_output_are_saved_and_loaded(tmp_path: Path) -> None:
    nodes = (
        jq.Node("y", ops.Flip(axes=(1,)), ("x",)),
        jq.Node("z", ops.Pad(padding=((0, 0), (1, 0)), value=7.0), ("y",)),
    )
    graph = jq.Graph((jq.Input("x", (None, 3), "uint8"),), nodes, ("z",))
    program = jq.lower(jq.prepare(graph, {}, CONFIG, target=jq.targets.NASH_E))
    jq.save(tmp_path / "net.jq", program)
    found = jq.run(jq.load(tmp_path / "net.jq"), jnp.asarray([[1, 2, 255]], jnp.uint8))
    np.testing.assert_array_equal(found, np.array([[7, 255, 2, 1]], np.uint8), strict=True)


def set_to(name: str, value: float) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda arrays: arrays[name].__setitem__(..., value)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), np.nextafter(np.float32(2.0**-23), 0)])
@pytest.mark.parametrize("name", ["x", "b"])
def test_scales_that_no_value_can_have_are_named(path: Path, name: str, value: float) -> None:
    change_arrays(path, set_to(f"scale:{name}", value))
    with pytest.raises(jq.FormatError, match=rf"net\.jq: array 'scale:{name}' has the scale .*at least 1\.19"):
        jq.load(path)


def test_the_smallest_scale_is_read(path: Path) -> None:
    change_arrays(path, set_to("scale:b", 2.0**-23))
    assert jq.load(path).scales["b"] == 2.0**-23


def test_a_scale_that_follows_may_be_smaller(path: Path) -> None:
    assert 0 < jq.load(path).scales["a"] < 2.0**-30
    change_arrays(path, set_to("scale:a", 0.0))
    with pytest.raises(jq.FormatError, match=r"array 'scale:a' has the scale 0\.0"):
        jq.load(path)


@pytest.mark.parametrize("name", ["scale:no", "scale:", "constant:no:weight", "constant:fc", "x", ""])
def test_arrays_that_the_program_does_not_know_are_named(path: Path, name: str) -> None:
    change_arrays(path, lambda arrays: arrays.update({name: np.ones((), np.float32)}))
    with pytest.raises(jq.FormatError, match=rf"net\.jq: unexpected array '{name}' of dtype float32"):
        jq.load(path)


def test_constants_that_the_operator_does_not_know_are_named(path: Path) -> None:
    change_arrays(path, lambda arrays: arrays.update({"constant:fc:extra": np.ones((), np.int32)}))
    with pytest.raises(jq.FormatError, match=r"net\.jq: the constants do not fit the graph: node 'fc'.*'extra'"):
        jq.load(path)


def second_operand(header: dict[str, Any]) -> None:
    next(n for n in header["graph"]["nodes"] if n["name"] == "fc")["inputs"].append("b")


def test_an_operand_too_many_is_named(path: Path) -> None:
    change(path, "program", second_operand)
    with pytest.raises(jq.FormatError, match=r"net\.jq: .*node 'fc' \(Linear\): 2 operands were given, and it has 1"):
        jq.load(path)


@pytest.mark.parametrize(
    ("op", "role"),
    [
        (ops.Clamp(minimum=-0.5, maximum=0.5), "upper"),
        (ops.Tanh(), "table"),
        (ops.PRelu(), "slope"),
        (ops.LeakyRelu(negative_slope=0.1), "table"),
        (ops.Pad(padding=((0, 0), (1, 1)), value=0.5), "fill"),
    ],
)
def test_an_operator_has_its_constants_and_no_others(tmp_path: Path, op: ops.Op, role: str) -> None:
    roles = jq.FrozenMap({"weight": "w"} if isinstance(op, ops.PRelu) else {})
    graph = jq.Graph((jq.Input("x", (None, 2)),), (jq.Node("y", op, ("x",), roles),), ("y",))
    model = jq.prepare(graph, {"w": jnp.asarray([0.25, 0.5])} if roles else {}, CONFIG, target=jq.targets.NASH_E)
    path = tmp_path / "net.jq"
    program = jq.lower(jq.calibrate(model, [jnp.asarray([[1.0, -1.0]])]))
    jq.save(path, program)
    assert f"constant:y:{role}" in arrays_of(path.read_bytes())
    change_arrays(path, lambda arrays: arrays.pop(f"constant:y:{role}"))
    with pytest.raises(jq.FormatError, match=r"net\.jq: the constants do not fit the graph: node 'y' "):
        jq.load(path)
    jq.save(path, program)
    change_arrays(path, lambda arrays: arrays.update({"constant:y:extra": np.ones((), np.int32)}))
    with pytest.raises(jq.FormatError, match=r"net\.jq: the constants do not fit the graph: node 'y' .*'extra'"):
        jq.load(path)


@pytest.mark.parametrize("name", ["index", "mask"])
def test_exact_values_have_no_scale(tmp_path: Path, name: str) -> None:
    """An int32 input is an index, and a mask stands for no real number."""
    nodes = (jq.Node("taken", ops.Gather(axis=1), ("x", "index")), jq.Node("mask", ops.Greater(value=0.25), ("taken",)))
    graph = jq.Graph((jq.Input("x", (None, 4)), jq.Input("index", (None, 2), "int32")), nodes, ("mask",))
    model = jq.prepare(graph, {}, CONFIG, target=jq.targets.NASH_E)
    model = jq.calibrate(model, [(jnp.ones((2, 4)), jnp.zeros((2, 2), jnp.int32))])
    path = tmp_path / "net.jq"
    jq.save(path, jq.lower(model))
    assert jq.load(path).graph.outputs == ("mask",)
    change_arrays(path, lambda arrays: arrays.update({f"scale:{name}": np.ones((), np.float32)}))
    with pytest.raises(jq.FormatError, match=r"net\.jq: (unexpected array|scales do not belong)"):
        jq.load(path)
