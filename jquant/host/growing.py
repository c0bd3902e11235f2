"""Arrays of more samples than memory holds, collected in files that have no name."""

import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np


class GrowingArray:
    """An array [N, ...] to which batches are appended. Its file is gone when the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        """`folder`: on the disk that has room for it."""
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (closed by `__exit__`)
        self._count, self._kind = 0, np.empty(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, place: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, batch: np.ndarray) -> None:
        """Of the dtype and of the shape behind the first axis that the first one had."""
        if self._count and (batch.dtype, batch.shape[1:]) != (self._kind.dtype, self._kind.shape[1:]):
            raise ValueError(f"{batch.dtype}{list(batch.shape)} behind {self._kind.dtype}{list(self._kind.shape)}")
        self._count, self._kind = self._count + len(batch), batch[:0]
        self._file.write(np.ascontiguousarray(batch).data)

    def array(self) -> np.ndarray:
        """All that was appended; a view of the file."""
        self._file.flush()
        shape = (self._count, *self._kind.shape[1:])
        if not np.prod(shape):
            return np.empty(shape, self._kind.dtype)
        return np.memmap(self._file, self._kind.dtype, "r", shape=shape)
