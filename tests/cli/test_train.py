"""`jquant train`: its losses against numpy, what it refuses, and a killed run that goes on."""

import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.small_nets import small_graph, small_net
from support.terminal import ENVIRONMENT, run_all

from jquant.cli.console import Console
from jquant.cli.data import Data
from jquant.cli.losses import check_labels, loss_of
from jquant.cli.settings import TrainSettings
from jquant.cli.state import load_state
from jquant.cli.train import Best, Run, StoppedError, _alarm
from jquant.host.termination import noting_termination
from jquant.types import FormatError, InputError

OWN = """
import jax.numpy as jnp
def huber(outputs, labels):
    error = jnp.abs(outputs - labels)
    return jnp.where(error < 1, error**2 / 2, error - 0.5).mean(), {"worst": error.max()}
def targets():
    import numpy as np
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-1, 1, (60, 1, 16, 16)), rng.normal(size=(60, 6))
    return {"x": x.astype(np.float32), "y": y.astype(np.float32)}
def broken(outputs, labels):
    return jnp.sqrt(-1.0 - outputs.sum() ** 2)
number = 3
"""


# ---------------------------------------------------------------------------------------------------------------------
# Losses


@pytest.mark.parametrize("place", [(), (3, 2)], ids=["classes", "pixels"])
def test_cross_entropy_leaves_the_ignored_label_out(place: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(5, 4, *place)).astype(np.float32), rng.integers(0, 4, (5, *place))
    labels[1] = 7
    loss, metrics = loss_of("cross_entropy", 7)(jnp.asarray(logits), jnp.asarray(labels, jnp.int32))
    wide = np.moveaxis(logits.astype(np.float64), 1, -1)
    likely = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    kept = labels != 7
    expected = -np.take_along_axis(likely[kept], labels[kept][:, None], -1).mean()
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["top-1 %"]) == pytest.approx(100 * (wide.argmax(-1)[kept] == labels[kept]).mean(), rel=1e-5)


def test_distances() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    assert float(loss_of("mse", 0)(a, b)[0]) == pytest.approx(((a - b).astype(np.float64) ** 2).mean(), rel=1e-6)
    assert float(loss_of("l1", 0)(a, b)[0]) == pytest.approx(np.abs((a - b).astype(np.float64)).mean(), rel=1e-6)


def test_a_loss_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    loss, metrics = loss_of(f"{tmp_path / 'own.py'}:huber", 0)(jnp.zeros((2, 1)), jnp.asarray([[0.5], [3.0]]))
    assert float(loss) == pytest.approx((0.125 + 2.5) / 2)
    assert float(metrics["worst"]) == 3.0
    with pytest.raises(FormatError, match="is int, not a function"):
        loss_of(f"{tmp_path / 'own.py'}:number", 0)


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        (
            "cross_entropy",
            np.zeros((2, 3), np.int32),
            r"labels are int32\[2, 3\]; cross_entropy takes class numbers \[2\]",
        ),
        ("cross_entropy", np.zeros(2, np.float32), r"labels are float32\[2\]; cross_entropy takes class numbers"),
        ("cross_entropy", np.asarray([0, 3]), "a label is 3; the output has 3 classes, from 0"),
        ("cross_entropy", np.asarray([-1, 0]), "a label is -1"),
        ("mse", np.zeros(2, np.float32), r"labels are float32\[2\]; loss 'mse' takes numbers of the shape .* \[2, 3\]"),
        ("l1", np.asarray([["a", "b", "c"]] * 2), "loss 'l1' takes numbers"),
    ],
)
def test_labels_that_do_not_fit(name: str, labels: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_labels(name, labels, np.zeros((2, 3), np.float32), 255)


def test_255_is_a_class_where_there_are_so_many() -> None:
    """Of 1000 classes it was left out of the loss, since pixels have it as void."""
    logits = np.zeros((2, 300), np.float32)
    logits[:, 255] = 5
    loss, metrics = loss_of("cross_entropy", 255)(jnp.asarray(logits), jnp.asarray([255, 0]))
    assert float(metrics["top-1 %"]) == 50
    assert float(loss) == pytest.approx(np.log(np.exp(5.0) + 299) - 2.5, rel=1e-5)
    check_labels("cross_entropy", np.asarray([255, 1]), logits, 255)


def test_two_outputs_want_a_loss_of_ones_own() -> None:
    two = (np.zeros((2, 3)), np.zeros(2))
    with pytest.raises(InputError, match="this model has 2; give your own, module:function"):
        check_labels("mse", np.zeros(2), two, 255)
    check_labels("own:loss", np.zeros(2), two, 255)
    check_labels("cross_entropy", np.asarray([255, 1]), np.zeros((2, 3)), 255)


def test_a_start_far_from_the_float_model_is_an_alarm(capsys: pytest.CaptureFixture[str]) -> None:
    _alarm(Console(), 0.41, 0.4)
    assert capsys.readouterr().err == ""
    _alarm(Console(), 4.0, 0.4)
    assert capsys.readouterr().err.startswith("warning: ")


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, calibrated, with recipes."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "own.py").write_text(OWN)
    prepared = {line: line for line in ("demo d -q", "calibrate d/float.jqs -c d/q.toml -d d/train.npz -o c.jqs -q")}
    assert [r.code for r in run_all(folder, prepared).values()] == [0, 0]
    recipes = {
        "broken": "loss = 'own:broken'\nschedule = 'constant'",
        "huber": "loss = 'own:huber'\nepochs = 1\nlearning_rate = 0.01\nschedule = 'step'",
        "mse": "loss = 'mse'",
        "diverge": "learning_rate = 1e30\nepochs = 2\nschedule = 'constant'",
        "late": "epochs = 1\nbatch = 500\n[train.values]\n'*' = 2\n[train.weights]\n'head.weight' = false\n"
        "[train.observers]\n'mean' = [0, 2]",
        "unknown": "[train.weights]\n'heda.weight' = false",
        "exact": "mode = 'bit_true'\n[train.values]\n'*' = 5",
        "nan": "learning_rate = nan",
        "infinite": "weight_decay = inf",
        "long": "epochs = 12\nbatch = 100\nlearning_rate = 0.001\noptimizer = 'adamw'",
    }
    rules = (folder / "d/q.toml").read_text().partition("[train]")[0]
    for name, text in recipes.items():
        (folder / f"{name}.toml").write_text(f"{rules}[train]\n{text}\n")
    return folder


def test_losses_and_what_goes_wrong(folder: Path) -> None:
    lines = {
        "huber": "train c.jqs -c huber.toml -d own:targets -o h.jqs --json",
        "mse": "train c.jqs -c mse.toml -d d/train.npz -o m.jqs",
        "broken": "train c.jqs -c broken.toml -d d/train.npz -o b.jqs",
        "diverge": "train c.jqs -c diverge.toml -d d/train.npz -o v.jqs",
        "nan": "train c.jqs -c nan.toml -d d/train.npz -o n.jqs",
        "infinite": "train c.jqs -c infinite.toml -d d/train.npz -o n.jqs",
    }
    found = run_all(folder, lines)
    assert found["huber"].code == 0, found["huber"].err
    value = found["huber"].json
    assert value["after"]["loss"] < value["before"]["loss"]
    assert set(value["after"]) == {"loss", "worst"}
    (epoch,) = [line for line in found["huber"].err.splitlines() if line.startswith("epoch 1: loss ")]
    assert ", worst " in epoch
    for name, key in (("nan", "learning_rate"), ("infinite", "weight_decay")):
        assert found[name].code == 1
        assert f"train.{key} must be a finite number that is not negative" in found[name].err
    assert found["diverge"].code == 1
    assert "training diverged: the loss" in found["diverge"].err or "the loss is nan" in found["diverge"].err
    assert "No epoch was better than the calibrated model, so v.jqs was not written" in found["diverge"].err
    assert found["mse"].code == 1
    assert "loss 'mse' takes numbers of the shape of the output, [30, 6]" in found["mse"].err
    assert found["broken"].code == 1
    assert "in epoch 1: step 0: the loss is not finite, the outputs are" in found["broken"].err
    assert "Lower learning_rate, or set clip" in found["broken"].err
    assert not list(folder.glob("[mbnv].jqs"))


def test_switches_of_a_recipe(folder: Path) -> None:
    """Three steps: values are quantized in the last one, a weight never is, the scale of one value follows the data."""
    lines = {
        "late": "train c.jqs -c late.toml -d d/train.npz -o late.jqs --json",
        "unknown": "train c.jqs -c unknown.toml -d d/train.npz -o u.jqs",
        "exact": "train c.jqs -c exact.toml -d d/train.npz -o u.jqs",
    }
    found = run_all(folder, lines)
    assert found["late"].code == 0, found["late"].err
    assert found["late"].json["steps"] == 3
    assert "in the last step head.weight were not quantized" in found["late"].err
    before, after = (load_state(folder / name).qparams for name in ("c.jqs", "late.jqs"))
    moved = {name: abs(float(after[name]) / float(before[name]) - 1) for name in ("mean", "stem", "body")}
    assert moved["mean"] > 1e-4  # twice a hundredth of the way to the scale of a batch
    assert max(moved["stem"], moved["body"]) < 1e-4  # trained in one step
    assert found["unknown"].code == 1
    assert "weights: 'heda.weight' matches no quantized weight; did you mean 'head.weight'" in found["unknown"].err
    assert found["exact"].code == 1
    assert "switches in mode 'bit_true': they are for mode 'fake_quant'" in found["exact"].err
    assert not (folder / "u.jqs").exists()


def test_the_best_epoch_is_that_of_the_lowest_mean_loss() -> None:
    best = Best(start=1.0)
    for epoch, loss in enumerate((1.2, 0.9, 0.6, 0.7, 30.0), 1):
        best.look(epoch, loss, f"state {epoch}")
    assert (best.epoch, best.loss, best.state) == (3, 0.6, "state 3")


# ---------------------------------------------------------------------------------------------------------------------
# The order of samples, and going on


def run_of(data: Data, **recipe: Any) -> Run:
    model, _ = small_net()
    settings = TrainSettings(batch=4, epochs=2, **recipe)
    return Run(model, data, settings, loss_of(settings.loss, settings.ignore_label))


def arrays_of(count: int) -> Data:
    """Samples whose first pixel is their number; labels in order, as files sorted by class have them."""
    x = np.random.default_rng(0).normal(size=(count, 3, 8, 8)).astype(np.float32)
    x[:, 0, 0, 0] = np.arange(count)
    labels = np.arange(count) * 5 // count
    graph = small_graph()[0]

    def of(part: Any) -> Any:
        return (x[part],), labels[part]

    def take(order: np.ndarray, size: int) -> Any:
        return (of(order[i : i + size]) for i in range(0, len(order), size))

    assert graph.inputs[0].shape == (None, 3, 8, 8)
    return Data(lambda size: take(np.arange(count), size), count, True, take)


def numbers(batches: Any) -> list[int]:
    return [int(n) for inputs, _ in batches for n in np.asarray(inputs[0])[:, 0, 0, 0]]


def test_all_samples_are_shuffled_and_not_a_window_of_neighbours() -> None:
    run = run_of(arrays_of(1000))
    first, second = (numbers(run._batches(epoch)) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(1000))
    assert first != second
    labels = np.concatenate([np.asarray(y) for _, y in run._batches(0)])
    for part in np.split(labels, 10):  # in order, or within a window of 128, some classes would be missing
        assert set(part) == set(range(5))
    assert numbers(run._batches(0, behind=3)) == first[12:]


def test_data_that_are_read_from_the_front_are_shuffled_within_a_window() -> None:
    run = run_of(replace(arrays_of(300), take=None))
    found = numbers(run._batches(0))
    assert sorted(found[:128]) == list(range(128))
    assert found[:128] != list(range(128))
    assert numbers(run._batches(0, behind=33)) == found[132:]


def test_sigterm_is_noted_within_and_works_as_before_behind() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with noting_termination() as is_asked:
        assert not is_asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert is_asked()
    assert signal.getsignal(signal.SIGTERM) is before
    with ThreadPoolExecutor(1) as pool:  # where no signal can be taken
        assert not pool.submit(lambda: noting_termination().__enter__()()).result()


def test_a_run_that_is_stopped_within_an_epoch_goes_on_behind_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, console = run_of(arrays_of(18), optimizer="adamw"), Console(quiet=True)  # five steps an epoch
    whole, _ = run.train(console, None, Best(1.0))
    asked = iter([False] * 7 + [True] + [False] * 20)

    @contextmanager
    def noting() -> Any:
        yield lambda: next(asked)

    monkeypatch.setattr("jquant.cli.train.noting_termination", noting)
    with pytest.raises(StoppedError, match="stopped by SIGTERM after step 8, which is in"):
        run.train(console, tmp_path, Best(1.0), 2)
    kept = {int(path.name) for path in tmp_path.iterdir() if path.name.isdecimal()}
    assert kept == {5, 7, 8}  # the first epoch, two steps into the second one, and the last; three are kept
    again, _ = run.train(console, tmp_path, Best(1.0), 2)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_data_are_read_once_for_all_modes() -> None:
    data, passes = arrays_of(12), []
    counted = replace(data, read=lambda size: (passes.append(size), data.read(size))[1])
    run = run_of(counted)
    both = run.measure(run.model, ("fake_quant", "float"))
    assert passes == [4]
    assert both == [run.measure(run.model, (mode,))[0] for mode in ("fake_quant", "float")]


def train(folder: Path, kept: str, output: str) -> subprocess.Popen[str]:
    arguments = f"train c.jqs -c long.toml -d d/train.npz -o {output} --checkpoints {kept} -v".split()
    command = [sys.executable, "-m", "jquant", *arguments]
    return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)])
def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_been(folder: Path, number: int, code: int) -> None:
    with train(folder, "whole", "whole.jqs") as whole, train(folder, "killed", "killed.jqs") as killed:
        assert killed.stderr is not None
        next(line for line in killed.stderr if line.startswith("epoch 2:"))
        killed.send_signal(number)
        _, last = killed.communicate(timeout=60)
        assert killed.returncode == code
        assert ("stopped by SIGTERM after step" in last) == (number == signal.SIGTERM)
        with train(folder, "killed", "killed.jqs") as again:
            _, words = again.communicate(timeout=300)
        _, error = whole.communicate(timeout=300)
    assert (whole.returncode, again.returncode) == (0, 0), error + words
    first = re.search(r"going on after (batch \d+ of )?epoch (\d+), ", words)
    assert first is not None
    assert 1 <= int(first[2]) <= 12
    assert (folder / "killed.jqs").read_bytes() == (folder / "whole.jqs").read_bytes()
    for name in ("killed", "whole"):
        shutil.rmtree(folder / name)
