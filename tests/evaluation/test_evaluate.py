"""Figures of a pass over data against numpy: batches, padding, modes, resuming, one's own metrics."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.evaluation import (
    Accuracy,
    Agreement,
    Confusion,
    HostMean,
    MeanAbsoluteError,
    MeanIoU,
    Metric,
    SignalToNoise,
)
from jquant.evaluation.loop import _measure

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(30, 6)).astype(np.float32)
LABELS = RNG.integers(0, 4, 30).astype(np.int64)
WEIGHTS = {"w": (RNG.normal(size=(6, 4)) / 2).astype(np.float32)}


def logits_of(p: dict, x: jax.Array) -> jax.Array:
    return x @ p["w"]


@pytest.fixture(scope="module")
def model() -> jq.Model:
    graph, params = jq.trace(logits_of, WEIGHTS, jnp.asarray(IMAGES[:8]))
    prepared = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target="nash-e")
    return jq.calibrate(prepared, [jnp.asarray(IMAGES)])


def batches(size: int, labels: np.ndarray = LABELS) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(IMAGES[i : i + size], labels[i : i + size]) for i in range(0, len(IMAGES), size)]


def top(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    ranked = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
    return float(100 * np.mean((ranked == labels[..., None]).any(-1)))


METRICS = {
    "top-1": Accuracy(),
    "top-2": Accuracy(top=2),
    "agrees": Agreement(),
    "dB": SignalToNoise(),
    "off": MeanAbsoluteError(against="float"),
}


@pytest.mark.parametrize("size", [1, 7, 8, 30, 64])
def test_every_mode_in_one_pass_is_numpy_on_its_outputs(model: jq.Model, size: int) -> None:
    found = jq.evaluate(model, batches(size), METRICS, modes=("float", "fake_quant", "bit_true", "integers"))
    assert found.samples == 30
    exact = IMAGES @ WEIGHTS["w"]
    program = jq.lower(model)
    outputs = {
        "float": np.asarray(jq.apply(model, jnp.asarray(IMAGES), mode="float")),
        "fake_quant": np.asarray(jq.apply(model, jnp.asarray(IMAGES))),
        "integers": np.asarray(jq.run(program, jnp.asarray(IMAGES))),
    }
    outputs["bit_true"] = outputs["integers"]
    assert list(found.modes) == ["float", "fake_quant", "bit_true", "integers"]
    for mode, y in outputs.items():
        figures = found.modes[mode]
        assert figures["top-1"] == top(y, LABELS, 1)
        assert figures["top-2"] == top(y, LABELS, 2)
        assert figures["agrees"] == 100 * np.mean(y.argmax(-1) == outputs["float"].argmax(-1))
        # Sums of 120 float32 numbers: 120 roundings of 2^-24, relative; the float product differs by as much.
        np.testing.assert_allclose(figures["off"], np.abs(y - outputs["float"]).mean(), rtol=2**-16, atol=2**-22)
        if mode != "float":
            wanted = 10 * np.log10((exact**2).sum() / ((y - exact) ** 2).sum())
            assert abs(figures["dB"] - wanted) < 0.01


def test_another_batch_size_gives_the_same_counts(model: jq.Model) -> None:
    metrics = {"top-1": Accuracy(), "confusion": Confusion(classes=4)}
    one, other = (jq.evaluate(model, batches(n), metrics, modes=("integers",)) for n in (30, 4))
    assert one.figures["top-1"] == other.figures["top-1"]
    np.testing.assert_array_equal(one.figures["confusion"], other.figures["confusion"])
    wanted = np.zeros((4, 4), np.int64)
    np.add.at(wanted, (LABELS, np.asarray(jq.run(jq.lower(model), jnp.asarray(IMAGES))).argmax(-1)), 1)
    np.testing.assert_array_equal(one.figures["confusion"], wanted)


def test_a_second_evaluation_compiles_nothing(model: jq.Model) -> None:
    jq.evaluate(model, batches(8), {"top-1": Accuracy()})
    before = _measure._cache_size()
    trained = model.replace(params={k: v * 1.1 for k, v in model.params.items()})
    jq.evaluate(trained, batches(8), {"top-1": Accuracy()})
    assert _measure._cache_size() == before


def test_pixels_and_labels_to_ignore() -> None:
    """A label of 255 stands for no class; mIoU leaves out a class that is nowhere."""
    logits = RNG.normal(size=(5, 3, 4, 6)).astype(np.float32)
    logits[..., 5] = -9.0
    labels = RNG.integers(0, 5, (5, 3, 4)).astype(np.uint8)
    labels[:, 0] = 255
    metrics = {"pixels": Accuracy(ignore=255), "mIoU": MeanIoU(classes=6, ignore=255)}
    found = jq.evaluate(lambda x: x, [(logits[:3], labels[:3]), (logits[3:], labels[3:])], metrics).figures
    kept, answers = labels != 255, logits.argmax(-1)
    assert found["pixels"] == 100 * (answers == labels)[kept].sum() / kept.sum()
    each = [
        ((answers == c) & (labels == c) & kept).sum() / (((answers == c) | (labels == c)) & kept).sum()
        for c in range(5)
    ]
    assert found["mIoU"] == pytest.approx(100 * np.mean(each), rel=1e-15)


def test_nan_outputs_are_no_hits() -> None:
    logits = np.float32([[np.nan, 1.0], [0.0, 1.0]])
    found = jq.evaluate(
        {"f": lambda x: jnp.where(x == 7, jnp.nan, x)},
        [(np.where(np.isnan(logits), np.float32(7), logits), np.int32([0, 1]))],
        {"top-1": Accuracy()},
    )
    assert found.modes == {"f": {"top-1": 50.0}}


def test_a_function_on_the_host_sees_no_padding() -> None:
    seen = []

    def spread(outputs: np.ndarray, labels: np.ndarray) -> float:
        seen.append(len(outputs))
        return float(outputs.max() - labels.min())

    found = jq.evaluate(lambda x: 2 * x, batches(8), {"spread": HostMean(spread)})
    assert seen == [8, 8, 8, 6]
    each = [(2 * x).max() - y.min() for x, y in batches(8)]
    assert found.figures["spread"] == pytest.approx(np.average(each, weights=seen), rel=1e-12)


def test_ones_own_metric_and_several_inputs() -> None:
    def both(a: jax.Array, b: jax.Array) -> dict[str, jax.Array]:
        return {"sum": a + b}

    count = Metric(
        measure=lambda outputs, batch, mask: jnp.sum((outputs["sum"][:, 0] > 0) & mask), compute=lambda sums: int(sums)
    )
    data = [(IMAGES[:8], IMAGES[8:16]), (IMAGES[16:19], IMAGES[19:22])]
    found = jq.evaluate(both, data, {"positive": count}, inputs=lambda batch: batch)
    wanted = sum(int(((a + b)[:, 0] > 0).sum()) for a, b in data)
    assert found.modes == {"both": {"positive": wanted}}


def test_a_torch_loader_is_taken() -> None:
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(torch.from_numpy(IMAGES), torch.from_numpy(LABELS))
    found = jq.evaluate(lambda x: x[:, :4], torch.utils.data.DataLoader(data, batch_size=8), {"top-1": Accuracy()})
    assert found.figures["top-1"] == top(IMAGES[:, :4], LABELS, 1)


def test_batches_that_are_not_padded_have_their_own_size() -> None:
    sizes: list[int] = []

    def model(x: jax.Array) -> jax.Array:
        sizes.append(len(x))  # once for each size, where it is traced
        return x[:, :4]

    data = [(IMAGES[:8], LABELS[:8]), (IMAGES[8:11], LABELS[8:11])]
    found = jq.evaluate(model, data, {"top-1": Accuracy()}, padded=False)
    assert found.figures["top-1"] == top(IMAGES[:11, :4], LABELS[:11], 1)
    assert set(sizes) == {8, 3}


# ---------------------------------------------------------------------------------------------------------------------
# Going on


class StopError(Exception):
    pass


def stopping(data: list, after: int):
    for i, batch in enumerate(data):
        if i == after:
            raise StopError
        yield batch


def test_a_stopped_run_goes_on_with_the_same_figures(model: jq.Model, tmp_path) -> None:
    path, data = tmp_path / "position.json", batches(4)
    whole = jq.evaluate(model, data, METRICS, modes=("float", "integers"))
    with pytest.raises(StopError):
        jq.evaluate(model, stopping(data, 5), METRICS, modes=("float", "integers"), position=path, save_every=2)
    assert json.loads(path.read_text())["batches"] == 4
    for _ in range(2):  # the rest, then nothing is left
        found = jq.evaluate(model, data, METRICS, modes=("float", "integers"), position=path, save_every=2)
        assert found == whole
    assert [p.name for p in tmp_path.iterdir()] == ["position.json"]


def test_a_position_goes_on_over_a_larger_batch_and_not_over_fewer(model: jq.Model, tmp_path) -> None:
    path, metrics = tmp_path / "position.json", {"top-1": Accuracy()}
    data = [(IMAGES[:4], LABELS[:4]), (IMAGES[4:14], LABELS[4:14]), (IMAGES[14:], LABELS[14:])]
    whole = jq.evaluate(model, data, metrics)
    with pytest.raises(StopError):
        jq.evaluate(model, stopping(data, 2), metrics, position=path, save_every=1)
    assert jq.evaluate(model, data, metrics, position=path) == whole
    with pytest.raises(jq.InputError, match="counts 3 batches, and there are 2"):
        jq.evaluate(model, data[:2], metrics, position=path)


def test_a_position_of_something_else_is_refused(model: jq.Model, tmp_path) -> None:
    path, metrics = tmp_path / "position.json", {"top-1": Accuracy()}
    jq.evaluate(model, batches(4), metrics, position=path)
    moved = model.replace(params={k: v + 1 for k, v in model.params.items()})
    for other in (
        lambda: jq.evaluate(moved, batches(4), metrics, position=path),
        lambda: jq.evaluate(model, batches(4), {"top-1": Accuracy(top=2)}, position=path),
        lambda: jq.evaluate(model, batches(4), metrics, position=path, modes=("float",)),
    ):
        with pytest.raises(jq.FormatError, match="another model, other modes or other metrics"):
            other()
    with pytest.raises(jq.FormatError, match="batches of 4 samples, and the first one here has 5"):
        jq.evaluate(model, batches(5), metrics, position=path)
    text = path.read_text()
    for damaged in (text[:-9], text.replace('"batches": 8', '"batches": 7'), "[1]", "{}", "[" * 100_000):
        path.write_text(damaged)
        with pytest.raises(jq.FormatError, match="no position of an evaluation"):
            jq.evaluate(model, batches(4), metrics, position=path)


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def test_errors_say_what_to_do(model: jq.Model) -> None:
    metrics = {"top-1": Accuracy()}
    with pytest.raises(jq.InputError, match="no batches"):
        jq.evaluate(model, [], metrics)
    with pytest.raises(jq.InputError, match="no metrics"):
        jq.evaluate(model, batches(8), {})
    with pytest.raises(jq.InputError, match="has no `measure` and `compute`"):
        jq.evaluate(model, batches(8), {"top-1": max})

    class Alone(SignalToNoise):
        compiled_alone = True

    with pytest.raises(jq.InputError, match="'dB' is compiled alone, where it cannot compare with 'float'"):
        jq.evaluate(model, batches(8), {"dB": Alone()})
    with pytest.raises(jq.JQuantError, match="fake_quant"):
        jq.evaluate(model, batches(8), metrics, modes=("fakequant",))
    with pytest.raises(jq.InputError, match="the text 'float'"):
        jq.evaluate(model, batches(8), metrics, modes="float")
    with pytest.raises(jq.InputError, match="a metric compares with 'float'"):
        jq.evaluate(jq.lower(model), batches(8), {"dB": SignalToNoise()})
    with pytest.raises(jq.InputError, match=r"batch 1, input 0 contains NaN"):
        jq.evaluate(model, [*batches(8)[:1], (np.full((8, 6), np.nan, np.float32), LABELS[:8])], metrics)
    with pytest.raises(jq.InputError, match="same number of samples"):
        jq.evaluate(model, [(IMAGES[:8], LABELS[:7])], metrics)
    with pytest.raises(jq.InputError, match="are no class numbers"):
        jq.evaluate(model, [(IMAGES, IMAGES)], metrics)
    with pytest.raises(jq.InputError, match=r"no axis .dtaa.*data"):
        jq.evaluate(model, batches(8), metrics, mesh=jax.make_mesh((1,), ("data",)), axis="dtaa")
