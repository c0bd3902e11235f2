"""Checkpoints as ultralytics, mmengine, timm, Lightning and PEFT write them: read, or refused with the way out.

The frameworks are not installed. A class of the same name in a module of the same name stands for each of theirs, which
is all that a pickle knows of it.
"""

import argparse
import sys
import types
from collections import OrderedDict

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import jquant as jq
from jquant_converters import from_torch, load_state_dict

X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.fc, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.relu(self.fc(x)))


TRAINED = Net(1)
WEIGHTS = TRAINED.state_dict()


@pytest.fixture(scope="module")
def imported():
    return from_torch(Net(0).eval(), (X,))


def prefixed(prefix, weights=WEIGHTS):
    return OrderedDict((prefix + key, tensor) for key, tensor in weights.items())


def check(imported, loaded):
    graph, _ = imported
    (found,) = jq.graph.evaluate_float(graph, loaded.params, jnp.asarray(X.numpy()))
    np.testing.assert_allclose(found, TRAINED(X).detach().numpy(), rtol=0, atol=1e-6)


def stand_in(monkeypatch, name, **attributes):
    """An object of a class that a framework would have: `name` is its module and its own."""
    path, _, kind = name.rpartition(".")
    parts = path.split(".")
    for i in range(len(parts)):
        inner = ".".join(parts[: i + 1])
        monkeypatch.setitem(sys.modules, inner, types.ModuleType(inner))
    base = nn.Module if issubclass(attributes.pop("base", object), nn.Module) else object
    made = type(kind, (base,), {"__module__": path})
    setattr(sys.modules[path], kind, made)
    found = made()
    for key, value in attributes.items():
        setattr(found, key, value)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Plain ones


PLAIN = {
    "lightning": (
        {"state_dict": prefixed("model."), "epoch": 3, "global_step": 10, "optimizer_states": [], "loops": {}},
        {"entry": "state_dict", "prefix": "model."},
    ),
    "lightning, compiled": (
        {"state_dict": prefixed("model._orig_mod.") | {"loss.weight": torch.ones(2)}, "callbacks": {}},
        {"entry": "state_dict", "prefix": "model._orig_mod."},
    ),
    "mmengine": (
        {"meta": {"epoch": 12, "mmengine_version": "0.10.7"}, "state_dict": prefixed("backbone.")},
        {"entry": "state_dict", "prefix": "backbone."},
    ),
    "mmengine, ema": (
        {"state_dict": WEIGHTS, "ema_state_dict": prefixed("module.") | {"steps": torch.tensor(9)}},
        {"entry": "ema_state_dict", "prefix": "module."},
    ),
    "timm": (
        {"epoch": 1, "arch": "net", "state_dict": WEIGHTS, "state_dict_ema": WEIGHTS, "metric": 81.5, "version": 2},
        {"entry": "state_dict_ema"},
    ),
    "two deep": ({"ema": {"module": WEIGHTS}, "step": 3}, {"entry": ("ema", "module")}),
    "PEFT, merged": (prefixed("base_model.model."), {"prefix": "base_model.model."}),
    "bfloat16": ({"state_dict": {k: v.bfloat16() for k, v in WEIGHTS.items()}}, {"entry": "state_dict"}),
}


@pytest.mark.parametrize("name", PLAIN)
def test_containers_and_prefixes_are_read(imported, tmp_path, name):
    checkpoint, where = PLAIN[name]
    torch.save(checkpoint, tmp_path / "last.ckpt")
    for source in (checkpoint, tmp_path / "last.ckpt"):
        loaded = load_state_dict(*imported, source, **where)
        if name == "bfloat16":
            np.testing.assert_array_equal(loaded.params["fc.weight"], WEIGHTS["fc.weight"].bfloat16().float())
        else:
            check(imported, loaded)


@pytest.mark.parametrize("name", [n for n in PLAIN if n != "PEFT, merged"])
def test_the_error_without_an_entry_names_it(imported, tmp_path, name):
    checkpoint, where = PLAIN[name]
    torch.save(checkpoint, tmp_path / "last.ckpt")
    entry = f"entry={where['entry']!r}"
    with pytest.raises(jq.ConversionError) as of_a_mapping:
        load_state_dict(*imported, checkpoint)
    assert entry in str(of_a_mapping.value) or "state_dict" in checkpoint
    with pytest.raises(jq.FormatError) as of_a_file:
        load_state_dict(*imported, tmp_path / "last.ckpt")
    assert "load_state_dict(graph, params, path, entry=" in str(of_a_file.value)


def test_an_entry_that_is_not_there(imported, tmp_path):
    torch.save({"model": WEIGHTS, "epoch": 1}, tmp_path / "last.pt")
    with pytest.raises(jq.FormatError, match=r"no entry 'state_dict'; there is 'model', 'epoch'"):
        load_state_dict(*imported, tmp_path / "last.pt", entry="state_dict")
    with pytest.raises(jq.FormatError, match=r"no entry 'epoch\.x'; there is a int"):
        load_state_dict(*imported, tmp_path / "last.pt", entry=("epoch", "x"))
    with pytest.raises(jq.FormatError, match=r"the entry 'epoch' is a int, not tensors by name"):
        load_state_dict(*imported, {"epoch": 1}, entry="epoch")


# ---------------------------------------------------------------------------------------------------------------------
# With classes of the framework


WITH_CLASSES = {
    "pytorch_lightning.utilities.parsing.AttributeDict": ("state_dict", "hyper_parameters", "model."),
    "lightning.fabric.utilities.data.AttributeDict": ("state_dict", "hyper_parameters", "model."),
    "mmengine.logging.history_buffer.HistoryBuffer": ("state_dict", "message_hub", ""),
    "omegaconf.dictconfig.DictConfig": ("state_dict", "cfg", ""),
}


def lines_of(error):
    """The code that an error advises."""
    found = [line.strip() for line in str(error).splitlines() if line.startswith("  ")]
    assert len(found) == 2
    return found


def taken_out(error, folder, name):
    """What the two lines save, run where the file is."""
    code = "\n".join(lines_of(error)).replace("'weights.pth'", "out")
    exec(code, {"torch": torch, "path": folder / name, "out": folder / "weights.pth"})
    return folder / "weights.pth"


@pytest.mark.parametrize("name", WITH_CLASSES)
def test_a_class_that_stops_the_reading_is_named(imported, tmp_path, monkeypatch, name):
    entry, beside, prefix = WITH_CLASSES[name]
    with monkeypatch.context() as installed:
        extra = stand_in(installed, name, values={"lr": 0.1})
        torch.save({entry: prefixed(prefix), beside: extra, "epoch": 4}, tmp_path / "last.ckpt")
    with pytest.raises(jq.FormatError, match=f"it holds {name} beside tensors") as caught:
        load_state_dict(*imported, tmp_path / "last.ckpt", entry=entry)
    with monkeypatch.context() as installed:
        stand_in(installed, name)
        weights = taken_out(caught.value, tmp_path, "last.ckpt")
    check(imported, load_state_dict(*imported, weights, prefix=prefix))


def test_arguments_of_timm_are_named(imported, tmp_path):
    torch.save({"state_dict": WEIGHTS, "args": argparse.Namespace(lr=0.1), "epoch": 4}, tmp_path / "last.pth.tar")
    with pytest.raises(jq.FormatError, match=r"it holds argparse\.Namespace beside tensors") as caught:
        load_state_dict(*imported, tmp_path / "last.pth.tar", entry="state_dict")
    check(imported, load_state_dict(*imported, taken_out(caught.value, tmp_path, "last.pth.tar")))


@pytest.mark.parametrize("ema", [False, True])
def test_a_pickled_model_of_ultralytics_is_named(imported, tmp_path, monkeypatch, ema):
    """Which holds the whole module, in float16, and beside it one of averages."""
    name = "ultralytics.nn.tasks.DetectionModel"
    with monkeypatch.context() as installed:
        made = stand_in(installed, name, base=nn.Module, fc=Net(1).fc, head=Net(1).head).half()
        other = stand_in(installed, name, base=nn.Module, fc=Net(2).fc, head=Net(2).head).half()
        checkpoint = {"model": other if ema else made, "ema": made if ema else None, "train_args": {"imgsz": 640}}
        sys.modules["ultralytics.nn.tasks"].DetectionModel = other.__class__ = type(made)
        torch.save(checkpoint, tmp_path / "best.pt")
    with pytest.raises(jq.FormatError, match=f"it holds {name} beside tensors") as caught:
        load_state_dict(*imported, tmp_path / "best.pt")
    with monkeypatch.context() as installed:
        stand_in(installed, name, base=nn.Module)
        weights = taken_out(caught.value, tmp_path, "best.pt")
    loaded = load_state_dict(*imported, weights)
    np.testing.assert_array_equal(loaded.params["fc.weight"], WEIGHTS["fc.weight"].half().float())


# ---------------------------------------------------------------------------------------------------------------------
# Adapters


ADAPTERS = {
    "saved by PEFT": {
        "base_model.model.fc.lora_A.weight": torch.ones(2, 3),
        "base_model.model.fc.lora_B.weight": torch.ones(4, 2),
    },
    "of a PEFT model": {
        **prefixed("base_model.model."),
        "base_model.model.fc.base_layer.weight": WEIGHTS["fc.weight"],
        "base_model.model.fc.lora_A.default.weight": torch.ones(2, 3),
        "base_model.model.fc.lora_B.default.weight": torch.ones(4, 2),
    },
    "of loralib": WEIGHTS | {"fc.lora_A": torch.ones(2, 3), "fc.lora_B": torch.ones(4, 2)},
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_that_are_not_merged_are_refused(imported, name, strict):
    """Leaving them out would be another model, also where keys may be left over."""
    prefix = "" if name == "of loralib" else "base_model.model."
    with pytest.raises(jq.ConversionError, match=r"adapters that are not merged .*fc\.lora_A") as found:
        load_state_dict(*imported, ADAPTERS[name], strict=strict, prefix=prefix)
    assert "merge_and_unload" in lines_of(found.value)[0]


def test_adapters_of_the_model_itself_are_read():
    class Adapted(Net):
        def __init__(self, seed):
            super().__init__(seed)
            self.lora_A, self.lora_B = nn.Linear(3, 2, bias=False), nn.Linear(2, 4, bias=False)

        def forward(self, x):
            return self.head(torch.relu(self.fc(x) + 0.5 * self.lora_B(self.lora_A(x))))

    graph, params = from_torch(Adapted(0).eval(), (X,))
    other = Adapted(3)
    loaded = load_state_dict(graph, params, other.state_dict())
    (found,) = jq.graph.evaluate_float(graph, loaded.params, jnp.asarray(X.numpy()))
    np.testing.assert_allclose(found, other(X).detach().numpy(), rtol=0, atol=1e-6)
