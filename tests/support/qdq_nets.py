"""QDQ files with a pair, or none, at each place of a small net: every scale of its own."""

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

RANDOM = np.random.default_rng(7)


class Qdq:
    """Collects the nodes of a QDQ file of int8. `pow2`: scales are powers of two."""

    def __init__(self, pow2: bool = True) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.pow2, self.count = pow2, 0
        self.random = np.random.default_rng(3)
        self.scales: dict[str, float] = {}  # {dequantized value: its scale}

    def tensor(self, name: str, array: Any) -> str:
        self.tensors.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def op(self, kind: str, *inputs: str, out: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, list(inputs), [out], out, **attributes))
        return out

    def pair(self, x: str, scale: float, dtype: Any = np.int8, zero: int = 0, domain: str = "") -> str:
        """Behind a pair of QuantizeLinear and DequantizeLinear."""
        self.count += 1
        scale = scale if self.pow2 else scale * (1.0 + 0.137 * self.count)
        at = f"{x}.{self.count}"
        s, z = self.tensor(f"{at}.s", np.float32(scale)), self.tensor(f"{at}.z", np.asarray(zero, dtype))
        self.nodes.append(helper.make_node("QuantizeLinear", [x, s, z], [f"{at}.q"], f"{at}.q", domain=domain))
        self.nodes.append(
            helper.make_node("DequantizeLinear", [f"{at}.q", s, z], [f"{at}.d"], f"{at}.d", domain=domain)
        )
        self.scales[f"{at}.d"] = float(np.float32(scale))
        return f"{at}.d"

    def conv(self, x: str, name: str, x_scale: float, channels: int = 4, source: int = 4, kernel: int = 1) -> str:
        """A convolution with an int8 weight and an int32 bias."""
        half = kernel // 2
        integers = self.random.integers(-60, 60, (channels, source, kernel, kernel)).astype(np.int8)
        w = self.tensor(f"{name}.w", integers)
        steps = np.float32(2.0) ** self.random.integers(-8, -6, channels).astype(np.float32)
        s = self.tensor(f"{name}.s", steps if self.pow2 else steps * np.float32(1.1))
        z = self.tensor(f"{name}.z", np.zeros(channels, np.int8))
        self.nodes.append(helper.make_node("DequantizeLinear", [w, s, z], [f"{name}.wd"], f"{name}.wd", axis=0))
        used = steps if self.pow2 else steps * np.float32(1.1)
        b = self.tensor(f"{name}.b", self.random.integers(-900, 900, channels).astype(np.int32))
        bs = self.tensor(f"{name}.bs", (used * np.float32(x_scale)).astype(np.float32))
        self.nodes.append(helper.make_node("DequantizeLinear", [b, bs], [f"{name}.bd"], f"{name}.bd", axis=0))
        return self.op("Conv", x, f"{name}.wd", f"{name}.bd", out=name, pads=[half] * 4)

    def model(self, outputs: dict[str, int], shape: tuple[int, ...] = (4, 5, 5), opset: int = 21) -> onnx.ModelProto:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape])
        made = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * rank) for n, rank in outputs.items()]
        graph = helper.make_graph(self.nodes, "net", [x], made, self.tensors)
        imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=10)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    """Inputs on a grid finer than every scale of the nets, so that nothing is a tie by accident of rounding."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
