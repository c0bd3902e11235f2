"""More networks for images, small and written here: classifiers, dense prediction, detection, generation."""

import torch
import torch.nn.functional as F
from support.architectures import ConvBn, Excite
from torch import nn


class Bottleneck(nn.Module):
    """Of ResNet-50, and with groups of ResNeXt and RegNet."""

    def __init__(self, inputs, width, outputs, stride=1, groups=1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            ConvBn(inputs, width, 1),
            ConvBn(width, width, 3, stride, groups),
            ConvBn(width, outputs, 1, activation=None),
        )
        self.skip = ConvBn(inputs, outputs, 1, stride, activation=None)

    def forward(self, x):
        return F.relu(self.body(x) + self.skip(x))


class Head(nn.Sequential):
    def __init__(self, channels, classes=5) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def bottlenecks(groups=1):
    blocks = [Bottleneck(8, 8, 16, 1, groups), Bottleneck(16, 8, 24, 2, groups), Bottleneck(24, 8, 32, 2, groups)]
    return nn.Sequential(ConvBn(3, 8, 7, 2), nn.MaxPool2d(3, 2, 1), *blocks, Head(32))


def deep_residual(blocks=16):
    """50 layers: three a bottleneck, the stem and the head."""
    body = [Bottleneck(16, 4, 16) for _ in range(blocks)]
    return nn.Sequential(ConvBn(3, 16), *body, Head(16))


def vgg(norm=False):
    layers, before = [], 3
    for width in (8, "pool", 12, "pool", 16, 16, "pool"):
        if width == "pool":
            layers.append(nn.MaxPool2d(2, 2))
            continue
        layers += [nn.Conv2d(before, width, 3, padding=1), *([nn.BatchNorm2d(width)] if norm else []), nn.ReLU(True)]
        before = width
    tail = [
        nn.AdaptiveAvgPool2d((2, 2)),
        nn.Flatten(),
        nn.Linear(64, 16),
        nn.ReLU(True),
        nn.Dropout(),
        nn.Linear(16, 5),
    ]
    return nn.Sequential(*layers, *tail)


def alexnet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, 2, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d((3, 3)), nn.Flatten(), nn.Dropout(0.5), nn.Linear(108, 5),
    )  # fmt: skip


def lenet():
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 8, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(32, 10), nn.Tanh(), nn.Linear(10, 5), nn.LogSoftmax(1),
    )  # fmt: skip


class Fire(nn.Module):
    """SqueezeNet."""

    def __init__(self, inputs, squeeze, expand) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.one, self.three = nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1)


def squeezenet():
    body = [Fire(8, 4, 8), nn.MaxPool2d(3, 2, ceil_mode=True), Fire(16, 4, 8)]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.ReLU(), *body, nn.Conv2d(16, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    )


class Inverted(nn.Module):
    """MobileNetV2, MnasNet and EfficientNet by activation and excitation."""

    def __init__(self, inputs, outputs, stride, activation=nn.ReLU6, excite=False) -> None:
        super().__init__()
        wide = 3 * inputs
        layers = [ConvBn(inputs, wide, 1, activation=activation), ConvBn(wide, wide, 3, stride, wide, activation)]
        layers += [Excite(wide)] if excite else []
        self.body = nn.Sequential(*layers, ConvBn(wide, outputs, 1, activation=None))
        self.same = stride == 1 and inputs == outputs

    def forward(self, x):
        return x + self.body(x) if self.same else self.body(x)


def inverted(activation=nn.ReLU6, excite=False):
    blocks = [Inverted(8, 8, 1, activation, excite), Inverted(8, 12, 2, activation, excite)]
    return nn.Sequential(ConvBn(3, 8, 3, 2, activation=activation), *blocks, Inverted(12, 12, 1, activation), Head(12))


def mobilenet_v1():
    pairs = ((8, 12, 1), (12, 16, 2), (16, 16, 1))
    body = [nn.Sequential(ConvBn(a, a, 3, s, a), ConvBn(a, b, 1)) for a, b, s in pairs]
    return nn.Sequential(ConvBn(3, 8, 3, 2), *body, Head(16))


class Inception(nn.Module):
    def __init__(self, inputs) -> None:
        super().__init__()
        self.one, self.pooled = ConvBn(inputs, 4, 1), ConvBn(inputs, 4, 1)
        self.three = nn.Sequential(ConvBn(inputs, 4, 1), ConvBn(4, 6))
        self.wide = nn.Sequential(nn.Conv2d(inputs, 4, (1, 5), padding=(0, 2)), nn.Conv2d(4, 4, (5, 1), padding=(2, 0)))

    def forward(self, x):
        pooled = self.pooled(F.avg_pool2d(x, 3, 1, 1))
        return torch.cat([self.one(x), self.three(x), F.relu(self.wide(x)), pooled], 1)


class GhostBlock(nn.Module):
    def __init__(self, inputs, outputs) -> None:
        super().__init__()
        self.primary = ConvBn(inputs, outputs // 2, 1)
        self.cheap = ConvBn(outputs // 2, outputs // 2, 3, 1, outputs // 2)

    def forward(self, x):
        x = self.primary(x)
        return torch.cat([x, self.cheap(x)], 1)[:, : 2 * x.shape[1]]


class RepVgg(nn.Module):
    """Three parallel branches, one of them a batch norm alone."""

    def __init__(self, channels) -> None:
        super().__init__()
        self.three, self.one = (ConvBn(channels, channels, k, activation=None) for k in (3, 1))
        self.identity = nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(self.three(x) + self.one(x) + self.identity(x))


class ChannelAttention(nn.Module):
    """CBAM: by channel from mean and maximum, then by place."""

    def __init__(self, channels) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(channels, 4), nn.ReLU(), nn.Linear(4, channels))
        self.place = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x):
        weights = torch.sigmoid(self.mlp(x.mean((2, 3))) + self.mlp(torch.amax(x, (2, 3))))
        x = x * weights[:, :, None, None]
        maps = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
        return x * torch.sigmoid(self.place(maps))


class Mixer(nn.Module):
    """MLP-Mixer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm1, self.norm2 = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8), nn.LayerNorm(8)
        self.tokens = nn.Sequential(nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 16))
        self.channels = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norm2(x))
        return self.fc(x.mean(1))


class PoolFormer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.scale = nn.Conv2d(3, 8, 4, 4), nn.GroupNorm(1, 8), nn.Parameter(torch.ones(8, 1, 1))
        self.mlp, self.head = nn.Sequential(nn.Conv2d(8, 16, 1), nn.GELU(), nn.Conv2d(16, 8, 1)), Head(8)

    def forward(self, x):
        x = self.embed(x)
        y = self.norm(x)
        x = x + self.scale * (F.avg_pool2d(y, 3, 1, 1, count_include_pad=False) - y)
        return self.head(x + self.mlp(self.norm(x)))


class SegFormer(nn.Module):
    """Attention over keys that a strided convolution shortens, then levels fused at one size."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(3, 8, 7, 4, 3), nn.Conv2d(8, 12, 3, 2, 1)])
        self.reduce = nn.ModuleList([nn.Conv2d(8, 8, 2, 2), nn.Conv2d(12, 12, 1)])
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(12)])
        self.attention = nn.ModuleList([nn.MultiheadAttention(c, 2, batch_first=True) for c in (8, 12)])
        self.depthwise = nn.ModuleList([nn.Conv2d(c, c, 3, padding=1, groups=c) for c in (8, 12)])
        self.project, self.out = nn.ModuleList([nn.Linear(8, 8), nn.Linear(12, 8)]), nn.Conv2d(16, 3, 1)

    def forward(self, x):
        levels = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            n, c, h, w = x.shape
            tokens = self.norms[i](x.flatten(2).transpose(1, 2))
            short = self.reduce[i](x).flatten(2).transpose(1, 2)
            tokens = tokens + self.attention[i](tokens, short, short, need_weights=False)[0]
            x = tokens.transpose(1, 2).reshape(n, c, h, w)
            x = x + F.gelu(self.depthwise[i](x))
            level = self.project[i](x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(n, -1, h, w)
            levels.append(F.interpolate(level, size=(8, 8), mode="bilinear", align_corners=False))
        return self.out(torch.cat(levels, 1))


class Detr(nn.Module):
    """Queries that attend to an image: boxes and classes."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.reduce = nn.Sequential(ConvBn(3, 8, 3, 2), ConvBn(8, 12, 3, 2)), nn.Conv2d(12, 8, 1)
        self.queries, self.positions = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(1, 16, 8))
        self.transformer = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
        self.classes, self.boxes = nn.Linear(8, 4), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x):
        tokens = self.reduce(self.backbone(x)).flatten(2).transpose(1, 2) + self.positions
        y = self.transformer(tokens, self.queries.unsqueeze(0).expand(x.shape[0], -1, -1))
        return self.classes(y), self.boxes(y).sigmoid()


class Pyramid(nn.Module):
    """Backbone, feature pyramid, and a head that all levels share: `head` "fcos", "retina" or "ssd"."""

    def __init__(self, head="fcos") -> None:
        super().__init__()
        self.stem = ConvBn(3, 8, 3, 2)
        self.downs = nn.ModuleList([ConvBn(8, 12, 3, 2), ConvBn(12, 16, 3, 2)])
        self.lateral = nn.ModuleList([nn.Conv2d(12, 8, 1), nn.Conv2d(16, 8, 1)])
        self.tower = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU())
        self.scales, self.head = nn.ParameterList([nn.Parameter(torch.ones(1)) for _ in range(2)]), head
        self.classes, self.boxes = nn.Conv2d(8, 3, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.centre = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x):
        low = self.downs[0](self.stem(x))
        high = self.lateral[1](self.downs[1](low))
        low = self.lateral[0](low) + F.interpolate(high, scale_factor=2.0, mode="nearest")
        outputs = []
        for level, scale in zip((low, high), self.scales, strict=True):
            y = self.tower(level)
            if self.head == "fcos":
                outputs += [self.classes(y), F.relu(self.boxes(y) * scale), self.centre(y)]
            elif self.head == "retina":
                outputs += [self.classes(y).sigmoid(), torch.exp(self.boxes(y).clamp(-4, 4))]
            else:
                outputs.append(self.classes(y).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 3))
        return torch.cat(outputs, 1).softmax(-1) if self.head == "ssd" else outputs


class Yolo(nn.Module):
    """Cross-stage blocks, pyramid pooling by repeated maxima, and boxes decoded on a grid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.split = ConvBn(3, 8, 6, 2, activation=nn.SiLU), ConvBn(8, 8, 1, activation=nn.SiLU)
        self.inner, self.join = ConvBn(4, 4, 3, activation=nn.SiLU), ConvBn(12, 8, 1, activation=nn.SiLU)
        self.pool, self.spread = nn.MaxPool2d(5, 1, 2), ConvBn(32, 8, 1, activation=nn.SiLU)
        self.detect = nn.Conv2d(8, 7, 1)
        ys, xs = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
        self.register_buffer("grid", torch.stack([xs, ys]))

    def forward(self, x):
        a, b = self.split(self.stem(x)[:, :, :8, :8]).chunk(2, 1)
        x = self.join(torch.cat([a, b, b + self.inner(b)], 1))
        p1 = self.pool(x)
        p2 = self.pool(p1)
        x = self.detect(self.spread(torch.cat([x, p1, p2, self.pool(p2)], 1)))
        xy = (x[:, :2].sigmoid() * 2 - 0.5 + self.grid) * 8
        wh = (x[:, 2:4].sigmoid() * 2) ** 2
        return torch.cat([xy, wh, x[:, 4:].sigmoid()], 1).flatten(2).transpose(1, 2)


class CentreNet(nn.Module):
    """Heat map whose peaks a max pool finds, and offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(ConvBn(3, 8, 3, 2), nn.ConvTranspose2d(8, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8))
        self.heat, self.offset = nn.Conv2d(8, 3, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        y = F.relu(self.body(x))
        heat = self.heat(y).sigmoid()
        peaks = heat * (F.max_pool2d(heat, 3, 1, 1) == heat).float()
        scores, places = peaks.flatten(1).topk(4, 1)
        return scores, places, self.offset(y)


class PspNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvBn(3, 8, 3, 2), ConvBn(8, 8, 3, 1, dilation=2))
        self.levels = nn.ModuleList([nn.Sequential(nn.AdaptiveAvgPool2d(n), nn.Conv2d(8, 4, 1)) for n in (1, 2, 3)])
        self.out = nn.Conv2d(20, 3, 1)

    def forward(self, x):
        y = self.stem(x)
        maps = [F.interpolate(level(y), y.shape[2:], mode="bilinear", align_corners=True) for level in self.levels]
        return F.interpolate(self.out(torch.cat([y, *maps], 1)), scale_factor=2.0, mode="bilinear", align_corners=True)


class SegNet(nn.Module):
    """LinkNet: encoder outputs are added, not joined; argmax at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = ConvBn(3, 8, 3, 2), ConvBn(8, 12, 3, 2)
        self.up = nn.Sequential(nn.ConvTranspose2d(12, 8, 3, 2, 1, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.out = nn.ConvTranspose2d(8, 4, 2, 2)

    def forward(self, x):
        a = self.a(x)
        y = self.out(self.up(self.b(a)) + a)
        return y, y.argmax(1)


class HighResolution(nn.Module):
    """HRNet: two resolutions that exchange."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = ConvBn(3, 8, 3, 2), ConvBn(8, 12, 3, 2)
        self.high, self.low = ConvBn(8, 8), ConvBn(12, 12)
        self.to_low, self.to_high = ConvBn(8, 12, 3, 2, activation=None), ConvBn(12, 8, 1, activation=None)
        self.out = nn.Conv2d(20, 3, 1)

    def forward(self, x):
        high = self.stem(x)
        low = self.down(high)
        high, low = self.high(high), self.low(low)
        up = F.interpolate(self.to_high(low), scale_factor=2, mode="nearest")
        high, low = F.relu(high + up), F.relu(low + self.to_low(high))
        return self.out(torch.cat([high, F.interpolate(low, size=high.shape[-2:], mode="bilinear")], 1))


class Hourglass(nn.Module):
    """Key points by a soft maximum over each map."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.out = ConvBn(3, 8), ConvBn(8, 8), ConvBn(8, 8), nn.Conv2d(8, 4, 1)
        self.register_buffer("at", torch.arange(16.0))

    def forward(self, x):
        a = self.a(x)
        b = self.b(F.max_pool2d(a, 2))
        maps = self.out(a + F.interpolate(self.c(b), scale_factor=2.0))
        weights = maps.flatten(2).softmax(2).view(maps.shape)
        return (weights.sum(2) * self.at).sum(2), (weights.sum(3) * self.at).sum(2)


class Generator(nn.Module):
    """DCGAN."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(8, 64)
        self.body = nn.Sequential(
            nn.BatchNorm2d(16), nn.ReLU(), nn.ConvTranspose2d(16, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip

    def forward(self, z):
        return self.body(self.start(z).view(-1, 16, 2, 2))


def discriminator():
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 12, 4, 2, 1, bias=False),
        nn.InstanceNorm2d(12, affine=True), nn.LeakyReLU(0.2), nn.Conv2d(12, 1, 4), nn.Sigmoid(),
    )  # fmt: skip


class SuperResolution(nn.Module):
    """EDSR with a pixel shuffle; `prelu` makes it FSRCNN-like."""

    def __init__(self, prelu=False) -> None:
        super().__init__()
        act = nn.PReLU(8) if prelu else nn.ReLU()
        self.head, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), act)
        self.tail = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x):
        x = self.head((x - 0.4) * 2)
        return (self.tail(x + self.body(x) * 0.1) / 2 + 0.4).clamp(0, 1)


class Autoencoder(nn.Module):
    """A variational one in eval: mean, logarithm of the variance, and the picture of the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ELU(), nn.Flatten(), nn.Linear(512, 8))
        self.decode = nn.Sequential(
            nn.Linear(4, 128), nn.Softplus(), nn.Unflatten(1, (8, 4, 4)), nn.Upsample(scale_factor=4)
        )
        self.out = nn.Conv2d(8, 3, 3, padding=1, padding_mode="reflect")

    def forward(self, x):
        mean, log_variance = self.encode(x).chunk(2, 1)
        return self.out(self.decode(mean)).sigmoid(), mean, log_variance.exp()


class StyleNet(nn.Module):
    """Fast style transfer: reflection padding, instance norm, upsampling before convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReflectionPad2d(2), nn.Conv2d(3, 8, 5), nn.InstanceNorm2d(8, affine=True), nn.ReLU(),
            nn.Conv2d(8, 12, 3, 2, 1), nn.InstanceNorm2d(12), nn.ReLU(), nn.Upsample(scale_factor=2),
            nn.Conv2d(12, 3, 1),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


class Stereo(nn.Module):
    """A cost volume over displacements, and the expected one."""

    def __init__(self) -> None:
        super().__init__()
        self.features = ConvBn(3, 8)
        self.register_buffer("steps", torch.arange(4.0).view(1, 4, 1, 1))

    def forward(self, left, right):
        a, b = self.features(left), self.features(right)
        costs = [(a * F.pad(b, (d, 0, 0, 0))[..., : a.shape[-1]]).mean(1) for d in range(4)]
        return (torch.stack(costs, 1).softmax(1) * self.steps).sum(1, keepdim=True)


class Flow(nn.Module):
    """Features of one picture warped by a coarse flow, then a correction."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.coarse, self.fine = (
            ConvBn(3, 6),
            nn.Conv2d(12, 2, 3, padding=1),
            nn.Conv2d(14, 2, 3, padding=1),
        )
        ys, xs = torch.meshgrid(torch.linspace(-1, 1, 12), torch.linspace(-1, 1, 12), indexing="ij")
        self.register_buffer("base", torch.stack([xs, ys], -1).unsqueeze(0))

    def forward(self, first, second):
        a, b = self.features(first), self.features(second)
        flow = self.coarse(torch.cat([a, b], 1)).tanh()
        warped = F.grid_sample(b, self.base + flow.permute(0, 2, 3, 1) * 0.2, align_corners=True, padding_mode="border")
        return flow + self.fine(torch.cat([a, warped, flow], 1))


class Siamese(nn.Module):
    """One network for two pictures, and their normalized distance."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(ConvBn(3, 8, 3, 2), Head(8, 6))

    def forward(self, a, b):
        a, b = F.normalize(self.body(a), dim=1), F.normalize(self.body(b), dim=1)
        return torch.linalg.vector_norm(a - b, dim=1), (a * b).sum(1)


class BirdsEye(nn.Module):
    """Two cameras sampled onto one ground plane by fixed grids."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.out = ConvBn(3, 6, 3, 2), nn.Conv2d(6, 2, 3, padding=1)
        self.register_buffer("grids", torch.rand(2, 1, 5, 5, 2) * 2 - 1)

    def forward(self, left, right):
        planes = [
            F.grid_sample(self.features(x), grid.expand(x.shape[0], -1, -1, -1), align_corners=False)
            for x, grid in zip((left, right), self.grids, strict=True)
        ]
        return self.out(torch.stack(planes, 1).amax(1))


class MaxOut(nn.Module):
    """In-place operators, views and a shared module used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shared, self.fc = nn.Conv2d(3, 8, 3, padding=1), ConvBn(4, 4), nn.Linear(4, 5)

    def forward(self, x):
        x = self.conv(x)
        x = x.view(x.shape[0], 4, 2, 16, 16).amax(2)
        for _ in range(3):
            x = self.shared(x)
            x += 0.1
            x.clamp_(0, 3)
        return self.fc(x.mean(dim=[-1, -2]))


IMAGE = ((3, 16, 16),)
VISION = {
    "resnet50": (bottlenecks, ((3, 32, 32),)),
    "resnext": (lambda: bottlenecks(4), ((3, 32, 32),)),
    "deep_residual": (deep_residual, IMAGE),
    "vgg": (vgg, IMAGE),
    "vgg_bn": (lambda: vgg(True), IMAGE),
    "alexnet": (alexnet, ((3, 24, 24),)),
    "lenet": (lenet, ((1, 20, 20),)),
    "squeezenet": (squeezenet, ((3, 17, 17),)),
    "mobilenet_v1": (mobilenet_v1, IMAGE),
    "mobilenet_v2": (inverted, IMAGE),
    "efficientnet": (lambda: inverted(nn.SiLU, True), IMAGE),
    "mnasnet": (lambda: inverted(nn.ReLU, True), IMAGE),
    "inception": (lambda: nn.Sequential(ConvBn(3, 8, 3, 2), Inception(8), Inception(18), Head(18)), IMAGE),
    "ghostnet": (lambda: nn.Sequential(ConvBn(3, 8, 3, 2), GhostBlock(8, 12), GhostBlock(12, 12), Head(12)), IMAGE),
    "repvgg": (lambda: nn.Sequential(ConvBn(3, 8, 3, 2), RepVgg(8), RepVgg(8), Head(8)), IMAGE),
    "cbam": (lambda: nn.Sequential(ConvBn(3, 8, 3, 2), ChannelAttention(8), Head(8)), IMAGE),
    "mixer": (Mixer, IMAGE),
    "poolformer": (PoolFormer, IMAGE),
    "segformer": (SegFormer, ((3, 32, 32),)),
    "detr": (Detr, IMAGE),
    "fcos": (Pyramid, IMAGE),
    "retinanet": (lambda: Pyramid("retina"), IMAGE),
    "ssd": (lambda: Pyramid("ssd"), IMAGE),
    "yolo": (Yolo, IMAGE),
    "centrenet": (CentreNet, IMAGE),
    "pspnet": (PspNet, IMAGE),
    "linknet": (SegNet, IMAGE),
    "hrnet": (HighResolution, IMAGE),
    "hourglass": (Hourglass, IMAGE),
    "dcgan": (Generator, ((8,),)),
    "discriminator": (discriminator, IMAGE),
    "edsr": (SuperResolution, ((3, 8, 8),)),
    "fsrcnn": (lambda: SuperResolution(True), ((3, 8, 8),)),
    "autoencoder": (Autoencoder, IMAGE),
    "style": (StyleNet, IMAGE),
    "stereo": (Stereo, ((3, 12, 12), (3, 12, 12))),
    "flow": (Flow, ((3, 12, 12), (3, 12, 12))),
    "siamese": (Siamese, ((3, 12, 12), (3, 12, 12))),
    "birds_eye": (BirdsEye, ((3, 12, 12), (3, 12, 12))),
    "in_place": (MaxOut, IMAGE),
}
