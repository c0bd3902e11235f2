"""Functions for torch code that torch itself lacks: their import is the operator of the same meaning.

They are operators of torch's registry under the name `jquant`, so that an exported program keeps them as one call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import library
from torch.nn import functional as F

MODES, PADDINGS = ("bilinear", "nearest"), ("zeros", "border")


def grid_sample_absolute(
    x: torch.Tensor, grid: torch.Tensor, mode: str = "bilinear", padding_mode: str = "zeros"
) -> torch.Tensor:
    """Samples images at absolute coordinates: pixels, (0, 0) at the centre of the first one.

    It is what the vendor's grid_sample does with an int16 grid, in float and differentiable. Imported, it is
    `jq.ops.GridSample(coordinates="absolute")`, whose integers take the grid as int16 (`jq.templates.grid_int16`).

    Args:
      x: [N, C, H, W] float32.
      grid: [N, Ho, Wo, 2] float32 or an integer type, order (x, y), in pixels.
      mode: "bilinear" or "nearest".
      padding_mode: "zeros" or "border", of what lies outside the image.

    Returns:
      [N, C, Ho, Wo], float32.

    Raises:
      ValueError: other shapes, modes or paddings.

    Example:
      >>> import torch
      >>> from jquant_converters.torch_functions import grid_sample_absolute
      >>> image = torch.arange(6.0).reshape(1, 1, 2, 3)
      >>> grid_sample_absolute(image, torch.tensor([[[[2.0, 1.0], [0.5, 0.0]]]])).flatten().tolist()
      [5.0, 0.5]
    """
    if x.ndim != 4 or grid.ndim != 4 or grid.shape[-1] != 2:
        raise ValueError(f"x must be [N, C, H, W] and grid [N, Ho, Wo, 2], not {list(x.shape)} and {list(grid.shape)}")
    if mode not in MODES or padding_mode not in PADDINGS:
        raise ValueError(f"mode {mode!r}, padding_mode {padding_mode!r}; known: {MODES} and {PADDINGS}")
    grid = grid if grid.is_floating_point() else grid.to(x.dtype)
    result: torch.Tensor = _grid_sample_absolute(x, grid, mode, padding_mode)
    return result


def _reference(x: torch.Tensor, grid: torch.Tensor, mode: str, padding_mode: str) -> torch.Tensor:
    """Through torch's own grid_sample: pixel p of n is (2 p + 1) / n - 1 in its coordinates."""
    sides = torch.tensor([x.shape[3], x.shape[2]], dtype=grid.dtype, device=grid.device)
    return F.grid_sample(x, (2 * grid + 1) / sides - 1, mode, padding_mode, align_corners=False)


@library.custom_op("jquant::grid_sample_absolute", mutates_args=())
def _grid_sample_absolute(x: torch.Tensor, grid: torch.Tensor, mode: str, padding_mode: str) -> torch.Tensor:
    return _reference(x, grid, mode, padding_mode)


@_grid_sample_absolute.register_fake
def _(x: torch.Tensor, grid: torch.Tensor, mode: str, padding_mode: str) -> torch.Tensor:
    return x.new_empty(x.shape[0], x.shape[1], grid.shape[1], grid.shape[2])


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    x, grid, ctx.mode, ctx.padding_mode = inputs
    ctx.save_for_backward(x, grid)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
    with torch.enable_grad():
        x, grid = (v.detach().requires_grad_() for v in ctx.saved_tensors)
        y = _reference(x, grid, ctx.mode, ctx.padding_mode)
        to_x, to_grid = torch.autograd.grad(y, (x, grid), gradient, allow_unused=True)
    return to_x, to_grid, None, None


_grid_sample_absolute.register_autograd(_backward, setup_context=_keep)

GRID_SAMPLE_ABSOLUTE = torch.ops.jquant.grid_sample_absolute.default


@library.custom_op("jquant::kept_dropout", mutates_args=())
def _kept_dropout(x: torch.Tensor, rate: float) -> torch.Tensor:
    return x.clone()


@_kept_dropout.register_fake
def _(x: torch.Tensor, rate: float) -> torch.Tensor:
    return torch.empty_like(x)


KEPT_DROPOUT = torch.ops.jquant.kept_dropout.default
