"""Keys of parameters that are parts of a packed one: `attention.in_proj_weight@0:16` is its first 16 rows.

A part is a view, and its key says which: rows `@first:last`, or anything else `@offset/shape/strides` in elements, such
as `weight@0/4x8/1x4` for a transposed [8, 4]. So the key alone is enough to read the part from a state dict, and to
write it back.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

import torch

from jquant.types import ConversionError

_ROWS = re.compile(r"(.+)@(\d{1,18}):(\d{1,18})")
_VIEW = re.compile(r"(.+)@(\d{1,18})/(\d{0,18}(?:x\d{1,18})*)/(\d{0,18}(?:x\d{1,18})*)")


@dataclass(frozen=True)
class View:
    """A part of the parameter `source`: rows, or a general view in elements of the contiguous source."""

    source: str
    rows: tuple[int, int] | None = None
    offset: int = 0
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of a contiguous source, sharing its memory.

        Raises:
          ConversionError: a source that is too small.
        """
        if self.rows is not None:
            first, last = self.rows
            if tensor.ndim == 0 or not first <= last <= tensor.shape[0]:
                raise ConversionError(f"{self.source!r} of shape {list(tensor.shape)} has no rows {first} to {last}")
            return tensor[first:last]
        if not self.shape:
            return tensor
        reach = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        if prod(self.shape) and self.offset + reach >= tensor.numel():
            raise ConversionError(f"{self.source!r} of shape {list(tensor.shape)} is too small for a part of it")
        return tensor.as_strided(self.shape, self.strides, tensor.storage_offset() + self.offset)


def view_of(key: str) -> View:
    """What a key means: a whole parameter, or a part of one."""
    if found := _ROWS.fullmatch(key):
        return View(found[1], rows=(int(found[2]), int(found[3])))
    if found := _VIEW.fullmatch(key):
        shape, strides = (tuple(int(n) for n in text.split("x") if n) for text in found.group(3, 4))
        if len(shape) == len(strides):
            return View(found[1], None, int(found[2]), shape, strides)
    return View(key)


def is_part(view: View) -> bool:
    return view.rows is not None or bool(view.shape)


def key_of_part(key: str, source: torch.Tensor, part: torch.Tensor) -> str | None:
    """The key of a tensor that shares the memory of a contiguous parameter; None where there is no such key."""
    offset = part.storage_offset() - source.storage_offset()
    if not source.is_contiguous() or offset < 0 or part.numel() == 0 or part.dtype != source.dtype:
        return None
    if part.shape == source.shape and part.stride() == source.stride():
        return key
    row = prod(source.shape[1:])
    if part.shape[1:] == source.shape[1:] and part.is_contiguous() and part.ndim == source.ndim and offset % row == 0:
        return f"{key}@{offset // row}:{offset // row + part.shape[0]}"
    shape, strides = ("x".join(map(str, v)) for v in (part.shape, part.stride()))
    return f"{key}@{offset}/{shape}/{strides}" if part.ndim else None
