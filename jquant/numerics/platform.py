"""The kind of device that arithmetic is traced for: the bits are the same on each, the way there is not."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import jax

_traced_for: ContextVar[str] = ContextVar("traced_for", default="")


def platform() -> str:
    """ "cpu", "gpu" or "tpu": of the default device, or as `tracing_for` says."""
    return _traced_for.get() or jax.default_backend()


def is_traced_for_another() -> bool:
    """Whether the trace is for a file, and does not run here."""
    return bool(_traced_for.get())


@contextmanager
def tracing_for(platforms: Sequence[str]) -> Iterator[None]:
    """Inside, traces are for these: "cpu", "cuda", "rocm", "tpu". The way of a GPU is right on all of them."""
    kinds = {{"cuda": "gpu", "rocm": "gpu"}.get(name, name) for name in platforms}
    token = _traced_for.set(kinds.pop() if len(kinds) == 1 else "gpu")
    try:
        yield
    finally:
        _traced_for.reset(token)
