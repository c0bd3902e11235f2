"""Networks that `accuracy.py` trains itself, each once: a small ViT on CIFAR-10, an LSTM on the rows of digits.

Weights are kept below `out/trained`; one seed makes them. `python benchmarks/trained.py --data DIR` trains both.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]
import keeping  # noqa: E402
from detectors import Loaded  # noqa: E402
from mnist import load_mnist  # noqa: E402
from mobilenet_v2 import MEAN, STD  # noqa: E402

Augment = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


class Block(nn.Module):
    """Attention and a perceptron, each behind its norm and added to what it reads."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, tokens, width = x.shape
        parts = self.qkv(self.norm1(x)).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        x = x + self.out(mixed.transpose(1, 2).reshape(n, tokens, width))
        return x + self.mlp(self.norm2(x))


class SmallViT(nn.Module):
    """A ViT of 0.3 M parameters: patches of 4 x 4 pixels, 4 blocks, the mean over the tokens (Beyer et al. 2022)."""

    def __init__(self, width: int = 96, depth: int = 4, heads: int = 3, hidden: int = 192) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.places = nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.blocks = nn.Sequential(*(Block(width, heads, hidden) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.blocks(x)).mean(1))


class RowLSTM(nn.Module):
    """Reads a digit row by row; the last state decides."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(28, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def moved(x: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """Pictures, half of them mirrored, all moved by up to 4 pixels alike."""
    x = torch.where(torch.rand(len(x), 1, 1, 1, generator=source) < 0.5, x.flip(3), x)
    top, left = torch.randint(0, 9, (2,), generator=source).tolist()
    return nn.functional.pad(x, (4, 4, 4, 4))[:, :, top : top + x.shape[2], left : left + x.shape[3]]


def trained(
    name: str,
    make: Callable[[], nn.Module],
    x: np.ndarray,
    y: np.ndarray,
    *,
    epochs: int,
    rate: float,
    augment: Augment,
) -> nn.Module:
    """The network with its kept weights, or trained with AdamW and one cycle of the rate, and kept."""
    path = keeping.ROOT / "out" / "trained" / f"{name}.pt"
    torch.manual_seed(0)
    net = make()
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
        return net.eval()
    pictures, labels, source = torch.from_numpy(x), torch.from_numpy(y).long(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.05)
    steps = epochs * -(-len(x) // 100)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), generator=source).split(100):
            loss = nn.functional.cross_entropy(net(augment(pictures[chosen], source)), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(net.state_dict(), part)
    part.replace(path)
    return net.eval()


def small_vit(data: Path, epochs: int = 20) -> Loaded:
    """Test pictures first, which measure; those that train calibrate as well."""
    with np.load(data / "cifar10_jpeg.npz", allow_pickle=False) as file:
        images = np.concatenate([file["test_x"], file["train_x"]])
        labels = np.concatenate([file["test_y"], file["train_y"]]).astype(np.int32)
        free = len(file["test_x"])
    pixels = np.ascontiguousarray(((images.astype(np.float32) / 255 - MEAN) / STD).transpose(0, 3, 1, 2))
    net = trained("small_vit", SmallViT, pixels[free:], labels[free:], epochs=epochs, rate=2e-3, augment=moved)
    return net, pixels, labels, free


def row_lstm(data: Path, epochs: int = 12) -> Loaded:
    """Digits that the example of MNIST holds back measure; the others train and calibrate. DIR is not read."""
    found = load_mnist()
    rows = np.concatenate([found.test_x, found.train_x]).reshape(-1, 28, 28)
    labels, free = np.concatenate([found.test_y, found.train_y]), len(found.test_y)
    net = trained("row_lstm", RowLSTM, rows[free:], labels[free:], epochs=epochs, rate=3e-3, augment=lambda x, _: x)
    return net, rows, labels, free


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    for load in (row_lstm, small_vit):
        start = time.perf_counter()
        net, x, y, free = load(data)
        with torch.no_grad():
            hits = np.concatenate([net(part).argmax(1).numpy() for part in torch.from_numpy(x[:free]).split(250)])
        print(f"{load.__name__}: top-1 {100 * np.mean(hits == y[:free]):.1f} %, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
