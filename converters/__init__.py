"""Foreign models in and out of jquant: the only package that knows torch and onnx. Each is loaded when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .onnx_export import to_onnx
    from .torch_import import from_torch

_MODULES = {  # no module is named like its function: the submodule would hide it
    "from_torch": "torch_import",
    "to_onnx": "onnx_export",
}

__all__ = ["from_torch", "to_onnx"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
