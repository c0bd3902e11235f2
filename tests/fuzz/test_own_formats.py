"""Damaged files of jquant's own formats: programs, states, plans and graphs.

A reader of a damaged file raises `FormatError`, names the file, and says nothing that is longer than a few lines. It
raises nothing else, and it never reads something else than the file says. There are two kinds of damage:

- Bits that are flipped, bytes that are changed, taken out or put in, and files that are cut: the digest differs.
- Files that were changed on purpose, with a digest that fits: other JSON values at any place, other arrays. The reader
  refuses them, or what it read is written again as the same values.

Seeds are fixed. The normal suite draws a few hundred files a reader; `pytest -m slow tests/fuzz` flips a bit of
every byte, and draws ten times as many.
"""

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from support.mutants import HOSTILE, at, damaged, flipped, places
from support.sealed import arrays_of, from_parts, read_parts, resealed_text, with_arrays

import jquant as jq
from jquant import ops
from jquant.analysis.cases import BadCases, load_bad_cases
from jquant.cli.settings import ImageSettings
from jquant.cli.state import State, load_state, save_state

LONGEST = 2000  # characters of a message, the path among them

QCONFIG = jq.QConfig(
    {
        "*": jq.Policy(weight=jq.int8(axis="out", quantizer=jq.lsq), output=jq.int8()),
        "act": jq.Policy(output=jq.int16(scale=2.0**-10)),
    }
)


def nested(depth: int) -> Any:
    """A list in a list, that many times: as a structure of arguments it has levels as well."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def nested_structure(depth: int) -> dict[str, Any]:
    value = {"kind": "leaf", "keys": [], "parts": [], "type": ""}
    for _ in range(depth):
        value = {"kind": "tuple", "keys": [], "parts": [value], "type": ""}
    return value


DEEP = (nested(60), nested(400), nested_structure(20), nested_structure(300))


def make_graph() -> tuple[jq.Graph, dict[str, Any]]:
    rng = np.random.default_rng(7)
    params = {
        "conv.weight": rng.normal(size=(3, 2, 3, 3)),
        "conv.bias": rng.normal(size=3),
        "fc.weight": rng.normal(size=(4, 12)),
    }
    conv = ops.Conv(strides=(2, 2), padding=((1, 1), (1, 1)), dilation=(1, 1))
    nodes = (
        jq.Node("conv", conv, ("x",), jq.FrozenMap({"weight": "conv.weight", "bias": "conv.bias"})),
        jq.Node("act", ops.Sigmoid(), ("conv",)),
        jq.Node("flat", ops.Flatten(), ("act",)),
        jq.Node("fc", ops.Linear(), ("flat",), jq.FrozenMap({"weight": "fc.weight"})),
    )
    graph = jq.Graph((jq.Input("x", (None, 2, 4, 4)),), nodes, ("fc",))
    return graph, {key: jnp.asarray(value, jnp.float32) for key, value in params.items()}


@dataclass(frozen=True)
class Format:
    """A kind of file: a whole one, how it is read, and how what was read is written.

    `static`  the key of its JSON in the header of a safetensors file; "" for JSON text
    """

    name: str
    content: bytes
    read: Callable[[Path], Any]
    write: Callable[[Path, Any], None]
    static: str = ""

    def json(self) -> dict[str, Any]:
        """All that it holds as JSON, but the digest."""
        return json_of(self.content, self.static)

    def with_json(self, data: dict[str, Any]) -> bytes:
        """The file with other JSON, under a digest that fits."""
        if not self.static:
            return resealed_text(json.dumps({"digest": "0" * 64, **data}, indent=1)).encode()
        header, arrays = read_parts(self.content)
        header["__metadata__"][self.static] = json.dumps(data)
        return from_parts(header, arrays)


def json_of(content: bytes, static: str) -> dict[str, Any]:
    if static:
        return json.loads(read_parts(content)[0]["__metadata__"][static])
    data = json.loads(content)
    del data["digest"]
    return data


def read_text(read: Callable[[str], Any]) -> Callable[[Path], Any]:
    return lambda path: read(path.read_bytes().decode("utf-8", "surrogateescape"))


def write_text(write: Callable[[Any], str]) -> Callable[[Path, Any], None]:
    return lambda path, value: path.write_text(write(value)) and None


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Format]:
    folder = tmp_path_factory.mktemp("whole")
    graph, params = make_graph()
    model = jq.prepare(graph, params, QCONFIG, target=jq.targets.NASH_E)
    model = jq.calibrate(model, [jnp.asarray(np.random.default_rng(8).normal(size=(4, 2, 4, 4)), jnp.float32)])
    state = State(graph, params, QCONFIG, jq.targets.NASH_E, model.qparams, model.params, ImageSettings(crop=4))
    jq.save(folder / "program", jq.lower(model), metadata={"image": '{"crop": 4}', "of": 'a "test"'})
    save_state(folder / "state", state)
    jq.plan.save(folder / "model", model, metadata={"of": 'a "test"'})
    (folder / "plan").write_text(jq.plan.plan_to_json(model.plan))
    (folder / "graph").write_text(jq.graph.graph_to_json(graph))
    readers: dict[str, tuple[Any, ...]] = {
        "program": (jq.load, jq.save, "program"),
        "state": (load_state, save_state, "state"),
        "model": (jq.plan.load, jq.plan.save, "model"),
        "plan": (read_text(jq.plan.plan_from_json), write_text(jq.plan.plan_to_json)),
        "graph": (read_text(jq.graph.graph_from_json), write_text(jq.graph.graph_to_json)),
    }
    return {name: Format(name, (folder / name).read_bytes(), *rest) for name, rest in readers.items()}


NAMES = ("program", "state", "model", "plan", "graph")


def refusal(kind: Format, path: Path, content: bytes) -> str | None:
    """What a reader says about a file; None where it reads it."""
    path.write_bytes(content)
    try:
        kind.read(path)
    except jq.FormatError as error:
        message = str(error)
        assert len(message) < LONGEST, message[:LONGEST]
        assert (str(path) if kind.static else kind.name) in message or "the graph" in message, message
        return message
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def check_damaged(kind: Format, path: Path, contents: Iterator[bytes]) -> None:
    for content in contents:
        if content == kind.content:
            continue
        message = refusal(kind, path, content)
        assert message is not None, "a damaged file was read"
        assert "differs from its digest" in message, message


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_found(formats: dict[str, Format], tmp_path: Path, name: str) -> None:
    kind, rng = formats[name], random.Random(1)
    check_damaged(kind, tmp_path / "damaged", (damaged(kind.content, rng) for _ in range(300)))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_byte_counts(formats: dict[str, Format], tmp_path: Path, name: str) -> None:
    kind, rng = formats[name], random.Random(9)
    bits = (8 * i + rng.randrange(8) for i in range(len(kind.content)))
    check_damaged(kind, tmp_path / "damaged", (flipped(kind.content, bit) for bit in bits))


@pytest.mark.parametrize("name", ["program", "graph"])
def test_the_beginning_counts(formats: dict[str, Format], tmp_path: Path, name: str) -> None:
    """Each bit up to the end of the digest: where a reader looks for it."""
    kind = formats[name]
    check_damaged(kind, tmp_path / "damaged", (flipped(kind.content, i) for i in range(8 * 120)))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read(formats: dict[str, Format], tmp_path: Path, name: str) -> None:
    kind = formats[name]
    assert refusal(kind, tmp_path / "whole", kind.content) is None
    kind.write(tmp_path / "again", kind.read(tmp_path / "whole"))
    assert json_of((tmp_path / "again").read_bytes(), kind.static) == kind.json()


# ---------------------------------------------------------------------------------------------------------------------
# Other values under a digest that fits


def spliced(data: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """JSON with another value at one place: a hostile one, one of another place, its own changed, or none."""
    data = copy.deepcopy(data)
    everywhere = [path for path in places(data) if path]
    path = rng.choice(everywhere)
    parent, key = at(data, path[:-1]), path[-1]
    match rng.choice(("hostile", "hostile", "other", "other", "number", "out", "twice", "deep", "name")):
        case "hostile":
            parent[key] = rng.choice(HOSTILE)
        case "other":
            parent[key] = copy.deepcopy(at(data, rng.choice(everywhere)))
        case "number" if isinstance(parent[key], int | float):
            parent[key] = parent[key] * rng.choice((-1, 2, 1000)) + rng.choice((0, 1, -1))
        case "out":
            del parent[key]
        case "twice" if isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        case "name" if isinstance(parent, dict):
            parent[rng.choice(("x", "", "conv", "ä" * 5000, "\ud800"))] = parent.pop(key)
        case _:
            parent[key] = rng.choice(DEEP)
    return data


def check_spliced(kind: Format, folder: Path, seed: int, count: int) -> None:
    """Each is refused, or what was read is written as the same values, with defaults where something was left out."""
    rng, original, read = random.Random(seed), kind.json(), 0
    for _ in range(count):
        data = spliced(original, rng)
        if refusal(kind, folder / "spliced", kind.with_json(data)) is not None:
            continue
        read += 1
        kind.write(folder / "again", kind.read(folder / "spliced"))
        assert_same(json_of((folder / "again").read_bytes(), kind.static), data)
    assert read < count / 2


def assert_same(again: Any, said: Any, where: str = "file") -> None:
    if isinstance(said, dict) and isinstance(again, dict):
        for key, value in said.items():
            assert key in again or value is None, where  # a qconfig leaves out what is None
            assert_same(again.get(key), value, f"{where}.{key[:40]}")
    elif isinstance(said, list) and isinstance(again, list):
        assert len(said) == len(again), where
        for i, (a, b) in enumerate(zip(again, said, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        short_form = again in ([said], {"dtype": said})  # settings take a number for a list, a dtype for a spec
        assert again == said or short_form or (again != again and said != said), where  # NaN


@pytest.mark.parametrize(
    ("name", "count"), [("program", 120), ("state", 200), ("model", 150), ("plan", 150), ("graph", 200)]
)
def test_other_values_are_refused_or_kept(formats: dict[str, Format], tmp_path: Path, name: str, count: int) -> None:
    check_spliced(formats[name], tmp_path, 2, count)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"), [("program", 1500), ("state", 2500), ("model", 2500), ("plan", 2500), ("graph", 3000)]
)
def test_many_other_values_are_refused_or_kept(
    formats: dict[str, Format], tmp_path: Path, name: str, count: int
) -> None:
    check_spliced(formats[name], tmp_path, 3, count)


# ---------------------------------------------------------------------------------------------------------------------
# Other arrays under a digest that fits


def with_other_array(content: bytes, rng: random.Random) -> bytes:
    """A program or a state, one array of which has another name, dtype, shape or other numbers, or is not there."""
    arrays = arrays_of(content)
    name = rng.choice(list(arrays))
    array = arrays.pop(name)
    match rng.choice(("name", "dtype", "shape", "numbers", "numbers", "number", "out", "other")):
        case "name":
            arrays[rng.choice(("", "x", f"{name}x", "scale:x", "scale:no", "constant:conv:extra", "ä" * 999))] = array
        case "dtype":
            arrays[name] = array.astype(rng.choice((np.float32, np.int8, np.int16, np.int32, np.uint8, np.bool_)))
        case "shape":
            shapes = ([1, *array.shape], array.shape[::-1], [array.size], [*array.shape, 1], [0, *array.shape])
            arrays[name] = np.resize(array, rng.choice(shapes))
        case "numbers" if array.dtype == np.float32:
            arrays[name] = np.full_like(array, rng.choice((0, -1, 1e-9, 1e-45, np.nan, np.inf, -np.inf)))
        case "number" if array.size:
            array.reshape(-1)[rng.randrange(array.size)] = rng.choice((0, 1, -1, 77))
            arrays[name] = array
        case "other":
            arrays[name] = arrays[rng.choice(list(arrays))]
    return with_arrays(content, arrays)


def with_other_header(content: bytes, rng: random.Random) -> bytes:
    """A program or a state whose header says something else of one array, or has other metadata."""
    header, data = read_parts(content)
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry, end = header[name], len(data)
    match rng.choice(("dtype", "shape", "offsets", "garbage", "metadata", "out")):
        case "dtype":
            entry["dtype"] = rng.choice(("F32", "F16", "BF16", "I8", "I16", "I32", "U8", "BOOL", "F64", "F8_E4M3", "X"))
        case "shape":
            entry["shape"] = rng.choice(([0], [-1], [2**40], [2**63], [1, *entry["shape"]], "x", None))
        case "offsets":
            entry["data_offsets"] = rng.choice(([0, 0], [end, 0], [0, 2**63], [-1, 3], [0, end + 4], [], "x"))
        case "garbage":
            header[name] = rng.choice(HOSTILE)
        case "metadata":
            header["__metadata__"][rng.choice(("program", "state", "x", ""))] = rng.choice((*HOSTILE, *map(str, DEEP)))
        case _:
            del header[name]
    return from_parts(header, data)


def check_arrays(kind: Format, folder: Path, contents: Iterator[bytes]) -> None:
    """Each is refused, or what was read is written as the same arrays."""
    for content in contents:
        if refusal(kind, folder / "arrays", content) is not None:
            continue
        kind.write(folder / "again", kind.read(folder / "arrays"))
        again, said = arrays_of((folder / "again").read_bytes()), arrays_of(content)
        assert again.keys() == said.keys()
        for name, array in said.items():
            np.testing.assert_array_equal(again[name], array, strict=True)


OTHER = [with_other_array, with_other_header]


@pytest.mark.parametrize("change", OTHER)
@pytest.mark.parametrize("name", ["program", "state", "model"])
def test_other_arrays_are_refused_or_kept(
    formats: dict[str, Format], tmp_path: Path, name: str, change: Callable[[bytes, random.Random], bytes]
) -> None:
    kind, rng = formats[name], random.Random(4)
    check_arrays(kind, tmp_path, (change(kind.content, rng) for _ in range(100)))


@pytest.mark.slow
@pytest.mark.parametrize("change", OTHER)
@pytest.mark.parametrize("name", ["program", "state", "model"])
def test_many_other_arrays_are_refused_or_kept(
    formats: dict[str, Format], tmp_path: Path, name: str, change: Callable[[bytes, random.Random], bytes]
) -> None:
    kind, rng = formats[name], random.Random(5)
    check_arrays(kind, tmp_path, (change(kind.content, rng) for _ in range(1500)))


# ---------------------------------------------------------------------------------------------------------------------
# Bad cases: numpy's .npz, whose members have check sums of their own


def test_damaged_bad_cases_are_refused_or_the_same(tmp_path: Path) -> None:
    inputs = {"x": np.random.default_rng(5).normal(size=(2, 3)).astype(np.float32)}
    cases = BadCases(inputs, np.array([4, 1]), np.array([0.5, 0.25]), "float", "bit_true", "l1", "y")
    cases.save(tmp_path / "cases.npz")
    whole, rng = (tmp_path / "cases.npz").read_bytes(), random.Random(6)
    for _ in range(300):
        (tmp_path / "damaged.npz").write_bytes(damaged(whole, rng))
        try:
            found = load_bad_cases(tmp_path / "damaged.npz")
        except jq.FormatError:
            continue
        assert (found.a, found.b, found.metric, found.output) == ("float", "bit_true", "l1", "y")
        np.testing.assert_array_equal(found.inputs["x"], inputs["x"], strict=True)
        np.testing.assert_array_equal(found.index, [4, 1])
        np.testing.assert_array_equal(found.error, [0.5, 0.25])
