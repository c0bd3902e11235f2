"""Rows about torch code: its data, its optimizers, its training branch, its grids."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import jquant as jq
from jquant_converters import from_torch, optimizer_state_from_torch

INT8 = {"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8())}
IMAGE = torch.linspace(-1, 1, 4 * 3 * 5 * 5).reshape(4, 3, 5, 5)


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(36, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).flatten(1))


@pytest.fixture(scope="module")
def small() -> tuple[torch.nn.Module, jq.Graph, dict]:
    torch.manual_seed(0)
    model = Small().eval()
    return model, *from_torch(model, IMAGE)


# -- row 13: data as a DataLoader gives them


def test_row_13_a_loader_of_inputs_and_labels(small: tuple) -> None:
    _, graph, params = small
    model = jq.prepare(graph, params, jq.QConfig(INT8), target="S100")
    data = torch.utils.data.TensorDataset(IMAGE, torch.arange(4))
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    with pytest.raises(
        jq.InputError,
        match=r"batch 0: the graph has 1 inputs \(x\), 2 were given; give inputs only.*"
        r"\(x for x, y in loader\)",
    ):
        jq.calibrate(model, loader)
    model = jq.calibrate(model, (x for x, y in loader))
    wanted = jq.calibrate(model, [jnp.asarray(IMAGE[:2].numpy()), jnp.asarray(IMAGE[2:].numpy())])
    jax.tree.map(np.testing.assert_array_equal, model.qparams, wanted.qparams)
    with pytest.raises(jq.InputError, match="give inputs only"):
        jq.apply(model, IMAGE, torch.arange(4))
    program = jq.lower(model)
    array = jnp.asarray(IMAGE.numpy())
    np.testing.assert_array_equal(jq.run(program, IMAGE), jq.run(program, array))
    np.testing.assert_array_equal(jq.apply(model, IMAGE), jq.apply(model, array))
    (y,) = jq.graph.evaluate_float(graph, dict(small[2]), IMAGE)
    np.testing.assert_allclose(y, small[0](IMAGE).detach().numpy(), atol=1e-5)


def test_row_13_tensors_that_cannot_be_read(small: tuple) -> None:
    _, graph, params = small
    with pytest.raises(jq.InputError, match="is float64, expected float32"):
        jq.graph.evaluate_float(graph, params, IMAGE.double())
    with pytest.raises(jq.InputError, match=r"a torch tensor of torch\.bfloat16.*convert it to float32"):
        jq.graph.evaluate_float(graph, params, IMAGE.bfloat16())
    with pytest.raises(jq.InputError, match=r"a torch tensor on meta; give it as tensor\.cpu\(\)"):
        jq.graph.evaluate_float(graph, params, IMAGE.to("meta"))
    with pytest.raises(jq.InputError, match="NaN"):
        jq.graph.evaluate_float(graph, params, IMAGE * float("nan"))


# -- rows 25 and 26: the optimizer that was made before `prepare`


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_row_26_moments_of_a_torch_optimizer_move(small: tuple, kind: str) -> None:
    """The momentum of torch is that of optax on the same gradients; behind a folded batch norm it is divided."""
    model, graph, params = small
    parameters = list(model.named_parameters())
    optimizer = (
        torch.optim.SGD([p for _, p in parameters], lr=0.0, momentum=0.9)
        if kind == "sgd"
        else torch.optim.AdamW([p for _, p in parameters], lr=0.0)
    )
    gradients = []
    for i in range(3):
        optimizer.zero_grad()
        (model(IMAGE + i) ** 2).mean().backward()
        gradients.append({n: jnp.asarray(p.grad.numpy().copy()) for n, p in parameters})
        optimizer.step()
    names = [n for n, _ in parameters]
    moments = optimizer_state_from_torch(optimizer.state_dict(), names, graph)
    tx = optax.trace(0.9) if kind == "sgd" else optax.scale_by_adam()
    state = tx.init(gradients[0])
    for gradient in gradients:
        with jax.numpy_dtype_promotion("standard"):  # optax mixes counts with floats
            _, state = tx.update(gradient, state)
    (found,) = moments
    assert type(found) is type(state)
    for field, tree in zip(state._fields, state, strict=True):
        if isinstance(tree, dict):
            for name in names:
                np.testing.assert_allclose(getattr(found, field)[name], tree[name], rtol=1e-5, atol=1e-9)
        else:
            assert int(getattr(found, field)) == int(tree)
    model = jq.prepare(graph, params, jq.QConfig(INT8), target="S100")
    model = jq.calibrate(model, [IMAGE])
    chain = jq.training.make_optimizer(model, optimizer="sgd" if kind == "sgd" else "adamw", learning_rate=0.1)
    fresh = jq.TrainState.create(model, tx=chain)
    moved = jq.training.migrate_optimizer_state(graph, params, moments, tx=chain, trainable=fresh.trainable)
    assert jq.TrainState.create(model, tx=chain, opt_state=moved).step == 0
    first = "trace" if kind == "sgd" else "mu"
    parts = [p for p in jax.tree.leaves(moved, is_leaf=lambda p: hasattr(p, first)) if hasattr(p, first)]
    head = [
        t.params["head.weight"] for t in (getattr(p, first) for p in parts) if hasattr(t.params["head.weight"], "shape")
    ]
    np.testing.assert_array_equal(head[0], getattr(found, first)["head.weight"])


def test_row_25_what_is_no_optimizer_state(small: tuple) -> None:
    model, graph, _ = small
    names = [n for n, _ in model.named_parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(jq.ConversionError, match="no moments"):
        optimizer_state_from_torch(optimizer.state_dict(), names, graph)
    with pytest.raises(jq.ConversionError, match="6 parameters, and 5 names"):
        optimizer_state_from_torch(optimizer.state_dict(), names[1:], graph)
    with pytest.raises(jq.ConversionError, match="no state dict of a torch optimizer"):
        optimizer_state_from_torch(model.state_dict(), names, graph)


# -- row 47: the code that is exported is not the code that is trained


class Branches(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop = torch.nn.Conv2d(3, 4, 3), torch.nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.drop(self.conv(x))
        if self.training:
            return torch.sigmoid(y)
        return torch.relu(y)


class Functional(torch.nn.Module):
    """What many models do: the flag goes to a function."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.conv, self.rate = torch.nn.Conv2d(3, 4, 3), rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(self.conv(x), self.rate, self.training) + 0.0


def operators(graph: jq.Graph) -> list[str]:
    return [type(node.op).__name__ for node in graph.nodes]


def test_row_47_the_branch_that_is_imported_is_named() -> None:
    model = Branches()
    with pytest.warns(
        UserWarning, match=r"asks self\.training at .*test_torch\.py:\d+: it does something else.*eval"
    ) as seen:
        graph, _ = from_torch(model, IMAGE)
    assert seen[0].filename == __file__
    assert "Relu" in operators(graph)
    assert all(m.training for m in model.modules())  # as it was
    assert "training" in vars(model)
    assert type(model) is Branches
    trained, _ = from_torch(model, IMAGE, train_branch=True)
    assert "Sigmoid" in operators(trained)
    deployed, _ = from_torch(model.eval(), IMAGE)  # no warning: it is what was asked for
    assert deployed == graph
    found = jq.analysis.graph_difference(trained, deployed)
    assert "the first node that differs" in found[0].message
    assert "Sigmoid" in found[0].message
    assert jq.analysis.graph_difference(graph, deployed) == []


def test_row_47_a_branch_that_changes_nothing_is_no_news() -> None:
    graph, _ = from_torch(Functional(0.5), IMAGE)
    assert "Conv" in operators(graph)
    frozen = Branches()
    frozen.training = False  # this module alone is in eval mode, and it alone asks
    assert "Relu" in operators(from_torch(frozen, IMAGE)[0])


def test_row_47_the_training_branch_computes_what_torch_computes() -> None:
    model = Branches()
    graph, params = from_torch(model, IMAGE, train_branch=True)
    model.drop.eval()
    (y,) = jq.graph.evaluate_float(graph, params, IMAGE)
    np.testing.assert_allclose(y, model(IMAGE).detach().numpy(), atol=1e-6)


def test_row_28_dropout_with_the_flag_of_the_module_is_active_in_training() -> None:
    """No flag decides: the operator is there in both branches, and the key of `apply_train` makes it active."""
    graph, params = from_torch(Functional(0.5), IMAGE)
    assert "Dropout" in operators(graph)
    assert from_torch(Functional(0.5), IMAGE, train_branch=True)[0] == graph
    model = jq.prepare(graph, params, jq.QConfig(INT8), target="S100")
    model = jq.calibrate(model, [IMAGE])
    quiet, _ = jq.apply_train(model, IMAGE)
    np.testing.assert_array_equal(quiet, jq.apply(model, IMAGE))
    dropped, _ = jq.apply_train(model, IMAGE, rngs=jax.random.key(0))
    share = float(jnp.mean(dropped == 0)) - float(jnp.mean(quiet == 0))
    assert 0.3 < share < 0.7  # half of 144 values, within 4 standard deviations
