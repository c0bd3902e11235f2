"""Quantization by onnxruntime: python onnxruntime_static.py FLOAT.onnx PICTURES.npy OUT.onnx {symmetric,default}."""

import json
import sys
import time

import numpy as np


def main(model: str, pictures: str, out: str, grid: str) -> None:
    images, start = np.load(pictures), time.perf_counter()
    # begin
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self, images: np.ndarray) -> None:
            self.batches = iter([{"x": images[i : i + 25]} for i in range(0, len(images), 25)])

        def get_next(self) -> dict | None:
            return next(self.batches, None)

    symmetric = {"ActivationSymmetric": True, "WeightSymmetric": True} if grid == "symmetric" else {}
    quantize_static(
        model,
        out,
        Reader(images),
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options=symmetric,
    )
    # end
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main(*sys.argv[1:])
