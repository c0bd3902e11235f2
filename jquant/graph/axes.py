"""Meshes with explicit axes, which `jax.make_mesh` makes: inside jquant they are left to the compiler.

With explicit axes the type of an array has its sharding, and every operator has to be told that of its result where it
does not follow. An evaluation says of its results that their batch is divided as that of the inputs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

Result = TypeVar("Result")
Places = Callable[[Any], Any]  # results, as shapes and dtypes -> a PartitionSpec for each


def with_automatic_axes(
    call: Callable[[Any, Any], Result], values: Any, inputs: Any, places: Places | None = None
) -> Result:
    """`call(values, inputs)`, a function of pytrees of arrays, without explicit axes inside.

    Args:
      inputs: pytree of arrays whose first axis is the batch.
      places: how the results are divided. None: along their first axis as the inputs are; whole without the batch.
    """
    mesh = _explicit_mesh(inputs, values)
    if mesh is None:
        return call(values, inputs)
    with jax.sharding.use_abstract_mesh(mesh):
        results = jax.eval_shape(jax.sharding.auto_axes(call, out_sharding=PartitionSpec()), values, inputs)
        specs = (places or _by_batch(inputs))(results)
        return jax.sharding.auto_axes(call, out_sharding=specs)(values, inputs)


def _by_batch(inputs: Any) -> Places:
    divided = [(len(leaf), spec_of(leaf)) for leaf in jax.tree.leaves(inputs) if _is_explicit(leaf)]
    samples, spec = divided[0] if divided else (0, PartitionSpec())

    def place(result: Any) -> PartitionSpec:
        return PartitionSpec(spec[0] if spec and result.shape[:1] == (samples,) else None)

    return lambda results: jax.tree.map(place, results)


def spec_of(leaf: Any) -> PartitionSpec:
    """How an array is divided over explicit axes."""
    return jax.typeof(leaf).sharding.spec if _is_explicit(leaf) else PartitionSpec()


def automatic(array: Any) -> Any:
    """An array whose axes are left to the compiler, on the same devices; a tracer and anything else as it is."""
    if not _is_explicit(array) or isinstance(array, jax.core.Tracer):
        return array
    return jax.device_put(array, NamedSharding(automatic_mesh(array.sharding.mesh), array.sharding.spec))


def automatic_mesh(mesh: Mesh) -> Mesh:
    """The devices of a mesh, with axes that are left to the compiler."""
    return Mesh(mesh.devices, mesh.axis_names)


@contextmanager
def automatic_axes() -> Iterator[None]:
    """The axes of a mesh that `jax.set_mesh` set are left to the compiler: for what works on whole arrays of data.

    As a decorator it serves functions whose arrays went through `automatic`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit not in mesh.axis_types:
        yield
        return
    with jax.sharding.use_abstract_mesh(mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names))):
        yield


def _explicit_mesh(*trees: Any) -> AbstractMesh | None:
    """The mesh of arrays that are divided over explicit axes, or the one that is set, if its axes are explicit."""
    for leaf in jax.tree.leaves(trees):
        if _is_explicit(leaf):
            return jax.typeof(leaf).sharding.mesh
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if AxisType.Explicit in mesh.axis_types else None


def _is_explicit(leaf: Any) -> bool:
    """Of hundreds of leaves at each call: the type of an array on one device is not asked for."""
    if isinstance(leaf, jax.core.Tracer):
        return AxisType.Explicit in jax.typeof(leaf).sharding.mesh.axis_types
    sharding = getattr(leaf, "sharding", None)
    return isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types
