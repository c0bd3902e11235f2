"""Foreign models in and out of jquant: the only package that knows torch and onnx. Each is loaded when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .onnx_export import to_onnx
    from .onnx_import import from_onnx
    from .onnx_plan import plan_from_onnx
    from .torch_import import from_torch
    from .torch_out.fake_quant import fake_quant_state_dict
    from .torch_out.module import to_torch
    from .torch_out.state import load_state_dict, to_state_dict

_MODULES = {  # no module is named like its function: the submodule would hide it
    "fake_quant_state_dict": "torch_out.fake_quant",
    "from_onnx": "onnx_import",
    "from_torch": "torch_import",
    "load_state_dict": "torch_out.state",
    "plan_from_onnx": "onnx_plan",
    "to_onnx": "onnx_export",
    "to_state_dict": "torch_out.state",
    "to_torch": "torch_out.module",
}

__all__ = [
    "fake_quant_state_dict",
    "from_onnx",
    "from_torch",
    "load_state_dict",
    "plan_from_onnx",
    "to_onnx",
    "to_state_dict",
    "to_torch",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
