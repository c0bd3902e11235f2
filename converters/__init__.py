"""Foreign models in and out of jquant: the only package that knows torch and onnx. Each is loaded when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .board_kit import write_probes
    from .encodings import model_from_encodings, to_encodings
    from .onnx_export import to_onnx
    from .onnx_import import from_onnx
    from .onnx_missing import calibrate_missing
    from .onnx_plan import model_from_onnx
    from .optimizer_state import optimizer_state_from_torch
    from .plugin_scales import from_plugin_state_dict, to_plugin_state_dict
    from .torch_import import from_torch
    from .torch_out.fake_quant import fake_quant_state_dict
    from .torch_out.module import to_torch
    from .torch_out.state import load_state_dict, to_state_dict
    from .torch_quantized import model_from_torch

_MODULES = {  # no module is named like its function: the submodule would hide it
    "calibrate_missing": "onnx_missing",
    "fake_quant_state_dict": "torch_out.fake_quant",
    "from_onnx": "onnx_import",
    "from_plugin_state_dict": "plugin_scales",
    "from_torch": "torch_import",
    "load_state_dict": "torch_out.state",
    "optimizer_state_from_torch": "optimizer_state",
    "model_from_encodings": "encodings",
    "model_from_onnx": "onnx_plan",
    "model_from_torch": "torch_quantized",
    "to_encodings": "encodings",
    "to_onnx": "onnx_export",
    "to_plugin_state_dict": "plugin_scales",
    "to_state_dict": "torch_out.state",
    "to_torch": "torch_out.module",
    "write_probes": "board_kit",
}

__all__ = [
    "calibrate_missing",
    "fake_quant_state_dict",
    "from_onnx",
    "from_plugin_state_dict",
    "from_torch",
    "load_state_dict",
    "optimizer_state_from_torch",
    "model_from_encodings",
    "model_from_onnx",
    "model_from_torch",
    "to_encodings",
    "to_onnx",
    "to_plugin_state_dict",
    "to_state_dict",
    "to_torch",
    "write_probes",
]

_EXTRAS = ("torch", "onnx")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        text = f"{__name__}.{name} needs {error.name}: pip install 'jquant[{error.name}]'"
        raise ModuleNotFoundError(text, name=error.name) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
