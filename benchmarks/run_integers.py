"""Running a net as integers against running it in float, here and in torch: writes RESULTS.md.

python benchmarks/run_integers.py [--rounds 20] [--no-write]

On an accelerator it runs there, and says so; torch stays on the CPU and is then left out.
"""

import argparse
import platform
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jquant as jq
from jquant_converters import from_torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from nets import CifarResNet, MobileNetV2
from results import write_section
from timing import THREADS, Contender, Step, measure, report


class Workload(NamedTuple):
    name: str
    net: torch.nn.Module
    size: int
    batch: int


def workloads() -> list[Workload]:
    cifar, mobile = CifarResNet(20).eval(), MobileNetV2().eval()
    return [
        Workload("ResNet-20, 32 x 32, batch 1", cifar, 32, 1),
        Workload("ResNet-20, 32 x 32, batch 64", cifar, 32, 64),
        Workload("MobileNetV2, 224 x 224, batch 1", mobile, 224, 1),
        Workload("MobileNetV2, 224 x 224, batch 8", mobile, 224, 8),
    ]


def contenders_of(workload: Workload) -> list[Contender]:
    shape = (workload.batch, 3, workload.size, workload.size)
    data = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    graph, raw = from_torch(workload.net, (torch.from_numpy(data[:1]),))
    config = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8())})
    model = jq.prepare(graph, raw, config, target=jq.targets.NASH_E)
    x = jnp.asarray(data)
    model = jq.calibrate(model, [x[:1]])
    program = jq.lower(model)
    own = jax.jit(lambda p, x: jq.apply(model.replace(params=p), x, mode="float"))
    base = f"jquant float, {workload.name}"
    found = [
        Contender(base, _waited(lambda: own(model.params, x)), base),
        Contender(f"jquant integers, {workload.name}", _waited(lambda: jq.run(program, x)), base),
    ]
    if jax.default_backend() == "cpu":
        other = f"torch float, {workload.name}"
        found[0] = found[0]._replace(base=other)
        found.append(Contender(other, lambda: _inferred(workload.net, data), other))
    return found


def _waited(run: Step) -> Step:
    return lambda: jax.block_until_ready(run())


def _inferred(net: torch.nn.Module, data: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        return net(torch.from_numpy(data))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-write", action="store_true", help="do not write RESULTS.md")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("--rounds is at least 1")
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    contenders = [contender for workload in workloads() for contender in contenders_of(workload)]
    table = report(contenders, measure(contenders, options.rounds))
    if not options.no_write:
        device = jax.devices()[0]
        where = f"{THREADS} threads of an {platform.machine()} CPU" if device.platform == "cpu" else device.device_kind
        text = (
            f"## Running integers\n\n`python benchmarks/run_integers.py`: {options.rounds} rounds, {where}; "
            f"jax {jax.__version__}, torch {torch.__version__}. Real numbers in and out.\n\n{table}"
        )
        write_section(f"run_integers {device.platform}", text)


if __name__ == "__main__":
    main()
