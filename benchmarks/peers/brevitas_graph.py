"""Quantization by Brevitas: python brevitas_graph.py FLOAT.onnx PICTURES.npy OUT.onnx {symmetric,default}.

It reads FLOAT.py, a class `Net` of torch, and FLOAT.pt, its weights, beside FLOAT.onnx.
"""

import importlib
import json
import sys
import time
from pathlib import Path

import numpy as np


def main(model: str, pictures: str, out: str, grid: str) -> None:
    sys.path.insert(0, str(Path(model).parent))
    images, start = np.load(pictures, allow_pickle=False), time.perf_counter()
    # begin
    import torch
    from brevitas.export import export_onnx_qcdq
    from brevitas.graph import calibrate, quantize
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat
    from torch import nn

    net = importlib.import_module(Path(model).stem).Net().eval()
    net.load_state_dict(torch.load(Path(model).with_suffix(".pt"), weights_only=True))
    net = quantize.preprocess_for_quantize(net, equalize_iters=20)
    layers, values = dict(quantize.COMPUTE_LAYER_MAP), dict(quantize.QUANT_ACT_MAP)
    for kind in (nn.Conv2d, nn.ConvTranspose2d, nn.Linear):
        layers[kind] = (layers[kind][0], layers[kind][1] | {"weight_quant": Int8WeightPerChannelFloat})
    if grid == "symmetric":
        values[nn.ReLU] = (values[nn.ReLU][0], values[nn.ReLU][1] | {"act_quant": Int8ActPerTensorFloat})
    unsigned = () if grid == "symmetric" else quantize.UNSIGNED_ACT_TUPLE
    net = quantize.quantize(net, compute_layer_map=layers, quant_act_map=values, unsigned_act_tuple=unsigned)
    batches = torch.from_numpy(images).split(25)
    for mode in (calibrate.calibration_mode, calibrate.bias_correction_mode):
        with torch.no_grad(), mode(net):
            for batch in batches:
                net(batch)
    shapes = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": {"x": {0: "n"}}}
    export_onnx_qcdq(net.eval(), args=batches[0], export_path=out, opset_version=17, dynamo=False, **shapes)
    # end
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main(*sys.argv[1:])
