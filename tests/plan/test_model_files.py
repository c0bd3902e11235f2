"""`jq.plan.save` and `load`: a model goes on in another process where it was, with the same bits."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant import ops

X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2, 6, 6)), jnp.float32)
SPECS = {"weight": jq.int8(axis="out", quantizer=jq.lsq), "output": jq.int16(observer=jq.observers.min_max())}


def network() -> tuple[jq.Graph, dict[str, jax.Array]]:
    """A convolution with batch norm, and a table."""
    rng = np.random.default_rng(1)
    names = {"c.w": (3, 2, 3, 3), "n.mean": (3,), "n.var": (3,), "n.scale": (3,), "n.bias": (3,), "f.w": (4, 48)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in names.items()}
    params["n.var"] = jnp.abs(params["n.var"]) + 0.5
    norm = {"running_mean": "n.mean", "running_var": "n.var", "weight": "n.scale", "bias": "n.bias"}
    conv = ops.Conv(strides=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1))
    nodes = (
        jq.Node("c", conv, ("x",), jq.FrozenMap({"weight": "c.w"})),
        jq.Node("n", ops.BatchNorm(), ("c",), jq.FrozenMap(norm)),
        jq.Node("s", ops.Sigmoid(), ("n",)),
        jq.Node("v", ops.Flatten(), ("s",)),
        jq.Node("f", ops.Linear(), ("v",), jq.FrozenMap({"weight": "f.w"})),
    )
    return jq.Graph((jq.Input("x", (None, 2, 6, 6)),), nodes, ("f",)), params


def prepared(batch_norm: str = "fold", **specs: Any) -> jq.Model:
    qconfig = jq.QConfig({"*": jq.Policy(**{**SPECS, **specs})})
    return jq.prepare(*network(), qconfig, target=jq.targets.NASH_M, batch_norm=batch_norm)


def same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, strict=True)


@pytest.mark.parametrize("batch_norm", ["fold", "live", "frozen", "reverse_fold"])
def test_a_model_is_the_one_that_was_saved(tmp_path: Path, batch_norm: str) -> None:
    """The same tree, so that gradients, optimizers and compiled functions of one take the other."""
    model = jq.calibrate(prepared(batch_norm), [X])
    model = model.replace(params=jax.tree.map(lambda v: v * 1.25, model.params))  # as trained
    jq.plan.save(tmp_path / "net.jqm", model)
    again = jq.plan.load(tmp_path / "net.jqm", target="nash-m")
    same(again, model)
    assert str(jq.explain(again)) == str(jq.explain(model))
    same(jq.apply(again, X), jq.apply(model, X))
    same(jq.run(jq.lower(again), X), jq.run(jq.lower(model), X))


def test_a_model_without_scales_is_calibrated_later(tmp_path: Path) -> None:
    jq.plan.save(tmp_path / "net.jqm", prepared())
    again = jq.plan.load(tmp_path / "net.jqm")
    assert again.qparams == {}
    same(jq.calibrate(again, [X]), jq.calibrate(prepared(), [X]))


def test_another_process_reads_it(tmp_path: Path) -> None:
    model = jq.calibrate(prepared(), [X])
    jq.plan.save(tmp_path / "net.jqm", model)
    np.save(tmp_path / "x.npy", X)
    code = "import sys, numpy as np, jquant as jq\nmodel = jq.plan.load(sys.argv[1])\n"
    code += "np.save(sys.argv[3], jq.run(jq.lower(model), np.load(sys.argv[2])))\n"
    files = [tmp_path / name for name in ("net.jqm", "x.npy", "y.npy")]
    subprocess.run([sys.executable, "-c", code, *files], check=True, timeout=240)
    same(np.load(tmp_path / "y.npy"), np.asarray(jq.run(jq.lower(model), X)))


def test_parameters_of_no_node_are_left_out(tmp_path: Path) -> None:
    model = prepared()
    jq.plan.save(tmp_path / "net.jqm", model.replace(params=model.params | {"other": jnp.ones(3)}))
    same(jq.plan.load(tmp_path / "net.jqm"), model)


HALVES = jq.quantizers.Quantizer(apply=jq.lsq.apply, init=jq.lsq.init, scale=jq.lsq.scale, source="mine:halves")


def test_quantizers_of_ones_own_are_handed_to_the_reader(tmp_path: Path) -> None:
    model = jq.calibrate(prepared(weight=jq.int8(axis="out", quantizer=HALVES)), [X])
    jq.plan.save(tmp_path / "net.jqm", model)
    with pytest.raises(jq.FormatError, match="mine:halves"):
        jq.plan.load(tmp_path / "net.jqm")
    same(jq.plan.load(tmp_path / "net.jqm", own=[HALVES]), model)


def test_other_files_and_other_marches_are_refused(tmp_path: Path) -> None:
    model = jq.calibrate(prepared(), [X])
    jq.plan.save(tmp_path / "net.jqm", model, metadata={"run": "7"})
    jq.save(tmp_path / "net.jq", jq.lower(model))
    with pytest.raises(jq.FormatError, match=r"net\.jqm: prepared for nash-m .*, not for nash-e .*; call jq.prepare"):
        jq.plan.load(tmp_path / "net.jqm", target="nash-e")
    with pytest.raises(jq.FormatError, match=r"net\.jq: no model: the file holds 'program'"):
        jq.plan.load(tmp_path / "net.jq")
    with pytest.raises(jq.FormatError, match=r"net\.jqm: no program: the file holds 'model', 'run'"):
        jq.load(tmp_path / "net.jqm")


def test_what_is_no_model_is_not_written(tmp_path: Path) -> None:
    model = jq.calibrate(prepared(), [X])
    path = tmp_path / "net.jqm"
    jq.plan.save(path, model)
    whole = path.read_bytes()
    for wrong, error, said in [
        (jq.lower(model), jq.JQuantError, "a jq.Model is wanted"),
        (model.replace(params={}), jq.GraphError, "parameter 'c.w'"),
        (model.replace(qparams={"x": model.qparams["x"]}), jq.CalibrationError, "no scale for"),
        (model.replace(params=model.params | {"f.w": model.params["f.w"] * jnp.nan}), jq.CalibrationError, "NaN"),
    ]:
        with pytest.raises(error, match=said):
            jq.plan.save(path, wrong)
    with pytest.raises(jq.FormatError, match="the metadata key 'model'"):
        jq.plan.save(path, model, metadata={"model": "{}"})
    assert path.read_bytes() == whole
