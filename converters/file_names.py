"""Errors about a file name it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jquant.types import JQuantError


@contextmanager
def naming(source: Any) -> Iterator[None]:
    """Puts the path in front of an error of jquant that is raised inside; nothing where `source` is no path.

    Raises:
      JQuantError: the same error, with the path.
    """
    try:
        yield
    except JQuantError as error:
        if not isinstance(source, str | os.PathLike) or os.fspath(source) in str(error):
            raise
        raise type(error)(f"{os.fspath(source)}: {error}") from error
