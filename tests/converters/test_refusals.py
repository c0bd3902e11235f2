"""The one list of what a reader cannot import, from three doors."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from support.onnx_helpers import model_of

import jquant as jq
from jquant_converters import from_onnx, from_torch, model_from_onnx
from jquant_converters.refusals import listed

COUNT = 53


def test_the_list_says_how_many_more() -> None:
    assert listed("no", ["a", "b"], "Leave them out") == "no:\n  a\n  b\nLeave them out"
    text = listed("no", [f"place {i}" for i in range(COUNT)], "Leave them out")
    assert "place 49\n  and 3 more\nLeave them out" in text
    assert "place 50" not in text


class Foreign(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(torch.linalg.inv(x + i) for i in range(COUNT))


def test_every_door_lists_its_places() -> None:
    with pytest.raises(jq.ConversionError) as torch_error:
        from_torch(Foreign(), (torch.eye(3).expand(2, 3, 3),))
    nodes = [helper.make_node("NonMaxSuppression", ["x", "x"], [f"y{i}"], f"n{i}") for i in range(COUNT)]
    file = model_of(nodes, {"x": np.ones((2, 3, 4), np.float32)}, {"y0": TensorProto.INT64})
    with pytest.raises(jq.ConversionError) as onnx_error:
        from_onnx(file)
    for error, head, remedy in (
        (torch_error, "jquant has no operator for:\n  aten.", "jquant_converters.aten.TABLE"),
        (onnx_error, "jquant cannot import:\n  NonMaxSuppression 'n0'", "jquant_converters.onnx_in.TABLE"),
    ):
        text = str(error.value)
        assert head in text
        assert text.endswith(remedy)
        assert f"\n  and {COUNT - 50} more\n" in text


def test_zero_points_are_listed_the_same_way() -> None:
    numbers = {"s": np.float32(0.1), "z": np.uint8(3)}
    nodes = []
    for i in range(COUNT):
        nodes.append(helper.make_node("QuantizeLinear", [f"y{i}" if i else "x", "s", "z"], [f"q{i}"], f"q{i}"))
        nodes.append(helper.make_node("DequantizeLinear", [f"q{i}", "s", "z"], [f"y{i + 1}"], f"d{i}"))
    file = model_of(nodes, {"x": np.ones((2, 3), np.float32)}, {f"y{COUNT}": TensorProto.FLOAT}, initializers=numbers)
    assert isinstance(file, onnx.ModelProto)
    with pytest.raises(jq.ConversionError, match=rf"^{COUNT} zero points are not 0:\n(.*\n){{50}}  and 3 more\n"):
        model_from_onnx(file, target=jq.targets.NASH_E)
