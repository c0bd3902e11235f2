"""Quantization by NNCF of a program of torch: python nncf_torch.py FLOAT.pt2 PICTURES.npy OUT.pt2 symmetric."""

import json
import sys
import time

import numpy as np


def main(model: str, pictures: str, out: str, _: str) -> None:
    images, start = np.load(pictures), time.perf_counter()
    # begin
    import nncf
    import torch
    from nncf.common.hardware import qspaces
    from nncf.quantization import advanced_parameters as advanced

    for space in (qspaces.q8_a, qspaces.q8_a_ch):  # tables of what devices have: none of them has signed values alone
        object.__setattr__(space, "signedness_to_force", True)
    signed = advanced.QuantizationParameters(
        mode=advanced.QuantizationMode.SYMMETRIC, per_channel=False, signedness_to_force=True
    )
    found = nncf.quantize(
        torch.export.load(model).module(),
        nncf.Dataset(torch.from_numpy(images).split(1)),
        subset_size=len(images),
        advanced_parameters=advanced.AdvancedQuantizationParameters(
            overflow_fix=advanced.OverflowFix.DISABLE, activations_quantization_params=signed
        ),
    )
    batch = ({0: torch.export.Dim("n", min=1)},)
    torch.export.save(torch.export.export(found, (torch.from_numpy(images[:2]),), dynamic_shapes=batch), out)
    # end
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main(*sys.argv[1:])
