"""`trace` itself: names, the symbolic batch, what it refuses and how, and calls of every kind."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)), jnp.float32)
PARAMS = {"dense": {"kernel": jnp.ones((4, 3)) * 0.5, "bias": jnp.arange(3.0)}}


def dense(params, x):
    return x @ params["dense"]["kernel"] + params["dense"]["bias"]


def names(graph: jq.Graph) -> list[str]:
    return [node.name for node in graph.nodes]


def test_names_are_paths_and_scopes() -> None:
    def fn(params, image):
        with jax.named_scope("model"):
            y = dense(params, image)
            with jax.named_scope("head"):
                return jax.nn.relu(y), jnp.tanh(y)

    graph, params = jq.trace(fn, PARAMS, X)
    assert [i.name for i in graph.inputs] == ["image"]
    assert names(graph) == ["dense", "head.relu", "head.tanh"]  # the scope around everything is left out
    assert set(params) == {"dense.kernel", "dense.bias"}
    np.testing.assert_array_equal(params["dense.kernel"], PARAMS["dense"]["kernel"].T)


def test_inputs_and_outputs_may_be_pytrees() -> None:
    def fn(params, batch, y):
        return {"sum": batch["a"] + y, "a": batch["a"]}

    graph, _ = jq.trace(fn, {}, {"a": X, "b": X}, X)
    assert [i.name for i in graph.inputs] == ["batch.a", "batch.b", "y"]
    assert graph.outputs == ("batch.a", "add")


CALLS = {
    "jit": lambda f: jax.jit(f),
    "jit that has run": lambda f: _run(jax.jit(f)),
    "remat": lambda f: jax.checkpoint(f),
    "custom_jvp": lambda f: _custom_jvp(f),
    "custom_vjp": lambda f: _custom_vjp(f),
    "closure": lambda f: lambda x: f(x),
    "cond": lambda f: lambda x: jax.lax.cond(True, f, jnp.negative, x),
    "switch": lambda f: lambda x: jax.lax.switch(7, [jnp.negative, f], x),
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=1)[0],
    "reverse scan": lambda f: lambda x: jax.lax.scan(lambda c, y: (c, f(y)), 0.0, x[None], reverse=True)[1][0],
    "map": lambda f: lambda x: jax.lax.map(f, x[None])[0],
    "fori_loop": lambda f: lambda x: jax.lax.fori_loop(0, 1, lambda i, c: f(c), x),
    "vmap": lambda f: jax.vmap(f),
    "named_call": lambda f: jax.named_call(f, name="inner"),
}


def _run(f):
    f(X[:, :3])
    return f


def _custom_jvp(f):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: (f(*primals), tangents[0]))
    return g


def _custom_vjp(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda x: (f(x), None), lambda _, t: (t,))
    return g


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_inlined(name: str) -> None:
    inner = CALLS[name](lambda x: jnp.tanh(x) * 2.0)
    graph, params = jq.trace(lambda params, x: inner(dense(params, x)), PARAMS, X)
    kinds = [type(node.op).__name__ for node in graph.nodes if not isinstance(node.op, jq.ops.Reshape)]
    assert sorted(kinds) == ["Linear", "Scale", "Tanh"]
    (found,) = jq.graph.evaluate_float(graph, params, X)
    np.testing.assert_allclose(found, jnp.tanh(dense(PARAMS, X)) * 2.0, rtol=1e-6)


def test_a_carry_of_zeros_costs_nothing() -> None:
    def fn(params, x):
        def step(h, xt):
            h = jnp.tanh(xt @ params["in"] + h @ params["state"])
            return h, h

        return jax.lax.scan(step, jnp.zeros((x.shape[0], 3)), x.swapaxes(0, 1))[1].swapaxes(0, 1)

    params = {"in": jnp.ones((4, 3)) * 0.3, "state": jnp.eye(3)}
    x = jnp.stack([X, X * 0.5, -X], axis=1)
    graph, kept = jq.trace(fn, params, x)
    np.testing.assert_allclose(jq.graph.evaluate_float(graph, kept, x)[0], fn(params, x), atol=1e-6)
    kinds = [type(node.op).__name__ for node in graph.nodes]
    assert kinds.count("Linear") == 5  # none for the state before the first step
    assert set(kinds) == {"Slice", "Reshape", "Linear", "Add", "Tanh", "Stack"}
    assert set(kept) == {"in", "state"}


def test_params_are_folded_differentiably() -> None:
    from jquant.functions.trace.function import read

    def fn(params, x):
        w = params["dense"]["kernel"]
        return x @ (w / jnp.linalg.norm(w, axis=0)) + jnp.exp(params["dense"]["bias"])  # weight norm

    traced = read(fn, PARAMS, (X,), dynamic_batch=True)

    def loss(params):
        return (jq.graph.evaluate_float(traced.graph, traced.graph_params(params), X)[0] ** 2).sum()

    expected = jax.grad(lambda params: (fn(params, X) ** 2).sum())(PARAMS)
    found = jax.jit(jax.grad(loss))(PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


# ---------------------------------------------------------------------------------------------------------------------
# The batch


def test_what_repeats_for_every_example_stays_symbolic() -> None:
    def fn(params, x):
        token = jnp.broadcast_to(params["dense"]["bias"], (x.shape[0], 3))
        return jnp.concatenate([x, token, jnp.ones((x.shape[0], 2)), jnp.zeros_like(x)], axis=1)

    graph, params = jq.trace(fn, PARAMS, X)
    for n in (1, 2, 5):
        x = jnp.ones((n, 4))
        np.testing.assert_array_equal(jq.graph.evaluate_float(graph, params, x)[0], fn(PARAMS, x))


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda params, x: x - x.mean(), "sums or compares over the batch"),
        (lambda params, x: jax.nn.softmax(x, axis=0), "sums or compares over the batch"),
        (lambda params, x: x.T @ x, "sums or compares over the batch"),
        (lambda params, x: x * float(x.shape[0]), "depends on the batch size"),
        (lambda params, x: x + jnp.arange(x.shape[0] * 4.0).reshape(x.shape), "depends on the batch size"),
        (lambda params, x: x if x.shape[0] == 2 else -x, "something else at another batch size"),
        (lambda params, x: x.reshape(2, 4), "at a batch of 4"),
    ],
)
def test_a_batch_that_cannot_stay_symbolic_is_an_error_that_says_so(fn, message) -> None:
    with pytest.raises(jq.ConversionError, match=message) as error:
        jq.trace(fn, {}, X)
    assert "dynamic_batch=False" in str(error.value)
    graph, params = jq.trace(fn, {}, X, dynamic_batch=False)
    assert graph.inputs[0].shape == (2, 4)
    np.testing.assert_allclose(jq.graph.evaluate_float(graph, params, X)[0], fn({}, X), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Opaque nodes, and errors


def spectrum(params, x):
    return dense(params, jnp.tanh(jax.lax.cumprod(x, axis=1)))


def test_an_opaque_node_runs_in_float_and_fake_quant_and_is_refused_by_name() -> None:
    graph, params = jq.trace(spectrum, PARAMS, X)
    assert names(graph)[0] == "cumprod"
    np.testing.assert_allclose(jq.graph.evaluate_float(graph, params, X)[0], spectrum(PARAMS, X), rtol=1e-6)
    model = jq.prepare(
        graph, params, jq.QConfig({"*": jq.Policy(weight=jq.int8(), output=jq.int8())}), target=jq.targets.NASH_E
    )
    model = jq.calibrate(model, [X])
    np.testing.assert_allclose(jq.apply(model, X), spectrum(PARAMS, X), atol=0.1)
    with pytest.raises(jq.LoweringError, match=r"node 'cumprod' \(Opaque\): the primitive cumprod on \['batch', 4\]"):
        jq.lower(model)
    with pytest.raises(jq.FormatError, match="cumprod"):
        jq.graph.graph_to_json(graph)


def test_a_branch_that_depends_on_the_input_is_opaque() -> None:
    def fn(params, x):
        return jax.lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x)

    graph, _ = jq.trace(fn, {}, X, dynamic_batch=False)
    assert "cond" in names(graph)
    for x in (X, -X):
        np.testing.assert_allclose(jq.graph.evaluate_float(graph, {}, x)[0], fn({}, x), rtol=1e-6)


@pytest.mark.parametrize(
    ("fn", "params", "inputs", "message"),
    [
        (lambda params, x: x, {}, (), "needs an example of every input"),
        (lambda params, x: x, {}, (1.0,), "is float, not an array"),
        (lambda params, x: x, {}, (np.zeros((2, 3)),), "is float64; use float32"),
        (lambda params, x: x, {}, (jnp.float32(1),), "has no batch axis"),
        (lambda params, x, y: x, {}, (X, X[:1]), r"batches of \[1, 2\]"),
        (lambda params, x: (), {}, (X,), "returns no array"),
        (lambda params, x: x @ params["w"], {"w": jnp.ones((3, 3))}, (X,), "cannot be traced by JAX"),
        (lambda params, x: x if x[0, 0] > 0 else -x, {}, (X,), "cannot be traced by JAX"),
        (lambda params, x: x.astype(jnp.float16) @ params["w"], {"w": jnp.ones((4, 3), "float16")}, (X,), "is float16"),
        (
            lambda params, x: jax.lax.scan(lambda c, _: (jnp.tanh(c), None), x, None, length=5000)[0],
            {}, (X,), "a scan of 5000 steps",
        ),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(fn, params, inputs, message) -> None:
    with pytest.raises(jq.JQuantError, match=message):
        jq.trace(fn, params, *inputs)


def test_leaves_with_one_path_are_refused() -> None:
    with pytest.raises(jq.ConversionError, match="one path"):
        jq.trace(lambda params, x: x, {"a": {"b": X}, "a.b": X}, X)


def test_a_parameter_that_is_not_finite_is_named() -> None:
    broken = {"dense": {"kernel": jnp.full((4, 3), jnp.nan), "bias": jnp.zeros(3)}}
    with pytest.raises(jq.CalibrationError, match=re.escape("'dense.kernel'")):
        jq.trace(dense, broken, X)


@pytest.mark.parametrize("name", ["conv", "relu"])
def test_a_parameter_with_the_name_of_an_operator_keeps_a_scale_of_its_own(name):
    """The node had the name of its weight, and calibration put the scales of one in the place of the other."""

    def fn(params, x):
        layout = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, params[name], (1, 1), "SAME", dimension_numbers=layout)
        return jax.nn.relu(x).mean((1, 2))

    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 2, 4)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(8, 4, 4, 2)), jnp.float32)
    graph, params = jq.trace(fn, {name: kernel}, x)
    assert name in params
    assert name not in graph.by_name
    model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default(observer="min_max")), target="nash-e")
    model = jq.calibrate(model, [x])
    error = jq.run(jq.lower(model), x) - fn({name: kernel}, x)
    assert float(jnp.abs(error).max()) < 0.05  # 4 LSB of a mean below 1.5, of int8


def test_an_input_with_the_name_of_a_parameter_is_refused():
    graph, params = jq.trace(lambda params, x: x @ params["x"], {"x": jnp.eye(3)}, jnp.ones((2, 3)))
    with pytest.raises(jq.QConfigError, match=r"'x' is the name of a value and of a weight.*rename"):
        jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target="nash-e")
