"""A call of every ATen overload in the importer's table.

`CASES` maps a name to a function of the values of `Values`. A name is an overload as torch prints it, with a suffix
after `/` where it has several cases. Calls go to torch.ops.aten directly, so that a case tests what its name says.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from support.aten_scatter_cases import SCATTER
from torch import nn

from jquant_converters.torch_functions import grid_sample_absolute

A = torch.ops.aten


class Values(nn.Module):
    """Inputs and parameters: x, y [N, 4, 6], p the same and positive, u in (-1, 1), m, k masks, i indices [N, 4] below
    4, j indices as x below 4, im images [N, 8, 6, 6], v volumes [N, 4, 4, 4, 4], s sequences [N, 8, 6].
    """

    def __init__(self, functions: dict[str, Callable[[Any], Any]]) -> None:
        super().__init__()
        self.functions = functions
        generator = torch.Generator().manual_seed(3)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) * 0.5)

        self.w1, self.w2, self.w3 = parameter(4, 8, 3), parameter(4, 8, 3, 3), parameter(6, 4, 2, 2, 2)
        self.t1, self.t2, self.t3 = parameter(8, 4, 3), parameter(8, 4, 3, 3), parameter(4, 6, 2, 2, 2)
        self.wl, self.bl, self.b4, self.b6 = parameter(5, 6), parameter(5), parameter(4), parameter(6)
        self.b8, self.g8, self.table = parameter(8), parameter(8), parameter(4, 5)
        self.ih, self.hh, self.ih2 = parameter(20, 6), parameter(20, 5), parameter(20, 10)
        self.gih, self.ghh, self.gb = parameter(15, 6), parameter(15, 5), parameter(15)
        self.rih, self.rhh = parameter(5, 6), parameter(5, 5)
        self.mean8 = nn.Buffer(parameter(8).detach())
        self.var8 = nn.Buffer(torch.rand(8, generator=generator) + 0.5)

    def forward(self, x, y, m, i, im, v):
        values = SimpleNamespace(
            x=x,
            y=y,
            m=m,
            i=i.clamp(0, 3),
            im=im,
            v=v,
            p=x.abs() + 0.5,
            u=torch.tanh(x) * 0.9,
            k=y > 0,
            s=im.flatten(2)[..., :6],
        )
        values.__dict__.update(self._parameters)
        values.__dict__.update(self._buffers)
        values.j = torch.argsort(x[:, :, :4], dim=1)
        return {name: function(values) for name, function in self.functions.items()}


def example(batch: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, 4, 6, generator=g),
        torch.randn(batch, 4, 6, generator=g),
        torch.rand(batch, 4, 6, generator=g) > 0.4,
        torch.randint(0, 4, (batch, 4), generator=g),
        torch.randn(batch, 8, 6, 6, generator=g),
        torch.randn(batch, 4, 4, 4, 4, generator=g),
    )


def unary(names: str, of: str = "x") -> dict[str, Callable[[Any], Any]]:
    overloads = {f"aten.{n}.default": getattr(A, n).default for n in names.split()}
    return {name: lambda v, f=overload: f(getattr(v, of)) for name, overload in overloads.items()}


def compares(name: str) -> dict[str, Callable[[Any], Any]]:
    packet = getattr(A, name)
    return {
        f"aten.{name}.Tensor": lambda v: packet.Tensor(v.x, v.y),
        f"aten.{name}.Scalar": lambda v: packet.Scalar(v.x, 0.25),
        f"aten.{name}.Scalar/index": lambda v: packet.Scalar(v.i, 2),
    }


def masks(overload: Any) -> Callable[[Any], Any]:
    return lambda v: overload(v.m, v.k)


def bits(overload: Any) -> Callable[[Any], Any]:
    return lambda v: overload(v.i, 2)


def in_place(overload: Any, *arguments: Any) -> Callable[[Any], Any]:
    def function(v: Any) -> Any:
        changed = v.p * 0.8
        overload(changed, *arguments)
        return changed + v.y

    return function


def zeros(v: Any, rows: int) -> torch.Tensor:
    return torch.zeros(rows, v.x.shape[0], 5)


ELEMENTWISE: dict[str, Callable[[Any], Any]] = {
    **unary("relu relu6 abs neg sigmoid tanh exp erf special_erf silu mish hardswish hardsigmoid selu sin cos"),
    **unary("sinh cosh asinh atan log_sigmoid sign sgn square exp2 expm1 special_expm1 floor ceil round"),
    **unary("log log1p sqrt rsqrt reciprocal log2 log10", "p"),
    **unary("tan asin acos atanh", "u"),
    "aten.acosh.default": lambda v: A.acosh.default(v.p + 1),
    "aten.positive.default": lambda v: A.positive.default(v.x) + v.y,
    "aten.add.Tensor": lambda v: A.add.Tensor(v.x, v.y),
    "aten.add.Tensor/alpha": lambda v: A.add.Tensor(v.x, v.y, alpha=-2),
    "aten.add.Tensor/index": lambda v: A.add.Tensor(v.i, v.i) + 3,
    "aten.add.Tensor/mask": lambda v: A.add.Tensor(v.x, v.m),
    "aten.add.Scalar": lambda v: A.add.Scalar(v.x, 1.5),
    "aten.sub.Tensor": lambda v: A.sub.Tensor(v.x, v.y, alpha=0.5),
    "aten.sub.Scalar": lambda v: A.sub.Scalar(v.x, 2),
    "aten.rsub.Scalar": lambda v: A.rsub.Scalar(v.x, 2),
    "aten.rsub.Tensor": lambda v: A.rsub.Tensor(v.x, v.y),
    "aten.mul.Tensor": lambda v: A.mul.Tensor(v.x, v.y),
    "aten.mul.Tensor/mask": lambda v: A.mul.Tensor(v.x, v.m),
    "aten.mul.Tensor/masks": lambda v: A.mul.Tensor(v.k, v.m),
    "aten.mul.Tensor/index": lambda v: v.i * 3,
    "aten.mul.Scalar": lambda v: A.mul.Scalar(v.x, -3),
    "aten.div.Tensor": lambda v: A.div.Tensor(v.x, v.p),
    "aten.div.Tensor/number": lambda v: v.x / 3,
    "aten.div.Scalar": lambda v: A.div.Scalar(v.x, 3),
    "aten.div.Tensor_mode": lambda v: A.div.Tensor_mode(v.x, v.p, rounding_mode=None),
    "aten.div.Tensor_mode/floor": lambda v: A.div.Tensor_mode(v.x, v.p, rounding_mode="floor"),
    "aten.div.Tensor_mode/trunc": lambda v: A.div.Tensor_mode(v.x, v.p, rounding_mode="trunc"),
    "aten.div.Tensor_mode/index": lambda v: A.div.Tensor_mode(v.i * 100 - 150, 7, rounding_mode="trunc"),
    "aten.div.Scalar_mode": lambda v: A.div.Scalar_mode(v.x, 0.3, rounding_mode="floor"),
    "aten.div.Scalar_mode/trunc": lambda v: A.div.Scalar_mode(v.x, -0.3, rounding_mode="trunc"),
    "aten.floor_divide.default": lambda v: A.floor_divide.default(v.x, v.p),
    "aten.floor_divide.Scalar": lambda v: A.floor_divide.Scalar(v.x, 0.25),
    "aten.floor_divide.Scalar/index": lambda v: A.floor_divide.Scalar(v.i * 100 - 150, 12),
    "aten.nan_to_num.default": lambda v: A.nan_to_num.default(torch.log(v.x), 3.0, 2.0, -1.0),
    "aten.true_divide.Tensor": lambda v: A.true_divide.Tensor(v.x, v.p),
    "aten.addcmul.default": lambda v: A.addcmul.default(v.x, v.y, v.p, value=2),
    "aten.addcdiv.default": lambda v: A.addcdiv.default(v.x, v.y, v.p, value=0.5),
    "aten.lerp.Scalar": lambda v: A.lerp.Scalar(v.x, v.y, 0.3),
    "aten.lerp.Tensor": lambda v: A.lerp.Tensor(v.x, v.y, v.u),
    "aten.pow.Tensor_Scalar": lambda v: A.pow.Tensor_Scalar(v.x, 3),
    "aten.pow.Tensor_Scalar/2": lambda v: A.pow.Tensor_Scalar(v.x, 2),
    "aten.pow.Tensor_Scalar/1": lambda v: A.pow.Tensor_Scalar(v.x, 1) + v.y,
    "aten.pow.Tensor_Scalar/half": lambda v: A.pow.Tensor_Scalar(v.p, 0.5),
    "aten.pow.Tensor_Scalar/real": lambda v: A.pow.Tensor_Scalar(v.p, -1.7),
    "aten.pow.Tensor_Tensor": lambda v: A.pow.Tensor_Tensor(v.x, torch.tensor(2.0)),
    "aten.pow.Scalar": lambda v: A.pow.Scalar(3.0, v.x),
    "aten.minimum.default": lambda v: A.minimum.default(v.x, v.y),
    "aten.maximum.default": lambda v: A.maximum.default(v.x, v.y),
    "aten.min.other": lambda v: A.min.other(v.x, v.y),
    "aten.max.other": lambda v: A.max.other(v.x, v.y),
    "aten.remainder.Scalar": lambda v: A.remainder.Scalar(v.x, 0.7),
    "aten.remainder.Scalar/index": lambda v: v.i % 3,
    "aten.remainder.Tensor": lambda v: A.remainder.Tensor(v.x, v.p),
    "aten.fmod.Scalar": lambda v: A.fmod.Scalar(v.x, 0.7),
    "aten.fmod.Tensor": lambda v: A.fmod.Tensor(v.x, v.p),
    "aten.floor.default/index": lambda v: torch.floor(v.i) + v.i,
    "aten.round.decimals": lambda v: A.round.decimals(v.x, decimals=2),
    "aten.clamp.default": lambda v: A.clamp.default(v.x, -0.5, 0.75),
    "aten.clamp.default/low": lambda v: A.clamp.default(v.x, 0.25),
    "aten.clamp.default/crossed": lambda v: A.clamp.default(v.x, 1.0, -1.0),
    "aten.clamp.default/index": lambda v: v.i.clamp(1, 2),
    "aten.clamp.Tensor": lambda v: A.clamp.Tensor(v.x, v.u - 0.5, v.p),
    "aten.clamp.Tensor/low": lambda v: A.clamp.Tensor(v.x, v.y),
    "aten.clamp.Tensor/high": lambda v: A.clamp.Tensor(v.x, None, v.y),
    "aten.clamp_min.default": lambda v: A.clamp_min.default(v.x, 0),
    "aten.clamp_min.Tensor": lambda v: A.clamp_min.Tensor(v.x, v.y),
    "aten.clamp_max.default": lambda v: A.clamp_max.default(v.x, 0.3),
    "aten.clamp_max.Tensor": lambda v: A.clamp_max.Tensor(v.x, v.y),
    "aten.hardtanh.default": lambda v: A.hardtanh.default(v.x),
    "aten.leaky_relu.default": lambda v: A.leaky_relu.default(v.x, 0.2),
    "aten.prelu.default": lambda v: A.prelu.default(v.x, v.b4),
    "aten.gelu.default": lambda v: A.gelu.default(v.x),
    "aten.gelu.default/tanh": lambda v: A.gelu.default(v.x, approximate="tanh"),
    "aten.glu.default": lambda v: A.glu.default(v.x, 1),
    "aten.elu.default": lambda v: A.elu.default(v.x, 0.7),
    "aten.celu.default": lambda v: A.celu.default(v.x, 0.7),
    "aten.softplus.default": lambda v: A.softplus.default(v.x, 2.0, 1.0),
    "aten.threshold.default": lambda v: A.threshold.default(v.x, 0.1, -0.5),
    "aten.dropout.default": lambda v: A.dropout.default(v.x, 0.5, False),
    "aten.dropout_.default": lambda v: A.dropout_.default(v.x * 2.0, 0.3, False),
    "aten.feature_dropout.default": lambda v: A.feature_dropout.default(v.x, 0.4, False) + v.y,
    "aten.alpha_dropout.default": lambda v: A.alpha_dropout.default(v.x, 0.0, False) + v.y,
    "aten.feature_alpha_dropout.default": lambda v: A.feature_alpha_dropout.default(v.x, 0.0, False) + v.y,
}

NAMES_IN_PLACE = (
    "relu relu6 abs neg sigmoid tanh exp log log1p sqrt rsqrt reciprocal erf silu mish hardswish hardsigmoid selu sin "
    "cos tan atan sinh cosh asinh sign sgn square exp2 expm1 log2 log10 floor ceil round hardtanh leaky_relu gelu "
    "elu celu"
)
IN_PLACE: dict[str, Callable[[Any], Any]] = {
    **{f"aten.{n}_.default": in_place(getattr(A, f"{n}_").default) for n in NAMES_IN_PLACE.split(" ")},
    "aten.add_.Tensor": in_place(A.add_.Tensor, torch.tensor(2.0)),
    "aten.sub_.Scalar": in_place(A.sub_.Scalar, 2),
    "aten.mul_.Scalar": in_place(A.mul_.Scalar, 2),
    "aten.div_.Scalar": in_place(A.div_.Scalar, 2),
    "aten.clamp_.default": in_place(A.clamp_.default, 0.1, 0.9),
    "aten.clamp_min_.default": in_place(A.clamp_min_.default, 0.1),
    "aten.clamp_max_.default": in_place(A.clamp_max_.default, 0.9),
    "aten.threshold_.default": in_place(A.threshold_.default, 0.9, 0.0),
    "aten.remainder_.Scalar": in_place(A.remainder_.Scalar, 0.3),
    "aten.masked_fill_.Scalar": lambda v: (v.x * 1.0).masked_fill_(v.m, 2.0) + v.y,
    "aten.logical_not_.default": lambda v: (v.x > 0).logical_not_(),
}

COMPARE: dict[str, Callable[[Any], Any]] = {
    **compares("eq"),
    **compares("ne"),
    **compares("gt"),
    **compares("ge"),
    **compares("lt"),
    **compares("le"),
    **{f"aten.logical_{n}.default": masks(getattr(A, f"logical_{n}").default) for n in ("and", "or", "xor")},
    "aten.logical_not.default": lambda v: A.logical_not.default(v.m),
    **{
        f"aten.{n}.Tensor": masks(getattr(A, n).Tensor)
        for n in ("bitwise_and", "bitwise_or", "bitwise_xor", "__and__", "__or__", "__xor__")
    },
    **{
        f"aten.{n}.Scalar": bits(getattr(A, n).Scalar)
        for n in ("bitwise_and", "bitwise_or", "bitwise_xor", "__and__", "__or__", "__xor__")
    },
    "aten.bitwise_and.Tensor/index": lambda v: v.i & (v.i + 1),
    **{
        f"aten.{n}": lambda v, n=n: getattr(getattr(A, n.split(".")[0]), n.split(".")[1])(v.i, 2)
        for n in (
            "bitwise_right_shift.Tensor_Scalar",
            "__rshift__.Scalar",
            "bitwise_left_shift.Tensor_Scalar",
            "__lshift__.Scalar",
        )
    },
    **{
        f"aten.{n}.Tensor": lambda v, n=n: getattr(A, n).Tensor(v.i, torch.tensor(3))
        for n in ("bitwise_right_shift", "__rshift__", "bitwise_left_shift", "__lshift__")
    },
    "aten.bitwise_not.default": lambda v: A.bitwise_not.default(v.m),
    "aten.bitwise_not.default/index": lambda v: ~v.i,
    "aten.where.self": lambda v: A.where.self(v.m, v.x, v.y),
    "aten.where.self/index": lambda v: torch.where(v.i > 1, v.i, v.i + 4),
    "aten.where.ScalarSelf": lambda v: A.where.ScalarSelf(v.m, 0.5, v.y),
    "aten.where.ScalarOther": lambda v: A.where.ScalarOther(v.m, v.x, -2.0),
    "aten.masked_fill.Scalar": lambda v: A.masked_fill.Scalar(v.x, v.m, 7.0),
    "aten.masked_fill.Tensor": lambda v: A.masked_fill.Tensor(v.x, v.m, torch.tensor(7.0)),
    "aten.to.dtype": lambda v: v.m.to(torch.float32) * v.x,
    "aten.to.dtype/bool": lambda v: (v.x > 0).to(torch.int64).to(torch.bool),
    "aten.to.dtype/index": lambda v: v.m.long() + v.i[:, :, None],
    "aten.to.other": lambda v: A.to.other(v.m, v.x),
    "aten.to.dtype_layout": lambda v: A.to.dtype_layout(v.m, dtype=torch.float32),
    "aten.to.device": lambda v: A.to.device(v.m, "cpu", torch.float32),
    "aten._to_copy.default": lambda v: A._to_copy.default(v.m, dtype=torch.float32),
    "aten.type_as.default/known": lambda v: torch.arange(6).type_as(v.x) + v.x,
    "aten.type_as.default": lambda v: A.type_as.default(v.m, v.x),
}

REDUCE: dict[str, Callable[[Any], Any]] = {
    "aten.sum.default": lambda v: A.sum.default(v.x),
    "aten.sum.dim_IntList": lambda v: A.sum.dim_IntList(v.x, [1, -1], True),
    "aten.sum.dim_IntList/mask": lambda v: v.m.sum(-1),
    "aten.mean.default": lambda v: A.mean.default(v.x),
    "aten.mean.dim": lambda v: A.mean.dim(v.x, [-1]),
    "aten.amax.default": lambda v: A.amax.default(v.x, [1, 2]),
    "aten.amin.default": lambda v: A.amin.default(v.x, [-1], True),
    "aten.max.default": lambda v: A.max.default(v.x),
    "aten.min.default": lambda v: A.min.default(v.x),
    "aten.max.dim": lambda v: tuple(A.max.dim(v.x, 1)),
    "aten.min.dim": lambda v: tuple(A.min.dim(v.x, -1, True)),
    "aten.argmax.default": lambda v: (A.argmax.default(v.x, 1), A.argmax.default(v.x, -1, True)),
    "aten.argmax.default/all": lambda v: (A.argmax.default(v.x), A.argmax.default(v.x, None, True)),
    "aten.argmin.default": lambda v: A.argmin.default(v.x, 1),
    "aten.all.default": lambda v: A.all.default(v.m),
    "aten.all.dim": lambda v: A.all.dim(v.m, 1),
    "aten.all.dims": lambda v: A.all.dims(v.m, [1, 2]),
    "aten.any.default": lambda v: A.any.default(v.m),
    "aten.any.dim": lambda v: A.any.dim(v.m, 1, True),
    "aten.any.dims": lambda v: A.any.dims(v.m, [1, 2]),
    "aten.cumsum.default": lambda v: A.cumsum.default(v.x, 1),
    "aten.var.default": lambda v: A.var.default(v.x),
    "aten.var.dim": lambda v: A.var.dim(v.x, [1], False, True),
    "aten.var.correction": lambda v: A.var.correction(v.x, [1, 2], correction=0),
    "aten.std.default": lambda v: A.std.default(v.x),
    "aten.std.dim": lambda v: A.std.dim(v.x, [-1], True),
    "aten.std.correction": lambda v: A.std.correction(v.x, [-1], correction=2, keepdim=True),
    "aten.var_mean.default": lambda v: tuple(A.var_mean.default(v.x)),
    "aten.var_mean.correction": lambda v: tuple(A.var_mean.correction(v.x, [1])),
    "aten.var_mean.dim": lambda v: tuple(A.var_mean.dim(v.x, [1], False)),
    "aten.std_mean.default": lambda v: tuple(A.std_mean.default(v.x)),
    "aten.std_mean.dim": lambda v: tuple(A.std_mean.dim(v.x, [1], False)),
    "aten.std_mean.correction": lambda v: tuple(A.std_mean.correction(v.x, [1])),
    "aten.norm.Scalar": lambda v: A.norm.Scalar(v.x, 2),
    "aten.norm.ScalarOpt_dim": lambda v: A.norm.ScalarOpt_dim(v.x, 1, [1]),
    "aten.linalg_vector_norm.default": lambda v: A.linalg_vector_norm.default(v.x, float("inf"), [1], True),
    "aten.logsumexp.default": lambda v: (A.logsumexp.default(v.x, [1, 2]), A.logsumexp.default(v.x, [1], True)),
}

MOVE: dict[str, Callable[[Any], Any]] = {
    "aten.flatten.using_ints": lambda v: A.flatten.using_ints(v.im, 2, 3),
    "aten.reshape.default": lambda v: A.reshape.default(v.x, [v.x.shape[0] * 2, 12]),
    "aten.reshape_as.default": lambda v: A.reshape_as.default(v.x.transpose(1, 2), v.x),
    "aten.view.default": lambda v: A.view.default(v.x, [-1, 24]),
    "aten.view_as.default": lambda v: A.view_as.default(v.x.relu(), v.y),
    "aten._unsafe_view.default": lambda v: A._unsafe_view.default(v.x, [-1, 24]),
    "aten.unflatten.int": lambda v: A.unflatten.int(v.x, 2, [2, 3]),
    "aten.squeeze.default": lambda v: A.squeeze.default(v.b6[None, :, None]) * v.x,
    "aten.squeeze.dim": lambda v: A.squeeze.dim(v.x[:, :, None], 2),
    "aten.squeeze.dims": lambda v: A.squeeze.dims(v.x[:, None, :, None], [1, 3]),
    "aten.unsqueeze.default": lambda v: A.unsqueeze.default(v.x, -1),
    "aten.ravel.default": lambda v: A.ravel.default(v.x),
    "aten.permute.default": lambda v: A.permute.default(v.im, [0, 2, -1, 1]),
    "aten.transpose.int": lambda v: A.transpose.int(v.im, 0, -1),
    "aten.swapaxes.default": lambda v: A.swapaxes.default(v.x, 1, 2),
    "aten.swapdims.default": lambda v: A.swapdims.default(v.x, 1, 2),
    "aten.t.default": lambda v: A.t.default(v.x.flatten(1)),
    "aten.numpy_T.default": lambda v: A.numpy_T.default(v.x.flatten(1)),
    "aten.mT.default": lambda v: A.mT.default(v.x),
    "aten.movedim.int": lambda v: A.movedim.int(v.im, 1, -1),
    "aten.movedim.intlist": lambda v: A.movedim.intlist(v.im, [1, 2], [3, 1]),
    "aten.moveaxis.int": lambda v: A.moveaxis.int(v.im, 3, 1),
    "aten.moveaxis.intlist": lambda v: A.moveaxis.intlist(v.im, [3], [1]),
    "aten.slice.Tensor": lambda v: A.slice.Tensor(v.x, 1, -3, 9, 2),
    "aten.slice.Tensor/full": lambda v: A.slice.Tensor(v.x, 0, 0, 9223372036854775807) + v.y,
    "aten.narrow.default": lambda v: A.narrow.default(v.x, 2, -3, 2),
    "aten.select.int": lambda v: A.select.int(v.x, 1, -1),
    "aten.split.Tensor": lambda v: tuple(A.split.Tensor(v.x, 4, 2)),
    "aten.split.sizes": lambda v: tuple(A.split.sizes(v.x, [1, 5], 2)),
    "aten.split_with_sizes.default": lambda v: A.split_with_sizes.default(v.x, [1, 3], 1)[1],
    "aten.tensor_split.sections": lambda v: tuple(A.tensor_split.sections(v.x, 4, 2)),
    "aten.tensor_split.indices": lambda v: tuple(A.tensor_split.indices(v.x, [1, 4], 2)),
    "aten.chunk.default": lambda v: tuple(A.chunk.default(v.x, 4, -1)),
    "aten.unsafe_chunk.default": lambda v: tuple(A.unsafe_chunk.default(v.x, 2, 1)),
    "aten.unsafe_split.Tensor": lambda v: tuple(A.unsafe_split.Tensor(v.x, 3, 1)),
    "aten.unbind.int": lambda v: tuple(A.unbind.int(v.x, 1)),
    "aten.cat.default": lambda v: A.cat.default([v.x, v.y, v.x], 1),
    "aten.cat.default/one": lambda v: A.cat.default([torch.zeros(0), v.x]) + v.y,
    "aten.concat.default": lambda v: A.concat.default([v.x, v.y], -1),
    "aten.hstack.default": lambda v: A.hstack.default([v.x, v.y]),
    "aten.stack.default": lambda v: A.stack.default([v.x, v.y], -1),
    "aten.expand.default": lambda v: A.expand.default(v.x[:, :1], [-1, 3, 6]),
    "aten.expand.default/batch": lambda v: A.expand.default(v.b4[None, :, None], [v.x.shape[0], 4, 6]),
    "aten.expand.default/rank": lambda v: A.expand.default(v.b6, [v.x.shape[0], 2, 6]),
    "aten.expand_as.default": lambda v: A.expand_as.default(v.x.amax(1, True), v.x),
    "aten.broadcast_to.default": lambda v: A.broadcast_to.default(v.x[:, None], [v.x.shape[0], 2, 4, 6]),
    "aten.repeat.default": lambda v: A.repeat.default(v.x, [1, 2, 3]),
    "aten.repeat.default/batch": lambda v: A.repeat.default(v.b6[None, None], [v.x.shape[0], 3, 1]),
    "aten.repeat.default/rank": lambda v: A.repeat.default(v.b6, [2, 3, 1]),
    "aten.tile.default": lambda v: A.tile.default(v.x, [2, 3]),
    "aten.repeat_interleave.self_int": lambda v: A.repeat_interleave.self_int(v.x, 3, 1),
    "aten.roll.default": lambda v: A.roll.default(v.im, [1, -2], [2, 3]),
    "aten.roll.default/flat": lambda v: A.roll.default(v.x, [3]),
    "aten.flip.default": lambda v: A.flip.default(v.x, [1, -1]),
    "aten.pad.default": lambda v: A.pad.default(v.x, [1, 2], value=0.5),
    "aten.pad.default/reflect": lambda v: A.pad.default(v.x, [1, 2], "reflect"),
    "aten.pad.default/crop": lambda v: A.pad.default(v.x, [-1, 2, 1, -1]),
    "aten.pad.default/mask": lambda v: A.pad.default(v.m, [1, 1], value=1),
    "aten.constant_pad_nd.default": lambda v: A.constant_pad_nd.default(v.x, [-1, -2, -1, 0]),
    "aten.reflection_pad1d.default": lambda v: A.reflection_pad1d.default(v.x, [2, 1]),
    "aten.reflection_pad2d.default": lambda v: A.reflection_pad2d.default(v.im, [2, 1, 0, 3]),
    "aten.reflection_pad3d.default": lambda v: A.reflection_pad3d.default(v.v, [1] * 6),
    "aten.replication_pad1d.default": lambda v: A.replication_pad1d.default(v.x, [2, 1]),
    "aten.replication_pad2d.default": lambda v: A.replication_pad2d.default(v.im, [2, 1, 0, 3]),
    "aten.replication_pad3d.default": lambda v: A.replication_pad3d.default(v.v, [1] * 6),
    "aten.pixel_shuffle.default": lambda v: A.pixel_shuffle.default(v.im, 2),
    "aten.pixel_unshuffle.default": lambda v: A.pixel_unshuffle.default(v.im, 2),
    "aten.channel_shuffle.default": lambda v: A.channel_shuffle.default(v.im, 4),
    "aten.full.default": lambda v: A.full.default([v.x.shape[0], 4, 6], 2.5) * v.x,
    "aten.full.default/second": lambda v: A.full.default([4, v.x.shape[0], 6], 2.5),
    "aten.zeros.default": lambda v: torch.cat([A.zeros.default([v.x.shape[0], 1, 6]), v.x], 1),
    "aten.ones.default": lambda v: A.ones.default([v.x.shape[0], 3], dtype=torch.bool),
    "aten.new_full.default": lambda v: A.new_full.default(v.x, [v.x.shape[0], 3], 4.0),
    "aten.new_zeros.default": lambda v: A.new_zeros.default(v.i, [v.x.shape[0], 3]),
    "aten.new_ones.default": lambda v: A.new_ones.default(v.x, [v.x.shape[0], 3]),
    "aten.full_like.default": lambda v: A.full_like.default(v.x, 3.0),
    "aten.zeros_like.default": lambda v: A.zeros_like.default(v.m),
    "aten.ones_like.default": lambda v: A.ones_like.default(v.x),
    "aten.alias.default": lambda v: A.alias.default(v.x) + v.y,
    "aten.clone.default": lambda v: A.clone.default(v.x) + v.y,
    "aten.contiguous.default": lambda v: A.contiguous.default(v.x) + v.y,
    "aten.detach.default": lambda v: A.detach.default(v.x) + v.y,
    "aten.detach_.default": lambda v: A.detach_.default(v.x * 2) + v.y,
    "aten.resolve_conj.default": lambda v: A.resolve_conj.default(v.x) + v.y,
    "aten.resolve_neg.default": lambda v: A.resolve_neg.default(v.x) + v.y,
    "aten.unfold.default": lambda v: A.unfold.default(v.im, 2, 2, 2),
    "aten.im2col.default": lambda v: A.im2col.default(v.im, [2, 3], [1, 2], [0, 1], [2, 1]),
    "aten.im2col.default/plain": lambda v: A.im2col.default(v.im, [2, 2], [1, 1], [0, 0], [2, 2]),
    "aten.col2im.default": lambda v: A.col2im.default(v.s, [3, 4], [2, 2], [1, 1], [0, 0], [1, 1]),
    "aten.col2im.default/padded": lambda v: A.col2im.default(v.s, [4, 4], [2, 2], [1, 1], [0, 1], [2, 2]),
    "aten.unfold.default/overlap": lambda v: A.unfold.default(v.x, -1, 3, 2),
    "aten.index_select.default": lambda v: A.index_select.default(v.x, 1, torch.tensor([3, 0, 0])),
    "aten.index.Tensor": lambda v: v.x[:, [3, 1]],
    "aten.index.Tensor/table": lambda v: v.wl[torch.tensor([[0, -1], [2, 3]])] * v.x.mean(),
    "aten.index.Tensor/index": lambda v: v.wl[v.i],
    "aten.gather.default": lambda v: A.gather.default(v.x, 1, v.j),
    "aten.sort.default": lambda v: tuple(A.sort.default(v.x, 1, True)),
    "aten.sort.stable": lambda v: tuple(A.sort.stable(v.x, stable=True, dim=2)),
    "aten.argsort.default": lambda v: A.argsort.default(v.x, 1),
    "aten.argsort.stable": lambda v: A.argsort.stable(v.x, stable=True, dim=1),
    "aten.topk.default": lambda v: tuple(A.topk.default(v.x, 3, 2)),
}

LAYERS: dict[str, Callable[[Any], Any]] = {
    "aten.conv1d.default": lambda v: A.conv1d.default(v.s, v.w1, v.b4, [2], [1]),
    "aten.conv1d.padding": lambda v: A.conv1d.padding(v.s, v.w1, None, [1], "same"),
    "aten.conv2d.default": lambda v: A.conv2d.default(v.im, v.w2, v.b4, [2, 1], [1, 0], [1, 2]),
    "aten.conv2d.padding": lambda v: A.conv2d.padding(v.im, v.w2, None, [1], "same", [2]),
    "aten.conv3d.default": lambda v: A.conv3d.default(v.v, v.w3, v.b6),
    "aten.conv3d.padding": lambda v: A.conv3d.padding(v.v, v.w3, None, [1], "valid"),
    "aten.conv_transpose1d.default": lambda v: A.conv_transpose1d.default(v.s, v.t1, v.b4, [2], [1], [1]),
    "aten.conv_transpose2d.input": lambda v: A.conv_transpose2d.input(v.im, v.t2, None, [2, 1], [1, 0], [1, 0], 2),
    "aten.conv_transpose3d.input": lambda v: A.conv_transpose3d.input(v.v, v.t3, v.b6, [2]),
    "aten.convolution.default": lambda v: A.convolution.default(v.im, v.w2, v.b4, [1], [1], [1], False, [0], 1),
    "aten.convolution.default/transposed": lambda v: A.convolution.default(
        v.im, v.t2, None, [2], [1], [1], True, [1], 1
    ),
    "aten.linear.default": lambda v: A.linear.default(v.x, v.wl, v.bl),
    "aten.linear.default/view": lambda v: A.linear.default(v.x, v.wl[1:4], v.bl.split([1, 3, 1])[1]),
    "aten.linear.default/computed": lambda v: A.linear.default(v.x, v.wl * 2, v.bl),
    "aten.matmul.default": lambda v: A.matmul.default(v.x, v.y.mT),
    "aten.matmul.default/vector": lambda v: (A.matmul.default(v.x, v.b6), A.matmul.default(v.b4, v.x)),
    "aten.mm.default": lambda v: A.mm.default(v.x.flatten(0, 1), v.wl.t()),
    "aten.bmm.default": lambda v: A.bmm.default(v.x, v.y.mT),
    "aten.mv.default": lambda v: A.mv.default(v.x.flatten(0, 1), v.b6),
    "aten.dot.default": lambda v: A.dot.default(v.b6, v.b6) * v.x,
    "aten.addmm.default": lambda v: A.addmm.default(v.bl, v.x.flatten(0, 1), v.wl.t(), beta=2, alpha=0.5),
    "aten.addmv.default": lambda v: A.addmv.default(v.b4, v.x.mean(0), v.b6, beta=0),
    "aten.baddbmm.default": lambda v: A.baddbmm.default(v.x[:, :, :4], v.x, v.y.mT),
    "aten.einsum.default": lambda v: A.einsum.default("nct,ndt->ncd", [v.x, v.y]),
    "aten.einsum.default/weight": lambda v: A.einsum.default("nct,ot->nco", [v.x, v.wl]),
    "aten.embedding.default": lambda v: A.embedding.default(v.table, v.i, 1),
    "aten._native_batch_norm_legit_no_training.default": lambda v: A._native_batch_norm_legit_no_training.default(
        v.s, v.g8, v.b8, v.mean8, v.var8, 0.1, 1e-3
    )[0],
    "aten.batch_norm.default": lambda v: A.batch_norm.default(
        v.im, v.g8, v.b8, v.mean8, v.var8, False, 0.1, 1e-5, False
    ),
    "aten.instance_norm.default": lambda v: A.instance_norm.default(
        v.im, v.g8, v.b8, None, None, True, 0.1, 1e-5, False
    ),
    "aten.instance_norm.default/frozen": lambda v: A.instance_norm.default(
        v.im, v.g8, v.b8, v.mean8, v.var8, False, 0.1, 1e-5, False
    ),
    "aten.layer_norm.default": lambda v: A.layer_norm.default(v.x, [6], v.b6, v.b6),
    "aten.native_layer_norm.default": lambda v: A.native_layer_norm.default(v.x, [4, 6], None, None, 1e-3)[0],
    "aten.rms_norm.default": lambda v: A.rms_norm.default(v.x, [6], v.b6),
    "aten.group_norm.default": lambda v: A.group_norm.default(v.im, 2, v.g8, v.b8),
    "aten.softmax.int": lambda v: A.softmax.int(v.x, 1),
    "aten.softmax.int/masked": lambda v: v.x.masked_fill(v.m & v.k, float("-inf")).softmax(-1),
    "aten._softmax.default": lambda v: A._softmax.default(v.x, -1, False),
    "aten.log_softmax.int": lambda v: A.log_softmax.int(v.x, 1),
    "aten._log_softmax.default": lambda v: A._log_softmax.default(v.x, -1, False),
    "aten.scaled_dot_product_attention.default": lambda v: A.scaled_dot_product_attention.default(v.x, v.y, v.p),
    "aten.scaled_dot_product_attention.default/causal": lambda v: A.scaled_dot_product_attention.default(
        v.x, v.y, v.p, is_causal=True, scale=0.3
    ),
    "aten.scaled_dot_product_attention.default/bool": lambda v: A.scaled_dot_product_attention.default(
        v.x, v.y, v.p, (v.m | (torch.arange(6) < 1))[:, :, :4]
    ),
    "aten.scaled_dot_product_attention.default/add": lambda v: A.scaled_dot_product_attention.default(
        v.x, v.y, v.p, v.x[:, :, :4]
    ),
    "aten.scaled_dot_product_attention.default/infinite": lambda v: A.scaled_dot_product_attention.default(
        v.x, v.y, v.p, torch.full((4, 4), float("-inf")).triu(1)
    ),
    "aten.lstm.input": lambda v: A.lstm.input(
        v.x, [zeros(v, 1)] * 2, [v.ih, v.hh], False, 1, 0.0, False, False, True
    ),
    "aten.lstm.input/layers": lambda v: A.lstm.input(
        v.x.transpose(0, 1), [zeros(v, 4) + 0.5, zeros(v, 4)], [v.ih, v.hh] * 2 + [v.ih2, v.hh] * 2, False, 2, 0.2,
        False, True, False,
    ),
    "aten.gru.input": lambda v: A.gru.input(
        v.x, zeros(v, 2), [v.gih, v.ghh, v.gb, v.gb] * 2, True, 1, 0.0, False, True, True
    ),
    "aten.lstm_cell.default": lambda v: A.lstm_cell.default(
        v.x[:, 0], [v.x[:, 1, :5], v.x[:, 2, :5]], v.ih, v.hh, None, None
    ),
    "aten.rnn_tanh.input": lambda v: A.rnn_tanh.input(
        v.x, zeros(v, 2), [v.rih, v.rhh, v.bl, v.bl] * 2, True, 1, 0.0, False, True, True
    ),
    "aten.rnn_relu.input": lambda v: A.rnn_relu.input(
        v.x.transpose(0, 1), zeros(v, 1) + 0.5, [v.rih, v.rhh], False, 1, 0.0, False, False, False
    ),
    "aten.rnn_tanh_cell.default": lambda v: A.rnn_tanh_cell.default(
        v.x[:, 0], v.x[:, 1, :5], v.rih, v.rhh, v.bl, v.bl
    ),
    "aten.rnn_relu_cell.default": lambda v: A.rnn_relu_cell.default(v.x[:, 0], v.x[:, 1, :5], v.rih, v.rhh),
    "aten.gru_cell.default": lambda v: A.gru_cell.default(v.x[:, 0], v.x[:, 1, :5], v.gih, v.ghh, v.gb, v.gb),
}  # fmt: skip

IMAGES: dict[str, Callable[[Any], Any]] = {
    "aten.max_pool1d.default": lambda v: A.max_pool1d.default(v.s, [3], [2], [1]),
    "aten.max_pool2d.default": lambda v: A.max_pool2d.default(v.im, [2, 3], [], [0, 1], [2, 1], True),
    "aten.max_pool3d.default": lambda v: A.max_pool3d.default(v.v, [2]),
    "aten.max_pool1d_with_indices.default": lambda v: A.max_pool1d_with_indices.default(v.s, [2])[0],
    "aten.max_pool2d_with_indices.default": lambda v: A.max_pool2d_with_indices.default(v.im, [2])[0],
    "aten.max_pool3d_with_indices.default": lambda v: A.max_pool3d_with_indices.default(v.v, [2])[0],
    "aten.avg_pool1d.default": lambda v: A.avg_pool1d.default(v.s, [3], [2], [1], True),
    "aten.avg_pool2d.default": lambda v: A.avg_pool2d.default(v.im, [3], [2], [1], False, True, 5),
    "aten.avg_pool3d.default": lambda v: A.avg_pool3d.default(v.v, [2], [2], [1], False, False),
    "aten.adaptive_avg_pool1d.default": lambda v: A.adaptive_avg_pool1d.default(v.s, [4]),
    "aten.adaptive_avg_pool2d.default": lambda v: A.adaptive_avg_pool2d.default(v.im, [3, 2]),
    "aten.adaptive_avg_pool3d.default": lambda v: A.adaptive_avg_pool3d.default(v.v, [1, 2, 4]),
    "aten.adaptive_max_pool1d.default": lambda v: A.adaptive_max_pool1d.default(v.s, [4])[0],
    "aten.adaptive_max_pool2d.default": lambda v: A.adaptive_max_pool2d.default(v.im, [4, 2])[0],
    "aten.adaptive_max_pool3d.default": lambda v: A.adaptive_max_pool3d.default(v.v, [1, 2, 3])[0],
    "aten.upsample_nearest1d.vec": lambda v: A.upsample_nearest1d.vec(v.s, [11], None),
    "aten.upsample_nearest2d.vec": lambda v: A.upsample_nearest2d.vec(v.im, None, [2.0, 1.5]),
    "aten.upsample_nearest3d.vec": lambda v: A.upsample_nearest3d.vec(v.v, [8, 4, 3], None),
    "aten.upsample_nearest1d.default": lambda v: A.upsample_nearest1d.default(v.s, [12], 2.0),
    "aten.upsample_nearest2d.default": lambda v: A.upsample_nearest2d.default(v.im, [12, 4]),
    "aten.upsample_nearest3d.default": lambda v: A.upsample_nearest3d.default(v.v, [8, 8, 8]),
    "aten._upsample_nearest_exact1d.vec": lambda v: A._upsample_nearest_exact1d.vec(v.s, [11], None),
    "aten._upsample_nearest_exact2d.vec": lambda v: A._upsample_nearest_exact2d.vec(v.im, None, [2.0, 0.5]),
    "aten._upsample_nearest_exact3d.vec": lambda v: A._upsample_nearest_exact3d.vec(v.v, [8, 4, 3], None),
    "aten.upsample_linear1d.vec": lambda v: A.upsample_linear1d.vec(v.s, [11], False, None),
    "aten.upsample_linear1d.default": lambda v: A.upsample_linear1d.default(v.s, [12], True),
    "aten.upsample_bilinear2d.vec": lambda v: A.upsample_bilinear2d.vec(v.im, None, False, [2.0, 1.7]),
    "aten.upsample_bilinear2d.vec/corners": lambda v: A.upsample_bilinear2d.vec(v.im, [9, 3], True, None),
    "aten.upsample_trilinear3d.vec": lambda v: A.upsample_trilinear3d.vec(v.v, [6, 3, 5], False, None),
    "aten.upsample_trilinear3d.default": lambda v: A.upsample_trilinear3d.default(v.v, [6, 3, 5], True),
    "aten.upsample_bicubic2d.vec": lambda v: A.upsample_bicubic2d.vec(v.im, None, False, [1.5, 2.0]),
    "aten.upsample_bicubic2d.default": lambda v: A.upsample_bicubic2d.default(v.im, [9, 3], True),
    "aten._upsample_bilinear2d_aa.vec": lambda v: A._upsample_bilinear2d_aa.vec(v.im, [3, 4], False, None),
    "aten._upsample_bilinear2d_aa.default": lambda v: A._upsample_bilinear2d_aa.default(v.im, [3, 9], False),
    "aten._upsample_bicubic2d_aa.vec": lambda v: A._upsample_bicubic2d_aa.vec(v.im, None, False, [0.5, 0.7]),
    "aten._upsample_bicubic2d_aa.default": lambda v: A._upsample_bicubic2d_aa.default(v.im, [3, 9], False),
    "aten.upsample_bilinear2d.default": lambda v: A.upsample_bilinear2d.default(v.im, [9, 3], False),
    "aten.grid_sampler.default": lambda v: A.grid_sampler.default(v.im, grid(v), 0, 0, False),
    "aten.grid_sampler_2d.default": lambda v: A.grid_sampler_2d.default(v.im, grid(v), 1, 1, True),
    "jquant.grid_sample_absolute.default": lambda v: grid_sample_absolute(v.im, 5.0 * grid(v)),
    "aten.affine_grid_generator.default": lambda v: A.affine_grid_generator.default(
        v.x[:, :2, :3], [v.x.shape[0], 3, 5, 7], False
    ),
}


def grid(v: Any) -> torch.Tensor:
    return torch.stack([v.u, v.y * 0.7], -1)


GROUPS = {
    "elementwise": ELEMENTWISE,
    "in_place": IN_PLACE,
    "compare": COMPARE,
    "reduce": REDUCE,
    "move": MOVE,
    "layers": LAYERS,
    "images": IMAGES,
    "scatter": SCATTER,
}
CASES: dict[str, Callable[[Any], Any]] = {name: f for group in GROUPS.values() for name, f in group.items()}


def difference(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> str:
    """What is wrong, or nothing."""
    kinds = {"float32": "float32", "bool": "bool", "int64": "int32", "int32": "int32", "uint8": "uint8"}
    if actual.shape != expected.shape or str(actual.dtype) != kinds[str(expected.dtype)]:
        return f"{actual.dtype}{actual.shape} instead of {expected.dtype}{expected.shape}"
    if actual.dtype != np.float32:
        return "" if np.array_equal(actual, expected) else "other values"
    if not np.array_equal(np.isfinite(actual), np.isfinite(expected)):
        return "NaN or infinity elsewhere"
    finite = np.isfinite(expected)
    error = np.abs(actual[finite] - expected[finite]).max(initial=0.0)
    return f"off by {error}" if error > tolerance * max(1.0, np.abs(expected[finite]).max(initial=0.0)) else ""
