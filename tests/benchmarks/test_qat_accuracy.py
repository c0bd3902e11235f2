"""The figures of `docs/qat-cifar.md` and `docs/qat-camvid.md` are made by commands that run, go on, and draw."""

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from support.commands import load_benchmark, write_cifar


@pytest.fixture
def cifar(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    module = load_benchmark("qat_cifar", monkeypatch)
    monkeypatch.setattr("keeping.ROOT", tmp_path)
    monkeypatch.setattr(module, "DOCS", tmp_path / "docs")
    return module


@pytest.fixture
def camvid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    module = load_benchmark("qat_camvid", monkeypatch)
    monkeypatch.setattr("keeping.ROOT", tmp_path)
    for name, path in (("ROOT", tmp_path), ("DOCS", tmp_path / "docs")):
        monkeypatch.setattr(module, name, path)
    return module


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


@pytest.mark.slow
def test_a_training_is_measured_and_kept(cifar: ModuleType, tmp_path: Path) -> None:
    write_cifar(tmp_path, train=64, test=10)
    options = ["--data", str(tmp_path), "--seeds", "1", "--epochs", "1", "--runs", "w8a8-lsq-*"]
    ((run, outcome),) = cifar.main(options).items()
    assert (run.bits, run.quantizer, run.seed) == (8, "lsq", 1)
    assert 0 <= outcome.integer <= 100
    assert [step for step, _ in outcome.losses] == [1]
    assert not (tmp_path / "docs").exists()  # some of the runs make no page

    path = tmp_path / "out" / "qat_cifar" / f"{run.name}.json"
    changed = json.loads(path.read_text()) | {"trained": 12.5}
    path.write_text(json.dumps(changed))
    assert cifar.main(options)[run].trained == 12.5  # not trained again


def test_kept_trainings_make_the_page(cifar: ModuleType, tmp_path: Path) -> None:
    write_cifar(tmp_path, train=1, test=1)
    runs = cifar.all_runs([0, 1], 3)
    for run in runs:
        integer = 70.5 + run.seed if run.bits == 8 else None
        losses = [[10 * i, 1.0 / (i + 1) + run.bits] for i in range(8)]
        cifar.keep("qat_cifar", run.name, cifar.Outcome(30.0, 60.0 + run.bits + run.seed, integer, losses)._asdict())
    (tmp_path / "docs" / "pictures").mkdir(parents=True)
    assert cifar.main(["--data", str(tmp_path), "--seeds", "0", "1", "--epochs", "3"]).keys() == set(runs)
    page = (tmp_path / "docs" / "qat-cifar.md").read_text()
    assert "| W8A8 | LSQ | 30.0 (30.0 to 30.0) | 68.5 (68.0 to 69.0) | 71.0 (70.5 to 71.5) |" in page
    assert "| W2A2 | PACT | 30.0 (30.0 to 30.0) | 62.5 (62.0 to 63.0) | - |" in page
    assert "| reverse_fold | 64.5 (64.0 to 65.0) |" in page
    assert "{" not in page
    assert min(png_size(tmp_path / "docs" / "pictures" / "qat-cifar.png")) > 400


def test_augmented_pictures_are_the_pictures(cifar: ModuleType) -> None:
    images = np.random.default_rng(0).normal(size=(40, 3, 32, 32)).astype(np.float32)
    moved = cifar.augmented(images, np.random.default_rng(1))
    middle = moved[:, :, 8:24, 8:24]
    for image, part in zip(images, middle, strict=True):
        places = [image[:, 8 + i : 24 + i, 8 + j : 24 + j] for i in range(-2, 3) for j in range(-2, 3)]
        mirrored = image[:, :, ::-1]
        places += [mirrored[:, 8 + i : 24 + i, 8 + j : 24 + j] for i in range(-2, 3) for j in range(-2, 3)]
        assert any(np.array_equal(part, place) for place in places)
    assert (moved != images).any()


def test_no_frame_trains_and_measures(camvid: ModuleType, tmp_path: Path) -> None:
    for name in ("a_1", "a_2", "a_3", "b_9", "b_8"):
        (tmp_path / f"{name}.jpg").touch()
    first, second = camvid.halves(tmp_path)
    assert [file.stem for file in first] == ["a_1", "b_8"]
    assert [file.stem for file in second] == ["a_2", "a_3", "b_9"]
    with pytest.raises(SystemExit, match="no pictures"):
        camvid.halves(tmp_path / "nowhere")


def test_intersection_over_union_leaves_void_out(camvid: ModuleType) -> None:
    rng = np.random.default_rng(0)
    found, labels = rng.integers(0, 11, (2, 30, 20), np.uint8), rng.integers(0, 12, (2, 30, 20), np.uint8)
    for c, value in enumerate(camvid.intersection_over_union(found, labels)):
        a, b = (found == c) & (labels != 11), labels == c
        assert value == pytest.approx(100 * (a & b).sum() / (a | b).sum())


def test_kept_segmentations_make_the_page(camvid: ModuleType, tmp_path: Path) -> None:
    skimage = pytest.importorskip("skimage.io")
    from espnet import EspNet

    folder, rng = tmp_path / "camvid" / "test", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(2):
        skimage.imsave(folder / f"a_{i}.jpg", rng.integers(0, 256, (360, 480, 3), np.uint8), check_contrast=False)
        skimage.imsave(folder / f"a_{i}.png", rng.integers(0, 12, (360, 480), np.uint8), check_contrast=False)
    torch.manual_seed(0)
    torch.save(EspNet().state_dict(), tmp_path / "camvid_espnet.pth")
    runs = camvid.all_runs([0], 7)
    for run in runs[1:]:  # the first is measured here
        camvid.keep("qat_camvid", run.name, camvid.Outcome([50.0 + run.steps] * 11, 90.0, 0.0)._asdict())
        np.savez(camvid.kept_classes(run), classes=rng.integers(0, 11, (3, 360, 480), np.uint8))
    (tmp_path / "docs" / "pictures").mkdir(parents=True)
    outcomes = camvid.main(["--data", str(tmp_path), "--seeds", "0", "--steps", "7"])
    assert outcomes[runs[0]].agree == 100  # float, with float
    page = (tmp_path / "docs" / "qat-camvid.md").read_text()
    assert "| int8, after QAT | 57.0 (57.0 to 57.0) | 90.0 (90.0 to 90.0) |" in page
    assert "{" not in page
    assert min(png_size(tmp_path / "docs" / "pictures" / "qat-camvid.png")) > 400


@pytest.mark.parametrize("name", ["cifar", "camvid"])
def test_wrong_arguments_are_told(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = request.getfixturevalue(name)
    for options, message in (
        (["--data", "nowhere"], "no such folder"),
        (["--data", str(tmp_path), "--runs", "w9*"], "no run has such a name"),
    ):
        with pytest.raises(SystemExit):
            module.main(options)
        assert message in capsys.readouterr().err
