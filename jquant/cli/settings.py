"""The TOML file of the command line: a qconfig, and beside it the march, the preprocessing and the training recipe.

[jquant]
schema = 1

[target]
march = "nash-e"

[rules."*".output]
dtype = "int8"

[image]
resize = 256               # the short side, or [height, width]
crop = 224                 # the centre, or [height, width]
color = "rgb"              # or "bgr", "gray", "yuv444" (centred, full swing), "yuv444_studio"
divisor = 255.0            # pixels / divisor, then (x - mean) / std
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]
layout = "nchw"            # or "nhwc"
labels = "folders"         # or "stem": the file names are class numbers
draft = false              # true: JPEGs are decoded at 1/2, 1/4 or 1/8 where resize leaves no more

[train]                    # jquant train
epochs = 2
averaging = 0.01           # the share of the newest batch in an observed scale

[train.values]             # when values are quantized: true, false, from a step on, or in steps [first, last)
"*" = 1000

[train.weights]            # when weights are
"head.*" = false

[train.observers]          # when scales of values follow the data of the quantized model
"*" = [0, 1500]
"""

import json
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from jquant import targets
from jquant.config.files import TABLES, qconfig_from_dict
from jquant.config.qconfig import QConfig
from jquant.text import did_you_mean
from jquant.training.switching import When
from jquant.types import FormatError, FrozenMap, QConfigError, Target

IGNORED = 255  # void pixels, as most data sets have them
LOSSES = ("cross_entropy", "mse", "l1")
COLORS = ("rgb", "bgr", "gray", "yuv444", "yuv444_studio")


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """How a picture becomes an input, in this order: resize, crop, colour, divisor, mean and std, layout.

    `draft` lets a JPEG be decoded at 1/2, 1/4 or 1/8 of its size where `resize` makes it no larger. That is faster, and
    the pixels are others.
    """

    resize: int | tuple[int, int] | None = None
    crop: int | tuple[int, int] | None = None
    color: str = "rgb"
    divisor: float = 255.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: str = "nchw"
    labels: str = "folders"
    draft: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """A recipe of quantization-aware training.

    `loss`       "cross_entropy", "mse", "l1", or `module:function` for (outputs, labels) to a scalar
    `ignore_label`  the class that "cross_entropy" leaves out, such as void pixels; 255 is one where there are so many
    `optimizer`  "sgd" with Nesterov momentum, or "adamw"
    `learning_rate`, `scale_learning_rate`  of parameters and of scales, for "adamw" relative to a scale
    `weight_decay`  of kernels only
    `schedule`   "constant", "cosine", or "step": divided by 10 at 1/3 and 2/3 of the steps
    `mode`       "fake_quant" or "bit_true"
    `clip`       global norm that gradients are clipped to; 0 for none
    `values`, `weights`, `observers`, `averaging`  as for `jq.training.switches`: {pattern: when}, in steps of training
    """

    epochs: int = 2
    batch: int = 32
    loss: str = "cross_entropy"
    ignore_label: int = IGNORED
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 1e-3
    scale_learning_rate: float = 1e-5
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "cosine"
    mode: Literal["fake_quant", "bit_true"] = "fake_quant"
    clip: float = 0.0
    seed: int = 0
    values: FrozenMap[When] = FrozenMap()
    weights: FrozenMap[When] = FrozenMap()
    observers: FrozenMap[When] = FrozenMap()
    averaging: float = 0.01

    @property
    def switched(self) -> bool:
        """Whether the recipe switches anything."""
        return bool(self.values or self.weights or self.observers)


_CHOICES = {
    "color": COLORS,
    "layout": ("nchw", "nhwc"),
    "labels": ("folders", "stem"),
    "optimizer": ("sgd", "adamw"),
    "schedule": ("constant", "cosine", "step"),
    "mode": ("fake_quant", "bit_true"),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the file says; what it leaves out is the default, or None."""

    qconfig: QConfig | None = None
    march: Target = targets.NASH_E
    image: ImageSettings = ImageSettings()
    has_image: bool = False
    train: TrainSettings = TrainSettings()


def read_settings(path: Path | None) -> Settings:
    """Reads the file; None gives defaults.

    Raises:
      FormatError: not TOML, an unknown table or key, or a value of another type; the message names the file.
      FileNotFoundError: no file.
    """
    if path is None:
        return Settings()
    if not path.is_file():
        raise FileNotFoundError(f"no settings at {path}; `jquant init -o {path}` writes them")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        _check_known("the file", data, TABLES)
        return Settings(
            qconfig=qconfig_from_dict(data) if "rules" in data else None,
            march=_march(data.get("target", {})),
            image=_table(ImageSettings, data.get("image", {}), "image"),
            has_image="image" in data,
            train=_table(TrainSettings, data.get("train", {}), "train"),
        )
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{path}: not TOML: {error}") from error
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error


def image_to_toml(image: ImageSettings) -> str:
    """The table [image] of a file."""
    values = ((f.name, getattr(image, f.name)) for f in fields(image))
    lines = (f"{k} = {json.dumps(v)}" for k, v in values if v is not None)  # of these types JSON is TOML
    return "\n".join(("[image]", *lines)) + "\n"


def joined_image(kept: ImageSettings | None, settings: Settings, source: str) -> ImageSettings | None:
    """The preprocessing of a model that may have its own, and of a file that may have one; labels are of the data.

    Raises:
      FormatError: two that differ.
    """
    if kept is None or not settings.has_image:
        return settings.image if settings.has_image else kept
    given = settings.image
    different = [
        f"{f.name} = {getattr(given, f.name)!r}, and {getattr(kept, f.name)!r} in the model"
        for f in fields(ImageSettings)
        if f.name != "labels" and getattr(given, f.name) != getattr(kept, f.name)
    ]
    if different:
        raise FormatError(
            f"{source} was made with another preprocessing of pictures than [image] says: {'; '.join(different)}. "
            "Leave [image] out, or calibrate the float model with the new one"
        )
    return given


def march_of(name: str) -> Target:
    """The target of a march by its name, by that of a chip, or in a file.

    Raises:
      FormatError: no such march.
    """
    try:
        return targets.find_target(name)
    except (QConfigError, FileNotFoundError) as error:
        raise FormatError(str(error)) from error


def _march(table: Any) -> Target:
    if not isinstance(table, Mapping):
        raise FormatError("target must be a table, such as [target] with march = 'nash-e'")
    if "name" in table:  # a march of one's own, field by field
        return targets.from_dict(table)
    _check_known("target", table, ("march",))
    return march_of(str(table.get("march", "nash-e")))


def image_from(data: Any) -> ImageSettings:
    """The preprocessing that a state or a program was written with, under the checks of the file of settings.

    Raises:
      FormatError: no preprocessing, or values that it cannot have.
    """
    if not isinstance(data, Mapping):
        return _table(ImageSettings, data, "image")
    given = {k: v for k, v in data.items() if v is not None or k not in ("resize", "crop")}  # None: not at all
    return _table(ImageSettings, given, "image")


def _check_known(where: str, data: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in data:
        if key not in known:
            raise FormatError(f"{where}: unknown key {key!r}{did_you_mean(key, known)}; known: {', '.join(known)}")


def _table(cls: type, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise FormatError(f"{where} must be a table, not {type(data).__name__}")
    known = {f.name: f.default for f in fields(cls)}
    _check_known(where, data, tuple(known))
    found = {}
    for key, value in data.items():
        default = known[key]
        found[key] = _value(f"{where}.{key}", key, value, default)
    return cls(**found)


def _value(where: str, key: str, value: Any, default: Any) -> Any:
    if key in _CHOICES:
        if value not in _CHOICES[key]:
            raise FormatError(f"{where} must be one of {', '.join(_CHOICES[key])}; not {value!r}")
        return value
    if isinstance(default, FrozenMap):
        return _times(where, value)
    if type(default) is bool:
        if type(value) is not bool:
            raise FormatError(f"{where} must be true or false; not {value!r}")
        return value
    if key in ("resize", "crop"):
        size = value if isinstance(value, list) else [value]
        if len(size) not in (1, 2) or not all(type(n) is int and n > 0 for n in size):
            raise FormatError(f"{where} must be a positive integer, or [height, width]; not {value!r}")
        return tuple(size) if isinstance(value, list) and len(size) == 2 else size[0]
    if key == "loss":
        if not isinstance(value, str) or (value not in LOSSES and ":" not in value):
            near = did_you_mean(str(value), LOSSES)
            raise FormatError(f"{where} must be one of {', '.join(LOSSES)}, or module:function; not {value!r}{near}")
        return value
    if isinstance(default, tuple):
        numbers = value if isinstance(value, list) else [value]
        if not numbers or not all(_is_number(n) for n in numbers) or (key == "std" and 0 in numbers):
            raise FormatError(
                f"{where} must be a finite number or a list of such{', not 0' * (key == 'std')}; not {value!r}"
            )
        return tuple(float(n) for n in numbers)
    if key == "averaging" and not (_is_number(value) and 0 <= value <= 1):
        raise FormatError(f"{where} must be from 0 to 1; not {value!r}")
    if isinstance(default, float):
        if not _is_number(value) or value < 0 or (key == "divisor" and value == 0):
            raise FormatError(f"{where} must be a finite number that is not negative; not {value!r}")
        return float(value)
    if type(value) is not int or value < 0 or (key in ("epochs", "batch") and value == 0):
        raise FormatError(f"{where} must be a positive integer; not {value!r}")
    return value


def _times(where: str, value: Any) -> FrozenMap[When]:
    """{pattern: when} of a table of switches; which patterns match something, the plan says."""
    shown = f'[{where}] must be a table of patterns, such as "*" = 1000'
    if not isinstance(value, Mapping):
        raise FormatError(f"{shown}; not {value!r}")
    for pattern, when in value.items():
        steps = when if isinstance(when, list) else [when]
        whole = all(type(n) is int and n >= 0 for n in steps) and sorted(steps) == steps
        if type(when) is not bool and not (whole and len(steps) == (2 if isinstance(when, list) else 1)):
            raise FormatError(f"{where}: {pattern!r} must be true, false, a first step or [first, last]; not {when!r}")
    return FrozenMap({pattern: tuple(when) if isinstance(when, list) else when for pattern, when in value.items()})


def _is_number(value: Any) -> bool:
    """Whether a value of the file is a finite number: TOML has nan and inf."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max  # an integer may be beyond float64
