"""Integers of torch and ONNX have 64 bits: arithmetic on them is exact here, or refused with a remedy."""

import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

import jquant as jq
from jquant_converters import from_onnx, from_torch

IDS = np.array([[1, 5000, 77_777, 3, 2147, 99, 2**31 - 1, -(2**31), 0, 123_456_789]], np.int64)
MODULI = (7, 1009, 46_341, 99_991, 1_000_003, 2**30 - 35)


class Hash(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *x):
        return self.function(*x)


def outcome(function, *inputs):
    """Our integers and torch's."""
    tensors = tuple(map(torch.from_numpy, inputs))
    graph, params = from_torch(Hash(function).eval(), tensors)
    ours = jq.graph.evaluate_float(graph, params, *(jnp.asarray(x.astype(np.int32)) for x in inputs))[0]
    return np.asarray(ours), function(*tensors).numpy()


@pytest.mark.parametrize("modulus", MODULI)
def test_the_remainder_of_a_hash_is_that_of_64_bits(modulus):
    ours, theirs = outcome(lambda ids: (ids * 1_000_003 + 12_345) % modulus, IDS)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("modulus", [1009, 99_991, 2**29 - 3])
def test_the_remainder_of_a_product_of_two_inputs(modulus):
    other = IDS[:, ::-1].copy()
    ours, theirs = outcome(lambda a, b: (a * b - 5 * a) % modulus, IDS, other)
    np.testing.assert_array_equal(ours, theirs)


def test_a_rolling_hash():
    ours, theirs = outcome(lambda ids: (((ids * 31 + 7) * 31 + 11) * 31 - ids * ids) % 65_521, IDS)
    np.testing.assert_array_equal(ours, theirs)


def test_an_embedding_of_hashed_ids():
    table = torch.nn.Embedding(1009, 4)
    ids = torch.from_numpy(IDS)
    model = torch.nn.Sequential(Hash(lambda x: x * 1_000_003 % 1009), table).eval()
    graph, params = from_torch(model, (ids,))
    ours = jq.graph.evaluate_float(graph, params, jnp.asarray(IDS.astype(np.int32)))[0]
    np.testing.assert_array_equal(ours, model(ids).detach().numpy())


@pytest.mark.parametrize(
    "function",
    [
        lambda ids: ids * 1_000_003 > 5,
        lambda ids: (ids * 1_000_003).clamp(0, 9),
        lambda ids: (ids * 1_000_003).abs() % 5,
        lambda ids: torch.fmod(ids * 1_000_003, 1009),
        lambda ids: (ids * 1_000_003).argmax(1),
        lambda ids: (ids * 1_000_003).amax(1),
        lambda ids: ids * 1_000_003,
    ],
)
def test_what_cannot_be_shown_to_fit_is_refused(function):
    with pytest.raises(jq.ConversionError, match=r"may be -\d+ to \d+, and integers have 32 bits here.*clamp"):
        outcome(function, IDS)


def test_what_fits_is_left_as_it_is():
    function = lambda ids: (ids.clamp(0, 1000) * 1_000_003) % 1009  # noqa: E731
    ours, theirs = outcome(function, IDS)
    np.testing.assert_array_equal(ours, theirs)
    graph, _ = from_torch(Hash(function), (torch.from_numpy(IDS),))
    assert len(graph.nodes) == 4
    # Sums that wrap are right where an index reads them: the sum itself fits.
    table = torch.arange(12.0).reshape(12, 1)
    ours, theirs = outcome(lambda ids: table[ids + 5 - 2], np.array([[0, 3, 8, -5]], np.int64))
    np.testing.assert_array_equal(ours, theirs)
    grid = torch.arange(48.0).reshape(12, 4)  # of several axes, and from the end
    ours, theirs = outcome(lambda ids: grid[ids + 5 - 2, ids - 1 + 2], np.array([[0, 2, -4]], np.int64))
    np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(jq.ConversionError, match="32 bits"):  # a sign that more than an index reads
        outcome(lambda ids: torch.where(ids + 5 < 0, ids + 17, ids + 5) % 3, IDS)


@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_narrow_integers_that_wrap_in_torch_are_refused(dtype):
    x = np.array([[100, 120, 3]]).astype(dtype)
    with pytest.raises(jq.ConversionError, match=f"is {dtype} in the model and wraps there.*\\.int\\(\\)"):
        outcome(lambda a: a * a * a, x)
    ours, theirs = outcome(lambda a: a.int() * 3, x)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", [TensorProto.INT64, TensorProto.INT32])
def test_a_hash_in_onnx_has_the_bits_of_the_file(dtype):
    """int64 is exact, and int32 wraps, in onnxruntime as here."""
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    graph = helper.make_graph(
        [helper.make_node("Mul", ["ids", "c"], ["p"]), helper.make_node("Mod", ["p", "m"], ["y"])],
        "hash",
        [helper.make_tensor_value_info("ids", dtype, ["N", IDS.shape[1]])],
        [helper.make_tensor_value_info("y", dtype, ["N", IDS.shape[1]])],
        [onnx.numpy_helper.from_array(np.array(v, kind), n) for n, v in (("c", 1_000_003), ("m", 1009))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    ours_graph, params = from_onnx(model)
    ours = jq.graph.evaluate_float(ours_graph, params, jnp.asarray(IDS.astype(np.int32)))[0]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(ours, session.run(None, {"ids": IDS.astype(kind)})[0])
