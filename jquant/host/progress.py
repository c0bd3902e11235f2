"""Progress of long work on a terminal; silent everywhere else."""

import os
import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

Item = TypeVar("Item")


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yields the items with a progress bar on stderr, if that is a terminal and rich is installed.

    The environment variable JQUANT_PROGRESS=off turns it off.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    try:
        if not sys.stderr.isatty() or os.environ.get("JQUANT_PROGRESS") == "off":
            raise ImportError
        from rich.console import Console
        from rich.progress import track as rich_track
    except ImportError:
        yield from items
        return
    yield from rich_track(items, description, total, console=Console(stderr=True))
