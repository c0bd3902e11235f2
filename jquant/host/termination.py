"""SIGTERM as a question between two steps: schedulers send it some seconds before they end a process."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TERMINATED = 143  # what a shell says of a process that SIGTERM ended


@contextmanager
def noting_termination() -> Iterator[Callable[[], bool]]:
    """Within it SIGTERM ends nothing; what is yielded says whether it came.

    Only the main thread can take signals. In another one SIGTERM works as before, and the answer is always no.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
