"""Fixtures of onnxruntime: QDQ and QOperator, symmetric and not, int8 and int16, dynamic. Argument: folder."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from nets import NETS, run, run_reference, samples, save
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

SYMMETRIC = {"ActivationSymmetric": True, "WeightSymmetric": True}
S8, U8, S16 = QuantType.QInt8, QuantType.QUInt8, QuantType.QInt16
QDQ, QOPERATOR = QuantFormat.QDQ, QuantFormat.QOperator
# name: (net, format, activations, weights, per channel, options)
STATIC = {
    "qdq_residual": ("residual", QDQ, S8, S8, True, SYMMETRIC),
    "qdq_inverted": ("inverted", QDQ, S8, S8, True, SYMMETRIC),
    "qdq_heads": ("heads", QDQ, S8, S8, False, SYMMETRIC),
    "qdq_transformer": ("transformer", QDQ, S8, S8, True, SYMMETRIC),
    "qdq_int16_residual": ("residual", QDQ, S16, S8, True, SYMMETRIC),
    "qdq_int16_transformer": ("transformer", QDQ, S16, S8, True, SYMMETRIC),
    "qdq_symmetric_uint8_residual": ("residual", QDQ, U8, U8, False, SYMMETRIC),
    "qdq_uint8_residual": ("residual", QDQ, U8, S8, True, {}),
    "qdq_microsoft_heads": ("heads", QDQ, S8, S8, True, SYMMETRIC | {"UseQDQContribOps": True}),
    "qoperator_residual": ("residual", QOPERATOR, S8, S8, True, SYMMETRIC),
    "qoperator_inverted": ("inverted", QOPERATOR, S8, S8, True, SYMMETRIC),
    "qoperator_heads": ("heads", QOPERATOR, S8, S8, True, SYMMETRIC),
    "qoperator_uint8_heads": ("heads", QOPERATOR, U8, S8, False, {}),
    "qoperator_transformer": ("transformer", QOPERATOR, S8, S8, False, SYMMETRIC),
}  # fmt: skip
DYNAMIC = {"dynamic_residual": "residual", "dynamic_transformer": "transformer"}


class Batches(CalibrationDataReader):
    def __init__(self, name: str) -> None:
        self.left = [{"x": samples(name, 4, seed)} for seed in (1, 2)]

    def get_next(self):
        return self.left.pop() if self.left else None


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        source, made = Path(scratch) / "float.onnx", Path(scratch) / "made.onnx"
        for name, (net, form, activations, weights, channels, options) in STATIC.items():
            onnx.save(NETS[net](), source)
            quantize_static(
                source, made, Batches(net), quant_format=form, activation_type=activations, weight_type=weights,
                per_channel=channels, extra_options=options,
            )  # fmt: skip
            write(folder, name, net, made)
        for name, net in DYNAMIC.items():
            onnx.save(NETS[net](), source)
            quantize_dynamic(source, made, weight_type=S8, extra_options={"WeightSymmetric": True})
            write(folder, name, net, made, run_reference)


def write(folder: Path, name: str, net: str, made: Path, by: Callable[..., list[np.ndarray]] = run) -> None:
    x, model = samples(net, 3, 9), onnx.load(made)
    save(folder, name, model, x, by(model, x))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
