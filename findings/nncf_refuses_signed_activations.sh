#!/usr/bin/env bash
# nncf 3.4.0, ONNX backend: `AdvancedQuantizationParameters(activations_quantization_params=QuantizationParameters(
# signedness_to_force=True))`, symmetric int8 values for a device without unsigned ones, is refused for every one of its
# target devices, since no entry of their tables forces a sign. `signedness_to_force=False` (unsigned) is refused too.
# Seen: "0 of 4 devices take signed values, 0 of 4 unsigned, 4 of 4 the default".
# What follows: a chip with signed values alone cannot be described by the public API.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check nncf==3.4.0 onnx==1.22.0 onnxruntime==1.32.0
"$folder/venv/bin/python" - <<'PY'
import nncf
import numpy as np
from nncf.quantization import advanced_parameters as advanced
from onnx import TensorProto, helper, numpy_helper

rng = np.random.default_rng(0)
weights = [numpy_helper.from_array(rng.normal(size=(4, 4, 1, 1)).astype(np.float32), n) for n in ("a", "b")]
nodes = [
    helper.make_node("Conv", ["x", "a"], ["y"], "first"),
    helper.make_node("Relu", ["y"], ["z"], "relu"),
    helper.make_node("Conv", ["z", "b"], ["out"], "second"),
]
ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4, 8, 8]) for n in ("x", "out")]
graph = helper.make_graph(nodes, "net", ports[:1], ports[1:], weights)
net = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
data = [rng.normal(size=(1, 4, 8, 8)).astype(np.float32) for _ in range(4)]


def is_taken(device, sign):
    """Whether nncf.quantize takes this request for a sign (None: no request)."""
    asked = advanced.QuantizationParameters(mode=advanced.QuantizationMode.SYMMETRIC, signedness_to_force=sign)
    options = advanced.AdvancedQuantizationParameters(activations_quantization_params=asked)
    try:
        nncf.quantize(
            net, nncf.Dataset(data, lambda x: {"x": x}), subset_size=4, target_device=device, advanced_parameters=options
        )
    except ValueError as error:
        assert "HW capabilities" in str(error), error
        return False
    return True


devices = [each for each in nncf.TargetDevice if each is not nncf.TargetDevice.CPU_SPR]  # which has no ONNX backend
found = [sum(is_taken(device, sign) for device in devices) for sign in (True, False, None)]
count = len(devices)
print("%d of %d devices take signed values, %d of %d unsigned, %d of %d the default"
      % (found[0], count, found[1], count, found[2], count))
assert found == [0, 0, count], "changed"
PY
