"""Comparison over many batches of a net whose values numpy computes exactly, so that nothing depends on the batches."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.compilations import counted
from support.exact_net import DATA, WEIGHTS, check_rows, cut, exact_net, joined_net
from support.processes import finish, start, start_pair

import jquant as jq
from jquant.analysis import compare, compare_batches
from jquant.analysis.layers import Errors, Given, Layer, LayerErrors, Seen, errors_of, no_bins, statistics_by_layer
from jquant.analysis.metrics import histogram
from jquant.analysis.statistics import numbers_of

EIGHT = """
import jax
from jquant.analysis import compare_batches
from support.exact_net import check_rows, cut, exact_net, joined_net
import jquant as jq

mesh, model = jax.make_mesh((8,), ("data",)), exact_net()
for size in (61, 16, 10):  # the last batches hold 5, 13 and 1 samples
    check_rows(compare_batches(model, cut(0, 61, size), "float", "bit_true", mesh=mesh), 2.0**-22)
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

TWO = """
import sys
import jax
from jquant.analysis import compare_batches
from support.exact_net import check_rows, cut, exact_net, joined_net
import jquant as jq

rank, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
mesh, model = jax.make_mesh((4,), ("data",)), exact_net()
mine = [cut(0, 40, 8), cut(40, 61, 8)][rank]  # five batches and three, of which one has five samples
check_rows(compare_batches(model, mine, "float", "bit_true", mesh=mesh), 2.0**-22)
mine = [cut(0, 40, 10), cut(40, 61, 7)][rank]  # sizes that no number of devices divides, and that differ
check_rows(compare_batches(model, mine, "float", "bit_true", mesh=mesh), 2.0**-22)
model, x = joined_net()
shares = [x[:8], x[8:16]], [x[16:24]]
try:
    compare_batches(model, shares[rank], mesh=mesh)
except jq.InputError as error:
    assert "batch 1 has 8, 0 samples in the processes, and padding is off" in str(error), error
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
    check_rows(compare_batches(model, cut(0, 61, size), "float", b), 2.0**-22)


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
    layers = (Layer("x", 0, False, None, None),)
    metric, steps, units = LayerErrors(layers, "float"), {"x": None}, np.float32([1])

    def measured(a: list[float], b: list[float]) -> Errors:
        first, second = {"x": jnp.float32(a)}, {"x": jnp.float32(b)}
        given: Any = Given((), steps, units, no_bins(layers))  # type: ignore[arg-type]
        return jax.device_get(errors_of(layers, Seen(first, second, given), second, jnp.ones(len(a), bool)))

    masked, part = measured([-1e30, -1e30], [-1e30, -1e30]), measured([1, -3, -1e30], [2, -3, -1e30])
    twice = metric.merge(masked, masked)
    for found in (metric.merge(masked, part), metric.merge(part, masked), metric.merge(twice, part)):
        of = statistics_by_layer(layers, metric.compute(found), steps, units)["x"]
        numbers = numbers_of(of, None, histogram(np.float32([1, -3]), np.float32([2, -3])))
        assert (of.size, numbers["minimum"], numbers["max_error"], numbers["own_max_error"]) == (2, -3, 1, 0)
        assert numbers["l1"] == 0.5
        assert numbers["sqnr"] == pytest.approx(10 * np.log10(10 / 1))


def test_equal_layers_are_reduced_as_one() -> None:
    """A reduction for each of a thousand layers would take XLA a minute."""

    def reductions(count: int) -> int:
        layers = tuple(Layer(f"x{i}", 0, False, None, None) for i in range(count))
        values = {layer.name: jnp.ones((2, 3)) for layer in layers}
        given: Any = Given((), dict.fromkeys(values), np.ones(count, np.float32), no_bins(layers))  # type: ignore[arg-type]
        lowered = jax.jit(lambda v, mask: errors_of(layers, Seen(v, v, given), v, mask)).lower(
            values, jnp.ones(2, bool)
        )
        return lowered.as_text().count("stablehlo.reduce")

    assert reductions(20) == reductions(2) > 0


class StopError(Exception):
    """Stands for a machine that goes down."""


class Stopping:
    """Batches that end in an error after so many of all passes."""

    def __init__(self, batches: list[np.ndarray], after: int) -> None:
        self.batches, self.left = batches, after

    def __iter__(self) -> Iterator[np.ndarray]:
        for batch in self.batches:
            if self.left == 0:
                raise StopError
            self.left -= 1
            yield batch


@pytest.mark.parametrize(("after", "files"), [(5, {"p": 4}), (8 + 3, {"p": 8, "p.histograms": 2})])
def test_a_stopped_run_goes_on_with_the_same_numbers(
    model: jq.Model, after: int, files: dict[str, int], tmp_path: Path
) -> None:
    path, data = tmp_path / "p", cut(0, 61, 8)
    options = {"position": path, "save_every": 2}
    with pytest.raises(StopError):
        compare_batches(model, Stopping(data, after), "float", "bit_true", **options)
    assert {p.name: json.loads(p.read_text())["batches"] for p in tmp_path.iterdir()} == files
    for _ in range(2):  # the rest, then nothing is left
        found = compare_batches(model, data, "float", "bit_true", **options)
        check_rows(found, 2.0**-22)
        assert found == compare_batches(model, data, "float", "bit_true")
    with pytest.raises(jq.FormatError, match="another model, other modes or other metrics"):
        compare_batches(model, data, "float", "fake_quant", **options)


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


def test_the_same_numbers_on_two_processes() -> None:
    finish(*start_pair(TWO, 2))
