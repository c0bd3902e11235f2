"""Calls of the ATen overloads that write elements, and of indices of several axes; as in `aten_cases`."""

from collections.abc import Callable
from typing import Any

import torch

A = torch.ops.aten
AT = torch.tensor([3, 0])


def changed(overload: Any, *arguments: Callable[[Any], Any], of: str = "p") -> Callable[[Any], Any]:
    """A call in place, on a value that other code reads afterwards."""

    def function(v: Any) -> Any:
        x = getattr(v, of) * 0.8
        overload(x, *(a(v) if callable(a) else a for a in arguments))
        return x + v.y

    return function


def rows(v: Any) -> torch.Tensor:
    return torch.arange(v.x.shape[0]).unsqueeze(-1)


def nearest(v: Any) -> torch.Tensor:
    """[N, 4, 6], below 4, from the values."""
    return A.expand.default(v.i.unsqueeze(-1), [-1, -1, 6])


SCATTER: dict[str, Callable[[Any], Any]] = {
    "aten.scatter.src": lambda v: A.scatter.src(v.x, 1, v.j, v.y),
    "aten.scatter.src/fewer": lambda v: A.scatter.src(v.x, 2, v.j[:, :2, :3].argsort(2), v.y),
    "aten.scatter.src/index": lambda v: A.scatter.src(v.j, 1, v.j, v.j * 2),
    "aten.scatter.value": lambda v: A.scatter.value(v.x, 1, nearest(v), 0.5),
    "aten.scatter.value/mask": lambda v: A.scatter.value(v.m, 1, nearest(v), True),
    "aten.scatter.reduce": lambda v: A.scatter.reduce(v.x, 1, nearest(v), v.y, reduce="add"),
    "aten.scatter_add.default": lambda v: A.scatter_add.default(v.x, 1, nearest(v), v.y),
    "aten.scatter_reduce.two": lambda v: A.scatter_reduce.two(v.x, 1, nearest(v), v.y, "amax"),
    "aten.scatter_reduce.two/amin": lambda v: A.scatter_reduce.two(v.x, -2, nearest(v), v.y, "amin"),
    "aten.scatter_reduce.two/sum": lambda v: A.scatter_reduce.two(
        torch.zeros_like(v.x), 1, nearest(v), v.y, "sum", include_self=False
    ),
    "aten.scatter_reduce.two/mean": lambda v: A.scatter_reduce.two(v.x, 1, nearest(v), v.y, "mean"),
    "aten.scatter_reduce.two/new_mean": lambda v: A.scatter_reduce.two(
        v.x.new_zeros(v.x.shape[0], 7, 6), 1, nearest(v), v.y, "mean", include_self=False
    ),
    "aten.index_add.default": lambda v: A.index_add.default(v.x, 1, AT, v.y[:, :2]),
    "aten.index_add.default/alpha": lambda v: A.index_add.default(v.x, 2, torch.tensor([5, 5]), v.y[:, :, :2], alpha=2),
    "aten.index_copy.default": lambda v: A.index_copy.default(v.x, 1, AT, v.y[:, :2]),
    "aten.index_fill.int_Scalar": lambda v: A.index_fill.int_Scalar(v.x, 2, AT, 0.25),
    "aten.index_fill.int_Tensor": lambda v: A.index_fill.int_Tensor(v.x, 2, AT, torch.tensor(-0.25)),
    "aten.index_put.default": lambda v: A.index_put.default(v.x, [None, AT], v.y[:, :2]),
    "aten.index_put.default/add": lambda v: A.index_put.default(v.x, [None, AT[[0, 0]]], v.y[:, :2], True),
    "aten.index_put.default/one": lambda v: A.index_put.default(v.x, [None, AT], v.y[:, :1]),
    "aten.index_put.default/value": lambda v: A.index_put.default(v.x, [None, None, -AT], torch.tensor(2.0)),
    "aten.index_put.default/pairs": lambda v: A.index_put.default(v.x, [None, AT, AT + 1], v.y[:, 0, :2]),
    "aten.index_put.default/apart": lambda v: A.index_put.default(v.im, [None, AT, None, AT], v.im[:, :2, 0].mean(1)),
    "aten.index_put.default/examples": lambda v: A.index_put.default(v.x, [rows(v), v.i - 4], v.y),
    "aten.index_put.default/both": lambda v: A.index_put.default(v.x, [rows(v), v.i, v.j[:, 0]], v.y[..., 0]),
    "aten.index_put.default/mask": lambda v: A.index_put.default(v.x, [v.m], torch.tensor(0.5)),
    "aten.index_put.default/rows": lambda v: A.index_put.default(v.x, [v.m[:, :, 0]], torch.tensor(-0.5)),
    "aten.index_put.default/row": lambda v: A.index_put.default(v.x, [v.m[:, :, 0]], v.b6),
    "aten.index.Tensor/pairs": lambda v: A.index.Tensor(v.x, [None, torch.tensor([[3], [-4]]), torch.tensor([0, 5])]),
    "aten.index.Tensor/apart": lambda v: A.index.Tensor(v.im, [None, AT, None, AT]),
    "aten.index.Tensor/examples": lambda v: A.index.Tensor(v.x, [rows(v), v.i - 4]),
    "aten.index.Tensor/one_of_each": lambda v: A.index.Tensor(v.x, [rows(v)[:, 0], v.x[:, :, 0].argmax(1)]),
    "aten.index.Tensor/both": lambda v: A.index.Tensor(v.x, [rows(v), v.i, v.j[:, 0]]),
    "aten.index.Tensor/from_end": lambda v: v.b4[v.i - 4],
    "aten.slice_scatter.default": lambda v: A.slice_scatter.default(v.x, v.y[:, :, :2], 2, 1, 5, 2),
    "aten.slice_scatter.default/all": lambda v: A.slice_scatter.default(v.x, v.y, 0) + v.y,
    "aten.select_scatter.default": lambda v: A.select_scatter.default(v.x, v.y[:, 0], 1, -1),
    "aten.copy.default": lambda v: A.copy.default(v.x, v.y[:, :1]) + v.y,
    "aten.copy.default/mask": lambda v: A.copy.default(v.x, v.m),
    "aten.fill.Scalar": lambda v: A.fill.Scalar(v.x, 1.5) + v.y,
    "aten.fill.Tensor": lambda v: A.fill.Tensor(v.x, torch.tensor(-1.5)) + v.y,
    "jquant.kept_dropout.default": lambda v: torch.ops.jquant.kept_dropout.default(v.x, 0.3),
    "aten.scatter_.src": changed(A.scatter_.src, 1, lambda v: v.j, lambda v: v.y),
    "aten.scatter_add_.default": changed(A.scatter_add_.default, 1, nearest, lambda v: v.y),
    "aten.index_add_.default": changed(A.index_add_.default, 1, AT, lambda v: v.y[:, :2]),
    "aten.index_put_.default": changed(A.index_put_.default, [None, AT], lambda v: v.y[:, :2]),
}


def column(v: Any) -> torch.Tensor:
    """What detectors write: columns of a copy, from others."""
    y = v.x.clone()
    y[..., 0] = v.x[..., 0] - v.x[..., 2] / 2
    y[:, 1:3, 1] = 0.5
    y[..., 4:].sigmoid_()
    y[y[..., 5] > 0.6] = -1.0
    return y


def shifted(v: Any) -> torch.Tensor:
    """A shift of channels in time, into zeros."""
    y = torch.zeros_like(v.x)
    y[:, :-1, :2] = v.x[:, 1:, :2]
    y[:, 1:, 2:4] = v.x[:, :-1, 2:4]
    y[:, :, 4:] = v.x[:, :, 4:]
    return y


def canvas(v: Any) -> torch.Tensor:
    """Pillars at places of a canvas that the code makes, and one plane that is constant."""
    y = v.x.new_zeros(v.x.shape[0], 6, 12)
    y[:, :, torch.tensor([7, 2, 11, 4])] = v.x.transpose(1, 2)
    weights = torch.zeros(6, 12)
    weights[2] = 1.5
    weights[:, 3:5] += 1
    return y.view(-1, 6, 3, 4) * weights.view(6, 3, 4)


def view(v: Any) -> torch.Tensor:
    y = v.x * 2
    flat = y.view(-1, 24)
    flat[:, 3:9] += 1
    flat.relu_()
    return y.transpose(1, 2) + flat.view(-1, 6, 4)


THROUGH_VIEWS: dict[str, Callable[[Any], Any]] = {
    "column": column,
    "shifted": shifted,
    "canvas": canvas,
    "view": view,
}
