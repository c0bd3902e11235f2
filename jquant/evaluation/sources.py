"""Models, programs and functions as one thing to evaluate: a hashable function and a pytree that it takes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jquant.meanings.apply import apply
from jquant.meanings.meaning import check_mode
from jquant.plan.scales import check_model
from jquant.program.integers import run
from jquant.program.lower import lower
from jquant.types import InputError, Model, Program

INTEGERS = "integers"


@dataclass(frozen=True)
class Source:
    """`call(value, *inputs)`; `is_shown`: a mode that was asked for, and not only what others are compared with."""

    call: Callable[..., Any]
    value: Any
    is_shown: bool = True


@dataclass(frozen=True)
class _Mode:
    mode: Any

    def __call__(self, model: Model, *inputs: Any) -> Any:
        return apply(model, *inputs, mode=self.mode)


@dataclass(frozen=True)
class _Function:
    function: Callable[..., Any]

    def __call__(self, value: Any, *inputs: Any) -> Any:
        return self.function(*inputs)


def sources_of(source: Any, modes: Sequence[str], against: Iterable[str | None]) -> dict[str, Source]:
    """{mode: source}, those that metrics compare with behind those that are shown.

    Raises:
      InputError: no source, or a mode that there is not. CalibrationError: a model without scales.
    """
    if isinstance(modes, str):
        raise InputError(f"modes is the text {modes!r}; give a tuple of names, such as ({modes!r},)")
    wanted = [name for name in dict.fromkeys(against) if name is not None]
    if isinstance(source, Model):
        shown = list(dict.fromkeys(modes or ("fake_quant",)))
        return {mode: _of_model(source, mode, mode in shown) for mode in dict.fromkeys([*shown, *wanted])}
    if modes:
        raise InputError(f"modes {list(modes)} are those of a model; {type(source).__name__} has one")
    named = source if isinstance(source, Mapping) else {_name_of(source): source}
    if not named:
        raise InputError("nothing to evaluate: the mapping of sources is empty")
    if missing := [name for name in wanted if name not in named]:
        raise InputError(f"a metric compares with {missing[0]!r}, and there is only {', '.join(named)}")
    return {name: _of_one(name, one) for name, one in named.items()}


def _name_of(source: Any) -> str:
    return INTEGERS if isinstance(source, Program) else getattr(source, "__name__", "function")


def _of_model(model: Model, mode: str, is_shown: bool) -> Source:
    if mode == INTEGERS:
        return Source(run, lower(model), is_shown)
    check_mode(mode)
    check_model(model, scales=mode != "float")
    return Source(_Mode(mode), model, is_shown)


def _of_one(name: str, one: Any) -> Source:
    if isinstance(one, Source):
        return one
    if isinstance(one, Program):
        return Source(run, one)
    if isinstance(one, Model):
        return _of_model(one, "fake_quant", True)
    if not callable(one):
        raise InputError(f"{name!r} is {type(one).__name__}; give a model, a program or a function of the inputs")
    return Source(_Function(one), ())
