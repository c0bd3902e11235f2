"""Values that depend on no input, but on how many examples there are: positions or a mask for each of them.

Such calls are run with two sizes of the batch. What has equal rows for both is a constant that repeats. The tensors
share memory as the model's do, so that a change in place reaches every view.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node as FxNode

from .aten import Unsupported

SIZES = (2, 3)


class OfBatchSize:
    """The values of such calls at both sizes, as they are when the program comes to a node."""

    def __init__(self) -> None:
        self.symbol: Any = None  # of the batch
        self.at: dict[FxNode, tuple[Any, Any]] = {}

    def read_size(self, node: FxNode) -> None:
        """A number that the program computes from the batch size."""
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and self.symbol is not None:
            found = [value.node.expr.subs(self.symbol, size) for size in SIZES]
            if all(n.is_integer and n.is_number for n in found):
                self.at[node] = int(found[0]), int(found[1])

    def run(self, node: FxNode, constant_of: Callable[[FxNode], torch.Tensor | None]) -> bool:
        """Whether a call is of this kind; then its value is kept. What it writes into is written in both values.

        Raises:
          Unsupported: a change in place that fails at these sizes.
        """
        inputs = node.all_input_nodes
        if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in node.target.tags:
            return False
        known = all(n in self.at or constant_of(n) is not None for n in inputs)
        if not known or not any(n in self.at for n in inputs) or (writes(node) and inputs[0] not in self.at):
            return False
        results = []
        for i in range(len(SIZES)):
            args, kwargs = torch.fx.map_arg(
                (node.args, dict(node.kwargs)), lambda n, i=i: self.at[n][i] if n in self.at else constant_of(n)
            )
            try:
                with torch.no_grad():
                    results.append(node.target(*args, **kwargs))
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                if writes(node):
                    raise Unsupported(f"it cannot be computed at the import: {error}") from error
                return False
        self.at[node] = results[0], results[1]
        return True

    def item(self, node: FxNode, source: FxNode, index: int) -> bool:
        """One result of a call that has several."""
        if source in self.at:
            self.at[node] = self.at[source][0][index], self.at[source][1][index]
        return source in self.at

    def sharing(self, tensor: torch.Tensor) -> list[FxNode]:
        """Everything kept, of which a part lies in the memory of a tensor."""
        return [node for node, (small, _) in self.at.items() if memory(tensor) & memory(small)]

    def row(self, node: FxNode) -> torch.Tensor | None:
        """[1, ...], of which every example has one, or None."""
        small, large = self.at[node]
        if not isinstance(small, torch.Tensor) or (small.shape[:1], large.shape[:1]) != ((SIZES[0],), (SIZES[1],)):
            return None
        same = small.shape[1:] == large.shape[1:] and bool((small == small[:1]).all() and (large == small[:1]).all())
        return small[:1].clone() if same else None

    def counts(self, node: FxNode) -> bool:
        """Whether a value is the number of the example along axis 0, and the same along the others."""
        small, large = self.at[node]
        if not isinstance(small, torch.Tensor) or small.dtype not in (torch.int64, torch.int32) or small.ndim == 0:
            return False
        numbers = [torch.arange(n, dtype=small.dtype).reshape(-1, *(1,) * (small.ndim - 1)) for n in SIZES]
        sizes = (small.shape[0], large.shape[0]) == SIZES
        return sizes and bool((small == numbers[0]).all() and (large == numbers[1]).all())

    def constant(self, node: FxNode) -> torch.Tensor | None:
        """The value, where it is the same for every number of examples."""
        small, large = self.at[node]
        return small if isinstance(small, torch.Tensor) and torch.equal(small, large) else None


def writes(node: FxNode) -> bool:
    """Whether a call changes an operand in place."""
    return any(a.alias_info is not None and a.alias_info.is_write for a in node.target._schema.arguments)


def memory(value: Any) -> set[int]:
    """Where the tensors of a value lie."""
    parts = value if isinstance(value, list | tuple) else [value]
    return {part.untyped_storage().data_ptr() for part in parts if isinstance(part, torch.Tensor)}
