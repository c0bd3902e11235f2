"""Post-training quantization by NNCF: python nncf_onnx.py FLOAT.onnx PICTURES.npy OUT.onnx default."""

import json
import sys
import time

import numpy as np


def main(model: str, pictures: str, out: str, _: str) -> None:
    images, start = np.load(pictures), time.perf_counter()
    # begin
    import nncf
    import onnx

    dataset = nncf.Dataset([images[i : i + 1] for i in range(len(images))], lambda x: {"x": x})
    found = nncf.quantize(onnx.load(model), dataset, subset_size=len(images))
    onnx.save(found, out)
    # end
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main(*sys.argv[1:])
