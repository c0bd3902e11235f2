"""What `from_torch` takes besides modules, and models written for the vendors' training tools."""

import json
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import jquant as jq
from jquant.types import ConversionError, FormatError, LoweringError, QConfigError
from jquant_converters import from_torch

BATCH = torch.export.Dim("batch")
X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(inner, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()


def exported(module, *inputs):
    return torch.export.export(module, inputs, dynamic_shapes=tuple({0: BATCH} for _ in inputs))


@pytest.fixture(scope="module")
def pt2(tmp_path_factory):
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    torch.export.save(exported(net(), X), path)
    return path


def test_a_program_and_its_file_give_the_graph_of_the_module(pt2):
    graph, params = from_torch(net(), (X,))
    for source in (exported(net(), X), pt2, str(pt2)):
        again, params_again = from_torch(source)
        assert [(n.name, n.op) for n in again.nodes] == [(n.name, n.op) for n in graph.nodes]
        assert params_again.keys() == params.keys()
        for key, value in params.items():
            np.testing.assert_array_equal(np.asarray(params_again[key]), np.asarray(value))
        assert again.inputs[0].shape == (None, 3, 6, 6)


def test_programs_that_do_not_fit():
    program = exported(net(), X)
    with pytest.raises(ConversionError, match="has its own example inputs"):
        from_torch(program, (X,))
    with pytest.raises(ConversionError, match="of unknown size; only axis 0"):
        from_torch(program, dynamic_batch=False)
    fixed = torch.export.export(net(), (X,))
    with pytest.raises(ConversionError, match=r"cannot stay symbolic: torch\.export fixed it to 2"):
        from_torch(fixed)
    assert from_torch(fixed, dynamic_batch=False)[0].inputs[0].shape == (2, 3, 6, 6)
    height = torch.export.Dim("height", min=2)
    wide = torch.export.export(nn.Conv2d(3, 4, 1), (X,), dynamic_shapes=({0: BATCH, 2: height},))
    with pytest.raises(ConversionError, match=r"axes \[0, 2\] of unknown size"):
        from_torch(wide)
    with pytest.raises(ConversionError, match="needs example_inputs"):
        from_torch(net())
    with pytest.raises(ConversionError, match=r"path of a \.pt2 file, not int"):
        from_torch(3)


# ---------------------------------------------------------------------------------------------------------------------
# Files that would do harm


def rewritten(path, target, change):
    """A copy of an archive with entries changed: `change(name, data)` returns the data, None to drop it, or a pair."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as copy:
        for entry in source.infolist():
            found = change(entry.filename, source.read(entry))
            if found is not None:
                name, data = found if isinstance(found, tuple) else (entry.filename, found)
                copy.writestr(name, data)
    return target


def in_json(suffix, edit):
    def change(name, data):
        if not name.endswith(suffix):
            return data
        content = json.loads(data)
        edit(content)
        return json.dumps(content).encode()

    return change


def pickled(config):
    for entry in config["config"].values():
        entry["use_pickle"] = True


def huge(config):
    for entry in config["config"].values():
        entry["tensor_meta"]["sizes"] = [{"as_int": 2**40}]


def expression(model):
    """Puts a call into the place of a size."""
    text = "__import__('os').system('touch /tmp/jquant_was_here')"
    for node in model["graph_module"]["graph"]["tensor_values"].values():
        node["sizes"][:1] = [{"as_expr": {"expr_str": text, "hint": {"as_int": 2}}}]


def operator(model):
    model["graph_module"]["graph"]["nodes"][0]["target"] = "torch.os.system"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (in_json("model_weights_config.json", pickled), "is pickled"),
        (in_json("model_weights_config.json", huge), "not a readable exported program|claims"),
        (in_json("models/model.json", expression), "no arithmetic on sizes"),
        (in_json("models/model.json", operator), "no operator of a model"),
        (lambda name, data: ("net/data/aotinductor/m/x.so" if name.endswith("byteorder") else name, data), "no place"),
        (lambda name, data: ("../../x" if name.endswith("byteorder") else name, data), "leads out"),
        (lambda name, data: None if name.endswith("model.json") else data, "0 programs"),
        (lambda name, data: b"\x80\x04cos\nsystem\n." if "sample_inputs" in name else data, "no.*plain tensors"),
    ],
)
def test_a_file_that_would_run_code_or_claims_too_much_is_refused(pt2, tmp_path, change, reason):
    with pytest.raises(FormatError, match=reason):
        from_torch(rewritten(pt2, tmp_path / "bad.pt2", change))


def test_other_files(pt2, tmp_path):
    with pytest.raises(FileNotFoundError):
        from_torch(tmp_path / "none.pt2")
    (tmp_path / "text.pt2").write_text("hello")
    with pytest.raises(FormatError, match="not an archive"):
        from_torch(tmp_path / "text.pt2")
    with zipfile.ZipFile(tmp_path / "bomb.pt2", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("a/data/weights/weight_0", bytes(1 << 20))
    with pytest.raises(FormatError, match="is compressed"):
        from_torch(tmp_path / "bomb.pt2")


# ---------------------------------------------------------------------------------------------------------------------
# Stubs and float functionals


class QuantStub(nn.Module):
    """Of no package that jquant knows: the name counts."""

    def forward(self, x):
        return x


class DeQuantStub(QuantStub):
    pass


class FloatFunctional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.activation_post_process = nn.Identity()

    def forward(self, x):
        raise RuntimeError("call a method")

    def add(self, x, y):
        return self.activation_post_process(torch.add(x, y))

    def add_relu(self, x, y):
        return self.activation_post_process(torch.relu(torch.add(x, y)))


class Region(nn.Module):
    """Float before and behind a quantized middle, with a constant on each side."""

    def __init__(self, head=True) -> None:
        super().__init__()
        self.before, self.quant, self.conv = nn.Conv2d(3, 3, 1), QuantStub(), nn.Conv2d(3, 4, 3)
        self.dequant, self.fc = DeQuantStub(), nn.Linear(4, 5)
        self.shift, self.offset = nn.Parameter(torch.randn(4, 1, 1)), nn.Parameter(torch.randn(5))
        self.head = head

    def forward(self, x):
        x = self.before(x) if self.head else x
        x = torch.relu(self.conv(self.quant(x)) + self.shift)
        x = self.dequant(x.mean((2, 3)))
        return self.fc(x) * self.offset if self.head else x


QCONFIG = jq.QConfig({"*": jq.Policy(output=jq.int8(), weight=jq.int8(axis="out"))})


def prepared(module, qconfig=QCONFIG, **options):
    graph, params = from_torch(module, (X,))
    return graph, jq.prepare(graph, params, qconfig, target=jq.targets.NASH_E, **options)


def test_nothing_outside_of_the_stubs_is_quantized():
    graph, model = prepared(Region().eval())
    plan = model.plan
    assert [type(n.op).__name__ for n in graph.nodes if "quant" in n.name] == ["QuantStub", "DeQuantStub"]
    quantized = {name for name, spec in plan.values.items() if spec is not None}
    assert {"quant", "conv", "shift", "add", "mean"} <= quantized
    assert not {"x", "before", "fc", "mul", "offset"} & quantized
    assert set(plan.weights) == {"conv.weight"}
    explained = jq.explain(model)  # of the input and two layers; the product is part of one
    assert explained.count("outside of the region that QuantStub and DeQuantStub mark") == 3
    with torch.no_grad():
        expected = Region().eval()
        module = Region().eval()
        module.load_state_dict(expected.state_dict())
    model = jq.calibrate(model, [jnp.asarray(X.numpy())])
    assert {"before", "fc", "x"}.isdisjoint(model.qparams)
    with pytest.raises(LoweringError, match="float"):  # never silently
        jq.lower(model)


def test_stubs_at_the_ends_leave_a_program_and_the_input_quantized():
    _, model = prepared(Region(head=False).eval())
    assert model.plan.values["x"].dtype == "int8"
    assert model.plan.renamed["quant"] == "x"
    model = jq.calibrate(model, [jnp.asarray(X.numpy())])
    program = jq.lower(model)
    assert jq.run(program, jnp.asarray(X.numpy())).shape == (2, 4)


def test_a_rule_for_the_stub_is_one_for_the_input_and_rules_outside_are_refused_by_name():
    rules = {"*": jq.Policy(output=jq.int8(), weight=jq.int8())}
    _, model = prepared(Region(head=False).eval(), jq.QConfig(rules | {"quant": jq.Policy(output=jq.int16())}))
    assert model.plan.values["x"].dtype == "int16"
    qconfig = jq.QConfig(rules | {"fc": jq.Policy(output=jq.int8())})
    with pytest.raises(QConfigError, match=r"outside of the region.*: fc"):
        prepared(Region().eval(), qconfig)
    _, model = prepared(Region().eval(), qconfig, strict=False)
    assert model.plan.values["fc"] is None


class Functionals(nn.Module):
    def __init__(self, reuse) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.skip, self.last = FloatFunctional(), FloatFunctional()
        self.last = self.skip if reuse else self.last

    def forward(self, x):
        y = self.skip.add(self.a(x), self.b(x))
        return self.last.add_relu(self.c(y), y)


def test_float_functionals_give_their_names_and_stay_as_they_were():
    module = Functionals(reuse=False).eval()
    graph, _ = from_torch(module, (X,))
    assert [n.name for n in graph.nodes] == ["a", "b", "skip", "c", "last.add", "last"]
    assert type(module.skip) is FloatFunctional
    assert type(torch.ao.nn.quantized.FloatFunctional()).__name__ == "FloatFunctional"  # torch's is found as well


def test_a_float_functional_at_two_places_is_reported():
    with pytest.warns(UserWarning, match=r"'skip' is called at 2 places; each has a scale of its own here, as"):
        graph, _ = from_torch(Functionals(reuse=True).eval(), (X,))
    assert [n.name for n in graph.nodes] == ["a", "b", "skip", "c", "last.add", "last"]

    class Twice(Functionals):
        def forward(self, x):
            return self.skip.add(self.skip.add(self.a(x), self.b(x)), x)

    with pytest.warns(UserWarning, match="here, as 'skip', 'skip_1'"):
        from_torch(Twice(reuse=False).eval(), (X,))


def test_the_module_is_as_before_when_the_export_fails():
    class Broken(Functionals):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    module = Broken(reuse=False).eval()
    with pytest.raises(ConversionError, match=r"at .*test_torch_in.py:\d+ `return x if x.sum\(\) > 0"):
        from_torch(module, (X,))
    assert type(module.skip) is FloatFunctional
