"""Whether an exported program is the model at other batch sizes than that of the example."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from jquant.types import ConversionError

from .export import without_fast_paths

BATCHES = (1, 3)
_TOLERANCE = 1e-3  # of the largest value: kernels sum in another order at another batch size


def check_batch_sizes(module: torch.nn.Module, program: Any, arguments: tuple[Any, ...], batch_axis: int = 0) -> None:
    """Compares a program with its module, in eval mode, at two batch sizes.

    torch.export follows `if x.shape[0] > 1` for the batch of the example alone, without a word. A batch size that the
    model itself refuses is left out.

    Raises:
      ConversionError: an output that differs, and where.
    """
    names = [spec.arg.name for spec in program.graph_signature.output_specs if spec.kind.name == "USER_OUTPUT"]
    for batch in BATCHES:
        resized = pytree.tree_map(lambda x, n=batch: _resized(x, n, batch_axis), arguments)
        with without_fast_paths():  # which give zeros where a sequence is padded, and the operators numbers
            wanted = _outputs(module, resized)
        if wanted is None:
            continue
        found = _outputs(program.module(), resized)
        for i, (y, expected) in enumerate(zip(found or [None] * len(wanted), wanted, strict=False)):
            if not isinstance(expected, torch.Tensor) or _alike(y, expected):
                continue
            label = f"output {i}" + (f" ({names[i]!r})" if i < len(names) and len(names) == len(wanted) else "")
            raise ConversionError(
                f"{label} of the import is not that of the model for {batch} example{'s' * (batch > 1)}: the model has "
                f"a branch on the number of examples, of which torch.export follows one{_difference(y, expected)}. "
                "Take the branch out, or pass dynamic_batch=False to fix the batch; check=False imports it all the same"
            )


def _resized(x: Any, batch: int, axis: int) -> Any:
    if not isinstance(x, torch.Tensor) or not x.ndim:
        return x
    return torch.cat([x] * -(-batch // x.shape[axis]), axis).narrow(axis, 0, batch).clone()


def _outputs(run: Any, arguments: tuple[Any, ...]) -> list[Any] | None:
    """The results in order, or None where it raises; random numbers are the same in every run."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            found = pytree.tree_leaves(run(*pytree.tree_map(lambda x: x.clone(), arguments)))
            return [y.detach() if isinstance(y, torch.Tensor) else y for y in found]  # a parameter may be a result
        except Exception:  # whatever the model's own code raises
            return None


def _alike(found: Any, wanted: torch.Tensor) -> bool:
    if not isinstance(found, torch.Tensor) or found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    if not wanted.is_floating_point():
        return bool((found == wanted).all())
    finite = wanted[wanted.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return bool(torch.allclose(found, wanted, rtol=_TOLERANCE, atol=_TOLERANCE * largest, equal_nan=True))


def _difference(found: Any, wanted: torch.Tensor) -> str:
    if not isinstance(found, torch.Tensor):
        return ""
    if found.shape != wanted.shape:
        return f" (shapes {list(found.shape)} and {list(wanted.shape)})"
    return f" (the largest difference is {float((found.double() - wanted.double()).abs().max()):.3g})"
