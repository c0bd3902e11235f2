"""Shifts of exact integers by constant bits, from torch and from JAX, in every meaning and on the way back."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import jquant as jq
from jquant_converters import from_onnx, from_torch, to_onnx, to_torch

X = np.int32([[-(2**31), -(2**31) + 1, -1000, -81, -1, 0, 1], [2**31 - 1, 8399, 81, 7, 2, 1, 0]])
BITS = (1, 7, 30)


class Shifts(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        left = torch.bitwise_left_shift(x, 2), x << torch.tensor(3, dtype=torch.int32)
        return (*(x >> n for n in BITS), *(x << n for n in BITS), torch.bitwise_right_shift(x, 0), *left)


def in_jax(params: Any, x: jnp.ndarray) -> tuple[jnp.ndarray, ...]:
    return (*(x >> n for n in BITS), *(x << n for n in BITS), x >> 0, jnp.left_shift(x, 2), x << 3)


WANTED = [y.numpy() for y in Shifts()(torch.from_numpy(X))]


def check(results: dict[str, Any]) -> None:
    for name, found in results.items():
        for i, (y, wanted) in enumerate(zip(found, WANTED, strict=True)):
            np.testing.assert_array_equal(np.asarray(y), wanted, err_msg=f"{name}, output {i}")


@pytest.mark.parametrize("door", ["torch", "JAX"])
def test_shifts_in_every_meaning(door: str) -> None:
    if door == "torch":
        graph, params = from_torch(Shifts().eval(), (torch.from_numpy(X),))
    else:
        graph, params = jq.trace(in_jax, {}, X)
    assert {type(node.op).__name__ for node in graph.nodes} == {"BitShift"}
    program = jq.lower(jq.prepare(graph, params, jq.QConfig({"*": jq.Policy()}), target="nash-e"))
    again = from_onnx(to_onnx(graph, params).SerializeToString())
    module, x = to_torch(graph, params), torch.from_numpy(X)
    check(
        {
            "float": jq.graph.evaluate_float(graph, params, X),
            "integers": jq.run(program, X),
            "reference": jq.reference.run(program, X)[0],
            "ONNX": jq.graph.evaluate_float(*again, X),
            "torch": module(x),
            "torch and back": jq.graph.evaluate_float(*from_torch(module, (x,)), X),
        }
    )


@pytest.mark.parametrize(
    ("shift", "x", "message"),
    [
        (lambda x: x << 32, torch.zeros(2, 3, dtype=torch.int32), "a shift by 32 bits; an int32 has 0 to 31"),
        (lambda x: x >> 1, torch.zeros(2, 3, dtype=torch.uint8), "a shift of torch.uint8; convert it with .int"),
        (lambda x: x >> x, torch.zeros(2, 3, dtype=torch.int32), "the bits are a tensor"),
    ],
)
def test_a_shift_without_a_meaning_is_refused(shift: Any, x: torch.Tensor, message: str) -> None:
    class Shift(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return shift(x)

    with pytest.raises(jq.ConversionError, match=message):
        from_torch(Shift(), (x,))


def test_a_shift_of_64_bits_must_fit() -> None:
    class Shift(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x << 20) >> 20

    with pytest.raises(jq.ConversionError, match="integers have 32 bits here"):
        from_torch(Shift(), (torch.zeros(2, 3, dtype=torch.int64),))
