"""Fixtures of AIMET: QDQ files from to_onnx_qdq, and encodings JSON beside float models. Argument: folder."""

import json
import sys
import tempfile
from pathlib import Path

import onnx
from aimet_onnx.quantsim import QuantizationSimModel
from nets import NETS, run, samples, save

VERSIONS = ("0.6.1", "1.0.0", "2.0.0")
# AIMET's own default has asymmetric activations; this one is symmetric throughout.
SYMMETRIC = {
    "defaults": {
        "ops": {"is_output_quantized": "True", "is_symmetric": "True"},
        "params": {"is_quantized": "True", "is_symmetric": "True"},
        "strict_symmetric": "False",
        "unsigned_symmetric": "False",
        "per_channel_quantization": "True",
    },
    "params": {"bias": {"is_quantized": "False"}},
    "op_type": {},
    "supergroups": [{"op_list": ["Conv", "Relu"]}, {"op_list": ["Conv", "Clip"]}],
    "model_input": {"is_input_quantized": "True"},
    "model_output": {},
}
# name: (net, whether symmetric, bits of the weights)
FILES = {
    "residual": ("residual", False, 8),
    "symmetric_residual": ("residual", True, 8),
    "symmetric_inverted": ("inverted", True, 8),
    "symmetric_heads": ("heads", True, 8),
    "symmetric_int4_residual": ("residual", True, 4),
}


def sim_of(net: str, symmetric: bool, bits: int, scratch: str) -> QuantizationSimModel:
    config = Path(scratch) / "config.json"
    config.write_text(json.dumps(SYMMETRIC))
    options = {"config_file": str(config)} if symmetric else {}
    sim = QuantizationSimModel(NETS[net](), param_type=f"int{bits}", activation_type="int8", **options)
    batches = [{"x": samples(net, 4, seed)} for seed in (1, 2)]
    sim.compute_encodings(batches)
    return sim


def main(folder: Path) -> None:
    for name, (net, symmetric, bits) in FILES.items():
        with tempfile.TemporaryDirectory() as scratch:
            sim = sim_of(net, symmetric, bits, scratch)
            x = samples(net, 3, 9)
            outputs = sim.session.run(None, {"x": x})
            if bits == 8:
                model = sim.to_onnx_qdq()
                save(folder, f"qdq_{name}", model, x, run(model, x))
            for version in VERSIONS:
                sim.export(scratch, net, export_model=True, encoding_version=version)
                text = json.loads((Path(scratch) / f"{net}.encodings").read_text())
                (folder / f"float_{name}_{version}.json").write_text(json.dumps(text) + "\n")
            exported = onnx.load(Path(scratch) / f"{net}.onnx")
            save(folder, f"float_{name}", exported, x, outputs)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
