"""Reference nets in flax.linen, flax.nnx and plain JAX: small, and as people write them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx


@dataclass(frozen=True)
class Net:
    """A function of params and inputs, its params, and example inputs of a batch of 2."""

    fn: Callable[..., Any]
    params: Any
    inputs: tuple[jax.Array, ...]


def images(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def filled(shapes: Any, seed: int = 1) -> Any:
    """Params of these shapes as after some training: no bias is 0, no scale or variance 1."""
    rng = np.random.default_rng(seed)

    def fill(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        if "kernel" in name:
            value = rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        elif "scale" in name or "var" in name:
            value = rng.uniform(0.8, 1.2, leaf.shape)
        else:
            value = rng.normal(size=leaf.shape) * 0.3
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def linen(module: nn.Module, *inputs: jax.Array) -> Net:
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return Net(module.apply, filled(shapes), inputs)


def nnx_net(module: nnx.Module, *inputs: jax.Array) -> Net:
    module.eval()
    definition, state = nnx.split(module)
    return Net(lambda state, *xs: nnx.merge(definition, state)(*xs), filled(state), inputs)


# ---------------------------------------------------------------------------------------------------------------------
# Convolutional nets


class ResidualBlock(nn.Module):
    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(self.features, (3, 3), (self.stride, self.stride), use_bias=False, name="conv1")(x)
        y = nn.relu(nn.BatchNorm(use_running_average=True, name="bn1")(y))
        y = nn.Conv(self.features, (3, 3), use_bias=False, name="conv2")(y)
        y = nn.BatchNorm(use_running_average=True, name="bn2")(y)
        if x.shape != y.shape:
            x = nn.Conv(self.features, (1, 1), (self.stride, self.stride), use_bias=False, name="shortcut")(x)
            x = nn.BatchNorm(use_running_average=True, name="shortcut_bn")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], use_bias=False, name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="stem_bn")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        x = ResidualBlock(8, name="block1")(x)
        x = ResidualBlock(16, 2, name="block2")(x)
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class InvertedResidual(nn.Module):
    features: int
    expand: int = 2

    @nn.compact
    def __call__(self, x):
        inner = x.shape[-1] * self.expand
        y = nn.Conv(inner, (1, 1), use_bias=False, name="expand")(x)
        y = nn.relu6(nn.BatchNorm(use_running_average=True, name="expand_bn")(y))
        y = nn.Conv(inner, (3, 3), feature_group_count=inner, use_bias=False, name="depthwise")(y)
        y = nn.relu6(nn.BatchNorm(use_running_average=True, name="depthwise_bn")(y))
        y = nn.Conv(self.features, (1, 1), use_bias=False, name="project")(y)
        y = nn.BatchNorm(use_running_average=True, name="project_bn")(y)
        return x + y if x.shape == y.shape else y


class MobileNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu6(nn.Conv(8, (3, 3), (2, 2), name="stem")(x))
        x = InvertedResidual(8, name="block1")(x)
        x = InvertedResidual(12, name="block2")(x)
        x = nn.avg_pool(x, x.shape[1:3])
        return nn.Dense(4, name="head")(x.reshape(x.shape[0], -1))


class SqueezeExcite(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.silu(nn.Conv(8, (3, 3), name="conv")(x))
        gate = jnp.mean(x, axis=(1, 2), keepdims=True)
        gate = nn.sigmoid(nn.Conv(8, (1, 1), name="excite")(nn.silu(nn.Conv(4, (1, 1), name="squeeze")(gate))))
        x = nn.hard_swish(nn.Conv(8, (3, 3), padding="VALID", name="project")(x * gate))
        return nn.Dense(3, name="head")(nn.leaky_relu(x.mean((1, 2))))


class ConvNextBlock(nnx.Module):
    def __init__(self, features: int, rngs: nnx.Rngs):
        self.depthwise = nnx.Conv(features, features, (3, 3), feature_group_count=features, rngs=rngs)
        self.norm = nnx.LayerNorm(features, rngs=rngs)
        self.up = nnx.Linear(features, 2 * features, rngs=rngs)
        self.down = nnx.Linear(2 * features, features, rngs=rngs)
        self.gamma = nnx.Param(jnp.full((features,), 0.5))

    def __call__(self, x):
        y = self.down(nnx.gelu(self.up(self.norm(self.depthwise(x)))))
        return x + self.gamma[...] * y


class ConvNext(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 8, (4, 4), (4, 4), padding="VALID", rngs=rngs)
        self.blocks = nnx.List([ConvNextBlock(8, rngs)])
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.mean((1, 2))))


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        def stage(x, features, name):
            x = nn.Conv(features, (3, 3), name=f"{name}_conv")(x)
            return nn.silu(nn.GroupNorm(num_groups=2, name=f"{name}_norm")(x))

        first = stage(x, 8, "down1")
        second = stage(nn.max_pool(first, (2, 2), (2, 2)), 12, "down2")
        third = stage(nn.avg_pool(second, (2, 2), (2, 2)), 16, "middle")
        up = nn.ConvTranspose(12, (2, 2), (2, 2), name="up2")(third)
        up = stage(jnp.concatenate([up, second], -1), 12, "join2")
        size = (up.shape[0], *first.shape[1:3], up.shape[-1])
        up = stage(jnp.concatenate([jax.image.resize(up, size, "bilinear"), first], -1), 8, "join1")
        return nn.Conv(2, (1, 1), name="head")(up)


class TemporalConv(nnx.Module):
    """One-dimensional, causal and dilated, with a gate."""

    def __init__(self, rngs: nnx.Rngs):
        self.inlet = nnx.Conv(4, 8, (3,), padding="CAUSAL", rngs=rngs)
        self.filter = nnx.Conv(8, 8, (3,), kernel_dilation=(2,), padding="CAUSAL", rngs=rngs)
        self.gate = nnx.Conv(8, 8, (3,), kernel_dilation=(2,), padding="CAUSAL", rngs=rngs)
        self.bn = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.elu(self.inlet(x))
        x = x + nnx.tanh(self.filter(x)) * nnx.sigmoid(self.gate(x))
        return self.head(self.dropout(self.bn(x))[:, -1])


def channels_first(params, x):
    """Plain JAX in the layout of torch, with helpers that are jitted and a custom derivative."""

    @jax.jit
    def conv(x, kernel, bias, stride=1):
        y = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NCHW", "OIHW", "NCHW")
        )
        return y + bias[:, None, None]

    @jax.custom_vjp
    def double(x):
        return 2.0 * x

    double.defvjp(lambda x: (double(x), None), lambda _, g: (g,))
    x = jax.nn.relu(conv(x, params["conv1"]["kernel"], params["conv1"]["bias"]))
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    x = jax.nn.relu(conv(double(x), params["conv2"]["kernel"], params["conv2"]["bias"]))
    x = jnp.sum(x, axis=(2, 3)) / (x.shape[2] * x.shape[3])
    return jax.nn.log_softmax(jnp.einsum("nc,oc->no", x, params["head"]) + 0.5)


# ---------------------------------------------------------------------------------------------------------------------
# Transformers and sequences


class EncoderBlock(nn.Module):
    heads: int = 2
    hidden: int = 24

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=self.heads, name="attention")(y, deterministic=True)
        y = nn.Dense(self.hidden, name="up")(nn.LayerNorm(name="norm2")(x))
        return x + nn.Dense(x.shape[-1], name="down")(nn.gelu(y, approximate=False))


class VisionTransformer(nn.Module):
    features: int = 12
    heads: int = 2
    hidden: int = 24

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.features, (4, 4), (4, 4), padding="VALID", name="patches")(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = self.param("token", nn.initializers.normal(0.5), (1, 1, self.features))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("position", nn.initializers.normal(0.5), (1, x.shape[1], self.features))
        x = EncoderBlock(self.heads, self.hidden, name="block")(x)
        return nn.Dense(5, name="head")(nn.LayerNorm(name="norm")(x)[:, 0])


def _between(outer: int, inner: int, rngs: nnx.Rngs) -> tuple[nnx.Linear, nnx.Linear]:
    return nnx.Linear(outer, inner, rngs=rngs), nnx.Linear(inner, outer, rngs=rngs)


class MixerBlock(nnx.Module):
    def __init__(self, tokens: int, features: int, hidden: tuple[int, int], rngs: nnx.Rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(features, rngs=rngs), nnx.LayerNorm(features, rngs=rngs)
        self.tokens1, self.tokens2 = _between(tokens, hidden[0], rngs)
        self.channels1, self.channels2 = _between(features, hidden[1], rngs)

    def __call__(self, x):
        y = jnp.swapaxes(self.norm1(x), 1, 2)
        x = x + jnp.swapaxes(self.tokens2(nnx.gelu(self.tokens1(y))), 1, 2)
        return x + self.channels2(nnx.gelu(self.channels1(self.norm2(x))))


class Mixer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, tokens: int = 9, features: int = 8, hidden: tuple[int, int] = (8, 16)):
        self.patches = nnx.Conv(3, features, (4, 4), (4, 4), padding="VALID", rngs=rngs)
        self.blocks = nnx.List([MixerBlock(tokens, features, hidden, rngs)])
        self.head = nnx.Linear(features, 4, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class LstmClassifier(nn.Module):
    embedded: int = 6
    hidden: int = 8

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(13, self.embedded, name="embed")(ids)
        x = nn.RNN(nn.OptimizedLSTMCell(self.hidden), name="lstm")(x)
        return nn.Dense(3, name="head")(x[:, -1])


class GruClassifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Bidirectional(nn.RNN(nn.GRUCell(6)), nn.RNN(nn.GRUCell(6)), name="gru")(x)
        return nn.Dense(3, name="head")(x.max(axis=1))


def rotate(x, base: float = 100.0):
    """Rotary position embeddings of [N, T, H, D]."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None].astype(jnp.float32) * base ** (
        -jnp.arange(half).astype(jnp.float32) / half
    )
    sin, cos = jnp.sin(angles)[None, :, None], jnp.cos(angles)[None, :, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class DecoderBlock(nnx.Module):
    def __init__(self, features: int, heads: int, hidden: int, rngs: nnx.Rngs):
        self.heads = heads
        self.norm1, self.norm2 = nnx.RMSNorm(features, rngs=rngs), nnx.RMSNorm(features, rngs=rngs)
        self.qkv = nnx.Linear(features, 3 * features, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(features, features, use_bias=False, rngs=rngs)
        self.gate, self.up = (nnx.Linear(features, hidden, use_bias=False, rngs=rngs) for _ in range(2))
        self.down = nnx.Linear(hidden, features, use_bias=False, rngs=rngs)

    def __call__(self, x):
        n, t, c = x.shape
        q, k, v = jnp.split(self.qkv(self.norm1(x)).reshape(n, t, 3 * self.heads, c // self.heads), 3, axis=2)
        scores = jnp.einsum("bthd,bshd->bhts", rotate(q), rotate(k)) / np.sqrt(c // self.heads).astype(np.float32)
        scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e9)
        y = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1), v).reshape(n, t, c)
        x = x + self.out(y)
        y = self.norm2(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class Decoder(nnx.Module):
    """A tiny language model, its output tied to its embedding."""

    def __init__(self, rngs: nnx.Rngs, features: int = 12, heads: int = 2, hidden: int = 16):
        self.embed = nnx.Embed(17, features, rngs=rngs)
        self.blocks = nnx.List([DecoderBlock(features, heads, hidden, rngs) for _ in range(2)])
        self.norm = nnx.RMSNorm(features, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


def scanned_layers(params, x):
    """Plain JAX: layers stacked in one array, a scan over them with remat inside, and a known branch."""

    def layer(x, weights):
        y = jnp.tanh(x @ weights["in"]["kernel"] + weights["in"]["bias"])
        return x + y @ weights["out"]["kernel"], None

    x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["layers"])
    x = jax.lax.cond(True, jax.nn.softplus, jnp.negative, x)
    return x @ params["head"]["kernel"]


# ---------------------------------------------------------------------------------------------------------------------


def _plain(shapes: Any, seed: int = 2) -> Any:
    rng = np.random.default_rng(seed)
    is_shape = lambda v: isinstance(v, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s) * 0.4, jnp.float32), shapes, is_leaf=is_shape)


def _channels_first() -> Net:
    shapes = {
        "conv1": {"kernel": (6, 3, 3, 3), "bias": (6,)},
        "conv2": {"kernel": (8, 6, 3, 3), "bias": (8,)},
        "head": (4, 8),
    }
    return Net(channels_first, _plain(shapes), (images(2, 3, 8, 8),))


def _scanned() -> Net:
    layers = {"in": {"kernel": (3, 8, 12), "bias": (3, 12)}, "out": {"kernel": (3, 12, 8)}}
    return Net(scanned_layers, _plain({"layers": layers, "head": {"kernel": (8, 4)}}), (images(2, 8),))


def _ids(*shape: int, limit: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(3).integers(0, limit, shape), jnp.int32)


NETS: dict[str, Callable[[], Net]] = {
    "resnet": lambda: linen(ResNet(), images(2, 16, 16, 3)),
    "mobilenet": lambda: linen(MobileNet(), images(2, 12, 12, 3)),
    "squeeze_excite": lambda: linen(SqueezeExcite(), images(2, 8, 8, 3)),
    "convnext": lambda: nnx_net(ConvNext(nnx.Rngs(0)), images(2, 16, 16, 3)),
    "unet": lambda: linen(UNet(), images(2, 8, 8, 3)),
    "temporal_conv": lambda: nnx_net(TemporalConv(nnx.Rngs(0)), images(2, 9, 4)),
    "channels_first": _channels_first,
    "vision_transformer": lambda: linen(VisionTransformer(), images(2, 12, 12, 3)),
    "mixer": lambda: nnx_net(Mixer(nnx.Rngs(0)), images(2, 12, 12, 3)),
    "lstm": lambda: linen(LstmClassifier(), _ids(2, 5, limit=13)),
    "gru": lambda: linen(GruClassifier(), images(2, 4, 5)),
    "decoder": lambda: nnx_net(Decoder(nnx.Rngs(0)), _ids(2, 7, limit=17)),
    "scanned_layers": _scanned,
}
