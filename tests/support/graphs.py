"""Graphs for tests: drawn at random by hypothesis, over every operator that lowers."""

from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import jquant as jq
from jquant import ops


@dataclass
class Builder:
    """Appends nodes to a channels-first graph and keeps track of shapes [C, H, W]."""

    seed: int
    nodes: list = field(default_factory=list)
    params: dict = field(default_factory=dict)
    shapes: dict = field(default_factory=dict)

    def array(self, key: str, *shape: int, low: float | None = None) -> str:
        rng = np.random.default_rng([self.seed, len(self.params)])
        value = rng.normal(size=shape) * np.exp(rng.normal(size=(shape[0], *(1,) * (len(shape) - 1)))) * 0.4
        self.params[key] = jnp.asarray(value if low is None else np.abs(value) + low, jnp.float32)
        return key

    def add(self, op: jq.ops.Op, inputs: tuple[str, ...], shape: tuple[int, ...], **roles: str) -> str:
        name = f"n{len(self.nodes)}.{type(op).__name__.lower()}"
        self.nodes.append(jq.Node(name, op, inputs, jq.FrozenMap({r: k.replace("?", name) for r, k in roles.items()})))
        self.shapes[name] = shape
        return name

    def conv(
        self, x: str, out: int, kernel: int, stride: int = 1, dilation: int = 1, groups: int = 1, bias: bool = True
    ) -> str:
        c, h, w = self.shapes[x]
        pad = dilation * (kernel - 1) // 2
        key = f"n{len(self.nodes)}.conv"
        roles = {"weight": self.array(f"{key}.weight", out, c // groups, kernel, kernel)}
        roles |= {"bias": self.array(f"{key}.bias", out)} if bias else {}
        op = ops.Conv(strides=(stride,) * 2, padding=((pad, pad),) * 2, dilation=(dilation,) * 2, groups=groups)
        size = [(n + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for n in (h, w)]
        return self.add(op, (x,), (out, *size), **roles)

    def batch_norm(self, x: str) -> str:
        key, c = f"n{len(self.nodes)}.batchnorm", self.shapes[x][0]
        roles = {
            r: self.array(f"{key}.{r}", c, low=0.3 if r == "running_var" else None)
            for r in ("running_mean", "running_var", "weight", "bias")
        }
        return self.add(ops.BatchNorm(), (x,), self.shapes[x], **roles)

    def prelu(self, x: str) -> str:
        weight = self.array(f"n{len(self.nodes)}.prelu.weight", self.shapes[x][0])
        return self.add(ops.PRelu(), (x,), self.shapes[x], weight=weight)

    def pool(self, cls: type[jq.ops.Op], x: str, kernel: int, stride: int, padding: int, **options: object) -> str:
        c, *size = self.shapes[x]
        dilation = {"dilation": (1, 1)} if cls is ops.MaxPool else {}
        op = cls(kernel=(kernel,) * 2, strides=(stride,) * 2, padding=((padding,) * 2,) * 2, **dilation, **options)
        free = [n + 2 * padding - kernel for n in size]
        if options.get("ceil_mode"):
            out = [-(-f // stride) + 1 for f in free]
            out = [o - ((o - 1) * stride >= n + padding) for o, n in zip(out, size, strict=True)]
        else:
            out = [f // stride + 1 for f in free]
        return self.add(op, (x,), (c, *out))

    def graph(self, *outputs: str, size: int) -> jq.Graph:
        return jq.Graph((jq.Input("x", (None, self.shapes["x"][0], size, size)),), tuple(self.nodes), outputs)


@st.composite
def networks(draw: st.DrawFn) -> tuple[jq.Graph, dict]:
    """A network of four to nine random layers with a classifier, and its parameters."""
    size = draw(st.sampled_from([8, 9, 12]))
    build = Builder(draw(st.integers(0, 2**16)))
    build.shapes["x"] = (draw(st.sampled_from([1, 3, 4])), size, size)
    x = build.conv("x", draw(st.sampled_from([4, 6, 8])), 3, draw(st.integers(1, 2)))
    kinds = (
        "conv",
        "depthwise",
        "grouped",
        "bn",
        "relu",
        "relu6",
        "leaky",
        "sigmoid",
        "prelu",
        "residual",
        "mul",
        "cat",
        "max",
        "avg",
        "pad",
        "scale",
        "dropout",
    )
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=3, max_size=8)):
        x = _layer(build, draw, kind, x)
    c, *_ = build.shapes[x]
    if draw(st.booleans()):
        x = build.add(ops.AdaptiveAvgPool(output_size=(1, 1)), (x,), (c, 1, 1))
        x = build.add(ops.Flatten(), (x,), (c,))
    else:
        x = build.add(ops.Mean(axes=(2, 3)), (x,), (c,))
    weight, bias = build.array("head.weight", 5, c), build.array("head.bias", 5)
    x = build.add(ops.Linear(), (x,), (5,), weight=weight, bias=bias)
    return build.graph(x, size=size), build.params


def _layer(build: Builder, draw: st.DrawFn, kind: str, x: str) -> str:
    c, h, w = build.shapes[x]
    same = (c, h, w)
    match kind:
        case "conv":
            return build.conv(
                x,
                draw(st.sampled_from([4, 6])),
                draw(st.sampled_from([1, 3])),
                draw(st.integers(1, 2)),
                bias=draw(st.booleans()),
            )
        case "depthwise":
            return build.conv(x, c, 3, dilation=draw(st.integers(1, 2)), groups=c)
        case "grouped":
            return build.conv(x, 4, 3, groups=2) if c % 2 == 0 else x
        case "bn":
            return build.batch_norm(x)
        case "relu" | "relu6" | "leaky" | "sigmoid" | "scale" | "dropout":
            op = {
                "relu": ops.Relu(),
                "relu6": ops.Relu6(),
                "leaky": ops.LeakyRelu(negative_slope=0.1),
                "sigmoid": ops.Sigmoid(),
                "scale": ops.Scale(factor=-0.75),
                "dropout": ops.Dropout(rate=0.3),
            }[kind]
            return build.add(op, (x,), same)
        case "prelu":
            return build.prelu(x)
        case "residual":
            y = build.batch_norm(build.conv(x, c, 3))
            x = build.add(ops.Add(), (y, x) if draw(st.booleans()) else (x, y), same)
            return build.add(ops.Relu(), (x,), same) if draw(st.booleans()) else x
        case "mul":
            gate = build.add(ops.Sigmoid(), (build.conv(x, c, 1),), same)
            return build.add(ops.Mul(), (x, gate), same)
        case "cat":
            y = build.conv(x, 2, 1)
            return build.add(ops.Cat(axis=1), (x, y), (c + 2, h, w))
        case "max" if min(h, w) >= 3:
            return build.pool(ops.MaxPool, x, 3, 2, draw(st.integers(0, 1)), ceil_mode=draw(st.booleans()))
        case "avg" if min(h, w) >= 3:
            options = {"ceil_mode": draw(st.booleans()), "count_include_pad": draw(st.booleans())}
            return build.pool(ops.AvgPool, x, 3, 2, draw(st.integers(0, 1)), **options)
        case "pad":
            padding = ((0, 0), (0, 0), (1, 0), (0, 2))
            return build.add(ops.Pad(padding=padding, value=0.5), (x,), (c, h + 1, w + 2))
    return x


def images(seed: int, graph: jq.Graph, batch: int = 3) -> jnp.ndarray:
    """A float32 batch for a graph with one input."""
    shape = (batch, *graph.inputs[0].shape[1:])
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
