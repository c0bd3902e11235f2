"""The memory that a float evaluation takes at the least, asked before it runs.

A contraction (convolution, linear layer, matrix product) has its operands and its result in memory at the same time;
nothing can be fused with both. So the largest sum of these is a lower bound of the peak, and a batch that is refused
would have failed. One that is not refused may still fail.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import jax

from jquant.graph.float import value_types
from jquant.types import Graph, InputError, Node, Params

_FEW = 2**18  # bytes of inputs, and
_SMALL = 2**26  # of a lower bound, that are not worth a look


@dataclass(frozen=True)
class Need:
    """The node that needs most at a batch size: its value, the bytes of it, and with its operands (a lower bound)."""

    node: Node
    shape: tuple[int, ...]
    dtype: str
    value: int
    together: int
    batch: int

    def __str__(self) -> str:
        return (
            f"node {self.node.name!r} ({type(self.node.op).__name__}) makes {self.dtype} {list(self.shape)}, "
            f"{in_bytes(self.value)}, and with its operands needs {in_bytes(self.together)} at the least"
        )


def in_bytes(count: float) -> str:
    """The count in the largest unit that leaves a number above 1: 3221225472 is 3.2 GB."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def largest_need(graph: Graph, types: Mapping[str, jax.ShapeDtypeStruct], batch: int) -> Need | None:
    """The contraction that needs most memory, of values of these types; None where a graph has none."""
    found = None
    for node in graph.nodes:
        if not node.op.keeps_accumulator:
            continue
        value, operands = _bytes(types[node.name]), sum(_bytes(types[name]) for name in set(node.inputs))
        if found is None or value + operands > found.together:
            kind = types[node.name]
            found = Need(node, tuple(kind.shape), str(kind.dtype), value, value + operands, batch)
    return found


def _bytes(kind: jax.ShapeDtypeStruct) -> int:
    return prod(kind.shape) * kind.dtype.itemsize


def free_memory(device: jax.Device | None = None) -> int | None:
    """Bytes that a device can still give, for a CPU those of the host: by its kernel, its container and its limits.

    None where nothing tells.
    """
    device = device or jax.devices()[0]
    if device.platform != "cpu":
        known = device.memory_stats() or {}
        return known["bytes_limit"] - known["bytes_in_use"] if {"bytes_limit", "bytes_in_use"} <= known.keys() else None
    found = [_available(), _container(), _address_space()]
    return min((one for one in found if one is not None), default=None)


def _available() -> int | None:
    for line in _text("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _container() -> int | None:
    limit, used = _text("/sys/fs/cgroup/memory.max").strip(), _text("/sys/fs/cgroup/memory.current").strip()
    return max(int(limit) - int(used), 0) if limit.isdigit() and used.isdigit() else None


def _address_space() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    limit, pages = resource.getrlimit(resource.RLIMIT_AS)[0], _text("/proc/self/statm").split()
    return max(limit - int(pages[0]) * resource.getpagesize(), 0) if limit != resource.RLIM_INFINITY and pages else None


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""


def check_memory(graph: Graph, params: Params, batch: int, remedy: str, at_once: int = 1) -> None:
    """Looks whether a float evaluation can fit at all.

    Args:
      graph, params: the float model.
      batch: samples that one device sees at once.
      remedy: with {batch}, what to do to run a smaller batch.
      at_once: devices that share the memory of the host and run at the same time.

    Raises:
      InputError: it cannot; with the node and its value, the bytes, those that are free, and a batch that fits by the
        same bound.
    """
    need = largest_need(graph, value_types(graph, params, batch), batch)
    if need is None or need.together * at_once < _SMALL:
        return
    free = free_memory()
    if free is None or need.together * at_once <= free:
        return
    fits = batch * free // at_once // need.together  # the bound grows no faster than the batch
    advice = remedy.format(batch=fits) if fits else "One sample does not fit; make the input smaller"
    times = f", times {at_once} devices of one memory" if at_once > 1 else ""
    raise InputError(f"{need} at a batch of {batch}{times}; {in_bytes(free)} of memory are free. {advice}")


@contextmanager
def fitting(
    graph: Graph, params: Params, inputs: Mapping[str, Any], remedy: str, devices: Sequence[jax.Device] = ()
) -> Iterator[None]:
    """Looks whether the inputs can be evaluated before it is done within, and names the cause if memory runs out.

    Args:
      graph, params: the float model.
      inputs: by name; tracers are not looked at.
      remedy: with {batch}, what to do to run a smaller batch.
      devices: those that have equal parts of the batch.

    Raises:
      InputError: as `check_memory`; or memory ran out.
    """
    arrays = list(inputs.values())
    if any(isinstance(x, jax.core.Tracer) for x in arrays) or sum(x.nbytes for x in arrays) < _FEW:
        yield
        return
    share = -(-batch_of(graph, inputs) // max(len(devices), 1))
    at_once = len(devices) if devices and devices[0].platform == "cpu" else 1
    check_memory(graph, params, share, remedy, at_once)
    with naming_memory(lambda: largest_need(graph, value_types(graph, params, share), share), remedy):
        yield


def batch_of(graph: Graph, inputs: Mapping[str, Any]) -> int:
    """The samples that inputs hold; 1 for a graph without a free batch."""
    return next((inputs[i.name].shape[0] for i in graph.inputs if i.shape and i.shape[0] is None), 1)


@contextmanager
def naming_memory(need: Callable[[], Need | None], remedy: str) -> Iterator[None]:
    """Within it, an allocation that fails ends in an error with the largest node and the remedy.

    Raises:
      InputError: memory ran out.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        largest = need()
        named = "" if largest is None else f": {largest} at a batch of {largest.batch}"
        half = 1 if largest is None else largest.batch // 2
        advice = remedy.format(batch=half) if half else "Make the input smaller"
        raise InputError(f"memory ran out{named}. {advice}") from error
