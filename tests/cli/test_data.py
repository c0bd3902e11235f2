"""What comes in from files: settings, pictures, arrays and states, and what is wrong with them."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support.small_nets import QCONFIG, small_graph

import jquant as jq
from jquant.cli.build import _say_defaults
from jquant.cli.console import Console
from jquant.cli.data import load_data, read_image
from jquant.cli.settings import ImageSettings, Settings, read_settings
from jquant.cli.state import State, load_state, save_state

GRAPH = jq.Graph((jq.Input("x", (None, 3, 4, 6)),), (jq.Node("y", jq.ops.Relu(), ("x",)),), ("y",))


@pytest.fixture
def picture(tmp_path: Path) -> tuple[Path, np.ndarray]:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 10, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "7.png")
    return tmp_path / "7.png", pixels


def test_crop_colour_mean_std_and_layout(picture: tuple[Path, np.ndarray]) -> None:
    path, pixels = picture
    found = read_image(path, ImageSettings(crop=(4, 6), color="bgr", mean=(0.5, 0.4, 0.3), std=(0.2,)))
    expected = (pixels[2:6, 2:8, ::-1] / 255 - [0.5, 0.4, 0.3]) / 0.2
    np.testing.assert_allclose(found, expected.transpose(2, 0, 1), rtol=1e-5, atol=1e-6)
    last = read_image(path, ImageSettings(crop=(4, 6), layout="nhwc", divisor=1.0))
    np.testing.assert_array_equal(last, pixels[2:6, 2:8].astype(np.float32))


@pytest.mark.parametrize("swing", ["full", "studio"])
def test_yuv444_is_that_of_the_library(picture: tuple[Path, np.ndarray], swing: str) -> None:
    path, pixels = picture
    color = "yuv444" if swing == "full" else "yuv444_studio"
    found = read_image(path, ImageSettings(color=color, divisor=128.0, layout="nhwc"))
    expected = np.asarray(jq.images.rgb_to_centred_yuv444(jnp.asarray(pixels), swing=swing)) / np.float32(128)
    np.testing.assert_array_equal(found, expected)


def test_resize_keeps_the_aspect_for_one_number(picture: tuple[Path, np.ndarray]) -> None:
    path, _ = picture
    assert read_image(path, ImageSettings(resize=16)).shape == (3, 16, 20)
    assert read_image(path, ImageSettings(resize=(5, 7))).shape == (3, 5, 7)
    assert read_image(path, ImageSettings(color="gray")).shape == (1, 8, 10)
    with pytest.raises(jq.FormatError, match=r"8x10 is smaller than the crop"):
        read_image(path, ImageSettings(crop=9))
    with pytest.raises(jq.FormatError, match=r"image.mean has 2 numbers for 3 channels"):
        read_image(path, ImageSettings(mean=(0.1, 0.2)))
    (path.parent / "bad.png").write_bytes(b"no picture")
    with pytest.raises(jq.FormatError, match=r"not a readable picture"):
        read_image(path.parent / "bad.png", ImageSettings())


def test_labels_come_from_folders_or_names(tmp_path: Path) -> None:
    for folder, name in (("cat", "1"), ("ant", "2"), ("cat", "3")):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / folder / f"{name}.png")
    folders = load_data(str(tmp_path), GRAPH, ImageSettings())
    (batch,) = folders.batches(8)
    assert batch[1].tolist() == [0, 1, 1]  # ant, cat, cat
    names = load_data(str(tmp_path), GRAPH, ImageSettings(labels="stem"))
    assert [b[1].tolist() for b in names.batches(2)] == [[2, 1], [3]]
    assert sum(len(x[0]) for x, _ in names.batches(2, limit=1)) == 1
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "loose.png")
    assert not load_data(str(tmp_path), GRAPH, ImageSettings()).labelled
    with pytest.raises(jq.FormatError, match=r"files named by class number"):
        load_data(str(tmp_path), GRAPH, ImageSettings(labels="stem"))


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("train", "val"), r"train, val are parts of a data set, not classes; give one of them, such as .*train"),
        (("images", "masks"), r"are pictures and their labels, not classes. Give .*images for the pictures alone"),
        (("JPEGImages", "Annotations"), r"Give .*JPEGImages for the pictures alone; with labels give file.py:function"),
    ],
)
def test_folders_that_are_no_classes_are_not_taken_for_them(tmp_path: Path, folders: tuple, message: str) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir()
        Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / folder / "0001.png")
    with pytest.raises(jq.FormatError, match=message):
        load_data(str(tmp_path), GRAPH, ImageSettings())
    assert not load_data(str(tmp_path / folders[0]), GRAPH, ImageSettings()).labelled


def test_pictures_without_settings_say_how_they_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another preprocessing than that of training is no error, and gave scales of another range in silence."""
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 4, 6), np.float32))
    for settings, source in ((Settings(has_image=True), tmp_path), (Settings(), tmp_path / "x.npy")):
        _say_defaults(Console(), settings, str(source))
    assert capsys.readouterr().err == ""
    _say_defaults(Console(), Settings(), str(tmp_path))
    assert "no [image] in the settings: pictures are taken as RGB, divided by 255" in capsys.readouterr().err


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Six pictures in each of four class folders; picture n is gray of n."""
    for n in range(24):
        folder = tmp_path / f"class{n // 6}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 6, 3), n, np.uint8)).save(folder / f"{n:02}.png")
    return tmp_path


def test_pictures_are_taken_by_number_and_in_order(classes: Path) -> None:
    data = load_data(str(classes), GRAPH, ImageSettings(divisor=1.0))
    order = np.array([23, 0, 7, 7, 12])
    found = list(data.take(order, 2))
    assert [batch[0][0][:, 0, 0, 0].tolist() for batch in found] == [[23, 0], [7, 7], [12]]
    assert [batch[1].tolist() for batch in found] == [[3, 0], [1, 1], [2]]
    everything = [n for inputs, _ in data.read(7) for n in inputs[0][:, 0, 0, 0].tolist()]
    assert everything == list(range(24))


def test_a_part_of_a_folder_is_of_all_classes(classes: Path) -> None:
    """Its files are sorted by class: the first ones would be of one class alone."""
    data = load_data(str(classes), GRAPH, ImageSettings(divisor=1.0))
    (batch,) = data.batches(8, limit=8)
    assert batch[1].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert batch[0][0][:, 0, 0, 0].tolist() == [0, 3, 6, 9, 12, 15, 18, 21]
    np.savez(classes / "x.npz", x=np.arange(8 * 72, dtype=np.float32).reshape(8, 3, 4, 6))
    arrays = load_data(str(classes / "x.npz"), GRAPH, ImageSettings())
    assert sum(len(inputs[0]) for inputs, _ in arrays.batches(2, limit=3)) == 3


def test_a_picture_that_cannot_be_read_is_named_and_sizes_that_differ_are(classes: Path) -> None:
    Image.fromarray(np.zeros((5, 6, 3), np.uint8)).save(classes / "class0" / "00.png")
    with pytest.raises(jq.InputError, match=r"00.png: the picture becomes \[3, 5, 6\], and the graph takes"):
        list(load_data(str(classes), GRAPH, ImageSettings()).read(8))
    (classes / "class0" / "00.png").write_bytes(b"no picture")
    with pytest.raises(jq.FormatError, match=r"00\.png: not a readable picture"):
        list(load_data(str(classes), GRAPH, ImageSettings()).read(8))


def test_draft_reads_a_jpeg_smaller_where_resize_leaves_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smooth = np.linspace(0, 255, 64).astype(np.uint8)
    pixels = np.stack([np.broadcast_to(smooth, (64, 64))] * 3, axis=-1)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    sizes = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *args: (sizes.append(self.size), resize(self, *args))[1])
    plain, draft = (read_image(tmp_path / "a.jpg", ImageSettings(resize=16, draft=d)) for d in (False, True))
    read_image(tmp_path / "a.jpg", ImageSettings(resize=(16, 40), draft=True))
    assert sizes == [(64, 64), (16, 16), (64, 64)]  # by 1/4; a width of 40 takes all 64
    assert plain.shape == draft.shape == (3, 16, 16)
    assert np.abs(plain - draft).max() < 0.05


def test_folders_of_pictures_name_the_package_that_they_need(classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r"need grain: pip install 'jquant\[cli\]'"):
        list(load_data(str(classes), GRAPH, ImageSettings()).read(8))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((2, 3, 4, 6), np.int64)}, "is int64, the graph takes float32"),
        ({"x": np.zeros((2, 3, 4, 6)), "y": np.zeros(3)}, r"arrays of \[2, 3\] samples"),
        ({"x": np.zeros((0, 3, 4, 6))}, "at least one"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, arrays: dict, message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(jq.InputError, match=message):
        load_data(str(tmp_path / "a.npz"), GRAPH, ImageSettings())


def test_a_lone_array_and_objects(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((3, 3, 4, 6)))
    (batch, labels), *_ = load_data(str(tmp_path / "a.npy"), GRAPH, ImageSettings()).batches(2)
    assert batch[0].dtype == np.float32
    assert labels is None
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(jq.FormatError, match=r"not a readable file of arrays"):  # no pickle
        load_data(str(tmp_path / "o.npy"), GRAPH, ImageSettings())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[image]\ncrop = 0", "image.crop must be a positive integer"),
        ("[image]\ncolor = 'rbg'", "image.color must be one of rgb"),
        ("[image]\nstd = [0.0]", "image.std must be a finite number or a list of such, not 0"),
        ("[train]\nepochs = 1.5", "train.epochs must be a positive integer"),
        ("[image]\nmean = [nan]", r"image\.mean must be a finite number or a list of such"),
        ("[image]\ndivisor = inf", r"image\.divisor must be a finite number that is not negative"),
        ("[train]\naveraging = 2", r"train\.averaging must be from 0 to 1; not 2"),
        ("[train]\nvalues = 5", r"\[train\.values\] must be a table of patterns"),
        ("[train.values]\n'*' = 'soon'", r"train\.values: '\*' must be true, false, a first step or \[first, last\]"),
        ("[train.observers]\nx = [5, 3]", r"train\.observers: 'x' must be true"),
        ("[train.weights]\nx = -1", r"train\.weights: 'x' must be true"),
        ("[train.valeus]\nx = 1", r"train: unknown key 'valeus'; did you mean 'values'"),
        ("[train]\nmomentum = nan", r"train\.momentum must be a finite number that is not negative"),
        ("[train]\nlearning_rate = -1", "train.learning_rate must be a finite number that is not negative"),
        (
            "[train]\nloss = 'mes'",
            "train.loss must be one of cross_entropy, mse, l1, or module:function; not 'mes'.*'mse'",
        ),
        ("[train]\noptimizer = 'adam'", "train.optimizer must be one of sgd, adamw; not 'adam'"),
        ("[target]\nmarch = 'nash-f'", "unknown march 'nash-f'.*did you mean 'nash-"),
        ("[image", "not TOML"),
        ("image = 3", "image must be a table"),
    ],
)
def test_settings_that_are_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "q.toml").write_text(text)
    with pytest.raises(jq.FormatError, match=f"q.toml: .*{message}"):
        read_settings(tmp_path / "q.toml")


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    graph, params = small_graph()
    model = jq.prepare(graph, params, QCONFIG, target=jq.targets.NASH_M)
    qparams = {name: jnp.float32(0.5) if name in model.plan.owned else jnp.ones(4) for name in model.plan.trained}
    for state in (
        State(graph, params),
        State(graph, params, QCONFIG, jq.targets.NASH_M),
        State(graph, params, QCONFIG, jq.targets.NASH_M, qparams, model.params),
    ):
        save_state(tmp_path / "s.jqs", state)
        again = load_state(tmp_path / "s.jqs")
        assert (again.graph, again.qconfig, again.target) == (state.graph, state.qconfig, state.target)
        for kind in ("params", "qparams", "trained"):
            before, after = getattr(state, kind), getattr(again, kind)
            assert (before is None) == (after is None)
            for name in before or ():
                np.testing.assert_array_equal(before[name], after[name])
                assert before[name].shape == after[name].shape
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.jqs"]


def test_a_state_that_is_cut_off_or_another_file(tmp_path: Path) -> None:
    save_state(tmp_path / "s.jqs", State(*small_graph()))
    whole = (tmp_path / "s.jqs").read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.jqs").write_bytes(whole[:size])
        with pytest.raises(jq.FormatError, match=r"cut.jqs"):
            load_state(tmp_path / "cut.jqs")
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path / "none.jqs")


@pytest.mark.parametrize(
    ("count", "size", "limit", "sizes"),
    [
        (600, 256, None, [200] * 3),
        (30, 8, None, [6] * 5),
        (30, 8, 16, [8, 8]),
        (3, 2, None, [2, 1]),  # one at a time would be no small change
        (31, 8, None, [8, 8, 8, 7]),
        (4, 300, None, [4]),
    ],
)
def test_batches_are_equal_where_a_little_less_makes_them_so(
    tmp_path: Path, count: int, size: int, limit: int | None, sizes: list[int]
) -> None:
    x = np.arange(count * 72, dtype=np.float32).reshape(count, 3, 4, 6)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(count))
    data = load_data(str(tmp_path / "a.npz"), GRAPH, ImageSettings())
    found = list(data.batches(size, limit))
    assert [len(labels) for _, labels in found] == sizes
    np.testing.assert_array_equal(np.concatenate([inputs[0] for inputs, _ in found]), x[:limit])


# ---------------------------------------------------------------------------------------------------------------------
# Batches of a function

TWO = jq.Graph(
    (jq.Input("a", (None, 2)), jq.Input("n", (None,), "int32")), (jq.Node("s", jq.ops.Relu(), ("a",)),), ("s",)
)


def batches(given: str, tmp_path: Path, graph: jq.Graph) -> list:
    (tmp_path / "loader.py").write_text(f"import numpy as np, torch\ndef batches():\n    return [{given}]\n")
    return list(load_data(f"{tmp_path / 'loader.py'}:batches", graph, ImageSettings()).batches(8))


@pytest.mark.parametrize(
    ("given", "labelled"),
    [
        ("(np.ones((3, 2), np.float32), np.arange(3))", False),
        ("(torch.ones(3, 2), torch.arange(3), torch.arange(3))", True),
        ("((torch.ones(3, 2), torch.arange(3)), torch.arange(3))", True),
        ("({'n': torch.arange(3), 'a': torch.ones(3, 2)}, np.arange(3))", True),
        ("{'n': torch.arange(3), 'a': torch.ones(3, 2), 'y': np.arange(3)}", True),
    ],
)
def test_batches_are_taken_as_a_torch_loader_gives_them(given: str, labelled: bool, tmp_path: Path) -> None:
    ((inputs, labels),) = batches(given, tmp_path, TWO)
    np.testing.assert_array_equal(inputs[0], np.ones((3, 2), np.float32))
    np.testing.assert_array_equal(inputs[1], np.arange(3, dtype=np.int32))
    assert (labels is not None) == labelled
    assert labels is None or labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("np.ones((3, 2), np.float32)", "a batch of 1 arrays; the graph takes a, n. Give these in order"),
        ("(torch.ones(3, 2), torch.arange(3), torch.arange(3), 1)", "a batch of 4 arrays; the graph takes a, n"),
        ("(torch.ones(2), torch.arange(3))", r"'a' is \[2\], and the graph takes \[batch, 2\]: .* in a DataLoader"),
        ("(torch.ones(3, 2), torch.arange(3), {'a': 1})", "'y', the labels, is dict, and no array of numbers"),
        ("(torch.ones(3, 2), torch.arange(3), [[1], [2, 3], [4]])", "'y', the labels, is list, and no array"),
        ("(torch.ones(3, 2).requires_grad_(), torch.arange(3))", "'a' is Tensor, and no array: .*requires grad"),
    ],
)
def test_batches_of_another_form_are_named(given: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(jq.InputError, match=message):
        batches(given, tmp_path, TWO)
