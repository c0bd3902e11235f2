"""Measuring commands of `benchmarks/` as modules, and data small enough for a test."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]


def load_benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`benchmarks/NAME.py`, with its neighbours and the examples importable while the test runs."""
    for folder in ("examples", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def write_cifar(folder: Path, *, train: int, test: int) -> None:
    """Noise with labels, and a ResNet-20 with random weights, under the names of the real files."""
    from nets import CifarResNet

    rng, parts = np.random.default_rng(0), (("train", train), ("test", test))
    pictures = {f"{part}_x": rng.integers(0, 256, (n, 32, 32, 3), np.uint8) for part, n in parts}
    labels = {f"{part}_y": rng.integers(0, 10, n, np.uint8) for part, n in parts}
    np.savez(folder / "cifar10_jpeg.npz", **pictures, **labels)
    torch.manual_seed(0)
    torch.save(CifarResNet(20).state_dict(), folder / "cifar10_resnet20.pth")
