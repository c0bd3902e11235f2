"""Fixtures of torchao: PT2E programs, symmetric and as its XNNPACK quantizer has them. Argument: folder."""

import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from torch_nets import build, samples
from torchao.quantization.pt2e import HistogramObserver, PerChannelMinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationSpec
from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
from torchao.testing.pt2e._xnnpack_quantizer_utils import QuantizationConfig

warnings.simplefilter("ignore")


def symmetric() -> QuantizationConfig:
    """Activations with zero point 0; XNNPACK's own are affine, though the function's name says symmetric."""
    value = QuantizationSpec(
        dtype=torch.int8, quant_min=-128, quant_max=127, qscheme=torch.per_tensor_symmetric,
        observer_or_fake_quant_ctr=HistogramObserver,
    )  # fmt: skip
    weight = QuantizationSpec(
        dtype=torch.int8, quant_min=-127, quant_max=127, qscheme=torch.per_channel_symmetric, ch_axis=0,
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver,
    )  # fmt: skip
    return QuantizationConfig(value, value, weight, None)


CONFIGS = {"symmetric": symmetric, "xnnpack": lambda: get_symmetric_quantization_config(is_per_channel=True)}
FILES = [("symmetric", "residual"), ("symmetric", "inverted"), ("symmetric", "heads"), ("xnnpack", "residual")]


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for config, net in FILES:
        x = (samples(net, 4, 1),)
        batch = torch.export.Dim("batch", min=1, max=64)
        exported = torch.export.export(build(net), x, dynamic_shapes=({0: batch},)).module()
        prepared = prepare_pt2e(exported, XNNPACKQuantizer().set_global(CONFIGS[config]()))
        for seed in (1, 2):
            prepared(samples(net, 4, seed))
        converted = convert_pt2e(prepared)
        x = samples(net, 3, 9)
        with torch.no_grad():
            outputs = converted(x)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        program = torch.export.export(converted, (x,), dynamic_shapes=({0: batch},))
        for node in program.graph.nodes:  # the paths of this machine
            node.meta.pop("stack_trace", None)
        torch.export.save(program, folder / f"pt2e_{config}_{net}.pt2")
        arrays = {f"y{i}": y.numpy() for i, y in enumerate(outputs)}
        np.savez_compressed(folder / f"pt2e_{config}_{net}.npz", x=x.numpy(), **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
