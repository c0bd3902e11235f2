"""The command that a command names at its end: settings, scales, a measurement, a search, integers, a file."""

from collections.abc import Mapping
from pathlib import Path

from jquant.cli.accuracy import AGREEMENT, TOP_1
from jquant.cli.state import State
from jquant.types import Program

LOST = 1.0  # percent below float from which on a report comes next, not integers
BUDGET = 1.2  # of the search: a fifth more multiply-accumulates than with everything at 8 bits

Words = tuple[object, ...]


def named(
    model: str, config: Path | None = None, checkpoint: Path | None = None, shapes: list[str] | None = None
) -> Words:
    """The words that name a model once more."""
    given = () if config is None else ("--config", config)
    weights = () if checkpoint is None else ("--checkpoint", checkpoint)
    return (model, *given, *weights, *(word for shape in shapes or () for word in ("--shape", shape)))


def towards_scales(
    state: State, model: str, config: Path | None, checkpoint: Path | None, shapes: list[str] | None
) -> Words:
    """Of a model that was looked at: settings where it has none, then scales, then accuracy."""
    if not state.is_planned:
        return ("init", *named(model, None, checkpoint, shapes), "-o", "q.toml")
    if state.qparams is None:
        return ("calibrate", *named(model, config, checkpoint, shapes), "--data", "DATA", "-o", "net.jqs")
    return ("eval", *named(model, config), "--data", "DATA")


def after_accuracy(
    source: State | Program, what: str, figures: Mapping[str, float], model: str, config: Path | None, data: str
) -> Words:
    """Of a model that was measured: a report where accuracy is lost, integers where it is not."""
    if isinstance(source, Program):
        return ("run", *named(model, config), "--data", data, "-o", beside(model, ".npz"))
    if source.qparams is None:
        return towards_scales(source, model, config, None, None)
    if is_lost(what, figures):
        return ("report", *named(model, config), "--data", data, "-o", "report")
    return to_integers(model, config)


def after_report(
    measured: Mapping[str, Mapping[str, float]], model: str, config: Path | None, data: str, *, writes: bool = True
) -> Words:
    """Of a model with a report: more bits where accuracy is lost or was not measured, integers where it is not."""
    for what in (TOP_1, AGREEMENT):
        figures = {mode: each[what] for mode, each in measured.items() if what in each}
        if figures and not is_lost(what, figures):
            return to_integers(model, config)
    return search(model, config, data, writes=writes)


def search(
    model: str,
    config: Path | None,
    data: str,
    budget: float = BUDGET,
    cost: str = "macs",
    *,
    writes: bool = True,
) -> Words:
    """Bits for each value and weight, as settings; printed alone for a model that was prepared in Python."""
    unit = () if cost == "macs" else ("--cost", cost)
    return (
        *("sensitivity", *named(model, config), "--data", data),
        *("--budget", f"{budget:g}", *unit, *(("-o", "mixed.toml") if writes else ())),
    )


def to_integers(model: str, config: Path | None = None) -> Words:
    return ("quantize", *named(model, config), "-o", beside(model, ".jq"))


def beside(model: str, suffix: str) -> Path:
    """A file with the name of a model's, and another suffix."""
    return Path(model.partition(":")[0]).with_suffix(suffix)


def is_lost(what: str, figures: Mapping[str, float]) -> bool:
    """Whether a mode is clearly below float. Of a metric of one's own it is unknown which way is better."""
    if what not in (TOP_1, AGREEMENT):
        return False
    best = 100.0 if what == AGREEMENT else figures.get("float")
    return best is not None and not min(figures.values()) >= best - LOST
