"""A step of QAT against a step of float training, on a CIFAR ResNet-20, here and in two peers: writes RESULTS.md.

python benchmarks/qat_step.py [--batch 32] [--rounds 20] [--no-write]

torch.ao comes with torch; brevitas is measured where it is installed, by
`pip install --no-deps -r benchmarks/requirements.txt`.
Every step has the same batch, cross-entropy, and SGD with momentum. What quantizes batch norm folded is compared with
float training of the folded net, what keeps it with float training that keeps it.
"""

import argparse
import copy
import platform
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import jquant as jq
from jquant_converters import from_torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))
from nets import CifarResNet  # noqa: E402
from results import write_section  # noqa: E402
from timing import THREADS, Contender, Step, measure, report  # noqa: E402


class Data(NamedTuple):
    images: np.ndarray
    labels: np.ndarray


def cross_entropy(logits: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def own_steps(net: torch.nn.Module, data: Data) -> list[Contender]:
    graph, raw = from_torch(net, (torch.zeros(1, 3, 32, 32),))
    batch = jnp.asarray(data.images), jnp.asarray(data.labels)

    def step(quantizer: jq.quantizers.Quantizer, mode: Any, batch_norm: Any = "fold") -> Step:
        spec = {"quantizer": quantizer}
        rules = {"*": jq.Policy(weight=jq.int8(axis="out", **spec), output=jq.int8(**spec))}
        model = jq.prepare(graph, raw, jq.QConfig(rules), target=jq.targets.NASH_E, batch_norm=batch_norm)
        model = jq.calibrate(model, [batch[0]])
        state = jq.TrainState.create(model, tx=optax.sgd(1e-5, momentum=0.9))
        one = jq.training.make_step(cross_entropy, mode=mode)

        def run() -> None:
            nonlocal state
            state, metrics = one(state, batch)
            jax.block_until_ready((state, metrics))

        return run

    folded, live = "jquant float, batch norm folded", "jquant float, batch norm live"
    return [
        Contender(folded, step(jq.fake_quant, "float"), "torch float, batch norm folded", 1.2),
        Contender("jquant fake-quant, folded", step(jq.fake_quant, "fake_quant"), folded, 1.10),
        Contender("jquant LSQ, folded", step(jq.lsq, "fake_quant"), folded, 1.15),
        Contender("jquant bit-true, folded", step(jq.fake_quant, "bit_true"), folded, 1.8),
        Contender(live, step(jq.fake_quant, "float", "live"), "torch float, batch norm live", 1.2),
        Contender("jquant LSQ, live", step(jq.lsq, "fake_quant", "live"), live, 1.15),
    ]


def torch_step(net: torch.nn.Module, data: Data) -> Step:
    images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels).long()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 1e-5, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()

    return run


def folded(net: torch.nn.Module) -> torch.nn.Module:
    """A copy without batch norm, for training."""
    net = copy.deepcopy(net).eval()
    for module in net.modules():
        for conv, norm in (("conv1", "bn1"), ("conv2", "bn2")):
            if hasattr(module, norm):
                fused = torch.nn.utils.fusion.fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm))
                setattr(module, conv, fused)
                setattr(module, norm, torch.nn.Identity())
    return net.train()


def peers(net: torch.nn.Module, data: Data) -> list[Contender]:
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    example = (torch.from_numpy(data.images[:1]),)
    plain, live = "torch float, batch norm folded", "torch float, batch norm live"
    prepared = prepare_qat_fx(copy.deepcopy(net).train(), get_default_qat_qconfig_mapping("x86"), example)
    found = [
        Contender(plain, torch_step(folded(net), data), plain),
        Contender(live, torch_step(copy.deepcopy(net).train(), data), live),
        Contender("torch.ao QAT, live", torch_step(prepared, data), live),
    ]
    if find_spec("brevitas") is not None:
        from brevitas.graph.quantize import preprocess_for_quantize, quantize

        made = quantize(preprocess_for_quantize(folded(net).eval()))
        found.append(Contender("brevitas QAT, folded", torch_step(made.train(), data), plain))
    return found


LIMITS = """What limits the float step against torch's: XLA's convolutions of 16 to 64 channels take about twice as
long as oneDNN's, forward and backward alike. The statistics of live batch norm and their gradients are passes of
their own over every value, a third of the step more."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-write", action="store_true", help="do not write RESULTS.md")
    options = parser.parse_args(argv)
    if options.batch < 1 or options.rounds < 1:
        parser.error("--batch and --rounds are at least 1")
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch.ao is on its way out of torch
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(options.batch, 3, 32, 32)).astype(np.float32)
    data = Data(images, rng.integers(0, 10, options.batch).astype(np.int32))
    net = CifarResNet(20).eval()
    contenders = own_steps(net, data) + peers(net, data)
    table = report(contenders, measure(contenders, options.rounds))
    if not options.no_write:
        text = (
            f"## A step of QAT\n\n`python benchmarks/qat_step.py`: a CIFAR ResNet-20, batch {options.batch}, "
            f"{options.rounds} rounds, {THREADS} threads of an {platform.machine()} CPU; jax {jax.__version__}, "
            f"torch {torch.__version__}.\n\n{table}\n\n{LIMITS}"
        )
        write_section("qat_step", text)


if __name__ == "__main__":
    main()
