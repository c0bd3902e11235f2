#!/usr/bin/env bash
# torch 2.13.0, torch.ao.quantization: a symmetric quint8 observer has zero point 128, and 127 where the same range, 0 to
# 255, is given explicitly. FakeQuantize always gives it, so symmetric quint8 fake-quant has 127.
# Seen: "default range 128, the same range given 127, FakeQuantize 127; -1 and 1 become -0.9961 and 0.9961".
# What follows: a reader that takes 128 for the sign bit of int8 is off by one step on models prepared with FakeQuantize.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from torch.ao.quantization import FakeQuantize, MinMaxObserver

x = torch.tensor([-1.0, 1.0])
form = {"dtype": torch.quint8, "qscheme": torch.per_tensor_symmetric}


def zero_point(**given):
    observer = MinMaxObserver(**form, **given)
    observer(x)
    return int(observer.calculate_qparams()[1])


fake = FakeQuantize(observer=MinMaxObserver, quant_min=0, quant_max=255, **form)
low, high = fake(x).tolist()
found = zero_point(), zero_point(quant_min=0, quant_max=255), int(fake.zero_point)
print("default range %d, the same range given %d, FakeQuantize %d; " % found + f"-1 and 1 become {low:.4f} and {high:.4f}")
assert found == (128, 127, 127), "changed"
assert (round(low, 4), round(high, 4)) == (-0.9961, 0.9961), "changed"
PY
