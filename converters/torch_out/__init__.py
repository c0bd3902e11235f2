"""Out to torch: modules with quantize and dequantize operators, state dicts, buffers of fake-quantizers."""

from . import elementwise, layers, movement  # noqa: F401  (each registers its rules)
from .base import Site, torch_rule
from .module import to_torch

__all__ = ["Site", "to_torch", "torch_rule"]
