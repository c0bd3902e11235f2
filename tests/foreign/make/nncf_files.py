"""Fixtures of NNCF: QDQ files from its post-training quantization of ONNX models. Argument: folder."""

import sys
from pathlib import Path

import nncf
from nets import NETS, run, samples, save

# name: (net, preset); performance is symmetric, mixed has asymmetric activations
FILES = {
    "performance_residual": ("residual", nncf.QuantizationPreset.PERFORMANCE),
    "performance_inverted": ("inverted", nncf.QuantizationPreset.PERFORMANCE),
    "performance_heads": ("heads", nncf.QuantizationPreset.PERFORMANCE),
    "performance_transformer": ("transformer", nncf.QuantizationPreset.PERFORMANCE),
    "mixed_heads": ("heads", nncf.QuantizationPreset.MIXED),
}


def main(folder: Path) -> None:
    for name, (net, preset) in FILES.items():
        data = nncf.Dataset([{"x": samples(net, 4, seed)} for seed in (1, 2)])
        kind = nncf.ModelType.TRANSFORMER if net == "transformer" else None
        model = nncf.quantize(NETS[net](), data, preset=preset, subset_size=2, model_type=kind)
        x = samples(net, 3, 9)
        save(folder, name, model, x, run(model, x))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
