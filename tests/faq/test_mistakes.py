"""What is handed over in the wrong form gets an answer that says which form is right."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import jquant as jq
from jquant import analysis, ops
from jquant_converters import from_torch

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 3)).astype(np.float32)
INT8 = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8())})


@pytest.fixture(scope="module")
def net() -> tuple:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Sigmoid(), torch.nn.Linear(5, 2)).eval()
    graph, weights = from_torch(module, torch.tensor(X))
    model = jq.prepare(graph, weights, INT8, target="S100")
    return module, graph, weights, jq.calibrate(model, [torch.tensor(X)])


def test_row_12_a_list_where_the_checklist_takes_the_batch(net: tuple) -> None:
    _, _, _, model = net
    with pytest.raises(jq.InputError, match="input 'input' must be an array, not list: the one batch"):
        analysis.nan_checklist(model, [X])
    assert analysis.nan_checklist(model, torch.tensor(X)) == []


def test_row_13_one_array_where_batches_are_taken(net: tuple) -> None:
    _, _, _, model = net
    with pytest.raises(jq.InputError, match=r"batches is one array of shape \[4, 3\]; give several, such as \[x\]"):
        jq.calibrate(model, X)


def test_row_14_noise_around_a_level_is_flat() -> None:
    drawn = 1 + 0.01 * np.random.default_rng(3).normal(size=(200, 60))
    said = [analysis.judge_losses(losses).level for losses in drawn]
    assert said.count("error") <= 10  # of 200; nearly all of them, where the lowest value was compared
    noise = drawn[0]
    assert "hardly fallen" in analysis.judge_losses(noise).message
    fallen = np.concatenate([np.geomspace(4, 1, 40), noise])
    assert analysis.judge_losses(fallen).message == "the loss is flat: the training has converged"
    again = np.concatenate([np.geomspace(4, 1, 40), noise + 1])
    assert "has risen again" in analysis.judge_losses(again).message
    assert analysis.judge_losses([0.5]).message.startswith("one loss is too few")


def test_row_16_a_loader_of_torch_goes_into_training(net: tuple) -> None:
    _, _, _, model = net
    step = jq.training.make_step(lambda y, batch: ((y - batch[1]) ** 2).mean(), donate=False)
    state = jq.TrainState.create(model, tx=optax.sgd(1e-2))
    arrays = (X, RNG.normal(size=(4, 2)).astype(np.float32))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*map(torch.tensor, arrays)), batch_size=2)
    found, _ = jq.training.fit(step, state, loader)
    want, _ = jq.training.fit(step, state, [tuple(a[i : i + 2] for a in arrays) for i in (0, 2)])
    assert int(found.step) == 2
    for name, value in want.model.params.items():
        np.testing.assert_array_equal(found.model.params[name], value)


def test_row_33_pixels_as_torch_has_them() -> None:
    pixels = RNG.integers(0, 256, (1, 4, 6, 3)).astype(np.uint8)
    images = jq.images
    want = np.asarray(images.rgb_to_real_yuv444(jnp.asarray(pixels, jnp.float32)))
    np.testing.assert_array_equal(images.rgb_to_real_yuv444(torch.tensor(pixels).float()), want)
    turned = torch.tensor(pixels[..., ::-1].copy())
    np.testing.assert_array_equal(images.bgr_to_real_yuv444(turned.float()), want)
    for rgb, bgr in (
        (images.rgb_to_centred_yuv444, images.bgr_to_centred_yuv444),
        (images.rgb_to_nv12_to_centred_yuv444, images.bgr_to_nv12_to_centred_yuv444),
    ):
        np.testing.assert_array_equal(rgb(torch.tensor(pixels)), rgb(jnp.asarray(pixels)))
        np.testing.assert_array_equal(bgr(turned), rgb(jnp.asarray(pixels)))
    with pytest.raises(jq.InputError, match="pass scale=255"):
        images.rgb_to_real_yuv444(torch.tensor(pixels).float() / 255)


def test_row_35_and_47_a_plan_or_a_module_where_the_float_graph_is_taken(net: tuple) -> None:
    module, graph, weights, model = net
    fused = r"a float jq\.Graph is needed, not Plan; and that of a plan is fused already"
    for call in (
        lambda: analysis.check_model(model.plan, model.params, INT8),
        lambda: analysis.auxiliary_branches(model.plan),
        lambda: analysis.graph_difference(graph, model.plan),
        lambda: jq.prepare(model.plan, model.params, INT8, target="S100"),
        lambda: jq.graph.evaluate_float(model.plan, model.params, X),
    ):
        with pytest.raises(jq.GraphError, match=fused):
            call()
    with pytest.raises(jq.GraphError, match=r"not Sequential; make one with jquant_converters\.from_torch"):
        jq.prepare(module, weights, INT8, target="S100")


def test_row_34_a_plan_is_not_run(net: tuple) -> None:
    with pytest.raises(jq.InputError, match=r"a jq\.Program is run, not Model; make one with jq\.lower"):
        jq.run(net[3], X)


def test_row_37_what_is_no_operator(net: tuple) -> None:
    _, _, _, model = net
    program = jq.lower(model)
    for wrong, said in (
        (ops.ArgMax, r"not the class ArgMax; call it: jq\.ops\.ArgMax"),
        ("dequantize", "not 'dequantize'"),
        (ops.DeQuantStub(), r"behind an output of a program goes jq\.ops\.Dequantize"),
    ):
        with pytest.raises(jq.InputError, match=said):
            jq.program.insert_op_behind(program, program.graph.outputs[0], wrong)


def test_row_45_tables_on_tensors_of_torch(net: tuple) -> None:
    _, _, _, model = net
    assert analysis.table_costs(model, torch.tensor(X)) == analysis.table_costs(model, X)


def test_an_example_input_of_numpy(net: tuple) -> None:
    with pytest.raises(
        jq.ConversionError, match=r"example input 0 is a ndarray; give it as torch\.from_numpy\(array\)"
    ):
        from_torch(net[0], X)
