"""Every architecture of the tests through import, fake-quant, integers and ONNX: rows, and docs/architectures.md.

    PYTHONPATH=tests python -m support.architecture_table                    # measures what is not measured yet
    PYTHONPATH=tests python -m support.architecture_table --only torch/vit   # some, by a part of their name
    PYTHONPATH=tests python -m support.architecture_table --redo             # again, also what is measured
    PYTHONPATH=tests python -m support.architecture_table --write            # the page alone, from the rows

A row is one line of architectures.jsonl, added when it is finished: a run that was stopped goes on. Networks of
torchvision, timm and transformers are measured where these are installed, at the versions that their rows name.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import torch
from support import architectures, architectures_other, jax_nets, vision_packages
from support.architectures_other import OTHER
from support.architectures_vision import VISION

import jquant as jq
from jquant_converters import from_torch, to_onnx

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent
ROWS = HERE / "architectures.jsonl"
PAGE = TESTS.parent / "docs" / "architectures.md"
MARK = "<!-- what follows is written by tests/support/architecture_table.py -->"
SECONDS = 600  # for one network
INT8 = jq.Policy(output=jq.int8(observer="min_max"), weight=jq.int8(axis="out"))

Loaded = tuple[Any, Any, Callable[[int, int], tuple[Any, ...]]]  # graph, params, inputs of (batch, seed)


@dataclass(frozen=True)
class Net:
    """One row: `load` imports it. `package` is what it needs beside the tests."""

    name: str
    load: Callable[[], Loaded]
    package: str = ""


# ---------------------------------------------------------------------------------------------------------------------
# Where the networks are


def module_of_tests(path: str) -> Any:
    """A test file as a module: networks lie in some."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, TESTS / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of_torch(module: torch.nn.Module, draw: Callable[[int, int], tuple[torch.Tensor, ...]]) -> Loaded:
    def inputs(batch: int, seed: int) -> tuple[Any, ...]:
        drawn = draw(batch, seed)
        return tuple(jnp.asarray((x.int() if x.dtype == torch.int64 else x).numpy()) for x in drawn)

    return *from_torch(module, draw(1, 0)), inputs


def of_jax(make: Callable[[], jax_nets.Net]) -> Loaded:
    net = make()

    def inputs(batch: int, seed: int) -> tuple[Any, ...]:
        rng = np.random.default_rng(seed)
        return tuple(_like(x, batch, rng) for x in net.inputs)

    return *jq.trace(net.fn, net.params, *net.inputs), inputs


def _like(x: jax.Array, batch: int, rng: np.random.Generator) -> jax.Array:
    shape = (batch, *x.shape[1:])
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.asarray(rng.normal(size=shape), x.dtype)
    return jnp.asarray(rng.integers(0, int(x.max()) + 1, shape), x.dtype)


def small_torch() -> Iterator[Net]:
    """The networks that are written in the tests."""
    found = {name: (*pair, name in architectures.TOKENS) for name, pair in architectures.ARCHITECTURES.items()}
    found |= {name: (*pair, False) for name, pair in VISION.items()}
    found |= {name: (*pair, name in architectures_other.TOKENS) for name, pair in OTHER.items()}
    for name, (factory, shapes, tokens) in found.items():

        def load(factory: Any = factory, shapes: Any = shapes, tokens: bool = tokens) -> Loaded:
            made = architectures.made(factory)
            return of_torch(made, lambda batch, seed: architectures.drawn(shapes, batch, seed, tokens=tokens))

        yield Net(f"torch/{name}", load)


def heads() -> Iterator[Net]:
    """Of test_detectors.py, test_flow.py and test_recurrences.py."""
    detectors, flow = module_of_tests("converters/test_detectors.py"), module_of_tests("converters/test_flow.py")

    def load(make: Any, draw: Any) -> Loaded:
        torch.manual_seed(0)
        return of_torch(make().eval(), draw)

    for name, make in detectors.NETS.items():
        yield Net(f"detector/{name}", lambda make=make: load(make, lambda n, seed: (detectors.picture(n, seed),)))
    yield Net("detector/raft", lambda: load(flow.Flow, flow.pictures))


def of_functions() -> Iterator[Net]:
    for name, make in jax_nets.NETS.items():
        yield Net(f"jax/{name}", lambda make=make: of_jax(make))


def of_packages() -> Iterator[Net]:
    """Of torchvision, timm and transformers: their names are known where the packages are not installed."""
    vision, words = (module_of_tests(f"converters/test_{n}.py") for n in ("vision_packages", "transformers"))

    def images(make: Any, side: int) -> Loaded:
        shapes = ((3, side, side),)
        made = architectures.made(make)
        return of_torch(made, lambda n, seed: architectures.drawn(shapes, n, seed, tokens=False))

    def of_torchvision(name: str, side: int) -> Loaded:
        models = vision_packages.load("torchvision").models  # type: ignore[union-attr]
        folder, _, last = name.rpartition(".")
        options: dict[str, Any] = {"weights_backbone": None} if folder else {}
        options |= {"init_weights": False, "aux_logits": False} if last == "googlenet" else {}
        maker = getattr(getattr(models, folder) if folder else models, last)
        return images(lambda: maker(weights=None, **options), side)

    def of_timm(name: str) -> Loaded:
        vision_packages.load("torchvision")
        timm: Any = vision_packages.load("timm")
        return images(lambda: timm.create_model(name, pretrained=False), 64)

    def of_transformers(name: str) -> Loaded:
        vision_packages.load("torchvision")  # which transformers imports for pictures, where it is there
        import transformers

        if name in words.COMPOSED:
            config, shape = words.COMPOSED[name](transformers), words.IMAGES
        else:
            kind, options, shape = words.MODELS[name]
            config = getattr(transformers, f"{kind}Config")(**options)
        module = architectures.made(lambda: words.Plain(getattr(transformers, name)(config)))

        def draw(batch: int, seed: int) -> tuple[torch.Tensor, ...]:
            generator = torch.Generator().manual_seed(seed)
            if isinstance(shape, int):
                return (torch.randint(0, 99, (batch, shape), generator=generator, dtype=torch.int32),)
            return (torch.randn(batch, *shape, generator=generator),)

        return of_torch(module, draw)

    for name in (*words.MODELS, *words.COMPOSED):
        yield Net(f"transformers/{name}", lambda name=name: of_transformers(name), "transformers")
    for name in vision.TIMM:
        yield Net(f"timm/{name}", lambda name=name: of_timm(name), "timm")
    for name, side in vision.TORCHVISION.items():
        yield Net(f"torchvision/{name}", lambda name=name, side=side: of_torchvision(name, side), "torchvision")


def every_net() -> list[Net]:
    """In turn from each source, so that a part of a run is a part of all."""
    packages: dict[str, list[Net]] = {}
    for net in of_packages():
        packages.setdefault(net.package, []).append(net)
    sources = [heads(), small_torch(), of_functions(), *packages.values()]
    return [net for turn in zip_longest(*sources) for net in turn if net is not None]


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


class TooLongError(Exception):
    """A network that took longer than a row may."""


def measured(net: Net) -> dict[str, Any]:
    """The row of a network: what was reached, and why it ended where it did."""
    row: dict[str, Any] = {"net": net.name, "versions": versions(net.package)}
    begun = time.monotonic()
    step = "import"
    try:
        graph, params, inputs = net.load()
        row["import"], row["nodes"], step = "yes", len(graph.nodes), "onnx"
        row["onnx"] = onnx_back(graph, params, inputs(2, 5))
        step = "fake_quant"
        model = jq.prepare(graph, params, int8_of(graph), target=jq.targets.NASH_E)
        model = jq.calibrate(model, [inputs(4, seed) for seed in (1, 2)])
        row["fake_quant"] = signal_to_noise(model, inputs(4, 5))
        step = "integers"
        row["integers"] = equal_reference(model, inputs(1, 5))
    except TooLongError:
        row[step] = f"not within {SECONDS} s"
    except (jq.JQuantError, ValueError, TypeError, IndexError, RuntimeError) as error:
        row[step] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return row | {"seconds": round(time.monotonic() - begun, 1)}


def int8_of(graph: jq.Graph) -> jq.QConfig:
    """int8 everywhere but on the way to sampling grids, which the chip has in int16 alone."""
    return jq.QConfig({"*": INT8, **jq.templates.grid_int16(graph)})


def real(outputs: Any) -> list[np.ndarray]:
    return [np.asarray(y) for y in jax.tree.leaves(outputs) if jnp.issubdtype(y.dtype, jnp.floating)]


def signal_to_noise(model: jq.Model, given: tuple[Any, ...]) -> float | None:
    """Of fake-quant against float, in dB: of the worst output of floats; None where there is none."""
    both = jax.jit(lambda *x: [jq.apply(model, *x, mode=mode) for mode in ("float", "fake_quant")])(*given)
    found = [real(outputs) for outputs in both]
    ratios = []
    for wanted, actual in zip(*found, strict=True):
        noise, power = float(np.square(actual - wanted).mean()), float(np.square(wanted).mean())
        ratios.append(10 * math.log10((power + 1e-30) / (noise + 1e-30)))
    return round(min(ratios), 1) if ratios else None


def equal_reference(model: jq.Model, given: tuple[Any, ...]) -> str:
    """Whether the jitted integers are those of the numpy reference, each bit of each output."""
    program = jq.lower(model)
    fast = jax.tree.leaves(jq.run(program, *given))
    slow = jax.tree.leaves(jq.reference.run(program, *map(np.asarray, given))[0])
    return "yes" if all(np.array_equal(a, b) for a, b in zip(fast, slow, strict=True)) else "no"


def onnx_back(graph: jq.Graph, params: Any, given: tuple[Any, ...]) -> float:
    """The largest difference between the float graph and its ONNX file in onnxruntime, of the largest value."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    written = to_onnx(graph, params).SerializeToString()
    session = onnxruntime.InferenceSession(written, options, providers=["CPUExecutionProvider"])
    feeds = {entry.name: np.asarray(x) for entry, x in zip(session.get_inputs(), given, strict=True)}
    wanted = [
        np.asarray(y) for y in jax.tree.leaves(jax.jit(lambda *x: jq.graph.evaluate_float(graph, params, *x))(*given))
    ]
    worst = 0.0
    for y, expected in zip(session.run(None, feeds), wanted, strict=True):
        largest = max(float(np.abs(expected.astype(np.float64)).max()), 1e-30)
        worst = max(worst, float(np.abs(np.asarray(y, np.float64) - expected).max()) / largest)
    return float(f"{worst:.1e}")


def versions(package: str) -> dict[str, str]:
    return {name: installed(name) for name in ("jax", "torch", *([package] if package else []))}


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def rows() -> dict[str, dict[str, Any]]:
    """{net: its last row}"""
    lines = ROWS.read_text().splitlines() if ROWS.is_file() else []
    return {row["net"]: row for row in map(json.loads, filter(None, lines))}


def _stop(*_: Any) -> None:
    raise TooLongError


def run(nets: Sequence[Net], *, redo: bool) -> None:
    done = {} if redo else rows()
    signal.signal(signal.SIGALRM, _stop)
    for net in nets:
        if net.name in done or (net.package and not installed(net.package)):
            continue
        signal.alarm(SECONDS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                row = measured(net)
            except ImportError as error:  # of a package without what it needs, which says nothing of jquant
                print(f"{net.name}: left out, {error}", flush=True)
                continue
            finally:
                signal.alarm(0)
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)
        jax.clear_caches()


# ---------------------------------------------------------------------------------------------------------------------
# The page

HEAD = ("network", "imports", "fake-quant, dB", "integers equal the reference", "ONNX back")


def page(nets: Sequence[Net]) -> str:
    """docs/architectures.md, from its text above the mark and the rows."""
    known = rows()
    measured_now = [net for net in nets if net.name in known]
    left = [net for net in nets if net.name not in known]
    equal = sum(known[n.name].get("integers") == "yes" for n in measured_now)
    reads = sum(known[n.name].get("import") == "yes" for n in measured_now)
    lines = [
        f"{len(measured_now)} of {len(nets)} networks are measured: {reads} import, and of {equal} the integers equal "
        f"the reference. {len(left)} are not measured yet{_of_packages(left)}.",
        f"Measured with {_versions(known[n.name] for n in measured_now)}.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|" + " --- |" * len(HEAD),
        *("| " + " | ".join(_cells(known[net.name])) + " |" for net in sorted(measured_now, key=lambda n: n.name)),
    ]
    if left:
        lines += ["", "Not measured yet: " + ", ".join(sorted(net.name for net in left)) + "."]
    return f"{PAGE.read_text().partition(MARK)[0]}{MARK}\n\n" + "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    found = [row["net"]]
    for key in ("import", "fake_quant", "integers", "onnx"):
        value = row.get(key, "")
        if key == "fake_quant" and key in row and value is None:
            value = "no float output"
        if isinstance(value, float):
            value = f"{value:.1f}" if key == "fake_quant" else f"{value:.0e}"
        found.append(str(value).replace("|", "\\|"))
    return found


def _of_packages(left: Sequence[Net]) -> str:
    names = [f"{sum(n.package == p for n in left)} of {p}" for p in sorted({n.package for n in left} - {""})]
    return f" ({', '.join(names)})" if names else ""


def _versions(found: Any) -> str:
    pairs = {(name, number) for row in found for name, number in row["versions"].items()}
    return ", ".join(f"{name} {number}" for name, number in sorted(pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="networks whose name has this in it")
    parser.add_argument("--redo", action="store_true", help="measure again what is measured")
    parser.add_argument("--write", action="store_true", help="write the page alone")
    options = parser.parse_args()
    nets = every_net()
    if not options.write:
        run([net for net in nets if options.only in net.name], redo=options.redo)
    PAGE.write_text(page(nets))


if __name__ == "__main__":
    main()
