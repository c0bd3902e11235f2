"""Running nets as integers against running them in float, here and elsewhere: writes RESULTS.md.

python benchmarks/run_integers.py [--rounds 20] [--nets ResNet-18] [--no-write]

On an accelerator it runs there, and says so; what runs on the CPU alone is then left out.
"""

import argparse
import copy
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_WAIT_POLICY"] = "passive"  # threads that wait by spinning would take the cores of the next contender

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import torch

import jquant as jq
from jquant_converters import from_torch, to_onnx

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from espnet import EspNet
from keeping import markdown_table
from nets import CifarResNet, MobileNetV2, ResNet
from results import write_section
from timing import THREADS, Contender, Step, measure


class Workload(NamedTuple):
    """`goals`: the largest ratio of our integers to a contender that we want, by its name."""

    name: str
    net: Callable[[], torch.nn.Module]
    shape: tuple[int, int, int, int]
    goals: Mapping[str, float]


OWN, TORCH, ORT, EXACT, FBGEMM = (
    "jquant float", "torch float", "onnxruntime float", "onnxruntime int8 (exact)", "torch int8 (fbgemm)"
)  # fmt: skip
WORKLOADS = (
    Workload("ResNet-20, 32 x 32, batch 1", partial(CifarResNet, 20), (1, 3, 32, 32), {OWN: 0.8, EXACT: 0.4}),
    Workload("ResNet-20, 32 x 32, batch 64", partial(CifarResNet, 20), (64, 3, 32, 32), {}),
    Workload("ResNet-18, batch 1", ResNet, (1, 3, 224, 224), {TORCH: 0.6, OWN: 0.4, EXACT: 0.4}),
    Workload("ResNet-18, batch 8", ResNet, (8, 3, 224, 224), {TORCH: 0.8}),
    Workload("ResNet-50, batch 1", partial(ResNet, 50), (1, 3, 224, 224), {TORCH: 0.65}),
    Workload("MobileNetV2, batch 1", MobileNetV2, (1, 3, 224, 224), {FBGEMM: 0.6, ORT: 1.0, EXACT: 0.4}),
    Workload("MobileNetV2, batch 8", MobileNetV2, (8, 3, 224, 224), {}),
    Workload("ESPNet, 512 x 1024, batch 1", EspNet, (1, 3, 512, 1024), {TORCH: 0.8}),
)


class Made(NamedTuple):
    """A workload as torch has it, as a calibrated model and as integers, and its batch."""

    net: torch.nn.Module
    model: jq.Model
    program: jq.Program
    data: np.ndarray


def made_of(workload: Workload) -> Made:
    data = np.random.default_rng(0).normal(size=workload.shape).astype(np.float32)
    torch.manual_seed(0)
    net = workload.net().eval()
    graph, raw = from_torch(net, (torch.from_numpy(data[:1]),))
    config = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8(observer=jq.observers.min_max()))})
    model = jq.calibrate(jq.prepare(graph, raw, config, target=jq.targets.NASH_E), [jnp.asarray(data)[:1]])
    return Made(net, model, jq.lower(model), data)


def contenders_of(workload: Workload, made: Made) -> list[Contender]:
    """Our integers, which every other one is a base of."""
    net, model, program, data = made
    x = jnp.asarray(data)
    own = jax.jit(lambda p, x: jq.apply(model.replace(params=p), x, mode="float"))
    steps: dict[str, Step] = {OWN: _waited(lambda: own(model.params, x))}
    if jax.default_backend() == "cpu":
        steps |= peers(net, model, data)
    base = f"jquant integers, {workload.name}"
    found = [
        Contender(f"{name}, {workload.name}", step, base, workload.goals.get(name)) for name, step in steps.items()
    ]
    return [Contender(base, _waited(lambda: jq.run(program, x)), base), *found]


def peers(net: torch.nn.Module, model: jq.Model, data: np.ndarray) -> dict[str, Step]:
    """torch in float and, inexact on a CPU without VNNI, in int8; onnxruntime in float, and our file in exact int8."""
    found: dict[str, Step] = {TORCH: lambda: _inferred(net, data)}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.onnx and torch.ao say much about their own parts
        plain, quantized = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        torch.onnx.export(net, (torch.from_numpy(data),), plain, dynamo=True, external_data=False, verbose=False)
        onnx.save(_with_zeros(to_onnx(model)), quantized)
        found[ORT] = _session(plain, data)
        found[EXACT] = _session(quantized, data, exact=True)
        try:
            found[FBGEMM] = _fbgemm(net, data)
        except (RuntimeError, NotImplementedError) as error:  # a layer that torch.ao does not know
            print(f"no {FBGEMM}: {str(error)[:100]}")
    return found


def _with_zeros(model: onnx.ModelProto) -> onnx.ModelProto:
    """The zeros of weights written out: without them onnxruntime's exact mode fails, and the usual one is float."""
    arrays = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        stored = arrays.get(node.input[0]) if node.op_type == "DequantizeLinear" and len(node.input) == 2 else None
        if stored is not None and stored.data_type == onnx.TensorProto.INT8:
            zeros = np.zeros(arrays[node.input[1]].dims, np.int8)
            model.graph.initializer.append(onnx.numpy_helper.from_array(zeros, f"{node.input[0]}:zeros"))
            node.input.append(f"{node.input[0]}:zeros")
    return model


def _session(path: Path, data: np.ndarray, *, exact: bool = False) -> Step:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if exact:  # products of uint8 and int8 would saturate in 16 bits without VNNI
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: data}
    return lambda: session.run(None, feed)


def _fbgemm(net: torch.nn.Module, data: np.ndarray) -> Step:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    torch.backends.quantized.engine = "fbgemm"
    example = (torch.from_numpy(data[:1]),)
    prepared = prepare_fx(copy.deepcopy(net), get_default_qconfig_mapping("fbgemm"), example)
    prepared(*example)
    converted = convert_fx(prepared)
    _inferred(converted, data)
    return lambda: _inferred(converted, data)


def _waited(run: Step) -> Step:
    return lambda: jax.block_until_ready(run())


def _inferred(net: torch.nn.Module, data: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        return net(torch.from_numpy(data))


def integers_over(contenders: list[Contender], times: dict[str, list[float]]) -> list[list[str]]:
    """A row for each contender: the seconds of our integers over its own, and whether the goal is met."""
    found = []
    for name, _, base, goal in contenders:
        if name != base:
            low, middle, high = np.quantile(np.divide(times[base], times[name]), (0.25, 0.5, 0.75))
            other, _, workload = name.partition(", ")
            met = "-" if goal is None else f"{'met' if middle <= goal else 'not met'} ({goal:.2f})"
            ms = 1000 * float(np.median(times[base]))
            found.append([workload, other, f"{middle:.2f}", f"{low:.2f} to {high:.2f}", met, f"{ms:.1f}"])
    return found


COLUMNS = ("net", "our integers over", "ratio", "quarter to three quarters", "goal", "ours, ms")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--nets", default="", help="only workloads whose name begins so")
    parser.add_argument("--no-write", action="store_true", help="do not write RESULTS.md")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("--rounds is at least 1")
    torch.set_num_threads(THREADS)
    found = []
    for workload in WORKLOADS:
        if workload.name.startswith(options.nets):
            contenders = contenders_of(workload, made_of(workload))
            rows = integers_over(contenders, measure(contenders, options.rounds))
            print("\n".join(" | ".join(row) for row in rows), flush=True)
            found += rows
    if not options.no_write:
        device = jax.devices()[0]
        where = f"{THREADS} threads of an {platform.machine()} CPU" if device.platform == "cpu" else device.device_kind
        text = (
            f"## Running integers\n\n`python benchmarks/run_integers.py`: {options.rounds} rounds, {where}; "
            f"jax {jax.__version__}, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}. Real numbers in "
            "and out. A ratio below 1 says that our integers are faster. fbgemm saturates on a CPU without VNNI.\n\n"
        )
        write_section(f"run_integers {device.platform}", text + markdown_table(COLUMNS, found, left=2))


if __name__ == "__main__":
    main()
