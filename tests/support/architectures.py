"""Small networks of well-known kinds, written here. `ARCHITECTURES`: name -> (module, shapes of its inputs)."""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn


class ConvBn(nn.Sequential):
    def __init__(self, inputs, outputs, kernel=3, stride=1, groups=1, activation=nn.ReLU, dilation=1) -> None:
        layers = [
            nn.Conv2d(inputs, outputs, kernel, stride, dilation * (kernel // 2), dilation, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        super().__init__(*layers, *([activation(inplace=True)] if activation else []))


class BasicBlock(nn.Module):
    def __init__(self, inputs, outputs, stride) -> None:
        super().__init__()
        self.a, self.b = ConvBn(inputs, outputs, stride=stride), ConvBn(outputs, outputs, activation=None)
        same = stride == 1 and inputs == outputs
        self.skip = nn.Identity() if same else ConvBn(inputs, outputs, 1, stride, activation=None)

    def forward(self, x):
        y = self.b(self.a(x))
        y += self.skip(x)
        return F.relu(y, inplace=True)


class ResNet(nn.Module):
    """Basic blocks in four stages."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvBn(3, 8, 7, 2), nn.MaxPool2d(3, 2, 1))
        widths = (8, 8, 16, 24, 32)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(BasicBlock(a, b, 1 if i == 0 else 2), BasicBlock(b, b, 1))
                for i, (a, b) in enumerate(pairwise(widths))
            )
        )
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(32, 10)

    def forward(self, x):
        return self.fc(torch.flatten(self.pool(self.stages(self.stem(x))), 1))


class Excite(nn.Module):
    def __init__(self, channels) -> None:
        super().__init__()
        self.pool, self.down, self.up = nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x):
        return x * F.hardsigmoid(self.up(F.relu(self.down(self.pool(x)))))


class MobileNet(nn.Module):
    """Inverted residuals with squeeze and excite and hardswish, as in version 3."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBn(3, 8, 3, 2, activation=nn.Hardswish)
        self.expand = ConvBn(8, 24, 1, activation=nn.Hardswish)
        self.depthwise = ConvBn(24, 24, 5, 1, 24, nn.Hardswish)
        self.excite = Excite(24)
        self.project = ConvBn(24, 8, 1, activation=None)
        self.head = nn.Sequential(nn.Linear(8, 16), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(16, 5))

    def forward(self, x):
        x = self.stem(x)
        x = x + self.project(self.excite(self.depthwise(self.expand(x))))
        return self.head(x.mean([2, 3]))


class ConvNextBlock(nn.Module):
    def __init__(self, channels) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.up, self.down = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNext(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.Sequential(ConvNextBlock(8), ConvNextBlock(8))
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.norm(self.blocks(self.stem(x)).mean((-2, -1))))


class DenseNet(nn.Module):
    """Every layer sees what all layers before it made."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBn(3, 8, 3, 2)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8 + 4 * i), nn.ReLU(), nn.Conv2d(8 + 4 * i, 4, 3, padding=1)) for i in range(3)
        )
        self.transition = nn.Sequential(nn.Conv2d(20, 10, 1), nn.AvgPool2d(2))
        self.fc = nn.Linear(10, 5)

    def forward(self, x):
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.fc(self.transition(torch.cat(features, 1)).mean((2, 3)))


class ShuffleNet(nn.Module):
    """Halves of the channels, shuffled by a view as in the original code, and by the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBn(3, 8, 3, 2)
        self.branch = nn.Sequential(ConvBn(4, 4, 1), ConvBn(4, 4, 3, groups=4, activation=None), ConvBn(4, 4, 1))
        self.shuffle, self.fc = nn.ChannelShuffle(4), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        for _ in range(2):
            a, b = x.chunk(2, dim=1)
            x = torch.cat((a, self.branch(b)), dim=1)
            n, c, h, w = x.size()
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.fc(self.shuffle(x).mean([2, 3]))


class UNet(nn.Module):
    """One way up by a transposed convolution, one by interpolation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = ConvBn(3, 8), ConvBn(8, 12), ConvBn(12, 16)
        self.up, self.d, self.e = nn.ConvTranspose2d(16, 12, 2, 2), ConvBn(24, 8), ConvBn(16, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        a = self.a(x)
        b = self.b(F.max_pool2d(a, 2))
        c = self.c(F.max_pool2d(b, 2))
        d = self.d(torch.cat([self.up(c), b], 1))
        e = F.interpolate(d, size=a.shape[2:], mode="bilinear", align_corners=False)
        return self.out(self.e(torch.cat([e, a], 1)))


class WindowAttention(nn.Module):
    def __init__(self, channels, heads, window) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.2)
        at = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        between = (at[:, :, None] - at[:, None, :]).permute(1, 2, 0) + window - 1
        self.register_buffer("index", between[..., 0] * (2 * window - 1) + between[..., 1])

    def forward(self, x, mask):
        windows, tokens, channels = x.shape
        qkv = self.qkv(x).reshape(windows, tokens, 3, self.heads, channels // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = (q * (channels // self.heads) ** -0.5) @ k.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(tokens, tokens, self.heads).permute(2, 0, 1)
        scores = scores + bias.unsqueeze(0)
        if mask is not None:
            count = mask.shape[0]
            scores = scores.view(-1, count, self.heads, tokens, tokens) + mask.unsqueeze(1).unsqueeze(0)
            scores = scores.view(-1, self.heads, tokens, tokens)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(windows, tokens, channels))


class SwinBlock(nn.Module):
    def __init__(self, channels, size, window, shift) -> None:
        super().__init__()
        self.size, self.window, self.shift = size, window, shift
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attention = WindowAttention(channels, 2, window)
        self.mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))
        mask = None
        if shift:
            image = torch.zeros(1, size, size, 1)
            parts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
            for i, rows in enumerate(parts):
                for j, columns in enumerate(parts):
                    image[:, rows, columns] = 3 * i + j
            ids = self.partition(image).squeeze(-1)
            mask = (ids[:, None] - ids[:, :, None] != 0).float() * -100.0
        self.register_buffer("mask", mask)

    def partition(self, x):
        n, h, w, c = x.shape
        s = self.window
        return x.view(n, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)

    def forward(self, x):
        _, h, w, c = x.shape
        s = self.window
        y = self.norm1(x)
        if self.shift:
            y = torch.roll(y, shifts=(-self.shift, -self.shift), dims=(1, 2))
        y = self.attention(self.partition(y), self.mask)
        y = y.view(-1, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, h, w, c)
        if self.shift:
            y = torch.roll(y, shifts=(self.shift, self.shift), dims=(1, 2))
        x = x + y
        return x + self.mlp(self.norm2(x))


class Swin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 2, 2)
        self.blocks = nn.Sequential(SwinBlock(8, 8, 4, 0), SwinBlock(8, 8, 4, 2))
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.blocks(self.embed(x).permute(0, 2, 3, 1))
        return self.fc(self.norm(x).flatten(1, 2).mean(1))


class ViT(nn.Module):
    """Class token, positions, encoder layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 17, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.fc(self.norm(self.encoder(x))[:, 0])


class CrossAttention(nn.Module):
    """nn.MultiheadAttention with weights returned, and with keys from elsewhere under a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.cross = (
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.MultiheadAttention(8, 2, batch_first=True),
        )
        self.register_buffer("mask", torch.ones(5, 6).triu(2).bool())

    def forward(self, x, memory):
        y, weights = self.own(x, x, x)
        z, _ = self.cross(y, memory, memory, attn_mask=self.mask, need_weights=False)
        return x + z, weights


class Recurrent(nn.Module):
    def __init__(self, kind, bidirectional, layers) -> None:
        super().__init__()
        self.rnn = kind(6, 8, layers, batch_first=True, bidirectional=bidirectional, dropout=0.1 if layers > 1 else 0.0)
        self.fc = nn.Linear(16 if bidirectional else 8, 4)

    def forward(self, x):
        y, state = self.rnn(x)
        last = state[0] if isinstance(state, tuple) else state
        return self.fc(y.mean(1)), last[-1]


class Video(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d((1, 2, 2)),
            nn.Conv3d(8, 12, (3, 1, 1), padding=(1, 0, 0)), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
            nn.Linear(12, 5),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


class DeepLab(nn.Module):
    """Convolutions of several dilations side by side, one of them over the mean, and bilinear resizing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvBn(3, 8, 3, 2), ConvBn(8, 12, 3, 2))
        self.branches = nn.ModuleList([ConvBn(12, 4, 1), *(ConvBn(12, 4, 3, dilation=d) for d in (2, 3))])
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 4, 1), nn.ReLU())
        self.project, self.out = ConvBn(16, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        size = x.shape[-2:]
        y = self.stem(x)
        pooled = F.interpolate(self.pooled(y), size=y.shape[-2:], mode="bilinear", align_corners=False)
        y = torch.cat([*(b(y) for b in self.branches), pooled], 1)
        return F.interpolate(self.out(self.project(y)), size=size, mode="bilinear", align_corners=False)


class Warping(nn.Module):
    """A spatial transformer: an affine map from the image, then its grid."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(ConvBn(3, 8, 3, 2), ConvBn(8, 8, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.theta, self.out = nn.Linear(8, 6), nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        theta = self.theta(self.features(x)).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return self.out(F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False))


class DecoderBlock(nn.Module):
    def __init__(self, width, heads, length) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.register_buffer("past", torch.tril(torch.ones(length, length)).view(1, 1, length, length))

    def forward(self, x):
        n, t, c = x.shape
        parts = self.qkv(self.norm1(x)).split(c, dim=2)
        q, k, v = (p.view(n, t, self.heads, c // self.heads).transpose(1, 2) for p in parts)
        scores = (q @ k.transpose(-2, -1)) / (c // self.heads) ** 0.5
        scores = scores.masked_fill(self.past[:, :, :t, :t] == 0, float("-inf"))
        y = (F.softmax(scores, dim=-1) @ v).transpose(1, 2).contiguous().view(n, t, c)
        x = x + self.proj(y)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """A language model: token ids in, logits out, the head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(20, 16), nn.Embedding(12, 16)
        self.blocks = nn.ModuleList(DecoderBlock(16, 2, 12) for _ in range(2))
        self.norm, self.head = nn.RMSNorm(16, eps=1e-6), nn.Linear(16, 20, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "resnet": (ResNet, ((3, 64, 64),)),
    "mobilenet_v3": (MobileNet, ((3, 16, 16),)),
    "convnext": (ConvNext, ((3, 16, 16),)),
    "densenet": (DenseNet, ((3, 16, 16),)),
    "shufflenet": (ShuffleNet, ((3, 16, 16),)),
    "unet": (UNet, ((3, 16, 16),)),
    "swin": (Swin, ((3, 16, 16),)),
    "vit": (ViT, ((3, 16, 16),)),
    "cross_attention": (CrossAttention, ((5, 8), (6, 8))),
    "lstm": (lambda: Recurrent(nn.LSTM, True, 2), ((5, 6),)),
    "gru": (lambda: Recurrent(nn.GRU, False, 1), ((5, 6),)),
    "video": (Video, ((3, 4, 8, 8),)),
    "deeplab": (DeepLab, ((3, 32, 32),)),
    "warping": (Warping, ((3, 16, 16),)),
    "decoder": (Decoder, ((9,),)),
}
TOKENS = ("decoder",)  # whose inputs are token ids below 20


def build(name: str) -> nn.Module:
    """In eval mode, with statistics and affine parameters away from 0 and 1."""
    return made(ARCHITECTURES[name][0])


def made(factory: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    module = factory().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_var.copy_(torch.rand(m.running_var.shape, generator=generator) + 0.5)
                m.running_mean.copy_(torch.randn(m.running_mean.shape, generator=generator) * 0.3)
    return module


def inputs(name: str, batch: int, seed: int) -> tuple[torch.Tensor, ...]:
    return drawn(ARCHITECTURES[name][1], batch, seed, tokens=name in TOKENS)


def drawn(shapes: tuple[tuple[int, ...], ...], batch: int, seed: int, *, tokens: bool) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    if tokens:
        return tuple(torch.randint(0, 20, (batch, *s), generator=generator) for s in shapes)
    return tuple(torch.randn(batch, *s, generator=generator) for s in shapes)
