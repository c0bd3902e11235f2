"""ESPNet, a small network for the segmentation of street scenes, with the names of its authors' checkpoint."""

from pathlib import Path

import torch
from torch import nn


class Named(nn.Module):
    """A convolution, batch norm and PReLU under the names of the checkpoint; any of them may be missing."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 0,
        stride: int = 1,
        dilation: int = 1,
        *,
        norm: bool = True,
        act: bool = True,
    ) -> None:
        super().__init__()
        if kernel:
            padding = dilation * (kernel - 1) // 2
            self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False)
        if norm:
            self.bn = nn.BatchNorm2d(outputs, eps=1e-3)
        if act:
            self.act = nn.PReLU(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in ("conv", "bn", "act"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


def plain(inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1) -> Named:
    return Named(inputs, outputs, kernel, stride, dilation, norm=False, act=False)


class Pyramid(nn.Module):
    """An ESP module: with stride 2 a 3x3 reduction, and batch norm and PReLU of its own."""

    def __init__(self, inputs: int, outputs: int, *, down: bool = False, add: bool = True) -> None:
        super().__init__()
        n, self.add = outputs // 5, add and not down
        self.c1 = plain(inputs, n, 3 if down else 1, 2 if down else 1)
        self.d1 = plain(n, outputs - 4 * n, 3)
        self.d2, self.d4, self.d8, self.d16 = (plain(n, n, 3, dilation=d) for d in (2, 4, 8, 16))
        if down:
            self.bn, self.act = nn.BatchNorm2d(outputs, eps=1e-3), nn.PReLU(outputs)
        else:
            self.bn, self.act = Named(outputs, outputs), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.c1(x)
        parts, total = [self.d1(y)], None
        for branch in (self.d2, self.d4, self.d8, self.d16):
            total = branch(y) if total is None else total + branch(y)
            parts.append(total)
        y = torch.cat(parts, 1)
        return self.act(self.bn(x + y if self.add else y))


class EspEncoder(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.level1, self.b1 = Named(3, 16, 3, 2), Named(19, 19)
        self.level2_0, self.level2 = Pyramid(19, 64, down=True), nn.ModuleList([Pyramid(64, 64) for _ in range(2)])
        self.b2, self.level3_0 = Named(131, 131), Pyramid(131, 128, down=True)
        self.level3 = nn.ModuleList([Pyramid(128, 128) for _ in range(8)])
        self.b3, self.classifier = Named(256, 256), plain(256, classes, 1)
        self.shrink = nn.AvgPool2d(3, 2, 1)


class EspNet(nn.Module):
    """The segmentation network of Mehta et al. 2018, p = 2 and q = 8: [N, 3, H, W] -> [N, classes, H, W].

    A reduction, dilated convolutions side by side, sums of them, and the input again at half and quarter size.
    """

    def __init__(self, classes: int = 12) -> None:
        super().__init__()
        self.encoder = EspEncoder(classes)
        self.level3_C, self.br = plain(131, classes, 1), nn.BatchNorm2d(classes, eps=1e-3)
        self.conv = Named(19 + classes, classes, 3)
        self.up_l3 = nn.Sequential(nn.ConvTranspose2d(classes, classes, 2, 2, bias=False))
        two = 2 * classes
        self.combine_l2_l3 = nn.Sequential(Named(two, two), Pyramid(two, classes, add=False))
        self.up_l2 = nn.Sequential(nn.ConvTranspose2d(classes, classes, 2, 2, bias=False), Named(classes, classes))
        self.classifier = nn.ConvTranspose2d(classes, classes, 2, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        e = self.encoder
        half = e.shrink(x)
        first = e.b1(torch.cat([e.level1(x), half], 1))
        start = e.level2_0(first)
        y = start
        for layer in e.level2:
            y = layer(y)
        second = e.b2(torch.cat([y, start, e.shrink(half)], 1))
        start = e.level3_0(second)
        y = start
        for layer in e.level3:
            y = layer(y)
        third = self.up_l3(self.br(e.classifier(e.b3(torch.cat([start, y], 1)))))
        joined = self.up_l2(self.combine_l2_l3(torch.cat([self.level3_C(second), third], 1)))
        return self.classifier(self.conv(torch.cat([joined, first], 1)))


def load_espnet(path: Path, classes: int = 12) -> EspNet:
    """ESPNet with the weights of a state dict, in eval mode."""
    net = EspNet(classes)
    counters = {k: v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")}  # older files lack them
    net.load_state_dict(counters | torch.load(path, map_location="cpu", weights_only=True), strict=True)
    return net.eval()
