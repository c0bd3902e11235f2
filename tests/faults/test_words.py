"""Errors name the class, the path or the step that is meant, not another one.

Seen: advice for a function that the layer does not have, a value that the user did not give, a hidden file that nobody
asked for, a raw error of another library, and a missing file reported after the model was loaded.
"""

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import jquant as jq
from jquant.text import near_or_known
from jquant.types import ConversionError, FormatError, QConfigError
from jquant_converters import from_torch, to_onnx

INT8 = jq.QConfig({"*": jq.Policy(output=jq.int8(), weight=jq.int8(axis="out"))})
PICTURE = torch.zeros(2, 3, 6, 6)


def wrapped(make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.ReLU(), make(nn.Conv2d(3, 4, 3)))


# ---------------------------------------------------------------------------------------------------------------------
# Layers whose weight is computed


class Halved(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * torch.bernoulli(torch.full_like(weight, 0.5))


def test_a_parametrized_layer_that_cannot_be_computed_is_named_with_its_parameter():
    def masked(module: nn.Module) -> nn.Module:
        return nn.utils.parametrize.register_parametrization(module, "weight", Halved())

    model = wrapped(masked)
    with pytest.raises(ConversionError, match=r"parametrize\.remove_parametrizations\(model\.1, 'weight'\)"):
        from_torch(model, PICTURE)
    nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    from_torch(model, PICTURE)


# ---------------------------------------------------------------------------------------------------------------------
# Values that the user gave


@pytest.mark.parametrize("momentum", [None, 0.0])
def test_a_momentum_of_none_is_named(momentum: float | None):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum)).eval()
    graph, params = from_torch(model, PICTURE)
    with pytest.raises(QConfigError, match=r"batch norm '1'.*momentum=None of torch.*such as 0\.1"):
        jq.prepare(graph, params, INT8, target=jq.targets.NASH_E, batch_norm="live")


class Scaled(nn.Module):
    """A linear layer whose outputs are multiplied by a buffer."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("factor", torch.full((4,), value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.factor


def test_an_intended_infinity_is_not_a_wrong_checkpoint():
    with pytest.raises(ConversionError, match=r"'factor' contains infinite values.*masked_fill") as caught:
        from_torch(Scaled(float("-inf")), torch.zeros(2, 4))
    assert "checkpoint" not in str(caught.value)
    with pytest.raises(ConversionError, match="'factor' contains NaN; was the checkpoint loaded wrongly"):
        from_torch(Scaled(float("nan")), torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("backbone.*", "there are 'x', 'linear', 'act'"),
        ("type:Convolution", "there are 'type:Input', 'type:Linear', 'type:Relu'"),
        ("linaer", "did you mean 'linear'"),
        ("re:linaer.*", "did you mean 'linear'"),
        ("type:Linaer", "did you mean 'type:Linear'"),
        ("*linaer*", "did you mean 'linear'"),
        ("module:linaer", "there is no module 'linaer'; did you mean 'linear'"),
    ],
)
def test_a_rule_that_matches_nothing_names_what_there_is(pattern: str, expected: str):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.act = nn.Linear(4, 4), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(self.linear(x))

    graph, params = from_torch(Net(), torch.zeros(2, 4))
    rules = jq.QConfig({"*": jq.Policy(output=jq.int8()), pattern: jq.Policy(output=jq.int16())})
    with pytest.raises(QConfigError) as caught:
        jq.prepare(graph, params, rules, target=jq.targets.NASH_E)
    assert expected in str(caught.value)


def test_names_that_are_not_near_are_counted():
    assert near_or_known("zzz", [f"layer{i}" for i in range(7)]).endswith("'layer4' and 2 more")
    assert near_or_known("zzz", []) == ""


def test_a_grid_of_int8_names_the_template():
    class Sampled(nn.Module):
        def forward(self, x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.grid_sample(x, grid, align_corners=False)

    graph, params = from_torch(Sampled(), (PICTURE, torch.zeros(2, 4, 4, 2)))
    with pytest.raises(Exception, match=r"jq\.templates\.grid_int16\(graph\)"):
        jq.prepare(graph, params, INT8, target=jq.targets.NASH_E, strict=True)
    assert jq.templates.grid_int16(graph)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of other tools


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        (argparse.Namespace(epochs=3), "argparse.Namespace"),  # training scripts
        (np.float64(0.5), "numpy._core.multiarray.scalar"),  # a best accuracy
        (Path("runs"), "pathlib.PosixPath"),
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),  # detection frameworks pickle the module
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_says_which_class_and_how_to_take_the_weights_out(
    tmp_path: Path, extra: Any, name: str, zipped: bool
):
    path = tmp_path / "last.pth"
    weights = nn.Linear(2, 2).state_dict()
    torch.save({"state_dict": weights, "other": extra}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(FormatError) as caught:
        read_state(path)
    assert f"it holds {name} beside tensors" in str(caught.value)
    checkpoint = torch.load(path, weights_only=False)  # as the error advises
    torch.save(checkpoint["state_dict"], tmp_path / "weights.pth")
    assert set(read_state(tmp_path / "weights.pth")) == set(weights)


def test_a_checkpoint_of_plain_parts_names_them(tmp_path: Path):
    torch.save({"state_dict": nn.Linear(2, 2).state_dict(), "epoch": 1}, tmp_path / "last.pth")
    with pytest.raises(
        FormatError, match=r"weights are in \['state_dict'\]: load_state_dict\(.*, entry='state_dict'\)"
    ):
        read_state(tmp_path / "last.pth")


def read_state(path: Path) -> dict[str, torch.Tensor]:
    from jquant_converters.files import read_state_dict

    return read_state_dict(path)


# ---------------------------------------------------------------------------------------------------------------------
# Paths


@pytest.fixture(scope="module")
def program() -> tuple[Any, ...]:
    graph, params = from_torch(nn.Linear(4, 4), torch.zeros(2, 4))
    model = jq.prepare(graph, params, INT8, target=jq.targets.NASH_E)
    model = jq.calibrate(model, [jnp.ones((2, 4))])
    return model, jq.lower(model)


WRITERS: dict[str, Callable[..., Any]] = {
    "save": lambda path, model, program: jq.save(path, program),
    "to_onnx": lambda path, model, program: to_onnx(model, path=path),
    "to_stablehlo": lambda path, model, program: jq.to_stablehlo(path, program),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("where", ["no folder", "a folder", "a file for a folder"])
def test_an_error_of_writing_names_the_path_that_was_given(
    tmp_path: Path, program: tuple[Any, ...], write: Callable[..., Any], where: str
):
    (tmp_path / "plain").touch()
    path = {
        "no folder": tmp_path / "missing" / "net",
        "a folder": tmp_path,
        "a file for a folder": tmp_path / "plain/net",
    }
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the text is checked below
        write(path[where], *program)
    assert "partial" not in str(caught.value)
    assert ".tmp" not in str(caught.value)
    assert path[where].name in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["plain"]


# ---------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").write_text("def make():\n    raise SystemError('the model was loaded')\n")
    (tmp_path / "q.toml").write_text('[jquant]\nschema = 1\n[rules."*".output]\ndtype = "int8"\n')
    np.save(tmp_path / "x.npy", np.ones((2, 4), np.float32))
    torch.save({}, tmp_path / "net.pth")
    (tmp_path / "junk.jq").write_bytes(b"x" * 100)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("inspect q.toml", "q.toml is no model: give it with --config"),
        ("inspect x.npy", "x.npy is no model: give it with --data"),
        (
            "inspect net.pth",
            "net.pth is no model: give it with --checkpoint, beside a MODEL of the form module:function",
        ),
        ("inspect junk.jq", "junk.jq: not a program (.jq) nor a state (.jqs) of jquant, or a damaged one"),
        # Data that is not there is missed before the model is loaded.
        ("calibrate net.py:make -c q.toml -d no.npy -o net.jqs", "no data at no.npy"),
        ("calibrate net.py:make -c q.toml -d pictures -o net.jqs", "no data at pictures"),
        ("calibrate net.py:make -c q.toml -d no.py:data -o net.jqs", "no Python file no.py"),
        ("quantize net.py:make -c q.toml -d no.npy -o net.jq", "no data at no.npy"),
        ("eval net.py:make -c q.toml -d no.npy", "no data at no.npy"),
        ("compare net.py:make -c q.toml -d no.npy", "no data at no.npy"),
        ("sensitivity net.py:make -c q.toml -d no.npy", "no data at no.npy"),
        ("report net.py:make -c q.toml -d no.npy -o out", "no data at no.npy"),
        ("train net.py:make -c q.toml -d no.npy -o net.jqs", "no data at no.npy"),
        ("run net.py:make -c q.toml -d no.npy -o out.npz", "no data at no.npy"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_command_names_the_file_that_is_wrong(command: str, expected: str, capsys: pytest.CaptureFixture[str]):
    from typer.testing import CliRunner

    from jquant.cli.application import app

    result = CliRunner().invoke(app, command.split())
    assert result.exit_code in (1, 2)
    assert expected in " ".join((result.output + capsys.readouterr().err).split())


# ---------------------------------------------------------------------------------------------------------------------
# Modules of other kinds (fault 20)


class Holding(nn.Module):
    """A module that calls an exported program, as an attribute or as its module."""

    def __init__(self, part: Any) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        part = self.part.module() if isinstance(self.part, torch.export.ExportedProgram) else self.part
        return part(x) * 2


def exported(dynamic: bool) -> Any:
    torch.manual_seed(0)
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    return torch.export.export(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (torch.zeros(2, 4),), dynamic_shapes=shapes)


@pytest.mark.parametrize("inside", [True, False])
def test_the_module_of_an_exported_program_is_imported(inside: bool):
    part = exported(dynamic=True).module()
    model = Holding(part) if inside else part
    graph, params = from_torch(model, torch.zeros(2, 4))
    x = torch.linspace(-1, 1, 12).reshape(3, 4)
    expected = model(x).detach().numpy()
    np.testing.assert_allclose(jq.graph.evaluate_float(graph, params, jnp.asarray(x.numpy()))[0], expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["program", "module", "the model"])
def test_an_exported_program_with_a_fixed_batch_is_named(kind: str):
    program = exported(dynamic=False)
    model = {
        "program": lambda: Holding(program),
        "module": lambda: Holding(program.module()),
        "the model": program.module,
    }
    place = {"program": "attribute 'part' of the model", "module": "module 'part'", "the model": "the model"}[kind]
    with pytest.raises(ConversionError, match=rf"{place} is an exported program with a fixed batch"):
        from_torch(model[kind](), torch.zeros(2, 4))
    graph, params = from_torch(model[kind](), torch.zeros(2, 4), dynamic_batch=False)
    assert jq.graph.evaluate_float(graph, params, jnp.ones((2, 4)))[0].shape == (2, 4)


def with_weight(change: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(change(layer.weight.detach()), requires_grad=False)
    return nn.Sequential(layer)


def two_tensor(x: torch.Tensor) -> torch.Tensor:
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(x, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: with_weight(two_tensor), "'0.weight' is a TwoTensor, a tensor class of another tool"),
        (lambda: with_weight(torch.Tensor.to_sparse), r"'0.weight' is torch.sparse_coo; make it a plain tensor"),
        (lambda: nn.Sequential(nn.Linear(4, 4, device="meta")), "'0.weight' is on the meta device"),
        (lambda: nn.Sequential(nn.LazyLinear(4)), "'0.weight' of a lazy module has no shape yet"),
        (lambda: nn.Sequential(torch.ao.nn.quantized.Linear(4, 4)), "module '0' is a torch.ao.nn.quantized"),
        (lambda: torch.jit.script(nn.Linear(4, 4)), "the model is TorchScript"),
    ],
)
def test_a_module_without_plain_numbers_is_named(make: Callable[[], nn.Module], expected: str):
    with pytest.raises(ConversionError, match=expected):
        from_torch(make(), torch.zeros(2, 4))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, two_tensor, lambda x: torch.nested.nested_tensor([x])])
def test_an_input_without_plain_numbers_is_named(change: Callable[[torch.Tensor], torch.Tensor]):
    with pytest.raises(ConversionError, match=r"example input 0 is no plain tensor but .*; make it dense"):
        from_torch(nn.Linear(4, 4), change(torch.zeros(2, 4)))


def test_a_plain_subclass_of_tensor_is_imported():
    class Tagged(torch.Tensor):
        pass

    graph, params = from_torch(with_weight(lambda x: x.as_subclass(Tagged)), torch.zeros(2, 4))
    assert jq.graph.evaluate_float(graph, params, jnp.ones((2, 4)))[0].shape == (2, 4)


# ---------------------------------------------------------------------------------------------------------------------
# The first hour


def test_the_training_loop_of_the_first_hour_takes_live_batch_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It had no label for batch norm and dropped the statistics."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "first-hour.md").read_text(encoding="utf-8")
    first, _, loop = re.findall(r"```python\n(.*?)```", page, flags=re.S)[:3]
    assert "batch_norm" in loop
    setup = first.partition("print(jq.explain(model))")[0].replace("NASH_E)", 'NASH_E, batch_norm="live")')
    follow = (
        "for _ in range(40):\n    module(torch.from_numpy(images[:16]))\n"  # running statistics are those of the data
    )
    space: dict[str, Any] = {}
    exec(setup.replace("graph, params = from_torch", f"{follow}graph, params = from_torch"), space)
    space["model"] = jq.calibrate(space["model"], [space["x"]])
    before = dict(space["model"].params)
    exec(loop.replace('freeze=["0.*"]', "freeze=[]"), space)
    after = space["state"].model.params
    for key in ("1.running_mean", "1.running_var", "1.bias", "0.weight"):
        assert np.abs(np.asarray(after[key]) - np.asarray(before[key])).max() > 0, key
    assert isinstance(space["program"], jq.Program)
