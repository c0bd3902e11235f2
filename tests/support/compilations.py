"""How many XLA programs are compiled: counted, since a time depends on the machine."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

EVENT = "/jax/core/compile/backend_compile_duration"


@contextmanager
def counted() -> Iterator[list[float]]:
    """The durations of the compilations inside, seconds."""
    found: list[float] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if event == EVENT:
            found.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
