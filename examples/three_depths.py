"""Three depths of quantization in JAX code, on one small regression: by hand, the weights, the whole model.

.venv/bin/python -m examples.three_depths
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jquant as jq


def data() -> tuple[jax.Array, jax.Array]:
    x = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(np.sin(x[:, :2]))


def init() -> dict:
    rng = np.random.default_rng(1)
    kernel = lambda *shape: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)  # noqa: E731
    return {
        "up": {"kernel": kernel(8, 16), "bias": jnp.zeros(16)},
        "head": {"kernel": kernel(16, 2), "bias": jnp.zeros(2)},
    }


def model(params, x):
    x = jax.nn.relu(x @ params["up"]["kernel"] + params["up"]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def by_hand(params, x):
    """(a) Numerics by hand: fake_quant inside a model, wherever it is wanted."""
    kernel = jq.lsq(params["up"]["kernel"], jnp.float32(0.05), jq.int4())
    x = jax.nn.relu(x @ kernel + params["up"]["bias"])
    x = jq.fake_quant(x, jnp.float32(0.02), jq.int8())
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def train(loss, variables, steps: int, learning_rate: float = 1e-2):
    """Anyone's training loop: variables are a pytree, and the optimizer is any optax chain."""
    tx = optax.adam(learning_rate)
    state = tx.init(variables)

    @jax.jit
    def step(variables, state):
        value, grads = jax.value_and_grad(loss)(variables)
        updates, state = tx.update(grads, state, variables)
        return optax.apply_updates(variables, updates), state, value

    for _ in range(steps):
        variables, state, value = step(variables, state)
    return variables, float(value)


def main(steps: int = 200) -> dict[str, float]:
    x, y = data()
    losses = {}
    _, losses["by hand"] = train(lambda p: jnp.mean((by_hand(p, x) - y) ** 2), init(), steps)

    # (b) The weights of any pytree, in any loss.
    qconfig = jq.QConfig({"up.*": jq.Policy(weight=jq.int4(axis="out")), "head.*": jq.Policy(weight=jq.int8())})
    _, losses["weights"] = train(
        lambda p: jnp.mean((model(jq.functions.quantize_params(p, qconfig), x) - y) ** 2), init(), steps
    )

    # (c) The whole model: traced, prepared, calibrated, trained with its scales, lowered, run as integers.
    qconfig = jq.QConfig({"*": jq.Policy(weight=jq.int4(axis="out", quantizer=jq.lsq), output=jq.int8())})
    qmodel, variables = jq.quantize(model, init(), qconfig, [x])
    variables, losses["whole model"] = train(lambda v: jnp.mean((qmodel(v, x) - y) ** 2), variables, steps)
    program = qmodel.lower(variables)
    print(program)
    print("integer loss:", float(jnp.mean((jq.run(program, x) - y) ** 2)))
    return losses


if __name__ == "__main__":
    for name, loss in main().items():
        print(f"{name}: {loss:.4f}")
