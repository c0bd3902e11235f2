"""Distillation: the losses against torch, and a model in training that comes closer to its teacher by them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support import graphs
from support.small_nets import small_graph, small_net

import jquant as jq
from jquant.training import apply_train_with_taps, distillation_loss, feature_loss, output_loss

LSQ = jq.QConfig({"*": jq.Policy(weight=jq.int4(axis="out", quantizer=jq.lsq), output=jq.int8(quantizer=jq.lsq))})


def logits(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * 3, jnp.float32)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 4, 6)])
def test_the_divergence_and_its_gradient_are_those_of_torch(temperature, shape):
    made, wanted = logits(0, *shape), logits(1, *shape)
    ours, theirs = (torch.tensor(np.asarray(v), dtype=torch.float64) for v in (made, wanted))
    ours.requires_grad_()
    log_p, log_q = (torch.log_softmax(v / temperature, -1) for v in (theirs, ours))
    kl = torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    expected = kl * temperature**2 / np.prod(shape[:-1])
    expected.backward()
    value, gradient = jax.value_and_grad(distillation_loss)(made, wanted, temperature=temperature)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, ours.grad, rtol=1e-4, atol=1e-6)


def test_equal_logits_cost_nothing_and_the_teacher_gets_no_gradient():
    made, wanted = logits(0, 4, 5), logits(1, 4, 5)
    assert float(distillation_loss(made, made)) == 0.0
    for loss in (distillation_loss, output_loss):
        np.testing.assert_array_equal(jax.grad(loss, argnums=1)(made, wanted), jnp.zeros_like(made))


def test_several_outputs_and_features_count_alike_whatever_their_units():
    made, wanted = ({"a": logits(i, 4, 5), "b": logits(i + 2, 2, 3) * 100} for i in (0, 5))
    each = [np.sum(np.square(np.float64(made[k]) - wanted[k])) / np.sum(np.square(np.float64(wanted[k]))) for k in made]
    np.testing.assert_allclose(output_loss(made, wanted), np.mean(each), rtol=1e-5)
    np.testing.assert_allclose(feature_loss({**made, "c": logits(0, 1)}, wanted), np.mean(each), rtol=1e-5)
    losses = [distillation_loss(made[k], wanted[k]) for k in made]
    np.testing.assert_allclose(distillation_loss(made, wanted), np.mean(losses), rtol=1e-6)


def test_features_by_name_are_the_values_of_training():
    model, x = small_net(LSQ)
    outputs, stats, values = apply_train_with_taps(model, x, taps="*sigmoid*")
    plain, plain_stats = jq.apply_train(model, x)
    np.testing.assert_array_equal(outputs, plain)
    assert sorted(stats) == sorted(plain_stats)
    assert len(values) == 1
    _, all_values = jq.apply_with_taps(model, x)
    for name, value in values.items():
        np.testing.assert_allclose(value, all_values[name], rtol=1e-6, atol=1e-6)
    graph, params = small_graph()
    live = jq.prepare(graph, params, LSQ, target=jq.targets.NASH_E, batch_norm="live")
    live = jq.calibrate(live, [x])
    _, moved, values = apply_train_with_taps(live, x, taps="*conv*")
    assert moved
    assert values
    assert apply_train_with_taps(live, x, taps=None)[2].keys() == set(live.plan.graph.outputs)


@pytest.mark.parametrize("features", [False, True])
def test_training_on_it_brings_a_model_closer_to_its_teacher(features):
    import optax

    model, _ = small_net(LSQ)
    x = graphs.images(3, small_graph()[0], batch=32)
    teacher = model
    wanted, inside = jq.apply_with_taps(teacher, x, mode="float", taps="*conv*" if features else None)
    inside = inside if features else {}

    def loss(trainable):
        outputs, _, values = apply_train_with_taps(trainable, x)
        hints = feature_loss(values, inside) if features else 0.0
        return distillation_loss(outputs, wanted) + output_loss(outputs, wanted) + hints

    tx = optax.adam(1e-3)
    step = jax.jit(lambda m, s: _step(tx, loss, m, s))
    state, before = tx.init(model), float(loss(model))
    for _ in range(40):
        model, state = step(model, state)
    assert float(loss(model)) < 0.95 * before
    got, want = np.float64(jq.apply(model, x)), np.float64(wanted)
    start = np.float64(jq.apply(teacher, x))
    assert np.sum((got - want) ** 2) < 0.9 * np.sum((start - want) ** 2)


def _step(tx, loss, model, state):
    import optax

    with jax.numpy_dtype_promotion("standard"):  # optax mixes integer counts with floats
        by, state = tx.update(jax.grad(loss)(model), state)
        return optax.apply_updates(model, by), state


def test_it_is_a_loss_for_make_step():
    model, x = small_net(LSQ)
    wanted = jq.apply(model, x, mode="float")
    step = jq.training.make_step(lambda outputs, batch: distillation_loss(outputs, batch[1]))
    import optax

    state = jq.TrainState.create(model, tx=optax.sgd(1e-3))
    _, metrics = step(state, (x, wanted))
    np.testing.assert_allclose(metrics["loss"], distillation_loss(jq.apply_train(model, x)[0], wanted), rtol=1e-4)


def test_refuses():
    with pytest.raises(jq.InputError, match=r"outputs of shapes \[\(2, 3\)\] against a teacher's of shapes \[\(3, 2\)"):
        distillation_loss(logits(0, 2, 3), logits(0, 3, 2))
    with pytest.raises(jq.InputError, match="against a teacher's"):
        output_loss([], [])
    with pytest.raises(jq.InputError, match="temperature must be positive, not 0"):
        distillation_loss(logits(0, 2, 3), logits(1, 2, 3), temperature=0)
    with pytest.raises(jq.InputError, match="a single number"):
        distillation_loss(jnp.float32(0.0), jnp.float32(1.0))
    with pytest.raises(jq.InputError, match=r"no value 'conv'.*did you mean 'conv1'"):
        feature_loss({"conv1": logits(0, 2)}, {"conv": logits(0, 2)})
