"""State dicts in safetensors: floats of any width, and int8 or FP8 weights with a scale tensor beside them."""

from __future__ import annotations

from pathlib import Path

import torch

from jquant.types import FormatError

SCALES = ("_scale", ".scale")  # of `layer.weight`: `layer.weight_scale`, or `layer.weight.scale`
FP8 = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
)
_NARROW = (torch.int8, *FP8)


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, by key, in float32 where they are floats; those with a scale are multiplied by it.

    Raises:
      FormatError: a damaged file, or int8 and FP8 weights without a scale of their rows or of the whole.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise FormatError(f"{path}: not a readable safetensors file: {error}") from error
    found: dict[str, torch.Tensor] = {}
    scales = {key: f"{key}{end}" for key in state for end in SCALES if f"{key}{end}" in state}
    for key, tensor in state.items():
        if key in scales.values():
            continue
        if key in scales and tensor.dtype in _NARROW:
            found[key] = _scaled(path, key, tensor, state[scales[key]])
        elif tensor.dtype in FP8:
            inverse = f"{key}_scale_inv" in state
            raise FormatError(
                f"{path}: {key!r} is {str(tensor.dtype).removeprefix('torch.')}"
                + (" with scales by block" if inverse else f" and has no {key}{SCALES[0]}")
                + ": the chip has no FP8. Convert the checkpoint to float16 or float32 first"
            )
        else:
            found[key] = tensor.float() if tensor.is_floating_point() else tensor
    return found


def _scaled(path: Path, key: str, tensor: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    steps = scale.float()
    rows = tensor.shape[0] if tensor.ndim else 1
    if steps.numel() not in (1, rows):
        raise FormatError(
            f"{path}: {key!r} {list(tensor.shape)} has scales of shape {list(scale.shape)}; one, or one a row, is read"
        )
    shape = [-1, *([1] * (tensor.ndim - 1))] if steps.numel() > 1 else []
    return tensor.float() * steps.reshape(shape)
