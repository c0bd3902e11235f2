"""Batches that become one array on disk, against numpy's concatenation."""

import os
from pathlib import Path

import numpy as np
import pytest

from jquant.host.growing import GrowingArray


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.float32, np.bool_])
def test_batches_become_one_array(dtype: type, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 2, (n, 3, 5)).astype(dtype)[:, ::-1] for n in (4, 4, 1)]
    with GrowingArray(tmp_path) as growing:
        for batch in batches:
            growing.append(batch)
        found = growing.array()
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, np.concatenate(batches))
        assert not os.listdir(tmp_path)  # nothing is left by a process that dies


def test_samples_without_elements_and_scalars(tmp_path: Path) -> None:
    with GrowingArray(tmp_path) as empty, GrowingArray(tmp_path) as flat:
        empty.append(np.zeros((2, 0), np.float32))
        assert empty.array().shape == (2, 0)
        flat.append(np.array([1, 2]))
        flat.append(np.array([3]))
        assert flat.array().tolist() == [1, 2, 3]
        with pytest.raises(ValueError, match=r"float32\[1\] behind int64\[0\]"):
            flat.append(np.zeros(1, np.float32))
