"""How far a QDQ model in onnxruntime is from the integer program: `python tests/conformance/qdq.py`.

One node at a time, each with the operands that the QDQ model has, so that no difference is counted twice. The network
has random weights; ONNX computes in float32 and rounds once, the program by mantissa and shift.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from support import architectures
from support import onnx_helpers as helpers

import jquant as jq
from jquant_converters import from_torch

EXACT = jq.targets.NASH_E.with_fields({"rescale.post_rounding": "half_even", "rescale.high_precision": True})
SETTINGS = (
    ("int8", 0, jq.targets.NASH_E, "real scales, the march as it is"),
    ("int8", 0, EXACT, "real scales, half_even and high precision"),
    ("int8", 2, EXACT, "powers of two, half_even and high precision"),
    ("int16", 0, jq.targets.NASH_E, "real scales, the march as it is"),
    ("int16", 0, EXACT, "real scales, half_even and high precision"),
    ("int16", 2, EXACT, "powers of two, half_even and high precision"),
)


def measure(name: str, dtype: str, level: int, target: jq.Target) -> tuple[int, float]:
    """Largest distance in LSB, and the share of values that differ."""
    graph, params = from_torch(architectures.build(name), architectures.inputs(name, 1, seed=0))
    policy = jq.Policy(output=getattr(jq, dtype)(), weight=jq.int8(axis="out"))
    model = jq.prepare(graph, params, jq.config.consistency(jq.QConfig({"*": policy}), level), target=target)
    batches = [jnp.asarray(architectures.inputs(name, 4, seed=s)[0].numpy()) for s in range(2)]
    model = jq.calibrate(model, batches)
    found = helpers.apart(model, [architectures.inputs(name, 3, seed=9)[0].numpy()])
    every = np.concatenate([d.reshape(-1) for d in found.values()])
    return int(every.max()), float((every > 0).mean())


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    print("| network | values | arithmetic | largest distance (LSB) | values that differ (%) |\n|---|---|---|---|---|")
    for network in sys.argv[1:] or ("resnet", "mobilenet_v3"):
        for dtype, level, target, what in SETTINGS:
            largest, share = measure(network, dtype, level, target)
            print(f"| {network} | {dtype} | {what} | {largest} | {100 * share:.2f} |", flush=True)
