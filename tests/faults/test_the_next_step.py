"""Inputs, checkpoints and pictures that do not fit: the error names the next step."""

import argparse
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import jquant as jq
from jquant.cli.data import load_data
from jquant.cli.settings import ImageSettings
from jquant_converters import from_torch
from jquant_converters.command_line import import_module

GRAPH = jq.Graph((jq.Input("x", (None, 3, 4, 6)),), (jq.Node("y", jq.ops.Relu(), ("x",)),), ("y",))


@pytest.mark.parametrize(
    ("array", "step"),
    [
        (np.zeros((2, 3, 4, 6), np.uint8), r"make it what the model was trained on, such as \(x.astype"),
        (np.zeros((2, 3, 4, 6), np.float64), r"convert it: x.astype\(np.float32\)"),
        (np.zeros((3, 4, 6), np.float32), r"the batch axis is missing: x\[None\]"),
        (np.zeros((2, 4, 6, 3), np.float32), r"the axes are in another order: x.transpose\(0, 3, 1, 2\)"),
        (np.zeros((2, 3, 5, 6), np.float32), "pad or resize to the size of the import"),
    ],
)
def test_an_array_that_does_not_fit_names_the_step(array: np.ndarray, step: str) -> None:
    with pytest.raises(jq.InputError, match=step):
        jq.graph.evaluate_float(GRAPH, {}, array)  # type: ignore[arg-type]  (numpy arrays are taken too)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 16, 2)).eval()


@pytest.mark.parametrize(
    "wrap", ["plain", "state_dict", "module.", "model and prefix", "without counters", "safetensors"]
)
def test_a_checkpoint_of_a_training_script_is_loaded(wrap: str, tmp_path: Path) -> None:
    trained, fresh = small(), small()
    with torch.no_grad():
        for value in trained.parameters():
            value.add_(1)
    state = trained.state_dict()
    found = {
        "plain": state,
        "state_dict": {"epoch": 3, "state_dict": state},
        "module.": {f"module.{key}": value for key, value in state.items()},
        "model and prefix": {"model": {f"_orig_mod.{key}": value for key, value in state.items()}, "step": 1},
        "without counters": {key: value for key, value in state.items() if "num_batches" not in key},
        "safetensors": state,
    }[wrap]
    path = tmp_path / ("net.safetensors" if wrap == "safetensors" else "net.pth")
    (save_file if wrap == "safetensors" else torch.save)(found, path)
    graph, params = import_module(fresh, None, [(1, 3, 6, 6)], path)
    x = torch.randn(2, 3, 6, 6)
    (y,) = jq.graph.evaluate_float(graph, params, jnp.asarray(x.numpy()))
    np.testing.assert_allclose(y, trained(x).detach().numpy(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net"])
@pytest.mark.parametrize("beside", [{"args": argparse.Namespace(lr=0.1)}, {"best": np.float64(0.5)}], ids=str)
def test_a_checkpoint_with_a_class_names_two_lines_that_take_the_weights_out(
    key: str, beside: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines are run, and the file that they write is read."""
    monkeypatch.chdir(tmp_path)
    torch.save({"epoch": 3, key: small().state_dict(), **beside}, "last.pt")
    with pytest.raises(jq.FormatError, match="take the weights out") as raised:
        import_module(small(), None, [(1, 3, 6, 6)], Path("last.pt"))
    lines = [line.strip() for line in str(raised.value).splitlines()[1:]]
    assert len(lines) == 2
    exec("\n".join(["import torch", *lines]), {})
    assert import_module(small(), None, [(1, 3, 6, 6)], Path("weights.pth"))[1]


def test_a_checkpoint_of_another_module_or_of_two_is_named(tmp_path: Path) -> None:
    state = small().state_dict()
    torch.save({"other.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(jq.FormatError, match=r"not the weights of Sequential: of its 9 keys 9 \(0.weight, 0.bias"):
        import_module(small(), None, [(1, 3, 6, 6)], tmp_path / "other.pth")
    torch.save({"teacher": state, "student": state}, tmp_path / "two.pth")
    with pytest.raises(jq.FormatError, match=r"\['teacher'\] and \['student'\] all fit the module. Save one of them"):
        import_module(small(), None, [(1, 3, 6, 6)], tmp_path / "two.pth")


@pytest.mark.parametrize(
    ("source", "example", "step"),
    [
        (nn.Linear, (torch.zeros(1, 2),), r"call it first: Linear\(\)"),
        ({"weight": torch.zeros(2, 2)}, (torch.zeros(1, 2),), "these are weights: load them into the module"),
        (nn.Linear(2, 2), {"x": 1}, "a tuple in the order of the forward, not a mapping of 'x'"),
        (nn.Linear(2, 2), (1, 2), r"example inputs are tensors, not a shape: \(torch.zeros\(1, 2\),\)"),
    ],
)
def test_what_is_no_module_or_no_tensor_names_the_step(source: object, example: object, step: str) -> None:
    with pytest.raises(jq.ConversionError, match=step):
        from_torch(source, example)


def test_pictures_for_a_graph_of_two_inputs_and_one_picture_alone(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "a.png")
    (batch,) = load_data(str(tmp_path / "a.png"), GRAPH, ImageSettings()).batches(4)
    assert (batch[0][0].shape, batch[1]) == ((1, 3, 4, 6), None)
    two = jq.Graph((*GRAPH.inputs, jq.Input("z", (None, 2))), GRAPH.nodes, GRAPH.outputs)
    with pytest.raises(jq.InputError, match="pictures are one input, and the graph has x, z"):
        load_data(str(tmp_path), two, ImageSettings())
    with pytest.raises(jq.InputError, match=r"a.png: the picture becomes \[1, 4, 6\], and the graph takes \[3, 4, 6\]"):
        list(load_data(str(tmp_path), GRAPH, ImageSettings(color="gray")).batches(4))


@pytest.mark.parametrize("nested", [False, True])
def test_the_padding_mask_of_a_transformer_costs_no_range(nested: bool) -> None:
    """-inf where a key is padding; the scale of the scores does not see it. Nested tensors, the default, are of torch's
    fast path alone: it gives zeros behind the end of a sequence, and the same numbers before it."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=nested).eval()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, x: torch.Tensor, padded: torch.Tensor) -> torch.Tensor:
            return self.encoder(x, src_key_padding_mask=padded)

    x, padded = torch.randn(4, 5, 8), torch.arange(5)[None] >= torch.tensor([5, 4, 3, 2])[:, None]
    net = Net().eval()
    graph, params = from_torch(net, (x, padded))
    arrays = (jnp.asarray(x.numpy()), jnp.asarray(padded.numpy()))
    qconfig = jq.QConfig({"*": jq.Policy(output=jq.int16(), weight=jq.int8(axis="out"))})
    model = jq.calibrate(jq.prepare(graph, params, qconfig, target=jq.targets.NASH_E), [arrays])
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        wanted = net(x, padded).detach().numpy()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
        fast = np.asarray(net(x, padded))
    np.testing.assert_allclose(fast[~padded.numpy()], wanted[~padded.numpy()], rtol=1e-4, atol=1e-5)
    assert not nested or not fast[padded.numpy()].any()
    program = jq.lower(model)
    for found in (jq.apply(model, *arrays), jq.run(program, *arrays)):
        noise = np.square(np.asarray(found) - wanted).mean()
        assert 10 * np.log10(np.square(wanted).mean() / noise) > 30
    _, slow = jq.reference.run(program, *map(np.asarray, arrays))
    fast = jq.run_with_taps(program, *arrays)
    np.testing.assert_array_equal(fast[program.graph.outputs[0]], slow[program.graph.outputs[0]])


# ---------------------------------------------------------------------------------------------------------------------
# Files and rules

TWO_INPUTS = jq.Graph(
    (jq.Input("a", (None, 2)), jq.Input("b", (None, 2))), (jq.Node("s", jq.ops.Add(), ("a", "b")),), ("s",)
)


@pytest.mark.parametrize(
    ("given", "step"),
    [
        ({"a": np.zeros((1, 2), np.float32), "b": 0}, r"by position: \(batch\['a'\], batch\['b'\]\)"),
        (np.zeros((1, 2), np.float32), r"1 were given; a batch is a tuple of them: \(a, b\)"),
    ],
)
def test_fewer_inputs_than_the_graph_has_name_the_way_to_give_them(given: object, step: str) -> None:
    with pytest.raises(jq.InputError, match=step):
        jq.graph.evaluate_float(TWO_INPUTS, {}, given)


@pytest.mark.parametrize("given", ["int8", jq.int8()])
def test_a_format_in_the_place_of_a_policy_is_written_out(given: object) -> None:
    with pytest.raises(jq.QConfigError, match=r"write jq.Policy\(output=jq.int8\(\), weight=jq.int8\(axis='out'\)\)"):
        jq.QConfig({"*": given})


def test_a_checkpoint_in_the_place_of_a_program_says_what_it_is(tmp_path: Path) -> None:
    torch.save({"epoch": 1, "model": small().state_dict()}, tmp_path / "last.pt")
    with pytest.raises(jq.FormatError, match=r"torch.save wrote it, and it is no exported program. Load its weights"):
        from_torch(tmp_path / "last.pt")
    with pytest.raises(jq.FormatError, match="no file of jquant, or damaged"):
        jq.load(tmp_path / "last.pt")
