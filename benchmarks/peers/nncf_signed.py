"""NNCF on a signed grid: python nncf_signed.py FLOAT.onnx PICTURES.npy OUT.onnx symmetric."""

import json
import sys
import time

import numpy as np


def main(model: str, pictures: str, out: str, _: str) -> None:
    images, start = np.load(pictures), time.perf_counter()
    # begin
    import nncf
    import onnx
    from nncf.common.hardware import qspaces
    from nncf.onnx.graph.metatypes import groups, onnx_metatypes
    from nncf.quantization import advanced_parameters as advanced

    for space in (qspaces.q8_a, qspaces.q8_a_ch):  # tables of what devices have: none of them has signed values alone
        object.__setattr__(space, "signedness_to_force", True)
    # Out of what fuses with a convolution, into what reads 8 bits: on the chip PReLU is an operator of its own.
    groups.ATOMIC_ACTIVATIONS_OPERATIONS.remove(onnx_metatypes.ONNXPReluMetatype)
    groups.INPUTS_QUANTIZABLE_OPERATIONS.append(onnx_metatypes.ONNXPReluMetatype)
    signed = advanced.QuantizationParameters(
        mode=advanced.QuantizationMode.SYMMETRIC, per_channel=False, signedness_to_force=True
    )
    found = nncf.quantize(
        onnx.load(model),
        nncf.Dataset([images[i : i + 1] for i in range(len(images))], lambda x: {"x": x}),
        subset_size=len(images),
        advanced_parameters=advanced.AdvancedQuantizationParameters(
            overflow_fix=advanced.OverflowFix.DISABLE, activations_quantization_params=signed
        ),
    )
    onnx.save(found, out)
    # end
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main(*sys.argv[1:])
