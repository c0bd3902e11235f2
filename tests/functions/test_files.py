"""`jq.functions.save` and `load`: a run that goes on does not calibrate again, and only with the same function."""

import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from support import jax_nets
from support.mutants import in_json
from support.sealed import arrays_of, from_parts, read_parts, with_arrays

import jquant as jq

MIN_MAX = {"observer": jq.observers.min_max()}
QCONFIG = jq.QConfig(
    {
        "*": jq.Policy(weight=jq.int8(axis="out", quantizer=jq.lsq), output=jq.int8(**MIN_MAX)),
        "head": jq.Policy(weight=jq.int4(axis="out")),
    }
)


@pytest.fixture(autouse=True)
def _flax_promotes_dtypes() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):
        yield


class Linen(nn.Module):
    features: int = 4
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = nn.Conv(self.features, (3, 3), use_bias=False, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=self.momentum, name="bn")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


X = jax_nets.images(4, 6, 6, 3)
OWN = jax_nets.filled(jax.eval_shape(Linen().init, jax.random.key(0), X))


def fn(params: Any, x: Any, batch_stats: Any = OWN["batch_stats"]) -> Any:
    return Linen().apply({"params": params, "batch_stats": batch_stats}, x)


def live() -> tuple[Any, Any]:
    return jq.quantize(fn, OWN["params"], QCONFIG, [X], batch_norm="live", batch_stats=OWN["batch_stats"], momentum=0.9)


def step(qfn: Any, variables: Any) -> Any:
    """One step of training by hand: everything that is trained moves."""

    def loss(trained: Any) -> tuple[jax.Array, Any]:
        outputs, moved = qfn.train({**variables, **trained}, X)
        return (outputs**2).mean(), moved

    trained = {name: variables[name] for name in ("params", "qparams")}
    grads, moved = jax.grad(loss, has_aux=True)(trained)
    return qfn.update({**variables, **jax.tree.map(lambda v, g: v - 0.01 * g, trained, grads)}, moved)


def same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x).view(np.uint32), np.asarray(y).view(np.uint32))


def test_training_goes_on_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qfn, variables = live()
    variables = step(qfn, variables)
    jq.functions.save(tmp_path / "net.jqf", qfn, variables)
    monkeypatch.setattr("jquant.functions.quantized.calibrate", None)
    shapes = jax.eval_shape(lambda: OWN)  # the form alone: no number of it is read
    again, found = jq.functions.load(
        tmp_path / "net.jqf", fn, shapes["params"], X[:1], batch_stats=shapes["batch_stats"], target="nash-e"
    )
    same(found, variables)
    assert again.plan == qfn.plan
    same(again(found, X), qfn(variables, X))
    same(step(again, found), step(qfn, variables))
    same(again.fake_quantized(found), qfn.fake_quantized(variables))
    np.testing.assert_array_equal(jq.run(again.lower(found), X), jq.run(qfn.lower(variables), X))


def test_another_process_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    """The code of the function is all that the other process has, beside the file."""
    code = tmp_path / "net.py"
    code.write_text(
        "import sys, jax, jax.numpy as jnp, numpy as np, jquant as jq\n"
        "def fn(params, x):\n"
        "    return jax.nn.relu(x @ params['a']['kernel']) @ params['b']['kernel']\n"
        "params = {'a': {'kernel': jnp.zeros((3, 5))}, 'b': {'kernel': jnp.zeros((5, 2))}}\n"
        "x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)\n"
        "if __name__ == '__main__':\n"
        "    qfn, variables = jq.functions.load(sys.argv[1], fn, params, x)\n"
        "    np.save(sys.argv[2], qfn(variables, x))\n"
    )
    space: dict[str, Any] = {"__name__": "net"}
    exec(code.read_text(), space)
    params = jax.tree.map(lambda v: jax_nets.images(*v.shape, seed=v.size), space["params"])
    qfn, variables = jq.quantize(space["fn"], params, jq.QConfig(jq.templates.int8_default()), [space["x"]])
    jq.functions.save(tmp_path / "net.jqf", qfn, variables)
    subprocess.run([sys.executable, code, tmp_path / "net.jqf", tmp_path / "out.npy"], check=True, timeout=240)
    same(np.load(tmp_path / "out.npy"), qfn(variables, space["x"]))


def test_a_module_of_nnx_with_inputs_in_a_tree(tmp_path: Path) -> None:
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    definition, params = nnx.split(model, nnx.Param)

    def of_tree(params: Any, inputs: Any) -> Any:
        return {"y": nnx.merge(definition, params)(inputs["a"]), "z": inputs["b"] * 2.0}

    inputs = {"a": jax_nets.images(4, 3), "b": jax_nets.images(4, 2)}
    qfn, variables = jq.quantize(of_tree, params, jq.QConfig(jq.templates.int8_default()), [(inputs,)])
    jq.functions.save(tmp_path / "net.jqf", qfn, variables, metadata={"run": "7"})
    again, found = jq.functions.load(tmp_path / "net.jqf", of_tree, params, inputs)
    same(jax.tree.leaves(found), jax.tree.leaves(variables))
    same(again(found, inputs), qfn(variables, inputs))


def test_batch_norms_that_were_frozen_on_the_way_stay_so(tmp_path: Path) -> None:
    qfn, variables = live()
    late = replace(qfn, plan=jq.training.set_batch_statistics(qfn.model(variables), "running").plan)
    jq.functions.save(tmp_path / "net.jqf", late, variables)
    again, found = jq.functions.load(tmp_path / "net.jqf", fn, OWN["params"], X, batch_stats=OWN["batch_stats"])
    assert again.plan == late.plan != qfn.plan
    same(again.train(found, X)[1], variables["batch_stats"])


def test_a_quantizer_of_ones_own(tmp_path: Path) -> None:
    own = jq.quantizers.Quantizer(apply=jq.lsq.apply, init=jq.lsq.init, scale=jq.lsq.scale, source="mine:lsq")
    qconfig = jq.QConfig({"*": jq.Policy(weight=jq.int8(quantizer=own), output=jq.int8(**MIN_MAX))})
    dense, params, x = lambda p, x: x @ p["w"], {"w": jax_nets.images(3, 4)}, jax_nets.images(2, 3)
    qfn, variables = jq.quantize(dense, params, qconfig, [x])
    jq.functions.save(tmp_path / "net.jqf", qfn, variables)
    with pytest.raises(jq.JQuantError, match="mine:lsq"):
        jq.functions.load(tmp_path / "net.jqf", dense, params, x)
    again, found = jq.functions.load(tmp_path / "net.jqf", dense, params, x, own=[own])
    same(again(found, x), qfn(variables, x))


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "net.jqf"
    with jax.numpy_dtype_promotion("standard"):
        qfn, variables = jq.quantize(fn, OWN["params"], QCONFIG, [X])
        jq.functions.save(path, qfn, variables)
    return path


def tanh(params: Any, x: Any) -> Any:
    return jnp.tanh(fn(params, x))


def other_epsilon(params: Any, x: Any) -> Any:
    own = {"params": {"conv": params["conv"], "head": params["head"]}, "batch_stats": {}}
    x = nn.Conv(4, (3, 3), use_bias=False).apply({"params": own["params"]["conv"]}, x)
    norm = nn.BatchNorm(use_running_average=True, epsilon=1e-3)
    x = nn.relu(norm.apply({"params": params["bn"], "batch_stats": OWN["batch_stats"]["bn"]}, x))
    return nn.Dense(3).apply({"params": params["head"]}, x.mean((1, 2)))


def fresh_statistics(params: Any, x: Any) -> Any:
    return fn(params, x, batch_stats=jax.tree.map(lambda v: v * 0.5, OWN["batch_stats"]))


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (tanh, "node 'tanh' was saved as none, the function has .*Tanh"),
        (other_epsilon, "node 'bn' was saved as .*epsilon=1e-05.*the function has .*epsilon=0.001"),
        (fresh_statistics, "parameter 'bn.running_mean' is made of another constant .*running statistics"),
    ],
)
def test_another_function_is_refused_with_the_first_difference(saved: Path, other: Any, says: str) -> None:
    with pytest.raises(jq.FormatError, match=f"belongs to another function: {says}"):
        jq.functions.load(saved, other, OWN["params"], X)


def test_other_elements_of_one_leaf_are_refused(tmp_path: Path) -> None:
    params, x = {"w": jax_nets.images(6, 4)}, jax_nets.images(2, 3)
    qconfig = jq.QConfig(jq.templates.int8_default())
    qfn, variables = jq.quantize(lambda p, x: x @ p["w"][:3], params, qconfig, [x])
    jq.functions.save(tmp_path / "net.jqf", qfn, variables)
    for other, says in (
        (lambda p, x: x @ p["w"][3:], "parameter 'w' is made of other elements of its leaf"),
        (lambda p, x: x @ (2.0 * p["w"][:3]), "node|parameter"),
    ):
        with pytest.raises(jq.FormatError, match=says):
            jq.functions.load(tmp_path / "net.jqf", other, params, x)


def test_other_params_shapes_and_marches_are_refused(saved: Path, tmp_path: Path) -> None:
    wide = jax.eval_shape(Linen(features=5).init, jax.random.key(0), X)["params"]
    with pytest.raises(jq.FormatError, match=r"leaf 'bn.bias' was saved as float32\[4\], and is float32\[5\] in"):
        jq.functions.load(saved, fn, wide, X)
    with pytest.raises(jq.FormatError, match="leaf 'more' of the params is not in the file"):
        jq.functions.load(saved, fn, {**OWN["params"], "more": jnp.zeros(2)}, X)
    with pytest.raises(jq.FormatError, match=r"leaf 'head\.bias' of the params is only in the file"):
        jq.functions.load(saved, fn, {**OWN["params"], "head": {"kernel": OWN["params"]["head"]["kernel"]}}, X)
    with pytest.raises(jq.FormatError, match="another function: input 'x' was saved as"):
        jq.functions.load(saved, fn, OWN["params"], jax_nets.images(4, 8, 8, 3))
    with pytest.raises(jq.FormatError, match=r"quantized for nash-e.*, not for nash-p"):
        jq.functions.load(saved, fn, OWN["params"], X, target="nash-p")
    with pytest.raises(jq.FormatError, match=r"leaf 'bn\.mean' of the params is not in the file"):
        jq.functions.load(saved, fn, OWN["params"], X, batch_stats=OWN["batch_stats"])
    with pytest.raises(FileNotFoundError, match="no function at"):
        jq.functions.load(tmp_path / "no.jqf", fn, OWN["params"], X)


def test_damage_is_found_wherever_it_is(saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    for where in [*range(0, len(content), max(1, len(content) // 25)), len(content) - 1]:
        damaged = bytearray(content)
        damaged[where] ^= 1
        (tmp_path / "net.jqf").write_bytes(damaged)
        with pytest.raises(jq.FormatError, match=r"net\.jqf: "):
            jq.functions.load(tmp_path / "net.jqf", fn, OWN["params"], X)
    (tmp_path / "net.jqf").write_bytes(content[: len(content) // 2])
    with pytest.raises(jq.FormatError, match="its content differs from its digest"):
        jq.functions.load(tmp_path / "net.jqf", fn, OWN["params"], X)


def dense(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["w"] + params["b"])


def test_a_file_that_was_changed_on_purpose_is_refused_or_means_the_same(tmp_path: Path) -> None:
    """The digest fits. What is read all the same has the plan of the function that was passed."""
    params, x = {"w": jax_nets.images(3, 4), "b": jax_nets.images(4)}, jax_nets.images(2, 3)
    qfn, variables = jq.quantize(dense, params, jq.QConfig(jq.templates.int8_default()), [x])
    jq.functions.save(tmp_path / "net.jqf", qfn, variables)
    header, data = read_parts((tmp_path / "net.jqf").read_bytes())
    static, rng = header["__metadata__"]["function"].encode(), random.Random(0)
    refused = []
    for _ in range(120):
        changed = in_json(static, rng).decode("utf-8", "surrogateescape")
        other = {**header, "__metadata__": {**header["__metadata__"], "function": changed}}
        (tmp_path / "other.jqf").write_bytes(from_parts(other, data))
        try:
            again, found = jq.functions.load(tmp_path / "other.jqf", dense, params, x)
        except jq.FormatError as error:
            refused.append(str(error))
        else:
            assert again.plan == qfn.plan
            same(found, variables)
    assert len(refused) > 60
    assert all("other.jqf" in message and len(message) < 2000 for message in refused)


def test_arrays_that_were_changed_on_purpose_are_refused(saved: Path, tmp_path: Path) -> None:
    def load(arrays: Any) -> Any:
        (tmp_path / "other.jqf").write_bytes(with_arrays(saved.read_bytes(), arrays))
        return jq.functions.load(tmp_path / "other.jqf", fn, OWN["params"], X)

    arrays = arrays_of(saved.read_bytes())
    load(arrays)
    for name, other, says in (
        ("leaf:conv.kernel", np.float32([1.0]), r"saved as float32\[1\]"),
        ("scale:x", np.float32(np.nan), "other.jqf: .*'x'"),
        ("scale:x", np.int32(1), "other.jqf: .*'x'"),
        ("scale:y", np.float32(1.0), "other.jqf: .*'y'"),
        ("constant:y", np.float32(1.0), "unexpected array 'constant:y'"),
    ):
        with pytest.raises(jq.FormatError, match=says):
            load({**arrays, name: np.asarray(other)})
    for name, says in (("scale:x", "no scale for 'x'"), ("leaf:head.bias", "array 'leaf:head.bias' is not there")):
        with pytest.raises(jq.FormatError, match=says):
            load({key: array for key, array in arrays.items() if key != name})


def test_files_of_other_kinds_say_what_they_are(saved: Path, tmp_path: Path) -> None:
    qfn, variables = jq.functions.load(saved, fn, OWN["params"], X)
    program = qfn.lower(variables)
    jq.save(tmp_path / "net.jq", program)
    with pytest.raises(jq.FormatError, match="no function: the file holds 'program'"):
        jq.functions.load(tmp_path / "net.jq", fn, OWN["params"], X)
    with pytest.raises(jq.FormatError, match="no program: the file holds 'function'"):
        jq.load(saved)
    with pytest.raises(jq.FormatError, match=r"jq\.functions\.save"):
        jq.save(tmp_path / "net.jq", qfn)
    with pytest.raises(jq.InputError, match=r"save writes what jq\.quantize returned, not Program"):
        jq.functions.save(tmp_path / "net.jqf", program, variables)


def test_what_no_file_can_tell_is_refused_when_it_is_saved(saved: Path, tmp_path: Path) -> None:
    qfn, variables = jq.functions.load(saved, fn, OWN["params"], X)
    path = tmp_path / "net.jqf"
    with pytest.raises(jq.InputError, match="variables have 'ema'"):
        jq.functions.save(path, qfn, {**variables, "ema": {}})
    with pytest.raises(jq.FormatError, match="metadata key 'function'"):
        jq.functions.save(path, qfn, variables, metadata={"function": ""})
    wide = {name: jq.int16() if spec and name == "x" else spec for name, spec in qfn.plan.values.items()}
    other = replace(qfn, plan=replace(qfn.plan, values=jq.FrozenMap(wide)))
    with pytest.raises(jq.InputError, match=r"another plan than prepare makes of its qconfig.*value 'x'"):
        jq.functions.save(path, other, variables)
    broken = {**variables, "qparams": {**variables["qparams"], "x": jnp.float32(jnp.nan)}}
    with pytest.raises(jq.CalibrationError, match="'x'"):
        jq.functions.save(path, qfn, broken)
    assert not path.exists()
