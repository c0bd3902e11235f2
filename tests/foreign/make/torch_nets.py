"""Tiny torch nets with random weights, for the tools that quantize torch modules."""

import torch
from torch import nn


class Residual(nn.Module):
    """Convolutions with ReLU whose result is added to another one; pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 1, 1), nn.Conv2d(6, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        y = torch.relu(self.first(x)) + x
        y = torch.relu(self.second(y))
        return self.head(torch.nn.functional.adaptive_avg_pool2d(y, 1).flatten(1))


class Inverted(nn.Module):
    """An inverted residual with ReLU6, and functions behind convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.swish = nn.Conv2d(3, 4, 3, 2, 1), nn.Hardswish()
        self.expand, self.depth = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.project, self.leaky = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 6, 1)
        self.relu6, self.leaky_relu = nn.ReLU6(), nn.LeakyReLU(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.swish(self.stem(x))
        y = self.relu6(self.depth(self.relu6(self.expand(x))))
        return self.leaky_relu(self.leaky(self.project(y) + x))


class Heads(nn.Module):
    """Two heads, with resize and concatenation before them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.low = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1)
        self.scores, self.boxes = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.relu(self.stem(x))
        y = torch.relu(self.low(torch.nn.functional.max_pool2d(x, 2)))
        y = torch.nn.functional.interpolate(y, scale_factor=2.0, mode="nearest")
        both = torch.cat([x, y], 1)
        return torch.sigmoid(self.scores(both)), self.boxes(both)


class Mlp(nn.Module):
    """Linear layers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


NETS = {"residual": Residual, "inverted": Inverted, "heads": Heads, "mlp": Mlp}
SHAPES = {"residual": (3, 8, 8), "inverted": (3, 8, 8), "heads": (3, 8, 8), "mlp": (16,)}


def build(name: str) -> nn.Module:
    torch.manual_seed(24)
    return NETS[name]().eval()


def samples(name: str, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *SHAPES[name], generator=torch.Generator().manual_seed(seed))
