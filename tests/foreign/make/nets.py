"""Tiny float ONNX nets with random weights, as torch exports them. Needs numpy and onnx only."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SEED = 24


class Net:
    """Collects nodes and initializers; each method returns the name of the result."""

    def __init__(self, name: str, opset: int = 17) -> None:
        self.name, self.opset = name, opset
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.draws = np.random.default_rng([SEED, *name.encode()])

    def op(self, kind: str, *inputs: str, out: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, list(inputs), [out], out, **attributes))
        return out

    def tensor(self, name: str, array: object, dtype: object = np.float32) -> str:
        self.tensors.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def weight(self, name: str, *shape: int) -> str:
        fan = int(np.prod(shape[1:]))
        return self.tensor(name, self.draws.normal(size=shape) / np.sqrt(fan))

    def conv(
        self, x: str, name: str, source: int, channels: int, kernel: int = 3, stride: int = 1, group: int = 1
    ) -> str:
        weight = self.weight(f"{name}.weight", channels, source // group, kernel, kernel)
        bias = self.tensor(f"{name}.bias", self.draws.normal(size=channels) * 0.2)
        half = kernel // 2
        return self.op(
            "Conv", x, weight, bias, out=name, kernel_shape=[kernel] * 2, pads=[half] * 4, strides=[stride] * 2,
            group=group,
        )  # fmt: skip

    def gemm(self, x: str, name: str, source: int, channels: int) -> str:
        weight = self.weight(f"{name}.weight", channels, source)
        bias = self.tensor(f"{name}.bias", self.draws.normal(size=channels) * 0.2)
        return self.op("Gemm", x, weight, bias, out=name, transB=1)

    def matmul(self, x: str, name: str, source: int, channels: int) -> str:
        weight = self.tensor(f"{name}.weight", self.draws.normal(size=(source, channels)) / np.sqrt(source))
        return self.op("MatMul", x, weight, out=name)

    def relu6(self, x: str, name: str) -> str:
        low, high = self.tensor(f"{name}.low", 0.0), self.tensor(f"{name}.high", 6.0)
        return self.op("Clip", x, low, high, out=name)

    def norm(self, x: str, name: str, size: int) -> str:
        weight = self.tensor(f"{name}.weight", 1 + 0.2 * self.draws.normal(size=size))
        bias = self.tensor(f"{name}.bias", 0.2 * self.draws.normal(size=size))
        return self.op("LayerNormalization", x, weight, bias, out=name, axis=-1, epsilon=1e-5)

    def model(self, shape: tuple[int, ...], outputs: dict[str, list[int]]) -> onnx.ModelProto:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape])
        made = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", *s]) for n, s in outputs.items()]
        graph = helper.make_graph(self.nodes, self.name, [x], made, self.tensors)
        found = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=9)
        onnx.checker.check_model(found, full_check=True)
        return found


def residual() -> onnx.ModelProto:
    """Convolutions with ReLU whose result is added to another one; pooling and a linear layer."""
    net = Net("residual")
    x = net.op("Relu", net.conv("x", "stem", 3, 6, stride=2), out="stem_relu")
    y = net.op("Relu", net.conv(x, "first", 6, 6), out="first_relu")
    y = net.op("Add", y, x, out="add")
    y = net.op("Relu", net.conv(y, "second", 6, 8, 1), out="second_relu")
    y = net.op("GlobalAveragePool", y, out="pool")
    net.gemm(net.op("Flatten", y, out="flat"), "head", 8, 5)
    return net.model((3, 8, 8), {"head": [5]})


def inverted() -> onnx.ModelProto:
    """An inverted residual with ReLU6, and the functions behind convolutions: HardSwish, LeakyRelu, Sigmoid."""
    net = Net("inverted")
    x = net.op("HardSwish", net.conv("x", "stem", 3, 4, stride=2), out="swish")
    y = net.relu6(net.conv(x, "expand", 4, 8, 1), "expand_relu6")
    y = net.relu6(net.conv(y, "depth", 8, 8, group=8), "depth_relu6")
    y = net.op("Add", net.conv(y, "project", 8, 4, 1), x, out="add")
    y = net.op("LeakyRelu", net.conv(y, "leaky", 4, 6, 1), out="leaky_relu", alpha=0.1)
    y = net.op("Sigmoid", net.conv(y, "last", 6, 4, 1), out="sigmoid")
    return net.model((3, 8, 8), {y: [4, 4, 4]})


def heads() -> onnx.ModelProto:
    """Two heads, with Resize and Concat before them."""
    net = Net("heads")
    x = net.op("Relu", net.conv("x", "stem", 3, 4), out="stem_relu")
    y = net.op("MaxPool", x, out="pool", kernel_shape=[2, 2], strides=[2, 2])
    y = net.op("Relu", net.conv(y, "low", 4, 4), out="low_relu")
    roi, scales = net.tensor("roi", []), net.tensor("scales", [1, 1, 2, 2])
    y = net.op("Resize", y, roi, scales, out="up", mode="nearest", coordinate_transformation_mode="asymmetric",
               nearest_mode="floor")  # fmt: skip
    both = net.op("Concat", x, y, out="cat", axis=1)
    net.op("Sigmoid", net.conv(both, "scores", 8, 2, 1), out="probabilities")
    net.conv(both, "boxes", 8, 4, 1)
    return net.model((3, 8, 8), {"probabilities": [2, 8, 8], "boxes": [4, 8, 8]})


def transformer(opset: int = 20) -> onnx.ModelProto:
    """A pre-norm transformer block of two heads."""
    net = Net("transformer", opset)
    split = net.tensor("split", [0, 6, 2, 4], np.int64)
    joined = net.tensor("joined", [0, 6, 8], np.int64)
    y = net.norm("x", "norm1", 8)
    parts = {}
    for name, perm in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3])):
        part = net.op("Reshape", net.matmul(y, name, 8, 8), split, out=f"{name}_split")
        parts[name] = net.op("Transpose", part, out=f"{name}_heads", perm=perm)
    scores = net.op("MatMul", parts["query"], parts["key"], out="scores")
    scores = net.op("Mul", scores, net.tensor("root", 0.5), out="scaled")
    weights = net.op("Softmax", scores, out="weights", axis=-1)
    mixed = net.op("MatMul", weights, parts["value"], out="mixed")
    mixed = net.op(
        "Reshape", net.op("Transpose", mixed, out="mixed_turned", perm=[0, 2, 1, 3]), joined, out="mixed_joined"
    )
    x = net.op("Add", net.matmul(mixed, "out", 8, 8), "x", out="add1")
    y = net.norm(x, "norm2", 8)
    y = net.op(
        "Add", net.matmul(y, "inner", 8, 16), net.tensor("inner.bias", net.draws.normal(size=16) * 0.2), out="inner_sum"
    )
    y = net.op("Gelu", y, out="gelu")
    net.op("Add", net.matmul(y, "outer", 16, 8), x, out="add2")
    return net.model((6, 8), {"add2": [6, 8]})


NETS = {"residual": residual, "inverted": inverted, "heads": heads, "transformer": transformer}
SHAPES = {"residual": (3, 8, 8), "inverted": (3, 8, 8), "heads": (3, 8, 8), "transformer": (6, 8)}


def samples(name: str, count: int, seed: int = 0) -> np.ndarray:
    """Inputs of a net, [count, ...]."""
    return np.random.default_rng([SEED, seed]).normal(size=(count, *SHAPES[name])).astype(np.float32)


def run(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    """The outputs by onnxruntime with its optimizations off."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})


def run_reference(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    """The outputs by onnx.reference: onnxruntime's product of uint8 and int8 saturates on a CPU without VNNI."""
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x})


def save(folder: object, name: str, model: onnx.ModelProto, x: np.ndarray, outputs: list[np.ndarray]) -> None:
    """The file, and beside it its inputs and the tool's own outputs."""
    from pathlib import Path

    model.ClearField("doc_string")
    for node in model.graph.node:
        node.ClearField("doc_string")
        del node.metadata_props[:]
    for info in model.graph.value_info:
        info.ClearField("doc_string")
        if hasattr(info, "metadata_props"):
            del info.metadata_props[:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    onnx.save(model, Path(folder) / f"{name}.onnx")
    arrays = {f"y{i}": y for i, y in enumerate(outputs)}
    np.savez_compressed(Path(folder) / f"{name}.npz", x=x, **arrays)
