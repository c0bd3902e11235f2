"""Scales from and to the state dict of a model that was prepared with a plugin of torch's fake-quantization.

The vendor's public documents say that a FakeQuantize module stands beside what it quantizes, as
`activation_post_process`, with buffers `scale` and `zero_point`; the names of its weight's and its observer's buffers
are those of torch.ao, which it follows. Where a model has others, a mapping says so.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

from jquant.plan.scales import quantizer_of
from jquant.text import did_you_mean
from jquant.types import MIN_SCALE, FormatError, Model, QuantSpec

from .torch_out.fake_quant import _paths, fake_quant_state_dict

WEIGHT, OUTPUT = "{}.weight_fake_quant", "{}.activation_post_process"
_OBSERVER = "activation_post_process"  # of a FakeQuantize, beneath it


@dataclass(frozen=True)
class PluginScales:
    """What `from_plugin_state_dict` found.

    `model`    with the scales that matched
    `matched`  {value or weight: key of its scale, or of its observer's maximum}
    `missing`  {value or weight: why it has no scale from the file}
    `unused`   keys of scales in the file that no value or weight took
    """

    model: Model
    matched: Mapping[str, str]
    missing: Mapping[str, str]
    unused: tuple[str, ...]


def read_mapping(path: str | os.PathLike[str]) -> dict[str, str]:
    """A mapping in TOML or JSON: {value or weight here: path of its FakeQuantize there}.

    For example, in TOML:

        "layer1.conv" = "backbone.layer1.0.activation_post_process"
        "layer1.conv.weight" = "backbone.layer1.0.weight_fake_quant"

    Raises:
      FormatError: no such form. FileNotFoundError: no file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no mapping at {path}")
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise FormatError(f"{path}: {error}") from error
    if not isinstance(data, dict) or not all(isinstance(value, str) for value in data.values()):
        raise FormatError(f"{path}: a mapping has a line for each name here, with the path of its FakeQuantize there")
    return data


def from_plugin_state_dict(
    model: Model,
    state: Mapping[str, torch.Tensor],
    *,
    prefix: str = "",
    mapping: Mapping[str, str] | None = None,
    weight: str = WEIGHT,
    output: str = OUTPUT,
) -> PluginScales:
    """Sets the scales of a model to those of a state dict: of buffers `scale`, or of an observer's minimum and maximum.

    Args:
      model: prepared; it need not be calibrated. Its parameters stay as they are.
      state: the state dict, which has float32 scales, one or one per output channel.
      prefix: what the keys begin with, such as "module.".
      mapping: {value or weight: path of its FakeQuantize}, before which the patterns do not count.
      weight, output: where a fake-quantizer is, `{}` being the path of a module.

    Returns:
      `PluginScales`. A value with a fixed scale keeps it; a file with another one is named as missing.

    Raises:
      FormatError: a mapping that names no value or weight of the model.
    """
    plan, given = model.plan, dict(mapping or {})
    names = [name for name in (*plan.owned, *plan.weights) if not plan.spec(name).is_float]
    if wrong := [name for name in given if name not in names]:
        raise FormatError(f"the mapping names {wrong[0]!r}, which has no scale here{did_you_mean(wrong[0], names)}")
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    qparams, matched, missing = dict(model.qparams), {}, {}
    for name in names:
        places = [given[name]] if name in given else _places(model, name, weight, output)
        try:
            key, scale = _found(state, places, plan.spec(name), name in plan.weights)
            spec = plan.spec(name)
            _check(scale, spec, _channels(model, name))
        except ValueError as reason:
            missing[name] = str(reason)
            continue
        matched[name] = prefix + key
        if spec.fixed_scale is None:
            steps = jnp.asarray(scale if spec.axis else scale.reshape(()))
            qparams[name] = quantizer_of(spec).init(steps, spec)
    taken = {key.removeprefix(prefix).rpartition(".")[0] for key in matched.values()}
    unused = [prefix + k for k in state if k.endswith(".scale") and k.removesuffix(".scale") not in taken]
    return PluginScales(model.replace(qparams=qparams), matched, missing, tuple(unused))


def to_plugin_state_dict(
    model: Model, *, prefix: str = "", mapping: Mapping[str, str] | None = None
) -> dict[str, torch.Tensor]:
    """The scales of a model as buffers `scale` and `zero_point` of FakeQuantize modules, for `load_state_dict`.

    Args:
      model: calibrated or trained.
      prefix: what the keys are to begin with.
      mapping: {value or weight: path of its FakeQuantize}, in place of `fake_quant_state_dict`'s paths.

    Returns:
      {key: tensor}. `from_plugin_state_dict` with the same prefix and mapping reads it back.

    Raises:
      ConversionError, CalibrationError: as `fake_quant_state_dict`.
    """
    found, given = fake_quant_state_dict(model), dict(mapping or {})
    for name, path in given.items():
        places = _places(model, name, WEIGHT, OUTPUT)
        made = {place: {p: found.pop(f"{place}.{p}", None) for p in ("scale", "zero_point")} for place in places}
        buffers = next((each for each in made.values() if each["scale"] is not None), None)
        if buffers is None:
            raise FormatError(f"the mapping names {name!r}, which has no scale here{did_you_mean(name, model.qparams)}")
        found |= {f"{path}.{part}": value for part, value in buffers.items() if value is not None}
    return {prefix + key: value for key, value in found.items()}


def _places(model: Model, name: str, weight: str, output: str) -> list[str]:
    """Paths of fake-quantizers that may stand for a value or weight, the one that counts first.

    Of fused modules the last one in the order of the graph makes the value.
    """
    if name in model.plan.weights:
        return [weight.format(name.removesuffix(".weight"))] if name.endswith(".weight") else []
    order = {row.name: i for i, row in enumerate(model.plan.resolutions)}
    paths = sorted(dict.fromkeys(_paths(model.plan, name)), key=lambda path: order.get(path, -1), reverse=True)
    return [output.format(path) for path in paths]


def _found(
    state: Mapping[str, torch.Tensor], places: list[str], spec: QuantSpec, is_weight: bool
) -> tuple[str, np.ndarray]:
    """The key and the scales of the first place that has any.

    Raises:
      ValueError: none has, or with a zero point.
    """
    for place in places:
        if f"{place}.scale" in state:
            if (zero := state.get(f"{place}.zero_point")) is not None and bool((zero != 0).any()):
                raise ValueError(f"{place}.zero_point is not 0, and every integer here has zero point 0")
            return f"{place}.scale", _numbers(state[f"{place}.scale"])
        low, high = (f"{place}.{_OBSERVER}.{end}" for end in ("min_val", "max_val"))
        if low in state and high in state and state[low].numel():
            reach = np.maximum(np.maximum(-_numbers(state[low]), _numbers(state[high])), 0)
            half = np.float32((spec.range[1] - spec.range[0]) / 2)
            return high, np.maximum(reach / half, np.float32(MIN_SCALE))
    what = "weight" if is_weight else "value"
    raise ValueError(
        f"no scale in the file at {', '.join(places) or 'any place'}; a mapping can name that of the {what}"
    )


def _numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().to(torch.float32).reshape(-1).numpy().copy()


def _channels(model: Model, name: str) -> int:
    axis: Any = model.plan.weight_axis.get(name)
    return 1 if axis is None else int(model.params[name].shape[axis])


def _check(scale: np.ndarray, spec: QuantSpec, channels: int) -> None:
    """Raises ValueError for scales that the format cannot have."""
    if scale.size != channels:
        raise ValueError(f"the file has {scale.size} scales, and the format {spec} has {channels}")
    if not (np.isfinite(scale).all() and (scale >= np.float32(MIN_SCALE)).all()):
        raise ValueError(f"the file has a scale of {scale.min():g}; the smallest here is 2^-23")
    if spec.fixed_scale is not None and (scale != np.float32(spec.fixed_scale)).any():
        raise ValueError(f"the qconfig fixes it at {spec.fixed_scale:g}, and the file has {scale[0]:g}")
