"""Damaged files: every one is read or refused by one of jquant's errors, in bounded time and memory."""

import random
import resource
import time
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import jquant as jq
from jquant.types import ConversionError, FormatError, GraphError
from jquant_converters import from_torch, load_state_dict

X = torch.zeros(2, 3, 6, 6)
REFUSED = (FormatError, ConversionError, GraphError)
SECONDS, MEGABYTES = 20.0, 600  # for a file of a few kilobytes, on a machine that does other things as well


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).eval()


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """{suffix: bytes of a good file}, and the graph that state dicts go into."""
    folder = tmp_path_factory.mktemp("good")
    graph, params = from_torch(net(), (X,))
    qconfig = jq.QConfig({"*": jq.Policy(output=jq.int8(), weight=jq.int8(axis="out"))})
    model = jq.prepare(graph, params, qconfig, target=jq.targets.NASH_E)
    model = jq.calibrate(model, [jnp.asarray(np.random.default_rng(0).normal(size=X.shape), jnp.float32)])
    jq.save(folder / "a.jq", jq.lower(model))
    torch.save(net().state_dict(), folder / "a.pt")
    torch.save(net().state_dict(), folder / "b.pt", _use_new_zipfile_serialization=False)
    batch = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(net(), (X,), dynamic_shapes=batch), folder / "a.pt2")
    return {path.name: path.read_bytes() for path in folder.iterdir()}, graph, params


def mutated(data, draw):
    """One damage of many kinds."""
    data, size = bytearray(data), len(data)
    kind = draw.choice(["truncate", "flip", "flips", "zeros", "large", "insert", "delete", "repeat", "swap", "text"])
    at = draw.randrange(size)
    match kind:
        case "truncate":
            del data[at:]
        case "flip":
            data[at] ^= 1 << draw.randrange(8)
        case "flips":
            for _ in range(20):
                data[draw.randrange(size)] = draw.randrange(256)
        case "zeros":
            data[at : at + 16] = bytes(len(data[at : at + 16]))
        case "large":  # a size field becomes huge
            data[at : at + 8] = (b"\xff" * 7 + b"\x7f")[: len(data[at : at + 8])]
        case "insert":
            data[at:at] = draw.randbytes(draw.randrange(1, 64))
        case "delete":
            del data[at : at + draw.randrange(1, 64)]
        case "repeat":
            data[at:at] = data[at : at + 256]
        case "swap":
            other = draw.randrange(size)
            data[at], data[other] = data[other], data[at]
        case "text":  # a number in JSON or a pickle grows
            digits = [i for i, c in enumerate(data) if 48 <= c < 58] or [at]
            data[draw.choice(digits) : draw.choice(digits)] = b"99999999999"
    return bytes(data)


def with_entries_mutated(data, draw, target):
    """An archive that is whole, with one entry damaged: what is inside is reached."""
    target.write_bytes(data)
    with zipfile.ZipFile(target) as source:
        entries = [(entry.filename, source.read(entry)) for entry in source.infolist()]
    chosen = draw.randrange(len(entries))
    with zipfile.ZipFile(target, "w") as copy:
        for i, (name, content) in enumerate(entries):
            copy.writestr(name, mutated(content, draw) if i == chosen and content else content)


def read(path, graph, params):
    if path.suffix == ".jq":
        jq.load(path)
    elif path.suffix == ".pt":
        load_state_dict(graph, params, path, strict=False)
    else:
        from_torch(path)


def fuzz(name, count, originals, folder):
    files, graph, params = originals
    draw = random.Random(name)
    before, outcomes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, {"read": 0, "refused": 0}
    path = folder / name
    for i in range(count):
        if i % 2 and name in ("a.pt", "a.pt2"):
            with_entries_mutated(files[name], draw, path)
        else:
            path.write_bytes(mutated(files[name], draw))
        start = time.perf_counter()
        try:
            read(path, graph, params)
            outcomes["read"] += 1
        except REFUSED:
            outcomes["refused"] += 1
        assert time.perf_counter() - start < SECONDS
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"\n{name}: {outcomes}, {grown:.0f} MB more at the peak")
    assert grown < MEGABYTES
    assert outcomes["refused"] > count // 4


QUICK = {"a.jq": 60, "a.pt": 150, "b.pt": 60, "a.pt2": 40}
FULL = {"a.jq": 700, "a.pt": 800, "b.pt": 500, "a.pt2": 600}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", QUICK)
def test_some_damaged_files(name, originals, tmp_path):
    fuzz(name, QUICK[name], originals, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FULL)
def test_many_damaged_files(name, originals, tmp_path):
    assert sum(FULL.values()) >= 2500
    fuzz(name, FULL[name], originals, tmp_path)


def test_a_tensor_that_is_larger_than_its_file(tmp_path):
    """A view with stride 0 claims any size; copying it would fill the memory."""
    graph, params = from_torch(nn.Linear(3, 2), (torch.zeros(1, 3),))
    state = {"weight": torch.zeros(1).expand(2**20, 2**18), "bias": torch.zeros(2)}
    torch.save(state, tmp_path / "large.pt")
    with pytest.raises(FormatError, match="claims the shape"):
        load_state_dict(graph, params, tmp_path / "large.pt")
