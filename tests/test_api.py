"""The public surface: sorted, importable, documented, and every example in a docstring runs."""

import doctest
import importlib
import inspect
import pkgutil
import sys
from functools import reduce

import pytest

import jquant as jq
import jquant_converters

MODULES = sorted(m.name for m in pkgutil.walk_packages(jq.__path__, "jquant."))
CONVERTERS = sorted(m.name for m in pkgutil.walk_packages(jquant_converters.__path__, "jquant_converters."))


def test_all_is_sorted_without_repeats() -> None:
    assert jq.__all__ == sorted(set(jq.__all__))
    assert len(jq.__all__) <= 70  # what is used less often is in a package
    assert jq.ops.__all__ == sorted(set(jq.ops.__all__))


@pytest.mark.parametrize("module", [jq, jq.analysis, jq.ops, jq.reference, jq.targets], ids=lambda m: m.__name__)
def test_every_public_name_is_there_and_documented(module) -> None:
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value) or inspect.ismodule(value):
            assert (value.__doc__ or "").strip(), f"{module.__name__}.{name} has no docstring"


def test_every_public_function_shows_an_example_that_runs() -> None:
    """`test_the_examples_of_docstrings_run` runs them."""
    found = [name for name in jq.__all__ if inspect.isfunction(getattr(jq, name))]
    assert len(found) > 20
    assert [name for name in found if ">>> " not in (getattr(jq, name).__doc__ or "")] == []


def test_dataclasses_have_a_docstring_of_their_own() -> None:
    for name in jq.__all__:
        value = getattr(jq, name)
        if inspect.isclass(value):
            assert not value.__doc__.startswith(f"{name}("), f"{name}: the docstring is the generated signature"


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_docstrings_run(name: str) -> None:
    module = importlib.import_module(name)
    assert (module.__doc__ or "").strip()
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", MODULES + CONVERTERS)
def test_no_name_hides_a_module(name: str) -> None:
    """`jquant.plan.prepare` is the module, from `import jquant.plan.prepare` and from attribute to attribute."""
    module = importlib.import_module(name)
    root, *parts = name.split(".")
    assert reduce(getattr, parts, sys.modules[root]) is module


def test_errors_have_one_base() -> None:
    raised = [v for n in jq.__all__ if inspect.isclass(v := getattr(jq, n)) and issubclass(v, Exception)]
    errors = [v for v in raised if not issubclass(v, Warning)]
    assert len(errors) == 8
    assert all(issubclass(e, jq.JQuantError) for e in errors)
