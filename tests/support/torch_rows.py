"""Quantized torch modules for the table of other tools, made where it is measured: the tests need torch anyway."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import (
    DeQuantStub,
    FakeQuantize,
    MinMaxObserver,
    QConfig,
    QConfigMapping,
    QuantStub,
    convert,
    default_per_channel_weight_observer,
    disable_observer,
    prepare,
)
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx, prepare_qat_fx

SYMMETRIC = MinMaxObserver.with_args(dtype=torch.quint8, qscheme=torch.per_tensor_symmetric)  # zero point 128
WEIGHT_FAKE_QUANT = FakeQuantize.with_args(
    observer=MinMaxObserver, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, quant_min=-128, quant_max=127
)
VALUE_FAKE_QUANT = FakeQuantize.with_args(  # fx makes none of qint8; zero point 127, see docs/other-tools.md
    observer=MinMaxObserver, dtype=torch.quint8, qscheme=torch.per_tensor_symmetric, quant_min=0, quant_max=255
)


class Residual(nn.Module):
    """Convolutions with ReLU, an addition, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        return self.head((torch.relu(self.first(x)) + x).flatten(1))


class Eager(nn.Module):
    """The same with the stubs and FloatFunctional that eager mode asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant, self.sum = QuantStub(), DeQuantStub(), FloatFunctional()
        self.stem, self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(self.quant(x))
        return self.dequant(self.head(self.sum.add(self.first(x), x).flatten(1)))


@contextmanager
def exact_kernels() -> Iterator[None]:
    """QNNPACK adds in int32; fbgemm's sums of pairs saturate at 16 bits on a CPU without VNNI."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "qnnpack"
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def _calibrated(made: Any) -> Any:
    made(torch.randn(8, 3, 4, 4))
    return made.eval().apply(disable_observer)


def _fx(of: Callable[..., Any]) -> tuple[Any, Any]:
    qconfig = QConfig(activation=SYMMETRIC, weight=default_per_channel_weight_observer)
    made = prepare_fx(Residual().eval(), QConfigMapping().set_global(qconfig), (torch.randn(1, 3, 4, 4),))
    made(torch.randn(8, 3, 4, 4))
    return of(copy.deepcopy(made)), convert_to_reference_fx(copy.deepcopy(made))


def _eager() -> tuple[Any, Any]:
    net = Eager().eval()
    net.qconfig = QConfig(activation=SYMMETRIC, weight=default_per_channel_weight_observer)  # type: ignore[assignment]
    made = prepare(net)
    made(torch.randn(8, 3, 4, 4))
    made = convert(made)
    return made, made


def _fake_quant() -> tuple[Any, Any]:
    qconfig = QConfig(activation=VALUE_FAKE_QUANT, weight=WEIGHT_FAKE_QUANT)
    made = prepare_qat_fx(Residual().train(), QConfigMapping().set_global(qconfig), (torch.randn(1, 3, 4, 4),))
    made = _calibrated(made)
    return made, made


def _exported() -> tuple[Any, Any]:
    made, _ = _fake_quant()
    file = io.BytesIO()
    torch.onnx.export(made, (torch.randn(2, 3, 4, 4),), file, dynamo=False)
    return onnx.load_from_string(file.getvalue()), made


SOURCES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "torch/fx": lambda: _fx(convert_fx),
    "torch/fx_reference": lambda: _fx(convert_to_reference_fx),
    "torch/eager": _eager,
    "torch/fake_quant": _fake_quant,
    "torch/fake_quant_exported": _exported,
}


@cache
def made(name: str) -> tuple[Any, np.ndarray, list[np.ndarray]]:
    """The module or file, its input `[2, 3, 4, 4]`, and torch's own outputs."""
    with warnings.catch_warnings(), exact_kernels(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # torch.ao says that it is deprecated
        torch.manual_seed(0)
        source, tool = SOURCES[name]()
        x = torch.randn(2, 3, 4, 4)
        with torch.no_grad():
            return source, x.numpy(), [tool(x).numpy()]


def tensor(x: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(x))
