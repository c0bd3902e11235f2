"""Batch norm: as an operator of a float graph, and kept in the layer before it for training."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jquant.graph.checks import check_epsilon
from jquant.graph.operator import eval_float
from jquant.numerics.namespace import array_namespace, barrier
from jquant.types import Array, Op

BatchNormMode = Literal["live", "frozen", "reverse_fold"]  # how `jq.prepare` keeps one; otherwise "fold"


@dataclass(frozen=True, kw_only=True)
class BatchNorm(Op):
    """Inference batch norm of x [N, C, *S] (or [N, *S, C]). Parameters [C]: running_mean, running_var; optional weight
    and bias.

    `momentum`  of the running statistics in training, the weight of the new batch
    `unbiased`  whether they take the unbiased variance of the batch, as in torch; in flax it is the biased one
    `running`   False for mean and variance that are no running statistics (a scale of channels): it is always folded
    """

    epsilon: float = 1e-5
    momentum: float = 0.1
    unbiased: bool = True
    running: bool = True
    channels_last: bool = False

    def __post_init__(self) -> None:
        check_epsilon(self)


@dataclass(frozen=True, kw_only=True)
class KeptBatchNorm:
    """A batch norm that a convolution or linear keeps for training, between its bias and its addend or activation.

    The layer has more parameters then, [O]: norm_mean, norm_var; optional norm_weight and norm_bias. It is folded into
    weight and bias before there are integers (`jquant.plan.batch_norm`).

    `statistics`  that training normalizes with: of the batch, which moves the running ones; or the running ones
    `scaled`      the weight is quantized as the running statistics scale it, and the scaling undone after the layer
    `alone`       it followed no layer: the layer is a depthwise 1x1 convolution of ones, which is not trained
    """

    statistics: Literal["batch", "running"]
    scaled: bool = False
    epsilon: float = 1e-5
    momentum: float = 0.1
    unbiased: bool = True
    alone: bool = False


def keep(op: BatchNorm, mode: BatchNormMode, alone: bool) -> KeptBatchNorm:
    return KeptBatchNorm(
        statistics="running" if mode == "frozen" else "batch",
        scaled=mode == "reverse_fold",
        epsilon=op.epsilon,
        momentum=op.momentum,
        unbiased=op.unbiased,
        alone=alone,
    )


STATISTICS = ("norm_mean", "norm_var")  # the roles that a step moves without a gradient


@eval_float.register
def _(
    op: BatchNorm,
    x: Array,
    *,
    running_mean: Array,
    running_var: Array,
    weight: Array | None = None,
    bias: Array | None = None,
) -> Array:
    multiplier, offset = batch_norm_affine(op, running_mean, running_var, weight, bias)
    channels = x.ndim - 1 if op.channels_last else 1
    shape = [-1 if axis == channels else 1 for axis in range(x.ndim)]
    return x * multiplier.reshape(shape) + offset.reshape(shape)


def batch_norm_affine(
    op: BatchNorm | KeptBatchNorm, mean: Array, variance: Array, weight: Array | None, bias: Array | None
) -> tuple[Array, Array]:
    """The multiplier and offset [C] that inference batch norm amounts to.

    Behind barriers: XLA must not fuse products and sums, nor make a reciprocal square root of one and the other, so
    that they have the same bits inside any jit and in numpy.
    """
    deviation = barrier(array_namespace(variance).sqrt(variance + op.epsilon))
    multiplier = barrier(1.0 / deviation) * (1.0 if weight is None else weight)
    multiplier = barrier(multiplier)
    shift = barrier(mean * multiplier)
    return multiplier, (0.0 if bias is None else bias) - shift


def normalize(op: KeptBatchNorm, y: Array, mean: Array, variance: Array, norm: dict[str, Array]) -> Array:
    """y [..., O] with mean and variance [O] taken out, then scaled and moved by the norm's own weight and bias."""
    centred = (y - mean) * jax.lax.rsqrt(variance + op.epsilon)
    centred = centred * norm["norm_weight"] if "norm_weight" in norm else centred
    return centred + norm["norm_bias"] if "norm_bias" in norm else centred


def batch_moments(y: Array) -> tuple[Array, Array]:
    """Mean and (biased) variance [O] of y [..., O] over all other axes."""
    axes = tuple(range(y.ndim - 1))
    mean = jnp.mean(y, axes)
    return mean, jnp.mean(jnp.square(y - mean), axes)
