"""The largest number and the worst samples of some data against a sort of all of them in numpy."""

import jax
import numpy as np
import pytest

import jquant as jq
from jquant.evaluation import Largest, Metric, Worst

RNG = np.random.default_rng(0)
ERRORS = RNG.integers(-9, 10, 61).astype(np.float32)  # many are equal
ROWS = RNG.integers(0, 256, (61, 3)).astype(np.uint8)
IDS = np.arange(61, dtype=np.int32)


def batches(size: int, order: np.ndarray = IDS) -> list[tuple[np.ndarray, ...]]:
    parts = [order[i : i + size] for i in range(0, len(order), size)]
    return [(ERRORS[part], {"rows": ROWS[part], "errors": ERRORS[part]}, part) for part in parts]


def same(x: jax.Array) -> jax.Array:
    return x


def outputs_of(outputs: jax.Array, batch: tuple) -> jax.Array:
    return outputs


def kept_of(batch: tuple) -> dict:
    return batch[1]


def worst_by_numpy(errors: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(-errors, kind="stable")[:count]  # equal ones stay in order


@pytest.mark.parametrize("size", [1, 7, 16, 61])
@pytest.mark.parametrize("count", [1, 5, 20, 70])
def test_the_worst_samples_are_those_of_a_sort(size: int, count: int) -> None:
    metrics = {"worst": Worst(error=outputs_of, count=count, kept=kept_of), "largest": Largest(of=outputs_of)}
    found = jq.evaluate(same, batches(size), metrics).figures
    order = worst_by_numpy(ERRORS, count)
    np.testing.assert_array_equal(found["worst"].place, order)
    np.testing.assert_array_equal(found["worst"].error, ERRORS[order])
    np.testing.assert_array_equal(found["worst"].kept["rows"], ROWS[order])
    assert found["worst"].kept["rows"].dtype == np.uint8
    assert found["largest"] == ERRORS.max()


def test_equal_errors_come_by_place_and_not_by_batch() -> None:
    """The data of the second half come first."""
    order = np.roll(IDS, 30)
    found = jq.evaluate(same, batches(8, order), {"worst": Worst(error=outputs_of, count=12)}).figures["worst"]
    np.testing.assert_array_equal(found.place, worst_by_numpy(ERRORS, 12))
    assert found.kept == ()


def test_nan_is_the_worst_and_the_largest() -> None:
    data = [(np.float32([1, np.inf, 3]), np.int32([0, 1, 2])), (np.float32([4, 9]), np.int32([3, 4]))]
    metrics = {
        "worst": Worst(error=lambda y, batch: jax.numpy.where(batch[0] == 4, np.nan, y), count=3),
        "largest": Largest(of=lambda y, batch: jax.numpy.where(batch[0] == 4, np.nan, y)),
    }
    data[0] = (np.float32([1, 8, 3]), data[0][1])
    found = jq.evaluate(same, data, metrics).figures
    assert found["worst"].place.tolist() == [3, 4, 1]
    assert found["worst"].error.tolist() == [np.inf, 9.0, 8.0]
    assert np.isnan(found["largest"])


def test_the_largest_of_integers_and_against_another_mode() -> None:
    data = [np.float32([[-5, -7], [-9, -6]]), np.float32([[-8, -8]])]
    whole = Largest(of=lambda y, batch: batch.astype(np.int32))
    found = jq.evaluate(same, data, {"largest": whole}, inputs=lambda x: (x,)).figures
    assert found == {"largest": -5.0}  # padding is no number
    off = Largest(of=lambda y, other: abs(y - other), against="same")
    sources = {"same": same, "half": lambda x: x / 2}
    found = jq.evaluate(sources, data, {"off": off}, inputs=lambda x: (x,)).modes
    assert found == {"same": {"off": 0.0}, "half": {"off": 4.5}}


def first_and_last(a: dict, b: dict) -> dict:
    return {"first": a["first"], "last": b["last"]}


def test_a_merge_of_ones_own_sees_the_batches_in_order() -> None:
    metric = Metric(
        measure=lambda y, batch, mask: {"first": y[0], "last": y[mask.sum() - 1]},
        merge=first_and_last,
        compute=lambda ends: (float(ends["first"]), float(ends["last"])),
    )
    for size in (4, 16, 61):
        assert jq.evaluate(same, batches(size), {"ends": metric}).figures == {"ends": (ERRORS[0], ERRORS[-1])}


def test_a_stopped_run_goes_on_with_the_same_samples(tmp_path) -> None:
    metrics = {"worst": Worst(error=outputs_of, count=9, kept=kept_of), "largest": Largest(of=outputs_of)}
    path, data = tmp_path / "position.json", batches(8)

    def stopping():
        yield from data[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jq.evaluate(same, stopping(), metrics, position=path, save_every=2)
    found = jq.evaluate(same, data, metrics, position=path, save_every=2).figures
    order = worst_by_numpy(ERRORS, 9)
    np.testing.assert_array_equal(found["worst"].place, order)
    np.testing.assert_array_equal(found["worst"].kept["rows"], ROWS[order])
    assert found["worst"].kept["rows"].dtype == np.uint8
    assert found["largest"] == ERRORS.max()
    with pytest.raises(jq.FormatError, match="other metrics"):
        jq.evaluate(same, data, {**metrics, "worst": Worst(error=outputs_of, count=8, kept=kept_of)}, position=path)


def test_errors_say_what_to_do() -> None:
    with pytest.raises(jq.InputError, match="count must be at least 1, not 0"):
        Worst(error=outputs_of, count=0)
    metric = Worst(error=outputs_of, places=lambda batch: batch[1]["rows"])
    with pytest.raises(jq.InputError, match=r"errors float32\[8\] and places uint8\[8, 3\] of 8 samples; give"):
        jq.evaluate(same, batches(8), {"worst": metric})
