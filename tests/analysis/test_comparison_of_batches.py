"""Comparison over many batches of a net whose values numpy computes exactly, so that nothing depends on the batches."""

from collections.abc import Iterator

import numpy as np
import pytest
from support.compilations import counted
from support.exact_net import DATA, WEIGHTS, check_rows, cut, exact_net, joined_net
from support.processes import finish, start

import jquant as jq
from jquant.analysis import compare, compare_batches
from jquant.analysis.metrics import histogram
from jquant.analysis.statistics import merged, numbers_of, statistics_of

EIGHT = """
import jax
from jquant.analysis import compare_batches
from support.exact_net import check_rows, cut, exact_net, joined_net
import jquant as jq

mesh, model = jax.make_mesh((8,), ("data",)), exact_net()
for size in (61, 16, 10):  # the last batches hold 5, 13 and 1 samples
    check_rows(compare_batches(model, cut(0, 61, size), "float", "bit_true", mesh=mesh))
model, x = joined_net()
assert compare_batches(model, [x[:8], x[8:24]], mesh=mesh).rows[-1].size == 24 * 2 * 4  # nothing to pad
try:
    compare_batches(model, [x[:16], x[16:]], mesh=mesh)
except jq.InputError as error:
    assert "batch 1 has 14 samples, and value 'reshape' joins them with another axis" in str(error), error
else:
    raise AssertionError("padding was counted")
print("equal")
"""


@pytest.fixture(scope="module")
def model() -> jq.Model:
    return exact_net()


@pytest.mark.parametrize("b", ["bit_true", "fake_quant"])
@pytest.mark.parametrize("size", [1, 8, 61])
def test_every_number_is_numpy_on_all_samples(model: jq.Model, size: int, b: str) -> None:
    check_rows(compare_batches(model, cut(0, 61, size), "float", b))


def test_one_batch_and_many_give_one_comparison(model: jq.Model) -> None:
    whole, parts = compare(model, DATA), compare_batches(model, [(x,) for x in cut(0, 61, 7)])
    check_rows(whole)
    assert whole.weights == parts.weights
    assert (whole.a, whole.b, whole.missing) == (parts.a, parts.b, parts.missing)


def test_a_shorter_last_batch_compiles_nothing_more() -> None:
    model = exact_net(outputs=3)  # a plan that no other test compiles
    with counted() as found:
        compare_batches(model, cut(0, 61, 16), "float", "bit_true")
    assert len(found) <= 3


def test_two_models(model: jq.Model) -> None:
    other = model.replace(params={key: 2 * v for key, v in model.params.items()})
    found = compare_batches(model, cut(0, 61, 8), "float", "float", model_b=other)
    assert found.rows[-1].max_error == np.abs(DATA @ WEIGHTS).max()


def test_a_value_that_joins_the_batch_with_another_axis_is_not_padded() -> None:
    model, x = joined_net()
    row = compare_batches(model, [x[:16], x[16:]], "float", "bit_true").rows[-1]
    wanted = x @ WEIGHTS
    assert (row.size, row.minimum, row.maximum) == (wanted.size, wanted.min(), wanted.max())


def test_a_batch_that_is_masked_as_a_whole_counts_beside_no_other() -> None:
    a, b = np.float32([1, -3]), np.float32([2, -3])
    nothing = np.float32([-1e30, -1e30])
    masked = statistics_of(nothing, nothing, None, None, None, is_masked=True)
    part = statistics_of(a, b, b, None, None)
    for found in (merged(masked, part), merged(part, masked), merged(merged(None, masked), part)):
        numbers = numbers_of(found, None, histogram(a, b))
        assert (found.size, numbers["minimum"], numbers["max_error"], numbers["own_max_error"]) == (2, -3, 1, 0)
        assert numbers["l1"] == 0.5
        assert numbers["sqnr"] == pytest.approx(10 * np.log10(10 / 1))
    assert merged(masked, masked).size == 4


class Shrinking:
    """A loader that gives so many samples in each pass."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter([DATA[: self.sizes.pop(0)]])


def test_errors_say_what_to_do(model: jq.Model) -> None:
    with pytest.raises(jq.InputError, match="batches are read twice; give a list or a loader"):
        compare_batches(model, iter([DATA]))
    with pytest.raises(jq.InputError, match="no batches"):
        compare_batches(model, [])
    with pytest.raises(jq.JQuantError, match="fake_quant"):
        compare_batches(model, [DATA], "float", "fakequant")

    with pytest.raises(jq.InputError, match="gave 61 samples, the second 60"):
        compare_batches(model, Shrinking([61, 60]))


def test_the_same_numbers_on_eight_devices() -> None:
    finish(start(EIGHT, 8))
