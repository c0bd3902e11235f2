"""Damage to files: of their bytes, of the entries of an archive, of the values of JSON, and of ONNX models."""

import copy
import io
import json
import random
import zipfile
from collections.abc import Iterator
from typing import Any

HUGE = 2**40

HOSTILE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 255, 2**31, -(2**31), 2**63, 10**400, 0.5, -0.0, 1e-40, 1e308, float("inf"),
    float("nan"), "", "x", "float32", "int8", "int9", "Relu", "\ud800", "\0", "ä" * 5000, [], [[]], [0], [1, 1],
    [-1, -1], ["x"], [None], {}, {"": 0}, {"op": "Relu"}, {"op": "Conv"}, {"op": ["Relu"]}, {"x": "x"}, [0] * 3000,
)  # fmt: skip


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The content with something else in it, taken from it, or cut off it."""
    at, other = rng.randrange(len(content)), rng.randrange(len(content))
    few = rng.randrange(1, 9)
    match rng.choice(("bit", "bit", "bit", "byte", "bytes", "cut", "out", "in", "swap", "zeros", "large", "digits")):
        case "bit":
            return flipped(content, rng.randrange(8 * len(content)))
        case "byte":
            return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
        case "bytes":
            changed = bytearray(content)
            for _ in range(20):
                changed[rng.randrange(len(content))] = rng.randrange(256)
            return bytes(changed)
        case "cut":
            return content[:at]
        case "out":
            return content[:at] + content[at + few :]
        case "in":
            return content[:at] + rng.randbytes(few) + content[at:]
        case "swap":
            return content[:at] + content[other : other + few] + content[at + few :]
        case "large":  # a size field becomes huge
            return content[:at] + (b"\xff" * 7 + b"\x7f")[: len(content[at : at + 8])] + content[at + 8 :]
        case "digits":  # a number in text grows
            digits = [i for i, c in enumerate(content) if 48 <= c < 58] or [at]
            first = rng.choice(digits)
            return content[:first] + b"99999999999" + content[first + 1 :]
        case _:
            return content[:at] + bytes(len(content[at : at + few])) + content[at + few :]


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def in_archive(content: bytes, rng: random.Random) -> bytes:
    """A zip archive that is whole, with one entry damaged: its reader comes to that entry."""
    with zipfile.ZipFile(io.BytesIO(content)) as source:
        entries = [(entry.filename, source.read(entry)) for entry in source.infolist()]
    chosen, made = rng.randrange(len(entries)), io.BytesIO()
    with zipfile.ZipFile(made, "w") as copied:
        for i, (name, data) in enumerate(entries):
            copied.writestr(name, damaged(data, rng) if i == chosen and data else data)
    return made.getvalue()


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def in_json(content: bytes, rng: random.Random) -> bytes:
    """JSON with another value at one place: a hostile one, one of another place, or none."""
    data = json.loads(content)
    everywhere = [path for path in places(data) if path]
    path = rng.choice(everywhere)
    parent, key = at(data, path[:-1]), path[-1]
    match rng.choice(("hostile", "hostile", "other", "out", "name")):
        case "hostile":
            parent[key] = rng.choice(HOSTILE)
        case "other":
            parent[key] = copy.deepcopy(at(data, rng.choice(everywhere)))
        case "name" if isinstance(parent, dict):
            parent[rng.choice(("x", "", "conv", "ä" * 5000))] = parent.pop(key)
        case _:
            del parent[key]
    return json.dumps(data).encode()


def at(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


def in_onnx(content: bytes, rng: random.Random) -> bytes:
    """An ONNX model that still parses: other names, sizes, types, attributes and operators."""
    import onnx

    model = onnx.ModelProto.FromString(content)
    for _ in range(rng.randint(1, 3)):
        _change_onnx(model.graph, rng)
    return model.SerializeToString()


def _change_onnx(graph: Any, rng: random.Random) -> None:
    node = rng.choice(graph.node)
    kind = rng.randrange(8)
    if kind == 0 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(rng.choice(graph.node).output)  # a cycle, perhaps
    elif kind == 1 and node.attribute:
        attribute = rng.choice(node.attribute)
        attribute.i = rng.choice([-1, 0, 3, HUGE, -(2**62)])
        for i in range(len(attribute.ints)):
            attribute.ints[i] = rng.choice([-5, 0, 1, 7, 2**31, HUGE])
    elif kind == 2:
        node.op_type = rng.choice(["Reshape", "Conv", "Expand", "Tile", "Gather", "Resize", "Split", "LSTM", "If"])
    elif kind == 3 and graph.initializer:
        tensor = rng.choice(graph.initializer)
        if tensor.dims:
            tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice([0, -1, 1, 5, HUGE])
    elif kind == 4 and graph.initializer:
        rng.choice(graph.initializer).data_type = rng.randrange(30)
    elif kind == 5:
        dims = graph.input[0].type.tensor_type.shape.dim
        if dims:
            dims[rng.randrange(len(dims))].dim_value = rng.choice([0, -1, 2, 17, HUGE])
    elif kind == 6:
        del node.input[rng.randrange(len(node.input) + 1) :]
    elif node.output:
        node.output[0] = rng.choice(["", "x", rng.choice(graph.node).output[0]])
