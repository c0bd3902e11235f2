"""Which arrays arithmetic takes to the host: those of one device, and copies, but none that devices hold in parts."""

import jax
import jax.numpy as jnp
import numpy as np
from support.processes import finish, start

from jquant.numerics.namespace import array_namespace, to_device, to_host

DIVIDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jquant.numerics.namespace import to_host

two = Mesh(np.array(jax.devices()), ("data",))
parts = jax.device_put(jnp.arange(4), NamedSharding(two, PartitionSpec("data")))
copies = jax.device_put(jnp.arange(4), NamedSharding(two, PartitionSpec()))
found = to_host({"parts": parts, "copies": copies, "one": jnp.arange(4)})
assert found["parts"] is parts
assert isinstance(found["copies"], np.ndarray) and isinstance(found["one"], np.ndarray)
print("equal")
"""


def test_arrays_that_two_devices_share_stay() -> None:
    finish(start(DIVIDED, 2))


def test_a_tracer_stays_and_numbers_become_arrays() -> None:
    seen = []

    @jax.jit
    def traced(x: jax.Array) -> jax.Array:
        seen.append(to_host({"x": x, "one": 1.5}))
        return x

    traced(jnp.ones(2))
    assert isinstance(seen[0]["x"], jax.core.Tracer)
    assert seen[0]["one"].shape == ()


def test_to_device_keeps_the_tree_and_its_jax_arrays() -> None:
    own = jnp.ones(3)
    found = to_device({"a": own, "b": [np.arange(4, dtype=np.int8), np.float32(2)]})
    assert found["a"] is own
    assert all(isinstance(v, jax.Array) for v in jax.tree.leaves(found))
    np.testing.assert_array_equal(found["b"][0], np.arange(4))
    assert found["b"][0].dtype == np.int8


def test_the_namespace_is_numpy_where_all_arrays_are() -> None:
    host, device = np.ones(2), jnp.ones(2)
    assert array_namespace(host, 2.0, np.float32(1)) is np
    assert array_namespace(host, device) is jnp
    assert array_namespace(device) is jnp
