#!/usr/bin/env bash
# brevitas 0.13.4, torch 2.13.0: preprocess_for_quantize merges batch norms into the convolution before them. A batch
# norm with affine=False, which has no weight and no bias of its own, raises AttributeError instead of counting as 1 and 0.
# Seen: "affine=True: merged, largest difference below 1e-5; affine=False: AttributeError 'NoneType' object has no
# attribute 'data'".
# What follows: a network with such batch norms (XFeat is one) needs weights of 1 and biases of 0 before it is quantized.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 brevitas==0.13.4 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from brevitas.graph.quantize import preprocess_for_quantize
from torch import nn


def merged(affine):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=affine), nn.ReLU()).eval()
    x = torch.randn(2, 3, 8, 8)
    wanted = net(x)
    try:
        found = preprocess_for_quantize(torch.fx.symbolic_trace(net), equalize_iters=0)
    except AttributeError as error:
        return f"AttributeError {error}"
    kinds = [type(module) for module in found.modules()]
    close = float((found(x) - wanted).detach().abs().max()) < 1e-5
    return "merged, largest difference below 1e-5" if nn.BatchNorm2d not in kinds and close else "something else"


found = merged(True), merged(False)
print("affine=True: %s; affine=False: %s" % found)
assert found == (
    "merged, largest difference below 1e-5",
    "AttributeError 'NoneType' object has no attribute 'data'",
), "changed"
PY
