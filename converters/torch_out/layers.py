"""Layers with parameters, pools, norms, attention and sampling, as calls of torch."""

from typing import Any

import torch
import torch.nn.functional as F

import jquant.ops as ops
from jquant.ops.attention import LEAST_ADDED
from jquant.ops.resample_weights import weights_of
from jquant.types import ConversionError

from .base import Shape, Site, is_same_padding, pad_spatial, torch_rule


def _scale_channels(x: Any, weight: Any, bias: Any, *_: Any) -> Any:
    """A depthwise convolution of [N, C], without a window: what is left of a batch norm that follows no layer."""
    y = x * weight.flatten()
    return y if bias is None else y + bias


_CONV = {0: _scale_channels, 1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_ADAPTIVE_AVG = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
_ADAPTIVE_MAX = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}


def _finish(y: Any, addend: Any, activation: str) -> Any:
    y = y if addend is None else y + addend
    return {"none": lambda v: v, "relu": F.relu, "relu6": F.relu6}[activation](y)


@torch_rule.register
def _(op: ops.Conv, site: Site, x: Any, addend: Any = None, *, weight: Any, bias: Any = None) -> Any:
    padding: Any = [low for low, _ in op.padding]
    if not is_same_padding(op.padding):
        x, padding = pad_spatial(x, op.padding), [0] * len(op.padding)
    y = _CONV[len(op.strides)](x, weight, bias, list(op.strides), padding, list(op.dilation), op.groups)
    return _finish(y, addend, op.activation)


@torch_rule.register
def _(op: ops.ConvTranspose, site: Site, x: Any, addend: Any = None, *, weight: Any, bias: Any = None) -> Any:
    if not is_same_padding(op.padding):
        raise ConversionError(f"torch has no transposed convolution with padding {op.padding}, unequal at both ends")
    padding = [low for low, _ in op.padding]
    call = _CONV_TRANSPOSE[len(op.strides)]
    y = call(x, weight, bias, list(op.strides), padding, list(op.output_padding), op.groups, list(op.dilation))
    return _finish(y, addend, op.activation)


@torch_rule.register
def _(op: ops.Linear, site: Site, x: Any, addend: Any = None, *, weight: Any, bias: Any = None) -> Any:
    return _finish(F.linear(x, weight, bias), addend, op.activation)


@torch_rule.register
def _(op: ops.BatchNorm, site: Site, x: Any, *, running_mean: Any, running_var: Any, **affine: Any) -> Any:
    weight, bias = affine.get("weight"), affine.get("bias")
    return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, op.epsilon)


@torch_rule.register
def _(op: ops.PRelu, site: Site, x: Any, *, weight: Any) -> Any:
    return F.prelu(x, weight)


@torch_rule.register
def _(op: ops.Embedding, site: Site, index: Any, *, weight: Any) -> Any:
    index = torch.where(index < 0, index + weight.shape[0], index) if op.from_end else index
    return F.embedding(index, weight, None if op.padding_index < 0 else op.padding_index)


# ---------------------------------------------------------------------------------------------------------------------
# Pools


@torch_rule.register
def _(op: ops.MaxPool, site: Site, x: Any) -> Any:
    padding: Any = [low for low, _ in op.padding]
    if not is_same_padding(op.padding) or any(2 * low > k for low, k in zip(padding, op.kernel, strict=True)):
        x, padding = pad_spatial(x, op.padding, float("-inf")), 0
    pool = _MAX_POOL[len(op.kernel)]
    return pool(x, list(op.kernel), list(op.strides), padding, list(op.dilation), ceil_mode=op.ceil_mode)


@torch_rule.register
def _(op: ops.AvgPool, site: Site, x: Any) -> Any:
    padding: Any = [low for low, _ in op.padding]
    if not is_same_padding(op.padding):
        if not (op.count_include_pad or op.divisor):
            raise ConversionError(f"torch has no average pool with padding {op.padding}, unequal and not counted")
        x, padding = pad_spatial(x, op.padding), 0
    options = {} if op.divisor is None else {"divisor_override": op.divisor}
    pool = _AVG_POOL[len(op.kernel)]
    return pool(x, list(op.kernel), list(op.strides), padding, op.ceil_mode, op.count_include_pad, **options)


@torch_rule.register
def _(op: ops.AdaptiveAvgPool, site: Site, x: Any) -> Any:
    return _ADAPTIVE_AVG[len(op.output_size)](x, list(op.output_size))


@torch_rule.register
def _(op: ops.AdaptiveMaxPool, site: Site, x: Any) -> Any:
    return _ADAPTIVE_MAX[len(op.output_size)](x, list(op.output_size))


# ---------------------------------------------------------------------------------------------------------------------
# Composites


@torch_rule.register
def _(op: ops.Softmax, site: Site, x: Any, masked: Any = None) -> Any:
    if masked is None:
        return torch.softmax(x, op.axis)
    return _masked_softmax(x, masked, op.axis, op.empty)


def _masked_softmax(x: Any, masked: Any, axis: int, empty: str) -> Any:
    if empty == "scores":
        masked = masked.expand(x.shape) & ~masked.expand(x.shape).all(axis, keepdim=True)
    y = torch.softmax(x.masked_fill(masked, float("-inf") if empty == "nan" else -1e30), axis)
    return y if empty in ("mean", "nan") else y.masked_fill(masked, 0.0)


@torch_rule.register
def _(op: ops.LogSoftmax, site: Site, x: Any) -> Any:
    return torch.log_softmax(x, op.axis)


@torch_rule.register
def _(op: ops.LayerNorm, site: Site, x: Any, *, weight: Any = None, bias: Any = None) -> Any:
    return F.layer_norm(x, list(site.shapes[0][len(site.shapes[0]) - op.rank :]), weight, bias, op.epsilon)


@torch_rule.register
def _(op: ops.RmsNorm, site: Site, x: Any, *, weight: Any = None) -> Any:
    return F.rms_norm(x, list(site.shapes[0][len(site.shapes[0]) - op.rank :]), weight, op.epsilon)


@torch_rule.register
def _(op: ops.GroupNorm, site: Site, x: Any, *, weight: Any = None, bias: Any = None) -> Any:
    return F.group_norm(x, op.groups, weight, bias, op.epsilon)


@torch_rule.register
def _(op: ops.InstanceNorm, site: Site, x: Any, *, weight: Any = None, bias: Any = None) -> Any:
    return F.instance_norm(x, None, None, weight, bias, True, 0.0, op.epsilon)


@torch_rule.register
def _(op: ops.Attention, site: Site, query: Any, key: Any, value: Any, mask: Any = None, allowed: Any = None) -> Any:
    """A query whose keys are all masked gets 0, in torch as here, unless `empty` says otherwise."""
    if op.mask == "add":
        mask = mask.clamp(min=LEAST_ADDED)
    if allowed is not None:
        if op.causal:
            allowed = allowed.logical_and(_earlier(site))
        scale = query.shape[-1] ** -0.5 if op.scale is None else op.scale
        scores = query @ key.transpose(-1, -2) * scale + mask
        return _masked_softmax(scores, ~allowed, -1, op.empty) @ value
    causal = op.causal
    if causal and mask is not None:  # torch takes one of the two
        causal, earlier = False, _earlier(site)
        mask = mask.logical_and(earlier) if op.mask == "bool" else mask.masked_fill(earlier.logical_not(), -1e30)
    if op.empty != "zero" and op.mask == "bool":
        scale = query.shape[-1] ** -0.5 if op.scale is None else op.scale
        return _masked_softmax(query @ key.transpose(-1, -2) * scale, ~mask, -1, op.empty) @ value
    return F.scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=op.scale)


def _earlier(site: Site) -> Any:
    """bool [L, S]: True where the key does not come after the query."""
    return site.constant(torch.ones(site.shapes[0][-2], site.shapes[1][-2], dtype=torch.bool).tril())


@torch_rule.register(ops.Lstm)
@torch_rule.register(ops.Gru)
def _(op: Any, site: Site, x: Any, hidden: Any = None, cell: Any = None, **weights: Any) -> Any:
    x = x.flip(1) if op.reverse else x
    roles = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    flat = [weights[role] for role in roles if role in weights]
    if len(flat) == 3:
        raise ConversionError("torch has no recurrent layer with one of two biases; give both or none")
    hidden = _state(site, x) if hidden is None else hidden.unsqueeze(0)
    options = (len(flat) == 4, 1, 0.0, False, False, True)
    if isinstance(op, ops.Lstm):
        cell = _state(site, x) if cell is None else cell.unsqueeze(0)
        result = torch.lstm(x, [hidden, cell], flat, *options)
    else:
        result = torch.gru(x, hidden, flat, *options)
    if op.output == "sequence":
        return result[0].flip(1) if op.reverse else result[0]
    return result[1 if op.output == "hidden" else 2].squeeze(0)


def _state(site: Site, x: Any) -> Any:
    """Zeros [1, N, H]."""
    return site.call(torch.zeros, 1, x.size(0), site.output[-1])


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


@torch_rule.register
def _(op: ops.Interpolate, site: Site, x: Any) -> Any:
    if op.coordinates == "asymmetric":
        by = None if op.recompute_scale_factor else op.scale_factor
        sizes = tuple(site.output[2:])
        same = ops.Resample(size=sizes, scale_factor=by, mode="linear", coordinates="asymmetric")
        return _by_weights(site, x, same)
    linear = {1: "linear", 2: "bilinear"}
    mode = linear[len(site.shapes[0]) - 2] if op.mode == "bilinear" else op.mode
    corners = op.align_corners if op.mode == "bilinear" else None
    if op.size is not None:
        return F.interpolate(x, size=list(op.size), mode=mode, align_corners=corners)
    factors = list(op.scale_factor or ())
    recompute = op.recompute_scale_factor or None
    return F.interpolate(x, None, factors, mode, corners, recompute)


@torch_rule.register
def _(op: ops.Resample, site: Site, x: Any) -> Any:
    """By torch's own function where it has the kernel, so that it is one call in an exported program."""
    plain = op.coordinates != "asymmetric" and op.exclude_outside == op.antialias and len(op.size) == 2
    kernel = -0.5 if op.antialias else -0.75
    corners = op.coordinates == "align_corners"
    known = op.mode == "linear" or op.coefficient == kernel
    if not plain or not known or (op.antialias and corners) or (op.mode == "linear" and not op.antialias):
        return _by_weights(site, x, op)
    mode = "bicubic" if op.mode == "cubic" else "bilinear"
    if op.scale_factor is None or corners:
        return F.interpolate(x, list(op.size), None, mode, corners, antialias=op.antialias)
    return F.interpolate(x, None, list(op.scale_factor), mode, corners, antialias=op.antialias)


def _by_weights(site: Site, x: Any, op: ops.Resample) -> Any:
    for i, n in enumerate(site.shapes[0][2:]):
        weights = site.constant(torch.from_numpy(weights_of(op, i, n)))
        x = (x.movedim(2 + i, -1) @ weights.t()).movedim(-1, 2 + i)
    return x


@torch_rule.register
def _(op: ops.GridSample, site: Site, x: Any, grid: Any) -> Any:
    corners = op.align_corners
    if site.shapes[1][0] != site.shapes[0][0]:  # one grid for the whole batch
        grid = grid.expand(x.size(0), -1, -1, -1)
    if op.coordinates == "absolute":  # last, so that `from_torch` sees pixels in front of it
        grid, corners = _normalize(grid, site.shapes[0][2:]), False
    return F.grid_sample(x, grid, op.mode, op.padding, corners)


@torch_rule.register
def _(op: ops.Warp, site: Site, x: Any, flow: Any) -> Any:
    height, width = site.shapes[1][2:]
    row, column = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    base = site.constant(torch.stack([column, row]).unsqueeze(0))
    grid = (base + flow).permute(0, 2, 3, 1)
    return F.grid_sample(x, _normalize(grid, site.shapes[0][2:]), op.mode, op.padding, False)


def _normalize(grid: Any, size: Shape) -> Any:
    """Absolute coordinates (x, y) in pixels to normalized ones with align_corners=False."""
    x, y = (grid[..., i : i + 1] for i in (0, 1))
    return torch.cat([(2.0 * x + 1.0) / size[1] - 1.0, (2.0 * y + 1.0) / size[0] - 1.0], -1)


@torch_rule.register
def _(op: ops.AffineGrid, site: Site, theta: Any) -> Any:
    size = [site.call(getattr, theta, "shape")[0], 1, *op.size]
    return F.affine_grid(theta, size, op.align_corners)
