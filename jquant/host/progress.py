"""Progress of long work on a terminal, with the time gone and the time left; silent everywhere else."""

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from functools import cache
from time import monotonic
from typing import Any, TypeVar

Item = TypeVar("Item")

PATIENCE = 1.0  # seconds for which work that is often quick shows nothing


def track(items: Iterable[Item], description: str, total: int | None = None, *, after: float = 0.0) -> Iterator[Item]:
    """Yields the items with a progress bar on stderr, if that is a terminal and rich is installed.

    The environment variable JQUANT_PROGRESS=off turns it off. `after` is the number of seconds before it is shown; work
    that ends sooner shows nothing.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    bar = _bar(stays=not after)
    if bar is None:
        yield from items
        return
    ends = [monotonic()]
    task = bar.add_task(description, total=total, ends=ends, first_is_long=True)
    with _shown(bar, after):
        for item in items:
            yield item
            ends.append(monotonic())
            bar.advance(task)


@contextmanager
def stages(description: str, names: Sequence[str]) -> Iterator[Callable[[str], None]]:
    """Shows which stage of some work runs. The time left is estimated as if all stages took equally long.

    What ends within a second shows nothing. Stages may be left out.

    Example:
      >>> with stages("comparing", ("float", "integers")) as begin:
      ...     begin("float")
      ...     begin("integers")
    """
    bar = _bar(stays=False)
    if bar is None:
        yield lambda name: None
        return
    ends = [monotonic()]
    task = bar.add_task(description, total=len(names), ends=ends, first_is_long=False)

    def begin(name: str) -> None:
        done = names.index(name)
        ends[1:] = [monotonic()] * done if done else []
        bar.update(task, description=f"{description}: {name}", completed=done)

    with _shown(bar, PATIENCE):
        yield begin


def time_left(ends: Sequence[float], total: int | None, first_is_long: bool, now: float) -> tuple[float | None, bool]:
    """Seconds until all steps are done by the steps that are, or None, and whether that is a bound.

    Args:
      ends: when the work began, and when each step ended.
      total: how many steps there are; None if that is not known.
      first_is_long: the first step compiles, and says nothing of the others but that they take no longer.
      now: in seconds, as `ends`.
    """
    done = len(ends) - 1
    if not done or total is None:
        return None, False
    alone = first_is_long and done > 1
    each = (ends[-1] - ends[1]) / (done - 1) if alone else (ends[-1] - ends[0]) / done
    left = each * (total - done) - (now - ends[-1])
    return (left if left > 0 else None), first_is_long and done == 1


def _bar(stays: bool) -> Any:
    """A bar that is not shown yet; None where there is no terminal, or no rich."""
    if not sys.stderr.isatty() or os.environ.get("JQUANT_PROGRESS") == "off":
        return None
    try:
        from rich import progress
    except ImportError:
        return None
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=16),
        progress.TaskProgressColumn(),
        _times()(),
        console=_console(),
        transient=not stays,
        redirect_stdout=False,
    )


@cache
def _console() -> Any:
    """One for all bars: rich shows a bar inside another one only where both have the same."""
    from rich.console import Console

    return Console(stderr=True)


@cache
def _times() -> Any:
    from rich.progress import ProgressColumn
    from rich.text import Text

    class Times(ProgressColumn):
        """The time gone, and the time left where a step has ended; it falls while the next one goes on."""

        max_refresh = 0.5

        def render(self, task: Any) -> Any:
            ends = task.fields["ends"]
            if task.finished:
                return Text(_clock(ends[-1] - ends[0]))
            now = monotonic()
            left, is_bound = time_left(ends, task.total, task.fields["first_is_long"], now)
            rest = "" if left is None else f", {'at most ' if is_bound else ''}{_clock(left)} left"
            return Text(f"{_clock(now - ends[0])}{rest}")

    return Times


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def _shown(bar: Any, after: float) -> Iterator[None]:
    """Shows a bar from `after` seconds on."""
    if not after:
        with bar:
            yield
        return
    timer = threading.Timer(after, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        bar.stop()
