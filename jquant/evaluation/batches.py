"""Batches of an evaluation: arrays checked, padded to one size, put onto the devices."""

from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jquant.graph.axes import automatic, automatic_mesh
from jquant.graph.evaluate import host_array
from jquant.text import did_you_mean
from jquant.types import Array, InputError


def first_of(batch: Any) -> tuple[Array, ...]:
    """The input in a batch of the form (x, ...), or an array alone."""
    return (batch[0],) if isinstance(batch, tuple | list) else (batch,)


def processes_of(mesh: Mesh | None) -> int:
    """How many processes have devices of a mesh."""
    return 1 if mesh is None else len({device.process_index for device in mesh.devices.flat})


class Placed(NamedTuple):
    """A batch on the devices, padded to `size`. `given`: its arrays before, [samples, ...]; `of_all`: the number of
    samples over all processes."""

    number: int
    size: int
    batch: Any
    mask: Array
    given: Any
    samples: int
    of_all: int


class Placement:
    """Where batches go: onto the default device, or spread over an axis of a mesh."""

    def __init__(self, mesh: Mesh | None, axis: str) -> None:
        if mesh is not None and axis not in mesh.shape:
            known = tuple(map(str, mesh.shape))
            raise InputError(f"the mesh has no axis {axis!r}, only {', '.join(known)}{did_you_mean(axis, known)}")
        if mesh is not None:  # shardings left to the compiler: explicit axes would need one at every reshape
            mesh = automatic_mesh(mesh)
        self._split = None if mesh is None else NamedSharding(mesh, PartitionSpec(axis))
        self._whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        own = () if mesh is None else [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
        self.is_spread_over_processes = mesh is not None and len(own) < mesh.size
        self._processes = jax.process_count() if self.is_spread_over_processes else 1
        self._devices = 1 if mesh is None else max(1, mesh.shape[axis] // self._processes)

    def everywhere(self, values: Any) -> Any:
        return values if self._whole is None else jax.device_put(values, self._whole)

    def together(self, sums: Any) -> Any:
        """Sums that every process reads whole."""
        return jax.device_put(sums, self._whole) if self.is_spread_over_processes else sums

    def batches(
        self, batches: Iterable[Any], inputs: Callable[[Any], tuple[Any, ...]], skipped: int, is_padded: bool = True
    ) -> Iterator[Placed]:
        """The batches, each padded to the size of the first one, rounded up to the devices, or to its own if larger.

        Of the `skipped` first ones the very first alone. Of several processes, one that has no more batches goes on
        with padding until the others have none either. Without padding each batch has its own size, which is that of
        all processes.
        """
        size, last, number = 0, None, -1
        for number, (given, counts) in enumerate(self._in_step(batches)):
            if given is None and last is None:
                raise InputError("a process has no batches at all; give each process at least one")
            samples, given = (0, last) if given is None else (_samples(given, number), given)
            if samples:
                _check_finite(inputs(given), number)
            if not is_padded:
                self._check_unpadded(number, counts)
                size = 0
            size = max(size, -(-max(counts) // self._devices) * self._devices)
            if not 0 < number < skipped:
                padded = jax.tree.map(lambda v, size=size: _padded(v, size), given)
                mask = np.arange(size) < samples
                yield Placed(number, size, self._put(padded), self._put(mask), given, samples, sum(counts))
            last = jax.tree.map(lambda v: v[:1], given) if self._processes > 1 else given
        if number + 1 < skipped:
            raise InputError(
                f"the position counts {skipped} batches, and there are {number + 1}; give the same data or another file"
            )

    def _check_unpadded(self, number: int, counts: list[int]) -> None:
        if len(set(counts)) > 1:
            raise InputError(
                f"batch {number} has {', '.join(map(str, counts))} samples in the processes, and padding is off; give "
                "each process as many batches of the same sizes"
            )
        if counts[0] % self._devices:
            raise InputError(
                f"batch {number} has {counts[0]} samples, which the {self._devices} devices do not divide, and padding "
                "is off; give batches of a size that they divide"
            )

    def _in_step(self, batches: Iterable[Any]) -> Iterator[tuple[Any, list[int]]]:
        """Each batch, None where only other processes have one, and the numbers of samples in the processes."""
        if self._processes == 1:
            for number, batch in enumerate(batches):
                given = _arrays(batch, number)
                yield given, [_samples(given, number)]
            return
        from jax.experimental import multihost_utils

        iterator = iter(batches)
        for number in count():
            batch = next(iterator, None)
            given = None if batch is None else _arrays(batch, number)
            samples = 0 if batch is None else _samples(given, number)
            counts = [int(n) for n in np.ravel(multihost_utils.process_allgather(np.int32(samples)))]
            if not any(counts):
                return
            yield given, counts

    def _put(self, arrays: Any) -> Any:
        if self._split is None:
            return jax.device_put(arrays)
        if self._processes == 1:
            return jax.device_put(arrays, self._split)
        split = self._split
        return jax.tree.map(lambda v: jax.make_array_from_process_local_data(split, np.asarray(v)), arrays)


def _arrays(batch: Any, number: int) -> Any:
    """A batch with torch tensors as numpy arrays; tuples, as jit compares them."""
    if isinstance(batch, list):
        batch = tuple(batch)
    return jax.tree.map(lambda v: automatic(host_array(v, f"batch {number}")), batch)


def _samples(batch: Any, number: int) -> int:
    sizes = {np.shape(v)[:1] for v in jax.tree.leaves(batch)}
    if len(sizes) != 1 or sizes == {()} or sizes == {(0,)}:
        shapes = [list(np.shape(v)) for v in jax.tree.leaves(batch)]
        raise InputError(f"batch {number} has arrays {shapes}; each must have the same number of samples in front")
    return int(sizes.pop()[0])


def _check_finite(inputs: tuple[Any, ...], number: int) -> None:
    """Arrays of numpy alone: those of a device are not fetched for it."""
    for i, x in enumerate(jax.tree.leaves(inputs)):
        if isinstance(x, np.ndarray) and x.dtype.kind == "f" and not np.isfinite(x).all():
            raise InputError(f"batch {number}, input {i} contains NaN or infinite values; check the preprocessing")


def _padded(array: Any, size: int) -> Any:
    """The array [N, ...] as [size, ...], its last sample repeated."""
    missing = size - array.shape[0]
    if not missing:
        return array
    host = np.asarray(array)
    return np.concatenate((host, np.repeat(host[-1:], missing, axis=0)))
