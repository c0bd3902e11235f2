"""Quantization by AIMET: python aimet_quantsim.py FLOAT.onnx PICTURES.npy OUT.onnx {symmetric,default}."""

import json
import sys
import time

import numpy as np


def main(model: str, pictures: str, out: str, grid: str) -> None:
    images, start = np.load(pictures), time.perf_counter()
    # begin
    import onnx
    from aimet_onnx import QuantizationSimModel

    sim = QuantizationSimModel(onnx.load(model), param_type="int8", activation_type="int8")
    for name in sim.activation_names if grid == "symmetric" else ():
        sim.qc_quantize_op_dict[name].use_symmetric_encodings = True
    sim.compute_encodings([{"x": images[i : i + 1]} for i in range(len(images))])
    onnx.save(sim.to_onnx_qdq(), out)
    # end
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main(*sys.argv[1:])
