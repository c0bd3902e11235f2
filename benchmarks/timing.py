"""How a benchmark times: contenders in alternating rounds, and each as a ratio of its base."""

import os
import random
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from keeping import markdown_table
from rich.console import Console
from rich.table import Table

from jquant.host.progress import track

THREADS = os.cpu_count() or 1
Step = Callable[[], Any]  # one step, waited for


class Contender(NamedTuple):
    """A step, and the one that it is a ratio of. `goal` is the largest ratio that we want of our own."""

    name: str
    step: Step
    base: str
    goal: float | None = None


def measure(contenders: list[Contender], rounds: int) -> dict[str, list[float]]:
    """Seconds by name; a round has a step of each, so that what else the machine does meets all.

    In an order of its own: a step finds caches and memory as the one before it left them.
    """
    for contender in track(contenders, "first steps"):
        for _ in range(2):
            contender.step()
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    order = random.Random(0)
    for _ in track(range(rounds), "rounds"):
        for contender in order.sample(contenders, len(contenders)):
            start = time.perf_counter()
            contender.step()
            times[contender.name].append(time.perf_counter() - start)
    return times


COLUMNS = ("step", "against", "ratio", "quarter to three quarters", "goal, at most")


def rows(contenders: list[Contender], times: dict[str, list[float]]) -> list[list[str]]:
    found = []
    for contender in contenders:
        if contender.base == contender.name:
            continue
        ratios = np.divide(times[contender.name], times[contender.base])
        low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        goal = "-" if contender.goal is None else f"{contender.goal:.2f}"
        found.append([contender.name, contender.base, f"{middle:.2f}", f"{low:.2f} to {high:.2f}", goal])
    return found


def report(contenders: list[Contender], times: dict[str, list[float]]) -> str:
    """Prints the ratios and the medians, and returns the table of a page."""
    found, console, table = rows(contenders, times), Console(), Table(*COLUMNS)
    for row in found:
        table.add_row(*row)
    console.print(table)
    console.print(", ".join(f"{name} {1000 * statistics.median(values):.3g} ms" for name, values in times.items()))
    return markdown_table(COLUMNS, found, left=2)
