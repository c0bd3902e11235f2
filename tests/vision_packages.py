"""torchvision and timm where they are installed, with whatever build of torch there is."""

import importlib
import importlib.util
import sys
import warnings
from types import ModuleType

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[torch.library.Library] = []  # a definition lives as long as its library


def load(name: str) -> ModuleType | None:
    """The package, or None. torchvision built for another torch lacks its operators; their schemas are enough here."""
    if importlib.util.find_spec(name) is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except RuntimeError as error:
            if "torchvision::nms" not in str(error):
                raise
        for loaded in [m for m in sys.modules if m.split(".")[0] in ("torchvision", name)]:
            del sys.modules[loaded]
        library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            library.define(schema)
        _libraries.append(library)
        return importlib.import_module(name)
