"""torchvision and timm where they are installed, with whatever build of torch there is."""

import importlib
import importlib.util
import sys
import warnings
from functools import cache
from types import ModuleType

from torch import library

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@cache  # which keeps it: a definition lives as long as its library
def _define_schemas() -> library.Library:
    found = library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        found.define(schema)
    return found


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
        _define_schemas()
        return importlib.import_module(name)
